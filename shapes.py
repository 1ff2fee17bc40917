"""The toy world: one coloured shape on a 3x3 board, edited step by step, in words and pictures.

A prompt shows a start picture and asks for a chain of edits. The right answer has for each edit a caption and
the new picture:

    paint it blue, move it to center. <BEGIN> a red circle at top left <image>
    ->  a blue circle at top left (picture)   a blue circle at center (picture)

Every true state follows from the words of the prompt alone, so judging by rules needs no hidden labels. This
world stands for the paper's data (Sec. 3.1) and is its own ground truth.

    python shapes.py --out samples.png                  # a sheet: start, true states, a noisy warm-up story
    python shapes.py --dump DIR --count 64 --edits 2    # DIR/prompts.jsonl and DIR/images/*.png
"""
import argparse
import hashlib
import itertools
import json
import random
import re
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

if __name__ == "__main__":               # Ctrl-C, imports included, and a closed pipe end it quietly
    for name in {"SIGINT", "SIGPIPE"} & set(dir(signal)):
        signal.signal(getattr(signal, name), signal.SIG_DFL)

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (215, 40, 40), "green": (30, 150, 60), "blue": (40, 80, 215), "yellow": (235, 190, 20)}
CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
BACKGROUND = (242, 242, 242)
CELL_SIZE = 8                       # pixels; the miniature's patch size too, so that its grid is the board
PICTURE_SIZE = 3 * CELL_SIZE
HELDOUT_SHARE = 0.1                 # of all (start, edit chain) combinations
# Choice: these two pairs, because the systematic errors below only turn things red or round. So not even a
# wrong picture of the warm-up shows one of them.
HELDOUT_PAIRS = {("square", "blue"), ("cross", "green")}


class Scene(NamedTuple):
    shape: str
    colour: str
    cell: str


class Edit(NamedTuple):
    kind: str        # "move", "paint" or "turn"
    value: str       # the new cell, colour or shape


EDIT_FIELD = {"move": "cell", "paint": "colour", "turn": "shape"}
FIELD_VALUES = {"shape": SHAPES, "colour": tuple(COLOURS), "cell": CELLS}
SCENES = [Scene(*values) for values in itertools.product(*FIELD_VALUES.values())]       # all 144 of them
TRAINING_SCENES = [scene for scene in SCENES if scene[:2] not in HELDOUT_PAIRS]


# ------------------------------------------------------------------------------------------------------------
# Words

WORDS = {"move": "move it to {}", "paint": "paint it {}", "turn": "turn it into a {}"}


def caption(scene: Scene) -> str:
    """A scene -> its words."""
    return f"a {scene.colour} {scene.shape} at {scene.cell}"


def edit_words(edit: Edit) -> str:
    """An edit -> its words."""
    return WORDS[edit.kind].format(edit.value)


EDITS = [Edit(kind, value) for kind, field in EDIT_FIELD.items() for value in FIELD_VALUES[field]]
SCENE_OF_CAPTION = {caption(scene): scene for scene in SCENES}
EDIT_OF_WORDS = {edit_words(edit): edit for edit in EDITS}


def parse_caption(text: str) -> Scene | None:
    """Return the scene that a caption names, None for anything that is not a caption, spacing aside."""
    return SCENE_OF_CAPTION.get(" ".join(text.split()))


def parse_edits(text: str) -> list[Edit] | None:
    """'paint it blue, move it to center' -> two edits. None if any piece is not an edit."""
    edits = [EDIT_OF_WORDS.get(" ".join(piece.split())) for piece in text.strip().rstrip(".").split(",")]
    return None if None in edits else edits


def apply(scene: Scene, edit: Edit) -> Scene:
    """Return the scene after an edit."""
    return scene._replace(**{EDIT_FIELD[edit.kind]: edit.value})


def prompt_words(start: Scene, edits: list[Edit]) -> str:
    """A start scene and edits -> the words of a prompt."""
    return ", ".join(map(edit_words, edits)) + f". <BEGIN> {caption(start)} <image>"


def states_of_prompt(text: str) -> list[Scene]:
    """Recover the true states, start first, from the words of a prompt. Raises ValueError for other texts."""
    parts = re.fullmatch(r"\s*(.*?)\.\s*<BEGIN>\s*(.*?)\s*<image>\s*", text, flags=re.DOTALL)
    edits, start = (parse_edits(parts[1]), parse_caption(parts[2])) if parts else (None, None)
    if edits is None or start is None:
        raise ValueError(f"not a prompt of the toy world: {text!r}; expected for example "
                         f"{prompt_words(SCENES[0], [Edit('paint', 'blue')])!r}")
    return list(itertools.accumulate(edits, apply, initial=start))


def wanted_steps(text: str) -> int | None:
    """Count the edits that a prompt asks for. None where it is not a prompt of the toy world."""
    try:
        return len(states_of_prompt(text)) - 1
    except ValueError:
        return None


# ------------------------------------------------------------------------------------------------------------
# Pictures

def draw_cell(shape: str, colour: str) -> np.ndarray:
    """Draw one cell with its shape, antialiased: 16 times too large, then averaged. -> uint8 [8, 8, 3]"""
    zoom = 16
    cell = Image.new("RGB", (CELL_SIZE * zoom, CELL_SIZE * zoom), BACKGROUND)
    pen, fill = ImageDraw.Draw(cell), COLOURS[colour]

    def box(left, top, right, bottom):            # in pixels of the small cell, right and bottom exclusive
        return [left * zoom, top * zoom, right * zoom - 1, bottom * zoom - 1]
    if shape == "circle":
        pen.ellipse(box(1, 1, 7, 7), fill=fill)
    elif shape == "square":
        pen.rectangle(box(0.5, 0.5, 7.5, 7.5), fill=fill)
    elif shape == "triangle":
        pen.polygon([(4 * zoom, 0.5 * zoom), (7.5 * zoom, 7 * zoom), (0.5 * zoom, 7 * zoom)], fill=fill)
    else:                                         # a cross, its arms two pixels wide
        pen.rectangle(box(3, 0.5, 5, 7.5), fill=fill)
        pen.rectangle(box(0.5, 3, 7.5, 5), fill=fill)
    return np.asarray(cell.resize((CELL_SIZE, CELL_SIZE), Image.BOX))


def render(scene: Scene | None) -> np.ndarray:
    """Draw a scene -> uint8 [24, 24, 3]. None is the empty board."""
    picture = np.empty((PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)
    picture[:] = BACKGROUND
    if scene is not None:
        row, column = (CELL_SIZE * i for i in divmod(CELLS.index(scene.cell), 3))
        picture[row:row + CELL_SIZE, column:column + CELL_SIZE] = draw_cell(scene.shape, scene.colour)
    return picture


def enlarge(picture: np.ndarray, factor: int) -> np.ndarray:
    """Repeat every pixel, for people to look at. [H, W, 3] -> [factor H, factor W, 3]"""
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


RENDERS = np.stack([render(scene) for scene in SCENES]).reshape(len(SCENES), -1) / 255
# Choice: a picture shows a scene up to this mean squared distance, half the 0.0040 between the two closest
# scenes (values 0..1). The empty board is 0.0095 away from its nearest scene, so an empty, doubled or smeared
# picture never counts as one.
MATCH_DISTANCE = 0.002


def recognise(pictures: np.ndarray) -> list[Scene | None]:
    """Name the scene that each picture shows, None where it shows no scene or more than one.

    pictures: uint8 [B, H, W, 3]. Those of another size (a larger model's) are resized to the world's first.
    """
    if pictures.shape[1:3] != (PICTURE_SIZE, PICTURE_SIZE):
        size = (PICTURE_SIZE, PICTURE_SIZE)
        pictures = np.stack([np.asarray(Image.fromarray(p).resize(size, Image.BOX)) for p in pictures])
    flat = pictures.reshape(len(pictures), -1).astype(np.float32) / 255                       # (B, 1728)
    squares = (flat ** 2).sum(1)[:, None] - 2 * flat @ RENDERS.T + (RENDERS ** 2).sum(1)
    distance = squares / flat.shape[1]                                                        # (B, 144)
    nearest = distance.argmin(axis=1)                                                         # (B)
    return [SCENES[i] if row[i] < MATCH_DISTANCE else None for row, i in zip(distance, nearest, strict=True)]


def matches(picture: np.ndarray, scene: Scene) -> bool:
    """Whether a picture shows this scene and nothing else."""
    return recognise(picture[None]) == [scene]


# ------------------------------------------------------------------------------------------------------------
# Prompts

@dataclass
class Prompt:
    """A prompt of the toy world."""
    text: str              # "paint it blue. <BEGIN> a red circle at top left <image>"
    picture: np.ndarray    # what <image> stands for, uint8 [24, 24, 3]


def split_of(text: str) -> str:
    """Return the split of a prompt: "pairs", "heldout" or "train".

    "pairs": some state, the start included, shows a held-out pair of shape and colour. Of the rest a tenth
    is "heldout". The split follows from the words alone, so it is the same everywhere.
    """
    if any(state[:2] in HELDOUT_PAIRS for state in states_of_prompt(text)):
        return "pairs"
    fraction = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2 ** 32          # 0..1
    return "heldout" if fraction < HELDOUT_SHARE else "train"


def sample_prompt(rng: random.Random, edits: int, split: str) -> Prompt:
    """Draw a prompt of a split, "train", "heldout" or "pairs". Each of its edits changes the scene."""
    if split not in ("train", "heldout", "pairs"):
        raise ValueError(f"split {split!r}: expected train, heldout or pairs")
    while True:                                     # the rarest split is about a tenth of all draws
        start = rng.choice(SCENES)
        state, chain = start, []
        for _ in range(edits):
            kind = rng.choice(list(EDIT_FIELD))     # Choice: kind first, else half of the edits are moves
            edit = rng.choice([e for e in EDITS if e.kind == kind and apply(state, e) != state])
            chain.append(edit)
            state = apply(state, edit)
        text = prompt_words(start, chain)
        if split_of(text) == split:
            return Prompt(text, render(start))


# ------------------------------------------------------------------------------------------------------------
# The noise of the warm-up's stories

@dataclass(frozen=True)
class Noise:
    """How wrong the warm-up's stories are, as probabilities.

    Choice: systematic errors are more likely than the truth. So after the warm-up the model makes them even
    when it decodes greedily, and GRPO has something to correct. Random errors only blur it: a low temperature
    would mend them as well as GRPO does.
    """
    systematic: float = 0.6    # yellow painted red, triangles drawn round, "right" called "center": each
    random: float = 0.15       # a step gets a random wrong caption or a random wrong picture
    fault: float = 0.25        # a story has its format broken


NOISE = Noise()
FAULTS = ("no_think_open", "no_think_close", "no_vis_close", "no_image", "extra_text")


def noisy_story(rng: random.Random, prompt: str,
                noise: Noise = NOISE) -> tuple[list[tuple[str, np.ndarray]], str | None]:
    """Make an answer with errors: [(caption, picture), ...], and the format fault of its tokens or None.

    Each error looks at the true state only, so one wrong step does not make the next one wrong.
    """
    story = []
    for state in states_of_prompt(prompt)[1:]:
        words, picture = state, state               # the scene put into words, and the scene drawn
        if state.cell == "right" and rng.random() < noise.systematic:
            words = words._replace(cell="center")
        if state.colour == "yellow" and rng.random() < noise.systematic:
            picture = picture._replace(colour="red")
        if state.shape == "triangle" and rng.random() < noise.systematic:
            picture = picture._replace(shape="circle")
        if rng.random() < noise.random:
            wrong = rng.choice([scene for scene in TRAINING_SCENES if scene != state])
            words, picture = (wrong, picture) if rng.random() < 0.5 else (words, wrong)
        story.append((caption(words), render(picture)))
    return story, rng.choice(FAULTS) if rng.random() < noise.fault else None


# ------------------------------------------------------------------------------------------------------------
# Run alone: look at the world, or write prompts to disk

def sheet(rng: random.Random, rows: int) -> Image.Image:
    """Draw two rows for each prompt: start and true states, and the same story with the warm-up's noise."""
    tile, label = 6 * PICTURE_SIZE, 14
    width, height = tile + 16, tile + 2 * label + 8
    page = Image.new("RGB", (4 * width, rows * 2 * height), "white")
    pen = ImageDraw.Draw(page)
    for row in range(rows):
        prompt = sample_prompt(rng, 1 + row % 3, "train")
        story, fault = noisy_story(rng, prompt.text)
        true = [(caption(state), render(state)) for state in states_of_prompt(prompt.text)]
        halves = [(prompt.text, true), (f"noisy, format fault: {fault}", [None, *story])]
        for half, (title, steps) in enumerate(halves):
            top = (2 * row + half) * height
            pen.text((8, top), title, fill="black")
            for column, step in enumerate(steps):
                if step is not None:
                    words, picture = step
                    left = 8 + column * width
                    pen.text((left, top + label), words, fill="gray")
                    page.paste(Image.fromarray(enlarge(picture, 6)), (left, top + 2 * label))
    return page


def dump(folder: Path, rng: random.Random, count: int, edits: int, split: str) -> None:
    """Write prompts.jsonl, {"prompt": text, "images": [path], "steps": edits} a line, and the pictures.

    Raises FileExistsError where there are prompts already.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with open(folder / "prompts.jsonl", "x", encoding="utf-8") as lines:
        for i in range(count):
            prompt, name = sample_prompt(rng, edits, split), f"images/{i:06d}.png"
            Image.fromarray(prompt.picture).save(folder / name)
            lines.write(json.dumps({"prompt": prompt.text, "images": [name], "steps": edits}) + "\n")


def parse_arguments() -> argparse.Namespace:
    """The command line, in groups. A mistake ends in one sentence and exit code 2."""
    def home(path: str) -> Path:
        return Path(path).expanduser()
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     usage="python shapes.py [--flag value ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"error: {message}\n")
    group = parser.add_argument_group("sheet")
    group.add_argument("--out", type=home, default=Path("samples.png"), metavar="FILE",
                       help="where the sheet goes [%(default)s]")
    group = parser.add_argument_group("prompts")
    group.add_argument("--dump", type=home, metavar="DIR", help="write prompts here instead of a sheet")
    group.add_argument("--count", type=int, default=64, metavar="N", help="prompts to write [%(default)s]")
    group.add_argument("--edits", type=int, default=2, metavar="N", help="edits of a prompt [%(default)s]")
    group.add_argument("--split", default="train", choices=("train", "heldout", "pairs"),
                       help="where they come from [%(default)s]")
    group = parser.add_argument_group("run")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="of all random choices [%(default)s]")
    args = parser.parse_args()
    for name in ("count", "edits"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)}: expected a whole number, at least 1")
    return args


def main() -> None:
    """Draw a sheet, or write prompts."""
    args = parse_arguments()
    rng = random.Random(args.seed)
    try:
        if args.dump:
            dump(args.dump, rng, args.count, args.edits, args.split)
            print(f"{args.count} prompts in {args.dump / 'prompts.jsonl'}")
        else:
            sheet(rng, rows=4).save(args.out)
            print(f"sheet in {args.out}")
    except (OSError, ValueError) as error:           # a folder that cannot be, a name that is no picture's
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
