"""--reproduce: statistics by hand, verdicts by the rule, runs that are killed, resumed, changed or fail."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, SMALL, flags, metrics

import evaluate
import grpo
import warmup
from common import LOCK, UserError
from evaluate import (CLAIMS, PAPER_ROWS, RESAMPLES, ROWS, Config, bootstrap, claim_results, holm,
                      interval_and_p, judge_agreement, reproduction_parts, row_result, standard_error,
                      students_t, verdict)

# ------------------------------------------------------------------------------------------------------------
# Statistics

@pytest.mark.parametrize("values", [[[0.0], [1.0]], [[0.0, 1.0]]], ids=["two runs", "two prompts"])
def test_runs_and_prompts_are_resampled(values):
    """Two equal parts of 0 and 1: the mean is 0, 1/2, 1 with chance 1/4, 1/2, 1/4. Its variance is 1/8, of a
    mean of two 1/4. So t is .5 / .5 = 1, and with one degree of freedom half of all values are beyond 1; the
    interval reaches t = 12.71 errors of .5, where the percentiles 0 and 1 were 1.96 of them."""
    values = np.array(values)
    means = bootstrap(values)
    assert len(means) == RESAMPLES
    assert [np.mean(means == value) for value in (0, 0.5, 1)] == pytest.approx([0.25, 0.5, 0.25], abs=0.04)
    assert standard_error(values) == pytest.approx((0.5, 1))
    (mean, low, high), p = interval_and_p(values)
    reach = 12.706 * 0.5 / (1.96 * 0.125 ** 0.5) * 0.5
    assert mean == 0.5 and p == pytest.approx(0.5, abs=1e-4)
    assert (low, high) == pytest.approx((0.5 - reach, 0.5 + reach), rel=0.05)


def test_the_variances_of_runs_and_prompts_add_up():
    """Three runs (-.2, 0, .2), two prompts (-.1, .1): .04 / 3 and .02 / 2; resampled, .08 / 9 and .01 / 2."""
    values = np.array([[run + prompt for prompt in (-0.1, 0.1)] for run in (-0.2, 0, 0.2)])
    error, freedom = standard_error(values)
    assert error ** 2 == pytest.approx(0.04 / 3 + 0.01)
    satterthwaite = (0.04 / 3 + 0.01) ** 2 / ((0.04 / 3) ** 2 / 2 + 0.01 ** 2)
    assert freedom == pytest.approx(satterthwaite)
    assert bootstrap(values).var() == pytest.approx(0.08 / 9 + 0.005, rel=0.06)


@pytest.mark.parametrize("freedom, t, p", [
    (1, 12.706, 0.05), (2, 4.3027, 0.05), (4, 2.7764, 0.05), (4, 8.6103, 0.001), (30, 2.0423, 0.05),
    (5, 4.583, 0.00593), (1000, 1.9623, 0.05)])
def test_students_t_is_that_of_the_tables(freedom, t, p):
    values, beyond = students_t(freedom)
    assert np.interp(t, values, beyond) == pytest.approx(p, rel=2e-3)


def test_p_is_two_sided_and_that_of_students_t():
    runs = np.array([[0.1], [0.3], [0.5], [0.2], [0.4], [0.6]])            # mean .35, error .1871 / sqrt(6)
    for values in (runs, -runs, runs.T):                                   # or prompts: t = 4.583, df = 5
        assert interval_and_p(values)[1] == pytest.approx(0.00593, abs=1e-5)
    (_, low, high), p = interval_and_p(np.array([[0.1], [0.3], [0.5], [0.2], [0.4], [-0.9]]))
    assert low < 0 < high and p > 0.05
    assert interval_and_p(np.zeros((2, 3)))[1] == 1
    assert interval_and_p(np.full((2, 3), 0.25)) == ([0.25] * 3, 0), "nothing varies"


def test_where_only_prompts_differ_the_degrees_of_freedom_are_theirs():
    """Two runs alike, 101 prompts with standard deviation s: t = mean / (s / sqrt(101)) with df = 100, where
    one degree of freedom, that of the runs, would give .30 instead of .0516."""
    prompts = np.random.default_rng(0).normal(size=101)
    prompts = (prompts - prompts.mean()) / prompts.std(ddof=1) * 101 ** 0.5 + 1.97         # t is 1.97
    assert interval_and_p(np.stack([prompts, prompts]))[1] == pytest.approx(0.0516, abs=2e-4)


def test_the_interval_holds_the_truth_as_often_as_it_says():
    """Five runs that differ more than prompts do: plain percentiles hold it in 88 of 100 cases."""
    rng, held = np.random.default_rng(1), []
    for _ in range(400):
        (_, low, high), p = interval_and_p(rng.normal(0, 0.1, (5, 1)) + rng.normal(0, 0.3, (5, 40)))
        held.append(low < 0 < high)
        assert (p > 0.06) <= held[-1] and held[-1] <= (p > 0.03), "interval and p say the same"
    assert 0.92 < np.mean(held) < 0.98


@pytest.mark.parametrize("p, adjusted", [
    ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),      # 3 x .01; 2 x .03; 1 x .04 is less, so .06 again
    ([0.5, 0.02], [0.5, 0.04]),
    ([0.6, 0.7], [1.0, 1.0]),
    ([], [])])
def test_holm_by_hand(p, adjusted):
    assert holm(p) == pytest.approx(adjusted)


@pytest.mark.parametrize("difference, p, words", [
    (0.3, 0.049, "reproduced"), (-0.3, 0.049, "opposite"), (0.3, 0.05, "not distinguishable"),
    (-0.3, 0.6, "not distinguishable")])
def test_the_rule_of_the_verdict(difference, p, words):
    assert verdict(difference, p) == words


def measured(**stories: float) -> dict:
    """Rows with one story rate but for a little noise, from runs that differ a lot but alike in all rows."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(6, 50))
    return {row.replace("_", "-"): {seed: {name: shared[seed] + value + rng.normal(0, 0.01, 50)
                                           for name in evaluate.MEASURES}
                                    for seed in range(6)} for row, value in stories.items()}


def test_claims_are_paired_corrected_and_judged_by_the_rule():
    """The prompts' and seeds' own spread is 1; pairs show a difference of .1 all the same."""
    rows = measured(process=0.5, discount_0=0.4, discount_1=0.6, one_pool=0.5)
    rows["G8"] = {}                                                        # all of its runs failed
    claims = claim_results(rows)
    found = {claim["claim"]: claim for claim in claims if claim["runs"]}
    assert {name: claim["verdict"] for name, claim in found.items()} == {
        "process > discount-0": "reproduced", "process > discount-1": "opposite",
        "process > one-pool": "not distinguishable"}
    of = found["process > discount-0"]
    assert of["difference"][0] == pytest.approx(0.1, abs=0.005) == np.mean(of["each"])
    assert [of["adjusted_p"] for of in found.values()] == holm([of["p"] for of in found.values()])
    assert [(c["claim"], "verdict" in c) for c in claims if not c["runs"]] == [("G8 > process", False)]
    assert len(claims) == 4, "claims about rows that were not asked for"


def test_rows_are_paired_where_both_have_the_seed():
    rows = measured(process=0.5)
    rows["no-warm-up-grpo"] = {seed: {"story": rows["process"][seed]["story"] - seed} for seed in (0, 4)}
    rows["no-warm-up-grpo"][9] = rows["process"].pop(1)
    (claim,) = [claim for claim in claim_results(rows) if claim["runs"]]
    assert claim["runs"] == 2 and claim["each"] == pytest.approx([0, 4])


def test_agreement_of_the_judges_by_hand():
    def rows(true, weak):
        return {"warm-up": {0: {"r_v": np.array(true)}}, "warm-up-weak-judge": {0: {"r_v": np.array(weak)}}}
    of = judge_agreement(rows([0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 1.0, 1.0]))
    assert (of["answers"], of["equal"], of["mean_true"], of["mean_weak"]) == (4, 0.75, 0.5, 0.75)
    assert of["correlation"] == pytest.approx(0.125 / (0.5 * 0.1875 ** 0.5))    # covariance over both stds
    assert judge_agreement(rows([1.0, 1.0], [0.0, 1.0]))["correlation"] is None
    assert judge_agreement({}) == {}


# ------------------------------------------------------------------------------------------------------------
# The protocol

def test_the_papers_numbers_stand_beside_the_rows():
    assert PAPER_ROWS["r_f+r_t+r_v"] == (57.83, 2.79) and PAPER_ROWS["G2-no-kl"] == (53.04, 1.72)
    claims = claim_results(dict.fromkeys(ROWS, {}))
    paper = {(claim["claim"], claim["measure"]): claim["paper"] for claim in claims}
    assert paper["r_f+r_t+r_v > r_f+r_t", "story"] == [3.21, 0.49]
    assert paper["warm-up > no-warm-up", "format"] == [None, 1.46]          # the paper has no MMIE without it
    assert paper["G2 > G2-no-kl", "kept"] == [None, None]


def test_the_protocol_leaves_no_setting_to_a_default_and_is_the_default_run():
    """Every setting of grpo.py and warmup.py that may change what a toy run learns is written out."""
    free = {*grpo.FREE} - {"text_reward", "visual_reward"}                 # names here, for grpo.py hashes
    free |= {"model", "prompts", "seed", "critic_quantize", "critic_tiles", "explain"}
    free |= {"kl_text", "kl_image"}                                        # by default those of --kl
    assert set(evaluate.GRPO) == {f.name for f in fields(grpo.Config)} - free
    assert evaluate.GRPO == {name: getattr(grpo.Config, name) for name in evaluate.GRPO}
    adapters = {"lora_rank", "lora_alpha", "quantize"}                     # need --model
    free = {*warmup.FREE, *adapters, "data", "model", "seed"}
    assert set(evaluate.WARM_UP) == {f.name for f in fields(warmup.Config)} - free
    assert evaluate.WARM_UP == {name: getattr(warmup.Config, name) for name in evaluate.WARM_UP}


@pytest.mark.parametrize("row", ROWS)
def test_every_row_is_a_run_that_grpo_accepts_and_no_two_are_alike(row):
    settings = {name: value for name, value in ROWS[row].items() if name != "base" and value != 0}
    assert ROWS[row].get("base", "base") in evaluate.BASES
    grpo.check(replace(grpo.Config(), **settings))
    assert [name for name in ROWS if ROWS[name] == ROWS[row]] == [row]
    edits = {**evaluate.WARM_UP, **evaluate.BASES[ROWS[row].get("base", "base")]}["edits"]
    assert {**evaluate.GRPO, **ROWS[row]}["edits"] == edits


def test_claims_name_rows_and_groups_of_all_sizes_have_as_many_answers():
    assert {row for claim in CLAIMS for row in claim[:2]} <= set(ROWS) and set(PAPER_ROWS) <= set(ROWS)
    sizes = [{**evaluate.GRPO, **ROWS[row]} for row in ("G2", "G2-no-kl", "process", "G8")]
    assert [of["group_size"] for of in sizes] == [2, 2, 4, 8]
    assert {of["group_size"] * of["prompts_per_update"] for of in sizes} == {64}


def test_no_warm_up_steps_leave_the_pretrained_model(tmp_path):
    warmup.warm_up(warmup.Config(**{**SMALL, "warmup_steps": 0}, out=str(tmp_path), device="cpu"))
    assert warmup.is_done(tmp_path)
    assert [line["stage"] for line in metrics(tmp_path)] == ["tokenizer"] * 10 + ["pretrain"] * 6


# ------------------------------------------------------------------------------------------------------------
# The runs, as a user's

TINY = dict(prompts_per_update=2, group_size=2, budget=30)
BASE = {name: value for name, value in SMALL.items() if name in evaluate.WARM_UP}
CODE = f"""
import evaluate
evaluate.WARM_UP.update({BASE})
evaluate.GRPO.update({TINY})
evaluate.ROWS["r_f"]["kl"] = -1.0                 # grpo.py refuses this one
evaluate.run_main(evaluate.main)
"""


@pytest.fixture
def small(monkeypatch):
    for table, values in ((evaluate.WARM_UP, BASE), (evaluate.GRPO, TINY)):
        for name, value in values.items():
            monkeypatch.setitem(table, name, value)


def settings_of(out: Path) -> dict:
    """Two seeds, three rows; one of them fails."""
    return dict(only=("warm-up", "process", "r_f"), seeds="0,1", updates=2, prompts=3, jobs=2,
                out=str(out), device="cpu")


def launch(out: Path) -> subprocess.Popen:
    settings = settings_of(out)
    command = [sys.executable, "-c", CODE, "--reproduce", "--only", *settings.pop("only"), *flags(settings)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def reproduce(config: Config) -> None:
    """In this process."""
    evaluate.reproduce(config, Path(config.out))


@pytest.fixture(scope="module")
def runs(warm, tmp_path_factory):
    """A reproduction that was terminated once its first run had begun, and then run to its end."""
    out = tmp_path_factory.mktemp("reproduce")
    shutil.copytree(warm, out / "base" / "0")
    (out / LOCK).touch()                                                   # or it holds what no run wrote
    first = launch(out)
    while first.poll() is None and not (out / "process" / "0" / "config.json").exists():
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGTERM)
    assert "interrupted: the same command goes on" in first.communicate()[1]
    assert first.returncode == 130 and not (out / "reproduction.json").exists()
    left = subprocess.run(["ps", "-A", "-o", "args"], capture_output=True, text=True).stdout
    assert str(out) not in left, "a run goes on without its parent"
    second = launch(out)
    printed, errors = second.communicate()
    assert second.returncode == 0, errors[-2000:]
    assert "8/8" in errors                                                 # the bar, base models included
    return out, printed


def test_a_killed_reproduction_goes_on_and_a_run_that_fails_is_one_row(runs):
    out, printed = runs
    result = json.loads((out / "reproduction.json").read_text())
    assert [(row, of["runs"]) for row, of in result["rows"].items()] == [
        ("warm-up", [0, 1]), ("r_f", []), ("process", [0, 1])]
    assert set(result["failed"]) == {"r_f/0", "r_f/1"}
    assert all("--kl" in reason and "-1" in reason for reason in result["failed"].values())
    for seed in (0, 1):
        run = json.loads((out / "process" / str(seed) / "config.json").read_text())
        assert run["settings"]["seed"] == seed and run["settings"]["model"] == str(out / "base" / str(seed))
        assert run["threads"] == 1 and "grpo.py" in run["command"]
        assert [line["update"] for line in metrics(out / "process" / str(seed))] == [1, 2]
        rates = json.loads((out / "process" / str(seed) / "rates" / "values.json").read_text())
        assert rates["settings"]["seed"] == evaluate.FRESH
        assert len(rates["values"]["sampled"]["story"]) == 3 and len(rates["values"]["kept"]["t2i"]) == 144
    table = (out / "reproduction.md").read_text()
    assert table in printed and "| r_f | reward_weights 0,0,1" in table and "failed: --kl" in table
    page = (out / "reproduction.html").read_text()
    assert "seed 0:" in page and "seed 1:" in page                         # curves of one row, overlaid
    drawn = 2 * len(evaluate.MEASURES) + sum(of["runs"] > 0 for of in result["claims"])    # rows with rates
    assert page.count("<figure>") == 1 and page.count("<circle") == drawn


def forbidden(job):
    raise AssertionError(f"started again: {job.commands}")


def test_a_finished_run_is_not_trained_again(runs, small, monkeypatch):
    out, _ = runs
    before = json.loads((out / "reproduction.json").read_text())
    monkeypatch.setattr(evaluate, "start", forbidden)
    reproduce(Config(**{**settings_of(out), "only": ("warm-up", "process")}))
    after = json.loads((out / "reproduction.json").read_text())
    assert after["rows"]["process"] == before["rows"]["process"] and after["failed"] == {}


@pytest.mark.parametrize("table, changed", [
    ("config", {"updates": 3}), ("GRPO", {"kl": 0.1}), ("GRPO", {"edits": 2}), ("WARM_UP", {"batch": 5})])
def test_a_changed_setting_never_reuses_an_old_run(runs, small, monkeypatch, table, changed):
    out, _ = runs
    config = Config(**{**settings_of(out), "only": ("process",)})
    monkeypatch.setattr(evaluate, "start", forbidden)
    name, value = next(iter(changed.items()))
    if table == "config":
        config = replace(config, **changed)
    else:
        monkeypatch.setitem(getattr(evaluate, table), name, value)
    with pytest.raises(UserError, match=f"--{name} .*not {value}"):
        reproduce(config)


def test_other_weights_of_the_base_model_never_reuse_a_run_on_it(runs, small, monkeypatch, tmp_path):
    out = tmp_path / "copy"
    monkeypatch.setattr(evaluate, "start", forbidden)
    for old in ("base", "process"):
        shutil.copytree(runs[0] / old, out / old)
    for file in [*out.rglob("config.json"), *out.rglob("values.json")]:
        file.write_text(file.read_text().replace(str(runs[0]), str(out)))
    config = Config(**{**settings_of(out), "only": ("process",)})
    reproduce(config)                                                      # the copy as it is: nothing to do
    weights = next((out / "base" / "0" / "policy" / "llm").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    with pytest.raises(UserError, match="process/0: its run had --model"):
        reproduce(config)


def test_other_prompts_rate_a_run_again_without_training_it(runs, small, monkeypatch):
    out, started = runs[0], []
    monkeypatch.setattr(evaluate, "run_jobs", lambda jobs, at_once, bar: started.extend(jobs))
    monkeypatch.setattr(evaluate, "read_values", lambda folder: {})
    with pytest.raises(KeyError):                                          # no values: nothing was run
        reproduce(Config(**{**settings_of(out), "only": ("warm-up",), "prompts": 4}))
    *bases, rated, _ = started
    assert [base.commands for base in bases] == [[], []]
    (command,) = rated.commands
    assert command[1].endswith("evaluate.py") and "--prompts=4" in command and "--seed=2026" in command


def test_a_base_model_that_fails_is_the_reason_of_all_its_runs(monkeypatch, tmp_path):
    def fail(jobs, at_once, bar):
        for job in jobs:
            job.reason = "no space left" if job.commands else job.reason
    monkeypatch.setattr(evaluate, "run_jobs", fail)
    reproduce(Config(only=("warm-up", "process"), seeds="0", out=str(tmp_path)))
    failed = json.loads((tmp_path / "reproduction.json").read_text())["failed"]
    reason = f"its base model {tmp_path}/base/0: no space left"
    assert failed == {"warm-up/0": reason, "process/0": reason}


def test_the_table_of_a_row_without_runs_says_why():
    result = {"settings": asdict(Config()), "prompts_seed": 1, "machine": "", "claims": [], "judges": {},
              "rows": {"r_f": row_result("r_f", {})}, "failed": {"r_f/0": "no memory"}}
    header, row = reproduction_parts(result)[0].rows
    assert len(row) == len(header) and dict(zip(header, row))["paper: MMIE"] == "53.56"
    assert row[3] == "failed: no memory"
