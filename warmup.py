"""Warm-up: a model that can read pictures and draw them learns to do both in turn (paper, Sec. 3.1, Eq. 1).

    1 image tokenizer   pictures -> residual codes -> pictures, then fixed             (VILA-U brings its own)
    2 pretraining       edits in words, text-to-image, image-to-text; never interleaved (stands for VILA-U's own)
    3 warm-up           noisy interleaved stories mixed with the two single tasks, so that nothing is forgotten

The loss of stages 2 and 3 is Eq. (1): the negative log-likelihood of every answer token, text or image code alike.

    python warmup.py          # two CPU cores: 3 minutes -> out/warmup/ (policy/, samples/, metrics.jsonl, report.html)
    python warmup.py --preset paper --out out/warmup-7b      # stage 3 alone, QLoRA on the published VILA-U 7B (a GPU)
"""
import base64
import io
import json
import math
import platform
import random
import re
import sys
import textwrap
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import shapes
from model import DecoderConfig, DepthConfig, UnifiedModel, chat, load, load_training, save, train_only
from rewards import RulesText, RulesVisual, Scores, judge
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
    mix: float = 0.5                 # share of interleaved stories in stage 3, the rest is half t2i, half i2t
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
    mix=0.3 / 2.3,                                                # paper: 0.3M interleaved, 1M and 1M others
    lora_rank=64, lora_alpha=16.0, quantize="nf4", checkpointing=True,                         # ours
    warmup_steps=3000, batch=64, micro_batch=2, warmup_lr=1e-4, save_every=100,                # ours
)


# ---------------------------------------------------------------------------------------------------------------------
# Data: one sample type, three kinds of samples

@dataclass
class Sample:
    """One supervised pair: a prompt with its pictures, an answer in written form with its pictures. `<image>` marks
    say where pictures go."""
    prompt: str
    prompt_pictures: list
    answer: str = ""
    answer_pictures: list = field(default_factory=list)
    draw: bool = False               # text-to-image: the prompt ends in <im_start>


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
    return Sample(prompt.replace(" <image>", ""), [], ", ".join(captions) + "</s>")


def t2i_sample(rng: random.Random, edits: int = 0) -> Sample:
    """Text to image: a caption, its picture."""
    scene = rng.choice(shapes.SCENES)
    return Sample(shapes.caption(scene), [], f"<image>{IMAGE_END}</s>", [shapes.render(scene)], draw=True)


def i2t_sample(rng: random.Random, edits: int = 0) -> Sample:
    """Image to text: a picture and a question, the caption."""
    scene = rng.choice(shapes.SCENES)
    return Sample(f"<image> {I2T_QUESTION}", [shapes.render(scene)], f"{shapes.caption(scene)}</s>")


I2T_QUESTION = "what is it?"
PRETRAINING = {words_sample: 0.5, t2i_sample: 0.25, i2t_sample: 0.25}


def hybrid_mix(interleaved: float) -> dict:
    """The warm-up's mix of kinds: interleaved, understanding and text-to-image."""
    return {story_sample: interleaved, t2i_sample: (1 - interleaved) / 2, i2t_sample: (1 - interleaved) / 2}


def read_prompts(path: Path) -> list[Sample]:
    """Prompts from disk: one {"prompt": text, "images": [path, ...]} a line, paths relative to the file. Raises
    UserError, naming file and line, for whatever is broken."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts {path}: cannot be read ({error})")
    samples = []
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            text, names = entry["prompt"], entry.get("images", [])
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f'{where}: expected {{"prompt": text, "images": [paths]}}, found {line[:60]!r}')
        if not isinstance(text, str) or not text.strip():
            raise UserError(f"{where}: the prompt is empty")
        if text.count("<image>") != len(names):
            raise UserError(f"{where}: {text.count('<image>')} <image> marks but {len(names)} images")
        samples.append(Sample(text, [read_picture(path.parent / name, where) for name in names]))
    if not samples:
        raise UserError(f"--prompts {path}: no prompt in it")
    return samples


class Codes:
    """Pictures -> codes, each distinct picture encoded once (the image tokenizer is fixed by now)."""

    def __init__(self, model: UnifiedModel):
        self.model, self.known = model, {}

    def __call__(self, pictures: list) -> list[Tensor]:
        keys = [(p.shape, p.tobytes()) for p in pictures]
        new = {key: picture for key, picture in zip(keys, pictures) if key not in self.known}
        if new:
            self.known.update(zip(new, self.model.codes(list(new.values()))))
        return [self.known[key] for key in keys]


def batch_of(samples: list[Sample], model: UnifiedModel, codes: Codes) -> tuple[Tensor, Tensor, Tensor]:
    """Samples -> tokens [B, T, D], is_image [B, T], mask [B, T, D]: True on the answers' decisions."""
    D, tokens, is_image, mask = model.vision_config.depth, [], [], []
    for s in samples:
        prompt = model.prompt(s.prompt, codes(s.prompt_pictures), s.draw)
        answer = model.sequence(s.answer, codes(s.answer_pictures))[1:]                    # without its <s>
        row = prompt + answer
        decisions = row.is_image[:, None] | (torch.arange(D) == 0)                         # D codes or one token
        decisions[:len(prompt)] = False
        tokens.append(row.tokens), is_image.append(row.is_image), mask.append(decisions)
    return tuple(pad(rows).to(model.device) for rows in (tokens, is_image, mask))


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
    """uint8 [H, W, 3] -> base64 PNG, for JSON and HTML."""
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def record(sample: Sample, answers: list[Answer], scores: list[Scores], advantages: list[Tensor] | None = None) -> dict:
    """One prompt and its answers as plain data: texts, pictures, each step's reward and (mean) advantage."""
    told = []
    for n, (answer, score) in enumerate(zip(answers, scores)):
        steps = [{"text": s.text, "picture": None if s.picture is None else png(s.picture), "reward": r,
                  "advantage": None if advantages is None else advantages[n][s.start:s.stop].mean().item()}
                 for s, r in zip(answer.segments, score.steps)]
        told.append({"steps": steps, "layout": answer.layout, "text": score.text, "visual": score.visual,
                     "format": score.format})
    return {"prompt": sample.prompt, "pictures": [png(p) for p in sample.prompt_pictures], "answers": told}


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


def miniature(seed: int, folder: Path) -> UnifiedModel:
    """VILA-U's architecture in small: 24x24 pictures of 3x3 positions aligned with the board, a decoder of width 128.

    Choice: a codebook of 16 for each of the paper's 4 depths instead of one that they share. Both reconstruct every
    scene; this one gives each content of a cell exactly one tuple of codes.
    """
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    words = [shapes.caption(s) for s in shapes.SCENES] + [shapes.edit_words(e) for e in shapes.EDITS] + \
        [chat(I2T_QUESTION, ""), "x, x. <BEGIN>"]
    train_bpe(words, 512, folder / "tokenizer.model")
    text = TextTokenizer(folder / "tokenizer.model")
    text.add(SPECIAL_TOKENS)
    model = UnifiedModel(
        DecoderConfig(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
                      vocab_size=text.vocab_size, context=256),
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


def train_decoder(model: UnifiedModel, run: Run, config: Config, stage: str, steps: int, lr: float, kinds: dict,
                  start: int, tensors: dict[str, Tensor]) -> None:
    """Stages 2 and 3: Eq. (1) on batches of `kinds` ({sample function: share}). Step s sees data that depend on seed,
    stage and s alone, so a resumed run is the uninterrupted one."""
    optimizer = torch.optim.AdamW(model.policy_parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    restore_optimizer(optimizer, tensors)
    codes, seen = Codes(model), dict.fromkeys((k.__name__ for k in kinds), 0)
    bar = tqdm(range(start, steps), desc=stage, initial=start, total=steps)
    for step in bar:
        began = time.perf_counter()
        rng = random.Random(f"{config.seed}/{stage}/{step}")
        drawn = rng.choices(list(kinds), list(kinds.values()), k=config.batch)
        for kind in drawn:
            seen[kind.__name__] += 1
        batch = batch_of([kind(rng, config.edits) for kind in drawn], model, codes)
        counts, parts = tuple(d.sum() for d in by_modality(batch[2], batch[1])), Counter()
        optimizer.zero_grad()
        for tokens, is_image, mask in zip(*(x.split(config.micro_batch) for x in batch)):
            logp = model.log_probs(tokens, is_image, mask)
            loss, part = warmup_loss(logp, mask, is_image, config.loss, counts)
            if not loss.isfinite():
                raise UserError(f"{stage}: the loss became {loss.item()} at step {step}: lower --lr; the last good "
                                f"checkpoint is intact")
            loss.backward()
            parts.update(part)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, lr)
        norm = torch.nn.utils.clip_grad_norm_(model.policy_parameters(), 1.0)
        optimizer.step()
        run.log(stage=stage, step=step, **parts, grad_norm=norm.item(), seconds=time.perf_counter() - began)
        bar.set_postfix({k: f"{v:.3f}" for k, v in parts.items()})
        if (step + 1) % config.save_every == 0 and step + 1 < steps:
            checkpoint(model, run, config, stage, step + 1, optimizer_tensors(optimizer))
    tqdm.write(f"{stage}: samples by kind since the start or the last checkpoint: {seen}")


def checkpoint(model: UnifiedModel, run: Run, config: Config, stage: str, step: int, tensors: dict) -> None:
    state = {"stage": stage, "step": step, "lines": run.lines, "settings": asdict(config)}
    save(model, run.folder / "policy", state, tensors)


STAGES = ("tokenizer", "pretrain", "warmup", "done")


def warm_up(config: Config) -> None:
    """Run the stages that are still to be done, from the last checkpoint of the same settings."""
    folder, device = Path(config.out), pick_device(config.device)
    state, tensors = load_training(folder / "policy")
    check_settings(folder, state, config)
    if state:
        model = load(folder / "policy", device)
    elif config.model:
        model = load(config.model, device, config.quantize)
        state = {"stage": "warmup", "step": 0, "lines": 0}
    else:
        model = miniature(config.seed, folder / "text").to(device)
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
            train_decoder(model, run, config, stage, config.pretrain_steps, config.lr, PRETRAINING, here, held)
        else:
            show(model, run, "before", "before the warm-up: it cannot interleave")
            train_decoder(model, run, config, stage, config.warmup_steps, config.warmup_lr, hybrid_mix(config.mix),
                          here, held)
            show(model, run, "after", "after the warm-up")
        checkpoint(model, run, config, STAGES[STAGES.index(stage) + 1], 0, {})


def show(model: UnifiedModel, run: Run, name: str, title: str) -> None:
    """A sheet of answers to fixed prompts."""
    rng = random.Random(0)
    samples = [toy_prompt(rng, 2, "heldout") for _ in range(6)]
    codes, budget = Codes(model), 2 * (model.vision_config.positions + 48)
    trajectories = model.generate([model.prompt(s.prompt, codes(s.prompt_pictures)) for s in samples], 1, budget,
                                  generator=torch.Generator().manual_seed(0))
    answers = model.answers(trajectories)
    scores = judge([s.prompt for s in samples], answers, RulesText(), RulesVisual())
    run.sample(name, title, [record(s, [a], [c]) for s, a, c in zip(samples, answers, scores)])


def check_settings(folder: Path, state: dict | None, config) -> None:
    """A checkpoint made with other settings is not gone on with: raises UserError naming the first that differs."""
    free = ("device", "reward_device", "save_every", "updates", "resume", "eval_prompts", "eval_guidance", "out",
            "micro_batch", "checkpointing", "preset")
    for key, value in (state or {}).get("settings", {}).items():
        if key not in free and getattr(config, key, value) != value:
            raise UserError(f"{folder}: was made with --{key.replace('_', '-')} {value}, not {getattr(config, key)}: "
                            f"choose another --out, or delete the folder")


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
    if not 0 <= config.mix <= 1:
        raise UserError(f"--mix {config.mix}: expected 0..1")
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
