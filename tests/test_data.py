"""The paper's warm-up sources: each reader on invented samples in the published schema, and every pitfall."""
import contextlib
import csv
import json
import math
import random
import re
import shutil
from collections import Counter
from pathlib import Path

import published_samples
import pytest
import torch
from conftest import FIXTURES, RUN, SMALL, flags, killed_after, metrics, run, same, shots, write
from PIL import Image

import common
import data
import grpo
import shapes
import warmup
from common import UserError
from data import CodeCache, LeftOut, Sample, keep_usable, read_sources, records
from model import load, load_training

# Settings that name learned judges; the tests that use them put others in their place.
JUDGES = {"text_reward": f"llava-critic={FIXTURES / 'llava_critic_tiny'}",
          "visual_reward": f"clip-score={FIXTURES / 'clip_tiny'}"}


@pytest.fixture(scope="session")
def samples_folder(tmp_path_factory):
    return published_samples.make(tmp_path_factory.mktemp("published"), 0.2)


def sources(samples_folder: Path) -> str:
    return ",".join(f"{name}={samples_folder / name}" for name in data.READERS if name != "jsonl") \
        + f",jsonl={samples_folder / 'jsonl' / 'stories.jsonl'}"


def read(name: str, path: Path) -> tuple[list[Sample], LeftOut]:
    left_out = LeftOut()
    return list(data.READERS[name][0](path, left_out)), left_out


# ------------------------------------------------------------------------------------------------------------
# Every source in its published schema

def test_every_source_becomes_samples_of_its_kind(samples_folder):
    left_out = LeftOut()
    samples = read_sources(sources(samples_folder), "--data", data.READERS, left_out)
    counts = {kind: len(of_kind) for kind, of_kind in samples.items()}
    assert counts == {"interleaved": 6 + 6 + 4 + 4, "understanding": 25, "t2i": 20}
    assert not left_out.counts
    for kind, of in samples.items():
        for s in of:
            assert s.kind == kind and s.answer.endswith("</s>")
            assert s.prompt.count("<image>") == len(s.prompt_pictures)
            assert s.answer.count("<image>") == len(s.answer_pictures)
            assert all(p.is_file() for p in s.prompt_pictures + s.answer_pictures)
            if kind == "interleaved":
                form = re.fullmatch(r"(<think>[^<]+</think><im_start><image><im_end>)+</s>", s.answer)
                assert form and len(s.prompt_pictures) == 1 and 1 <= len(s.answer_pictures) <= 4


def test_the_papers_templates_are_filled():
    query = data.event_sample([("A dog {sits}.", Path("a")), ("It barks.", Path("b"))], ()).prompt
    assert query == (
        "In this task, you are given the first part of an event with both text and an image, and you need to "
        "complete the subsequent parts of the event by generating text and images that are natural "
        "continuation of the given first part. The input interleaved content is: "
        "<BEGIN> A dog {sits}. <image>")
    assert data.HOWTO_QUERY.startswith("In this task, you are given a multimodal question consisting of both")
    assert data.HOWTO_QUERY.endswith("<BEGIN> {question} <image>")


# ------------------------------------------------------------------------------------------------------------
# JSON files

def test_records_have_numbers(tmp_path):
    values = [{"id": 1, "text": "a\nb"}, {"id": 2}, [3], "four"]
    assert list(records(write(tmp_path / "list.json", values), LeftOut())) == list(enumerate(values, 1))
    assert list(records(write(tmp_path / "lines.jsonl", values), LeftOut())) == list(enumerate(values, 1))
    file = write(tmp_path / "map.json", '{"a": 1,\n"b": [2]}')
    assert list(records(file, LeftOut())) == [(1, ("a", 1)), (2, ("b", [2]))]
    assert list(records(write(tmp_path / "none.json", "[]"), LeftOut())) == []
    (tmp_path / "bom.json").write_text('\ufeff[{"é": "ü"}]', encoding="utf-8")
    assert list(records(tmp_path / "bom.json", LeftOut())) == [(1, {"é": "ü"})]


def test_lines_and_records_are_called_so(tmp_path, capsys):
    left_out = LeftOut()
    for name in ("rows.jsonl", "rows.json"):
        list(data.openstory(write(tmp_path / name, [{"__key__": None}]), left_out))
    assert [(entry.get("line"), entry.get("record")) for entry in left_out.list] == [(1, None), (None, 1)]
    printed = capsys.readouterr().out
    assert "rows.jsonl, line 1: __key__ is missing" in printed and "rows.json, record 1: __key__" in printed


def test_halves_of_characters_become_question_marks(tmp_path):
    for name in ("cut.json", "cut.jsonl"):
        file = write(tmp_path / name, '[{"\\ud83d": ["a \\udc00 b", "\\ud83e\\udd8a"]}]')
        (_, value), = records(file, LeftOut())
        assert value in ({"?": ["a ? b", "\U0001f98a"]}, [{"?": ["a ? b", "\U0001f98a"]}])


def test_a_broken_line_is_named_and_the_others_are_read(tmp_path, capsys):
    left_out, file = LeftOut(), tmp_path / "lines.jsonl"
    file.write_bytes('{"a": "é"}\n{"a": \n\n'.encode() + b"\xff\xfe\n" + b'{"a": 2}')
    assert [value for _, value in records(file, left_out)] == [{"a": "é"}, {"a": 2}]
    assert [entry["line"] for entry in left_out.list] == [2, 4]
    assert left_out.reasons() == {"left out, not JSON": 2}
    deep = write(tmp_path / "deep.jsonl", "".join("[" * n + "]" * n + "\n" for n in (10, 900, 99_999, 1)))
    numbers = [number for number, _ in records(deep, LeftOut())]
    assert {1, 4} <= set(numbers) and 3 not in numbers
    assert "line 2" in capsys.readouterr().out


@pytest.mark.parametrize("text, message", [
    ("", "line 1"), ("  \n", "expected"), ('[{"a": 1},\n{"a": ', "line 2"), ('{"a" 1}', "expected ':'"),
    ("7", "expected"), ('[1 2]', "expected"), ("[" * 100_000, "recursion"),
    ("[" + "7" * 5000 + "]", "cut.json")])
def test_a_json_file_that_cannot_be_read_to_its_end_is_an_error(tmp_path, text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        list(records(write(tmp_path / "cut.json", text), LeftOut()))


def test_a_path_that_no_system_would_take_is_a_missing_picture(tmp_path):
    for name in ("x" * 5000, "a\0b", "..", ""):
        with pytest.raises(data.Broken):
            data.picture_in(tmp_path, name)


def test_a_file_that_is_no_text_is_an_error(tmp_path):
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\xfa")
    for path in (tmp_path / "bytes.json", tmp_path / "missing.json", tmp_path / "missing.jsonl"):
        with pytest.raises(UserError, match="no such file|cannot be read"):
            list(records(path, LeftOut()))


# ------------------------------------------------------------------------------------------------------------
# Pitfalls, source by source

def test_activitynet_segments_overlap_come_in_any_order_and_may_be_empty(tmp_path):
    video = "v_-_aaaaaaaaa"
    write(tmp_path / "train.json", {
        video: {"duration": 60.5,
                "timestamps": [[40, 99], [0.5, 15.25], [12, 44.75], [70, 80], [3, 3], [50, 55]],
                "sentences": [" She serves über.", "A woman stands.", " She slices <image> a loaf.", "late",
                              "empty", " "]},
        "v_gone": {"duration": 9, "timestamps": [[0, 4], [4, 9]], "sentences": ["a b", "c d"]},
        "v_counts": {"duration": 9, "timestamps": [[0, 4]], "sentences": ["a b", "c d"]},
        "v_alone": {"duration": 9, "timestamps": [[0, 4]], "sentences": ["a b"]},
        "v_endless": {"duration": math.inf, "timestamps": [[0, math.inf], [math.nan, 4]],
                      "sentences": ["a b", "c d"]},
        "v_null": None, "v_text": {"duration": 9, "timestamps": "0-4", "sentences": ["a"]}})
    shots(tmp_path / "frames", *(f"{video}/{i}.jpg" for i in range(6)), "v_alone/0.jpg")
    (sample,), left_out = read("activitynet", tmp_path)
    assert "A woman stands. <image>" in sample.prompt
    assert sample.prompt_pictures == [tmp_path / f"frames/{video}/1.jpg"]
    assert sample.answer == ("<think>She slices   a loaf.</think><im_start><image><im_end>"
                             "<think>She serves über.</think><im_start><image><im_end></s>")
    assert [p.stem for p in sample.answer_pictures] == ["2", "0"]
    ids = {entry["id"]: entry["reason"] for entry in left_out.list}
    assert "empty" in ids[f"{video}, segment 3"] and "empty" in ids[f"{video}, segment 4"] \
        and "empty" in ids[f"{video}, segment 5"]
    assert "v_gone/0.jpg" in ids["v_gone"] and "differ" in ids["v_counts"] and "lone" in ids["v_alone"]
    assert "v_null" in ids and "v_text" in ids and "v_endless, segment 1" in ids and len(ids) == 10


def test_activitynet_from_flattened_rows_and_a_numbered_dump(tmp_path):
    write(tmp_path / "train.jsonl", [
        {"video_id": "v_a", "captions_starts": [0, 4], "captions_ends": [4, 9],
         "en_captions": ["a b", "c d"]},
        {"video_id": "v_b"},
        {"video_id": "v_c", "captions_starts": [0, 4, 5], "captions_ends": [4, 9],
         "en_captions": ["a b", "c d"]}])
    shots(tmp_path / "frames", "v_a/000011.jpg", "v_a/000033.png")           # seconds 2 and 6.5 at 5 a second
    (tmp_path / "frames" / "fps.txt").write_text("5\n")
    (sample,), left_out = read("activitynet", tmp_path)
    assert [p.name for p in sample.prompt_pictures + sample.answer_pictures] == ["000011.jpg", "000033.png"]
    assert [(e["id"], e["line"]) for e in left_out.list] == [("v_b", 2), ("v_c", 3)]
    for rate in ("five", "", "0", "-1", "nan", "inf", "1e300"):
        (tmp_path / "frames" / "fps.txt").write_text(rate)
        with pytest.raises(UserError, match="fps.txt"):
            read("activitynet", tmp_path)


def test_long_stories_are_cut_into_fives(tmp_path):
    write(tmp_path / "train.json", {"v_long": {"duration": 70, "timestamps": [[i, i + 1] for i in range(11)],
                                               "sentences": [f"part {i}" for i in range(11)]}})
    shots(tmp_path / "frames", *(f"v_long/{i}.jpg" for i in range(11)))
    samples, left_out = read("activitynet", tmp_path)
    assert [len(s.answer_pictures) for s in samples] == [4, 4]
    assert "part 5 <image>" in samples[1].prompt
    assert left_out.reasons() == {"left out, a lone part is no story": 1}


JUNK = (None, "", " ", "x" * 3000, "\x00", "../..", "<image>", 0, -1, 10 ** 400, math.nan, math.inf, True,
        [], {}, [[]], [None], {"text": None}, ["a", "b"], [{"from": "gpt"}], json.loads("[" * 60 + "]" * 60))


def damage(value: object, rng: random.Random) -> object:
    """A JSON value with junk in the place of one of its parts, or of all of it."""
    if not value or not isinstance(value, (list, dict)) or rng.random() < 0.1:
        return rng.choice(JUNK)
    part = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if isinstance(value, dict) and rng.random() < 0.2:
        return {key: item for key, item in value.items() if key != part}
    value = value.copy()
    value[part] = damage(value[part], rng)
    return value


@pytest.mark.parametrize("name, file", [
    ("activitynet", "train.json"), ("openstory", "story.jsonl"), ("jsonl", "stories.jsonl"),
    ("emova", "annotations/toy.json"), ("journeydb", "train/train_anno_realease_repath.jsonl"),
    ("mmie", "data.json"), ("interleavedbench", "interleaved_bench.json"), ("kept", "questions.jsonl")])
def test_damaged_records_never_end_in_a_traceback(samples_folder, tmp_path, name, file):
    benchmarks = {"mmie": data.mmie, "interleavedbench": data.interleavedbench, "kept": data.understanding}
    reader = benchmarks.get(name) or data.READERS[name][0]
    folder, rng = Path(shutil.copytree(samples_folder / name, tmp_path / name)), random.Random(0)
    path = folder / file if name == "jsonl" else folder
    text = (folder / file).read_text()
    whole = json.loads(text) if file.endswith(".json") else list(map(json.loads, text.splitlines()))
    count = len(list(reader(path, LeftOut())))
    for _ in range(150):
        write(folder / file, damage(whole, rng))
        left_out = LeftOut()
        with contextlib.suppress(UserError):                # a file that is no list or object
            assert len(list(reader(path, left_out))) <= count + 1


HEADER = "VID_ID,DS_CAT,DS_CAT_NAME,FRAME_S1,FRAME_S2,FRAME_AC,SCORE,{},FILENAME\n"


def test_genhowto_lists_are_joined_by_filename(tmp_path):
    write(tmp_path / "actions.test.txt", HEADER.format("FRAME_AC_PROMPT")
          + '-aaaaaaaaaa,0,apple,12,48,30,0.9,"a person cutting an apple, on a board",f/0.jpg\n'
            '-aaaaaaaaaa,0,apple,12,48,30,0.9,"the same frames, another row",f/1.jpg\n'
            'bbbbbbbbbbb,0,apple,12,48,30,0.9,"no state row",f/2.jpg\n'
            'ccccccccccc,0,apple,50,48,30,0.9,"out of order",f/3.jpg\n'
            'ddddddddddd,0,apple,x,48,30,0.9,"no number",f/4.jpg\n'
            'eeeeeeeeeee,0,apple,1,3,2,0.9,"no frames",f/5.jpg\n'
            '-aaaaaaaaaa,0,apple,12,48,30,0.9,"twice",f/0.jpg\n'
            'short\n')
    rows = [("-aaaaaaaaaa", 12, 48, 30, 'an apple in "pieces", é', "f/0.jpg"),
            ("-aaaaaaaaaa", 12, 48, 30, "cut", "f/1.jpg"),
            ("ccccccccccc", 50, 48, 30, "s", "f/3.jpg"), ("ddddddddddd", "x", 48, 30, "s", "f/4.jpg"),
            ("eeeeeeeeeee", 1, 3, 2, "s", "f/5.jpg")]
    with open(tmp_path / "states.test.txt", "w", newline="", encoding="utf-8") as file:
        file.write(HEADER.format("FRAME_S2_PROMPT"))
        for video, first, last, middle, text, name in rows:
            csv.writer(file).writerow((video, 0, "apple", first, last, middle, 0.9, text, name))
    shots(tmp_path / "frames", *(f"-aaaaaaaaaa/{s}.jpg" for s in (12, 30, 48)))
    samples, left_out = read("genhowto", tmp_path)
    assert [s.origin[1] for s in samples] == [2, 3]
    assert samples[0].answer.startswith("<think>a person cutting an apple, on a board</think>")
    assert 'an apple in "pieces", é' in samples[0].answer
    assert "apple, step by step? <image>" in samples[0].prompt
    assert [p.stem for p in samples[0].prompt_pictures + samples[0].answer_pictures] == ["12", "30", "48"]
    assert sorted(entry["line"] for entry in left_out.list) == [4, 5, 6, 7, 8, 9]
    assert {entry["id"] for entry in left_out.list if "twice" in entry["reason"]} == {"-aaaaaaaaaa"}


def test_genhowto_never_merges_rows_that_only_share_a_name(tmp_path):
    for i, (name, video) in enumerate((("a.csv", "v"), ("b.csv", "w"), ("c.csv", "v"))):
        write(tmp_path / name, HEADER.format("FRAME_AC_PROMPT,FRAME_S2_PROMPT")
              + f"{video},0,pan,1,3,2,1,a{i},b{i},0.jpg\n")
    shots(tmp_path / "frames", *(f"{v}/{s}.jpg" for v in "vw" for s in (1, 2, 3)))
    (sample,), left_out = read("genhowto", tmp_path)
    assert "<think>a0</think>" in sample.answer
    assert left_out.reasons() == {"left out, FILENAME is there twice": 2}


def test_genhowto_asks_for_the_next_step_in_rl(samples_folder):
    reader, _ = data.PROMPT_READERS["genhowto"]
    sample = next(reader(samples_folder / "genhowto", LeftOut()))
    assert re.fullmatch(r"What is done with the ball, step by step\? Predict the subsequent step\. "
                        r"The previous steps are: a \w+ \w+ at [\w ]+ <image>", sample.prompt)
    assert [p.stem for p in sample.prompt_pictures + sample.answer_pictures] == ["30", "48"]


def test_genhowto_takes_triples_of_ones_own_and_refuses_other_tables(tmp_path):
    write(tmp_path / "mine.csv",
          HEADER.format("FRAME_AC_PROMPT,FRAME_S2_PROMPT") + "v,0,pan,1,3,2,1,heat it,hot pan,n\n")
    shots(tmp_path / "frames", "v/1.jpg", "v/2.jpg", "v/3.jpg")
    assert len(read("genhowto", tmp_path)[0]) == 1 == len(read("genhowto", tmp_path / "mine.csv")[0])
    for text, message in (("", "line 1"), ("a,b\n1,2\n", "VID_ID")):
        write(tmp_path / "mine.csv", text)
        with pytest.raises(UserError, match=message):
            read("genhowto", tmp_path)


def story_row(video: str, second: int, caption: str, before: str = "") -> dict:
    key = (before + "_override_" if before else "") + f"{video}_keyframe_00-00-{second:02d}-000"
    return {"__key__": key, "json": {"caption": caption, "mask": []}}


def test_openstory_groups_are_rebuilt_without_repeats(tmp_path):
    a, b, c, d = "a_b-c_d-e_f", "-bbbbbbbbbb", "ccccccccccc", "ddddddddddd"
    rows = [story_row(a, s, f"frame {s}") for s in range(7)]                                # 5 and 2
    rows += [story_row(b, 1, "one"), story_row(b, 2, "x", f"{b}_keyframe_00-00-01-000")]
    rows += [story_row(b, 3, "three")]
    rows += [story_row(c, 1, "x", f"{b}_keyframe_00-00-03-000"), story_row(c, 2, "alone")]   # another video's
    rows[5], rows[4] = rows[4], rows[5]                                                     # across the cut
    rows += [story_row(d, 2, "later"), story_row(d, 1, "sooner"), {"json": {}}]
    rows += [story_row("ggggggggggg", 1, "gone"), story_row("ggggggggggg", 2, "gone too")]
    rows[0]["json"] = json.dumps(rows[0]["json"])                                           # a string column
    shots(tmp_path / "frames", *(f"{r['__key__'][:11]}/{r['__key__']}.jpg" for r in rows
                                 if "__key__" in r and r["__key__"][0] != "g"))
    write(tmp_path / "part.jsonl", rows)
    samples, left_out = read("openstory", tmp_path)
    starts = [s.prompt.split("<BEGIN> ")[1].removesuffix(" <image>") for s in samples]
    assert [[start, *re.findall("<think>(.*?)<", s.answer)] for start, s in zip(starts, samples)] == [
        ["frame 0", "frame 1", "frame 2", "frame 3", "frame 4"], ["frame 5", "frame 6"], ["one", "three"],
        ["sooner", "later"]]
    assert left_out.reasons() == {"left out, repeats another frame (_override_)": 2,
                                  "left out, a lone part is no story": 1,
                                  "left out, __key__ is missing, or of another kind than published": 1,
                                  "left out, a picture is missing": 1}


def test_emova_conversations(tmp_path):
    def talk(*values, **more):
        turns = [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)]
        return {"id": "7", "conversations": turns, **more}
    shots(tmp_path, "web/0.png")
    write(tmp_path / "annotations" / "web.json", [
        talk("<image>\nWhich shop?", "The </s> bakery.", "Until when?", "Until <image> six.",
             image="web/0.png"),
        talk("Name a prime.", "23"), talk("<image> and <image>", "Two.", image=["web/0.png", "web/0.png"]),
        talk("none", "here", image=None), talk("<image>", "gone", image="web/1.png"),
        talk("no mark", "x", image="web/0.png"),
        talk("<image> no picture", "x"), talk("only a question"), talk("empty", " "),
        talk(image="web/0.png"), None,
        {"id": 1, "conversations": [{"from": "gpt", "value": "first"}, {"from": "human", "value": "x"}]}])
    write(tmp_path / "annotations" / "more.jsonl", [talk("<image> what?", "A shop.", image="web/0.png")])
    for name in ("librispeech-asr", "tts", "speech-chat"):
        write(tmp_path / "annotations" / f"{name}.json", [talk("<speech_1>", "{}")])
    samples, left_out = read("emova", tmp_path)
    assert [(s.prompt, s.answer, len(s.prompt_pictures)) for s in samples] == [
        ("<image> what?", "A shop.</s>", 1), ("<image>\nWhich shop?", "The   bakery.</s>", 1),
        ("<image>\nWhich shop? ASSISTANT: The   bakery.</s>USER: Until when?", "Until   six.</s>", 1),
        ("Name a prime.", "23</s>", 0), ("<image> and <image>", "Two.</s>", 2), ("none", "here</s>", 0)]
    assert left_out.reasons() == {
        "left out, a speech subset": 3, "left out, a picture is missing": 1,
        "left out, a turn is missing or empty": 3, "left out, <image> marks and pictures differ in number": 2,
        "left out, human and gpt do not take turns": 1,
        "left out, conversations is missing, or of another kind than published": 1}


def test_earlier_turns_stand_in_the_prompt_as_vicuna_writes_them(tiny):
    sample = Sample("one ASSISTANT: two</s>USER: three", [], "four</s>")
    tokens, _, mask = data.row_of(sample, tiny, CodeCache(tiny))
    text = tiny.text.decode(tokens[:, 0].tolist())
    assert text == "<s>  USER: one ASSISTANT: two</s>USER: three ASSISTANT: four</s>"
    assert tiny.text.decode(tokens[mask[:, 0], 0].tolist()) == "four</s>"


def test_journeydb_captions_and_partial_downloads(tmp_path):
    def line(n, prompt="p", caption=None, folder="000"):
        task = {"Caption": caption} if caption else None
        return {"img_path": f"./{folder}/{n}.jpg", "prompt": prompt, "Task2": task}
    train = tmp_path / "train"
    shots(train / "imgs", *(f"000/{n}.jpg" for n in range(8)), ".000/9.jpg")
    write(train / "train_anno_realease_repath.jsonl", [
        line(0, "a tin robot --ar 3:2", "An elegant robot <s>"),
        line(1, "a tin robot --ar 3:2", "The same prompt"),
        line(2, "a brass owl, studio light, --ar 3:2 --v 5"), line(3, "", "abc"), line(4, "--ar 3:2"),
        line(5, "far away", folder="199"), line(99, "missing file"), {"prompt": "no path at all"},
        {**line(6), "Task2": {"Caption": "Prompt is null"}, "prompt": None},
        line(9, "dots stay there", folder=".000")])
    samples, left_out = read("journeydb", tmp_path)
    assert [s.prompt for s in samples] == ["An elegant robot", "a brass owl, studio light", "Prompt is null",
                                           "dots stay there"]
    assert all(s.kind == "t2i" and s.answer == "<image><im_end></s>" for s in samples)
    assert left_out.total() == 6 and left_out.reasons()["left out, its folder of pictures is not there"] == 1
    (train / "train_anno_realease_repath.jsonl").rename(train / "train_anno.jsonl")
    with pytest.raises(UserError, match="train_anno_realease_repath.jsonl"):
        read("journeydb", tmp_path)


def test_our_own_lines(tmp_path):
    step = {"text": "Cut them.", "image": "a.png"}
    shots(tmp_path, "a.png")
    file = write(tmp_path / "mine.jsonl", [
        {"prompt": "How? <image>", "images": ["a.png"], "steps": [step, step]},
        {"prompt": "How?", "steps": []},
        {"prompt": "How?", "steps": [{"text": "x", "image": None}]},
        {"prompt": "How?", "steps": [{**step, "text": " "}]},
        {"prompt": "How? <image>", "steps": [step]}, {"prompt": "How?"},
        {"prompt": "How?", "steps": [step], "more": 1}])
    samples, left_out = read("jsonl", file)
    assert [s.origin[1] for s in samples] == [1, 7]
    verdicts = Counter(verdict for verdict, *_ in left_out.counts.elements())
    assert verdicts == {"left out": 5, "noted": 1}, "line 7 is used, its unknown key is noted"


@pytest.mark.parametrize("text, message",
                         [("emowa=.", "did you mean emova"), ("emova=no/such", "no/such"), ("emova", "emova"),
                          ("emova=tests/fixtures", "annotations"),
                          ("journeydb=tests", "train_anno_realease_repath")])
def test_sources_that_are_not_there_are_named(text, message):
    with pytest.raises(UserError, match=message):
        read_sources(text, "--data", data.READERS, LeftOut())


def test_a_source_without_a_usable_record_is_an_error(tmp_path):
    for text in ("", '{"prompt": "x"}\n'):
        file = write(tmp_path / "empty.jsonl", text)
        with pytest.raises(UserError, match="no usable record"):
            read_sources(f"jsonl={file}", "--data", data.READERS, LeftOut())


def test_the_mix_needs_a_source_of_each_kind_it_asks_for(samples_folder):
    with pytest.raises(UserError, match="understanding samples.*add emova"):
        warmup.check(warmup.Config(data=f"genhowto={samples_folder / 'genhowto'}"))
    warmup.check(warmup.Config(data=f"genhowto={samples_folder / 'genhowto'}", mix=(1.0, 0.0, 0.0)))
    for mix in ("1,1", "0,0,0", "1,-1,0", "a,b,c"):
        with pytest.raises(UserError, match="--mix"):
            warmup.check(warmup.Config(mix=mix))


# ------------------------------------------------------------------------------------------------------------
# Codes, mix, padding

def test_codes_are_kept_on_disk_by_tokenizer_and_bytes(tiny, tmp_path):
    shots(tmp_path, "a.png", "b.png")
    Image.new("RGB", (40, 24), (0, 90, 0)).save(tmp_path / "b.png")
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    first = CodeCache(tiny, tmp_path / "cache")
    codes = first(paths) + first(paths, crop=True)
    first.flush()
    (tmp_path / "a.png").rename(tmp_path / "renamed.png")
    second = CodeCache(tiny, tmp_path / "cache")
    paths = [tmp_path / "renamed.png", tmp_path / "b.png"]
    again = second(paths) + second(paths, crop=True)
    assert first.encoded == 4 and second.encoded == 0 and all(torch.equal(a, b) for a, b in zip(codes, again))
    assert again[0].dtype == torch.int64 and not list((tmp_path / "cache").rglob("*.new"))
    before = tiny.vision.quantizer.codebooks[0].weight.clone()
    try:
        with torch.no_grad():
            tiny.vision.quantizer.codebooks[0].weight[0] += 1
        assert CodeCache(tiny, tmp_path / "cache").folder != second.folder
    finally:
        with torch.no_grad():
            tiny.vision.quantizer.codebooks[0].weight.copy_(before)


def test_pictures_that_cannot_be_read_leave_their_samples_out(tiny, tmp_path):
    shots(tmp_path, "good.png")
    whole = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "text.png").write_text("no picture")
    samples = [Sample("<image>", [tmp_path / name], "x</s>", origin=(tmp_path, n, name))
               for n, name in enumerate(("cut.png", "good.png", "text.png", "never.png"))]
    samples.append(Sample("red " * 300, [], "x</s>", origin=(tmp_path, 9, "long")))
    left_out, codes = LeftOut(), CodeCache(tiny)
    assert list(keep_usable(samples, tiny, codes, left_out)) == [samples[1]]
    assert [entry["line"] for entry in left_out.list] == [0, 2, 3, 9]
    assert "context" in left_out.list[-1]["reason"]
    with pytest.raises(UserError, match="cut.png"):
        codes([tmp_path / "cut.png"])


def test_what_is_drawn_from_words_is_cropped_and_the_rest_is_squashed(tiny, tmp_path):
    wide = Image.new("RGB", (72, 24), (250, 250, 250))
    wide.paste((200, 0, 0), (24, 0, 48, 24))
    wide.save(tmp_path / "wide.png")
    Image.new("RGB", (24, 24), (200, 0, 0)).save(tmp_path / "middle.png")
    codes = CodeCache(tiny)
    red, = codes([tmp_path / "middle.png"])

    def answer(sample):
        tokens, is_image, mask = data.row_of(sample, tiny, codes)
        return tokens[mask.all(1)]
    assert torch.equal(answer(data.t2i_sample("a", tmp_path / "wide.png")), red)
    story = Sample("a", [], *data.write_answer([("b", tmp_path / "wide.png")]))
    assert torch.equal(answer(story), codes([tmp_path / "wide.png"])[0])
    assert not torch.equal(answer(story), red)


def test_micro_batches_hold_every_row_once_with_little_padding(tiny):
    rng, codes = random.Random(0), CodeCache(tiny)
    for most in (1, 3, 48):
        samples = [kind(rng, 3) for kind in (data.toy_story, data.toy_i2t, data.toy_t2i)
                   for _ in range(7)]
        parts, waste = warmup.micro_batches(samples, tiny, codes, most)
        lengths = [len(data.row_of(s, tiny, codes)[0]) for s in samples]
        sizes = [len(tokens) for tokens, *_ in parts]
        assert sum(sizes) == 21 and max(sizes) <= most
        positions = sum(tokens.shape[0] * tokens.shape[1] for tokens, *_ in parts)
        assert 0 <= waste < 0.1 and waste == pytest.approx(1 - sum(lengths) / positions)
        decisions = sum(int(data.row_of(s, tiny, codes)[2].sum()) for s in samples)
        assert decisions == sum(int(mask.sum()) for *_, mask in parts)


def test_the_mix_is_drawn_in_its_ratio_and_goes_through_all_samples(tiny, samples_folder, tmp_path):
    left_out = LeftOut()
    samples = read_sources(sources(samples_folder), "--data", data.READERS, left_out)
    config = warmup.Config(mix=(0.3, 1.0, 1.0), batch=10, warmup_steps=60, out=str(tmp_path / "run"))
    run_folder = common.Run(config)
    tiny.decoder.config.context, context = 4096, tiny.decoder.config.context
    try:
        (batch, stories), (again, _) = (
            warmup.published_batches(samples, tiny, run_folder, config, CodeCache(tiny), left_out)
            for _ in range(2))
    finally:
        tiny.decoder.config.context = context
    kinds = json.loads((tmp_path / "run" / "data.json").read_text())["kinds"]
    draws = [s for step in range(60) for s in batch(step)]
    count = Counter(s.kind for s in draws)
    assert count == {kind: of["draws"] for kind, of in kinds.items()} and sum(count.values()) == 600
    assert 50 < count["interleaved"] < 110 and 220 < count["understanding"] < 300 and 220 < count["t2i"] < 300
    for kind, of in samples.items():                    # every sample as often as any other, give or take one
        often = Counter(id(s) for s in draws if s.kind == kind)
        assert len(often) == len(of) and max(often.values()) - min(often.values()) <= 1
    assert {id(s) for s in stories} == {id(s) for s in samples["interleaved"]}
    assert [s.origin for s in again(31)] == [s.origin for s in batch(31)]


# ------------------------------------------------------------------------------------------------------------
# The scripts

def test_warm_up_on_published_data_is_killed_and_goes_on_bit_equal(samples_folder, tmp_path, monkeypatch):
    samples_folder = Path(shutil.copytree(samples_folder, tmp_path / "data"))
    shots(samples_folder / "emova" / "toy", "broken.png")
    (samples_folder / "emova" / "toy" / "broken.png").write_text("no picture")
    write(samples_folder / "emova" / "annotations" / "broken.jsonl", [
        {"id": "b", "image": "toy/broken.png", "conversations": [{"from": "human", "value": "<image>?"},
                                                                 {"from": "gpt", "value": "?"}]}])
    small = {**SMALL, "warmup_steps": 10, "batch": 12}
    printed = run("warmup.py", "--data", sources(samples_folder), "--mix", "1,1,1",
                  "--out", tmp_path / "whole", "--cache", tmp_path / "cache", *flags(small))
    assert "emova" in printed and "26 samples" in printed
    assert "broken.jsonl, line 1, b: a picture cannot be read" in printed
    record = json.loads((tmp_path / "whole" / "data.json").read_text())
    assert sum(of["draws"] for of in record["kinds"].values()) == 120
    assert record["kinds"]["understanding"]["samples"] == 25
    assert record["left_out"] == {"left out, a picture cannot be read": 1}
    assert record["records"][0]["id"] == "b"
    logged = [line for line in metrics(tmp_path / "whole") if line["stage"] == "warmup"]
    assert len(logged) == 10 and all(0 <= line["padding"] < 0.1 for line in logged)
    assert all(line["loss/text"] > 0 and line["loss/image"] > 0 for line in logged)
    torch.set_num_threads(1)
    config = warmup.Config(data=sources(samples_folder), mix=(1.0, 1.0, 1.0), out=str(tmp_path / "cut"),
                           cache=str(tmp_path / "cache"), device="cpu", **small)
    killed_after(10 + 6 + 5, lambda: warmup.warm_up(config), monkeypatch)
    warmup.warm_up(config)
    whole, cut = ({**load(tmp_path / n).state_dict(), **load_training(tmp_path / n / "policy")[1]}
                  for n in ("whole", "cut"))
    assert same(whole, cut) and metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    assert len(list((tmp_path / "cache").rglob("*.safetensors"))) == 1, "the second run encoded nothing"


def test_grpo_goes_through_the_prompts_of_every_source(samples_folder):
    pool, left_out = grpo.read_pool(grpo.Config(prompts=sources(samples_folder), text_reward="llava-critic",
                                                  visual_reward="clip-score"))
    assert len(pool) == 20 + 25 + 20 and not left_out.counts
    assert not any(s.answer or s.answer_pictures for s in pool), "only the prompt side"
    assert Counter(s.kind for s in pool) == {"interleaved": 20, "understanding": 25, "t2i": 20}
    for sample in pool:
        assert sample.steps is None if sample.kind != "interleaved" else sample.steps >= 1
    config = grpo.Config(prompts_per_update=4, epochs_per_rollout=2)
    places = [[pool.index(s) for s in grpo.next_prompts(config, done, pool[:10])] for done in (0, 2, 4)]
    assert places == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 1]]


@pytest.mark.parametrize("record, words", [
    ({"steps": "two"}, "steps, a whole number of at least 1: 'two'"),
    ({"steps": 0}, "steps"), ({"steps": 1.5}, "steps"), ({"steps": True}, "steps"), ({"steps": []}, "steps"),
    ({"kind": "video"}, "interleaved, understanding, t2i: 'video'"), ({"kind": ["t2i"]}, "kind"),
    ({"kind": "t2i", "steps": 2}, "only an interleaved answer has steps")])
def test_what_a_prompt_file_says_about_its_answers_is_checked_before_training(tmp_path, record, words):
    file = write(tmp_path / "own.jsonl", [{"prompt": "Cut it.", "steps": 2}, {"prompt": "Cut it.", **record}])
    with pytest.raises(UserError) as error:
        grpo.read_pool(grpo.Config(prompts=str(file), text_reward="llava-critic", visual_reward="clip-score"))
    assert str(error.value).startswith(f"{file}, line 2: ") and words in str(error.value)


def test_a_prompt_file_names_steps_and_kinds(tmp_path):
    lines = [{}, {"steps": 3}, {"steps": [{}, {}]}, {"steps": None}, {"kind": "t2i"},
             {"kind": "understanding"}]
    file = write(tmp_path / "own.jsonl", [{"prompt": "Cut it.", **line} for line in lines])
    found = [(sample.kind, sample.steps) for sample in data.read_prompts(file)]
    assert found == [("interleaved", None), ("interleaved", 3), ("interleaved", 2), ("interleaved", None),
                     ("t2i", None), ("understanding", None)]


def test_prompts_of_every_kind_train_what_they_ask_for(warm, tmp_path, monkeypatch, capsys):
    """Pictures of captions and words about pictures beside stories: each keeps its kind in the rollout.

    A text-to-image prompt ends in <im_start>, so each of its answers starts with a picture.
    """
    shots(tmp_path, "shot.png")
    file = write(tmp_path / "own.jsonl", [
        {"prompt": "a red circle at top", "kind": "t2i"}, {"prompt": "Cut it in two steps."},
        {"prompt": "<image> what is it?", "images": ["shot.png"], "kind": "understanding"}])
    batches, real = [], grpo.rollout
    monkeypatch.setattr(grpo, "rollout", lambda *given: batches.append(real(*given)) or batches[-1])
    monkeypatch.setattr(grpo, "make_judges", lambda *_: (lambda *asked: [0.5] * len(asked[0]),) * 2)
    grpo.train(grpo.Config(model=str(warm), out=str(tmp_path / "g"), prompts=str(file),
                           **JUDGES, **RUN),
               0, 1, torch.device("cpu"))
    assert capsys.readouterr().out.count('1 of them do not say how many "steps" they want') == 1
    kinds = {sample.kind for batch in batches for sample in batch.samples}
    assert kinds == set(data.KINDS)
    for batch in batches:
        for n, (answer, scores) in enumerate(zip(batch.answers, batch.scores)):
            kind = batch.samples[n // RUN["group_size"]].kind
            assert answer.layout.startswith("p") == (kind == "t2i")
            assert (scores.text is None) == (kind == "t2i")
            assert (scores.visual is None) == (kind == "understanding")


def test_the_rules_judge_captions_to_draw_and_no_other_prompt_to_draw(tmp_path):
    file = write(tmp_path / "own.jsonl", [{"prompt": "a red circle at top", "kind": "t2i"}])
    assert grpo.read_pool(grpo.Config(prompts=str(file)))[0][0].kind == "t2i"
    write(file, [{"prompt": "a fox", "kind": "t2i"}])
    with pytest.raises(UserError, match="a fox"):
        grpo.read_pool(grpo.Config(prompts=str(file)))


def test_grpo_takes_the_prompt_side_of_published_data(warm, samples_folder, tmp_path, capsys):
    def judges(*_):
        return (lambda prompts, pictures, texts: [0.3 * len(so_far[-1]) % 1 for so_far in texts],
                lambda texts, pictures: [p.mean() / 255 for p in pictures])
    stories = samples_folder / "jsonl" / "stories.jsonl"
    config = grpo.Config(model=str(warm), out=str(tmp_path / "g"), **JUDGES, **{**RUN, "eval_prompts": 2},
                         prompts=f"genhowto={samples_folder / 'genhowto'},jsonl={stories}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "make_judges", judges)
        pool = grpo.train(config, 0, 1, torch.device("cpu"))
    assert "8 prompts are ready" in capsys.readouterr().out
    assert len(metrics(tmp_path / "g")) == RUN["updates"]
    assert len(pool) == RUN["updates"] * RUN["prompts_per_update"], "no more than are drawn"
    assert all(isinstance(p, Path) for s in pool for p in s.prompt_pictures)
    assert list((tmp_path / "g" / "samples").glob("*before.json"))
    with pytest.raises(UserError, match="rule judges"):
        grpo.read_pool(grpo.Config(prompts=f"genhowto={samples_folder / 'genhowto'}"))
    pool, _ = grpo.read_pool(grpo.Config(prompts=str(stories)))
    assert len(pool) == 4 and all(shapes.states_of_prompt(s.prompt) for s in pool)


# ------------------------------------------------------------------------------------------------------------
# The scripts of tests/ for users

def test_parquet_becomes_what_the_readers_read(tmp_path):
    import pyarrow
    import pyarrow.parquet
    rows = published_samples.openstory_rows(tmp_path / "openstory", 3, random.Random(1))
    (tmp_path / "openstory" / "story").mkdir()
    for i, part in enumerate((rows[:4], rows[4:])):
        table = pyarrow.Table.from_pylist([{**row, "png": b"\x89PNG"} for row in part])
        pyarrow.parquet.write_table(table, tmp_path / "openstory" / "story" / f"train-{i}-of-2.parquet")
    shots(tmp_path, "shot.png")
    picture = {"bytes": (tmp_path / "shot.png").read_bytes(), "path": "x.png"}
    talk = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "a brick"}]
    words = [{**turn, "value": "hm"} for turn in talk]
    for subset, row in (("websrc", {"id": "1", "conversations": talk, "image": picture}),
                        ("words", {"id": "1", "conversations": words})):
        (tmp_path / "emova" / subset).mkdir(parents=True)
        table = pyarrow.Table.from_pylist([row] * 2)
        pyarrow.parquet.write_table(table, tmp_path / "emova" / subset / "0.parquet")
    for name in ("openstory", "emova"):
        run("tests/parquet_to_jsonl.py", name, tmp_path / name)
    samples, left_out = read("openstory", tmp_path / "openstory")
    assert len(samples) == 3 and not left_out.counts
    samples, left_out = read("emova", tmp_path / "emova")
    assert [len(s.prompt_pictures) for s in samples] == [1, 1, 0, 0] and not left_out.counts
    (tmp_path / "emova" / "websrc" / "0.parquet").write_text("damage")
    for name in ("emova", "openstory"):
        message = run("tests/parquet_to_jsonl.py", name, tmp_path / "emova", check=2)
        assert message.startswith("error: ") and len(message.splitlines()) == 1
    lines = (tmp_path / "emova" / "annotations" / "websrc.jsonl").read_text().splitlines()
    assert len(lines) == 2, "the file of the first run is whole"


def test_the_generator_of_invented_sets_takes_a_share_and_a_seed(tmp_path):
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("tests/published_samples.py", tmp_path / folder, "--share", 0.1, "--seed", seed)
    a, b, c = ((tmp_path / folder / "emova" / "annotations" / "toy.json").read_text() for folder in "abc")
    assert a == b != c and len(json.loads(a)) == 10
    assert "--share" in run("tests/published_samples.py", tmp_path / "d", "--share", "2", check=2)


def test_data_py_prints_counts_reasons_and_a_sample_of_each_kind(samples_folder, tmp_path):
    printed = run("data.py")
    assert all(f"{kind}: 1 samples" in printed for kind in (*data.KINDS, "words"))
    file = write(tmp_path / "mine.jsonl", '{"prompt": "How?"}\n')
    printed = run("data.py", "--data", f"genhowto={samples_folder / 'genhowto'},jsonl={file}", "--prompts")
    assert "interleaved: 7 samples" in printed and "Predict the subsequent step" in printed
    write(file, '{"prompt": "How?"}\n{"prompt": 7}\n')
    printed = run("data.py", "--data", f"jsonl={file}", "--prompts")
    assert "left out, prompt is missing, or of another kind than published: 1 records" in printed
    assert "no usable record" in run("data.py", "--data", f"jsonl={file}", check=2)
