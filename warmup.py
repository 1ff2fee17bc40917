"""Warm-up: a model that can read pictures and draw them learns to do both in turn (paper, Sec. 3.1, Eq. 1).

    1 image tokenizer   pictures -> residual codes -> pictures, then fixed             (VILA-U brings its own)
    2 pretraining       edits in words, text-to-image, image-to-text; never interleaved (stands for VILA-U's own)
    3 warm-up           noisy interleaved stories mixed with the two single tasks, so that nothing is forgotten

The loss of stages 2 and 3 is Eq. (1): the negative log-likelihood of every answer token, text or image code alike.
Stage 3 learns from the toy world, or from the published files of the paper's own sources (--data, see READERS).

    python warmup.py          # two CPU cores: 3 minutes -> out/warmup/ (policy/, samples/, metrics.jsonl, report.html)
    python warmup.py --preset paper --out out/warmup-7b \
        --data activitynet=DIR,genhowto=DIR,openstory=DIR,emova=DIR,journeydb=DIR   # stage 3, QLoRA on VILA-U 7B (GPU)
"""
import base64
import csv
import difflib
import hashlib
import io
import itertools
import json
import math
import os
import platform
import random
import re
import sys
import textwrap
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Callable, Iterator

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import shapes
from model import (DecoderConfig, DepthConfig, UnifiedModel, chat, load, load_training, open_tensors, save, train_only,
                   write_tensors)
from rewards import RulesText, RulesVisual, Scores, judge, parse_weights
from tokenizer import (BYTE, CONTROL, IMAGE_END, IMAGE_START, NORMAL, SPACE, SPECIAL_TOKENS, THINK_END, THINK_START,
                       UNKNOWN, Answer, ImageTokenizer, TextTokenizer, UserError, VisionConfig, pad, parse_config,
                       pick_device, read_picture, run_main, write_field)


@dataclass
class Config:
    out: str = "out/warmup"          # run directory
    seed: int = 0                    # of weights and data
    device: str = "auto"             # cpu, cuda, mps; auto takes the best there is
    edits: int = 3                   # edits a story: the answer has as many steps
    tokenizer_steps: int = 500       # stage 1: optimizer steps
    pretrain_steps: int = 400        # stage 2
    warmup_steps: int = 360          # stage 3
    batch: int = 48                  # samples a step of stages 2 and 3
    lr: float = 2e-3                 # peak learning rate of stage 2
    warmup_lr: float = 1e-3          # peak learning rate of stage 3
    data: str = ""                   # stage 3 from files: NAME=DIR,NAME=DIR (see READERS); empty: the toy world
    mix: str = "2,1,1"               # ratio of interleaved, understanding and text-to-image samples in stage 3
    cache: str = "out/codes"         # where the codes of --data's pictures are kept for later runs
    loss: str = "eq1"                # eq1: mean over all decisions; official: text mean + image mean, as VILA-U trains
    save_every: int = 100            # steps between checkpoints
    model: str = ""                  # start from this checkpoint (folder or hub id): stage 3 alone; empty: all stages
    micro_batch: int = 48            # samples a forward pass; changes memory, never the gradient
    lora_rank: int = 0               # train adapters of this rank on the decoder's linear layers; 0: the whole policy
    lora_alpha: float = 16.0         # adapters are scaled by alpha / rank
    quantize: str = "none"           # nf4: the frozen base in 4 bits (QLoRA)
    checkpointing: bool = False      # recompute layers in the backward pass: less memory, about a third more time
    preset: str = ""                 # paper: the paper's settings on VILA-U 7B, see PAPER; flags given beside it win


# --preset paper: what the paper states is marked so, the rest is ours and fits one GPU (the paper's QLoRA variant).
PAPER = dict(
    model="mit-han-lab/vila-u-7b-256",                            # paper, 256 x 256 pictures
    mix="0.3,1,1",                                                # paper: 0.3M interleaved, 1M and 1M others
    lora_rank=64, lora_alpha=16.0, quantize="nf4", checkpointing=True,                         # ours
    warmup_steps=3000, batch=64, micro_batch=2, warmup_lr=1e-4, save_every=100,                # ours
)


# ---------------------------------------------------------------------------------------------------------------------
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


def written(steps: list[tuple[str, object]], fault: str | None = None, rng: random.Random | None = None
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


def drawing(caption: str, picture, origin: tuple = ()) -> Sample:
    """Text to image: a caption, its picture."""
    return Sample(caption, [], f"<image>{IMAGE_END}</s>", [picture], draw=True, kind="t2i", origin=origin)


def toy_prompt(rng: random.Random, edits: int, split: str) -> Sample:
    """A prompt of the toy world, the answer left to the model."""
    prompt = shapes.sample_prompt(rng, edits, split)
    return Sample(prompt.text, [prompt.picture])


def story_sample(rng: random.Random, edits: int) -> Sample:
    """An interleaved story of the toy world, with the warm-up data's errors."""
    prompt = toy_prompt(rng, edits, "train")
    return Sample(prompt.prompt, prompt.prompt_pictures, *written(*shapes.noisy_story(rng, prompt.prompt), rng))


def words_sample(rng: random.Random, edits: int) -> Sample:
    """The same task in words alone: stands for what a language model knows before it meets a picture."""
    prompt = toy_prompt(rng, rng.randint(1, edits + 1), "train").prompt
    captions = [shapes.caption(state) for state in shapes.states_of_prompt(prompt)[1:]]
    return Sample(prompt.replace(" <image>", ""), [], ", ".join(captions) + "</s>", kind="words")


def t2i_sample(rng: random.Random, edits: int = 0) -> Sample:
    """Text to image: a caption, its picture."""
    scene = rng.choice(shapes.SCENES)
    return drawing(shapes.caption(scene), shapes.render(scene))


def i2t_sample(rng: random.Random, edits: int = 0) -> Sample:
    """Image to text: a picture and a question, the caption."""
    scene = rng.choice(shapes.SCENES)
    return Sample(f"<image> {I2T_QUESTION}", [shapes.render(scene)], f"{shapes.caption(scene)}</s>",
                  kind="understanding")


I2T_QUESTION = "what is it?"
PRETRAINING = {words_sample: 0.5, t2i_sample: 0.25, i2t_sample: 0.25}


def toy_batches(shares: dict, config: Config, stage: str) -> Callable[[int], list[Sample]]:
    """{sample function: share} -> the batch of every step, a function of seed, stage and step alone: a resumed run sees
    what the uninterrupted one does."""
    def batch(step: int) -> list[Sample]:
        rng = random.Random(f"{config.seed}/{stage}/{step}")
        return [kind(rng, config.edits) for kind in rng.choices(list(shares), list(shares.values()), k=config.batch)]
    return batch


# ---------------------------------------------------------------------------------------------------------------------
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


def read_text(file: Path) -> str:
    """A UTF-8 file, or UserError."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})")


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


def listed(value: object) -> list:
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


def event(parts: list[tuple[str, Path]], origin: tuple) -> Sample:
    """The first part of an event is the prompt, the others are the answer's steps."""
    (text, picture), *steps = parts
    return Sample(EVENT_QUERY.replace("{text}", text), [picture], *written(steps), origin=origin)


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
                    yield event(parts[first:first + STORY], (file, line, video))
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
                yield Sample(query, [middle], *written([(state, last)]), origin=row["origin"])
            else:
                query = HOWTO_QUERY.replace("{question}", question)
                yield Sample(query, [first], *written([(action, middle), (state, last)]), origin=row["origin"])


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
                yield event(parts, (file, line, own))


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
                pictures = [picture_in(root, name) for name in listed(record.get("image"))]
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
            yield drawing(text, picture, (file, line, name))


def plain(path: Path, left_out: LeftOut, with_steps: bool = True) -> Iterator[Sample]:
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
            answer = written(steps) if with_steps else ()
            yield Sample(prompt, pictures, *answer, origin=(path, line, id_of(record)))


READERS = {                      # name in --data -> reader, kind of its samples
    "activitynet": (activitynet, "interleaved"),
    "genhowto": (genhowto, "interleaved"),
    "openstory": (openstory, "interleaved"),
    "jsonl": (plain, "interleaved"),
    "emova": (emova, "understanding"),
    "journeydb": (journeydb, "t2i"),
}
PROMPT_READERS = READERS | {"genhowto": (partial(genhowto, next_step=True), "interleaved"),
                            "jsonl": (partial(plain, with_steps=False), "interleaved")}


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
    samples = list(plain(path, LeftOut(strict=True), with_steps=False))
    for sample in samples:
        for picture in sample.prompt_pictures:
            read_picture(picture, f"{path}, line {sample.origin[1]}")
    if not samples:
        raise UserError(f"--prompts {path}: no prompt in it")
    return samples


# ---------------------------------------------------------------------------------------------------------------------
# Samples -> batches: image codes, the mix, little padding

def fingerprint(module: torch.nn.Module) -> str:
    """A hash of a module's weights, types and names."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


class Codes:
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

    def learn(self, pictures: list, crop: bool = False) -> None:
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
            self.known.update(zip(new, self.model.codes(list(new.values()), crop)))
            self.encoded += len(new)
        if len(self.known) >= self.AT_ONCE:
            self.keep()

    def __call__(self, pictures: list, crop: bool = False) -> list[Tensor]:
        """Pictures -> codes [N, D] each. Raises UserError for a file that cannot be read."""
        self.learn(pictures, crop)
        for picture in pictures:
            if isinstance(picture, Path) and picture in self.unreadable:
                raise UserError(self.unreadable[picture])
        keys = [self.key(picture, crop) for picture in pictures]
        return [self.known[key] if key in self.known else self.on_disk[key].get_tensor(key).long() for key in keys]

    def keep(self) -> None:
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


def usable(samples: list[Sample], model: UnifiedModel, codes: Codes, left_out: LeftOut, room: int = 0
           ) -> Iterator[Sample]:
    """The samples whose pictures can be read and that fit the decoder's context with `room` positions to spare, in
    their order; their codes are known from here on."""
    context = model.decoder.config.context
    for start in range(0, len(samples), 16):             # their pictures are in memory together
        part = samples[start:start + 16]
        codes.learn([p for s in part for p in s.prompt_pictures + s.answer_pictures * (not s.draw)])
        codes.learn([p for s in part if s.draw for p in s.answer_pictures], crop=True)
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


def published_batches(samples: dict[str, list[Sample]], model: UnifiedModel, run: "Run", config: Config, codes: Codes,
                      left_out: LeftOut) -> tuple[Callable[[int], list[Sample]], list[Sample]]:
    """Samples of files by kind -> the batch of every step, and the interleaved samples. The kinds are drawn in the
    ratio --mix, the samples of a kind in a shuffled order that starts over when it is through: a function of seed and
    step alone.

    Only pictures that the run will show are encoded, now; broken ones are left out here, before training. Counts and
    what was left out go to data.json."""
    weights = parse_weights(config.mix, "--mix", ", ".join(KINDS))
    order = random.Random(f"{config.seed}/mix").choices(KINDS, weights, k=config.warmup_steps * config.batch)
    kept, counts, seen, places = {kind: [] for kind in KINDS}, {}, Counter(), []
    for kind in (kind for kind in KINDS if kind in order):
        draws = order.count(kind)
        pool = random.Random(f"{config.seed}/{kind}").sample(samples[kind], len(samples[kind]))
        found = itertools.islice(usable(pool, model, codes, left_out), draws)
        kept[kind] = list(tqdm(found, desc=f"codes of {kind} samples", total=min(draws, len(pool))))
        if not kept[kind]:
            raise UserError(f"--data: no usable {kind} sample is left, but --mix {config.mix} asks for some")
        counts[kind] = {"samples": len(kept[kind]), "draws": draws, "epochs": round(draws / len(kept[kind]), 2)}
        tqdm.write(f"{kind:14} {len(kept[kind]):9,} samples, {draws:,} of {len(order):,} draws: "
                   f"{counts[kind]['epochs']} epochs")
    codes.keep()
    tqdm.write(f"image codes: {codes.encoded:,} pictures encoded now, the others were in {codes.folder}")
    told = {"kinds": counts, "left_out": left_out.reasons(), "records": left_out.list}
    (run.folder / "data.json").write_text(json.dumps(told, indent=1))
    for kind in order:
        places.append((kind, seen[kind] % len(kept[kind])))
        seen[kind] += 1

    def batch(step: int) -> list[Sample]:
        return [kept[kind][i] for kind, i in places[step * config.batch:(step + 1) * config.batch]]
    return batch, kept["interleaved"]


def row_of(sample: Sample, model: UnifiedModel, codes: Codes) -> tuple[Tensor, Tensor, Tensor]:
    """A sample -> tokens [T, D], is_image [T], mask [T, D]: True on the answer's decisions.

    Choice: pictures are squashed to the square, VILA-U's "resize", but for text-to-image: there they are cropped, as
    VILA-U does with what it learns to draw. In a story, given and drawn pictures have to look alike."""
    prompt = model.prompt(sample.prompt, codes(sample.prompt_pictures), sample.draw)
    answer = model.sequence(sample.answer, codes(sample.answer_pictures, sample.draw))[1:]     # without its <s>
    row = prompt + answer
    decisions = row.is_image[:, None] | (torch.arange(row.tokens.shape[1]) == 0)               # D codes or one token
    decisions[:len(prompt)] = False
    return row.tokens, row.is_image, decisions


WASTE = 0.1          # a micro-batch is at most this share padding


def micro_batches(samples: list[Sample], model: UnifiedModel, codes: Codes, most: int
                  ) -> tuple[list[tuple[Tensor, Tensor, Tensor]], float]:
    """Samples -> padded tokens [B, T, D], is_image [B, T], mask [B, T, D] of at most `most` rows each, longest rows
    first, and the share of padding. A row that would bring its micro-batch above WASTE opens the next: a picture's
    question has a third of a story's length."""
    groups = []
    for row in sorted((row_of(s, model, codes) for s in samples), key=lambda row: -len(row[0])):
        group = groups[-1] if groups else []
        if group and len(group) < most and padding([*group, row]) <= WASTE:
            group.append(row)
        else:
            groups.append([row])
    lengths = [len(row[0]) for group in groups for row in group]
    positions = sum(len(group) * len(group[0][0]) for group in groups)
    return [tuple(pad(column).to(model.device) for column in zip(*group)) for group in groups], \
        1 - sum(lengths) / positions


def padding(rows: list[tuple]) -> float:
    """Share of padding in a batch of rows, the longest first."""
    return 1 - sum(len(row[0]) for row in rows) / (len(rows) * len(rows[0][0]))


# ---------------------------------------------------------------------------------------------------------------------
# Eq. (1)

def by_modality(mask: Tensor, is_image: Tensor) -> tuple[Tensor, Tensor]:
    """Decisions mask [B, T, D] and is_image [B, T] -> text decisions and image decisions, [B, T, D] each."""
    image = mask & is_image[..., None]
    return mask & ~image, image


def warmup_loss(logp: Tensor, mask: Tensor, is_image: Tensor, kind: str = "eq1",
                counts: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, dict]:
    """Eq. (1) from log-probs [B, T, D] and their mask -> loss and its parts (nats a decision, text and image apart).

    Choice: the equation is a sum over tokens; we take its mean over the batch's decisions, so that the step size does
    not depend on the batch. "official" is VILA-U's mean over text plus mean over codes. `counts` are the whole batch's
    text and image decisions where this is a part of it: the parts' losses then add up to the batch's.
    """
    text, image = by_modality(mask, is_image)
    n_text, n_image = counts or (text.sum(), image.sum())
    text_nll, image_nll = -(logp * text).sum(), -(logp * image).sum()                      # the two sums of Eq. (1)
    parts = {"loss/text": text_nll / n_text.clamp(min=1), "loss/image": image_nll / n_image.clamp(min=1)}
    loss = (text_nll + image_nll) / (n_text + n_image) if kind == "eq1" else parts["loss/text"] + parts["loss/image"]
    return loss, {"loss": loss.item(), **{k: v.item() for k, v in parts.items()}}


# ---------------------------------------------------------------------------------------------------------------------
# Run directories and training state

class Run:
    """A run directory: config.json (settings, versions), metrics.jsonl (a line a step), policy/, samples/."""

    def __init__(self, config, lines: int = 0):
        """`lines`: how many lines of an earlier metrics.jsonl are this run's own (what a checkpoint had written)."""
        self.folder = Path(config.out)
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        made = {"settings": asdict(config), "command": " ".join(sys.argv), "python": platform.python_version(),
                "torch": torch.__version__, "threads": torch.get_num_threads()}
        (self.folder / "config.json").write_text(json.dumps(made, indent=1))
        self.metrics = self.folder / "metrics.jsonl"
        kept = self.metrics.read_text().splitlines()[:lines] if self.metrics.exists() else []
        self.metrics.write_text("".join(line + "\n" for line in kept))
        self.lines = len(kept)

    def log(self, **metrics) -> None:
        """One flat object a step."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()}) + "\n")
        self.lines += 1

    def sample(self, name: str, title: str, groups: list[dict], judged: list[dict] = ()) -> None:
        """Answers for people: samples/NAME.json for the report and samples/NAME.png, a sheet to look at. `judged` are a
        learned judge's questions and replies."""
        file = self.folder / "samples" / f"{name}.json"
        file.write_text(json.dumps({"title": title, "groups": groups, "judged": list(judged)}))
        draw_sheet(groups, file.with_suffix(".png"))


def png(picture) -> str:
    """uint8 [H, W, 3] -> base64 PNG of at most 256 pixels a side, for JSON and HTML."""
    data, image = io.BytesIO(), Image.fromarray(picture)
    image.thumbnail((256, 256))
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def shown_group(sample: Sample, answers: list[Answer], scores: list[Scores],
                advantages: list[Tensor] | None = None) -> dict:
    """One prompt and its answers as plain data: texts, pictures, each step's reward and (mean) advantage."""
    told = []
    for n, (answer, score) in enumerate(zip(answers, scores)):
        steps = [{"text": s.text, "picture": None if s.picture is None else png(s.picture), "reward": r,
                  "advantage": None if advantages is None else advantages[n][s.start:s.stop].mean().item()}
                 for s, r in zip(answer.segments, score.steps)]
        told.append({"steps": steps, "layout": answer.layout, "text": score.text, "visual": score.visual,
                     "format": score.format})
    shown = [read_picture(p, "a prompt") if isinstance(p, Path) else p for p in sample.prompt_pictures]
    return {"prompt": sample.prompt, "pictures": [png(p) for p in shown], "answers": told}


def draw_sheet(groups: list[dict], path: Path, size: int = 72) -> None:
    """One row an answer: its texts and pictures in turn, reward parts in front."""
    rows = [(group, answer) for group in groups for answer in group["answers"]]
    columns = max((len(a["steps"]) for _, a in rows), default=1)
    page = Image.new("RGB", (200 + columns * (size + 60), max(1, len(rows)) * (size + 26)), "white")
    pen = ImageDraw.Draw(page)

    def paste(data: str, x: int, y: int) -> None:
        page.paste(Image.open(io.BytesIO(base64.b64decode(data))).resize((size, size), Image.NEAREST), (x, y))
    for row, (group, answer) in enumerate(rows):
        top = row * (size + 26)
        pen.text((4, top), group["prompt"][:180], fill="gray")
        if group["pictures"]:
            paste(group["pictures"][0], 4, top + 16)
        parts = [f"{k} {answer[k]:.2f}" for k in ("text", "visual", "format") if answer[k] is not None]
        pen.multiline_text((size + 12, top + 18), "\n".join(parts + [answer["layout"]]), fill="black")
        for i, step in enumerate(answer["steps"]):
            x = 200 + i * (size + 60)
            if step["picture"]:
                paste(step["picture"], x, top + 16)
            else:
                pen.multiline_text((x, top + 20), textwrap.fill(step["text"], 18), fill="black")
    page.save(path)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An Adam's state as named tensors, for safetensors."""
    return {f"optimizer.{i}.{key}": value for i, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state = optimizer.state_dict()
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            state["state"].setdefault(int(i), {})[key] = value
    optimizer.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# The miniature and its three stages

def train_bpe(texts: list[str], vocab_size: int, path: Path) -> None:
    """Learn BPE pieces from a few texts and write a SentencePiece model file of at most `vocab_size` pieces.

    Words start at a space and merges stay inside words, so a small world's every word becomes one piece. Layout as
    LLaMA's: <unk> <s> </s>, 256 bytes, merged pieces best first, single characters.
    """
    words: dict[str, int] = {}
    for text in texts:
        for word in re.findall(f"{SPACE}[^{SPACE}]*", SPACE + text.replace(" ", SPACE)):
            words[word] = words.get(word, 0) + 1
    split = {word: list(word) for word in words}
    letters = sorted({letter for word in words for letter in word})
    merged: list[str] = []
    while len(merged) + len(letters) + 259 < vocab_size:
        pairs: dict[tuple[str, str], int] = {}
        for word, symbols in split.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] = pairs.get(pair, 0) + words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))              # the most frequent, ties by spelling
        merged += ["".join(best)] if "".join(best) not in merged else []
        for symbols in split.values():
            i = 0
            while i + 1 < len(symbols):
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i:i + 2] = ["".join(best)]
                i += 1
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{b:02X}>", 0.0, BYTE) for b in range(256)]
    pieces += [(piece, -float(i), NORMAL) for i, piece in enumerate(merged + letters)]
    model = b"".join(write_field(1, write_field(1, piece.encode()) + write_field(2, score) + write_field(3, kind))
                     for piece, score, kind in pieces)
    trainer = write_field(3, 2) + write_field(4, len(pieces)) + write_field(35, 1)        # BPE, size, byte fallback
    normalizer = write_field(1, b"identity") + write_field(3, 1) + write_field(4, 0) + write_field(5, 1)
    path.write_bytes(model + write_field(2, trainer) + write_field(3, normalizer))


def miniature(seed: int, folder: Path, texts: list[str] = ()) -> UnifiedModel:
    """VILA-U's architecture in small: 24x24 pictures of 3x3 positions aligned with the board, a decoder of width 128.
    `texts`, where it is to learn from other data than the toy world's, get words and a longer context.

    Choice: a codebook of 16 for each of the paper's 4 depths instead of one that they share. Both reconstruct every
    scene; this one gives each content of a cell exactly one tuple of codes.
    """
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    words = [shapes.caption(s) for s in shapes.SCENES] + [shapes.edit_words(e) for e in shapes.EDITS] + \
        [chat(I2T_QUESTION, ""), "x, x. <BEGIN>", *(MARKS.sub(" ", text) for text in texts)]
    train_bpe(words, 2048 if texts else 512, folder / "tokenizer.model")
    text = TextTokenizer(folder / "tokenizer.model")
    text.add(SPECIAL_TOKENS)
    model = UnifiedModel(
        DecoderConfig(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
                      vocab_size=text.vocab_size, context=2048 if texts else 256),
        DepthConfig(width=96, layers=2, heads=4),
        VisionConfig(image_size=24, patch_size=8, width=64, mlp_width=128, layers=1, codebook_size=16, depth=4,
                     shared_codebook=False, ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=0, attn_resolutions=(),
                     z_channels=32, resolution=24))
    torch.nn.init.normal_(model.vision.tower.position, std=0.02)
    for block in model.vision.tower.blocks:             # attention starts without influence: see locality_loss
        torch.nn.init.zeros_(block.attn.o_proj.weight), torch.nn.init.zeros_(block.attn.o_proj.bias)
    for module in (model.decoder, model.projector, model.depth):
        for name, p in module.named_parameters():
            if p.dim() > 1:
                torch.nn.init.normal_(p, std=0.02 if "embed" in name or "position" in name else p.shape[-1] ** -0.5)
    model.text, model.system_prompt = text, ""
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Stage 1: the image tokenizer

TOKENIZER_LR = 2e-3
PLAIN, JOINT = 0.2, 0.8        # shares of the steps: unquantised before the first, decoder alone after the second
COMMITMENT = 0.25              # as VILA-U (latent_loss_weight)
LOCALITY = 100.0               # weight of `locality_loss`
DECAY = 0.95                   # of the codebooks' running means; VILA-U's 0.99 is too slow for 300 steps

# The 17 things that a cell can hold, the empty one first. [17, 8, 8, 3] in -1..1
CONTENTS = torch.from_numpy(np.stack([shapes.render(None)[:shapes.CELL_SIZE, :shapes.CELL_SIZE]] + [
    shapes.draw_cell(shape, colour) for shape in shapes.SHAPES for colour in shapes.COLOURS])).float() / 127.5 - 1


def sample_boards(generator: torch.Generator, count: int = 16, fill: float = 0.35) -> Tensor:
    """-> pixels [count, 3, 24, 24].

    Choice: any number of shapes on a board, where the world knows one: every picture then teaches several cells, no
    cell tells about another, and drawing mistakes of the policy can be shown as they are.
    """
    content = torch.randint(1, len(CONTENTS), (count, 3, 3), generator=generator)
    content = torch.where(torch.rand(count, 3, 3, generator=generator) < fill, content, 0)
    return CONTENTS[content].permute(0, 5, 1, 3, 2, 4).reshape(count, 3, shapes.PICTURE_SIZE, shapes.PICTURE_SIZE)


def locality_loss(tokenizer: ImageTokenizer, pixels: Tensor, features: Tensor, generator: torch.Generator) -> Tensor:
    """A cell's feature has to say what is in that cell, whatever the other cells hold and wherever it lies.

    Half of the cells are replaced by those of another board, all are shifted together, and the kept ones' features must
    not change. Without it the attention of the tower smears a shape over the codes of all nine cells, which a language
    model then has to predict: the empty cell alone takes dozens of code tuples.
    """
    grid, patch = tokenizer.config.grid, tokenizer.config.patch_size
    keep = (torch.rand(len(pixels), grid, grid, generator=generator) < 0.5).to(pixels.device)         # (B, 3, 3)
    down, right = torch.randint(grid, (2,), generator=generator).tolist()
    keep_pixels = keep[:, None].repeat_interleave(patch, 2).repeat_interleave(patch, 3)               # (B, 1, H, W)
    mixed = torch.where(keep_pixels, pixels, pixels.roll(1, 0)).roll((patch * down, patch * right), (2, 3))
    moved = tokenizer.tower(mixed).unflatten(1, (grid, grid)).roll((-down, -right), (1, 2))        # (B, 3, 3, C)
    return (((features - moved.flatten(1, 2)) ** 2).mean(-1) * keep.flatten(1)).mean()


def kmeans(points: Tensor, count: int, generator: torch.Generator, rounds: int = 10) -> tuple[Tensor, Tensor]:
    """points [M, C] -> centres [count, C] and, per point, the index of its centre [M]"""
    centres = points[torch.randperm(len(points), generator=generator)[:count]]
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(1)
        size = torch.bincount(nearest, minlength=count)[:, None]
        total = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(size > 0, total / size.clamp(min=1), centres)
    return centres, torch.cdist(points, centres).argmin(1)


class EMACodebooks(torch.nn.Module):
    """Codebooks as running means of the residuals that chose them, and restarts for codes that nothing chooses."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        books = 1 if config.shared_codebook else config.depth
        self.register_buffer("sizes", torch.ones(books, config.codebook_size))
        self.register_buffer("sums", torch.zeros(books, config.codebook_size, config.width))

    @torch.no_grad()
    def start(self, quantizer, features: Tensor, generator: torch.Generator) -> None:
        """features [M, C]; a shared codebook is divided among the depths."""
        share = self.sizes.shape[1] * len(self.sizes) // quantizer.depth
        vectors, residual = [], features
        for _ in range(quantizer.depth):
            centres, nearest = kmeans(residual, share, generator)
            vectors.append(centres)
            residual = residual - centres[nearest]
        self.sums.copy_(torch.cat(vectors).view_as(self.sums))
        self.sizes.fill_(1)
        self.write(quantizer)

    @torch.no_grad()
    def update(self, quantizer, residuals: Tensor, codes: Tensor, restart: bool,
               generator: torch.Generator) -> None:
        """residuals [B, N, D, C]: what was left of the features when codes [B, N, D] were chosen."""
        books, count = self.sizes.shape
        chosen = codes.movedim(-1, 0).reshape(books, -1)                    # (books, M): all depths if shared, or one
        points = residuals.movedim(-2, 0).reshape(books, -1, residuals.shape[-1])
        for book in range(books):
            size = torch.bincount(chosen[book], minlength=count)
            total = torch.zeros_like(self.sums[book]).index_add_(0, chosen[book], points[book])
            self.sizes[book].lerp_(size.float(), 1 - DECAY)
            self.sums[book].lerp_(total, 1 - DECAY)
            if restart:
                dead = self.sizes[book] < 0.05                              # chosen less than once in twenty steps
                fresh = points[book][torch.randint(points.shape[1], (count,), generator=generator)]
                self.sums[book] = torch.where(dead[:, None], fresh, self.sums[book])
                self.sizes[book] = torch.where(dead, 1.0, self.sizes[book])
        self.write(quantizer)

    def write(self, quantizer) -> None:
        # The clamp lets a code fade to zero once its size is nothing, instead of dividing two vanishing numbers.
        for table, size, total in zip(quantizer.codebooks, self.sizes, self.sums):
            table.weight[:-1] = total / size.clamp(min=1e-6)[:, None]


def train_image_tokenizer(model: UnifiedModel, run: Run, config: Config, start: int,
                          tensors: dict[str, Tensor]) -> None:
    """Tower, codebooks and picture decoder together; then the decoder alone, with the codes fixed.

    A fifth of the steps runs without quantisation (quantising noise from step 0 costs a long plateau), then the
    codebooks start as k-means centres. A step's randomness follows from seed and step alone.
    """
    tokenizer, steps = model.vision.requires_grad_(True), config.tokenizer_steps
    tokenizer.quantizer.requires_grad_(False)                               # moved by running means, not by gradients
    ema = EMACodebooks(tokenizer.config).to(model.device)
    optimizer = torch.optim.Adam([p for p in tokenizer.parameters() if p.requires_grad], lr=TOKENIZER_LR,
                                 betas=(0.9, 0.95))
    restore_optimizer(optimizer, tensors)
    ema.load_state_dict({name: tensors.get(name, value) for name, value in ema.state_dict().items()})
    plain, joint = int(PLAIN * steps), int(JOINT * steps)
    bar = tqdm(range(start, steps), desc="tokenizer", initial=start, total=steps)
    for step in bar:
        began = time.perf_counter()
        generator = torch.Generator().manual_seed(config.seed * 1_000_003 + step)
        pixels = sample_boards(generator).to(model.device)
        features, extra = tokenizer.tower(pixels), 0.0                                                # (B, N, C)
        if step < joint:
            extra = LOCALITY * locality_loss(tokenizer, pixels, features, generator)
        if step == plain:
            with torch.no_grad():
                many = tokenizer.tower(sample_boards(generator, 128).to(model.device)).flatten(0, 1)
            ema.start(tokenizer.quantizer, many, generator)
        if step >= plain:
            codes = tokenizer.quantizer.encode(features)                                              # (B, N, D)
            sums = tokenizer.vectors(codes).cumsum(-2)                                                # (B, N, D, C)
            if step < joint:
                left = torch.cat((features.detach()[..., None, :], features.detach()[..., None, :] - sums), dim=-2)
                restart = step < plain + 0.6 * (joint - plain) and step % 10 == 0         # later on, codes stay put
                ema.update(tokenizer.quantizer, left[..., :-1, :], codes, restart, generator)
                extra = extra + COMMITMENT * ((features[..., None, :] - sums) ** 2).mean()      # every depth
                features = features + (sums[..., -1, :] - features).detach()                    # straight-through
            else:
                features = sums[..., -1, :]
        difference = tokenizer.decoder(features) - pixels
        loss = (difference ** 2).mean() + 0.5 * difference.abs().mean()
        since, until = (0.6 * joint, joint) if step < joint else (joint, steps)     # flat, then down to a tenth: twice
        for group in optimizer.param_groups:
            group["lr"] = TOKENIZER_LR * min(1, (step + 1) / 20) * (1 - 0.9 * max(0, (step - since) / (until - since)))
        optimizer.zero_grad()                                # sets None: Adam leaves the tower alone once it is fixed
        (loss + extra).backward()
        optimizer.step()
        run.log(stage="tokenizer", step=step, loss=loss.item(), seconds=time.perf_counter() - began)
        bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % config.save_every == 0 and step + 1 < steps:
            checkpoint(model, run, config, "tokenizer", step + 1, optimizer_tensors(optimizer) | ema.state_dict())
    tokenizer.requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Stages 2 and 3: the decoder

def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear ramp over the first twentieth, then a cosine down to a tenth."""
    ramp = max(1, steps // 20)
    return peak * min((step + 1) / ramp, 0.55 + 0.45 * math.cos(math.pi * step / steps))


def train_decoder(model: UnifiedModel, run: Run, config: Config, stage: str, steps: int, lr: float,
                  batch: Callable[[int], list[Sample]], codes: Codes, start: int, tensors: dict[str, Tensor]) -> None:
    """Stages 2 and 3: Eq. (1) on the samples that `batch` gives for every step."""
    optimizer = torch.optim.AdamW(model.policy_parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    restore_optimizer(optimizer, tensors)
    seen, waste = Counter(), []
    bar = tqdm(range(start, steps), desc=stage, initial=start, total=steps)
    for step in bar:
        began = time.perf_counter()
        samples = batch(step)
        seen.update(s.kind for s in samples)
        parts, share = micro_batches(samples, model, codes, config.micro_batch)
        decisions = [by_modality(mask, is_image) for _, is_image, mask in parts]
        counts, losses = tuple(sum(d.sum() for d in of) for of in zip(*decisions)), Counter()
        waste.append(share)
        optimizer.zero_grad()
        for tokens, is_image, mask in parts:
            logp = model.log_probs(tokens, is_image, mask)
            loss, part = warmup_loss(logp, mask, is_image, config.loss, counts)
            if not loss.isfinite():
                raise UserError(f"{stage}: the loss became {loss.item()} at step {step}: lower --lr; the last good "
                                f"checkpoint is intact")
            loss.backward()
            losses.update(part)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        norm = torch.nn.utils.clip_grad_norm_(model.policy_parameters(), 1.0)
        optimizer.step()
        run.log(stage=stage, step=step, **losses, grad_norm=norm.item(), padding=share,
                seconds=time.perf_counter() - began)
        bar.set_postfix({k: f"{v:.3f}" for k, v in {**losses, "padding": share}.items()})
        if (step + 1) % config.save_every == 0 and step + 1 < steps:
            checkpoint(model, run, config, stage, step + 1, optimizer_tensors(optimizer))
    tqdm.write(f"{stage}: samples by kind since the start or the last checkpoint: {dict(seen)}; "
               f"{sum(waste) / max(1, len(waste)):.1%} padding")


def checkpoint(model: UnifiedModel, run: Run, config: Config, stage: str, step: int, tensors: dict) -> None:
    state = {"stage": stage, "step": step, "lines": run.lines, "settings": asdict(config)}
    save(model, run.folder / "policy", state, tensors)


STAGES = ("tokenizer", "pretrain", "warmup", "done")


def warm_up(config: Config) -> None:
    """Run the stages that are still to be done, from the last checkpoint of the same settings."""
    folder, device = Path(config.out), pick_device(config.device)
    state, tensors = load_training(folder / "policy")
    check_settings(folder, (state or {}).get("settings", {}), asdict(config))
    left_out = LeftOut()
    samples = read_sources(config.data, "--data", READERS, left_out) if config.data else {}
    if state:
        model = load(folder / "policy", device)
    elif config.model:
        model = load(config.model, device, config.quantize)
        state = {"stage": "warmup", "step": 0, "lines": 0}
    else:
        some = [s for of in samples.values() for s in random.Random(config.seed).sample(of, min(len(of), 1000))]
        model = miniature(config.seed, folder / "text", [s.prompt + s.answer for s in some]).to(device)
        state = {"stage": "tokenizer", "step": 0, "lines": 0}
    train_only(model, config.lora_rank, config.lora_alpha, config.seed)
    model.decoder.checkpointing = config.checkpointing
    run = Run(config, state["lines"])
    start = STAGES.index(state["stage"])
    for stage in STAGES[start:-1]:
        here = state["step"] if stage == state["stage"] else 0
        held = tensors if here else {}
        if stage == "tokenizer":
            train_image_tokenizer(model, run, config, here, held)
        elif stage == "pretrain":
            train_decoder(model, run, config, stage, config.pretrain_steps, config.lr,
                          toy_batches(PRETRAINING, config, stage), Codes(model), here, held)
        else:
            rng, codes, batch = random.Random(0), Codes(model), toy_batches(hybrid_mix(config.mix), config, stage)
            prompts, judges = [toy_prompt(rng, 2, "heldout") for _ in range(6)], (RulesText(), RulesVisual())
            if config.data:
                codes, judges = Codes(model, Path(config.cache)), (no_text_judge, no_visual_judge)
                batch, prompts = published_batches(samples, model, run, config, codes, left_out)
            show(model, run, "before", "before the warm-up: it cannot interleave", prompts[:6], codes, judges)
            train_decoder(model, run, config, stage, config.warmup_steps, config.warmup_lr, batch, codes, here, held)
            show(model, run, "after", "after the warm-up", prompts[:6], codes, judges)
        checkpoint(model, run, config, STAGES[STAGES.index(stage) + 1], 0, {})


def hybrid_mix(mix: str) -> dict:
    """The toy world's mix of kinds, in the ratio --mix."""
    return dict(zip((story_sample, i2t_sample, t2i_sample), parse_weights(mix, "--mix", ", ".join(KINDS))))


def no_text_judge(prompts: list[str], texts: list[list[str]]) -> list[list[None]]:
    """Published data has no rules to judge by."""
    return [[None] * len(told) for told in texts]


def no_visual_judge(texts: list[str], pictures: list) -> list[None]:
    return [None] * len(texts)


def show(model: UnifiedModel, run: Run, name: str, title: str, prompts: list[Sample], codes: Codes,
         judges: tuple) -> None:
    """A sheet of answers to fixed prompts."""
    if not prompts:
        return
    rows = [model.prompt(s.prompt, codes(s.prompt_pictures)) for s in prompts]
    budget = min(2 * (model.vision_config.positions + 48), model.decoder.config.context - max(map(len, rows)))
    trajectories = model.generate(rows, 1, budget, generator=torch.Generator().manual_seed(0))
    answers = model.answers(trajectories)
    scores = judge([s.prompt for s in prompts], answers, *judges)
    run.sample(name, title, [shown_group(s, [a], [c]) for s, a, c in zip(prompts, answers, scores)])


def check_settings(folder: Path, made: dict, now: dict) -> None:
    """What was made with other settings is not gone on with: raises UserError naming the first that differs."""
    free = ("device", "reward_device", "save_every", "updates", "resume", "eval_prompts", "eval_guidance", "out",
            "micro_batch", "checkpointing", "preset", "cache")
    for key, value in made.items():
        if key not in free and now.get(key, value) != value:
            raise UserError(f"{folder}: was made with --{key.replace('_', '-')} {value}, not {now[key]}: choose "
                            f"another --out, or delete the folder")


def is_done(folder: Path) -> bool:
    """Is there a finished warm-up model?"""
    state, _ = load_training(folder / "policy")
    return state is not None and state["stage"] == "done"


def read_metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def check(config: Config) -> None:
    """Settings that cannot work, found before anything is loaded."""
    for name in ("edits", "tokenizer_steps", "pretrain_steps", "warmup_steps", "batch", "save_every", "micro_batch"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(config, name)}: expected at least 1")
    weights = dict(zip(KINDS, parse_weights(config.mix, "--mix", ", ".join(KINDS))))
    if config.data:
        kinds = {READERS[name][1] for name, _ in parse_sources(config.data, "--data")}
        for kind in KINDS:
            if weights[kind] and kind not in kinds:
                fitting = " or ".join(name for name, (_, of) in READERS.items() if of == kind)
                raise UserError(f"--mix {config.mix} asks for {kind} samples, but --data has no source of them: add "
                                f"{fitting}, or give them weight 0")
    if config.loss not in ("eq1", "official"):
        raise UserError(f"--loss {config.loss}: expected eq1 or official")
    check_adapters(config)
    if not config.model and (config.lora_rank or config.quantize != "none"):
        raise UserError("--lora-rank and --quantize: the miniature is trained from nothing, expected --model as well")


def check_adapters(config) -> None:
    """The QLoRA flags of warmup.py and grpo.py."""
    if config.quantize not in ("none", "nf4"):
        raise UserError(f"--quantize {config.quantize}: expected nf4 or none")
    if config.lora_rank < 0 or config.lora_alpha <= 0:
        raise UserError(f"--lora-rank {config.lora_rank} --lora-alpha {config.lora_alpha}: expected a rank of 0 (off) "
                        f"or more, and an alpha above 0")


def main() -> None:
    config = parse_config(Config, presets={"paper": PAPER})
    check(config)
    warm_up(config)
    from evaluate import write_report
    print(f"warm-up done: {write_report(Path(config.out))}")


if __name__ == "__main__":
    run_main(main)
