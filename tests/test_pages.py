"""Pages and sheets: their numbers are those of the files, marks are right, and what is missing is named."""
import base64
import io
import json
import re
import shutil
from html import unescape

import numpy as np
import pytest
import torch
from conftest import RUN, SMALL, flags, run
from PIL import Image

import grpo
import shapes
import warmup
from common import (COLUMNS, LOCK, METRICS, Interval, Part, draw_sheet, enlarged, part_html, thumbnail,
                    write_comparison, write_report)
from data import Sample
from rewards import Scores, group_record
from tokenizer import Answer, Segment

PROMPT = "paint it blue, move it to center. <BEGIN> a red circle at top left <image>"
STATES = shapes.states_of_prompt(PROMPT)


def answer_of(captions: list[str], scenes: list, layout: str = "TwtVpvTwtVpvE") -> Answer:
    """An answer of texts and pictures in turn, one position each."""
    steps = [step for text, scene in zip(captions, scenes)
             for step in ({"text": text}, {"picture": shapes.render(scene)})]
    segments = [Segment(i, i + 1, **step) for i, step in enumerate(steps)]
    is_image = torch.tensor([s.text is None for s in segments])
    return Answer(layout, segments, torch.arange(len(segments)), is_image)


RIGHT = answer_of([shapes.caption(s) for s in STATES[1:]], STATES[1:])
WRONG = answer_of([shapes.caption(STATES[1]), "a blue circle at"], [STATES[0], STATES[2]])
SCORES = [Scores(1.0, 1.0, 1.0, [1.0, 1.0, 1.0, 1.0]), Scores(0.5, 0.5, 1.0, [1.0, 0.5, 0.0, 0.5])]


def sheet(title: str, answers: list[Answer] = (RIGHT, WRONG)) -> dict:
    sample, scores = Sample(PROMPT, [shapes.render(STATES[0])]), SCORES[:len(answers)]
    group = group_record(sample, answers, scores, grpo.advantages(answers, scores, grpo.Config()))
    group["worked"] = grpo.worked(answers, scores, grpo.Config())
    asked = {"question": "How good is <it>?", "reply": "So so.", "score": None, "pictures": group["pictures"]}
    return {"title": title, "groups": [group], "judged": [asked]}


RATES = ("format", "text", "visual", "visual_true", "story", "reward")


@pytest.fixture
def folder(tmp_path):
    """A run's folder with random numbers in it."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "run"
    (folder / "samples").mkdir(parents=True)
    names = ("reward", "reward/text", "kl/text", "kl/image", "ratio_max", "grad_norm", "seconds/rollout",
             "seconds/update", "seconds", "of_tomorrow")
    lines = [{"update": i + 1, "truncated": 0.0, **{name: round(float(rng.random()), 6) for name in names}}
             for i in range(40)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = {"settings": {"lr": 0.125, "reward_weights": [1, 1, 0.5]}, "torch": "9.9"}
    (folder / "config.json").write_text(json.dumps(config))
    results = {}
    for side in ("before", "after"):
        arms = {}
        for arm in ("sampled", "low", "greedy"):
            drawn = {rate: sorted(rng.random(3).round(4).tolist()) for rate in RATES}
            arms[arm] = {rate: [mean, low, high] for rate, (low, mean, high) in drawn.items()}
        results[side] = {**arms, "kept": {"t2i": 0.97, "i2t": 0.91}, "prompts": 33, "seconds": 4.0}
    (folder / "evaluation.json").write_text(json.dumps(results))
    (folder / "samples" / "000000_before.json").write_text(json.dumps(sheet("Before")))
    (folder / "samples" / "000010.json").write_text(json.dumps(sheet("Rollout of update 10")))
    (folder / "samples" / "999999_after.json").write_text(json.dumps(sheet("After", [RIGHT, RIGHT])))
    return folder


def words(page: str) -> str:
    """A page's text without tags, a space for each."""
    body = re.sub("<style>.*?</style>", "", page, flags=re.DOTALL)
    return " ".join(unescape(re.sub("<[^>]*>", " ", body)).split())


def test_every_metric_stands_on_the_page_with_its_first_and_last_value(folder):
    page = words(write_report(folder).read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for name in lines[0].keys() - {"update", "reward", "truncated"}:
        words_of = f" ({METRICS[name]})" if name in METRICS else ""
        assert f"{name}{words_of}: {lines[0][name]:.3g} → {lines[-1][name]:.3g}" in page, name
    first, last = (line["reward"] / 2.5 for line in (lines[0], lines[-1]))
    assert f"reward, mean of its parts: {first:.3g} → {last:.3g}" in page
    assert "Zero all the time: truncated (answers cut by the budget)." in page
    assert f"40 updates {sum(line['seconds'] for line in lines):.0f} s" in page


def test_rates_on_the_page_are_those_of_the_evaluation(folder):
    page = words(write_report(folder).read_text())
    results = json.loads((folder / "evaluation.json").read_text())
    for side, result in results.items():
        for arm in ("sampled", "low", "greedy"):
            for rate, (mean, low, high) in result[arm].items():
                name = f"{rate}: {COLUMNS[rate]} " if side == "before" else ""
                assert f"{name}{side} {mean:.3f} [{low:.3f} {high:.3f}]" in page, (side, arm, rate)
    before, after = (results[side]["greedy"]["story"][0] for side in ("before", "after"))
    assert f"greedy stories right: {before:.0%} → {after:.0%} on 33 held-out prompts" in page
    assert "kept tasks: text to image 0.97, image to text 0.91; evaluation 8 s" in page


def test_an_interval_is_drawn_at_its_values():
    """A scale from 0 to 3 of 112 pixels, from pixel 4 on."""
    drawn = part_html(Part("x", "", [["rate"], [Interval(1.5, 0.75, 2.25, most=3.0)]]))
    assert "1.500 [0.750 2.250]" in drawn and 'd="M32.0 6H88.0"' in drawn and 'cx="60.0"' in drawn


def test_a_curve_runs_through_its_values(folder):
    """The thin line of the gradient's norm: 40 points in the units of its axes, which hold them all."""
    page = write_report(folder).read_text()
    figure = page[page.index("<b>grad_norm (norm of the gradient)</b>"):]
    points = [tuple(map(float, p.split(","))) for p in re.search('points="([^"]*)"', figure)[1].split()]
    ticks = [float(t) for t in re.findall('text-anchor="end">([^<]*)</text>', figure)[:5]]
    left, top, wide, high = map(float, re.search('viewBox="([^"]*)"', figure)[1].split())
    values = [json.loads(line)["grad_norm"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert points == [(i + 1, pytest.approx(-value, rel=1e-4)) for i, value in enumerate(values)]
    assert (left, wide) == (0, 40) and (-top, high) == (ticks[-1], ticks[-1]) and ticks[-1] >= max(values)


def test_curves_below_zero_and_stacked_ones_stay_inside_their_axes(folder):
    lines = [{"update": i, "seconds": 1.0, "loss": -0.5 + i, "seconds/a": 1.0, "seconds/b": 2.0}
             for i in range(3)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = write_report(folder).read_text()
    for title, ends in (("Loss, nats a decision", [-1, 2]), ("Seconds, stacked", [0, 3])):
        figure = page[page.index(f"<b>{title}</b>"):]
        ticks = [float(t) for t in re.findall('text-anchor="end">([^<]*)</text>', figure)[:5]]
        assert [ticks[0], ticks[-1]] == ends, title


def test_steps_are_marked_against_the_true_answer():
    """The wrong answer's first text and second picture are right, its first picture and second text not."""
    steps = [[s["right"] for s in a["steps"]] for a in sheet("x")["groups"][0]["answers"]]
    assert steps == [[True] * 4, [True, False, False, True]]
    truth = sheet("x")["groups"][0]["truth"]
    assert [s["text"] for s in truth[::2]] == [shapes.caption(s) for s in STATES[1:]]
    drawn = [np.asarray(Image.open(io.BytesIO(base64.b64decode(s["picture"])))) for s in truth[1::2]]
    assert all(np.array_equal(p, shapes.render(s)) for p, s in zip(drawn, STATES[1:]))
    longer = answer_of([shapes.caption(s) for s in [*STATES[1:], STATES[2]]], [*STATES[1:], STATES[2]])
    scores = [Scores(1.0, 1.0, 0.0, [1.0] * 6)]
    record = group_record(Sample(PROMPT, []), [longer], scores)["answers"][0]
    assert [s["right"] for s in record["steps"]] == [True] * 4 + [False] * 2, "a step too many"
    other = group_record(Sample("How do I boil an egg?", []), [RIGHT], scores)
    assert other["truth"] == [] and {s["right"] for s in other["answers"][0]["steps"]} == {None}


def test_before_and_after_stand_beside_each_other_under_one_prompt(folder):
    page = write_report(folder).read_text()
    group = page[page.index("The same prompts before and after"):page.index("Rates before and after")]
    text = words(group)
    assert text.count("paint it blue, move it to center.") == 1
    assert text.index("The true answer") < text.index("before answer 1") < text.index("after answer 1")
    assert text.count("✓ right") == 4 + 4 and text.count("✗ wrong") == 0
    assert "form as asked" in text and "reward 1.00" in text
    assert all(int(width) == 96 for width in re.findall('<img[^>]* width="([0-9]+)"', group))
    assert "<script" not in page and "http" not in page and not re.search("<img(?![^>]*alt=\"[^\"]+\")", page)
    assert len(page) < 1_000_000


def test_the_worked_tables_are_eq4_and_eq6_by_hand(folder):
    """Texts 1, 1, 1, 0: mean .75, std .5. Pictures 1, 1, .5, .5: mean .75, std .2887. Both forms are 1."""
    whole, steps = (part.rows for part in grpo.worked([RIGHT, WRONG], SCORES, grpo.Config()))
    assert [row[-2:] for row in whole[1:]] == [["3.00", "+0.71"], ["2.00", "-0.71"]]
    names, rewards, zero, half, one, trained = zip(*steps[1:])
    assert names[:2] == ("answer 1, 1 text", "answer 1, 2 picture") and names[-1] == "answer 2, 4 picture"
    assert rewards == ("1.00",) * 4 + ("1.00", "0.50", "0.00", "0.50")
    assert zero == ("+0.50", "+0.87", "+0.50", "+0.87", "+0.50", "-0.87", "-1.50", "-0.87")
    a, b = 0.25 / 0.5001, 0.25 / (0.28868 + 1e-4)
    last = [b, b * 0.5 + a, (b * 0.5 + a) * 0.5 + b, ((b * 0.5 + a) * 0.5 + b) * 0.5 + a]
    assert list(half[:4]) == [f"{v:+.2f}" for v in reversed(last)] and trained == half
    sums = [sum(map(float, zero[i:4])) for i in range(4)]
    assert list(map(float, one[:4])) == pytest.approx(sums, abs=0.02), "discount 1 is the plain sum"
    page = words(write_report(folder).read_text())
    assert all(cell in page for rows in (whole, steps) for row in rows for cell in row)


def test_a_part_of_weight_0_is_not_shown_as_a_reward_of_0(folder):
    scores = [Scores(1.0, None, 1.0, [1.0, None, 1.0, None]), Scores(0.5, None, 1.0, [1.0, None, 0.0, None])]
    config = grpo.Config(reward_weights=(1.0, 0.0, 1.0))
    group = group_record(Sample(PROMPT, []), [RIGHT, WRONG], scores)
    group["worked"] = grpo.worked([RIGHT, WRONG], scores, config)
    record = {"title": "x", "groups": [group], "judged": []}
    (folder / "samples" / "000000_before.json").write_text(json.dumps(record))
    page = words(write_report(folder).read_text())
    assert "before answer 1: r_t 1.00, r_f 1.00; form as asked" in page
    assert "answer 2 0.50 - 1.00 1.50 -0.71" in page and "answer 1, 2 picture - " in page


def test_a_report_with_photographs_stays_below_1_mb(folder):
    """Noise of 256 pixels, the worst that there is to compress, in four prompts with four answers each."""
    rng = np.random.default_rng(0)
    noise = iter(rng.integers(0, 255, (200, 256, 256, 3), np.uint8))
    for side in ("before", "after"):
        groups, prompt = [], "How do I bake a cake? <image>"
        for _ in range(4):
            answers = [answer_of(["step"] * 4, STATES[:1] * 4) for _ in range(4)]
            for answer in answers:
                for segment in answer.segments:
                    segment.picture = None if segment.picture is None else next(noise)
            scores = [Scores(1.0, 1.0, 1.0, [1.0] * 8)] * 4
            groups.append(group_record(Sample(prompt, [next(noise)]), answers, scores))
            groups[-1]["worked"] = grpo.worked(answers, scores, grpo.Config())
        judged = [{"question": "?", "reply": "x", "score": 1.0, "pictures": groups[0]["pictures"]}] * 8
        file = folder / "samples" / f"{'000000' if side == 'before' else '999999'}_{side}.json"
        file.write_text(json.dumps({"title": side, "groups": groups, "judged": judged}))
    page = write_report(folder)
    assert page.read_text().count("<img") > 60 and page.stat().st_size < 1_000_000


def test_a_format_that_is_wrong_is_spelled_out(folder):
    wrong = answer_of([shapes.caption(STATES[1])], [STATES[1]], "wtVpvE")
    record = sheet("x", [wrong, RIGHT])
    record["groups"][0]["answers"][0]["format"] = 0.0
    del record["groups"][0]["truth"], record["groups"][0]["worked"]          # as earlier versions wrote them
    (folder / "samples" / "000000_before.json").write_text(json.dumps(record))
    page = words(write_report(folder).read_text())
    assert "form wrong: words /think vis picture /vis end" in page and "lacks 'worked'" in page


def test_the_report_shows_what_a_judge_was_asked_with_its_pictures(folder):
    page = write_report(folder).read_text()
    assert "[score: -] How good is <it>? --> So so." in words(page)
    assert page.count('alt="picture of the question"') == 1


def test_a_warm_up_leaves_its_report_whoever_starts_it(warm, tmp_path, monkeypatch):
    """grpo.py calls `warm_up` too. The prompts of its sheets ask for as many edits as its stories had."""
    monkeypatch.setattr(warmup, "load", None)                          # one that is done loads no model
    out = tmp_path / "warmup"
    shutil.copytree(warm, out)
    (out / "report.html").unlink()
    assert warmup.warm_up(warmup.Config(out=str(out), **SMALL)) == out / "report.html"
    page = words((out / "report.html").read_text())
    assert "The same prompts before and after" in page and "This cannot be shown" not in page
    assert "tokenizer" in page and "pretrain" in page and "loss/image" in page
    groups = json.loads((out / "samples" / "999999_after.json").read_text())["groups"]
    assert {shapes.wanted_steps(group["prompt"]) for group in groups} == {warmup.Config.edits}


@pytest.mark.parametrize("name, text, expected", [
    ("metrics.jsonl", None, "metrics.jsonl: no such file"),
    ("metrics.jsonl", "", "no line of metrics"),
    ("metrics.jsonl", '{"update": 1, "reward": 0.5}\n', "lacks 'seconds'"),
    ("config.json", None, "config.json: no such file"),
    ("config.json", '{"command": "x"}', "lacks 'settings'"),
    ("evaluation.json", None, "evaluation.json: no such file"),
    ("evaluation.json", '{"before": {}}', "lacks"),
    ("evaluation.json", '{"before"', "not JSON"),
    ("samples/000000_before.json", '{"title": "x", "groups": [{"prompt": "p", "answers": []}]}', "lacks"),
])
def test_what_a_folder_lacks_is_named_and_the_rest_is_shown(folder, name, text, expected):
    if text is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(text)
    page = words(write_report(folder).read_text())
    assert expected in page.split("This cannot be shown.", 1)[1] and len(page) > 1000


def test_a_value_that_is_no_number_breaks_no_curve(folder):
    lines = (folder / "metrics.jsonl").read_text()
    odd = '{"update": 41, "seconds": 1.0, "kl/text": NaN, "kl/image": null, "note": "resumed"}\n'
    (folder / "metrics.jsonl").write_text(lines + odd)
    page = words(write_report(folder).read_text())
    assert "kl/text: " in page and "nan" not in page and "This cannot be shown" not in page


def test_half_a_run_shows_what_there_is(folder):
    """Killed while it wrote a line, before the answers after training and the evaluation."""
    for name in ("evaluation.json", "samples/999999_after.json"):
        (folder / name).unlink()
    whole = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole + '{"update": 41, "rew')
    page = words(write_report(folder).read_text())
    assert "40 updates" in page and "before answer 1" in page and "evaluation.json: no such file" in page
    assert (folder / "metrics.jsonl").read_text().endswith('"rew'), "a page changes no file of the run"


def test_an_empty_folder_gets_a_page(tmp_path):
    page = words(write_report(tmp_path).read_text())
    assert page.count("This cannot be shown.") >= 4


def test_several_runs_stand_on_one_page(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(json.dumps({"settings": {"lr": 0.25}, "torch": "9.9"}))
    (tmp_path / "empty").mkdir()
    runs = {"one": folder, "two": tmp_path / "other", "three": tmp_path / "empty"}
    html = write_comparison(runs, tmp_path / "out").read_text()
    page, results = words(html), json.loads((folder / "evaluation.json").read_text())
    mean = results["after"]["greedy"]["story"][0]
    assert f"{COLUMNS['story']} one {mean:.3f}" in page and f" two {mean:.3f}" in page
    assert "lr 0.125 0.25" in page and "torch" not in page, "only settings that differ"
    figure = html[html.index("<b>grad_norm (norm of the gradient)</b>"):]
    assert figure[:figure.index("</figure>")].count("<polyline") == 4, "a thin and a thick line a run"
    assert "three This cannot be shown." in page


def test_compare_writes_one_page_of_several_runs_or_one_report_anew(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    run("evaluate.py", "--compare", folder, tmp_path / "other", "--out", tmp_path / "both")
    assert "Runs compared" in (tmp_path / "both" / "compare.html").read_text()
    assert not (folder / "report.html").exists()
    out = run("evaluate.py", "--compare", tmp_path / "none", check=2)
    assert f"--compare {tmp_path / 'none'}: expected a run directory" in out
    run("evaluate.py", "--compare", folder)
    assert (folder / "report.html").exists()


def test_sheets_keep_the_pictures_shape_and_put_before_beside_after(tmp_path):
    picture = np.zeros((20, 30, 3), np.uint8)
    picture[:, :15], picture[:, 15:] = (250, 0, 0), (0, 0, 250)
    assert enlarged(thumbnail(picture)).size == (150, 100)
    groups = sheet("x")["groups"]
    for group in groups:
        group["pictures"] = [thumbnail(picture)]
    draw_sheet(groups, tmp_path / "one.png")
    draw_sheet(groups, tmp_path / "two.png", groups)
    one, two = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("one", "two"))
    for colour in ((250, 0, 0), (0, 0, 250)):
        rows, columns = np.nonzero((one == colour).all(-1))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (100, 75)
    blue = [(page == shapes.COLOURS["blue"]).all(-1).sum() for page in (one, two)]
    assert two.shape[1] > 1.5 * one.shape[1] and blue[1] == 2 * blue[0] > 0
    assert one.min() < 40, "labels are dark"


def test_explain_walks_one_prompt_through_one_update_and_leaves_the_run_alone(warm, talker, tmp_path):
    out = tmp_path / "grpo"
    shutil.copytree(warm, out)

    def files() -> dict:
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*")
                if p.is_file() and p.name != LOCK}
    before = files()
    printed = run("grpo.py", "--model", talker, "--out", out, "--explain", *flags({**RUN, "group_size": 4}))
    after = files()
    assert after.pop(out / "explain.html") and after == before, "a page is all that is written"
    titles = re.findall(r"^\d+\. (.*)$", printed, re.M)
    order = ("The prompt", "Eq. (5) and (4)", "Eq. (6)", "Eq. (2), (3), (7)", "The update", "The same prompt")
    assert all(title.startswith(start) for title, start in zip(titles, order, strict=True)), titles
    page = words((out / "explain.html").read_text())
    rows = re.findall(r"^(text|image) +(\d+) +(\S+) +(\S+) +(\S+) +(\S+) +(\S+)$", printed, re.M)
    for kind, _, _, least, largest, clipped, kl in rows[:len(rows) // 2]:
        assert (float(least), float(largest)) == pytest.approx((1, 1), abs=1e-3), kind
        assert clipped == "0.0%" and abs(float(kl)) < 1e-4
    assert len(rows) == 4, "text and image, before and after"
    for row in rows:
        assert " ".join(row) in page, "the page has the numbers that are printed"


@pytest.mark.parametrize("precision, least, most", [("float32", 0, 1e-5), ("bf16", 1e-4, 1)])
def test_explain_prints_how_far_sampler_and_update_differ(warm, tmp_path, precision, least, most):
    """In bf16 they do differ."""
    command = ["--model", warm, "--out", tmp_path, "--explain", "--precision", precision, *flags(RUN)]
    printed = " ".join(run("grpo.py", *command).split())
    gap = float(re.search(r"of the policy differed by (\S+) in the mean", printed)[1])
    assert least <= gap < most and "everywhere" not in printed
