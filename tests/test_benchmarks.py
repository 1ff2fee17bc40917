"""The benchmarks: published averages from the published columns, every known pitfall of the files, runs as a user's."""
import json
import random
import re
from pathlib import Path

import published_samples
import pytest
from conftest import FIXTURES, run, shots, write
from PIL import Image

import common
import evaluate
import shapes
from common import UserError
from data import LeftOut, Question
from evaluate import ASPECTS, BENCHMARKS, Answered, Config, find_score
from model import save


@pytest.fixture(scope="session")
def samples_folder(tmp_path_factory):
    return published_samples.make(tmp_path_factory.mktemp("published"), 0.5, seed=1)


@pytest.fixture(scope="session")
def talker(tiny, tmp_path_factory):
    """The untrained model as a checkpoint: it samples texts, pictures and ends."""
    folder = tmp_path_factory.mktemp("talker")
    save(tiny, folder / "policy")
    return folder


def read(benchmark: str, path: Path) -> tuple[list[Question], LeftOut]:
    left_out = LeftOut()
    return list(BENCHMARKS[benchmark].read(path, left_out)), left_out


# ---------------------------------------------------------------------------------------------------------------------
# Scores

@pytest.mark.parametrize("columns, printed", [
    ((56.87, 62.28, 54.31), 59.50), ((53.12, 60.34, 53.28), 57.27), ((48.95, 59.05, 51.72), 55.22)])
def test_mmie_average_of_the_papers_rows_is_weighted_by_records(columns, printed):
    rows = dict(zip(("SA", "PBL", "MSR"), zip(columns, (5005, 11482, 3616))))
    assert evaluate.weighted_mean(rows) == (pytest.approx(printed, abs=0.01), 20103)
    if printed == 59.50:                                                    # the plain mean would be another number
        assert sum(columns) / 3 == pytest.approx(57.82, abs=0.01)


@pytest.mark.parametrize("columns, printed",
                         [((2.86, 3.58, 3.25, 3.02, 2.94), 3.13), ((2.33, 3.39, 3.01, 2.75, 2.85), 2.87)])
def test_interleavedbench_average_is_the_plain_mean_of_five(columns, printed):
    rows = {name: (value, 100 + i) for i, (name, value) in enumerate(zip(ASPECTS, columns))}
    assert evaluate.plain_mean(rows)[0] == pytest.approx(printed, abs=0.005)


def test_the_papers_rows_stand_as_printed():
    for benchmark in ("mmie", "interleavedbench"):
        spec = BENCHMARKS[benchmark]
        assert all(len(values) == len(spec.rows) for values in spec.paper.values())
        assert spec.paper["paper full"][-1] == {"mmie": 59.50, "interleavedbench": 3.13}[benchmark]


@pytest.mark.parametrize("reply, score", [
    ("### Feedback\nGood, 6 of 6.\n### Score\n4", 4), ("### Score: **5**/6", 5), ("### Score\n4.5", 4),
    ("### Score\n3.5", 4), ("### Score\n2.51", 3), ("### Score\n0", 0), ("### Score\n7", None),
    ("### Score\n-1", None), ("### Score\nnone", None),
    ("Score: 5", None), ("", None), ("### Score\n\nThe answer earns 3 points, not 6", 3), ("### Score\n6.4", 6),
    ("### Score\n6.5", 6), ("### Score\n" + "9" * 400, None)])
def test_the_first_number_behind_the_mark_is_the_score(reply, score):
    assert find_score(reply, 6) == score


def questions_of(*pairs) -> list[Question]:
    return [Question("q", [], id=id, group=group, record={}, origin=(Path("f"), 1, id)) for id, group in pairs]


def answered(questions: list[Question], replies: dict, answers: dict | None = None, folder: Path = Path()) -> Answered:
    return Answered("m", folder, LeftOut(), questions, answers or {}, replies)


def test_mmie_means_leave_invalid_replies_out_and_count_zeros():
    spec = BENCHMARKS["mmie"]
    of = answered(questions_of(("SA-1", "SA"), ("PBL-1", "PBL"), ("PBL-2", "PBL"), ("PBL-3", "PBL"), ("MSR-1", "MSR")),
                  {("SA-1", "score"): "### Score\n3", ("PBL-1", "score"): "### Score\n6",
                   ("PBL-2", "score"): "### Score\n0", ("PBL-3", "score"): "no idea"})
    assert spec.score(of, Config()) == {}
    evaluate.score_replies(spec, of, Config())
    assert spec.score(of, Config()) == {"SA": (50, 1), "PBL": (50, 2), "AVG": (pytest.approx(50), 3)}
    assert of.left_out.reasons() == {"left out, no valid score in the reply": 1, "left out, no reply": 1}


def test_interleavedbench_skips_by_task_and_never_by_value():
    spec = BENCHMARKS["interleavedbench"]
    asked = questions_of(("wikihow_1", "wikihow_next_step"), ("multi_concept_gen_1", "x"), ("e", "magicbrush_edit"))
    asked.append(Question("q", [], id="f", group="?", record={"image": ["magic_brush_images_test/1.png"]}))
    asked.append(Question("q", [], id="g", group="education_generation", record={"image": []}))
    both, editing, none = (Config(skip=skip) for skip in ("both", "editing", "none"))
    counted = [[len(spec.aspects(q, config)) for q in asked] for config in (both, editing, none)]
    assert counted == [[5, 3, 3, 3, 5], [5, 5, 3, 3, 5], [5, 5, 5, 5, 5]]
    of = answered(asked, {})
    of.scores = {(q.id, name): 0 if q.id == "wikihow_1" else 4 for q in asked for name in ASPECTS}
    rows = spec.score(of, both)
    assert rows["text quality"] == (2, 2) and rows["helpfulness"] == (16 / 5, 5)
    assert rows["AVG"][0] == pytest.approx((2 + 3.2 + 3.2 + 2 + 3.2) / 5)
    del of.scores["g", "text quality"], of.scores["wikihow_1", "text quality"]
    assert "text quality" not in spec.score(of, both) and "AVG" not in spec.score(of, both)


@pytest.mark.parametrize("reply, right",
                         [("The bakery.", True), ("bakery", True), ("a Bakery!", True), ("Big bakery", False),
                                          ("", False), ("SHOP", True)])
def test_short_answers_are_compared_without_case_articles_and_points(reply, right):
    assert evaluate.same_answer(reply, ["the bakery", "shop"]) == right


@pytest.mark.parametrize("reply, accepted, right", [
    ("A.", "A", True), ("", "A", False), (".", "A", False), ("B", "A", False), ("-5", "5", False), ("-5", "-5", True),
    ("1.5", "15", False), ("1.5.", "1.5", True), ("1,000", "1000", True), ("Zürich!", "zürich", True)])
def test_options_and_numbers_stay_what_they_are(reply, accepted, right):
    assert evaluate.same_answer(reply, [accepted]) == right


# ---------------------------------------------------------------------------------------------------------------------
# Files

def test_mmie_records_and_their_pitfalls(tmp_path):
    shots(tmp_path, *(f"images/{i}.png" for i in range(5)))

    def record(id, *parts, **more):
        return {"id": id, "question": [{"text": t, "image": i} for t, i in parts], "answer": "a text", "model": "gt",
                "gt_answer": [{"text": None, "image": None}], **more}
    images = [f"images/{i}.png" for i in range(5)]
    write(tmp_path / "data.json", [
        record("PBL-0-000001", ("Wie heißt <image> das?", None), ("Step 1", images[0]), (None, images[1]),
               field="extra"),
        record("-MSR-1", *((None, i) for i in images[:4])), record("MSR-2", *((None, i) for i in images)),
        record("SA-3", ("gone", "images/9.png")), record("X-4", ("no category", None)), record("SA-5", (None, None)),
        record("SA-6", ("out", "../data.json")), record("SA-7", ("out", "/etc/hostname")),
        record("PBL-0-000001", ("twice", None)),
        {"id": "SA-8", "question": "a plain text"}, {"id": "SA-9"}, record("SA-10", (7, None)), {"question": []}, None,
        record("SA-PBL-11", ("first wins", None))])
    asked, left_out = read("mmie", tmp_path)
    assert [(q.id, q.group, q.prompt, len(q.prompt_pictures)) for q in asked] == [
        ("PBL-0-000001", "PBL", "Wie heißt   das? Step 1 <image> <image>", 2),
        ("-MSR-1", "MSR", "<image> <image> <image> <image>", 4), ("SA-8", "SA", "a plain text", 0),
        ("SA-PBL-11", "SA", "first wins", 0)]
    assert asked[0].record["field"] == "extra"
    ids = {entry["id"] for entry in left_out.list}
    assert ids >= {"MSR-2", "SA-3", "X-4", "SA-5", "SA-6", "SA-7", "PBL-0-000001", "SA-9", "SA-10"}
    assert sum(left_out.counts.values()) == 11 and left_out.reasons()["left out, more than 4 pictures"] == 1


def test_an_answer_is_cut_after_three_pictures_as_mmies_loader_does():
    def view(given: int, *answer):
        q = questions_of(("SA-1", "SA"))[0]
        q.record = {"question": [{"text": f"q{i}", "image": f"q{i}.png"} for i in range(given)]
                    or [{"text": "q", "image": None}]}
        q.prompt_pictures = [Path(f"data/q{i}.png") for i in range(given)]
        return evaluate.mmie_view(q, [{"text": t, "image": i} for t, i in answer], Path("f"))
    steps = [("one", "1.png"), ("two", "2.png"), (None, "3.png"), ("four", "4.png")]
    assert view(0, *steps) == ("q\n", "one\nImage-0: <image>\ntwo\nImage-1: <image>\nImage-2: <image>\n",
                               [Path("f/1.png"), Path("f/2.png"), Path("f/3.png")])
    assert view(1, *steps)[1] == "one\nImage-1: <image>\ntwo\nImage-2: <image>\n"
    assert view(3, *steps)[1:] == ("one\n", [Path(f"data/q{i}.png") for i in range(3)])        # one text, no picture
    assert view(4, *steps)[0].count("<image>") == 4
    assert view(0, ("a <image> <|im_end|> b", None)) == ("q\n", "a     b\n", [])


def test_references_come_in_three_forms_and_only_problems_show_theirs(tmp_path):
    write(tmp_path / "data.json", [
        {"id": "MSR-1", "question": "q", "gt_answer": [{"text": "9", "image": None}], "answer": "mine", "model": "m"},
        {"id": "MSR-2", "question": "q", "answer": "a string", "model": "gt"},
        {"id": "MSR-3", "question": [{"text": "q"}]},
        {"id": "MSR-4", "question": "q", "answer": "another model's", "model": "m", "gt_answer": []},
        {"id": "PBL-5", "question": "q", "gt_answer": "9"},
        {"id": "MSR-6", "question": "q", "gt_answer": [{"text": 9}]},
        {"id": "MSR-7", "question": "q", "answer": "7", "model": "gt", "gt_answer": [{"text": None, "image": None}]}])
    asked, left_out = read("mmie", tmp_path)
    asks = [evaluate.mmie_asks(q, [{"text": "nine", "image": None}], Path("f"), Config())[0][1] for q in asked]
    told = [re.search("### Correct Answer\n(.*)\n### Feedback\n", ask) for ask in asks]
    assert [t and t[1] for t in told] == ["9", "a string", "not given", "not given", None, "7"]
    assert all("### Question\nq\n### Answer\nnine\n###" in ask for ask in asks)
    assert [(e["id"], e["verdict"]) for e in left_out.list] == [("MSR-3", "noted"), ("MSR-4", "noted"),
                                                                ("MSR-6", "left out")]
    made = evaluate.mmie_record(asked[2], [], tmp_path, "me")
    assert made == {"id": "MSR-3", "question": [{"text": "q", "image": None}], "answer": [], "model": "me",
                    "gt_answer": [{"text": None, "image": None}]}


def test_interleavedbench_records_and_their_pitfalls(tmp_path):
    shots(tmp_path, *(f"zipped_images/wiki_images_test/{i}.png" for i in range(3)), "multi_concept_images/a.png")
    wiki = [f"wiki_images_test/{i}.png" for i in range(3)]

    def talk(id, value, images, gpt=None, **more):
        turns = [{"from": "human", "value": value}] + ([{"from": "gpt", "value": gpt}] if gpt else [])
        return {"id": id, "image": images, "task_name": "t", "conversations": turns, **more}
    write(tmp_path / "interleaved_bench.json", [
        talk("-whole", "Steps <BEGIN> fold <image> über <image>", wiki, "then <image>", goal="g", category=["c"]),
        {"id": "record-level", "image": [], "task_name": "t", "instruction": "Explain tides."},
        {"id": "turn-level", "image": None, "task_name": "t",
         "conversations": [{"from": "human", "instruction": "Say it."}]},
        talk("more-marks", "<image> a <image> b <image> c", ["multi_concept_images/a.png"]),
        talk("other-count", "a <image> b", wiki[:2], "c <image> d <image>"), talk("one", "a <image>", wiki[0]),
        talk("gone", "a <image>", ["wiki_images_test/9.png"]), talk("no-text", "", []), talk(5, "a number as id", []),
        {"id": "no-task", "image": [], "conversations": [{"value": "x"}]}, {"task_name": "t"}, "text",
        talk("dictionary", "", [], **{"conversations": {"value": "x"}}), talk("one", "again", [])])
    asked, left_out = read("interleavedbench", tmp_path)
    assert [(q.id, q.prompt, [p.name for p in q.prompt_pictures]) for q in asked] == [
        ("-whole", "Steps <BEGIN> fold <image> über <image>", ["0.png", "1.png"]),
        ("record-level", "Explain tides.", []),
        ("turn-level", "Say it.", []), ("more-marks", "<image> a  b   c", ["a.png"]),
        ("other-count", "a <image> b", ["0.png"]), ("one", "a <image>", ["0.png"]), ("5", "a number as id", [])]
    noted = {entry["id"]: entry for entry in left_out.list if entry["verdict"] == "noted"}
    assert set(noted) == {"more-marks", "other-count"}
    assert {e["id"] for e in left_out.list} - set(noted) == {"gone", "no-text", "no-task", "", "dictionary", "one"}


def test_questions_and_captions_of_ones_own(tmp_path):
    shots(tmp_path, "a.png")
    lines = [{"id": 1, "image": "a.png", "question": "what?", "answer": "A"},
             {"question": "2+2?", "answers": ["4", "four"]},
             {"images": ["a.png", "a.png"], "question": "<image> or <image>?", "answer": "b"},
             {"question": "", "answer": "x"},
             {"question": "no answer"}, {"image": "b.png", "question": "x", "answer": "y"}, {"question": 1},
             {"image": ["a.png", "a.png"], "question": "<image>?", "answer": "y"}]
    file = tmp_path / "questions.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + "{broken\n")
    asked, left_out = read("understanding", tmp_path)
    assert [(q.id, q.prompt, q.record["accepted"]) for q in asked] == [
        ("1", "<image> what?", ["A"]), ("2", "2+2?", ["4", "four"]), ("3", "<image> or <image>?", ["b"])]
    assert sum(left_out.counts.values()) == 6
    (tmp_path / "captions.txt").write_text("a fox\n\n snow <image> \n", encoding="utf-8")
    (tmp_path / "c.jsonl").write_text('{"prompt": "é"}\n{"caption": "x"}\n')
    assert [q.prompt for q in read("t2i", tmp_path)[0]] == ["a fox", "snow"]
    assert [q.prompt for q in read("t2i", tmp_path / "c.jsonl")[0]] == ["é"]
    assert [q.prompt for q in read("t2i", write(tmp_path / "c.json", [{"prompt": "a fox"}]))[0]] == ["a fox"]


@pytest.mark.parametrize("benchmark, file", [("mmie", "data.json"), ("interleavedbench", "interleaved_bench.json"),
                                             ("understanding", "questions.jsonl"), ("t2i", "captions.txt")])
def test_missing_empty_and_broken_files_are_named(tmp_path, benchmark, file):
    with pytest.raises(UserError, match=re.escape(file)):
        read(benchmark, tmp_path)
    (tmp_path / file).write_text("")
    config = Config(benchmark=benchmark, data=str(tmp_path), visual_reward="clip-score")
    with pytest.raises(UserError, match="expected|no usable question"):
        evaluate.run_benchmark(config)
    (tmp_path / file).write_bytes(b"\xff\xfe\x00[")
    with pytest.raises(UserError):
        evaluate.run_benchmark(config)


def test_replies_from_elsewhere_are_read_in_their_schemas(tmp_path):
    official = [{"id": "SA-1", "model": "m", "question": "q", "gpt_feedback": "### Score\n5"}, {"id": "SA-2"}, 3,
                {"id": "SA-1", "gpt_feedback": "twice"}]
    assert evaluate.read_replies(write(tmp_path / "eval_result.json", official)) == {("SA-1", "score"): "### Score\n5"}
    (tmp_path / "r.jsonl").write_text('{"id": 7, "aspect": "helpfulness", "reply": 4}\n'
                                      '{"id": "a", "aspect": "x", "reply": "r"}\n')
    assert evaluate.read_replies(tmp_path / "r.jsonl") == {("7", "helpfulness"): "### Score\n4", ("a", "x"): "r"}


# ---------------------------------------------------------------------------------------------------------------------
# Runs

def config_of(benchmark: str, samples_folder: Path, model: Path, out: Path, **more) -> Config:
    return Config(benchmark=benchmark, data=str(samples_folder / benchmark), model=str(model), out=str(out), device="cpu",
                  batch=2, budget=40, **more)


@pytest.mark.parametrize("benchmark", ["mmie", "interleavedbench"])
def test_a_killed_benchmark_goes_on_and_gives_the_same_table(benchmark, samples_folder, talker, tmp_path, monkeypatch, capsys):
    def result(out: Path) -> tuple:
        told = json.loads((out / "results.json").read_text())
        return {k: v for k, v in told.items() if k != "models"}, (out / "model" / "answers.jsonl").read_text(), \
            {p.name: p.read_bytes() for p in (out / "model" / "answers").glob("*.png")}
    replies = tmp_path / "replies.jsonl"
    asked, _ = read(benchmark, samples_folder / benchmark)
    replies.write_text("".join(json.dumps({"id": q.id, "aspect": aspect,
                                           "reply": random.Random(q.id + aspect).randint(0, 5)})
                               + "\n" for q in asked for aspect in BENCHMARKS[benchmark].aspects(q, Config())))
    whole, cut = (config_of(benchmark, samples_folder, talker, tmp_path / name, judge=f"file:{replies}")
                  for name in ("whole", "cut"))
    evaluate.run_benchmark(whole)
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
            evaluate.run_benchmark(cut)
    evaluate.run_benchmark(cut)
    assert result(tmp_path / "whole") == result(tmp_path / "cut")
    told = result(tmp_path / "whole")[0]
    assert len(told["rows"]["model"]) == len(BENCHMARKS[benchmark].rows)
    table = capsys.readouterr().out
    assert "paper full" in table and {"mmie": "59.50", "interleavedbench": "3.13"}[benchmark] in table
    with pytest.raises(UserError, match="temperature"):
        evaluate.run_benchmark(config_of(benchmark, samples_folder, talker, tmp_path / "cut", temperature=0.5))


def test_answers_are_written_as_mmie_wants_them(samples_folder, talker, tmp_path):
    evaluate.run_benchmark(config_of("mmie", samples_folder, talker, tmp_path))
    asked, made = (json.loads((folder / "data.json").read_text()) for folder in (samples_folder / "mmie", tmp_path / "model"))
    assert [m["id"] for m in made] == [a["id"] for a in asked]
    shown = 0
    for record in made:
        assert set(record) == {"id", "question", "answer", "model", "gt_answer"} and record["model"] == str(talker)
        for segment in record["question"] + record["answer"] + record["gt_answer"]:
            assert set(segment) == {"text", "image"}
            if segment["image"]:
                Image.open(tmp_path / "model" / segment["image"]).load()        # whole without the data folder
                shown += 1
        assert any(s["text"] or s["image"] for s in record["answer"])
    assert shown > len(made)
    page = (tmp_path / "model" / "answers.html").read_text()
    assert page.count("<img") >= len(made) and "MSR-0-000002" in page and "http" not in page


def test_a_budget_without_room_for_a_picture_is_refused(samples_folder, talker, tmp_path):
    config = config_of("mmie", samples_folder, talker, tmp_path)
    config.budget = 8
    with pytest.raises(UserError, match="--budget 8.*9 positions"):
        evaluate.run_benchmark(config)
    assert not (tmp_path / "model").exists()


def test_half_a_character_does_not_end_a_run(samples_folder, talker, tmp_path):
    write(tmp_path / "data" / "data.json", r'[{"id": "SA-1\ud83d", "question": "cut \ud83d emoji", "extra": "\udc00"}]')
    config = config_of("mmie", samples_folder, talker, tmp_path / "out")
    config.data = str(tmp_path / "data")
    evaluate.run_benchmark(config)
    made, = json.loads((tmp_path / "out" / "model" / "data.json").read_text())
    assert made["id"] == "SA-1?" and made["question"][0]["text"] == "cut ? emoji"


def test_our_critic_judges_and_is_called_by_its_name(samples_folder, talker, tmp_path, monkeypatch):
    from judges import LlavaCritic
    asked = []

    def replies(self, prompts, pictures, **options):
        assert all(prompt.count("<image>") == len(shown) for prompt, shown in zip(prompts, pictures))
        asked.extend(prompts)
        return ["### Score\n3" for _ in prompts]
    monkeypatch.setattr(LlavaCritic, "replies", replies)
    config = config_of("interleavedbench", samples_folder, talker, tmp_path,
                       judge=f"llava-critic={FIXTURES / 'llava_critic_tiny'}")
    evaluate.run_benchmark(config)
    told = json.loads((tmp_path / "results.json").read_text())
    assert all(of["value"] == 3 for of in told["rows"]["model"].values())
    page = (tmp_path / "model" / "answers.html").read_text()
    assert "LLaVA-Critic, NOT the official judge" in page and "text aspects do not count for" in page
    count = len(asked)
    evaluate.run_benchmark(config)
    assert len(asked) == count, "replies are kept"


def test_a_question_beyond_the_critics_context_gets_no_score(samples_folder, tmp_path):
    class Critic:
        BATCH, repetition_penalty = 4, 1.0

        def replies(self, prompts, pictures, repetition_penalty):
            if any("long" in prompt for prompt in prompts):
                raise UserError("beyond the context")
            return ["### Score\n3" for _ in prompts]
    replies = evaluate.ask_critic(Critic(), "c", [(f"{i}", "score", "long" if i == 2 else "x", []) for i in range(6)],
                                  tmp_path)
    assert [find_score(replies[f"{i}", "score"], 6) for i in range(6)] == [3, 3, None, 3, 3, 3]
    assert "beyond the context" in replies["2", "score"]


def test_the_real_critic_sees_the_pictures(samples_folder, talker, tmp_path):
    """The tiny random critic says nothing useful: nothing is scored, and it says so."""
    from judges import LlavaCritic
    with pytest.MonkeyPatch.context() as patch:
        real = LlavaCritic.replies
        patch.setattr(LlavaCritic, "replies", lambda self, *asked, **more: real(self, *asked, 2, **more))
        evaluate.run_benchmark(config_of("mmie", samples_folder, talker, tmp_path,
                                         judge=f"llava-critic={FIXTURES / 'llava_critic_tiny'}"))
    told = json.loads((tmp_path / "results.json").read_text())
    assert told["rows"] == {"model": {}} and told["left_out"]["model"] == {"left out, no valid score in the reply": 6}
    assert len((tmp_path / "model" / "replies.jsonl").read_text().splitlines()) == 6


@pytest.mark.parametrize("benchmark, row", [("understanding", "accuracy"), ("t2i", "visual reward")])
def test_kept_abilities_stand_side_by_side_before_and_after(benchmark, row, warm, talker, samples_folder, tmp_path):
    out = run("evaluate.py", "--benchmark", benchmark, "--data", samples_folder / "kept", "--before", warm, "--model", talker,
              "--out", tmp_path, "--budget", 30)
    told = json.loads((tmp_path / "results.json").read_text())
    assert set(told["rows"]) == {"before", "model"} and "before" in out and "paper full" in out
    assert all(0 <= of[row]["value"] <= 100 and of[row]["records"] == 12 for of in told["rows"].values())


def test_visual_reward_of_a_right_picture_is_one_and_of_none_is_zero(tmp_path):
    scenes = shapes.SCENES[:2]
    Image.fromarray(shapes.render(scenes[0])).save(tmp_path / "a.png")
    asked = [Question(shapes.caption(s), [], id=str(i)) for i, s in enumerate(scenes)]
    told = {"0": {"answer": [{"text": None, "image": "a.png"}]}, "1": {"answer": [{"text": "none", "image": None}]}}
    assert evaluate.t2i_rows(answered(asked, {}, told, tmp_path), Config()) == {"visual reward": (0.5, 2)}
    assert evaluate.t2i_rows(answered(asked[1:], {}, told, tmp_path), Config()) == {"visual reward": (0, 1)}


@pytest.mark.parametrize("arguments, said", [
    (["--benchmark", "mmmie"], "mmmie"), (["--benchmark", "mmie"], "--data"),
    (["--benchmark", "mmie", "--data", "no/such"], "no/such"),
    (["--benchmark", "mmie", "--data", "tests", "--judge", "gpt"], "--judge gpt"),
    (["--benchmark", "mmie", "--data", "tests", "--judge", "llava-critic=no/such/folder"],
     "--judge llava-critic=no/such/folder"),
    (["--benchmark", "t2i", "--data", "tests", "--judge", "file:x"], "--visual-reward"),
    (["--benchmark", "mmie", "--data", "tests", "--skip", "some"], "--skip some"),
    (["--benchmark", "mmie", "--data", "tests"], "data.json"), (["--batch", "0"], "--batch 0"),
    (["--benchmark", "mmie", "--data", "tests", "--judge", "file:x", "--before", "y"], "--before"),
    (["--benchmark", "t2i", "--data", "tests/requirements.txt"], "--visual-reward")])
def test_mistakes_with_benchmarks_are_one_sentence(arguments, said):
    out = run("evaluate.py", *arguments, check=2, HF_HUB_OFFLINE="1")
    assert said in out and "Traceback" not in out and len(out.strip().splitlines()) == 1, out
