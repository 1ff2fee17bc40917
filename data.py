"""TODO"""
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
from functools import partial
from pathlib import Path
from typing import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

import shapes
from common import UserError, open_tensors, read_picture, read_text, write_tensors
from model import UnifiedModel
from tokenizer import IMAGE_END, IMAGE_START, SPECIAL_TOKENS, THINK_END, THINK_START

# ------------------------------------------------------------------------------------------------------------
# One sample type; the toy world's samples

KINDS = ("interleaved", "understanding", "t2i")              # the hybrid mix, in the order of --mix


@dataclass
class Sample:
    """One supervised pair: a prompt with its pictures, an answer in written form with its pictures. `<image>` marks
    say where pictures go; a picture is uint8 [H, W, 3] or the path of a file."""
    prompt: str
    prompt_pictures: list
    answer: str = ""
    answer_pictures: list = field(default_factory=list)
    draw: bool = False               # text-to-image: the prompt ends in <im_start>
    kind: str = "interleaved"        # one of KINDS, or words
    origin: tuple = ()               # file, line and id of the record it was made from


def write_answer(steps: list[tuple[str, object]], fault: str | None = None, rng: random.Random | None = None
            ) -> tuple[str, list]:
    """Steps (text, picture) -> an answer in written form, <think>text</think><vis>IMAGE</vis> for each step, and its
    pictures; `fault` breaks the format at one step the way noisy data does."""
    parts = [[THINK_START, text, THINK_END, IMAGE_START, "<image>", IMAGE_END] for text, _ in steps]
    pictures = [picture for _, picture in steps]
    if fault:
        i = rng.randrange(len(parts))
        if fault == "no_image":
            del parts[i][3:], pictures[i]
        elif fault == "extra_text":
            parts[i].append(steps[i][0])
        else:
            del parts[i][{"no_think_open": 0, "no_think_close": 2, "no_vis_close": 5}[fault]]
    return "".join(piece for part in parts for piece in part) + "</s>", pictures


def t2i_sample(caption: str, picture, origin: tuple = ()) -> Sample:
    """Text to image: a caption, its picture."""
    return Sample(caption, [], f"<image>{IMAGE_END}</s>", [picture], draw=True, kind="t2i", origin=origin)


def toy_prompt(rng: random.Random, edits: int, split: str) -> Sample:
    """A prompt of the toy world, the answer left to the model."""
    prompt = shapes.sample_prompt(rng, edits, split)
    return Sample(prompt.text, [prompt.picture])


def toy_story(rng: random.Random, edits: int) -> Sample:
    """An interleaved story of the toy world, with the warm-up data's errors."""
    prompt = toy_prompt(rng, edits, "train")
    return Sample(prompt.prompt, prompt.prompt_pictures, *write_answer(*shapes.noisy_story(rng, prompt.prompt), rng))


def toy_words(rng: random.Random, edits: int) -> Sample:
    """The same task in words alone: stands for what a language model knows before it meets a picture."""
    prompt = toy_prompt(rng, rng.randint(1, edits + 1), "train").prompt
    captions = [shapes.caption(state) for state in shapes.states_of_prompt(prompt)[1:]]
    return Sample(prompt.replace(" <image>", ""), [], ", ".join(captions) + "</s>", kind="words")


def toy_t2i(rng: random.Random, edits: int = 0) -> Sample:
    """Text to image: a caption, its picture."""
    scene = rng.choice(shapes.SCENES)
    return t2i_sample(shapes.caption(scene), shapes.render(scene))


def toy_i2t(rng: random.Random, edits: int = 0) -> Sample:
    """Image to text: a picture and a question, the caption."""
    scene = rng.choice(shapes.SCENES)
    return Sample(f"<image> {I2T_QUESTION}", [shapes.render(scene)], f"{shapes.caption(scene)}</s>",
                  kind="understanding")
I2T_QUESTION = "what is it?"
PRETRAINING = {toy_words: 0.5, toy_t2i: 0.25, toy_i2t: 0.25}


# ------------------------------------------------------------------------------------------------------------
# Records of published files: what they lack, and what is left out
SHORTEST_CAPTION = 5             # letters; as a public JourneyDB pipeline has it
MARKS = re.compile("|".join(map(re.escape, ("<image>", "<s>", "</s>", "<unk>", *SPECIAL_TOKENS))))


class Broken(ValueError):
    """Why a record cannot be used: a reason that is the same for all of its kind, and its detail."""


class LeftOut:
    """Records that cannot be used: counted by file and reason, the first of each shown, listed with file, line and id.
    strict: the first one is the user's mistake (a prompt file of one's own is better mended)."""
    SHOWN, LISTED = 3, 1000          # of each file and reason: on the screen, in the list

    def __init__(self, strict: bool = False):
        self.strict, self.counts, self.list = strict, Counter(), []

    def __call__(self, file: Path, line: int, id: object, reason: str, detail: object = "", verdict: str = "left out"
                 ) -> None:
        said = f"{reason}: {detail}" if str(detail) else reason
        if self.strict:
            raise UserError(f"{file}, line {line}: {said}")
        self.counts[verdict, str(file), reason] += 1
        count = self.counts[verdict, str(file), reason]
        if count <= self.LISTED:
            self.list.append({"file": str(file), "line": line, "id": str(id), "reason": said, "verdict": verdict})
        if count <= self.SHOWN:
            where = f"{file}, line {line}" + f", {id}" * bool(str(id))
            tqdm.write(f"{verdict}: {where}: {said}{' (and so on)' * (count == self.SHOWN)}")

    @contextmanager
    def guard(self, file: Path, line: int, id: object = ""):
        """Around what is done with one record: Broken inside counts it, and it is passed over."""
        try:
            yield
        except Broken as broken:
            self(file, line, id, *broken.args)

    def reasons(self) -> dict[str, int]:
        """How many records for each reason, files together."""
        total = Counter()
        for (verdict, _, reason), count in self.counts.items():
            total[f"{verdict}, {reason}"] += count
        return dict(total)

    def total(self) -> int:
        return sum(count for (verdict, *_), count in self.counts.items() if verdict == "left out")


def records(file: Path, left_out: LeftOut) -> Iterator[tuple[int, object]]:
    """The records of a *.json file, a list or an object (then as (key, value)), or else of JSON lines, each with the
    line it starts at. A broken line is left out; raises UserError for a file that cannot be read to its end."""
    if file.suffix != ".json":
        try:
            with open(file, "rb") as lines:
                for number, line in enumerate(lines, 1):
                    with left_out.guard(file, number):
                        if line.strip():
                            yield number, writable(parse_json(line))
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error})")
        return
    text, at, number, counted, value_at = read_text(file), 0, 1, 0, json.JSONDecoder().raw_decode

    def mark(*expected: str) -> str:                                    # punctuation, and the space around it
        nonlocal at
        found = re.compile(r"\s*([\[\]{},:]?)\s*").match(text, at)
        if found[1] not in expected:
            raise ValueError(f"expected {' or '.join(expected)}, found {text[found.start(1):][:20]!r}")
        at = found.end()
        return found[1]
    try:
        end = {"[": "]", "{": "}"}[mark("[", "{")]
        while not text.startswith(end, at):
            number, counted, key = number + text.count("\n", counted, at), at, None
            if end == "}":
                key, at = value_at(text, at)
                mark(":")
            value, at = value_at(text, at)
            yield number, writable(value if key is None else (key, value))
            if mark(",", end) == end:
                break
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}, line {number}: not JSON from here on ({error})")


def parse_json(text: str | bytes) -> object:
    """A JSON value, or Broken."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise Broken("not JSON", f"{error}, in {text[:40]!r}")


def writable(value: object) -> object:
    """JSON may hold halves of characters (a cut emoji), which no file takes: they become question marks."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {writable(key): writable(of) for key, of in value.items()}
    return type(value)(map(writable, value)) if isinstance(value, (list, tuple)) else value


def id_of(record: object, key: str = "id") -> str:
    """What a record calls itself, for reports."""
    return str(record.get(key, "")) if isinstance(record, dict) else ""


def need(record: object, key: str, kind: type | tuple[type, ...]):
    """record[key], or Broken where it is missing or of another kind."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        raise Broken(f"{key} is missing, or of another kind than published", repr(value)[:40])
    return value


def need_text(record: object, key: str) -> str:
    """A text that is not empty, marks of ours taken out: data must not open pictures or end answers."""
    text = MARKS.sub(" ", need(record, key, str)).strip()
    if not text:
        raise Broken(f"{key} is empty")
    return text


def as_list(value: object) -> list:
    """What is published as one thing, a list of them, or nothing at all -> a list."""
    return value if isinstance(value, list) else [value] if value else []


def need_marks(text: str, pictures: list) -> None:
    """An `<image>` mark for each picture, or Broken."""
    if text.count("<image>") != len(pictures):
        raise Broken("<image> marks and pictures differ in number", f"{text.count('<image>')} and {len(pictures)}")


def picture_in(folder: Path, *names: object) -> Path:
    """The first of `names` that there is in a folder, or Broken."""
    for name in names:
        if not isinstance(name, str) or not name:
            raise Broken("the path of a picture is missing")
        if os.path.isfile(folder / name):                   # False for a path that no system would take, too
            return folder / name
    raise Broken("a picture is missing", str(folder / names[0])[:200])


def frame_in(frames: Path, video: str, name: str, second: float) -> Path:
    """FRAMES/<video>/<name>.jpg; else, where FRAMES/fps.txt tells the rate of a numbered dump (000001.jpg is second 0),
    the frame of that second. PNGs are taken as well."""
    names = [name]
    if (frames / "fps.txt").is_file():
        try:
            names.append(f"{int(second * float((frames / 'fps.txt').read_text())) + 1:06d}")
        except ValueError:
            raise UserError(f"{frames / 'fps.txt'}: expected the frames a second, a number")
    return picture_in(frames / video, *(name + suffix for name in names for suffix in (".jpg", ".jpeg", ".png")))


def file_in(path: Path, *names: str) -> Path:
    """The file itself, or the first of `names` that there is in a folder."""
    for file in [path] if path.is_file() else [path / name for name in names]:
        if file.is_file():
            return file
    raise UserError(f"{path}: expected {' or '.join(names)} there")


def files_in(path: Path, *patterns: str) -> list[Path]:
    """The file itself, or all that fit the patterns in a folder, by name."""
    files = [path] if path.is_file() else sorted({f for pattern in patterns for f in path.glob(pattern)})
    if not files:
        raise UserError(f"{path}: expected {' or '.join(patterns)} there")
    return files


# ------------------------------------------------------------------------------------------------------------
# The paper's sources: what is published, one reader each, all into `Sample`

# The paper's query templates (data figure); {text} and {question} come from the data.
EVENT_QUERY = ("In this task, you are given the first part of an event with both text and an image, and you need to "
               "complete the subsequent parts of the event by generating text and images that are natural continuation "
               "of the given first part. The input interleaved content is: <BEGIN> {text} <image>")
HOWTO_QUERY = ("In this task, you are given a multimodal question consisting of both text and an image. Your goal is "
               "to generate an interleaved text-image answer that demonstrates step-by-step multimodal reasoning. The "
               "answer should include both textual and relevant visual content to support your reasoning process. "
               "<BEGIN> {question} <image>")
NEXT_STEP_QUERY = "{question} Predict the subsequent step. The previous steps are: {text} <image>"
HOWTO_QUESTION = "What is done with the {name}, step by step?"     # ours: GenHowTo has a category, no question
STORY = 5                        # parts of a story: its prompt and up to four steps, as OpenStory++ cuts its own


def event_sample(parts: list[tuple[str, Path]], origin: tuple) -> Sample:
    """The first part of an event is the prompt, the others are the answer's steps."""
    (text, picture), *steps = parts
    return Sample(EVENT_QUERY.replace("{text}", text), [picture], *write_answer(steps), origin=origin)


def activitynet(path: Path, left_out: LeftOut) -> Iterator[Sample]:
    """ActivityNet Captions: train.json, {"v_ID": {"duration", "timestamps", "sentences"}}, or the flattened rows of its
    mirrors as a list. frames/<v_ID>/<segment>.jpg shows a segment, or else the middle of it in a numbered dump
    (see `frame_in`).

    Choice: segments overlap and stand in any order; they are sorted by their start and cut into stories of STORY."""
    file = file_in(path, "train.json", "train.jsonl")
    for line, entry in records(file, left_out):
        video, told = entry if isinstance(entry, tuple) else (None, entry)
        with left_out.guard(file, line, video or id_of(told, "video_id")):
            if video is None:
                video, sentences = need(told, "video_id", str), need(told, "en_captions", list)
                starts, stops = need(told, "captions_starts", list), need(told, "captions_ends", list)
                spans = list(itertools.zip_longest(starts, stops))
            else:
                sentences, spans = need(told, "sentences", list), need(told, "timestamps", list)
            duration = need(told, "duration", (int, float)) if "duration" in told else math.inf
            if len(spans) != len(sentences):
                raise Broken("timestamps and sentences differ in number", f"{len(spans)} and {len(sentences)}")
            parts = []
            for i, (span, sentence) in enumerate(zip(spans, sentences)):
                with left_out.guard(file, line, f"{video}, segment {i}"):
                    text = need_text({"sentence": sentence}, "sentence")
                    if not (isinstance(span, (list, tuple)) and len(span) == 2
                            and all(isinstance(t, (int, float)) and math.isfinite(t) for t in span)):
                        raise Broken("a timestamp is no pair of seconds", span)
                    start, stop = max(0, span[0]), min(duration, span[1])
                    if not start < stop:
                        raise Broken("a segment is empty", span)
                    parts.append((start, stop, i, text))
            parts.sort()
            parts = [(text, frame_in(file.parent / "frames", video, str(i), (start + stop) / 2))
                     for start, stop, i, text in parts]
            for first in range(0, len(parts), STORY):
                if len(parts[first:first + STORY]) > 1:
                    yield event_sample(parts[first:first + STORY], (file, line, video))
                else:
                    left_out(file, line, video, "a lone part is no story")


def genhowto(path: Path, left_out: LeftOut, next_step: bool = False) -> Iterator[Sample]:
    """GenHowTo: actions.*.txt and states.*.txt, joined by FILENAME, or triples of one's own with the same columns
    (*.csv). frames/<VID_ID>/<second>.jpg shows a state, or see `frame_in`.

    One row is two steps: the initial state in the prompt, then the action and the final state. next_step, for RL: the
    action stands in the prompt as well, and the final state is asked for."""
    needed = ("VID_ID", "DS_CAT_NAME", "FRAME_S1", "FRAME_AC", "FRAME_S2", "FILENAME")
    prompts = ("FRAME_AC_PROMPT", "FRAME_S2_PROMPT")
    rows, frames = {}, (path if path.is_dir() else path.parent) / "frames"
    for file in files_in(path, "actions*.txt", "states*.txt", "*.csv"):
        try:
            with open(file, encoding="utf-8-sig", newline="") as lines:
                table = csv.DictReader(lines)
                missing = [name for name in needed if name not in (table.fieldnames or ())]
                if missing:
                    raise UserError(f"{file}, line 1: expected a header with the column {missing[0]}")
                for row in table:
                    with left_out.guard(file, table.line_num, row["VID_ID"] or ""):
                        name = need_text(row, "FILENAME")
                        told = {key: row[key] for key in (*needed, *prompts) if row.get(key)}
                        known = rows.setdefault(name, {"origin": (file, table.line_num, row["VID_ID"])})
                        if any(known.get(key, told[key]) != told[key] for key in told if key in needed) \
                                or any(key in known for key in told if key in prompts):
                            raise Broken("FILENAME is there twice", name)
                        known.update(told)
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise UserError(f"{file}: cannot be read ({error})")
    for row in rows.values():
        with left_out.guard(*row["origin"]):
            action, state = (need_text(row, name) for name in prompts)
            told = [need_text(row, name) for name in ("FRAME_S1", "FRAME_AC", "FRAME_S2")]
            if not all(re.fullmatch(r"\d+(\.\d+)?", text) for text in told):
                raise Broken("a frame's second is no number", told)
            seconds = [float(text) for text in told]
            if sorted(seconds) != seconds:
                raise Broken("initial, action and final frame are not in order", seconds)
            first, middle, last = (frame_in(frames, need_text(row, "VID_ID"), f"{t:g}", t) for t in seconds)
            question = HOWTO_QUESTION.replace("{name}", need_text(row, "DS_CAT_NAME"))
            if next_step:
                query = NEXT_STEP_QUERY.replace("{question}", question).replace("{text}", action)
                yield Sample(query, [middle], *write_answer([(state, last)]), origin=row["origin"])
            else:
                query = HOWTO_QUERY.replace("{question}", question)
                yield Sample(query, [first], *write_answer([(action, middle), (state, last)]), origin=row["origin"])


def openstory(path: Path, left_out: LeftOut) -> Iterator[Sample]:
    """OpenStory++: rows {"__key__", "json": {"caption"}} of its stories as *.jsonl or *.json; the frame of a row is
    frames/<video>/<key>.jpg. A story is what its makers made one: neighbours of one video, STORY of them at most. Rows
    whose key holds _override_ repeat their predecessor's frame and caption; they count for the cut, then they go."""
    root = path if path.is_dir() else path.parent

    def rows() -> Iterator[tuple]:
        for file in files_in(path, "*.jsonl", "*.json"):
            for line, record in records(file, left_out):
                with left_out.guard(file, line):
                    key = need(record, "__key__", str)
                    yield key.rpartition("_override_")[2], key, file, line, record
    for video, same in itertools.groupby(rows(), lambda row: row[0][:11]):           # an id may hold _ and -
        same = sorted(same)                                                          # by own key: in time order
        for story in (same[i:i + STORY] for i in range(0, len(same), STORY)):
            own, _, file, line, _ = story[0]
            with left_out.guard(file, line, own):
                parts = []
                for _, key, *where, record in story:
                    if "_override_" in key:
                        left_out(*where, key, "repeats another frame (_override_)")
                        continue
                    told = need(record, "json", (dict, str))
                    caption = need_text(parse_json(told) if isinstance(told, str) else told, "caption")
                    parts.append((caption, picture_in(root, f"frames/{video}/{key}.jpg")))
                if len(parts) < 2:
                    raise Broken("a lone part is no story")
                yield event_sample(parts, (file, line, own))


def emova(path: Path, left_out: LeftOut) -> Iterator[Sample]:
    """EMOVA, and any other set of LLaVA conversations: annotations/*.json or *.jsonl, pictures relative to the folder.
    Speech subsets are passed over.

    Choice: a sample for each reply, what was said before it in its prompt (vicuna_v1's turns): Eq. (1) then counts
    every reply once."""
    root = path if path.is_dir() else path.parent.parent if path.parent.name == "annotations" else path.parent
    for file in files_in(path, "annotations/*.json", "annotations/*.jsonl", "*.json", "*.jsonl"):
        if re.search("asr|tts|speech", file.stem, re.IGNORECASE):
            left_out(file, 1, file.stem, "a speech subset")
            continue
        for line, record in records(file, left_out):
            with left_out.guard(file, line, id_of(record)):
                turns = need(record, "conversations", list)
                pictures = [picture_in(root, name) for name in as_list(record.get("image"))]
                said = []
                for turn, speaker in zip(turns, itertools.cycle(("human", "gpt"))):
                    if need(turn, "from", str) != speaker:
                        raise Broken("human and gpt do not take turns", turn["from"])
                    text = need(turn, "value", str)
                    pieces = text.split("<image>") if speaker == "human" else [text]
                    said.append("<image>".join(MARKS.sub(" ", piece) for piece in pieces).strip())
                if len(said) < 2 or len(said) % 2 or not all(said):
                    raise Broken("a turn is missing or empty")
                need_marks("".join(said), pictures)
                prompt = ""
                for question, reply in zip(said[::2], said[1::2]):
                    prompt += question
                    yield Sample(prompt, pictures[:prompt.count("<image>")], reply + "</s>", kind="understanding",
                                 origin=(file, line, id_of(record)))
                    prompt += f" ASSISTANT: {reply}</s>USER: "


def journeydb(path: Path, left_out: LeftOut) -> Iterator[Sample]:
    """JourneyDB: train/train_anno_realease_repath.jsonl (spelled so; the paths in train_anno.jsonl are others than the
    archives') and train/imgs/<folder>/. A partial download is fine.

    Choice: of the pictures of one prompt the first: many prompts were drawn from several times."""
    file = file_in(path, "train/train_anno_realease_repath.jsonl", "train_anno_realease_repath.jsonl",
                   "valid/valid_anno_repath.jsonl", "valid_anno_repath.jsonl")
    folders = {f.name for f in (file.parent / "imgs").glob("*") if f.is_dir()}
    seen = set()
    for line, record in records(file, left_out):
        with left_out.guard(file, line, id_of(record, "img_path")):
            name = need(record, "img_path", str).removeprefix("./")
            if name.partition("/")[0] not in folders:
                raise Broken("its folder of pictures is not there", "imgs/" + name.partition("/")[0])
            told = record.get("Task2") if isinstance(record.get("Task2"), dict) else {}
            prompt = record.get("prompt") if isinstance(record.get("prompt"), str) else ""
            for text in (told.get("Caption"), re.sub(r"\s*--\w.*", "", prompt, flags=re.DOTALL).rstrip(" ,")):
                text = MARKS.sub(" ", text).strip() if isinstance(text, str) else ""
                if len(text) >= SHORTEST_CAPTION:
                    break
            else:
                raise Broken(f"no caption or prompt of {SHORTEST_CAPTION} letters")
            picture = picture_in(file.parent / "imgs", name)
            if (prompt or text) in seen:
                raise Broken("another picture of a prompt that was there before")
            seen.add(prompt or text)
            yield t2i_sample(text, picture, (file, line, name))


def read_jsonl(path: Path, left_out: LeftOut, with_steps: bool = True) -> Iterator[Sample]:
    """Our own JSON lines: {"prompt": text, "images": [path, ...], "steps": [{"text", "image"}, ...]}. An `<image>` mark
    in the prompt for each of "images"; paths relative to the file. Prompts alone need no steps."""
    for line, record in records(path, left_out):
        with left_out.guard(path, line, id_of(record)):
            prompt = need(record, "prompt", str)
            if not prompt.strip():
                raise Broken("the prompt is empty")
            names = [] if record.get("images") is None else need(record, "images", list)
            need_marks(prompt, names)
            pictures = [picture_in(path.parent, name) for name in names]
            steps = [(need_text(step, "text"), picture_in(path.parent, need(step, "image", str)))
                     for step in (need(record, "steps", list) if with_steps else ())]
            if with_steps and not steps:
                raise Broken("no step in the answer")
            answer = write_answer(steps) if with_steps else ()
            yield Sample(prompt, pictures, *answer, origin=(path, line, id_of(record)))
READERS = {                      # name in --data -> reader, kind of its samples
    "activitynet": (activitynet, "interleaved"),
    "genhowto": (genhowto, "interleaved"),
    "openstory": (openstory, "interleaved"),
    "jsonl": (read_jsonl, "interleaved"),
    "emova": (emova, "understanding"),
    "journeydb": (journeydb, "t2i"),
}
PROMPT_READERS = READERS | {"genhowto": (partial(genhowto, next_step=True), "interleaved"),
                            "jsonl": (partial(read_jsonl, with_steps=False), "interleaved")}


def parse_sources(told: str, flag: str) -> list[tuple[str, Path]]:
    """NAME=DIR,NAME=DIR -> (name, path) each. Raises UserError for a name that has no reader or a path that is not."""
    sources = []
    for part in told.split(","):
        name, _, path = part.partition("=")
        if name not in READERS:
            near = difflib.get_close_matches(name, READERS, 1)
            raise UserError(f"{flag} {part}: expected NAME=DIR with NAME one of {', '.join(READERS)}"
                            + (f"; did you mean {near[0]}?" if near else ""))
        if not path or not Path(path).exists():
            raise UserError(f"{flag} {part}: there is no {path or 'path'}")
        sources.append((name, Path(path)))
    return sources


def read_sources(told: str, flag: str, readers: dict, left_out: LeftOut) -> dict[str, list[Sample]]:
    """All samples of NAME=DIR,NAME=DIR by kind, and a line of counts a source. Raises UserError for one without any."""
    samples = {kind: [] for kind in KINDS}
    for name, path in parse_sources(told, flag):
        reader, kind = readers[name]
        before = left_out.total()
        found = list(tqdm(reader(path, left_out), desc=f"reading {name}", unit=" samples"))
        tqdm.write(f"{name:12} {kind:14} {len(found):9,} samples, {left_out.total() - before:,} records left out")
        if not found:
            raise UserError(f"{flag} {name}={path}: no usable record in it")
        samples[kind] += found
    return samples


def read_prompts(path: Path) -> list[Sample]:
    """Prompts of one's own: one {"prompt": text, "images": [path, ...]} a line, paths relative to the file. Raises
    UserError, naming file and line, for whatever is broken."""
    path = Path(path)
    samples = list(read_jsonl(path, LeftOut(strict=True), with_steps=False))
    for sample in samples:
        for picture in sample.prompt_pictures:
            read_picture(picture, f"{path}, line {sample.origin[1]}")
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
    """A reader of records -> a reader of questions with ids of their own: of two the first counts."""
    def read(path: Path, left_out: LeftOut) -> Iterator[Question]:
        seen = set()
        for question in reader(path, left_out):
            with left_out.guard(*question.origin):
                if question.id in seen:
                    raise Broken("an id that was there before")
                seen.add(question.id)
                yield question
    return read


MMIE_GROUPS = ("SA", "PBL", "MSR")         # looked for in an id in this order
MMIE_PICTURES = 4                          # a question with more is left out, as the official loader does


def segments_of(value: object) -> list[dict]:
    """A question or an answer in MMIE's schema, [{"text": str | null, "image": path | null}], or a plain text -> the
    schema with both keys in every segment."""
    value = [{"text": value}] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(s, dict) for s in value):
        raise Broken("question or answer is no list of {text, image}", repr(value)[:40])
    segments = [{**s, "text": s.get("text"), "image": s.get("image")} for s in value]
    for segment in segments:
        if not all(isinstance(segment[key], (str, type(None))) for key in ("text", "image")):
            raise Broken("text or image is neither a text nor null", repr(segment)[:40])
    return segments


@question_reader
def mmie(path: Path, left_out: LeftOut) -> Iterator[Question]:
    """data.json and images/: {"id", "question": [{"text", "image"}], "gt_answer": the same}, unknown keys kept. The
    category stands in the id. A record of the model "gt" may hold the reference as its answer. More than four pictures
    are left out, as the official loader does."""
    file = file_in(path, "data.json")
    for line, record in records(file, left_out):
        with left_out.guard(file, line, id_of(record)):
            id, words, pictures = need(record, "id", str), [], []
            group = next((name for name in MMIE_GROUPS if name in id), None)
            if group is None:
                raise Broken("its id names no category (SA, PBL or MSR)")
            asked = segments_of(record.get("question"))
            references = [segments_of(record.get("gt_answer") or [{}])]
            if record.get("model") == "gt":
                references.append(segments_of(record.get("answer") or [{}]))
            reference = next((r for r in references if r[0]["text"]), references[0])
            if group == "MSR" and not reference[0]["text"]:
                left_out(file, line, id, "a problem without its right answer", verdict="noted")
            for segment in asked:
                if segment["text"]:
                    words.append(MARKS.sub(" ", segment["text"]).strip())
                if segment["image"]:
                    if Path(segment["image"]).is_absolute() or ".." in Path(segment["image"]).parts:
                        raise Broken("a picture's path leaves the folder", segment["image"])
                    pictures.append(picture_in(file.parent, segment["image"]))
                    words.append("<image>")
            if len(pictures) > MMIE_PICTURES:
                raise Broken(f"more than {MMIE_PICTURES} pictures", len(pictures))
            if not words:
                raise Broken("the question is empty")
            yield Question(" ".join(words), pictures, id=id, group=group, origin=(file, line, id),
                           record={**record, "question": asked, "gt_answer": reference})


@question_reader
def interleavedbench(path: Path, left_out: LeftOut) -> Iterator[Question]:
    """interleaved_bench.json and the unzipped folders of pictures beside it (or in zipped_images/): LLaVA
    conversations. The first pictures are the human turn's, the others the reference's."""
    file = file_in(path, "interleaved_bench.json")
    for line, record in records(file, left_out):
        with left_out.guard(file, line, id_of(record)):
            if not isinstance(record, dict) or not isinstance(record.get("id"), (str, int)):
                raise Broken("id is missing, or of another kind than published")
            id, task = str(record["id"]), need(record, "task_name", str)
            turns = record.get("conversations") if isinstance(record.get("conversations"), list) else []
            turns = [turn for turn in turns if isinstance(turn, dict)] or [{}]
            text = next((t for t in (turns[0].get("value"), record.get("instruction"), turns[0].get("instruction"))
                         if isinstance(t, str) and t.strip()), None)
            if text is None:
                raise Broken("neither a human turn nor an instruction")
            names = as_list(record.get("image"))
            replies = [str(turn.get("value")) for turn in turns[1:]]
            marks = text.count("<image>")
            if marks > len(names) or replies and marks + "".join(replies).count("<image>") != len(names):
                left_out(file, line, id, "marks and pictures differ in number, their common prefix is used",
                         f"{marks} marks in the prompt, {len(names)} pictures in all", verdict="noted")
            pieces = [MARKS.sub(" ", piece) for piece in text.split("<image>")]
            shown = min(marks, len(names))
            prompt = "<image>".join(pieces[:shown + 1]) + " ".join(pieces[shown + 1:])
            pictures = [picture_in(file.parent, name, f"zipped_images/{name}") for name in names[:shown]]
            yield Question(prompt.strip(), pictures, id=id, group=task, record=record, origin=(file, line, id))


# -- kept abilities: single tasks of one's own choice, before and after

@question_reader
def understanding(path: Path, left_out: LeftOut) -> Iterator[Question]:
    """JSON lines {"id", "image": path or [paths], "question", "answer": text or [texts]}, paths relative to the file.
    Pictures whose `<image>` marks the question lacks come first."""
    file = file_in(path, "questions.jsonl")
    for line, record in records(file, left_out):
        with left_out.guard(file, line, id_of(record)):
            text = need(record, "question", str).strip()
            accepted = record.get("answer", record.get("answers"))
            accepted = accepted if isinstance(accepted, list) else [accepted]
            if not text or not accepted or not all(isinstance(a, str) for a in accepted):
                raise Broken("a question or its answer is missing")
            pictures = [picture_in(file.parent, name) for name in as_list(record.get("image", record.get("images")))]
            if "<image>" not in text:
                text = "<image> " * len(pictures) + text
            need_marks(text, pictures)
            id = str(record.get("id", line))
            yield Question(text, pictures, id=id, record={**record, "accepted": accepted}, origin=(file, line, id))


@question_reader
def captions(path: Path, left_out: LeftOut) -> Iterator[Question]:
    """A caption a line (*.txt), or records {"prompt"} (*.jsonl, *.json)."""
    file = file_in(path, "captions.txt", "captions.jsonl")
    lines = records(file, left_out) if file.suffix != ".txt" else (
        (n, {"prompt": text}) for n, text in enumerate(read_text(file).split("\n"), 1) if text.strip())
    for line, record in lines:
        with left_out.guard(file, line):
            yield Question(need_text(record, "prompt"), [], draw=True, kind="t2i", id=str(line), record=record,
                           origin=(file, line, ""))


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
    """Pictures -> codes, each distinct picture encoded once (the image tokenizer is fixed by now).

    With a folder the codes stay on disk for later runs, in FOLDER/<image tokenizer>/*.safetensors, under the hash of
    the picture file's bytes; `keep` writes what is new."""
    AT_ONCE = 4096               # codes a file

    def __init__(self, model: UnifiedModel, folder: Path | None = None):
        self.model, self.folder = model, folder and folder / fingerprint(model.vision)[:16]
        self.known, self.on_disk, self.names, self.unreadable, self.encoded = {}, {}, {}, {}, 0
        for file in sorted(self.folder.glob("*.safetensors")) if folder else ():
            self._open(file)

    def _open(self, file: Path) -> None:
        tensors = open_tensors(file)
        self.on_disk.update(dict.fromkeys(tensors.keys(), tensors))

    def key(self, picture, crop: bool) -> str:
        """The name a picture's codes go by. Paths are read once, then remembered."""
        if isinstance(picture, Path):
            if picture not in self.names:
                self.names[picture] = hashlib.sha256(picture.read_bytes()).hexdigest()[:32]
            name = self.names[picture]
        else:
            name = hashlib.sha256(f"{picture.shape}".encode() + picture.tobytes()).hexdigest()[:32]
        return name + "-cropped" * crop

    def encode(self, pictures: list, crop: bool = False) -> None:
        """Encode what is new. A file that cannot be read goes into `unreadable` with the reason."""
        new = {}
        for picture in pictures:
            try:
                key = self.key(picture, crop)
                if key not in self.known and key not in self.on_disk and key not in new:
                    new[key] = read_picture(picture, "a picture") if isinstance(picture, Path) else picture
            except (UserError, OSError) as error:
                self.unreadable[picture] = str(error)
        if new:
            self.known.update(zip(new, self.model.encode_pictures(list(new.values()), crop)))
            self.encoded += len(new)
        if len(self.known) >= self.AT_ONCE:
            self.flush()

    def __call__(self, pictures: list, crop: bool = False) -> list[Tensor]:
        """Pictures -> codes [N, D] each. Raises UserError for a file that cannot be read."""
        self.encode(pictures, crop)
        for picture in pictures:
            if isinstance(picture, Path) and picture in self.unreadable:
                raise UserError(self.unreadable[picture])
        keys = [self.key(picture, crop) for picture in pictures]
        return [self.known[key] if key in self.known else self.on_disk[key].get_tensor(key).long() for key in keys]

    def flush(self) -> None:
        """Write the codes that are not on disk yet, whole or not at all, as int32."""
        if not self.folder or not self.known:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / (hashlib.sha256("".join(sorted(self.known)).encode()).hexdigest()[:16] + ".safetensors")
        half = file.with_name(f"{file.stem}.{os.getpid()}.half")
        write_tensors({key: codes.int() for key, codes in self.known.items()}, half)
        half.replace(file)
        self._open(file)
        self.known = {}


def keep_usable(samples: list[Sample], model: UnifiedModel, codes: CodeCache, left_out: LeftOut, room: int = 0
           ) -> Iterator[Sample]:
    """The samples whose pictures can be read and that fit the decoder's context with `room` positions to spare, in
    their order; their codes are known from here on."""
    context = model.decoder.config.context
    for start in range(0, len(samples), 16):             # their pictures are in memory together
        part = samples[start:start + 16]
        codes.encode([p for s in part for p in s.prompt_pictures + s.answer_pictures * (not s.draw)])
        codes.encode([p for s in part if s.draw for p in s.answer_pictures], crop=True)
        for sample in part:
            with left_out.guard(*sample.origin or ("", 0)):
                for picture in sample.prompt_pictures + sample.answer_pictures:
                    if isinstance(picture, Path) and picture in codes.unreadable:
                        raise Broken("a picture cannot be read", codes.unreadable[picture])
                length = len(row_of(sample, model, codes)[0])
                if length + room > context:
                    raise Broken(f"longer than the decoder's context of {context}", f"{length} positions"
                                 + f" and an answer of {room}" * (room > 0))
                yield sample


def row_of(sample: Sample, model: UnifiedModel, codes: CodeCache) -> tuple[Tensor, Tensor, Tensor]:
    """A sample -> tokens [T, D], is_image [T], mask [T, D]: True on the answer's decisions.

    Choice: pictures are squashed to the square, VILA-U's "resize", but for text-to-image: there they are cropped, as
    VILA-U does with what it learns to draw. In a story, given and drawn pictures have to look alike."""
    prompt = model.prompt(sample.prompt, codes(sample.prompt_pictures), sample.draw)
    answer = model.sequence(sample.answer, codes(sample.answer_pictures, sample.draw))[1:]     # without its <s>
    row = prompt + answer
    decisions = row.is_image[:, None] | (torch.arange(row.tokens.shape[1]) == 0)               # D codes or one token
    decisions[:len(prompt)] = False
    return row.tokens, row.is_image, decisions
