"""Warm-up: a model that can read pictures and draw them learns to do both in turn (paper, Sec. 3.1, Eq. (1)).

    1 image tokenizer  pictures -> residual codes -> pictures, then frozen           (VILA-U brings its own)
    2 pretraining      edits in words, text-to-image, image-to-text; never in turn   (VILA-U brings its own)
    3 warm-up          noisy interleaved stories, mixed with the two single tasks so that nothing is forgotten

Stages 2 and 3 minimise Eq. (1), the negative log-likelihood of every answer token, text or image code alike:
`warmup_loss`. Stage 3 learns from the toy world, or from published files of the paper's sources (--data).

    python warmup.py   # two CPU cores: 90 seconds -> out/warmup/ (policy/, samples/, metrics.jsonl, report)
    torchrun --nproc_per_node=2 warmup.py        # two processes share the samples of each step
    python warmup.py --preset paper --out out/warmup-7b \\
        --data activitynet=DIR,genhowto=DIR,openstory=DIR,emova=DIR,journeydb=DIR   # stage 3, QLoRA, on a GPU
    torchrun --nproc_per_node=8 warmup.py --preset paper-full --data ... --out out/warmup-7b-full   # all

The same command resumes a run that was interrupted, and ends with the same weights.
"""
from common import (Count, LearningRate, Natural, Positive, Run, Seed, UserError, Weights, average_gradients,
                    averaged, check_config, check_content, check_finite, check_settings, claim, end_processes,
                    note_processes, optimizer_tensors, parse_config, peak_gib, process_count, process_rank,
                    require, restore_optimizer, run_main, seeded, shown, start_processes, wait_for_all, whole,
                    write_report, write_text)

import itertools
import json
import math
import random
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import shapes
from data import (I2T_QUESTION, KINDS, MARKS, PRETRAINING, READERS, CodeCache, LeftOut, Sample, hash_samples,
                  keep_usable, parse_sources, read_sources, row_of, toy_i2t, toy_prompt, toy_story, toy_t2i)
from model import (DecoderConfig, DepthConfig, UnifiedModel, by_modality, chat, checkpoint_hash, gathered,
                   load, load_training, prepare_training, save)
from rewards import RulesText, RulesVisual, group_record, judge
from tokenizer import (BYTE, CONTROL, NORMAL, SPACE, SPECIAL_TOKENS, UNKNOWN, ImageTokenizer, TextTokenizer,
                       VisionConfig, pad, preprocess, to_pictures, write_field)


@dataclass
class Config:
    # -- data
    data: str = ""                   # stage 3 from files: NAME=DIR,NAME=DIR; empty: the toy world
    mix: Weights = (2.0, 1.0, 1.0)   # stage 3: ratio of interleaved, understanding and text-to-image samples
    edits: Count = 3                 # toy world: edits a story, so its answer has as many steps
    cache: str = "out/codes"         # folder that keeps the image codes of --data for later runs
    # -- algorithm
    loss: Literal["eq1", "official"] = "eq1"   # eq1: mean over decisions; official: text mean + image mean
    tokenizer_steps: Count = 500     # stage 1: optimizer steps
    pretrain_steps: Count = 200      # stage 2
    warmup_steps: Natural = 180      # stage 3; 0: leave it out
    batch: Count = 48                # samples a step of stages 2 and 3
    lr: LearningRate = 2e-3          # peak learning rate of stage 2 (AdamW)
    warmup_lr: LearningRate = 1e-3   # peak learning rate of stage 3 (AdamW)
    # -- adapters
    model: str = ""                  # folder or hub id to start stage 3 from; empty: all stages, from nothing
    base: str = ""                   # where the base of a model with adapters is now, if it was moved
    lora_rank: Natural = 0           # of adapters on the decoder's linear layers; 0: train the whole policy
    lora_alpha: Positive = 16.0      # adapters are scaled by alpha / rank
    quantize: Literal["none", "nf4"] = "none"  # nf4: the frozen base in 4 bits (QLoRA)
    # -- run
    out: str = "out/warmup"          # run directory
    seed: Seed = 0                   # of weights and data
    precision: Literal["auto", "float32", "bf16"] = "auto"   # of the passes; auto: bf16 on a GPU
    device: str = "auto"             # cpu, cuda, mps; auto takes the best there is
    micro_batch: Count = 48          # samples a forward pass; changes memory, never the gradient
    checkpointing: bool = False      # recompute layers in the backward pass: less memory, a third more time
    save_every: Count = 100          # steps between checkpoints
    preset: str = ""                 # paper: QLoRA on VILA-U 7B; paper-full: all of it, on a node


# --preset paper: what the paper states is marked so. The rest is ours and fits one GPU (its QLoRA variant).
PAPER = dict(
    model="mit-han-lab/vila-u-7b-256",                     # paper: 256 x 256 pictures
    mix=(0.3, 1.0, 1.0),                                   # paper: 0.3M interleaved samples, 1M and 1M others
    lora_rank=64, lora_alpha=16.0, quantize="nf4",         # ours
    warmup_steps=3000, warmup_lr=1e-4, batch=64,           # ours
    micro_batch=2, checkpointing=True, save_every=100,     # ours
)
# --preset paper-full: all of the model is trained, as in the paper's main result.
PAPER_FULL = PAPER | dict(
    lora_rank=0, quantize="none",                          # paper
    warmup_lr=2e-5, batch=128,                             # ours
)
PRESETS = {"paper": PAPER, "paper-full": PAPER_FULL}
# Settings that may change when a run is resumed.
FREE = ("model", "base", "data",     # compared by their content
        "device", "save_every", "out", "micro_batch", "checkpointing", "precision", "preset", "cache")


# ------------------------------------------------------------------------------------------------------------
# Eq. (1)

def warmup_loss(logp: Tensor, mask: Tensor, is_image: Tensor, kind: str = "eq1",
                counts: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, dict]:
    """Eq. (1): the negative log-likelihood of text tokens plus that of image codes.

    logp, mask: [B, T, D], log-prob of every decision and where there is one; is_image: [B, T].
    counts: how many text and image decisions the whole batch has, where this is one micro-batch of it. The
        losses of the micro-batches then add up to the batch's.
    Returns the loss, and as floats the loss and its two parts in nats a decision.

    Choice: the equation is a sum over tokens. We take its mean over the batch's decisions, so that the size
    of a step does not depend on the batch or on the length of its answers.
    Choice: "official" is the loss of VILA-U's published code, mean over text plus mean over codes. It is not
    the default: Eq. (1) weighs every decision alike, this one weighs the rarer kind more.
    """
    text, image = by_modality(mask, is_image)                                       # (B, T, D) each
    text_count, image_count = counts or (text.sum(), image.sum())
    text_nll = -(logp * text).sum()                                         # first sum of Eq. (1)
    image_nll = -(logp * image).sum()                                       # second sum of Eq. (1)
    text_mean = text_nll / text_count.clamp(min=1)
    image_mean = image_nll / image_count.clamp(min=1)
    if kind == "official":
        loss = text_mean + image_mean
    else:
        loss = (text_nll + image_nll) / (text_count + image_count)
    return loss, {"loss": loss.item(), "loss/text": text_mean.item(), "loss/image": image_mean.item()}


# ------------------------------------------------------------------------------------------------------------
# Batches: which samples a step sees, and as which tensors

WASTE = 0.1          # a micro-batch is at most this share padding


def padding(groups: list[list[tuple]]) -> float:
    """Share of padding when every group of rows, its longest row first, becomes one tensor."""
    tokens = sum(len(row[0]) for group in groups for row in group)
    positions = sum(len(group) * len(group[0][0]) for group in groups)
    return 1 - tokens / positions


def micro_batches(samples: list[Sample], model: UnifiedModel, codes: CodeCache,
                  most: int) -> tuple[list[tuple[Tensor, ...]], float]:
    """Samples -> micro-batches of at most `most` rows, and the share of padding over all of them.

    A micro-batch is (tokens [B, T, D], is_image [B, T], mask [B, T, D]). Rows are sorted, longest first. A
    row that would bring its micro-batch above WASTE opens the next one: stories are three times as long as
    questions about a picture.
    """
    groups = []
    for row in sorted((row_of(s, model, codes) for s in samples), key=lambda row: -len(row[0])):
        if not groups or len(groups[-1]) == most or padding([[*groups[-1], row]]) > WASTE:
            groups.append([])
        groups[-1].append(row)
    batches = [tuple(pad(column).to(model.device) for column in zip(*group, strict=True)) for group in groups]
    return batches, padding(groups)


Batches = Callable[[int], list[Sample]]         # step -> the samples of that step


def toy_batches(shares: dict, config: Config, stage: str) -> Batches:
    """{sample function: share} -> the batches of a stage.

    A batch depends on seed, stage and step alone, so a resumed run sees the batches of an uninterrupted one.
    """
    def batch(step: int) -> list[Sample]:
        rng = random.Random(f"{config.seed}/{stage}/{step}")
        makers = rng.choices(list(shares), list(shares.values()), k=config.batch)
        return [make(rng, config.edits) for make in makers]
    return batch


def published_batches(samples: dict[str, list[Sample]], model: UnifiedModel, run: Run, config: Config,
                      codes: CodeCache, left_out: LeftOut) -> tuple[Batches, list[Sample]]:
    """Samples of files by kind -> the batches of stage 3, and the interleaved samples.

    Kinds are drawn in the ratio --mix; the samples of a kind are shuffled once and come in turn, again and
    again. Both depend on the seed alone. Only pictures that the run will use are encoded, before training.
    Samples with broken pictures are left out. Counts and what was left out go to data.json.
    Raises UserError for a kind that --mix asks for and that has no usable sample.
    """
    total = config.warmup_steps * config.batch
    order = random.Random(f"{config.seed}/mix").choices(KINDS, config.mix, k=total)
    usable = {kind: [] for kind in KINDS}
    counts = {}
    for kind in KINDS:
        draws = order.count(kind)
        if not draws:
            continue
        shuffled = random.Random(f"{config.seed}/{kind}").sample(samples[kind], len(samples[kind]))
        needed = itertools.islice(keep_usable(shuffled, model, codes, left_out), draws)
        usable[kind] = list(tqdm(needed, desc=f"codes of {kind} samples", total=min(draws, len(shuffled)),
                                 disable=not run.writes))
        size = len(usable[kind])
        if not size:
            raise UserError(f"--mix {shown(config.mix)} asks for {kind} samples: --data has no usable one")
        counts[kind] = {"samples": size, "draws": draws, "epochs": round(draws / size, 2)}
        tqdm.write(f"{kind:14} {size:9,} samples, {draws:,} of {total:,} draws: {draws / size:.2f} epochs")
    codes.flush()
    tqdm.write(f"image codes: {codes.encoded:,} pictures encoded now, the others were in {codes.folder}")
    record = {"kinds": counts, "left_out": left_out.reasons(), "records": left_out.list}
    if run.writes:
        write_text(run.folder / "data.json", json.dumps(record, indent=1))
    endless = {kind: itertools.cycle(usable[kind]) for kind in KINDS}
    in_order = [next(endless[kind]) for kind in order]

    def batch(step: int) -> list[Sample]:
        return in_order[step * config.batch:(step + 1) * config.batch]
    return batch, usable["interleaved"]


# ------------------------------------------------------------------------------------------------------------
# The miniature: VILA-U's architecture in small

def train_bpe(texts: list[str], vocab_size: int, path: Path) -> None:
    """Learn BPE pieces from a few texts and write a SentencePiece model file of at most `vocab_size` pieces.

    Words start at a space and merges stay inside words, so every word of a small world becomes one piece.
    """
    words = Counter()
    for text in texts:
        words.update(re.findall(f"{SPACE}[^{SPACE}]*", SPACE + text.replace(" ", SPACE)))
    symbols_of = {word: list(word) for word in words}
    letters = sorted({letter for word in words for letter in word})
    merged: list[str] = []
    while len(merged) + len(letters) + 259 < vocab_size:                   # 259: <unk> <s> </s> and the bytes
        pairs = Counter()
        for word, symbols in symbols_of.items():
            for pair in zip(symbols, symbols[1:]):
                pairs[pair] += words[word]
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))         # the most frequent, ties by spelling
        piece = "".join(best)
        if piece not in merged:
            merged.append(piece)
        for symbols in symbols_of.values():
            i = 0
            while i + 1 < len(symbols):
                if (symbols[i], symbols[i + 1]) == best:
                    symbols[i:i + 2] = [piece]
                i += 1
    write_sentencepiece(merged + letters, path)


def write_sentencepiece(texts: list[str], path: Path) -> None:
    """Write a SentencePiece BPE model file as LLaMA's: <unk> <s> </s>, 256 bytes, `texts` best first."""
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    pieces += [(text, -float(rank), NORMAL) for rank, text in enumerate(texts)]
    model = b""
    for text, score, kind in pieces:
        model += write_field(1, write_field(1, text.encode()) + write_field(2, score) + write_field(3, kind))
    trainer = write_field(3, 2) + write_field(4, len(pieces)) + write_field(35, 1)  # BPE, size, byte fallback
    normalizer = write_field(1, b"identity") + write_field(3, 1) + write_field(4, 0) + write_field(5, 1)
    path.write_bytes(model + write_field(2, trainer) + write_field(3, normalizer))


def miniature(seed: int, folder: Path, texts: list[str] = ()) -> UnifiedModel:
    """Make an untrained miniature: pictures of 24x24 pixels and 3x3 positions, a decoder of width 128.

    folder: where its tokenizer.model is written.
    texts: what it is to learn from, if not the toy world. They get words of their own and a longer context.

    Choice: the grid of positions is the board's. On any other one a code depends on several cells.
    Choice: a codebook of 16 for each of the paper's 4 depths instead of one that all depths share. Both
    reconstruct every scene. With this one each content of a cell has exactly one tuple of codes.
    """
    torch.manual_seed(seed)
    folder.mkdir(parents=True, exist_ok=True)
    words = [shapes.caption(scene) for scene in shapes.SCENES]
    words += [shapes.edit_words(edit) for edit in shapes.EDITS]
    words += [chat(I2T_QUESTION, ""), "x, x. <BEGIN>"]        # the rest of a prompt, its punctuation included
    words += [MARKS.sub(" ", text) for text in texts]
    train_bpe(words, 2048 if texts else 512, folder / "tokenizer.model")
    text = TextTokenizer(folder / "tokenizer.model")
    text.add(SPECIAL_TOKENS)
    model = UnifiedModel(
        DecoderConfig(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
                      vocab_size=text.vocab_size, context=2048 if texts else 256),
        DepthConfig(width=96, layers=2, heads=4),
        VisionConfig(image_size=24, patch_size=8, width=64, mlp_width=128, layers=1, heads=16,
                     codebook_size=16, depth=4, shared_codebook=False,
                     ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=0, attn_resolutions=(), z_channels=32,
                     resolution=24))
    torch.nn.init.normal_(model.vision.tower.position, std=0.02)
    for block in model.vision.tower.blocks:            # attention starts without influence: see locality_loss
        torch.nn.init.zeros_(block.attn.o_proj.weight)
        torch.nn.init.zeros_(block.attn.o_proj.bias)
    for module in (model.decoder, model.projector, model.depth):
        for name, p in module.named_parameters():
            if p.dim() > 1:
                std = 0.02 if "embed" in name or "position" in name else p.shape[-1] ** -0.5
                torch.nn.init.normal_(p, std=std)
    model.text, model.system_prompt = text, ""
    return model


# ------------------------------------------------------------------------------------------------------------
# Stage 1: the image tokenizer

TOKENIZER_LR = 2e-3
PLAIN, JOINT = 0.2, 0.8        # shares of the steps: no codes before the first, frozen codes after the second
SETTLED = 0.6                  # share of the joint steps after which dead codes are no longer restarted
COMMITMENT = 0.25              # as VILA-U (latent_loss_weight)
LOCALITY = 100.0               # weight of `locality_loss`
# Choice: the codebooks' running means keep 0.95 a step; VILA-U's 0.99 is too slow for 300 steps.
DECAY = 0.95
# The 17 things that a cell can hold, the empty one first. [17, 8, 8, 3] in -1..1
CELLS = [shapes.render(None)[:shapes.CELL_SIZE, :shapes.CELL_SIZE],
         *(shapes.draw_cell(shape, colour) for shape in shapes.SHAPES for colour in shapes.COLOURS)]
CONTENTS = torch.from_numpy(np.stack(CELLS)).float() / 127.5 - 1


def sample_boards(generator: torch.Generator, count: int = 16, fill: float = 0.35) -> Tensor:
    """Draw boards whose cells hold a shape with probability `fill` -> pixels [count, 3, 24, 24] in -1..1.

    Choice: boards hold any number of shapes, although the world's scenes hold one. So each picture trains
    several cells, cells are independent, and the policy's wrong drawings are still decodable.
    """
    content = torch.randint(1, len(CONTENTS), (count, 3, 3), generator=generator)
    content = torch.where(torch.rand(count, 3, 3, generator=generator) < fill, content, 0)
    pixels = CONTENTS[content].permute(0, 5, 1, 3, 2, 4)                     # (count, RGB, row, y, column, x)
    return pixels.reshape(count, 3, shapes.PICTURE_SIZE, shapes.PICTURE_SIZE)


def locality_loss(tokenizer: ImageTokenizer, pixels: Tensor, features: Tensor,
                  generator: torch.Generator) -> Tensor:
    """Mean squared change of a cell's feature when the other cells change and the board is shifted.

    pixels [B, 3, H, W], their features [B, N, C]. Half of the cells are replaced by those of another board,
    and all cells are shifted together.

    Choice: VILA-U has no such loss. Without it the tower's attention smears a shape over the codes of all
    nine cells, which the small decoder has to predict: the empty cell alone takes dozens of code tuples.
    """
    grid, patch = tokenizer.config.grid, tokenizer.config.patch_size
    keep = (torch.rand(len(pixels), grid, grid, generator=generator) < 0.5).to(pixels.device)  # (B, 3, 3)
    down, right = torch.randint(grid, (2,), generator=generator).tolist()
    keep_pixels = keep[:, None].repeat_interleave(patch, 2).repeat_interleave(patch, 3)   # (B, 1, H, W)
    mixed = torch.where(keep_pixels, pixels, pixels.roll(1, 0)).roll((patch * down, patch * right), (2, 3))
    moved = tokenizer.tower(mixed).unflatten(1, (grid, grid)).roll((-down, -right), (1, 2))  # (B, 3, 3, C)
    return (((features - moved.flatten(1, 2)) ** 2).mean(-1) * keep.flatten(1)).mean()


def kmeans(points: Tensor, count: int, generator: torch.Generator, rounds: int = 10) -> tuple[Tensor, Tensor]:
    """points [M, C] -> centres [count, C], and the index of every point's centre [M]."""
    centres = points[torch.randperm(len(points), generator=generator)[:count]]
    for _ in range(rounds):
        nearest = torch.cdist(points, centres).argmin(1)
        size = torch.bincount(nearest, minlength=count)[:, None]
        total = torch.zeros_like(centres).index_add_(0, nearest, points)
        centres = torch.where(size > 0, total / size.clamp(min=1), centres)
    return centres, torch.cdist(points, centres).argmin(1)


class EMACodebooks(torch.nn.Module):
    """Codebooks as running means of the residuals that chose each code: `sums` over `sizes`."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        books = 1 if config.shared_codebook else config.depth
        self.register_buffer("sizes", torch.ones(books, config.codebook_size))
        self.register_buffer("sums", torch.zeros(books, config.codebook_size, config.width))

    @torch.no_grad()
    def start(self, quantizer, features: Tensor, generator: torch.Generator) -> None:
        """Start from k-means centres of features [M, C]. A shared codebook is divided among the depths."""
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
        """Move every code towards the mean of the residuals that chose it.

        residuals [B, N, D, C]: what was left of the features when codes [B, N, D] were chosen.
        """
        books, count = self.sizes.shape
        chosen = codes.movedim(-1, 0).reshape(books, -1)            # (books, M): all depths if shared, or one
        points = residuals.movedim(-2, 0).reshape(books, -1, residuals.shape[-1])   # (books, M, C)
        for book in range(books):
            size = torch.bincount(chosen[book], minlength=count)
            total = torch.zeros_like(self.sums[book]).index_add_(0, chosen[book], points[book])
            self.sizes[book].lerp_(size.float(), 1 - DECAY)
            self.sums[book].lerp_(total, 1 - DECAY)
            if restart:
                dead = self.sizes[book] < 0.05                         # chosen less than once in twenty steps
                fresh = points[book][torch.randint(points.shape[1], (count,), generator=generator)]
                self.sums[book] = torch.where(dead[:, None], fresh, self.sums[book])
                self.sizes[book] = torch.where(dead, 1.0, self.sizes[book])
        self.write(quantizer)

    def write(self, quantizer) -> None:
        """Put the means into the quantizer's tables; their last row is padding.

        The clamp lets a code that nothing chooses fade to zero instead of dividing two vanishing numbers.
        """
        for table, size, total in zip(quantizer.codebooks, self.sizes, self.sums, strict=True):
            table.weight[:-1] = total / size.clamp(min=1e-6)[:, None]


def tokenizer_loss(tokenizer: ImageTokenizer, books: EMACodebooks, step: int, steps: int,
                   generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw boards, encode and decode them -> reconstruction loss, and the losses that only shape the codes.

    Choice: a fifth of the steps runs without quantisation, whose noise from step 0 on costs a long plateau.
    Then the codebooks start as k-means centres. In the last fifth the codes are frozen.
    """
    device = tokenizer.tower.position.device
    quantised, frozen = int(PLAIN * steps), int(JOINT * steps)
    pixels = sample_boards(generator).to(device)
    features = tokenizer.tower(pixels)                                              # (B, N, C)
    shaping = features.new_zeros(())
    if step < frozen:
        shaping = LOCALITY * locality_loss(tokenizer, pixels, features, generator)
    if step == quantised:
        with torch.no_grad():
            many = tokenizer.tower(sample_boards(generator, 128).to(device)).flatten(0, 1)  # (128 N, C)
        books.start(tokenizer.quantizer, many, generator)
    if step >= quantised:
        codes = tokenizer.quantizer.encode(features)                                # (B, N, D)
        sums = tokenizer.vectors(codes).cumsum(-2)                                  # (B, N, D, C)
        if step < frozen:
            whole = features.detach()[..., None, :]                                 # (B, N, 1, C)
            residuals = torch.cat((whole, whole - sums[..., :-1, :]), dim=-2)       # (B, N, D, C)
            restart = step < quantised + SETTLED * (frozen - quantised) and step % 10 == 0
            books.update(tokenizer.quantizer, residuals, codes, restart, generator)
            shaping = shaping + COMMITMENT * ((features[..., None, :] - sums) ** 2).mean()  # at every depth
            features = features + (sums[..., -1, :] - features).detach()    # straight-through
        else:                                                               # the picture decoder learns alone
            features = sums[..., -1, :]
    difference = tokenizer.decoder(features) - pixels
    return (difference ** 2).mean() + 0.5 * difference.abs().mean(), shaping


def tokenizer_rate(step: int, steps: int) -> float:
    """Learning rate of stage 1: a ramp, flat, down to a tenth until the codes freeze, then down once more."""
    frozen = int(JOINT * steps)
    since, until = (SETTLED * frozen, frozen) if step < frozen else (frozen, steps)
    ramp = min(1, (step + 1) / 20)
    return TOKENIZER_LR * ramp * (1 - 0.9 * max(0, (step - since) / (until - since)))


def train_image_tokenizer(model: UnifiedModel, run: Run, config: Config, start: int,
                          tensors: dict[str, Tensor]) -> None:
    """Stage 1: train tower, codebooks and picture decoder together, then the picture decoder alone.

    A step's random numbers follow from seed and step alone, so a resumed run goes on as if never interrupted.
    """
    tokenizer, steps = model.vision.requires_grad_(True), config.tokenizer_steps
    tokenizer.quantizer.requires_grad_(False)                       # moved by running means, not by gradients
    books = EMACodebooks(tokenizer.config).to(model.device)
    trained = [p for p in tokenizer.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=TOKENIZER_LR, betas=(0.9, 0.95))
    restore_optimizer(optimizer, tensors)
    books.load_state_dict({name: tensors.get(name, value) for name, value in books.state_dict().items()})
    bar = tqdm(range(start, steps), desc="tokenizer", initial=start, total=steps)
    for step in bar:
        began = time.perf_counter()
        generator = seeded(config.seed, "tokenizer", step)
        loss, shaping = tokenizer_loss(tokenizer, books, step, steps, generator)
        for group in optimizer.param_groups:
            group["lr"] = tokenizer_rate(step, steps)
        optimizer.zero_grad()                       # sets None: Adam leaves the tower alone once it is frozen
        (loss + shaping).backward()
        optimizer.step()
        run.log(stage="tokenizer", step=step, loss=loss.item(), seconds=time.perf_counter() - began)
        bar.set_postfix(loss=f"{loss.item():.4f}")
        if (step + 1) % config.save_every == 0 and step + 1 < steps:
            state = optimizer_tensors(optimizer) | books.state_dict()
            checkpoint(model, run, config, "tokenizer", step + 1, state)
    tokenizer.requires_grad_(False)
    show_reconstruction(tokenizer, run.folder / "samples" / "tokenizer.png")


@torch.no_grad()
def show_reconstruction(tokenizer: ImageTokenizer, path: Path) -> None:
    """Draw a sheet of scenes, each beside itself decoded from its first 1, 2, .. D codes a position."""
    pictures = [shapes.render(scene) for scene in shapes.SCENES[::25]]
    pixels = torch.stack([preprocess(picture, tokenizer.config.image_size) for picture in pictures])
    pixels = pixels.to(tokenizer.tower.position.device)
    sums = tokenizer.vectors(tokenizer.encode(pixels)).cumsum(-2)                   # (B, N, D, C)
    columns = [pixels]
    for depth in range(tokenizer.config.depth):
        columns.append(tokenizer.decoder(sums[..., depth, :]))
        tqdm.write(f"first {depth + 1} of {tokenizer.config.depth} codes a position: "
                   f"mean squared error {((columns[-1] - pixels) ** 2).mean():.5f}")
    sheet = np.concatenate([np.concatenate(to_pictures(column)) for column in columns], axis=1)
    Image.fromarray(shapes.enlarge(sheet, 4)).save(path)


# ------------------------------------------------------------------------------------------------------------
# Stages 2 and 3: the decoder

MUON_LR = 5e-3       # peak learning rate of Muon in both stages


def make_optimizers(model: UnifiedModel, config: Config, lr: float) -> list[torch.optim.Optimizer]:
    """Make AdamW, and for a policy that is trained from nothing Muon for the matrices of its blocks.

    Choice: Muon (kellerjordan.github.io/posts/muon) orthogonalises the momentum of a matrix. With it the
    miniature is as good after half the steps. Embeddings, heads, norms, biases and the projector stay with
    AdamW, as Muon's author advises. With adapters or a published model Muon is not measured: AdamW alone.
    Choice: the same two under torchrun, where parameters are sharded. AdamW moves every number by itself,
    and where Muon orthogonalises a matrix torch gathers that one.
    """
    matrices = []
    if not config.model:
        blocks = [*model.decoder.layers, *model.depth.blocks]
        matrices = [p for block in blocks for p in block.parameters() if p.dim() == 2]
    others = [p for p in model.policy_parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = [torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=0.0,
                                           adjust_lr_fn="match_rms_adamw"))
    return optimizers


def state_of(optimizers: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The state of several optimizers as named tensors: 'AdamW.optimizer.0.exp_avg'."""
    return {f"{type(optimizer).__name__}.{name}": value for optimizer in optimizers
            for name, value in optimizer_tensors(optimizer).items()}


def restore_state(optimizers: list[torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """Put the tensors of `state_of` back."""
    for optimizer in optimizers:
        prefix = f"{type(optimizer).__name__}."
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        restore_optimizer(optimizer, own)


def schedule(step: int, steps: int) -> float:
    """Share of the peak learning rate: a ramp over the first twentieth, then a cosine down to a tenth."""
    ramp = max(1, steps // 20)
    return min((step + 1) / ramp, 0.55 + 0.45 * math.cos(math.pi * step / steps))


def add_gradients(model: UnifiedModel, samples: list[Sample], codes: CodeCache,
                  config: Config) -> dict[str, float]:
    """Add the gradient of Eq. (1) on one batch -> its losses and the share of padding.

    The size of the micro-batches changes nothing: each is divided by the decisions of the whole batch. Of
    several processes each has its share of the samples. They divide by the mean of their decisions, so that
    the mean of their gradients is the whole batch's.
    """
    batches, waste = micro_batches(samples, model, codes, config.micro_batch)
    decisions = [by_modality(mask, is_image) for _, is_image, mask in batches]
    total = averaged({"text": sum(text.sum().item() for text, _ in decisions),
                      "image": sum(image.sum().item() for _, image in decisions),
                      "passes_max": len(batches)})
    counts = torch.tensor(total["text"]), torch.tensor(total["image"])
    if model.sharded:                                  # all make as many passes, see `with_every_part`
        tokens, is_image, mask = batches[-1]
        batches += [(tokens, is_image, torch.zeros_like(mask))] * (round(total["passes_max"]) - len(batches))
    totals = {"loss": 0.0, "loss/text": 0.0, "loss/image": 0.0}
    for tokens, is_image, mask in batches:
        logp = model.log_probs(tokens, is_image, mask)                              # (B, T, D)
        loss, parts = warmup_loss(logp, mask, is_image, config.loss, counts)
        loss.backward()
        totals = {name: total + parts[name] for name, total in totals.items()}
    return {**totals, "padding": waste}


def train_decoder(model: UnifiedModel, run: Run, config: Config, stage: str, batch: Batches, codes: CodeCache,
                  start: int, tensors: dict[str, Tensor]) -> None:
    """Stages 2 and 3: minimise Eq. (1) on the samples that `batch` gives for every step.

    Raises UserError where the loss is no longer finite, before the weights are touched.
    """
    steps, lr, flag = {"pretrain": (config.pretrain_steps, config.lr, "--lr"),
                       "warmup": (config.warmup_steps, config.warmup_lr, "--warmup-lr")}[stage]
    optimizers = make_optimizers(model, config, lr)
    restore_state(optimizers, tensors)
    kinds = Counter()
    share = slice(process_rank(), None, process_count())             # this process's samples of each step
    bar = tqdm(range(start, steps), desc=stage, initial=start, total=steps, disable=not run.writes)
    for step in bar:
        began = time.perf_counter()
        samples = batch(step)
        model.zero_grad()
        metrics = add_gradients(model, samples[share], codes, config)
        metrics = averaged({**metrics, "peak_gib": peak_gib(model.device)})
        check_finite(f"{stage}, step {step}: the loss", metrics["loss"], flag)
        for optimizer in optimizers:
            average_gradients(optimizer)
        norm = whole(torch.nn.utils.clip_grad_norm_(model.policy_parameters(), 1.0))
        check_finite(f"{stage}, step {step}: the gradient", norm.item(), flag)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * schedule(step, steps)
            optimizer.step()
        run.log(stage=stage, step=step, **metrics, grad_norm=norm.item(), seconds=time.perf_counter() - began)
        bar.set_postfix({name: f"{value:.3f}" for name, value in metrics.items()})
        kinds.update(sample.kind for sample in samples)
        if (step + 1) % config.save_every == 0 and step + 1 < steps:
            checkpoint(model, run, config, stage, step + 1, state_of(optimizers))
    tqdm.write(f"{stage}: samples by kind since the start or the last checkpoint: {dict(kinds)}")


# ------------------------------------------------------------------------------------------------------------
# The three stages

def checkpoint(model: UnifiedModel, run: Run, config: Config, stage: str, step: int,
               tensors: dict[str, Tensor]) -> tuple[str, int, dict[str, Tensor]]:
    """Save the model and where training is: `stage` has done `step` steps. Returns these and the tensors."""
    state = {"stage": stage, "step": step, "lines": run.lines, "processes": process_count(),
             "settings": asdict(config), "content": run.content}
    save(model, run.folder / "policy", state, tensors)
    return stage, step, tensors


def warm_up(config: Config) -> Path:
    """Train in a folder that no other run writes to -> the report (of several processes rank 0 writes it)."""
    _, world, device = start_processes(config.device)
    require(config, "batch", config.batch % world == 0,
            f"a multiple of the {world} processes, which share it")
    with claim(config.out) as folder:
        run_stages(config, folder, device)
        return write_report(folder) if process_rank() == 0 else folder


def run_stages(config: Config, folder: Path, device: torch.device) -> None:
    """Run the stages that are still to be done, from the last checkpoint of the same settings.

    Raises UserError where the run directory belongs to other settings, or --data cannot be used.
    """
    state, tensors = load_training(folder / "policy")
    check_settings(folder, state.get("settings", {}), asdict(config), FREE)
    left_out = LeftOut()
    samples = read_sources(config.data, "--data", READERS, left_out) if config.data else {}
    content = {"model": checkpoint_hash(config.model) if config.model else "",
               "data": hash_samples(sum(samples.values(), []))}
    check_content(folder, state.get("content", {}), content)
    if state.get("stage") == "done":
        return
    if not config.model and state.get("stage", "tokenizer") == "tokenizer":
        if process_rank() == 0:                    # it is small: the other processes wait, then read it
            first_stage(config, samples, state, tensors, device, content)
        wait_for_all()
        state, tensors = load_training(folder / "policy")
    if state:
        model = load(folder / "policy", device, base=config.base)
    else:
        model = load(config.model, device, config.quantize, config.base)
    check_edits(model, config)
    prepare_training(model, config.lora_rank, config.lora_alpha, config.seed, config.precision)
    model.decoder.checkpointing = config.checkpointing
    run = Run(config, state.get("lines", 0), content)
    note_processes(state)
    stage, step = state.get("stage", "warmup"), state.get("step", 0)
    if stage == "pretrain":
        # Choice: edits in words, text-to-image and image-to-text play the part of VILA-U's pretraining.
        # Nothing is interleaved, so the model cannot interleave before the warm-up, as in the paper.
        batch = toy_batches(PRETRAINING, config, "pretrain")
        train_decoder(model, run, config, "pretrain", batch, CodeCache(model), step, tensors)
        stage, step, tensors = checkpoint(model, run, config, "warmup", 0, {})
    if stage == "warmup":
        interleave(model, run, config, samples, left_out, step, tensors)
        checkpoint(model, run, config, "done", 0, {})


def check_edits(model: UnifiedModel, config: Config) -> None:
    """Refuse stories of the toy world that are too long for the model. Raises UserError."""
    stories = [toy_story(random.Random(i), config.edits) for i in range(0 if config.data else 16)]
    longest = max((len(row_of(story, model, CodeCache(model))[0]) for story in stories), default=0)
    if longest > model.decoder.config.context:
        raise UserError(f"--edits {config.edits}: a story of {longest} positions exceeds the decoder's "
                        f"context of {model.decoder.config.context}")


def first_stage(config: Config, samples: dict[str, list[Sample]], state: dict, tensors: dict[str, Tensor],
                device: torch.device, content: dict) -> None:
    """Stage 1, from its last checkpoint or from nothing -> the checkpoint that stage 2 starts from."""
    folder = Path(config.out)
    if state:
        model = load(folder / "policy", device)
    else:
        model = miniature(config.seed, folder / "text", some_texts(samples, config.seed)).to(device)
    check_edits(model, config)
    run = Run(config, state.get("lines", 0), content)
    train_image_tokenizer(model, run, config, state.get("step", 0), tensors)
    checkpoint(model, run, config, "pretrain", 0, {})


def interleave(model: UnifiedModel, run: Run, config: Config, samples: dict[str, list[Sample]],
               left_out: LeftOut, start: int, tensors: dict[str, Tensor]) -> None:
    """Stage 3: interleaved stories mixed with the two single tasks; sheets of answers before and after.

    Choice: the toy stories are wrong on purpose, and some errors are more frequent than the truth
    (`shapes.Noise`). The model learns them too, so GRPO has something to correct, not only to sharpen.
    """
    if config.data:
        codes, judges = CodeCache(model, Path(config.cache), together=True), (None, None)
        batch, prompts = published_batches(samples, model, run, config, codes, left_out)
    else:
        codes, judges, rng = CodeCache(model), (RulesText(), RulesVisual()), random.Random(0)
        shares = dict(zip((toy_story, toy_i2t, toy_t2i), config.mix, strict=True))
        batch = toy_batches(shares, config, "warmup")
        prompts = [toy_prompt(rng, config.edits, "heldout") for _ in range(PROMPTS)]
    sheet = partial(show, model, run, config, prompts[:PROMPTS], codes, judges)
    if start == 0:
        sheet("000000_before", "before the warm-up: it cannot interleave")
    train_decoder(model, run, config, "warmup", batch, codes, start, tensors)
    sheet("999999_after", "after the warm-up")


def some_texts(samples: dict[str, list[Sample]], seed: int) -> list[str]:
    """Prompts and answers of at most 1,000 samples of each kind."""
    chosen = []
    for of_kind in samples.values():
        chosen += random.Random(seed).sample(of_kind, min(len(of_kind), 1000))
    return [sample.prompt + sample.answer for sample in chosen]


PROMPTS = 6          # prompts on a sheet
STEP_ROOM = 48       # positions of an answer for the text and the tags of a step


def show(model: UnifiedModel, run: Run, config: Config, prompts: list[Sample], codes: CodeCache,
         judges: tuple, name: str, title: str) -> None:
    """Answer the prompts, with the same random numbers every time -> samples/NAME.json and NAME.png."""
    if not prompts:
        return
    rows = [model.prompt(sample.prompt, codes(sample.prompt_pictures)) for sample in prompts]
    room = model.decoder.config.context - max(map(len, rows))
    budget = min(config.edits * (model.vision_config.positions + STEP_ROOM), room)
    with gathered(model):
        trajectories = model.generate(rows, 1, budget, seeds=[(0, index) for index in range(len(rows))])
    answers = model.read_answers(trajectories)
    scores = judge(prompts, answers, *judges)
    groups = [group_record(prompt, [answer], [score])
              for prompt, answer, score in zip(prompts, answers, scores, strict=True)]
    run.sample(name, title, groups)


def is_done(folder: Path) -> bool:
    """Whether the run directory holds a finished warm-up model."""
    state, _ = load_training(folder / "policy")
    return state.get("stage") == "done"


def check(config: Config) -> None:
    """Raise UserError for settings that cannot work, before anything is loaded."""
    check_config(config)
    if not config.model and (config.lora_rank or config.quantize != "none"):
        raise UserError("--lora-rank and --quantize need --model: the miniature is trained from nothing")
    if config.preset and not config.data:
        raise UserError(f"--preset {config.preset}: expected --data as well, NAME=DIR,.. of published data; "
                        f"without it the samples would be the toy world's")
    if not config.data:
        return
    kinds = {READERS[name][1] for name, _ in parse_sources(config.data, "--data")}
    for kind, weight in zip(KINDS, config.mix, strict=True):
        if weight and kind not in kinds:
            fitting = " or ".join(name for name, (_, of) in READERS.items() if of == kind)
            raise UserError(f"--mix {shown(config.mix)} asks for {kind} samples, but --data has no source of "
                            f"them: add {fitting}, or give them weight 0")


def main() -> None:
    """Run the three stages."""
    config = parse_config(Config, presets=PRESETS, names={"data": READERS})
    check(config)
    print(f"warm-up done: {warm_up(config)}")
    end_processes()


if __name__ == "__main__":
    run_main(main)
