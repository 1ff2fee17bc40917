"""The toy world: one coloured shape on a 3x3 board, edited step by step, with words and pictures for every state.

A prompt shows a start picture and asks for a chain of edits; the right answer is, per edit, a caption and the picture:

    paint it blue, move it to center. <BEGIN> a red circle at top left <image>
    ->  a blue circle at top left (picture)   a blue circle at center (picture)

Every true state can be recovered from the words of the prompt alone, so judging by rules needs no hidden labels.

    python shapes.py --out samples.png                # a sheet: start, true states, a noisy warm-up story
    python shapes.py --dump DIR --count 64 --edits 2  # DIR/prompts.jsonl and DIR/images/*.png
"""
import argparse
import hashlib
import itertools
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {"red": (215, 40, 40), "green": (30, 150, 60), "blue": (40, 80, 215), "yellow": (235, 190, 20)}
CELLS = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")
BACKGROUND = (242, 242, 242)
CELL_SIZE = 8                       # pixels; also the patch size of the miniature's image tokenizer: grids are aligned
PICTURE_SIZE = 3 * CELL_SIZE
HELDOUT_SHARE = 0.1                 # of all (start, edit chain) combinations
# Choice: these two pairs because the systematic errors below only ever turn things red or round, so not even a wrong
# warm-up picture shows one of them.
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
SCENES = [Scene(*parts) for parts in itertools.product(*FIELD_VALUES.values())]                     # all 144 of them
SEEN_SCENES = [scene for scene in SCENES if scene[:2] not in HELDOUT_PAIRS]


# ---------------------------------------------------------------- words

def caption(scene: Scene) -> str:
    return f"a {scene.colour} {scene.shape} at {scene.cell}"


def edit_words(edit: Edit) -> str:
    return {"move": "move it to {}", "paint": "paint it {}", "turn": "turn it into a {}"}[edit.kind].format(edit.value)


EDITS = [Edit(kind, value) for kind, field in EDIT_FIELD.items() for value in FIELD_VALUES[field]]
SCENE_OF_CAPTION = {caption(scene): scene for scene in SCENES}
EDIT_OF_WORDS = {edit_words(edit): edit for edit in EDITS}


def parse_caption(text: str) -> Scene | None:
    """The scene that a caption names; None for anything that is not exactly a caption (spacing aside)."""
    return SCENE_OF_CAPTION.get(" ".join(text.split()))


def parse_edits(text: str) -> list[Edit] | None:
    """'paint it blue, move it to center' -> two edits; None if any piece is not an edit."""
    edits = [EDIT_OF_WORDS.get(" ".join(piece.split())) for piece in text.strip().rstrip(".").split(",")]
    return None if None in edits else edits


def apply(scene: Scene, edit: Edit) -> Scene:
    return scene._replace(**{EDIT_FIELD[edit.kind]: edit.value})


def prompt_words(start: Scene, edits: list[Edit]) -> str:
    return ", ".join(map(edit_words, edits)) + f". <BEGIN> {caption(start)} <image>"


def states_of_prompt(text: str) -> list[Scene]:
    """The true states, start first, recovered from the words of a prompt."""
    parts = re.fullmatch(r"\s*(.*?)\.\s*<BEGIN>\s*(.*?)\s*<image>\s*", text, flags=re.DOTALL)
    edits, start = (parse_edits(parts[1]), parse_caption(parts[2])) if parts else (None, None)
    if edits is None or start is None:
        raise ValueError(f"not a prompt of the toy world: {text!r}; expected for example "
                         f"{prompt_words(SCENES[0], [Edit('paint', 'blue')])!r}")
    return list(itertools.accumulate(edits, apply, initial=start))


def wanted_steps(text: str) -> int | None:
    """The number of edits that a prompt asks for; None where it is not a prompt of the toy world."""
    try:
        return len(states_of_prompt(text)) - 1
    except ValueError:
        return None


# ---------------------------------------------------------------- pictures

def draw_cell(shape: str, colour: str) -> np.ndarray:
    """One cell with its shape, antialiased: drawn 16 times too large, then averaged. -> uint8 [8, 8, 3]"""
    zoom = 16
    cell = Image.new("RGB", (CELL_SIZE * zoom, CELL_SIZE * zoom), BACKGROUND)
    draw, fill = ImageDraw.Draw(cell), COLOURS[colour]

    def box(left, top, right, bottom):                      # in pixels of the small cell, right and bottom exclusive
        return [left * zoom, top * zoom, right * zoom - 1, bottom * zoom - 1]
    if shape == "circle":
        draw.ellipse(box(1, 1, 7, 7), fill=fill)
    elif shape == "square":
        draw.rectangle(box(0.5, 0.5, 7.5, 7.5), fill=fill)
    elif shape == "triangle":
        draw.polygon([(4 * zoom, 0.5 * zoom), (7.5 * zoom, 7 * zoom), (0.5 * zoom, 7 * zoom)], fill=fill)
    else:                                                   # a cross, its arms two pixels wide
        draw.rectangle(box(3, 0.5, 5, 7.5), fill=fill)
        draw.rectangle(box(0.5, 3, 7.5, 5), fill=fill)
    return np.asarray(cell.resize((CELL_SIZE, CELL_SIZE), Image.BOX))


def render(scene: Scene | None) -> np.ndarray:
    """-> uint8 [24, 24, 3]; None is the empty board."""
    picture = np.empty((PICTURE_SIZE, PICTURE_SIZE, 3), np.uint8)
    picture[:] = BACKGROUND
    if scene is not None:
        row, column = (CELL_SIZE * i for i in divmod(CELLS.index(scene.cell), 3))
        picture[row:row + CELL_SIZE, column:column + CELL_SIZE] = draw_cell(scene.shape, scene.colour)
    return picture


def enlarge(picture: np.ndarray, factor: int) -> np.ndarray:
    """Nearest neighbour, for showing. [H, W, 3] -> [factor H, factor W, 3]"""
    return picture.repeat(factor, axis=0).repeat(factor, axis=1)


RENDERS = np.stack([render(scene) for scene in SCENES]).reshape(len(SCENES), -1) / 255
# Mean squared distance on the 0..1 scale. Ours: half the 0.0040 between the two closest scenes; the empty board is
# 0.0095 away from its nearest scene, so an empty, doubled or smeared picture never counts as one.
MATCH_DISTANCE = 0.002


def recognise(pictures: np.ndarray) -> list[Scene | None]:
    """uint8 [B, H, W, 3] -> the scene each picture shows and nothing else; None where it is none of them. Pictures of
    another size than ours (a larger model's) are looked at in ours."""
    if pictures.shape[1:3] != (PICTURE_SIZE, PICTURE_SIZE):
        size = (PICTURE_SIZE, PICTURE_SIZE)
        pictures = np.stack([np.asarray(Image.fromarray(p).resize(size, Image.BOX)) for p in pictures])
    flat = pictures.reshape(len(pictures), -1).astype(np.float32) / 255                                 # (B, 1728)
    squares = (flat ** 2).sum(1)[:, None] - 2 * flat @ RENDERS.T + (RENDERS ** 2).sum(1)
    distance = squares / flat.shape[1]                                                                  # (B, 144)
    return [SCENES[i] if row[i] < MATCH_DISTANCE else None for row, i in zip(distance, distance.argmin(axis=1))]


def matches(picture: np.ndarray, scene: Scene) -> bool:
    return recognise(picture[None]) == [scene]


# ---------------------------------------------------------------- prompts

@dataclass
class Prompt:
    text: str              # "paint it blue. <BEGIN> a red circle at top left <image>"
    picture: np.ndarray    # what <image> stands for, uint8 [24, 24, 3]


def split_of(text: str) -> str:
    """The split of a prompt is a function of its words alone, the same in every run and on every machine.

    "pairs": some state, the start included, shows a held-out colour-shape pair. Of the rest a tenth is "heldout".
    """
    if any(state[:2] in HELDOUT_PAIRS for state in states_of_prompt(text)):
        return "pairs"
    draw = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2 ** 32
    return "heldout" if draw < HELDOUT_SHARE else "train"


def sample_prompt(rng: random.Random, edits: int, split: str) -> Prompt:
    """A prompt of `edits` edits, each of which really changes the scene; split is "train", "heldout" or "pairs"."""
    if split not in ("train", "heldout", "pairs"):
        raise ValueError(f"split {split!r}: expected train, heldout or pairs")
    while True:                                         # the rarest split is about a tenth of all draws
        start = rng.choice(SCENES)
        state, chain = start, []
        for _ in range(edits):
            kind = rng.choice(list(EDIT_FIELD))         # by kind first: moves would be half of all edits otherwise
            edit = rng.choice([e for e in EDITS if e.kind == kind and apply(state, e) != state])
            state, chain = apply(state, edit), chain + [edit]
        text = prompt_words(start, chain)
        if split_of(text) == split:
            return Prompt(text, render(start))


# ---------------------------------------------------------------- the warm-up's noise

@dataclass
class Noise:
    """How wrong the warm-up stories are. Systematic errors are more likely than the truth, so the warmed-up model makes
    them even when it decodes greedily, and GRPO has something to correct; random ones only blur it."""
    systematic: float = 0.6    # yellow painted red, a triangle drawn as a circle, "right" called "center": each
    random: float = 0.15       # of the steps get a random wrong caption or a random wrong picture
    fault: float = 0.25        # of the stories have their format broken


FAULTS = ("no_think_open", "no_think_close", "no_vis_close", "no_image", "extra_text")


def noisy_story(rng: random.Random, prompt: str, noise: Noise = Noise()
                ) -> tuple[list[tuple[str, np.ndarray]], str | None]:
    """A warm-up answer with errors: [(caption, picture), ...] and the format fault to be applied to its tokens, if any.

    Each error looks at the true state only, so one wrong step does not make the next one wrong.
    """
    story = []
    for state in states_of_prompt(prompt)[1:]:
        told, drawn = state, state
        if state.cell == "right" and rng.random() < noise.systematic:
            told = told._replace(cell="center")
        if state.colour == "yellow" and rng.random() < noise.systematic:
            drawn = drawn._replace(colour="red")
        if state.shape == "triangle" and rng.random() < noise.systematic:
            drawn = drawn._replace(shape="circle")
        if rng.random() < noise.random:
            wrong = rng.choice([scene for scene in SEEN_SCENES if scene != state])
            told, drawn = (wrong, drawn) if rng.random() < 0.5 else (told, wrong)
        story.append((caption(told), render(drawn)))
    return story, rng.choice(FAULTS) if rng.random() < noise.fault else None


# ---------------------------------------------------------------- run alone: look at it, or write it to disk

def sheet(rng: random.Random, rows: int) -> Image.Image:
    """Per prompt two rows: start and true states; below them the same story with the warm-up's noise."""
    tile, label = 6 * PICTURE_SIZE, 14
    page = Image.new("RGB", (4 * (tile + 16), rows * 2 * (tile + 2 * label + 8)), "white")
    draw = ImageDraw.Draw(page)
    for row in range(rows):
        prompt = sample_prompt(rng, 1 + row % 3, "train")
        states = states_of_prompt(prompt.text)
        story, fault = noisy_story(rng, prompt.text)
        true = [(caption(state), render(state)) for state in states]
        for half, (title, tiles) in enumerate([(prompt.text, true), (f"noisy, format fault: {fault}", [None] + story)]):
            top = (2 * row + half) * (tile + 2 * label + 8)
            draw.text((8, top), title, fill="black")
            for column, step in enumerate(tiles):
                if step is not None:
                    page.paste(Image.fromarray(enlarge(step[1], 6)), (8 + column * (tile + 16), top + 2 * label))
                    draw.text((8 + column * (tile + 16), top + label), step[0], fill="gray")
    return page


def dump(folder: Path, rng: random.Random, count: int, edits: int, split: str) -> None:
    """prompts.jsonl, one {"prompt": text, "images": [path]} a line, beside the start pictures it names."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    with open(folder / "prompts.jsonl", "w") as lines:
        for i in range(count):
            prompt, name = sample_prompt(rng, edits, split), f"images/{i:06d}.png"
            Image.fromarray(prompt.picture).save(folder / name)
            lines.write(json.dumps({"prompt": prompt.text, "images": [name]}) + "\n")


def main() -> None:
    """Draw a sheet, or dump prompts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("samples.png"), help="where the sheet goes")
    parser.add_argument("--dump", type=Path, help="write prompts to this folder instead of a sheet")
    parser.add_argument("--count", type=int, default=64, help="prompts to dump")
    parser.add_argument("--edits", type=int, default=2, help="edits per dumped prompt")
    parser.add_argument("--split", default="train", choices=("train", "heldout", "pairs"), help="of the dumped prompts")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    if args.dump:
        dump(args.dump, rng, args.count, args.edits, args.split)
        print(f"{args.count} prompts in {args.dump / 'prompts.jsonl'}")
    else:
        sheet(rng, rows=4).save(args.out)
        print(f"sheet in {args.out}")


if __name__ == "__main__":
    main()
