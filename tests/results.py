"""The numbers of the README: how each table is measured, and what its lines are.

    python tests/results.py                          # the lines of all tables, from .github/results/*.json
    python tests/results.py plot                     # .github/credit.svg, from the same files
    python tests/results.py measure scratch          # python grpo.py from nothing, three times, two threads
    python tests/results.py measure learning         # three base models, 40 updates each, 384 prompts
    python tests/results.py measure tries            # the five tries of the README, on two seeds
    python tests/results.py measure pairs            # pairs that no story had: where it goes wrong
    python tests/results.py measure signal           # what an update's gradient and its advantages know
    python tests/results.py measure drift            # larger steps with and without KL, epochs
    python tests/results.py measure shuffle          # Eq. (6) with as little credit as Eq. (4)
    python tests/results.py measure processes        # one process against two
    python tests/results.py measure full-size        # 7B policy and judges, random weights: 34 GB on disk

    python evaluate.py --reproduce                   # out/reproduce/reproduction.json: copy it there by hand
    python tests/bench.py --json .github/results/bench.json
    python tests/bench_peers.py --types fp32 bf16 --json .github/results/peers.json

`measure` runs commands in a copy of this repository under --folder and writes .github/results/NAME.json, with
the machine. pairs, signal, drift and shuffle start from the models that --reproduce left in out/reproduce.
The two cores must be idle where times count. tests/test_readme.py looks for every line of the tables in the
README.
"""
import argparse
import json
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from common import Interval, machine, read_json, read_lines, rounded

import torch

import data
import grpo
import shapes
from evaluate import FRESH, GRPO, ROWS, rate_answer, with_its_sign
from model import Sampling, load
from rewards import RulesText, RulesVisual, RulesWeak, judge

RESULTS, PLOT = ROOT / ".github" / "results", ROOT / ".github" / "credit.svg"
SIGNAL_ROWS = ("r_f", "r_f+r_t", "r_f+r_t+r_v", "process", "process-as-printed", "discount-0", "discount-1",
               "one-pool", "one-pool-discount-0", "weak-judge", "G2", "G8", "2-edits-outcome",
               "2-edits-process", "4-edits-outcome", "4-edits-process")
ROUNDS = 12                          # of rollouts and gradients of each setting
RATES = ("format", "text", "visual", "story")
SEEDS = (0, 1)                       # of the tries
TRIES = {                            # number in the README -> flags; 4 and 5 change the code first
    "default": [],
    "1": ["--reward-weights", "0,0,1"],
    "2": ["--kl", "0", "--lr", "1e-3"],
    "3": ["--step-discount", "1", "--normalise", "all"],
    "4": [],
    "5": [],
}
DRIFT = {                            # setting -> flags beside G = 2; the rows G2 and G2-no-kl have lr 2e-4
    "lr 1e-3, no KL": ["--lr", "1e-3", "--kl", 0],
    "lr 1e-3, KL": ["--lr", "1e-3", "--kl", 0.2],
    "four epochs, KL": ["--epochs-per-rollout", 4, "--updates", 120],
}
EXCHANGED = """import random
import sys

sys.path.append("tests")
import grpo
from results import exchanged

with exchanged(SHARE, random.Random(0)):
    grpo.run_main(grpo.main)
"""
# Setting -> share of steps that keep their own advantage; Eq. (4) has .37 of Eq. (6)'s credit.
SHARES = {f"share {share}": share for share in (0.15, 0.37, 0.7)}


# ------------------------------------------------------------------------------------------------------------
# Measuring

def fresh_clone(folder: Path) -> Path:
    """What git knows of this repository, with the changes that are not committed yet, in a new folder."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:                                          # no repository: an unpacked archive
        ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines()]
        return Path(shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", *ignored)))
    for name in listed.stdout.split("\0"):
        if name and (ROOT / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def run(folder: Path, *words: object, threads: int = 1) -> float:
    """Run `python WORDS` in a folder -> seconds. Its output goes to log.txt."""
    began = time.perf_counter()
    with open(folder / "log.txt", "ab") as log:
        subprocess.run([sys.executable, *map(str, words)], cwd=folder, check=True, stdout=log, stderr=log,
                       env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    return time.perf_counter() - began


def scratch(folder: Path) -> dict:
    """`python grpo.py` from nothing: seconds of three runs, the evaluation of the first."""
    seconds, of_grpo = [], []
    for i in range(3):
        place = fresh_clone(folder / str(i))
        seconds.append(run(place, "grpo.py", threads=2))
        rates = read_json(place / "out/grpo/evaluation.json")
        updates = read_lines(place / "out/grpo/metrics.jsonl")
        of_grpo.append(sum(of["seconds"] for of in [*updates, *rates.values()]))
    return {"seconds": seconds, "grpo_seconds": of_grpo, **read_json(folder / "0/out/grpo/evaluation.json")}


def learning(folder: Path) -> dict:
    """GRPO with its defaults on the base models of out/reproduce, seeds 0 to 2 -> seed -> evaluation."""
    place = fresh_clone(folder / "copy")

    def one(seed: int) -> dict:
        run(place, "grpo.py", "--seed", seed, "--model", ROOT / f"out/reproduce/base/{seed}", "--out",
            f"out/{seed}", "--eval-prompts", 384)
        return read_json(place / f"out/{seed}/evaluation.json")
    with ThreadPoolExecutor(2) as pool:
        return dict(zip("012", pool.map(one, (0, 1, 2))))


def warm_up(folder: Path) -> None:
    """Train the warm-up models of SEEDS side by side, each with one thread."""
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda seed: run(folder, "warmup.py", "--seed", seed, "--out", f"out/warmup-{seed}"),
                      SEEDS))


def tries(folder: Path) -> dict:
    """The README's tries: try -> seed -> evaluation before and after, 384 prompts."""
    place = fresh_clone(folder / "as-it-is")
    warm_up(place)
    example = next(block for block in re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(),
                                                 re.DOTALL) if "all_or_nothing" in block)
    (place / "my_reward.py").write_text(example)
    world = fresh_clone(folder / "no-system")
    file = world / "shapes.py"
    file.write_text(file.read_text().replace("systematic: float = 0.6", "systematic: float = 0.0"))
    warm_up(world)

    def one(job: tuple[str, int]) -> dict:
        name, seed = job
        where = world if name == "5" else place
        script = "my_reward.py" if name == "4" else "grpo.py"
        run(where, script, "--seed", seed, "--model", f"out/warmup-{seed}", "--out", f"out/try-{name}-{seed}",
            "--eval-prompts", 384, *TRIES[name])
        return read_json(where / f"out/try-{name}-{seed}/evaluation.json")
    jobs = [(name, seed) for name in TRIES for seed in SEEDS]
    with ThreadPoolExecutor(2) as pool:
        return {f"{name}/{seed}": result for (name, seed), result in zip(jobs, pool.map(one, jobs))}


def processes(folder: Path) -> dict:
    """One process and two, one thread each -> the last line of metrics, and seconds of an evaluation."""
    place, result, torchrun = fresh_clone(folder / "copy"), {}, ("-m", "torch.distributed.run")
    run(place, "warmup.py", threads=2)
    stage_3 = ["warmup.py", "--model", "out/warmup", "--warmup-steps", 20]
    whole = ["grpo.py", "--updates", 10, "--eval-prompts", 0]
    adapters = [*whole, "--lora-rank", 8, "--quantize", "nf4"]
    commands = {"GRPO, all of it": whole, "GRPO, rank 8 on an NF4 base": adapters,
                "warm-up, stage 3": stage_3}
    for name, command in commands.items():
        for count in (1, 2):
            out = f"out/{len(result)}"
            run(place, *torchrun, f"--nproc_per_node={count}", *command, "--out", out)
            lines = read_lines(place / out / "metrics.jsonl")
            result[f"{name}/{count}"] = lines[-1] | {
                "seconds": statistics.median(line["seconds"] for line in lines[1:])}
    for count in (1, 2):
        words = ["evaluate.py", "--prompts", 192, "--out", f"out/evaluate-{count}"]
        seconds = run(place, *torchrun, f"--nproc_per_node={count}", *words)
        result[f"evaluation/{count}"] = {"seconds": seconds}
    return result


def pairs(folder: Path) -> dict:
    """Greedy answers to prompts whose scenes hold a pair that no story had: what is said, what is drawn.

    Of the base models and the runs of the row "process" that `evaluate.py --reproduce` left in out/reproduce.
    """
    rng, result = random.Random("pairs"), {}
    samples = [data.toy_prompt(rng, 3, "pairs") for _ in range(384)]
    for name in (f"{row}/{seed}" for row in ("base", "process") for seed in (0, 1, 2)):
        model = load(ROOT / "out/reproduce" / name, torch.device("cpu")).eval()
        codes, said, drawn, stories = data.CodeCache(model), {True: [], False: []}, {True: [], False: []}, []
        prompts = [model.prompt(s.prompt, codes(s.prompt_pictures)) for s in samples]
        rows = model.generate(prompts, 1, 160, Sampling(0.0), [(0, i) for i in range(len(samples))])
        for sample, answer in zip(samples, model.read_answers(rows)):
            texts = [shapes.parse_caption(text) for text in answer.texts]
            pictures = [s.picture for s in answer.segments if s.picture is not None]
            for state, text in zip(shapes.states_of_prompt(sample.prompt)[1:], texts):
                said[state[:2] in shapes.HELDOUT_PAIRS].append(text == state)
            for text, picture in zip(texts, pictures):
                if text is not None:
                    drawn[text[:2] in shapes.HELDOUT_PAIRS].append(shapes.matches(picture, text))
            stories.append(rate_answer(sample, answer)["story"])
        values = {"said_other": said[False], "said_pair": said[True], "drawn_other": drawn[False],
                  "drawn_pair": drawn[True], "story": stories}
        result[name] = {what: statistics.fmean(of) for what, of in values.items()}
    return result


def gradients(model, batch, of_rows: dict[str, list], config) -> dict[str, list[torch.Tensor]]:
    """The gradients of Eq. (2) without KL on one rollout -> row -> [of the text tokens, of the codes].

    of_rows: row -> the advantages of each answer, [T, 1]. The gradient of all decisions is their sum, because
    at ratio 1 the loss is linear in the advantages.
    """
    logp = model.log_probs(batch.tokens, batch.is_image, batch.mask, grpo.scoring_of(config))
    weights, old = grpo.decision_weights(batch.mask, batch.is_image), logp.detach()
    starts, result = batch.mask.any(-1).int().argmax(1), {}             # where an answer's decisions begin
    for row, values in of_rows.items():
        padded = torch.zeros_like(batch.advantages)
        for own, start, value in zip(padded, starts, values):
            own[start:start + len(value)] = value
        for part in (~batch.is_image, batch.is_image):
            own = (padded * part[..., None]).expand_as(logp)
            loss, *_ = grpo.grpo_loss(logp, old, old, own, weights, config.clip, 0.0)
            grads = torch.autograd.grad(loss.mean(), model.policy_parameters(), retain_graph=True,
                                        allow_unused=True, materialize_grads=True)
            result.setdefault(row, []).append(torch.cat([grad.flatten() for grad in grads]))
    return result


def signal_to_noise(of: list[torch.Tensor]) -> float:
    """|E g|^2 / E |g - E g|^2 of one update's gradient g, both estimated without bias from several."""
    of, n = torch.stack(of), len(of)
    noise = (of - of.mean(0)).square().sum().item() / (n - 1)
    return (of.mean(0).square().sum().item() - noise / n) / noise


def steps_of(answers: list, scores: list, values: list) -> dict[str, list[tuple[float, float]]]:
    """Kind of step -> of every step of the answers the advantage of its decisions, and 1 if it is right."""
    steps = {"text": [], "codes": []}
    for answer, of, value in zip(answers, scores, values):
        for segment, reward in zip(answer.segments, of.steps):
            if segment.stop > segment.start:
                kind = "text" if segment.picture is None else "codes"
                steps[kind].append((value[segment.start].item(), float(reward == 1)))
    return steps


@contextmanager
def exchanged(share: float, rng: random.Random):
    """Inside, a share of the steps keep the advantage that Eq. (6) gives them. The others receive that of any
    step of their group and kind: the same numbers, with less credit."""
    exact = grpo.process_advantages

    def shuffled(step_rewards, kinds, *rest):
        advantages = exact(step_rewards, kinds, *rest)
        places = [(n, j) for n, steps in enumerate(kinds) for j in range(len(steps))]
        mixed = [steps.clone() for steps in advantages]
        for n, j in places:
            if rng.random() >= share:
                m, i = rng.choice([(m, i) for m, i in places if kinds[m][i] == kinds[n][j]])
                mixed[n][j] = advantages[m][i]
        return mixed
    grpo.process_advantages = shuffled
    try:
        yield
    finally:
        grpo.process_advantages = exact


def signal_of(kind: str, number: int, group: int, edits: int, rows: list[str]) -> dict[str, dict]:
    """Of rows that share base model, group size and edits: what `signal` measures."""
    model = load(ROOT / f"out/reproduce/{kind}/{number}", torch.device("cpu")).eval()
    codes, judges = data.CodeCache(model), (RulesText(), RulesVisual())
    configs = {row: grpo.Config(**GRPO | {name: value for name, value in ROWS.get(row, {}).items()
                                          if name != "base"}) for row in rows}
    rngs = {row: random.Random(f"{share}/{number}") for row, share in SHARES.items()}
    found, steps = {}, {row: {"text": [], "codes": []} for row in rows}
    for k in range(ROUNDS):
        rng = random.Random(f"signal/{kind}/{number}/{group}/{k}")
        samples = [data.toy_prompt(rng, edits, "train") for _ in range(64 // group)]
        seeds = [("signal", number, group, k, p) for p in range(len(samples))]
        batch = grpo.rollout(model, samples, configs[rows[0]], judges, codes, seeds)
        values = {}
        for row, config in configs.items():
            scores = batch.scores
            if config.visual_reward == "rules-weak":
                each = [s for s in samples for _ in range(group)]
                scores = judge(each, batch.answers, RulesText(), RulesWeak())
            with exchanged(SHARES[row], rngs[row]) if row in SHARES else nullcontext():
                values[row] = [value for first in range(0, 64, group) for value in grpo.advantages(
                    batch.answers[first:first + group], scores[first:first + group], config)]
            for part, pairs in steps_of(batch.answers, batch.scores, values[row]).items():
                steps[row][part] += pairs
        of_rows = {row: values[row] for row in rows if row not in SHARES}
        for row, pair in gradients(model, batch, of_rows, configs[rows[0]]).items():
            found.setdefault(row, []).append(pair)
    result = {row: {"credit": {part: statistics.correlation(*zip(*pairs)) for part, pairs in of.items()}}
              for row, of in steps.items()}
    for row, pairs in found.items():
        of = dict(zip(("text", "codes"), zip(*pairs))) | {"both": [text + code for text, code in pairs]}
        result[row]["signal_to_noise"] = {part: signal_to_noise(list(g)) for part, g in of.items()}
    return result


def signal(folder: Path) -> dict:
    """What an update's gradient and its advantages know, before any update, on the base models.

    64 fresh answers an update as in training, ROUNDS times. Each row of `evaluate.ROWS` that differs in
    rewards, credit, edits or group size alone, of its text tokens, of its codes and of both:

    signal_to_noise    of one update's gradient, without KL; the shares of `shuffle` have credit alone
    credit             the correlation, over steps, of the advantage that a step's decisions receive with
                       whether that step is right: a text that is the true one, a picture that shows its text
    """
    torch.set_num_threads(1)
    shared, result = {}, {}
    for row in (*SIGNAL_ROWS, *SHARES):
        of = GRPO | {"base": "base"} | ROWS.get(row, {})
        shared.setdefault((of["base"], of["group_size"], of["edits"]), []).append(row)
    for number in (0, 1, 2):
        for (kind, group, edits), rows in shared.items():
            for row, measured in signal_of(kind, number, group, edits, rows).items():
                result.setdefault(row, []).append(measured)
    return result


def train_and_rate(folder: Path, jobs: dict[str, list]) -> dict[str, list[dict]]:
    """Run GRPO from each base model of out/reproduce and rate it on 384 prompts, two runs side by side.

    jobs: name -> script and flags -> name -> an evaluation a base model. 30 updates where no flag says more.
    """
    def one(job: tuple[str, int]) -> dict:
        name, seed = job
        script, *flags = jobs[name]
        out = f"out/{name.replace(', ', '-').replace(' ', '-')}-{seed}"
        run(folder, script, "--seed", seed, "--model", ROOT / f"out/reproduce/base/{seed}", "--out", out,
            "--eval-prompts", 0, "--updates", 30, *flags)
        run(folder, "evaluate.py", "--model", out, "--prompts", 384, "--seed", FRESH, "--out", f"{out}/rates")
        return read_json(folder / out / "rates/evaluation.json")
    every, result = [(name, seed) for name in jobs for seed in (0, 1, 2)], {}
    with ThreadPoolExecutor(2) as pool:
        for (name, _), evaluation in zip(every, pool.map(one, every)):
            result.setdefault(name, []).append(evaluation)
    return result


def drift(folder: Path) -> dict:
    """How far updates may go, G = 2: larger steps with and without KL, several updates on one rollout."""
    group = ("--group-size", 2, "--prompts-per-update", 32)
    return train_and_rate(fresh_clone(folder / "copy"),
                          {name: ["grpo.py", *group, *flags] for name, flags in DRIFT.items()})


def shuffle(folder: Path) -> dict:
    """Eq. (6) as in the row "process", but only a share of the steps keep their own advantage."""
    place = fresh_clone(folder / "copy")
    for share in SHARES.values():
        (place / f"share_{share}.py").write_text(EXCHANGED.replace("SHARE", str(share)))
    return train_and_rate(place, {name: [f"share_{share}.py"] for name, share in SHARES.items()})


def full_size(folder: Path) -> dict:
    """The 7B policy and the judges at full size: phase -> seconds and peak GiB, or the line of a judge."""
    place, script, judges = fresh_clone(folder / "copy"), "tests/full_size.py", "tests/full_size_judges.py"
    run(place, script, "make", "out/7b", threads=2)
    steps = {"bf16": ("load", "out/7b"), "NF4": ("load", "out/7b", "--quantize", "nf4"),
             "bf16 base + LoRA": ("rollout", "out/7b"), "NF4 base + LoRA": ("update", "out/7b")}
    phases, log = [], place / "log.txt"
    for name, words in steps.items():
        before = len(log.read_text())
        run(place, script, *words, threads=2)
        found = re.findall(r"^(.+): ([\d.]+) s, peak resident ([\d.]+) GiB", log.read_text()[before:],
                           re.MULTILINE)
        phases += [[f"{name}: {phase.split(',')[0]}", float(seconds), float(gib)]
                   for phase, seconds, gib in found]
    run(place, judges, "make", "out/judges", threads=2)
    run(place, judges, "measure", "out/judges", threads=2)
    return {"phases": phases, "judges": re.findall(r"^(.+: load .* GiB, .*)$", log.read_text(), re.MULTILINE)}


MEASURES = {"scratch": scratch, "learning": learning, "tries": tries, "pairs": pairs, "signal": signal,
            "drift": drift, "shuffle": shuffle, "processes": processes, "full-size": full_size}


# ------------------------------------------------------------------------------------------------------------
# Lines of the README

def cells(*values: object) -> str:
    """A line of a markdown table."""
    return f"| {' | '.join(map(str, values))} |"


def spread(values: list[float], form: str = ".2f") -> str:
    """Mean (smallest-largest)."""
    return f"{statistics.fmean(values):{form}} ({min(values):{form}}-{max(values):{form}})"


def scratch_lines(result: dict) -> list[str]:
    """The end of the first command's output, and the medians of its times."""
    lines = [f"{statistics.median(result['seconds']):.0f} seconds",
             f"{statistics.median(result['grpo_seconds']):.0f} of them"]
    for side in ("before", "after"):
        for arm in ("sampled", "greedy"):
            rates = (str(Interval(*result[side][arm][rate])) for rate in RATES)
            lines.append(f"{side + ' ' + arm:16}" + "".join(f"{text:>22}" for text in rates))
    return lines


def learning_lines(result: dict) -> list[str]:
    """Means over three seeds with the smallest and the largest, and the kept tasks after."""
    lines = []
    for side in ("before", "after"):
        for arm in ("sampled", "greedy"):
            rates = ([result[seed][side][arm][rate][0] for seed in "012"] for rate in RATES)
            lines.append(cells(f"{side}, {arm}", *map(spread, rates)))
    return lines + [f"{task} {spread([result[seed]['after']['kept'][task] for seed in '012'])}"
                    for task in ("t2i", "i2t")]


def tries_lines(result: dict) -> list[str]:
    """The tries, the values of both seeds."""
    def line(name: str, runs: list[dict]) -> str:
        def both(values: list[float]) -> str:
            return " / ".join(f"{value:.2f}" for value in values)
        rates = [both([of["sampled"][rate][0] for of in runs]) for rate in RATES]
        kept = [both([of["kept"][task] for of in runs]) for task in ("t2i", "i2t")]
        return cells(name, *rates, both([of["greedy"]["story"][0] for of in runs]), *kept)
    runs = {name: [result[f"{name}/{seed}"] for seed in SEEDS] for name in TRIES}
    lines = [line("before", [of["before"] for of in runs["default"]])]
    for name, of in runs.items():
        if name == "5":
            lines.append(line("5, before", [run["before"] for run in of]))
        lines.append(line(name, [run["after"] for run in of]))
    return lines


def pairs_lines(result: dict) -> list[str]:
    """What is said and drawn of pairs that no story had, and of others."""
    names = {"base": "warm-up", "process": "after GRPO"}
    return [cells(words, *(spread([result[f"{row}/{seed}"][what] for seed in (0, 1, 2)]) for what in
                           ("said_other", "said_pair", "drawn_other", "drawn_pair", "story")))
            for row, words in names.items()]


def signal_lines(result: dict) -> list[str]:
    """Of each setting the means over three base models, with the smallest and the largest."""
    parts = [("credit", "text"), ("credit", "codes")] + [("signal_to_noise", part) for part in
                                                         ("text", "codes", "both")]
    return [cells(row, *(spread([of[what][part] for of in result[row]]) for what, part in parts))
            for row in SIGNAL_ROWS]


def trained_lines(result: dict) -> list[str]:
    """Of each setting the rates after GRPO: means over three base models, the smallest and the largest."""
    lines = []
    for name, of in result.items():
        if isinstance(of, list):
            rates = [[one["sampled"][rate][0] for one in of] for rate in ("text", "visual", "story")]
            greedy = [one["greedy"]["story"][0] for one in of]
            kept = [statistics.fmean(one["kept"].values()) for one in of]
            lines.append(cells(name, *map(spread, [*rates, greedy, kept])))
    return lines


def bench_lines(result: dict) -> list[str]:
    """Positions/s, and in brackets how many times the floor a position takes, at each batch."""
    lines, of = [], {}
    for line in result["results"]:
        of.setdefault(line["what"], []).append(line)
    for what, rows in of.items():
        if "floor" in rows[0]:
            speeds = (f"{row['positions/s']:.3g} ({row['times floor']:.1f})" for row in rows)
            lines.append(cells(what, *speeds))
        elif what.startswith("update"):
            lines.append(cells(what, f"{rows[0]['positions/s']:,.0f} positions/s"))
        elif what.startswith("memory"):
            lines += [cells(f"{what}, --rows {row['rows']}", f"{row['peak GiB']:.1f} GiB") for row in rows]
    return lines


def peers_lines(result: dict) -> list[str]:
    """Median ratio ours / theirs with the smallest and the largest of the rounds."""
    lines = []
    for row in result["results"]:
        rounds = f" ({row['min']:.2f}-{row['max']:.2f})" if "min" in row else ""
        lines.append(cells(row["what"], row.get("batch", ""), f"{row['ratio']:.2f}{rounds}"))
    return lines


def processes_lines(result: dict) -> list[str]:
    """Seconds a step, memory and gradient norm of one process and of two."""
    def both(name: str, metric: str, form: str) -> str:
        return ", ".join(f"{result[f'{name}/{count}'][metric]:{form}}" for count in (1, 2))
    names = [name.removesuffix("/1") for name in result if name.endswith("/1")]
    lines = [cells(name, both(name, "seconds", ".2f"), both(name, "peak_gib", ".2f"),
                   both(name, "grad_norm", ".6f")) for name in names if name != "evaluation"]
    whole = both("evaluation", "seconds", ".1f")
    return [*lines, cells("evaluation of 192 prompts, whole command", whole, "", "")]


def full_size_lines(result: dict) -> list[str]:
    """Seconds and peak memory of each phase, then of loading each judge, with what judging costs."""
    judges = (re.fullmatch(r"(.+): load (\d+) s, peak ([\d.]+) GiB, (.+)", line) for line in result["judges"])
    return [cells(name, f"{seconds:.0f}", f"{gib:.1f} GiB") for name, seconds, gib in result["phases"]
            ] + [cells(f"{found[1]}: load; {found[4]}", found[2], f"{found[3]} GiB") for found in judges]


def reproduction_lines(result: dict) -> list[str]:
    """The rows, then the claims with their verdicts, and how the weak judge agrees with the rule."""
    def number(mean: float, low: float, high: float, form: str = ".2f") -> str:
        return f"{mean:{form}} [{low:{form}}, {high:{form}}]"
    lines = []
    for row, of in result["rows"].items():
        if row == "warm-up-weak-judge":                      # the row warm-up, asked about by the other judge
            continue
        means = [rounded(of["rates"][name][0]) for name in (*RATES[:3], "story, greedy", "kept")]
        lines.append(cells(row, *means[:3], number(*of["rates"]["story"]), *means[3:],
                           *map(rounded, of["paper"])))
    for of in result["claims"]:
        if of["runs"]:
            lines.append(cells(of["claim"], of["source"], of["measure"], number(*of["difference"], "+.2f"),
                               with_its_sign(of), f"{of['adjusted_p']:.3f}", of["verdict"],
                               *map(rounded, of["paper"])))
    judges = result["judges"]
    return [*lines, f"correlation {judges['correlation']:.2f}, {judges['equal']:.0%} equal"]


LINES = {"scratch": scratch_lines, "learning": learning_lines, "reproduction": reproduction_lines,
         "tries": tries_lines, "pairs": pairs_lines, "signal": signal_lines, "drift": trained_lines,
         "shuffle": trained_lines, "bench": bench_lines, "peers": peers_lines, "processes": processes_lines,
         "full-size": full_size_lines}


PLOTTED = {                          # row of `signal` -> its name in the plot, and where the name stands
    "r_f": ("r_f", 8, -6), "r_f+r_t": ("r_f + r_t", 8, -6), "r_f+r_t+r_v": ("Eq. (4)", -4, 26),
    "discount-1": ("discount 1", 4, 14), "process-as-printed": ("as printed", -30, -12),
    "process": ("Eq. (6)", -22, -14), "weak-judge": ("weak judge", -20, 26),
    "one-pool-discount-0": ("one pool, discount 0", -60, 26)}


def credit_plot() -> str:
    """The plot of the README as SVG.

    Across: what the advantages know of a step before training, three models from the smallest to the largest.
    Up: how many steps are right after 30 updates, with intervals.
    """
    def place(x: float, y: float) -> tuple[float, float]:
        return 60 + 860 * x, 330 - 500 * (y - 0.4)

    def line(start: tuple[float, float], end: tuple[float, float], colour: str) -> str:
        (a, b), (c, d) = place(*start), place(*end)
        return f'<path d="M{a:.1f} {b:.1f}L{c:.1f} {d:.1f}" stroke="{colour}"/>'

    def cross(x: float, y: float, colour: str) -> str:
        return f'<path d="M{x - 5:.1f} {y - 5:.1f}l10 10m0 -10l-10 10" stroke="{colour}" stroke-width="2.5"/>'

    def dot(x: float, y: float, colour: str) -> str:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'

    def text(x: float, y: float, words: str, anchor: str = "start") -> str:
        return f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}">{words}</text>'
    kept = (read_json(RESULTS / f"{name}.json") for name in ("signal", "reproduction", "shuffle"))
    (signal, reproduction, shuffled), grey, marks = kept, "#e6e9ed", []
    for x in (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        marks += [line((x, 0.4), (x, 1), grey), text(place(x, 0)[0], 348, f"{x:.1f}", "middle")]
    for y in (0.4, 0.6, 0.8, 1):
        marks += [line((0, y), (0.7, y), grey), text(52, place(0, y)[1] + 4, f"{y:.1f}", "end")]
    kinds = (("codes", "visual", "#c0792a", 262, "pictures that show their own text"),
             ("text", "text", "#3b6fb6", 284, "texts that are the true ones"))
    for part, rate, colour, down, words in kinds:
        before = [statistics.fmean(of["credit"][part] for of in signal[row]) for row in SIGNAL_ROWS]
        after = [reproduction["rows"][row]["rates"][rate][0] for row in SIGNAL_ROWS]
        ranks = (torch.tensor(values).argsort().argsort().tolist() for values in (before, after))
        marks += [dot(300, down, colour),
                  text(312, down + 4, f"{words}: rank correlation {statistics.correlation(*ranks):.2f}")]
        for row, x, y in zip(SIGNAL_ROWS, before, after):
            xs = [of["credit"][part] for of in signal[row]]
            _, low, high = reproduction["rows"][row]["rates"][rate]
            marks += [line((x, low), (x, high), colour), line((min(xs), y), (max(xs), y), colour),
                      dot(*place(x, y), colour)]
            if part == "codes" and row in PLOTTED:
                name, dx, dy = PLOTTED[row]
                marks.append(text(place(x, y)[0] + dx, place(x, y)[1] + dy, name))
        for name in SHARES:
            x = statistics.fmean(of["credit"][part] for of in signal[name])
            y = statistics.fmean(of["sampled"][rate][0] for of in shuffled[name])
            marks.append(cross(*place(x, y), colour))
    marks += [cross(300, 306, "#5b6673"), text(312, 310, "Eq. (6), advantages exchanged"),
              text(16, 20, "share of right steps after 30 updates"),
              text(360, 372, "credit: correlation, before training, of a step's advantage with whether it is "
                   "right", "middle")]
    label = "credit before training, share of right steps after"
    return "\n".join([
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 700 386" width="700" height="386" '
        'font-size="12.5" fill="#1d2733" font-family="Helvetica, sans-serif" role="img" '
        f'aria-label="{label}">',
        '<rect width="700" height="386" rx="14" fill="#ffffff" stroke="#d5dae0"/>', *marks, "</svg>", ""])


def tables() -> dict[str, list[str]]:
    """The lines of every table whose numbers are kept."""
    return {name: lines(read_json(RESULTS / f"{name}.json")) for name, lines in LINES.items()
            if (RESULTS / f"{name}.json").exists()}


def main() -> None:
    """Measure one table, or print the lines of all."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("what", nargs="*", metavar="plot | measure NAME", help=f"NAME: {', '.join(MEASURES)}")
    parser.add_argument("--folder", type=Path, default=ROOT / "out" / "results", help="where commands run")
    args = parser.parse_args()
    if not args.what:
        for name, lines in tables().items():
            print(f"{name}:", *lines, "", sep="\n")
        return
    if args.what == ["plot"]:
        PLOT.write_text(credit_plot())
        return
    if len(args.what) != 2 or args.what[0] != "measure" or args.what[1] not in MEASURES:
        parser.error(f"expected nothing, plot, or measure and one of {', '.join(MEASURES)}")
    name = args.what[1]
    if name in ("pairs", "signal", "drift", "shuffle") and not (ROOT / "out/reproduce/process/2").exists():
        parser.error(f"measure {name} starts from the models of evaluate.py --reproduce: run that first")
    shutil.rmtree(args.folder / name, ignore_errors=True)
    result = MEASURES[name](args.folder / name)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps({**machine(), **result}, indent=1))
    print(*LINES[name](result), sep="\n")


if __name__ == "__main__":
    main()
