"""The house: arrows between files point down, functions fit a screen, every flag is read, every script
explains itself. Everything here is read from the source, nothing is trained."""
import ast
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

# File -> the files of this project that it may import. A file stands above all that import it.
ARROWS = {
    "common": [],
    "shapes": [],
    "tokenizer": ["common"],
    "model": ["common", "tokenizer"],
    "data": ["common", "shapes", "tokenizer", "model"],
    "judges": ["common", "tokenizer", "model"],
    "rewards": ["common", "shapes", "tokenizer", "judges"],
    "warmup": ["common", "shapes", "tokenizer", "model", "data", "rewards"],
    "evaluate": ["common", "shapes", "model", "data", "rewards", "judges"],
    "grpo": ["common", "shapes", "model", "data", "rewards", "warmup", "evaluate"],
}
SCRIPTS = [*(f"{name}.py" for name in ARROWS if name != "common"), "tests/published_samples.py"]
TREES = {name: ast.parse((ROOT / f"{name}.py").read_text(), f"{name}.py") for name in ARROWS}
FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def imported(node: ast.AST) -> list[str]:
    """The top-level modules that an import statement names, none for any other node."""
    if isinstance(node, ast.Import):
        return [alias.name.split(".")[0] for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module.split(".")[0]]
    return []


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, FUNCTION)]


# ------------------------------------------------------------------------------------------------------------
# Files and arrows

def test_the_files_are_those_of_the_list():
    assert {path.stem for path in ROOT.glob("*.py")} == set(ARROWS)


def test_the_list_has_no_circle():
    names = list(ARROWS)
    for name, below in ARROWS.items():
        assert all(names.index(other) < names.index(name) for other in below), name


@pytest.mark.parametrize("name", ARROWS)
def test_imports_only_point_down(name):
    """Imports inside functions count too."""
    found = {module for node in ast.walk(TREES[name]) for module in imported(node)} & set(ARROWS)
    assert found <= set(ARROWS[name]), f"{name}.py may not import {sorted(found - set(ARROWS[name]))}"


@pytest.mark.parametrize("name", ARROWS)
def test_only_what_is_slow_and_rarely_needed_is_imported_inside_a_function(name):
    """The hub's client, and torch's sharding, which one process does without."""
    for function in functions(TREES[name]):
        late = {node.module for node in ast.walk(function) if isinstance(node, ast.ImportFrom)}
        late |= {alias.name for node in ast.walk(function) if isinstance(node, ast.Import)
                 for alias in node.names}
        slow = r"huggingface_hub|torch\.distributed\."
        assert all(re.match(slow, module) for module in late), function.name


def test_importing_every_file_runs_nothing(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {', '.join(ARROWS)}"
    done = subprocess.run([sys.executable, "-B", "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------------------
# Functions and lines

@pytest.mark.parametrize("name", ARROWS)
def test_no_function_is_longer_than_60_lines(name):
    lengths = [(f.name, f.end_lineno - f.lineno + 1) for f in functions(TREES[name])]
    assert [pair for pair in lengths if pair[1] > 60] == []


@pytest.mark.parametrize("name", ARROWS)
def test_public_functions_say_what_they_do(name):
    """Functions and methods of more than 8 lines; those inside other functions explain themselves there."""
    bodies = [TREES[name], *(node for node in TREES[name].body if isinstance(node, ast.ClassDef))]
    silent = [f"{getattr(body, 'name', name)}.{function.name}" for body in bodies for function in body.body
              if isinstance(function, FUNCTION) and not function.name.startswith("_")
              and function.end_lineno - function.lineno >= 8 and not ast.get_docstring(function)]
    assert silent == []


def test_long_lines_are_the_exception():
    files = [*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")]
    long = [f"{file.name}:{number}" for file in files
            for number, line in enumerate(file.read_text().splitlines(), 1) if len(line) > 110]
    assert len(long) <= 15, f"{len(long)} lines have more than 110 columns: {long[:20]}"


# ------------------------------------------------------------------------------------------------------------
# Every flag changes something

def config_lines(name: str) -> list[str]:
    """The source of a file's Config without its first line, none where it has no such class."""
    for node in TREES[name].body if name in TREES else ():
        if isinstance(node, ast.ClassDef) and node.name == "Config":
            return (ROOT / f"{name}.py").read_text().splitlines()[node.lineno:node.end_lineno]
    return []


def config_fields(name: str) -> list[str]:
    return re.findall(r"^    (\w+): ", "\n".join(config_lines(name)), re.MULTILINE)


def definition(name: str, call: ast.expr) -> tuple[str, ast.FunctionDef] | None:
    """What a call in a file calls: (file, function) if it is a function or class of this project."""
    where, what = name, getattr(call, "id", None)
    for node in TREES[name].body:
        if isinstance(node, ast.ImportFrom) and what in [alias.asname or alias.name for alias in node.names]:
            where = node.module
    if isinstance(call, ast.Attribute) and isinstance(call.value, ast.Name) and call.value.id in ARROWS:
        where, what = call.value.id, call.attr
    for node in TREES[where].body if where in TREES else ():
        if isinstance(node, FUNCTION) and node.name == what:
            return where, node
        if isinstance(node, ast.ClassDef) and node.name == what:
            for method in node.body:
                if isinstance(method, FUNCTION) and method.name == "__init__":
                    return where, method
    return None


def fields_read(name: str, function: ast.FunctionDef, config: str, seen: set) -> set[str]:
    """The attributes of the variable `config` that a function reads, or any function that it passes it to."""
    if (name, function.name, config) in seen:
        return set()
    seen.add((name, function.name, config))
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == config:
            found.add(node.attr)
        if isinstance(node, ast.Call):
            passed = [i for i, value in enumerate(node.args) if getattr(value, "id", None) == config]
            target = definition(name, node.func) if passed else None
            if target:
                arguments = [a.arg for a in target[1].args.args]
                first = passed[0] + (arguments[0] == "self")
                found |= fields_read(*target, arguments[first], seen)
    return found


@pytest.mark.parametrize("name", [name for name in ARROWS if config_fields(name)])
def test_every_flag_is_read(name):
    """A field is read from a parameter annotated Config, or from what parse_config returned, in its own file;
    or in a function that gets this whole object."""
    found, seen = set(), set()
    for function in functions(TREES[name]):
        configs = {a.arg for a in function.args.args if getattr(a.annotation, "id", None) == "Config"}
        for node in ast.walk(function):
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call):
                if getattr(node.value.func, "id", None) == "parse_config":
                    configs.add(node.targets[0].id)
                    if "presets" in [keyword.arg for keyword in node.value.keywords]:
                        found.add("preset")                        # parse_config itself reads this one
        for config in configs:
            found |= fields_read(name, function, config, seen)
    unread = [field for field in config_fields(name) if field not in found]
    assert unread == [], f"{name}.py never reads these flags"


# ------------------------------------------------------------------------------------------------------------
# --help

HELP = """
import contextlib, io, json, runpy, sys
pages = {}
for script in sys.argv[1:]:
    sys.argv = [script, "--help"]
    out = io.StringIO()
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(script, run_name="__main__")
        code = "it ran on"
    except SystemExit as end:
        code = end.code or 0
    pages[script] = [code, out.getvalue()]
print(json.dumps(pages))
"""


@pytest.fixture(scope="module")
def pages():
    done = subprocess.run([sys.executable, "-c", HELP, *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_a_page_to_read(pages, script):
    """Exit code 0, at most three lines of usage, the docstring, and flags in groups with their defaults."""
    code, text = pages[script]
    assert code == 0
    usage = text[text.index("usage:"):].split("\n\n")[0]
    assert len(usage.splitlines()) <= 3, usage
    docstring = ast.get_docstring(ast.parse((ROOT / script).read_text()))
    assert docstring.splitlines()[0] in text
    name = script.removesuffix(".py")
    for group in re.findall(r"^    # -- (.+)$", "\n".join(config_lines(name)), re.MULTILINE):
        assert f"\n{group}:\n" in text, group
    flags = dict(re.findall(r"^  (--[a-z-]+)((?:.*\n)(?: {8,}.*\n)*)", text, re.MULTILINE))
    for field in config_fields(name):
        assert "--" + field.replace("_", "-") in flags
    for flag, words in flags.items():
        assert len(words.split()) > 2, f"{flag} is not explained"
    if flags:
        assert any(re.search(r"\[\S+\]\s*$", words) for words in flags.values()), "no default is shown"


@pytest.mark.parametrize("name", ARROWS)
def test_every_flag_stands_in_a_group_and_has_its_help_text_beside_it(name):
    lines = config_lines(name)
    if lines and '"""' in lines[0]:                                        # a docstring of one line
        lines = lines[1:]
    assert not lines or lines[0].startswith("    # -- "), f"the first flags of {name}.py are in no group"
    for line in lines:
        assert re.match(r"    # -- \w|    \w+: .* = .*#\s*\S", line), line
