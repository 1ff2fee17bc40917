"""The README is true: every command runs as it stands, in its order, in one fresh clone; and what it says
about equations, files, flags, metrics and departures is in the code."""
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import results
from conftest import ROOT, SMALL, flags
from PIL import Image

import data
import evaluate
import judges
import shapes

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```bash\n(.*?)^```", README, re.MULTILINE | re.DOTALL)

# Flags that make a run small. They are appended to a command, and the last value of a flag wins.
TINY = {
    "warmup.py": SMALL,
    "grpo.py": dict(updates=2, prompts_per_update=2, group_size=2, budget=48, eval_prompts=0),
    "evaluate.py": dict(prompts=2, updates=1, seeds="0", budget=24, only="warm-up"),
    "model.py": dict(budget=60),
    "shapes.py": dict(count=4),
    "published_samples.py": dict(share=0.1),
}
EVALUATED = "out/grpo"                # the run whose evaluation before and after GRPO runs too
# What needs published weights, or a run that started from them: it ends in one sentence and exit code 2.
PUBLISHED = r"mit-han-lab/|--preset paper|-7b\b|--judge image-reward "

# Stands in the place of python, pip and torchrun: adds the flags, runs, and records what happened.
SHIM = """
import json, os, subprocess, sys, time
name, arguments, tiny = sys.argv[1], sys.argv[2:], json.loads(os.environ["TINY"])
script = next((a for a in arguments if a.endswith(".py")), "")
extra = tiny.get(os.path.basename(script), [])
if "out/" not in " ".join(arguments) and script == "grpo.py":
    extra = extra + ["--eval-prompts", "2"]
command = {"python": [sys.executable], "torchrun": [sys.executable, "-m", "torch.distributed.run"]}.get(name)
began, code, out = time.perf_counter(), 0, ""
if command and script:
    done = subprocess.run(command + arguments + extra, capture_output=True, text=True)
    code, out = done.returncode, done.stdout + done.stderr
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps({"name": name, "arguments": arguments, "extra": extra, "code": code, "out": out,
                            "seconds": time.perf_counter() - began}) + "\\n")
sys.exit(code)
"""


@pytest.fixture(scope="module")
def clone(warm, tmp_path_factory):
    """A clone in which all commands of the README have run. Its warm-up model is the tests' small one: the
    first command would train the whole one."""
    folder = results.fresh_clone(tmp_path_factory.mktemp("readme") / "clone")
    shutil.copytree(warm, folder / "out" / "warmup")
    script, start = folder / "evaluate.py", 'if __name__ == "__main__":'    # small runs of --reproduce
    small = {name: value for name, value in SMALL.items() if name in evaluate.WARM_UP}
    script.write_text(script.read_text().replace(
        start, f"WARM_UP.update({small})\nGRPO.update(budget=24)\n{start}"))
    tools = folder.parent / "tools"
    tools.mkdir()
    (tools / "shim.py").write_text(SHIM)
    for name in ("python", "pip", "torchrun"):
        (tools / name).write_text(f'#!/bin/sh\nexec {sys.executable} {tools}/shim.py {name} "$@"\n')
        (tools / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{tools}:{os.environ['PATH']}",
        "CALLS": str(folder.parent / "calls.jsonl"),
        "TINY": json.dumps({script: flags(settings) for script, settings in TINY.items()}),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(folder.parent / "no_hub"),
    }
    for block in BLOCKS:
        subprocess.run(["bash", "-c", block], cwd=folder, env=environment, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def calls(clone):
    """Every command that ran, in order: name, arguments, exit code, output."""
    return [json.loads(line) for line in (clone.parent / "calls.jsonl").read_text().splitlines()]


def words(call: dict) -> str:
    return " ".join([call["name"], *call["arguments"]])


def value(call: dict, flag: str) -> str | None:
    """The value of a flag of a command, None where it has none."""
    arguments = call["arguments"]
    return arguments[arguments.index(flag) + 1] if flag in arguments else None


def commands() -> list[list[str]]:
    """The commands of the README, split into words; a loop counts once."""
    lines = "\n".join(BLOCKS).replace("\\\n", "").splitlines()
    parts = [part for line in lines for part in re.split(r"&&|;", line)]
    return [split for split in (shlex.split(part, comments=True) for part in parts)
            if split and split[0] in ("python", "pip", "torchrun")]


# ------------------------------------------------------------------------------------------------------------
# Commands

def test_every_command_was_run(calls):
    assert len(commands()) > 20
    for command in commands():
        if "$s" not in " ".join(command):
            assert " ".join(command) in map(words, calls)
    scripts = {call["arguments"][0] for call in calls if call["name"] == "python"}
    assert scripts >= {path.name for path in ROOT.glob("*.py")} - {"common.py"}


def test_every_command_works_as_written(calls):
    for call in calls:
        if not re.search(PUBLISHED, words(call)):
            assert call["code"] == 0, f"{words(call)}\n{call['out'][-1500:]}"


def test_commands_that_need_published_weights_end_in_one_sentence(calls):
    found = [call for call in calls if re.search(PUBLISHED, words(call))]
    assert len(found) >= 5
    for call in found:
        assert call["code"] == 2, f"{words(call)}\n{call['out'][-1500:]}"
        assert "Traceback" not in call["out"]
        assert call["out"].splitlines()[-1].startswith("error: "), call["out"]


def test_every_run_has_a_folder_of_its_own(calls):
    """Two commands that write to one folder would overwrite each other, or refuse to run."""
    folders = {}
    for call in calls:
        script = next((a for a in call["arguments"] if a.endswith(".py")), "")
        if "--explain" in call["arguments"]:                       # it adds a page to a run
            continue
        default = {
            "warmup.py": "out/warmup",
            "grpo.py": "out/grpo",
            "model.py": value(call, "--merge") or "out/answer",
            "evaluate.py": f"out/{value(call, '--benchmark') or 'evaluate'}",
        }
        if script in default:
            out = value(call, "--out") or default[script]
            assert out not in folders, f"{words(call)}\nwrites to the folder of\n{folders[out]}"
            folders[out] = words(call)


def test_pictures_match_the_prompts_beside_them(calls, clone):
    """A prompt of the toy world names its start scene: that is what its picture shows."""
    found = 0
    for call in calls:
        text = value(call, "--prompt") or value(call, "--text") or ""
        files = value(call, "--image") or value(call, "--images")
        if files:
            scene = shapes.states_of_prompt(text)[0] if "<BEGIN>" in text else shapes.parse_caption(text)
            assert scene and shapes.matches(np.asarray(Image.open(clone / files)), scene), words(call)
            found += 1
    assert found >= 1


def test_prompts_on_disk_ask_for_as_many_edits_as_the_model_was_trained_on(calls, clone):
    import warmup
    files = {str(value(call, "--prompts")) for call in calls}
    files = [file for file in files if re.fullmatch(r"data/toy/.*\.jsonl", file)]
    assert files
    for line in (line for file in files for line in (clone / file).read_text().splitlines()):
        assert shapes.wanted_steps(json.loads(line)["prompt"]) == warmup.Config.edits


def test_everything_that_the_readme_names_is_there(clone):
    """Files and folders in backticks or links, those that the first command leaves behind included."""
    names = re.findall(r"`([\w./]+\.(?:py|html|jsonl|json|txt)|[\w]+/)`|\]\(([^)#]+)\)", README)
    names = {first or second for first, second in names}
    assert len(names) > 20
    for name in names:
        places = [clone / name, clone / EVALUATED / name]
        assert any(place.exists() for place in places), name


# ------------------------------------------------------------------------------------------------------------
# Claims

def source_of(file: str, name: str) -> str:
    """The source of a function, method or class."""
    text = (ROOT / file).read_text()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name:
            return ast.get_source_segment(text, node)
    raise AssertionError(f"{file} has no {name}")


def section(title: str) -> str:
    return re.search(rf"^## {title}.*?\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)[1]


def test_the_equation_map_is_true():
    """Every row of the map names a function that exists in its file and cites the equation there."""
    rows = re.findall(r"^\| \((\d)\)[^|]*(?:\\\|[^|]*)*\| `(\w+\.py)` \| `(\w+)`", README, re.MULTILINE)
    assert {number for number, _, _ in rows} == set("1234567") and len(rows) >= 9
    for number, file, name in rows:
        assert f"Eq. ({number})" in source_of(file, name), f"{file}: {name} does not cite Eq. ({number})"


def test_tables_show_the_kept_measurements():
    """Every line that tests/results.py makes of .github/results/*.json stands in the README."""
    for name, lines in results.tables().items():
        assert lines, name
        for line in lines:
            assert line in README, f"{name}: {line}"
    assert results.PLOT.read_text() == results.credit_plot()


def test_line_counts_are_true_within_five_percent():
    rows = re.findall(r"^\| `(\w+\.py)` \| ([\d,]+) \|", README, re.MULTILINE)
    assert {file for file, _ in rows} == {path.name for path in ROOT.glob("*.py")}
    for file, count in rows:
        true = len((ROOT / file).read_text().splitlines())
        assert abs(int(count.replace(",", "")) - true) <= 0.05 * true, f"{file} has {true} lines, not {count}"


def test_every_departure_is_a_choice_in_the_code():
    items = re.findall(r"^- (.*?)(?=\n- |\n\n|\Z)", section("Where we depart"), re.MULTILINE | re.DOTALL)
    assert len(items) >= 10
    for item in items:
        place = re.search(r"\(`(\w+\.py)`:\s+`(\w+)`\)\.", item)
        assert place, f"names no place: {item}"
        assert "Choice:" in source_of(*place.groups()), item


def test_how_to_change_it_names_what_there_is():
    """Functions, dicts and tests of the table exist; a test file that is named can be run."""
    row = r"^\| ([\w ]+) \| `(\w+\.py)`: (.*?) \| `(tests/\w+\.py)` \|"
    rows = re.findall(row, section("How to change it"), re.MULTILINE)
    wanted = {"reward", "judge", "credit rule", "world", "data set", "base model"}
    assert wanted <= {what for what, *_ in rows}
    for _, file, change, test in rows:
        assert (ROOT / test).exists(), test
        for name in re.findall(r"`(\w+)`", change):
            source = (ROOT / file).read_text()
            assert re.search(rf"^(def|class) {name}\b|^{name}\b.* = ", source, re.MULTILINE), name


def test_every_flag_exists():
    """Flags in running text belong to some script. Those in commands have been run."""
    known = {"nproc_per_node", "nnodes", "help", "count", "dump", "share", "small", "size", "types",
             "no_score_guided"}
    for file in ROOT.glob("*.py"):
        known |= set(re.findall(r"^    (\w+): .*#", file.read_text(), re.MULTILINE))
        known |= {name.replace("-", "_") for name in re.findall(r'"--([a-z-]+)"', file.read_text())}
    found = set(re.findall(r"--([a-z][a-z_-]+)", README))
    assert len(found) > 25
    assert {flag for flag in found if flag.replace("-", "_") not in known} == set()


def test_the_glossary_names_the_metrics_of_a_run(clone):
    rows = re.findall(r"^\| (`.*?`) \|", section("What the metrics mean"), re.MULTILINE)
    named = re.findall(r"`([\w/]+)`", " ".join(rows))
    lines = (clone / EVALUATED / "metrics.jsonl").read_text().splitlines()
    assert sorted(named) == sorted(json.loads(lines[-1])), "the glossary and metrics.jsonl differ"


def test_readers_judges_and_benchmarks_of_the_readme_are_those_of_the_dicts(calls):
    everything = " ".join(map(words, calls))
    for name in data.READERS:
        assert f"{name}=data/" in everything, f"no command shows the reader {name}"
    for name in evaluate.BENCHMARKS:
        assert f"--benchmark {name}" in everything, f"no command shows the benchmark {name}"
    for name in (name for part in judges.JUDGES.values() for name in part):
        assert name.replace("-", "") in README.lower().replace("-", ""), f"the judge {name} is not named"


def test_the_readme_is_short_and_its_lines_fit():
    """What is folded does not count."""
    unfolded = re.sub(r"<details>.*?</details>", "", README, flags=re.DOTALL)
    assert len(unfolded.splitlines()) <= 310
    assert [line for line in README.splitlines() if len(line) > 120] == []
