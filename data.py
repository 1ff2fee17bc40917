"""Every source of samples, toy or published: source -> `Sample` -> one row of tokens (paper, Sec. 4.1).

    source     toy_*() makes a sample of the toy world; a reader turns published records into samples
    Sample     a prompt and an answer in written form, with `<image>` marks and a picture for each mark
    row        `row_of`: tokens [T, D], is_image [T], mask [T, D], ready for the decoder

The sources that `warmup.py --data` and `grpo.py --prompts` take as NAME=DIR,NAME=DIR:

    NAME          kind           what DIR holds
    activitynet   interleaved    ActivityNet Captions: train.json; frames/<v_id>/<segment>.jpg
    genhowto      interleaved    GenHowTo: actions.*.txt and states.*.txt, or a *.csv with the columns of
                                 both; frames/<VID_ID>/<second>.jpg
    openstory     interleaved    OpenStory++: its story rows as *.jsonl; frames/<video>/<key>.jpg
    jsonl         interleaved    a user's own file (DIR is the file): prompts, pictures and steps
    emova         understanding  EMOVA, or other LLaVA conversations: annotations/*.json or *.jsonl,
                                 pictures relative to DIR; speech subsets are skipped
    journeydb     t2i            JourneyDB: train/train_anno_realease_repath.jsonl and train/imgs/<folder>/,
                                 as many folders as there are

activitynet and genhowto also take a numbered dump of a video's frames (000001.jpg is second 0) with its rate
in frames/fps.txt. OpenStory++ and EMOVA are published as parquet: tests/parquet_to_jsonl.py makes JSON lines.

The questions that `evaluate.py --data DIR` takes:

    --benchmark        what DIR holds
    mmie               MMIE's data.json and images/
    interleavedbench   interleaved_bench.json and its folders of pictures
    understanding      questions.jsonl: {"image", "question", "answer"} a line
    t2i                captions.txt, one a line

To add a source, write one reader, (path, left_out) -> iterator of samples, and add one line to READERS.
A reader raises `Broken` inside `left_out.guard(...)` for a record that cannot be used. The record is counted,
and nothing takes its place.

    python data.py                                      # one sample of each kind, of the toy world
    python data.py --data activitynet=data/activitynet  # counts, reasons, a sample of each kind
"""
from common import (Seed, UserError, hash_files, open_tensors, parse_config, process_count, process_rank,
                    read_picture, read_text, run_main, summed, wait_for_all, write_tensors, write_whole)

import csv
import difflib
import hashlib
import itertools
import json
import math
import os
import random
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, wraps
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import shapes
from model import UnifiedModel
from tokenizer import IMAGE_END, IMAGE_START, SPECIAL_TOKENS, THINK_END, THINK_START


@dataclass
class Config:
    """Settings of `python data.py`."""
    # -- data
    data: str = ""                   # sources, NAME=DIR,NAME=DIR; empty: the toy world's samples
    prompts: bool = False            # read them as grpo.py --prompts does
    # -- run
    seed: Seed = 0                   # of the toy world's samples


# ------------------------------------------------------------------------------------------------------------
# One sample type; the toy world's samples

KINDS = ("interleaved", "understanding", "t2i")              # the hybrid mix, in the order of --mix
I2T_QUESTION = "what is it?"


@dataclass
class Sample:
    """A prompt and its answer: two texts, with a picture for each of their `<image>` marks.

    A picture is uint8 [H, W, 3] or the path of a file. A story of one step:

        prompt            "paint it blue. <BEGIN> a red circle at top left <image>"
        prompt_pictures   [Path("images/0_start.png")]
        answer            "<think>a blue circle at top left</think><im_start><image><im_end></s>"
        answer_pictures   [Path("images/0_0.png")]
    """
    prompt: str
    prompt_pictures: list
    answer: str = ""
    answer_pictures: list = field(default_factory=list)
    kind: str = "interleaved"        # one of KINDS, or "words"; the row of a t2i prompt ends in <im_start>
    steps: int | None = None         # of the true answer to an interleaved prompt; None: not known
    origin: tuple = ()               # file, line (of *.json: record) and id of the record behind it


def write_answer(steps: list[tuple[str, object]], fault: str | None = None, rng: random.Random | None = None
                 ) -> tuple[str, list]:
    """Steps (text, picture) -> an answer in written form and its pictures.

    The form is <think>text</think><vis>IMAGE</vis> for each step, then </s>. A fault breaks it at one step,
    as noisy data does.
    """
    parts = [[THINK_START, text, THINK_END, IMAGE_START, "<image>", IMAGE_END] for text, _ in steps]
    pictures = [picture for _, picture in steps]
    if fault:
        i = rng.randrange(len(parts))
        if fault == "no_image":
            del parts[i][3:]
            del pictures[i]
        elif fault == "extra_text":
            parts[i].append(steps[i][0])
        else:
            del parts[i][{"no_think_open": 0, "no_think_close": 2, "no_vis_close": 5}[fault]]
    return "".join(piece for part in parts for piece in part) + "</s>", pictures


def t2i_sample(caption: str, picture, origin: tuple = ()) -> Sample:
    """Text to image: a caption, its picture."""
    return Sample(caption, [], f"<image>{IMAGE_END}</s>", [picture], kind="t2i", origin=origin)


def toy_prompt(rng: random.Random, edits: int, split: str) -> Sample:
    """A prompt of the toy world, the answer left to the model."""
    prompt = shapes.sample_prompt(rng, edits, split)
    return Sample(prompt.text, [prompt.picture], steps=edits)


def toy_story(rng: random.Random, edits: int) -> Sample:
    """An interleaved story of the toy world, with the warm-up data's errors."""
    prompt = toy_prompt(rng, edits, "train")
    answer = write_answer(*shapes.noisy_story(rng, prompt.prompt), rng)
    return Sample(prompt.prompt, prompt.prompt_pictures, *answer, steps=edits)


def toy_words(rng: random.Random, edits: int) -> Sample:
    """The same task in words alone: stands for what a language model knows before it meets a picture.

    Choice: a quarter is from the split "pairs", about its share of all prompts. A language model knows all
    words; what no story ever had is kept from the stories alone.
    """
    split = "pairs" if rng.random() < 0.25 else "train"
    prompt = toy_prompt(rng, rng.randint(1, edits + 1), split).prompt
    captions = [shapes.caption(state) for state in shapes.states_of_prompt(prompt)[1:]]
    return Sample(prompt.replace(" <image>", ""), [], ", ".join(captions) + "</s>", kind="words")


def toy_t2i(rng: random.Random, edits: int = 0) -> Sample:
    """Text to image: the caption of a random scene, its picture."""
    scene = rng.choice(shapes.SCENES)
    return t2i_sample(shapes.caption(scene), shapes.render(scene))


def toy_i2t(rng: random.Random, edits: int = 0) -> Sample:
    """Image to text: the picture of a random scene and a question, its caption."""
    scene = rng.choice(shapes.SCENES)
    return Sample(f"<image> {I2T_QUESTION}", [shapes.render(scene)], f"{shapes.caption(scene)}</s>",
                  kind="understanding")

PRETRAINING = {toy_words: 0.5, toy_t2i: 0.25, toy_i2t: 0.25}


# ------------------------------------------------------------------------------------------------------------
# Records of published files: their numbers, their fields, and those that are left out

MARKS = re.compile("|".join(map(re.escape, ("<image>", "<s>", "</s>", "<unk>", *SPECIAL_TOKENS))))


class Broken(ValueError):
    """Why a record cannot be used: a reason, in the same words for all records of that kind, and a detail."""


def unit(file: Path) -> str:
    """What a record's number counts: lines, or the records of a *.json."""
    return "record" if Path(file).suffix == ".json" else "line"


class LeftOut:
    """The records that cannot be used: how many of each file and reason, and the first of them one by one.

    Choice: published files have broken records. One of them must neither end a run nor go unnoticed.

    counts: (verdict, file, reason) -> number; verdict is "left out", or "noted" for a record that is used.
    list: {"file", "line" or "record", "id", "reason", "verdict"} of the first LISTED of each.
    strict: raise UserError at the first one. A user's own file is better mended than cut down.
    """
    PRINTED, LISTED = 3, 1000        # of each file and reason: on the screen, in the list

    def __init__(self, strict: bool = False):
        self.strict = strict
        self.counts = Counter()
        self.list = []

    def add(self, file: Path, line: int, name: object, reason: str, detail: object = "",
            verdict: str = "left out") -> None:
        """Count one record. file, line, name: its origin; detail: what differs from record to record."""
        words = f"{reason}: {detail}" if str(detail) else reason
        if self.strict:
            raise UserError(f"{file}, {unit(file)} {line}: {words}")
        self.counts[verdict, str(file), reason] += 1
        count = self.counts[verdict, str(file), reason]
        if count <= self.LISTED:
            self.list.append({"file": str(file), unit(file): line, "id": str(name), "reason": words,
                              "verdict": verdict})
        if count <= self.PRINTED:
            where = f"{file}, {unit(file)} {line}" + (f", {name}" if str(name) else "")
            tqdm.write(f"{verdict}: {where}: {words}" + (" (and so on)" if count == self.PRINTED else ""))

    @contextmanager
    def guard(self, file: Path, line: int, name: object = ""):
        """Context manager for one record: if it raises Broken, count the record and go on."""
        try:
            yield
        except Broken as broken:
            self.add(file, line, name, *broken.args)

    def reasons(self) -> dict[str, int]:
        """{"verdict, reason": number of records}, all files together."""
        totals = Counter()
        for (verdict, _, reason), count in self.counts.items():
            totals[f"{verdict}, {reason}"] += count
        return dict(totals)

    def total(self) -> int:
        """The number of records that are left out."""
        return sum(count for (verdict, *_), count in self.counts.items() if verdict == "left out")


def records(file: Path, left_out: LeftOut) -> Iterator[tuple[int, object]]:
    """The records of a file, each with its number from 1.

    *.json: the items of a list, or the (key, value) pairs of an object. Any other file: JSON lines, numbered
    by line; a broken line is left out. Raises UserError for an unreadable file and for a broken *.json.
    """
    if file.suffix == ".json":
        yield from enumerate(json_items(file), 1)
        return
    try:
        with open(file, "rb") as lines:
            for number, line in enumerate(lines, 1):
                with left_out.guard(file, number):
                    if line.strip():
                        yield number, parse_json(line)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error})") from None


def json_items(file: Path) -> list:
    """A *.json file -> the items of its list, or the (key, value) pairs of its object. Raises UserError."""
    text = read_text(file)
    try:
        value = load_json(text)
    except json.JSONDecodeError as error:
        message = error.msg.replace("Expecting", "expected")
        raise UserError(f"{file}, line {error.lineno}: not JSON ({message})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON that can be read ({error})") from None
    if not isinstance(value, (list, dict)):
        raise UserError(f"{file}: expected a JSON list or object, found {str(value)[:40]!r}")
    return list(value.items()) if isinstance(value, dict) else value


def load_json(text: str | bytes) -> object:
    """A JSON value. Halves of characters (a cut emoji), which no file takes, become question marks."""
    value = json.loads(text)
    return json.loads(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def parse_json(text: str | bytes) -> object:
    """A JSON value, or Broken."""
    try:
        return load_json(text)
    except (ValueError, RecursionError) as error:
        raise Broken("not JSON", f"{error}, in {text[:40]!r}") from None


def id_of(record: object, key: str = "id") -> str:
    """A record's own name, for reports; "" where it has none."""
    return str(record.get(key, "")) if isinstance(record, dict) else ""


def need(record: object, key: str, kind: type | tuple[type, ...]):
    """record[key], or Broken where it is missing or of another kind."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        raise Broken(f"{key} is missing, or of another kind than published", repr(value)[:40])
    return value


def clean_text(text: str) -> str:
    """A text without our marks: data must not open pictures or end answers."""
    return MARKS.sub(" ", text).strip()


def need_text(record: object, key: str) -> str:
    """record[key] without our marks, or Broken where it is missing or empty."""
    text = clean_text(need(record, key, str))
    if not text:
        raise Broken(f"{key} is empty")
    return text


def as_list(value: object) -> list:
    """None -> [], a single value -> [value], a list -> itself."""
    if isinstance(value, list):
        return value
    return [value] if value else []


def need_marks(text: str, pictures: list) -> None:
    """An `<image>` mark for each picture, or Broken."""
    if text.count("<image>") != len(pictures):
        counts = f"{text.count('<image>')} and {len(pictures)}"
        raise Broken("<image> marks and pictures differ in number", counts)


def picture_in(folder: Path, *names: object) -> Path:
    """The first of `names` that exists in a folder, or Broken."""
    for name in names:
        if not isinstance(name, str) or not name:
            raise Broken("the path of a picture is missing")
        if os.path.isfile(folder / name):                   # False for a path that no system would take, too
            return folder / name
    raise Broken("a picture is missing", str(folder / names[0])[:200])


def file_in(path: Path, *names: str) -> Path:
    """The path itself if it is a file, else the first of `names` in that folder. Raises UserError."""
    for file in [path] if path.is_file() else [path / name for name in names]:
        if file.is_file():
            return file
    raise UserError(f"{path}: expected {' or '.join(names)} there")


def files_in(path: Path, *patterns: str) -> list[Path]:
    """The path itself if it is a file, else the folder's files that fit, sorted. Raises UserError."""
    files = [path] if path.is_file() else sorted({f for pattern in patterns for f in path.glob(pattern)})
    if not files:
        raise UserError(f"{path}: expected {' or '.join(patterns)} there")
    return files


class Frames:
    """Frames of videos as picture files, FOLDER/<video>/<name>.jpg.

    FOLDER/fps.txt, if there is one, holds the rate of a numbered dump: 000001.jpg is second 0.
    """
    SUFFIXES = (".jpg", ".jpeg", ".png")
    LONGEST = 1e9                    # seconds: no video is longer

    def __init__(self, folder: Path):
        """Raises UserError for an fps.txt without a rate."""
        self.folder, self.fps = folder, None
        file = folder / "fps.txt"
        if not file.is_file():
            return
        text = read_text(file)
        try:
            self.fps = float(text)
        except ValueError:
            self.fps = math.nan
        if not 0 < self.fps < 1e6:
            raise UserError(f"{file}: expected the frames a second, a number above 0, found {text[:20]!r}")

    def find(self, video: str, name: str, second: float) -> Path:
        """The frame of that name, else the dump's frame of that second, or Broken."""
        if not 0 <= second <= self.LONGEST:
            raise Broken("a second that no video has", second)
        names = [name + suffix for suffix in self.SUFFIXES]
        if self.fps:
            names += [f"{int(second * self.fps) + 1:06d}{suffix}" for suffix in self.SUFFIXES]
        return picture_in(self.folder / video, *names)


# ------------------------------------------------------------------------------------------------------------
# The paper's sources: one reader for each

# The paper's query templates (its data figure); {text} and {question} come from the data.
EVENT_QUERY = (
    "In this task, you are given the first part of an event with both text and an image, and you need to "
    "complete the subsequent parts of the event by generating text and images that are natural continuation "
    "of the given first part. The input interleaved content is: <BEGIN> {text} <image>")
HOWTO_QUERY = (
    "In this task, you are given a multimodal question consisting of both text and an image. Your goal is to "
    "generate an interleaved text-image answer that demonstrates step-by-step multimodal reasoning. The "
    "answer should include both textual and relevant visual content to support your reasoning process. "
    "<BEGIN> {question} <image>")
NEXT_STEP_QUERY = "{question} Predict the subsequent step. The previous steps are: {text} <image>"
# Choice: GenHowTo has a category but no question, so the question is ours.
HOWTO_QUESTION = "What is done with the {name}, step by step?"
STORY = 5                        # parts of a story, its prompt and up to four steps, as in OpenStory++


def event_sample(parts: list[tuple[str, Path]], origin: tuple) -> Sample:
    """The first part (text, picture) of an event is the prompt, the others are the answer's steps."""
    (text, picture), *steps = parts
    prompt = EVENT_QUERY.replace("{text}", text)
    return Sample(prompt, [picture], *write_answer(steps), steps=len(steps), origin=origin)


def cut_stories(parts: list) -> list[list]:
    """Parts in order -> stories of STORY parts, the last one shorter."""
    return [parts[i:i + STORY] for i in range(0, len(parts), STORY)]


def activitynet(path: Path, left_out: LeftOut) -> Iterator[Sample]:
    """ActivityNet Captions, train.json, an object of videos:

        {"v_QOlSCBRmfWY": {"duration": 82.73, "timestamps": [[0.83, 19.86], [17.37, 60.81]],
                           "sentences": ["A woman stands in a room.", " She dances around the room."]}}

    or the flattened rows of its mirrors, train.jsonl (`unflatten`). The frame of the first segment is
    frames/v_QOlSCBRmfWY/0.jpg, or the middle of the segment in a numbered dump (`Frames`).

    Choice: segments overlap and come in any order. We sort them by their start and cut them into stories.
    """
    file = file_in(path, "train.json", "train.jsonl")
    frames = Frames(file.parent / "frames")
    for line, record in records(file, left_out):
        video = record[0] if isinstance(record, tuple) else id_of(record, "video_id")
        origin = (file, line, video)
        with left_out.guard(*origin):
            video, entry = record if isinstance(record, tuple) else unflatten(record)
            segments = read_segments(entry, origin, left_out)
            parts = [(text, frames.find(video, str(i), (start + stop) / 2))
                     for start, stop, i, text in segments]
            for story in cut_stories(parts):
                if len(story) > 1:
                    yield event_sample(story, origin)
                else:
                    left_out.add(*origin, "a lone part is no story")


def unflatten(row: object) -> tuple[str, dict]:
    """A row of ActivityNet's mirrors -> (video, entry) as in train.json:

        {"video_id": "v_QOlSCBRmfWY", "captions_starts": [0.83, 17.37], "captions_ends": [19.86, 60.81],
         "en_captions": ["A woman stands in a room.", " She dances around the room."]}
    """
    video, sentences = need(row, "video_id", str), need(row, "en_captions", list)
    starts, stops = need(row, "captions_starts", list), need(row, "captions_ends", list)
    return video, {**row, "sentences": sentences, "timestamps": list(itertools.zip_longest(starts, stops))}


def read_segments(entry: object, origin: tuple, left_out: LeftOut) -> list[tuple[float, float, int, str]]:
    """A video's entry -> (start, stop, number, sentence) of its usable segments, sorted."""
    sentences, spans = need(entry, "sentences", list), need(entry, "timestamps", list)
    duration = need(entry, "duration", (int, float)) if "duration" in entry else Frames.LONGEST
    if len(spans) != len(sentences):
        raise Broken("timestamps and sentences differ in number", f"{len(spans)} and {len(sentences)}")
    file, line, video = origin
    segments = []
    for i, (span, sentence) in enumerate(zip(spans, sentences)):
        with left_out.guard(file, line, f"{video}, segment {i}"):
            text = need_text({"sentence": sentence}, "sentence")
            if not (isinstance(span, (list, tuple)) and len(span) == 2
                    and all(isinstance(t, (int, float)) and abs(t) < Frames.LONGEST for t in span)):
                raise Broken("a timestamp is no pair of seconds", repr(span)[:40])
            start, stop = max(0, span[0]), min(duration, span[1])
            if not start < stop:
                raise Broken("a segment is empty", span)
            segments.append((start, stop, i, text))
    return sorted(segments)

HOWTO_COLUMNS = ("VID_ID", "DS_CAT_NAME", "FRAME_S1", "FRAME_AC", "FRAME_S2", "FILENAME")
HOWTO_PROMPTS = ("FRAME_AC_PROMPT", "FRAME_S2_PROMPT")           # one in actions.*.txt, one in states.*.txt


def genhowto(path: Path, left_out: LeftOut, next_step: bool = False) -> Iterator[Sample]:
    """GenHowTo, actions.*.txt and states.*.txt, or *.csv with the columns of both:

        VID_ID,DS_CAT,DS_CAT_NAME,FRAME_S1,FRAME_S2,FRAME_AC,SCORE,FRAME_AC_PROMPT,FILENAME
        -aaaaaaaaaa,0,apple,12,48,30,0.9,"a person cutting an apple","results/states_0/0000.jpg"

    The frame of second 12 is frames/-aaaaaaaaaa/12.jpg, or that of a numbered dump (`Frames`). The initial
    state is in the prompt; the answer has two steps, the action and the final state.

    next_step: the paper's form for RL. The action is in the prompt as well, the answer is the final state.
    """
    frames = Frames((path if path.is_dir() else path.parent) / "frames")
    for row, origin in join_tables(path, left_out):
        with left_out.guard(*origin):
            action, state = (need_text(row, name) for name in HOWTO_PROMPTS)
            times = [need_text(row, name) for name in ("FRAME_S1", "FRAME_AC", "FRAME_S2")]
            if not all(re.fullmatch(r"\d+(\.\d+)?", text) for text in times):
                raise Broken("a frame's second is no number", str(times)[:80])
            seconds = [float(text) for text in times]
            if sorted(seconds) != seconds:
                raise Broken("initial, action and final frame are not in order", seconds)
            first, middle, last = (frames.find(need_text(row, "VID_ID"), f"{t:g}", t) for t in seconds)
            question = HOWTO_QUESTION.replace("{name}", need_text(row, "DS_CAT_NAME"))
            if next_step:
                query = NEXT_STEP_QUERY.replace("{question}", question).replace("{text}", action)
                yield Sample(query, [middle], *write_answer([(state, last)]), steps=1, origin=origin)
            else:
                query, steps = HOWTO_QUERY.replace("{question}", question), [(action, middle), (state, last)]
                yield Sample(query, [first], *write_answer(steps), steps=2, origin=origin)


def join_tables(path: Path, left_out: LeftOut) -> list[tuple[dict, tuple]]:
    """The rows of GenHowTo's tables, joined by FILENAME -> (row, origin) each.

    A row that has the FILENAME of another but does not complete it is left out: other columns differ, or the
    text is there already.
    """
    rows, origins = {}, {}
    for file in files_in(path, "actions*.txt", "states*.txt", "*.csv"):
        for line, row in csv_rows(file):
            origin = (file, line, row["VID_ID"] or "")
            with left_out.guard(*origin):
                name = need_text(row, "FILENAME")
                values = {key: row[key] for key in (*HOWTO_COLUMNS, *HOWTO_PROMPTS) if row.get(key)}
                whole = rows.setdefault(name, {})
                origins.setdefault(name, origin)
                both = whole.keys() & values.keys()
                if any(key in HOWTO_PROMPTS or whole[key] != values[key] for key in both):
                    raise Broken("FILENAME is there twice", name)
                whole.update(values)
    return [(rows[name], origins[name]) for name in rows]


def csv_rows(file: Path) -> Iterator[tuple[int, dict]]:
    """The rows of a table with GenHowTo's columns, each with its line. Raises UserError for another table."""
    try:
        with open(file, encoding="utf-8-sig", newline="") as lines:
            table = csv.DictReader(lines)
            for name in HOWTO_COLUMNS:
                if name not in (table.fieldnames or ()):
                    raise UserError(f"{file}, line 1: expected a header with the column {name}")
            for row in table:
                yield table.line_num, row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: cannot be read ({error})") from None


YOUTUBE_ID = 11                  # characters; it may hold - and _


def openstory(path: Path, left_out: LeftOut) -> Iterator[Sample]:
    """OpenStory++, the rows of its stories as *.jsonl or *.json:

        {"__key__": "aBc-Ef_HiJk_keyframe_00-00-12-400", "json": {"caption": "a man opens a door"}}

    with frames/aBc-Ef_HiJk/aBc-Ef_HiJk_keyframe_00-00-12-400.jpg. "json" may be a text that holds the object.

    As OpenStory++ groups them: consecutive rows of one video, at most STORY a story. Rows with _override_ in
    their key duplicate the row before; they count towards STORY and are then dropped.
    """
    root = path if path.is_dir() else path.parent
    rows = openstory_rows(path, left_out)
    for video, of_video in itertools.groupby(rows, lambda row: row[0][:YOUTUBE_ID]):
        for story in cut_stories(sorted(of_video)):                              # by own key: in time order
            own_key, _, file, line, _ = story[0]
            with left_out.guard(file, line, own_key):
                parts = []
                for _, key, row_file, row_line, record in story:
                    if "_override_" in key:
                        left_out.add(row_file, row_line, key, "repeats another frame (_override_)")
                        continue
                    about = need(record, "json", (dict, str))
                    caption = need_text(parse_json(about) if isinstance(about, str) else about, "caption")
                    parts.append((caption, picture_in(root, f"frames/{video}/{key}.jpg")))
                if len(parts) < 2:
                    raise Broken("a lone part is no story")
                yield event_sample(parts, (file, line, own_key))


def openstory_rows(path: Path, left_out: LeftOut) -> Iterator[tuple[str, str, Path, int, dict]]:
    """OpenStory++'s rows -> (own key, key, file, line, record). "A_override_B" is row B with A's frame."""
    for file in files_in(path, "*.jsonl", "*.json"):
        for line, record in records(file, left_out):
            with left_out.guard(file, line):
                key = need(record, "__key__", str)
                yield key.rpartition("_override_")[2], key, file, line, record


def emova(path: Path, left_out: LeftOut) -> Iterator[Sample]:
    """EMOVA, or other LLaVA conversations, annotations/*.json or *.jsonl, pictures relative to DIR:

        {"id": "000007", "image": "websrc/7.png", "conversations": [
            {"from": "human", "value": "<image>\\nWhich shop?"}, {"from": "gpt", "value": "The bakery."}]}

    "image" may be a list or missing. Speech subsets are skipped.

    Choice: a sample for each reply, with the earlier turns in its prompt as vicuna_v1 writes them. So Eq. (1)
    counts every reply once.
    """
    root = path if path.is_dir() else path.parent
    if path.is_file() and root.name == "annotations":
        root = root.parent
    for file in files_in(path, "annotations/*.json", "annotations/*.jsonl", "*.json", "*.jsonl"):
        if re.search("asr|tts|speech", file.stem, re.IGNORECASE):
            left_out.add(file, 1, file.stem, "a speech subset")
            continue
        for line, record in records(file, left_out):
            origin = (file, line, id_of(record))
            with left_out.guard(*origin):
                turns = read_turns(record)
                pictures = [picture_in(root, name) for name in as_list(record.get("image"))]
                need_marks("".join(turns), pictures)
                prompt = ""
                for question, reply in zip(turns[::2], turns[1::2], strict=True):
                    prompt += question
                    yield Sample(prompt, pictures[:prompt.count("<image>")], reply + "</s>",
                                 kind="understanding", origin=origin)
                    prompt += f" ASSISTANT: {reply}</s>USER: "


def read_turns(record: object) -> list[str]:
    """The texts of a LLaVA conversation, human and gpt in turn, or Broken. A reply's `<image>` marks go."""
    turns = []
    for turn, speaker in zip(need(record, "conversations", list), itertools.cycle(("human", "gpt"))):
        if need(turn, "from", str) != speaker:
            raise Broken("human and gpt do not take turns", turn["from"])
        text = need(turn, "value", str)
        pieces = text.split("<image>") if speaker == "human" else [text]
        turns.append("<image>".join(MARKS.sub(" ", piece) for piece in pieces).strip())
    if len(turns) < 2 or len(turns) % 2 or not all(turns):
        raise Broken("a turn is missing or empty")
    return turns


SHORTEST_CAPTION = 5             # letters, as in a public JourneyDB pipeline


def journeydb(path: Path, left_out: LeftOut) -> Iterator[Sample]:
    """JourneyDB, train/train_anno_realease_repath.jsonl (spelled so):

        {"img_path": "./000/1.jpg", "prompt": "a tin robot --ar 3:2", "Task2": {"Caption": "A tin robot."}}

    with train/imgs/000/1.jpg. A partial download is fine. train_anno.jsonl does not fit: its paths are not
    those of the archives.

    Choice: of several pictures of one prompt the first. JourneyDB has many such prompts.
    """
    file = file_in(path, "train/train_anno_realease_repath.jsonl", "train_anno_realease_repath.jsonl",
                   "valid/valid_anno_repath.jsonl", "valid_anno_repath.jsonl")
    folders = {f.name for f in (file.parent / "imgs").glob("*") if f.is_dir()}
    prompts = set()
    for line, record in records(file, left_out):
        with left_out.guard(file, line, id_of(record, "img_path")):
            name = need(record, "img_path", str).removeprefix("./")
            if name.partition("/")[0] not in folders:
                raise Broken("its folder of pictures is not there", "imgs/" + name.partition("/")[0])
            caption = journeydb_caption(record)
            picture = picture_in(file.parent / "imgs", name)
            prompt = record.get("prompt")
            prompt = prompt if isinstance(prompt, str) and prompt else caption
            if prompt in prompts:
                raise Broken("another picture of a prompt that was there before")
            prompts.add(prompt)
            yield t2i_sample(caption, picture, (file, line, name))


def journeydb_caption(record: dict) -> str:
    """A record's caption, else its prompt without parameters ("--ar 3:2"). Broken if both are too short."""
    about = record.get("Task2")
    texts = [about.get("Caption")] if isinstance(about, dict) else []
    if isinstance(record.get("prompt"), str):
        texts.append(re.sub(r"\s*--\w.*", "", record["prompt"], flags=re.DOTALL).rstrip(" ,"))
    for text in texts:
        if isinstance(text, str) and len(clean_text(text)) >= SHORTEST_CAPTION:
            return clean_text(text)
    raise Broken(f"no caption or prompt of {SHORTEST_CAPTION} letters")


def read_jsonl(path: Path, left_out: LeftOut, with_steps: bool = True) -> Iterator[Sample]:
    """A user's own JSON lines, paths relative to the file:

        {"prompt": "How do I cut it? <image>", "images": ["0.png"],
         "steps": [{"text": "Slice it.", "image": "1.png"}]}

    The prompt has an `<image>` mark for each of "images". with_steps=False, for RL: the prompts alone. What
    answer each wants may stand beside it (`prompt_form`).
    """
    for line, record in records(path, left_out):
        origin = (path, line, id_of(record))
        with left_out.guard(*origin):
            prompt = need(record, "prompt", str)
            for key in record.keys() - {"prompt", "images", "steps", "kind", "id"}:
                left_out.add(*origin, f"unknown key {key!r}, expected prompt, images, steps, kind or id",
                             verdict="noted")
            if not prompt.strip():
                raise Broken("the prompt is empty")
            names = [] if record.get("images") is None else need(record, "images", list)
            need_marks(prompt, names)
            pictures = [picture_in(path.parent, name) for name in names]
            sample = Sample(prompt, pictures, origin=origin)
            if not with_steps:
                sample.kind, sample.steps = prompt_form(record)
            else:
                steps = [(need_text(step, "text"), picture_in(path.parent, need(step, "image", str)))
                         for step in need(record, "steps", list)]
                if not steps:
                    raise Broken("no step in the answer")
                sample.answer, sample.answer_pictures = write_answer(steps)
                sample.steps = len(steps)
            yield sample


def prompt_form(record: dict) -> tuple[str, int | None]:
    """What answer a prompt wants -> its kind and its steps, or Broken:

        {"prompt": "Cut it.", "steps": 2}       two steps; the list of the true steps may stand there, too
        {"prompt": "What is it? <image>", "images": ["0.png"], "kind": "understanding"}

    kind: one of KINDS, by default interleaved. steps: of an interleaved answer; None where it is missing.
    """
    kind, steps = record.get("kind", "interleaved"), record.get("steps")
    if kind not in KINDS:
        raise Broken(f"expected a kind of {', '.join(KINDS)}", repr(kind)[:40])
    if isinstance(steps, list):
        steps = len(steps)
    if steps is not None and (type(steps) is not int or steps < 1):
        raise Broken("expected steps, a whole number of at least 1", repr(record["steps"])[:40])
    if steps and kind != "interleaved":
        raise Broken("only an interleaved answer has steps", f"kind {kind}, steps {steps}")
    return kind, steps


# ------------------------------------------------------------------------------------------------------------
# Sources by name: --data and --prompts, NAME=DIR,NAME=DIR

Reader = Callable[[Path, LeftOut], Iterator[Sample]]

READERS: dict[str, tuple[Reader, str]] = {                   # name -> reader, kind of its samples
    "activitynet": (activitynet, "interleaved"),
    "genhowto": (genhowto, "interleaved"),
    "openstory": (openstory, "interleaved"),
    "jsonl": (read_jsonl, "interleaved"),
    "emova": (emova, "understanding"),
    "journeydb": (journeydb, "t2i"),
}
PROMPT_READERS = READERS | {                                 # for RL
    "genhowto": (partial(genhowto, next_step=True), "interleaved"),
    "jsonl": (partial(read_jsonl, with_steps=False), "interleaved"),
}


def parse_sources(text: str, flag: str) -> list[tuple[str, Path]]:
    """NAME=DIR,NAME=DIR -> (name, path) each. Raises UserError for an unknown name or path."""
    sources = []
    for part in re.split(r",(?=\w+=)", text):                           # a path may have commas
        name, _, path = part.partition("=")
        if name not in READERS:
            near = difflib.get_close_matches(name, READERS, 1)
            raise UserError(f"{flag} {part}: expected NAME=DIR with NAME one of {', '.join(READERS)}"
                            + (f"; did you mean {near[0]}?" if near else ""))
        if not path or not Path(path).exists():
            raise UserError(f"{flag} {part}: no such file or folder")
        sources.append((name, Path(path)))
    return sources


def read_sources(text: str, flag: str, readers: dict[str, tuple[Reader, str]], left_out: LeftOut
                 ) -> dict[str, list[Sample]]:
    """NAME=DIR,NAME=DIR -> all samples by kind; prints a line of counts for each source.

    readers: READERS or PROMPT_READERS. Raises UserError for a source without a usable record.
    """
    samples = {kind: [] for kind in KINDS}
    for name, path in parse_sources(text, flag):
        reader, kind = readers[name]
        before = left_out.total()
        of_source = list(tqdm(reader(path, left_out), desc=f"reading {name}", unit=" samples",
                              disable=process_rank() > 0))
        broken = left_out.total() - before
        tqdm.write(f"{name:12} {kind:14} {len(of_source):9,} samples, {broken:,} records left out")
        if not of_source:
            raise UserError(f"{flag} {name}={path}: no usable record in it")
        samples[kind] += of_source
    return samples


def read_prompts(path: Path) -> list[Sample]:
    """The prompts of a user's own file, {"prompt": text, "images": [path, ...], "steps": number} a line (see
    `read_jsonl` and `prompt_form`).

    Raises UserError, naming file and line, for the first broken line or picture, and for a file without any.
    """
    path = Path(path)
    samples = list(read_jsonl(path, LeftOut(strict=True), with_steps=False))
    for sample in samples:
        for picture in sample.prompt_pictures:
            read_picture(picture, f"{path}, {unit(path)} {sample.origin[1]}")
    if not samples:
        raise UserError(f"--prompts {path}: no prompt in it")
    return samples


# ------------------------------------------------------------------------------------------------------------
# Benchmarks: published questions

@dataclass
class Question(Sample):
    """One question of a benchmark: a prompt, and what its answer is judged by."""
    id: str = ""
    group: str = ""                  # MMIE: SA, PBL or MSR; InterleavedBench: the task
    record: dict = field(default_factory=dict)       # as published


def question_reader(reader):
    """Decorator of a reader of questions: of several with one id only the first is read."""
    @wraps(reader)
    def read(path: Path, left_out: LeftOut) -> Iterator[Question]:
        ids = set()
        for question in reader(path, left_out):
            with left_out.guard(*question.origin):
                if question.id in ids:
                    raise Broken("an id that was there before")
                ids.add(question.id)
                yield question
    return read


MMIE_GROUPS = ("SA", "PBL", "MSR")         # looked for in an id in this order
MMIE_PICTURES = 4                          # a question with more is left out, as the official loader does


@question_reader
def mmie(path: Path, left_out: LeftOut) -> Iterator[Question]:
    """MMIE, data.json and images/:

        {"id": "PBL-0-000001", "question": [{"text": "Step 1", "image": "images/1.png"}],
         "gt_answer": [{"text": "Step 2", "image": null}], "answer": "a text", "model": "gt"}

    The category (SA, PBL, MSR) is in the id. The reference is "gt_answer", or the answer of the model "gt".
    """
    file = file_in(path, "data.json")
    for line, record in records(file, left_out):
        origin = (file, line, id_of(record))
        with left_out.guard(*origin):
            name = need(record, "id", str)
            group = next((g for g in MMIE_GROUPS if g in name), None)
            if group is None:
                raise Broken("its id names no category (SA, PBL or MSR)")
            question = mmie_segments(record.get("question"))
            reference = mmie_reference(record)
            if group == "MSR" and not reference[0]["text"]:
                left_out.add(*origin, "a problem without its right answer", verdict="noted")
            text, pictures = mmie_prompt(question, file.parent)
            yield Question(text, pictures, id=name, group=group, origin=origin,
                           record={**record, "question": question, "gt_answer": reference})


def mmie_segments(value: object) -> list[dict]:
    """A question or an answer of MMIE -> a list of {"text": str | None, "image": path | None}, or Broken.

    Takes such a list, keys may be missing, or a plain text.
    """
    value = [{"text": value}] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(s, dict) for s in value):
        raise Broken("question or answer is no list of {text, image}", repr(value)[:40])
    segments = [{**s, "text": s.get("text"), "image": s.get("image")} for s in value]
    for segment in segments:
        if not all(isinstance(segment[key], (str, type(None))) for key in ("text", "image")):
            raise Broken("text or image is neither a text nor null", repr(segment)[:40])
    return segments


def mmie_reference(record: dict) -> list[dict]:
    """The reference answer: the first with a text of "gt_answer" and, for the model "gt", "answer"."""
    references = [mmie_segments(record.get("gt_answer") or [{}])]
    if record.get("model") == "gt":
        references.append(mmie_segments(record.get("answer") or [{}]))
    return next((r for r in references if r[0]["text"]), references[0])


def mmie_prompt(segments: list[dict], folder: Path) -> tuple[str, list[Path]]:
    """A question's segments -> its text with `<image>` marks and its pictures, or Broken."""
    words, pictures = [], []
    for segment in segments:
        if segment["text"]:
            words.append(clean_text(segment["text"]))
        if segment["image"]:
            if Path(segment["image"]).is_absolute() or ".." in Path(segment["image"]).parts:
                raise Broken("a picture's path leaves the folder", segment["image"])
            pictures.append(picture_in(folder, segment["image"]))
            words.append("<image>")
    if len(pictures) > MMIE_PICTURES:
        raise Broken(f"more than {MMIE_PICTURES} pictures", len(pictures))
    if not "".join(words):
        raise Broken("the question is empty")
    return " ".join(words), pictures


@question_reader
def interleavedbench(path: Path, left_out: LeftOut) -> Iterator[Question]:
    """InterleavedBench, interleaved_bench.json and its folders of pictures beside it or in zipped_images/:

        {"id": "wikihow_000001", "task_name": "wikihow_next_step", "image": ["wiki/0.png", "wiki/1.png"],
         "conversations": [{"from": "human", "value": "How? <image>"},
                           {"from": "gpt", "value": "So. <image>"}]}

    The first pictures are the human turn's, the others the reference's.
    """
    file = file_in(path, "interleaved_bench.json")
    for line, record in records(file, left_out):
        origin = (file, line, id_of(record))
        with left_out.guard(*origin):
            name, task = str(need(record, "id", (str, int))), need(record, "task_name", str)
            text, replies = bench_turns(record)
            files, marks = as_list(record.get("image")), text.count("<image>")
            if marks > len(files) or (replies and marks + "".join(replies).count("<image>") != len(files)):
                left_out.add(*origin, "marks and pictures differ in number, their common prefix is used",
                             f"{marks} marks in the prompt, {len(files)} pictures in all", verdict="noted")
            pieces = [MARKS.sub(" ", piece) for piece in text.split("<image>")]
            count = min(marks, len(files))
            prompt = "<image>".join([*pieces[:count], " ".join(pieces[count:])])
            pictures = [picture_in(file.parent, f, f"zipped_images/{f}") for f in files[:count]]
            yield Question(prompt.strip(), pictures, id=name, group=task, record=record, origin=origin)


def bench_turns(record: dict) -> tuple[str, list[str]]:
    """An InterleavedBench record -> its prompt (the human turn, or else an instruction) and the replies."""
    turns = record.get("conversations") if isinstance(record.get("conversations"), list) else []
    turns = [turn for turn in turns if isinstance(turn, dict)] or [{}]
    for text in (turns[0].get("value"), record.get("instruction"), turns[0].get("instruction")):
        if isinstance(text, str) and text.strip():
            return text, [str(turn.get("value")) for turn in turns[1:]]
    raise Broken("neither a human turn nor an instruction")


# -- the abilities that GRPO is to keep: a user's own single tasks, before and after

@question_reader
def understanding(path: Path, left_out: LeftOut) -> Iterator[Question]:
    """A user's own questions.jsonl, paths relative to the file:

        {"id": 7, "image": "images/7.png", "question": "what is it?", "answer": "a fox"}

    "image" (or "images") and "answer" (or "answers") may be lists. Any of several answers is right.
    A question without `<image>` marks gets its pictures in front.
    """
    file = file_in(path, "questions.jsonl")
    for line, record in records(file, left_out):
        origin = (file, line, id_of(record))
        with left_out.guard(*origin):
            text = need(record, "question", str).strip()
            record = {key: value for key, value in record.items() if value is not None}    # a table's gaps
            answers = record.get("answer", record.get("answers"))
            answers = answers if isinstance(answers, list) else [answers]
            if not text or not answers or not all(isinstance(answer, str) for answer in answers):
                raise Broken("a question or its answer is missing")
            names = as_list(record.get("image", record.get("images")))
            pictures = [picture_in(file.parent, name) for name in names]
            if "<image>" not in text:
                text = "<image> " * len(pictures) + text
            need_marks(text, pictures)
            yield Question(text, pictures, id=str(record.get("id", line)), origin=origin,
                           record={**record, "accepted": answers})


@question_reader
def captions(path: Path, left_out: LeftOut) -> Iterator[Question]:
    """A user's own captions, one a line (*.txt), or records (*.jsonl, *.json):

        {"prompt": "a fox in the snow"}
    """
    file = file_in(path, "captions.txt", "captions.jsonl")
    if file.suffix == ".txt":
        lines = enumerate(read_text(file).split("\n"), 1)
        numbered = [(number, {"prompt": text}) for number, text in lines if text.strip()]
    else:
        numbered = records(file, left_out)
    for line, record in numbered:
        origin = (file, line, "")
        with left_out.guard(*origin):
            text = need_text(record, "prompt")
            yield Question(text, [], kind="t2i", id=str(line), origin=origin, record=record)


# ------------------------------------------------------------------------------------------------------------
# Samples -> rows of tokens: image codes, what fits

def fingerprint(module: torch.nn.Module) -> str:
    """A hash of a module's weights, types and names."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class CodeCache:
    """Pictures -> codes [N, D], each distinct picture encoded once: the image tokenizer is fixed by now.

    codes: key -> codes, or the open file that holds them. The key is a hash of the picture file's bytes.
    keys: path -> key, or the error of a file that cannot be read.

    With a folder, codes stay on disk for later runs, in FOLDER/<hash of the image tokenizer>/*.safetensors.
    `flush` writes the new ones; `encode` does it too whenever there are AT_ONCE.

    together: all processes ask for the same new pictures in the same order. Each encodes its share of them,
        and rank 0 writes.
    """
    AT_ONCE = 4096               # codes a file

    def __init__(self, model: UnifiedModel, folder: Path | None = None, together: bool = False):
        self.model, self.together = model, together and process_count() > 1
        self.folder = folder and folder / fingerprint(model.vision)[:16]
        self.codes, self.keys = {}, {}
        self.new = []                # keys whose codes are not on disk
        self.encoded = 0             # pictures encoded so far
        for file in sorted(self.folder.glob("*.safetensors")) if folder else ():
            self.open_file(file)

    def open_file(self, file: Path) -> None:
        """Take the codes of a file. Raises UserError if it is damaged."""
        tensors = open_tensors(file)
        self.codes.update(dict.fromkeys(tensors.keys(), tensors))

    def key(self, picture: np.ndarray | Path, crop: bool = False) -> str:
        """The name of a picture's codes. A file is read once. Raises UserError if it cannot be read."""
        if not isinstance(picture, Path):
            name = hashlib.sha256(f"{picture.shape}".encode() + picture.tobytes()).hexdigest()[:32]
        else:
            try:
                name = self.keys.get(picture) or hashlib.sha256(picture.read_bytes()).hexdigest()[:32]
            except OSError as error:
                name = UserError(f"a picture: {picture} cannot be read ({error})")
            self.keys[picture] = name
            if isinstance(name, UserError):
                raise UserError(str(name))
        return name + "-cropped" * crop

    def encode(self, pictures: list, crop: bool = False) -> None:
        """Encode the pictures that are new, in one batch. Files that cannot be read are passed over."""
        batch = {}
        for picture in pictures:
            try:
                key = self.key(picture, crop)
                if key not in self.codes and key not in batch:
                    batch[key] = read_picture(picture, "a picture") if isinstance(picture, Path) else picture
            except UserError as error:
                self.keys[picture] = error
        if batch:
            self.codes.update(zip(batch, self.encode_batch(list(batch.values()), crop), strict=True))
            self.new += batch
            self.encoded += len(batch)
        if len(self.new) >= self.AT_ONCE:
            self.flush()

    def encode_batch(self, pictures: list[np.ndarray], crop: bool) -> Tensor:
        """Pictures -> codes [n, N, D], each encoded by one process where they do so together."""
        if not self.together:
            return self.model.encode_pictures(pictures, crop)
        vision, share = self.model.vision_config, slice(process_rank(), None, process_count())
        codes = torch.zeros(len(pictures), vision.positions, vision.depth, dtype=torch.long)
        if pictures[share]:
            codes[share] = self.model.encode_pictures(pictures[share], crop)
        return summed(codes.to(self.model.device)).cpu()               # the others' rows are 0 here

    def __call__(self, pictures: list, crop: bool = False) -> list[Tensor]:
        """Pictures -> codes [N, D], int64. Raises UserError for a file that cannot be read."""
        self.encode(pictures, crop)
        result = []
        for picture in pictures:
            key = self.key(picture, crop)
            codes = self.codes[key]
            result.append(codes if isinstance(codes, Tensor) else codes.get_tensor(key).long())
        return result

    def flush(self) -> None:
        """Write the codes that are not on disk yet to a file of their own, as int32, whole or not at all."""
        if not self.folder or not self.new:
            return
        name = hashlib.sha256("".join(sorted(self.new)).encode()).hexdigest()[:16]
        writer = os.getpid()                                           # two runs may write the same codes
        if self.together:
            writer = summed(torch.tensor(writer * (process_rank() == 0), device=self.model.device)).item()
        file = self.folder / f"{name}-{writer}.safetensors"
        if process_rank() == 0 or not self.together:
            with write_whole(file) as path:
                write_tensors({key: self.codes[key].int() for key in self.new}, path)
        if self.together:
            wait_for_all()
        self.open_file(file)
        self.new = []


def keep_usable(samples: list[Sample], model: UnifiedModel, codes: CodeCache, left_out: LeftOut, room: int = 0
                ) -> Iterator[Sample]:
    """The samples whose pictures can be read and that fit the decoder's context, in their order.

    room: positions that an answer needs beside the row. The pictures' codes are in `codes` from here on.
    """
    context = model.decoder.config.context
    for start in range(0, len(samples), 16):             # their pictures are in memory together
        part = samples[start:start + 16]
        to_draw = [p for s in part if s.kind == "t2i" for p in s.answer_pictures]              # see `row_of`
        others = [p for s in part if s.kind != "t2i" for p in s.answer_pictures]
        codes.encode([p for s in part for p in s.prompt_pictures] + others)
        codes.encode(to_draw, crop=True)
        for sample in part:
            with left_out.guard(*sample.origin or ("", 0)):
                try:
                    length = len(row_of(sample, model, codes)[0])
                except UserError as error:
                    raise Broken("a picture cannot be read", error) from None
                if length + room > context:
                    detail = f"{length} positions" + (f" and an answer of {room}" if room else "")
                    raise Broken(f"longer than the decoder's context of {context}", detail)
                yield sample


MOST_HASHED = 10_000             # pictures that a hash of samples reads


def hash_samples(samples: list[Sample]) -> str:
    """A hash of samples: their texts and the content of their pictures, of very many pictures every n-th."""
    pictures = [p for s in samples for p in s.prompt_pictures + s.answer_pictures]
    return hash_files(pictures[::1 + len(pictures) // MOST_HASHED],
                      (f"{s.kind} {s.prompt} {s.answer}" for s in samples))


def row_of(sample: Sample, model: UnifiedModel, codes: CodeCache) -> tuple[Tensor, Tensor, Tensor]:
    """A sample -> tokens [T, D], is_image [T], mask [T, D]: True on the answer's decisions.

    Choice: pictures are resized to a square ignoring aspect, but text-to-image's are cropped to one, both as
    VILA-U does. A story's are all resized: pictures of its prompt and of its answer have to look alike.
    """
    t2i = sample.kind == "t2i"
    prompt = model.prompt(sample.prompt, codes(sample.prompt_pictures), t2i)
    answer = model.sequence(sample.answer, codes(sample.answer_pictures, crop=t2i))[1:]    # without its <s>
    row = prompt + answer
    decisions = row.is_image[:, None] | (torch.arange(row.tokens.shape[1]) == 0)       # D codes or 1 token
    decisions[:len(prompt)] = False
    return row.tokens, row.is_image, decisions


# ------------------------------------------------------------------------------------------------------------
# python data.py

def describe(text: str, pictures: list) -> str:
    """A prompt or an answer with the paths (or sizes) of its pictures."""
    names = [str(p) if isinstance(p, Path) else f"{p.shape[1]} x {p.shape[0]} pixels" for p in pictures]
    return "\n".join([text, *(f"    <image>: {name}" for name in names)])


def main() -> None:
    """Print counts by kind, the first sample of each, and how many records are left out for which reason."""
    config = parse_config(Config, names={"data": READERS})
    left_out = LeftOut()
    if config.data:
        samples = read_sources(config.data, "--data", PROMPT_READERS if config.prompts else READERS, left_out)
    else:
        rng = random.Random(config.seed)
        samples = {"interleaved": [toy_story(rng, 3)], "understanding": [toy_i2t(rng)], "t2i": [toy_t2i(rng)],
                   "words": [toy_words(rng, 3)]}
    for kind, of_kind in samples.items():
        print(f"\n{kind}: {len(of_kind):,} samples")
        for sample in of_kind[:1]:
            print("prompt:", describe(sample.prompt, sample.prompt_pictures))
            print("answer:", describe(sample.answer, sample.answer_pictures))
    for reason, count in left_out.reasons().items():
        print(f"\n{reason}: {count:,} records")


if __name__ == "__main__":
    run_main(main)
