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
from common import LOCK, draw_sheet, enlarged, png, write_comparison, write_report
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
        results[side] = {**arms, "kept": {"t2i": 0.97, "i2t": 0.91}, "prompts": 33, "split": "heldout"}
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
        assert f"{name}: {lines[0][name]:.3g} → {lines[-1][name]:.3g}" in page, name
    first, last = (line["reward"] / 2.5 for line in (lines[0], lines[-1]))
    assert f"reward, mean of its parts: {first:.3g} → {last:.3g}" in page
    assert "Zero all the time: truncated (answers cut by the budget)." in page
    assert f"40 updates, {sum(line['seconds'] for line in lines):.0f} s" in page


def test_rates_on_the_page_are_those_of_the_evaluation(folder):
    page = words(write_report(folder).read_text())
    results = json.loads((folder / "evaluation.json").read_text())
    for side, result in results.items():
        for arm in ("sampled", "low", "greedy"):
            for rate, (mean, low, high) in result[arm].items():
                assert f"{rate} {side} {mean:.3f} {low:.3f}–{high:.3f}" in page, (side, arm, rate)
    before, after = (results[side]["greedy"]["story"][0] for side in ("before", "after"))
    assert f"greedy stories right: {before:.0%} → {after:.0%} on 33 held-out prompts" in page
    assert "kept tasks 0.91" in page and "t2i 0.97" in page


def test_a_curve_runs_through_its_values(folder):
    """The thin line of the gradient's norm: 40 points at equal distances, each at its value's height."""
    page = write_report(folder).read_text()
    figure = page[page.index("<b>Norm of the gradient</b>"):]
    points = re.search('<polyline points="([^"]*)"', figure)[1].split()
    ticks = [float(t) for t in re.findall('text-anchor="end">([^<]*)</text>', figure)[:5]]
    values = [json.loads(line)["grad_norm"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(points) == 40 and ticks[0] == 0 and ticks[-1] >= max(values)
    for point, value in zip(points, values):
        assert float(point.split(",")[1]) == pytest.approx(150 - 140 * value / ticks[-1], abs=0.06)


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
    assert text.count("✓ right") == 6 + 8 and text.count("✗ wrong") == 2
    assert "form as asked" in text and "reward 0.50" in text
    assert all(int(width) == 96 for width in re.findall('<img[^>]* width="([0-9]+)"', group))
    assert "<script" not in page and "http" not in page and not re.search("<img(?![^>]*alt=\"[^\"]+\")", page)
    assert len(page) < 1_000_000


def test_the_worked_tables_are_eq4_and_eq6_by_hand(folder):
    """Texts 1, 1, 1, 0: mean .75, std .5. Pictures 1, 1, .5, .5: mean .75, std .2887. Both forms are 1."""
    tables = {part.title: part.rows for part in grpo.worked([RIGHT, WRONG], SCORES, grpo.Config())}
    whole, rewards, own, credit, reach = tables.values()
    assert [row[-2:] for row in whole[1:]] == [["3.00", "+0.71"], ["2.00", "-0.71"]]
    assert [" ".join(row[1:]) for row in rewards[1:]] == ["1.00 1.00", "1.00 0.50", "1.00 0.00", "1.00 0.50"]
    expected = ["+0.50 +0.50", "+0.87 -0.87", "+0.50 -1.50", "+0.87 -0.87"]
    assert [" ".join(row[1:]) for row in own[1:]] == expected
    a, b = 0.25 / 0.5001, -0.25 / (0.28868 + 1e-4)
    last = [-b, -b * 0.5 + a, (-b * 0.5 + a) * 0.5 - b, ((-b * 0.5 + a) * 0.5 - b) * 0.5 + a]
    assert [row[1] for row in credit[1:]] == [f"{v:+.2f}" for v in reversed(last)]
    zero, half, one = ([float(row[i]) for row in reach[1:]] for i in (1, 2, 3))
    assert zero == [float(row[2]) for row in own[1:]], "discount 0 is the step alone"
    assert one == pytest.approx([sum(zero[i:]) for i in range(4)], abs=0.02), "discount 1 is the plain sum"
    page = words(write_report(folder).read_text())
    assert all(cell in page for rows in tables.values() for row in rows for cell in row)


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
    assert "[score: none] How good is <it>? --> So so." in words(page)
    assert page.count('alt="picture of the question"') == 1


def test_a_warm_up_leaves_its_report_whoever_starts_it(warm, tmp_path):
    """grpo.py calls `warm_up` too. The prompts of its sheets ask for as many edits as its stories had."""
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
    assert expected in page.split("This cannot be shown.", 1)[1] and "Rollout of update 10" in page


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
    assert f"story one {mean:.3f}" in page and f"story two {mean:.3f}" in page
    assert "lr 0.125 0.25" in page and "torch" not in page, "only settings that differ"
    figure = html[html.index("<b>grad_norm</b>"):]
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
    assert enlarged(png(picture)).size == (150, 100)
    groups = sheet("x")["groups"]
    for group in groups:
        group["pictures"] = [png(picture)]
    draw_sheet(groups, tmp_path / "one.png")
    draw_sheet(groups, tmp_path / "two.png", groups)
    one, two = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")) for name in ("one", "two"))
    for colour in ((250, 0, 0), (0, 0, 250)):
        rows, columns = np.nonzero((one == colour).all(-1))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (100, 75)
    blue = [(page == shapes.COLOURS["blue"]).all(-1).sum() for page in (one, two)]
    assert two.shape[1] > 1.5 * one.shape[1] and blue[1] == 2 * blue[0] > 0
    assert one.min() < 40, "labels are dark"


def test_explain_walks_one_prompt_through_one_update_and_leaves_the_run_alone(warm, tmp_path):
    out = tmp_path / "grpo"
    shutil.copytree(warm, out)

    def files() -> dict:
        return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in out.rglob("*")
                if p.is_file() and p.name != LOCK}
    before = files()
    printed = run("grpo.py", "--model", warm, "--out", out, "--explain", *flags({**RUN, "group_size": 4}))
    after = files()
    assert after.pop(out / "explain.html") and after == before, "a page is all that is written"
    titles = re.findall(r"^\d+\. (.*)$", printed, re.M)
    order = ("The prompt", "Eq. (5) and (4)", "The rewards r", "Normalised", "Eq. (6)", "How a step",
             "Eq. (2), (3), (7)", "The update", "The same prompt again")
    assert all(title.startswith(start) for title, start in zip(titles, order, strict=True)), titles
    page = words((out / "explain.html").read_text())
    loss_before = re.findall(r"^(text|image) +(\d+) +(\S+) +(\S+) +(\S+) +(\S+) +(\S+)$", printed, re.M)
    for kind, _, _, least, largest, clipped, kl in loss_before[:len(loss_before) // 2]:
        assert (float(least), float(largest)) == pytest.approx((1, 1), abs=1e-3), kind
        assert clipped == "0.0%" and abs(float(kl)) < 1e-4
    for row in loss_before:
        assert " ".join(row) in page, "the page has the numbers that are printed"
