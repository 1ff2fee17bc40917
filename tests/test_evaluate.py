"""Rates and the benchmarks: published averages from published columns, every known pitfall of the files,
runs as a user's."""
import json
import random
import re
from pathlib import Path
from shutil import copytree, ignore_patterns

import numpy as np
import published_samples
import pytest
import torch
from conftest import FIXTURES, ROOT, flags, run, shots, write
from PIL import Image

import common
import evaluate
import shapes
from common import UserError
from data import LeftOut, Question, Sample
from evaluate import (ASPECTS, BENCHMARKS, MMIE, PAPER_ROWS, AnswerSet, Config, InterleavedBench,
                      JudgeRequest, TextToImage, find_score, rate_answer)
from judges import LlavaCritic
from tokenizer import Answer, Segment


@pytest.fixture(scope="session")
def samples_folder(tmp_path_factory):
    return published_samples.make(tmp_path_factory.mktemp("published"), 0.5, seed=1)


def run_benchmark(config):
    """Run a benchmark as the command line does."""
    evaluate.run_benchmark(config, Path(config.out))


def read(benchmark: str, path: Path) -> tuple[list[Question], LeftOut]:
    left_out = LeftOut()
    return list(BENCHMARKS[benchmark].read(path, left_out)), left_out


# ------------------------------------------------------------------------------------------------------------
# Rates

PROMPT = "paint it blue, move it to center. <BEGIN> a red circle at top left <image>"
BLUE, CENTRE = shapes.states_of_prompt(PROMPT)[1:]


def answer_of(*steps: tuple[shapes.Scene, shapes.Scene], layout: str = "TwtVpvTwtVpvE") -> Answer:
    segments = []
    for text, picture in steps:
        segments += [Segment(0, 0, text=shapes.caption(text)), Segment(0, 0, picture=shapes.render(picture))]
    return Answer(layout, segments, torch.zeros(0), torch.zeros(0))


@pytest.mark.parametrize("answer, rates", [
    (answer_of((BLUE, BLUE), (CENTRE, CENTRE)), (1, 1, 1, 1, 1)),
    (answer_of((BLUE, CENTRE), (CENTRE, BLUE)), (1, 1, 0, 0, 0)),                       # pictures swapped
    (answer_of((CENTRE, CENTRE), (BLUE, BLUE)), (1, 0, 1, 0, 0)),                       # steps swapped
    (answer_of((CENTRE, BLUE), (BLUE, CENTRE)), (1, 0, 0, 1, 0)),                       # texts swapped
    (answer_of((BLUE, BLUE), layout="TwtVpvE"), (0, 0.5, 0.5, 0.5, 0)),                 # a step is missing
    (answer_of((BLUE, BLUE), (CENTRE, CENTRE), layout="TwtVpvwtVpvE"), (0, 1, 1, 1, 0)),    # a tag is missing
    (answer_of((BLUE, BLUE), *[(CENTRE, CENTRE)] * 3, layout="TwtVpv" * 4 + "E"), (0, 1, 1, 1, 0)),
    (answer_of(layout="E"), (0, 0, 0, 0, 0))])
def test_rates_of_an_answer_by_hand(answer, rates):
    assert tuple(rate_answer(Sample(PROMPT, []), answer).values()) == rates
    assert tuple(rate_answer(Sample(PROMPT, []), answer)) == evaluate.RATES


def test_an_interval_holds_the_mean_and_narrows_with_more_prompts():
    few, many = (np.tile([0.0, 1.0, 1.0, 1.0], n) for n in (10, 1000))
    assert evaluate.interval(np.ones(7), 0) == [1, 1, 1]
    (mean, low, high), (_, *narrow) = evaluate.interval(few, 0), evaluate.interval(many, 0)
    assert mean == 0.75 and low < narrow[0] < 0.75 < narrow[1] < high
    # two standard errors of a share: 2 sqrt(.75 * .25 / 40)
    assert high - low == pytest.approx(4 * (0.75 * 0.25 / 40) ** 0.5, rel=0.2)


def test_rates_of_a_model_are_written_and_do_not_depend_on_the_batch(warm, tmp_path):
    tables = []
    for batch in (2, 5):
        out = run("evaluate.py", "--model", warm, "--prompts", 5, "--seed", 3, "--budget", 30,
                  "--batch", batch, "--out", tmp_path / str(batch))
        tables.append(json.loads((tmp_path / str(batch) / "evaluation.json").read_text()))
        assert f"{warm.name} greedy" in out and "visual_true" in out
    assert tables[0] == tables[1]
    assert tables[0]["prompts"] == 5 and tables[0]["seed"] == 3 and set(tables[0]["kept"]) == {"t2i", "i2t"}
    for arm in ("sampled", "low", "greedy"):
        assert set(tables[0][arm]) == {*evaluate.RATES, "reward"}
        for name in evaluate.RATES:
            mean, low, high = tables[0][arm][name]
            assert 0 <= low <= mean <= high <= 1


# ------------------------------------------------------------------------------------------------------------
# Scores

COUNTS = (5005, 11482, 3616)                               # MMIE's records by category


@pytest.mark.parametrize("column", MMIE.PAPER)
def test_mmie_average_of_the_papers_rows_is_weighted_by_records(column):
    *columns, printed = MMIE.PAPER[column]
    rows = dict(zip(("SA", "PBL", "MSR"), zip(columns, COUNTS, strict=True), strict=True))
    assert MMIE().average(rows) == (pytest.approx(printed, abs=0.0151), 20103)
    if column == "paper full":                             # the plain mean would be another number
        assert sum(columns) / 3 == pytest.approx(57.82, abs=0.01)


@pytest.mark.parametrize("column", InterleavedBench.PAPER)
def test_interleavedbench_average_is_the_plain_mean_of_five(column):
    *columns, printed = InterleavedBench.PAPER[column]
    rows = {name: (value, 100 + i) for i, (name, value) in enumerate(zip(ASPECTS, columns, strict=True))}
    assert InterleavedBench().average(rows) == (pytest.approx(printed, abs=0.005), 104)


def test_the_papers_rows_stand_as_printed():
    averages = {name: {column: values[-1] for column, values in BENCHMARKS[name].PAPER.items()}
                for name in ("mmie", "interleavedbench")}
    assert averages == {
        "mmie": {"MiniGPT-5": 50.92, "EMU-2": 45.33, "GILL": 51.58, "Anole": 55.22, "paper QLoRA": 57.27,
                 "paper full": 59.50},
        "interleavedbench": {"MiniGPT-5": 1.82, "EMU-2": 1.68, "GILL": 1.84, "paper QLoRA": 2.87,
                             "paper full": 3.13}}
    for benchmark in BENCHMARKS.values():
        assert all(len(values) == len(benchmark.ROWS) for values in benchmark.PAPER.values())
    assert PAPER_ROWS["process"] == tuple(of["paper full"] for of in averages.values())


def test_other_metrics_of_the_paper_stand_in_a_footnote_and_its_columns_right_of_a_bar():
    table = evaluate.benchmark_table(BENCHMARKS["understanding"], {"model": {"accuracy": (50.0, 12)}})
    *rows, footnote = table.splitlines()
    assert "MME-P 1425.2, SEED-Bench image 59.2, MM-Vet 32.8" in footnote and "paper full" in footnote
    assert "|" not in table and rows[-1].split() == ["accuracy", "50.00", "(12)"]
    table = evaluate.benchmark_table(BENCHMARKS["mmie"], {"before": {}, "model": {"SA": (40.0, 7)}})
    lines = table.splitlines()
    ours, paper = lines[2].split("|")
    assert ours.split() == ["SA", "-", "40.00", "(7)"]
    assert [float(value) for value in paper.split()] == [values[0] for values in MMIE.PAPER.values()]
    assert "the paper's own numbers" in lines[0].split("|")[1]


@pytest.mark.parametrize("reply, score", [
    ("### Feedback\nGood, 6 of 6.\n### Score\n4", 4), ("### Score: **5**/6", 5), ("### Score\n4.5", 4),
    ("### Score\n3.5", 4), ("### Score\n2.51", 3), ("### Score\n0", 0), ("### Score\n7", None),
    ("### Score\n-1", None), ("### Score\nnone", None), ("Score: 5", None), ("", None),
    ("### Score\n\nThe answer earns 3 points, not 6", 3), ("### Score\n6.4", 6), ("### Score\n6.5", 6),
    ("### Score\n" + "9" * 400, None)])
def test_the_first_number_behind_the_mark_is_the_score(reply, score):
    assert find_score(reply, 6) == score


def questions_of(*pairs) -> list[Question]:
    return [Question("q", [], id=id, group=group, record={}, origin=(Path("f"), 1, id))
            for id, group in pairs]


def answer_set(questions: list[Question], replies: dict | None = None, answers: dict | None = None,
               folder: Path = Path()) -> AnswerSet:
    """answers: {id: segments}, each segment (text, picture)."""
    records = {id: {"answer": [{"text": text, "image": image} for text, image in segments]}
               for id, segments in (answers or {}).items()}
    return AnswerSet("m", folder, LeftOut(), questions, records, replies or {})


def test_mmie_means_leave_invalid_replies_out_and_count_zeros():
    mmie = BENCHMARKS["mmie"]
    questions = questions_of(("SA-1", "SA"), ("PBL-1", "PBL"), ("PBL-2", "PBL"), ("PBL-3", "PBL"),
                             ("MSR-1", "MSR"))
    of = answer_set(questions, {("SA-1", "score"): "### Score\n3", ("PBL-1", "score"): "### Score\n6",
                                ("PBL-2", "score"): "### Score\n0", ("PBL-3", "score"): "no idea"})
    assert mmie.rows(of, Config()) == {}
    evaluate.score_replies(mmie, of, Config())
    assert mmie.rows(of, Config()) == {"SA": (50, 1), "PBL": (50, 2), "AVG": (pytest.approx(50), 3)}
    assert of.left_out.reasons() == {"left out, no valid score in the reply": 1, "left out, no reply": 1}


def test_interleavedbench_skips_by_task_and_never_by_value():
    bench = BENCHMARKS["interleavedbench"]
    questions = questions_of(("wikihow_1", "wikihow_next_step"), ("multi_concept_gen_1", "x"),
                             ("e", "magicbrush_edit"))
    questions.append(Question("q", [], id="f", group="?",
                              record={"image": ["magic_brush_images_test/1.png"]}))
    questions.append(Question("q", [], id="g", group="education_generation", record={"image": []}))
    both, editing, none = (Config(skip=skip) for skip in ("both", "editing", "none"))
    counts = [[len(bench.aspects(q, config)) for q in questions] for config in (both, editing, none)]
    assert counts == [[5, 3, 3, 3, 5], [5, 5, 3, 3, 5], [5, 5, 5, 5, 5]]
    of = answer_set(questions)
    of.scores = {(q.id, name): 0 if q.id == "wikihow_1" else 4 for q in questions for name in ASPECTS}
    rows = bench.rows(of, both)
    assert rows["text quality"] == (2, 2) and rows["helpfulness"] == (16 / 5, 5)
    assert rows["AVG"][0] == pytest.approx((2 + 3.2 + 3.2 + 2 + 3.2) / 5)
    del of.scores["g", "text quality"], of.scores["wikihow_1", "text quality"]
    assert "text quality" not in bench.rows(of, both) and "AVG" not in bench.rows(of, both)
    assert bench.notes([of], editing) == ["--skip editing: text aspects do not count for ?, magicbrush_edit"]


@pytest.mark.parametrize("reply, right", [
    ("The bakery.", True), ("bakery", True), ("a Bakery!", True), ("Big bakery", False), ("", False),
    ("SHOP", True)])
def test_short_answers_are_compared_without_case_articles_and_points(reply, right):
    assert evaluate.same_answer(reply, ["the bakery", "shop"]) == right


@pytest.mark.parametrize("reply, accepted, right", [
    ("A.", "A", True), ("", "A", False), (".", "A", False), ("B", "A", False), ("-5", "5", False),
    ("-5", "-5", True), ("1.5", "15", False), ("1.5.", "1.5", True), ("1,000", "1000", True),
    ("Zürich!", "zürich", True)])
def test_options_and_numbers_stay_what_they_are(reply, accepted, right):
    assert evaluate.same_answer(reply, [accepted]) == right


# ------------------------------------------------------------------------------------------------------------
# Files

def test_mmie_records_and_their_pitfalls(tmp_path):
    shots(tmp_path, *(f"images/{i}.png" for i in range(5)))

    def record(id, *parts, **more):
        return {"id": id, "question": [{"text": t, "image": i} for t, i in parts], "answer": "a text",
                "model": "gt", "gt_answer": [{"text": None, "image": None}], **more}
    images = [f"images/{i}.png" for i in range(5)]
    write(tmp_path / "data.json", [
        record("PBL-0-000001", ("Wie heißt <image> das?", None), ("Step 1", images[0]), (None, images[1]),
               field="extra"),
        record("-MSR-1", *((None, i) for i in images[:4])), record("MSR-2", *((None, i) for i in images)),
        record("SA-3", ("gone", "images/9.png")), record("X-4", ("no category", None)),
        record("SA-5", (None, None)), record("SA-11", ("<image>", None)),
        record("SA-6", ("out", "../data.json")), record("SA-7", ("out", "/etc/hostname")),
        record("PBL-0-000001", ("twice", None)),
        {"id": "SA-8", "question": "a plain text"}, {"id": "SA-9"}, record("SA-10", (7, None)),
        {"question": []}, None,
        record("SA-PBL-11", ("first wins", None))])
    questions, left_out = read("mmie", tmp_path)
    assert [(q.id, q.group, q.prompt, len(q.prompt_pictures)) for q in questions] == [
        ("PBL-0-000001", "PBL", "Wie heißt   das? Step 1 <image> <image>", 2),
        ("-MSR-1", "MSR", "<image> <image> <image> <image>", 4), ("SA-8", "SA", "a plain text", 0),
        ("SA-PBL-11", "SA", "first wins", 0)]
    assert questions[0].record["field"] == "extra"
    ids = {entry["id"] for entry in left_out.list}
    assert ids >= {"MSR-2", "SA-3", "X-4", "SA-5", "SA-6", "SA-7", "PBL-0-000001", "SA-9", "SA-10", "SA-11"}
    assert sum(left_out.counts.values()) == 12 and left_out.reasons()["left out, more than 4 pictures"] == 1


def test_an_answer_is_cut_after_three_pictures_as_mmies_loader_does():
    def view(pictures: int, *answer):
        question, = questions_of(("SA-1", "SA"))
        question.record = {"question": [{"text": f"q{i}", "image": f"q{i}.png"} for i in range(pictures)]
                           or [{"text": "q", "image": None}]}
        question.prompt_pictures = [Path(f"data/q{i}.png") for i in range(pictures)]
        return MMIE().view(question, answer_set([question], answers={"SA-1": answer}, folder=Path("f")))
    steps = [("one", "1.png"), ("two", "2.png"), (None, "3.png"), ("four", "4.png")]
    assert view(0, *steps) == ("q\n", "one\nImage-0: <image>\ntwo\nImage-1: <image>\nImage-2: <image>\n",
                               [Path("f/1.png"), Path("f/2.png"), Path("f/3.png")])
    assert view(1, *steps)[1] == "one\nImage-1: <image>\ntwo\nImage-2: <image>\n"
    assert view(3, *steps)[1:] == ("one\n", [Path(f"data/q{i}.png") for i in range(3)])   # one text
    assert view(4, *steps)[0].count("<image>") == 4
    assert view(0, ("a <image> <|im_end|> b", None)) == ("q\n", "a     b\n", [])


def test_references_come_in_three_forms_and_only_problems_show_theirs(tmp_path):
    write(tmp_path / "data.json", [
        {"id": "MSR-1", "question": "q", "gt_answer": [{"text": "9", "image": None}], "answer": "mine",
         "model": "m"},
        {"id": "MSR-2", "question": "q", "answer": "a string", "model": "gt"},
        {"id": "MSR-3", "question": [{"text": "q"}]},
        {"id": "MSR-4", "question": "q", "answer": "another model's", "model": "m", "gt_answer": []},
        {"id": "PBL-5", "question": "q", "gt_answer": "9"},
        {"id": "MSR-6", "question": "q", "gt_answer": [{"text": 9}]},
        {"id": "MSR-7", "question": "q", "answer": "7", "model": "gt",
         "gt_answer": [{"text": None, "image": None}]}])
    questions, left_out = read("mmie", tmp_path)
    of = answer_set(questions, answers={q.id: [("nine", None)] for q in questions}, folder=tmp_path)
    messages = [request.message for q in questions for request in MMIE().asks(q, of, Config())]
    references = [re.search("### Correct Answer\n(.*)\n### Feedback\n", message) for message in messages]
    assert [r and r[1] for r in references] == ["9", "a string", "not given", "not given", None, "7"]
    assert all("### Question\nq\n### Answer\nnine\n###" in message for message in messages)
    assert [(e["id"], e["verdict"]) for e in left_out.list] == [("MSR-3", "noted"), ("MSR-4", "noted"),
                                                                ("MSR-6", "left out")]
    assert MMIE().record(questions[2], of) == {
        "id": "MSR-3", "model": "m", "question": [{"text": "q", "image": None}],
        "answer": [{"text": "nine", "image": None}], "gt_answer": [{"text": None, "image": None}]}


def test_our_critic_gets_a_request_for_each_aspect_with_all_pictures():
    question = Question("go <image> on <|im_end|>", [Path("data/0.png")], id="1", group="image_editing")
    answers = {"1": [("now <image> this", "answers/a.png"), (None, "answers/b.png"), ("end", None)]}
    of = answer_set([question], answers=answers, folder=Path("f"))
    bench = InterleavedBench()
    requests = bench.asks(question, of, Config(skip="none"))
    assert [(r.id, r.aspect) for r in requests] == [("1", name) for name in ASPECTS]
    for request in requests:
        assert ASPECTS[request.aspect] in request.message and "from 0 to 5" in request.message
        assert request.message.count("<image>") == len(request.pictures) == 3
        assert "<|im_end|>" not in request.message
        assert request.pictures == [Path("data/0.png"), Path("f/answers/a.png"), Path("f/answers/b.png")]
    assert len(bench.asks(question, of, Config())) == 3
    assert bench.record(question, of) == {"model": "m", "prediction": [
        ["text", "now <image> this"], ["image", "answers/a.png"], ["image", "answers/b.png"],
        ["text", "end"]]}


def test_interleavedbench_records_and_their_pitfalls(tmp_path):
    shots(tmp_path, *(f"zipped_images/wiki_images_test/{i}.png" for i in range(3)),
          "multi_concept_images/a.png")
    wiki = [f"wiki_images_test/{i}.png" for i in range(3)]

    def talk(id, value, images, gpt=None, **more):
        turns = [{"from": "human", "value": value}] + ([{"from": "gpt", "value": gpt}] if gpt else [])
        return {"id": id, "image": images, "task_name": "t", "conversations": turns, **more}
    write(tmp_path / "interleaved_bench.json", [
        talk("-whole", "Steps <BEGIN> fold <image> über <image>", wiki, "then <image>", goal="g",
             category=["c"]),
        {"id": "record-level", "image": [], "task_name": "t", "instruction": "Explain tides."},
        {"id": "turn-level", "image": None, "task_name": "t",
         "conversations": [{"from": "human", "instruction": "Say it."}]},
        talk("more-marks", "<image>a<image>b<image>c", ["multi_concept_images/a.png"]),
        talk("other-count", "a <image> b", wiki[:2], "c <image> d <image>"),
        talk("one", "a <image>", wiki[0]), talk("gone", "a <image>", ["wiki_images_test/9.png"]),
        talk("no-text", "", []), talk(5, "a number as id", []),
        {"id": "no-task", "image": [], "conversations": [{"value": "x"}]}, {"task_name": "t"}, "text",
        talk("dictionary", "", [], **{"conversations": {"value": "x"}}), talk("one", "again", [])])
    questions, left_out = read("interleavedbench", tmp_path)
    assert [(q.id, q.prompt, [p.name for p in q.prompt_pictures]) for q in questions] == [
        ("-whole", "Steps <BEGIN> fold <image> über <image>", ["0.png", "1.png"]),
        ("record-level", "Explain tides.", []),
        ("turn-level", "Say it.", []), ("more-marks", "<image>a b c", ["a.png"]),
        ("other-count", "a <image> b", ["0.png"]), ("one", "a <image>", ["0.png"]),
        ("5", "a number as id", [])]
    noted = {entry["id"]: entry for entry in left_out.list if entry["verdict"] == "noted"}
    assert set(noted) == {"more-marks", "other-count"}
    assert {e["id"] for e in left_out.list} - set(noted) == {"gone", "no-text", "no-task", "", "dictionary",
                                                             "one"}


def test_a_users_questions_and_captions_are_read(tmp_path):
    shots(tmp_path, "a.png")
    lines = [{"id": 1, "image": "a.png", "question": "what?", "answer": "A"},
             {"question": "2+2?", "answers": ["4", "four"]},
             {"images": ["a.png", "a.png"], "question": "<image> or <image>?", "answer": "b"},
             {"id": None, "image": None, "images": ["a.png"], "question": "a table?", "answer": None,
              "answers": ["has gaps"]},
             {"question": "", "answer": "x"},
             {"question": "no answer"}, {"image": "b.png", "question": "x", "answer": "y"}, {"question": 1},
             {"image": ["a.png", "a.png"], "question": "<image>?", "answer": "y"}]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    questions, left_out = read("understanding", tmp_path)
    assert [(q.id, q.prompt, q.record["accepted"]) for q in questions] == [
        ("1", "<image> what?", ["A"]), ("2", "2+2?", ["4", "four"]), ("3", "<image> or <image>?", ["b"]),
        ("4", "<image> a table?", ["has gaps"])]
    assert sum(left_out.counts.values()) == 6
    (tmp_path / "captions.txt").write_text("a fox\n\n snow <image> \n", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"prompt": "é"}\n{"caption": "x"}\n')
    assert [q.prompt for q in read("t2i", tmp_path)[0]] == ["a fox", "snow"]
    assert [q.prompt for q in read("t2i", tmp_path / "c.jsonl")[0]] == ["é"]
    assert [q.prompt for q in read("t2i", write(tmp_path / "c.json", [{"prompt": "a fox"}]))[0]] == ["a fox"]


@pytest.mark.parametrize("benchmark, file", [
    ("mmie", "data.json"), ("interleavedbench", "interleaved_bench.json"),
    ("understanding", "questions.jsonl"), ("t2i", "captions.txt")])
def test_missing_empty_and_broken_files_are_named(tmp_path, benchmark, file):
    with pytest.raises(UserError, match=re.escape(file)):
        read(benchmark, tmp_path)
    (tmp_path / file).write_text("")
    config = Config(benchmark=benchmark, data=str(tmp_path), visual_reward="clip-score")
    with pytest.raises(UserError, match="expected|no usable question"):
        run_benchmark(config)
    (tmp_path / file).write_bytes(b"\xff\xfe\x00[")
    with pytest.raises(UserError):
        run_benchmark(config)


def test_replies_from_elsewhere_are_read_in_their_schemas(tmp_path):
    official = [{"id": "SA-1", "model": "m", "question": "q", "gpt_feedback": "### Score\n5"}, {"id": "SA-2"},
                3, {"id": "SA-1", "gpt_feedback": "twice"}, {"id": "SA-3", "reply": "r", "aspect": ["x"]}]
    file = write(tmp_path / "eval_result.json", official)
    assert evaluate.read_replies(file) == {("SA-1", "score"): "### Score\n5"}
    (tmp_path / "r.jsonl").write_text('{"id": 7, "aspect": "helpfulness", "reply": 4}\n'
                                      '{"id": "a", "aspect": "x", "reply": "r"}\n')
    assert evaluate.read_replies(tmp_path / "r.jsonl") == {("7", "helpfulness"): "### Score\n4",
                                                           ("a", "x"): "r"}


# ------------------------------------------------------------------------------------------------------------
# Runs

def config_of(benchmark: str, samples_folder: Path, model: Path, out: Path, **more) -> Config:
    return Config(**{"benchmark": benchmark, "data": str(samples_folder / benchmark), "model": str(model),
                     "out": str(out), "device": "cpu", "batch": 2, "budget": 40, **more})


@pytest.mark.parametrize("benchmark, average", [("mmie", "59.50"), ("interleavedbench", "3.13")])
def test_a_killed_benchmark_goes_on_and_gives_the_same_table(benchmark, average, samples_folder, talker,
                                                             tmp_path, monkeypatch, capsys):
    """Answers belong to the question and the seed, so the run may even go on with another batch size."""
    def result(out: Path) -> tuple:
        results = json.loads((out / "results.json").read_text())
        del results["models"]
        pictures = {p.name: p.read_bytes() for p in (out / "model" / "answers").glob("*.png")}
        return results, (out / "model" / "answers.jsonl").read_text(), pictures
    replies = tmp_path / "replies.jsonl"
    questions, _ = read(benchmark, samples_folder / benchmark)
    write(replies, [{"id": q.id, "aspect": aspect, "reply": random.Random(q.id + aspect).randint(0, 5)}
                    for q in questions for aspect in BENCHMARKS[benchmark].aspects(q, Config())])
    whole, cut = (config_of(benchmark, samples_folder, talker, tmp_path / name, judge=f"file:{replies}")
                  for name in ("whole", "cut"))
    run_benchmark(whole)
    add, count = common.add_line, []

    def dying(file, line):
        count.append(line)
        if len(count) > 1:                        # in the middle of the first batch, half a line written
            file.open("a").write('{"id": "half')
            raise KeyboardInterrupt
        add(file, line)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "add_line", dying)
        with pytest.raises(KeyboardInterrupt):
            run_benchmark(cut)
    cut.batch = 3
    run_benchmark(cut)
    assert result(tmp_path / "whole") == result(tmp_path / "cut")
    rows = result(tmp_path / "whole")[0]["rows"]["model"]
    assert list(rows) == list(BENCHMARKS[benchmark].ROWS)
    table = capsys.readouterr().out
    assert "paper full" in table and average in table
    with pytest.raises(UserError, match="temperature"):
        run_benchmark(config_of(benchmark, samples_folder, talker, tmp_path / "cut",
                                         temperature=0.5))


TWO_PROCESSES = """
import sys
sys.path.insert(0, {root!r})
import evaluate
import judges


def replies(self, prompts, pictures, **_):
    return [f"### Score\\n{{len(prompt) % 6}}" for prompt in prompts]


judges.LlavaCritic.replies = replies
evaluate.run_main(evaluate.main)
"""


def on_two_processes(folder: Path, config: Config) -> str:
    """evaluate.py under torchrun; the critic's replies are short ones that follow from the question."""
    script = write(folder / "two.py", TWO_PROCESSES.format(root=str(ROOT)))
    given = {name: value for name, value in vars(config).items() if value != getattr(Config, name)}
    return run("-m", "torch.distributed.run", "--nproc_per_node=2", script, *flags(given))


def test_a_benchmark_goes_on_with_two_processes_after_three_were_killed(samples_folder, talker, tmp_path,
                                                                        monkeypatch):
    """Their files are merged, half a line is dropped, nothing is sampled or asked again: the same table."""
    monkeypatch.setattr(LlavaCritic, "replies", lambda self, prompts, pictures, **_:
                        [f"### Score\n{len(p) % 6}" for p in prompts])
    critic = f"llava-critic={FIXTURES / 'llava_critic_tiny'}"
    whole, cut = (config_of("mmie", samples_folder, talker, tmp_path / name, judge=critic)
                  for name in ("whole", "cut"))
    run_benchmark(whole)
    answers, replies = ((tmp_path / "whole" / "model" / name).read_text().splitlines(keepends=True)
                        for name in ("answers.jsonl", "replies.jsonl"))
    assert len(answers) > 4
    left = tmp_path / "cut" / "model"
    copytree(tmp_path / "whole" / "model", left, ignore=ignore_patterns("*.jsonl", "data.json", "*.html"))
    kept = json.loads(answers[1]) | {"layout": "kept"}
    write(left.parent / common.LOCK, "")                                   # as a kill leaves it
    write(left / "answers-0.jsonl", answers[0] + answers[3][:20])
    write(left / "answers-2.jsonl", json.dumps(kept) + "\n")
    write(left / "replies-2.jsonl", replies[2])
    printed = on_two_processes(tmp_path, cut)
    assert "paper full" in printed and printed.count("answers: ") == 1, "rank 0 alone prints"
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "cut")]
    assert results[0] == results[1]
    assert {file.name for file in left.glob("*.jsonl")} == {"answers.jsonl", "replies.jsonl"}
    lines = {line["id"]: line for line in common.read_lines(left / "answers.jsonl")}
    expected = {line["id"]: line for line in map(json.loads, answers)} | {kept["id"]: kept}
    assert lines == expected

    def words(line: dict) -> tuple:          # without the pictures' hash: another batch, other rounding
        return line["id"], line["aspect"], line["reply"]
    assert sorted(map(words, common.read_lines(left / "replies.jsonl"))) == sorted(
        words(json.loads(line)) for line in replies)


def test_rates_of_the_toy_world_go_on_with_two_processes(warm, tmp_path, monkeypatch):
    whole, cut = (Config(model=str(warm), prompts=5, seed=3, budget=30, out=str(tmp_path / name),
                         device="cpu") for name in ("whole", "cut"))
    model = evaluate.open_model(str(warm), whole)
    expected = evaluate.evaluate(model, whole)
    add, count = common.add_line, []

    def dying(file, line):
        count.append(line)
        if len(count) > 7:                                                 # in the second arm
            raise KeyboardInterrupt
        add(file, line)
    with monkeypatch.context() as patch:
        patch.setattr(evaluate, "add_line", dying)
        with pytest.raises(KeyboardInterrupt):
            evaluate.evaluate(model, cut)
    file, = (tmp_path / "cut").glob("rates_*.jsonl")
    lines = common.read_lines(file)
    assert len(lines) == 7
    lines[0]["rates"]["format"] = 100.0
    write(file, lines)
    (tmp_path / "cut" / common.LOCK).touch()                               # the command line leaves it there
    assert f"{warm.name} greedy" in on_two_processes(tmp_path, cut)
    got = json.loads((tmp_path / "cut" / "evaluation.json").read_text())
    assert got["sampled"].pop("format")[0] > 1, "what was rated before the kill is not rated again"
    del expected["sampled"]["format"]
    assert got == expected
    left = {file.name for file in (tmp_path / "cut").iterdir()}
    assert left == {"evaluation.json", "values.json", common.LOCK}


def test_answers_are_written_as_mmie_wants_them(samples_folder, talker, tmp_path):
    run_benchmark(config_of("mmie", samples_folder, talker, tmp_path))
    questions, written = (json.loads((folder / "data.json").read_text())
                      for folder in (samples_folder / "mmie", tmp_path / "model"))
    assert [record["id"] for record in written] == [record["id"] for record in questions]
    pictures = 0
    for record in written:
        assert set(record) == {"id", "question", "answer", "model", "gt_answer"}
        assert record["model"] == str(talker)
        for segment in record["question"] + record["answer"] + record["gt_answer"]:
            assert set(segment) == {"text", "image"}
            if segment["image"]:
                Image.open(tmp_path / "model" / segment["image"]).load()    # whole without the data folder
                pictures += 1
        assert any(s["text"] or s["image"] for s in record["answer"])
    assert pictures > len(written)
    page = (tmp_path / "model" / "answers.html").read_text()
    assert page.count("<img") >= len(written) and "MSR-0-000002" in page and "http" not in page
    assert all(link.startswith("data:image/") for link in re.findall('src="([^"]+)"', page))


def test_a_budget_without_room_for_a_picture_is_refused(samples_folder, talker, tmp_path):
    config = config_of("mmie", samples_folder, talker, tmp_path, budget=8)
    with pytest.raises(UserError, match="--budget 8.*9 positions"):
        run_benchmark(config)
    assert not (tmp_path / "model").exists()


def test_half_a_character_does_not_end_a_run(samples_folder, talker, tmp_path):
    write(tmp_path / "data" / "data.json",
          r'[{"id": "SA-1\ud83d", "question": "cut \ud83d emoji", "extra": "\udc00"}]')
    run_benchmark(config_of("mmie", samples_folder, talker, tmp_path / "out",
                                     data=str(tmp_path / "data")))
    record, = json.loads((tmp_path / "out" / "model" / "data.json").read_text())
    assert record["id"] == "SA-1?" and record["question"][0]["text"] == "cut ? emoji"


def test_our_critic_judges_and_is_called_by_its_name(samples_folder, talker, tmp_path, monkeypatch):
    questions = []

    def replies(self, prompts, pictures, **options):
        assert all(prompt.count("<image>") == len(of) for prompt, of in zip(prompts, pictures, strict=True))
        questions.extend(prompts)
        return ["### Score\n3" for _ in prompts]
    monkeypatch.setattr(LlavaCritic, "replies", replies)
    config = config_of("interleavedbench", samples_folder, talker, tmp_path,
                       judge=f"llava-critic={FIXTURES / 'llava_critic_tiny'}")
    run_benchmark(config)
    results = json.loads((tmp_path / "results.json").read_text())
    assert [of["value"] for of in results["rows"]["model"].values()] == [3] * 6
    page = (tmp_path / "model" / "answers.html").read_text()
    assert "LLaVA-Critic, NOT the official judge" in page and "text aspects do not count for" in page
    count = len(questions)
    run_benchmark(config)
    assert len(questions) == count, "replies are kept"


def test_a_question_beyond_the_critics_context_gets_no_score(samples_folder, tmp_path):
    class Critic:
        BATCH, repetition_penalty = 4, 1.0

        def replies(self, prompts, pictures, repetition_penalty):
            if any("long" in prompt for prompt in prompts):
                raise UserError("beyond the context")
            return ["### Score\n3" for _ in prompts]
    requests = [JudgeRequest(f"{i}", "score", "long" if i == 2 else "x", []) for i in range(6)]
    replies = evaluate.ask_critic(Critic(), "c", requests, tmp_path)
    assert [find_score(replies[f"{i}", "score"], 6) for i in range(6)] == [3, 3, None, 3, 3, 3]
    assert "beyond the context" in replies["2", "score"]


def test_the_real_critic_sees_the_pictures(samples_folder, talker, tmp_path):
    """The tiny random critic says nothing useful: nothing is scored, and it says so."""
    with pytest.MonkeyPatch.context() as patch:
        real = LlavaCritic.replies
        patch.setattr(LlavaCritic, "replies", lambda self, *of, **more: real(self, *of, 2, **more))
        run_benchmark(config_of("mmie", samples_folder, talker, tmp_path,
                                         judge=f"llava-critic={FIXTURES / 'llava_critic_tiny'}"))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["rows"] == {"model": {}}
    assert results["left_out"]["model"] == {"left out, no valid score in the reply": 6}
    assert len((tmp_path / "model" / "replies.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("benchmark, row", [("understanding", "accuracy"), ("t2i", "visual reward")])
def test_kept_abilities_stand_side_by_side_before_and_after(benchmark, row, warm, talker, samples_folder,
                                                            tmp_path):
    out = run("evaluate.py", "--benchmark", benchmark, "--data", samples_folder / "kept", "--before", warm,
              "--model", talker, "--out", tmp_path, "--budget", 30)
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["rows"]) == {"before", "model"} and "before" in out and "paper full" in out
    assert all(0 <= of[row]["value"] <= 100 and of[row]["records"] == 12 for of in results["rows"].values())


def test_visual_reward_of_a_right_picture_is_one_and_of_none_is_zero(tmp_path):
    scenes = shapes.SCENES[:2]
    Image.fromarray(shapes.render(scenes[0])).save(tmp_path / "a.png")
    questions = [Question(shapes.caption(scene), [], id=str(i)) for i, scene in enumerate(scenes)]
    answers = {"0": [(None, "a.png")], "1": [("none", None)]}
    for part, row in ((questions, (0.5, 2)), (questions[1:], (0, 1))):
        of = answer_set(part, answers=answers, folder=tmp_path)
        assert TextToImage().rows(of, Config(device="cpu")) == {"visual reward": row}


def test_help_lists_the_benchmarks_and_judges_by_name():
    out = re.sub(r"\s+", " ", run("evaluate.py", "--help"))
    assert ", ".join(BENCHMARKS) in out and "rules, rules-weak, image-reward, clip-score" in out


@pytest.mark.parametrize("arguments, words", [
    (["--benchmark", "mmmie"],
     "--benchmark mmmie: expected mmie or interleavedbench or understanding or t2i"),
    (["--benchmark", "mmie"], "--data"),
    (["--benchmark", "mmie", "--data", "no/such"], "--data no/such"),
    (["--data", "tests"], "--data tests: expected --benchmark"),
    (["--benchmark", "mmie", "--data", "tests", "--judge", "gpt"], "--judge gpt"),
    (["--benchmark", "mmie", "--data", "tests", "--judge", "llava-critic=no/such/folder"],
     "--judge llava-critic=no/such/folder"),
    (["--benchmark", "t2i", "--data", "tests", "--judge", "file:x"], "--visual-reward"),
    (["--benchmark", "mmie", "--data", "tests", "--skip", "some"], "--skip some"),
    (["--benchmark", "mmie", "--data", "tests"], "data.json"),
    (["--batch", "0"], "--batch 0"),
    (["--seeds", "0,x"], "--seeds 0,x"),
    (["--json", "x.json"], "unknown flag --json"),
    (["--benchmark", "mmie", "--data", "tests", "--judge", "file:x", "--before", "y"], "--before"),
    (["--benchmark", "t2i", "--data", "tests/requirements.txt"], "--visual-reward")])
def test_mistakes_with_benchmarks_are_one_sentence(arguments, words):
    out = run("evaluate.py", *arguments, check=2, HF_HUB_OFFLINE="1")
    assert words in out and "Traceback" not in out and len(out.strip().splitlines()) == 1, out
