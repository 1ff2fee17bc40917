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
import itertools
import json
import math
import random
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Callable, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import shapes
from common import (Count, LearningRate, Natural, Positive, Run, UserError, Weights, check_config,
                    check_settings, optimizer_tensors, parse_config, pick_device, restore_optimizer, run_main,
                    shown, write_report)
from data import (I2T_QUESTION, KINDS, MARKS, PRETRAINING, READERS, CodeCache, LeftOut, Sample, keep_usable,
                  parse_sources, read_sources, row_of, toy_i2t, toy_prompt, toy_story, toy_t2i)
from model import (DecoderConfig, DepthConfig, UnifiedModel, by_modality, chat, load, load_training,
                   prepare_training, save)
from rewards import RulesText, RulesVisual, judge, group_record
from tokenizer import (BYTE, CONTROL, NORMAL, SPACE, SPECIAL_TOKENS, UNKNOWN, ImageTokenizer, TextTokenizer,
                       VisionConfig, pad, write_field)


@dataclass
class Config:
    out: str = "out/warmup"          # run directory
    seed: int = 0                    # of weights and data
    device: str = "auto"             # cpu, cuda, mps; auto takes the best there is
    edits: Count = 3                 # edits a story: the answer has as many steps
    tokenizer_steps: Count = 500     # stage 1: optimizer steps
    pretrain_steps: Count = 400      # stage 2
    warmup_steps: Count = 360        # stage 3
    batch: Count = 48                # samples a step of stages 2 and 3
    lr: LearningRate = 2e-3          # peak learning rate of stage 2
    warmup_lr: LearningRate = 1e-3   # peak learning rate of stage 3
    data: str = ""                   # stage 3 from files: NAME=DIR,NAME=DIR (see READERS); empty: the toy world
    mix: Weights = (2.0, 1.0, 1.0)   # ratio of interleaved, understanding and text-to-image samples in stage 3
    cache: str = "out/codes"         # where the codes of --data's pictures are kept for later runs
    loss: Literal["eq1", "official"] = "eq1"   # eq1: mean over all decisions; official: text mean + image mean, as VILA-U trains
    save_every: Count = 100          # steps between checkpoints
    model: str = ""                  # start from this checkpoint (folder or hub id): stage 3 alone; empty: all stages
    micro_batch: Count = 48          # samples a forward pass; changes memory, never the gradient
    lora_rank: Natural = 0           # train adapters of this rank on the decoder's linear layers; 0: the whole policy
    lora_alpha: Positive = 16.0      # adapters are scaled by alpha / rank
    quantize: Literal["none", "nf4"] = "none"   # nf4: the frozen base in 4 bits (QLoRA)
    checkpointing: bool = False      # recompute layers in the backward pass: less memory, about a third more time
    preset: str = ""                 # paper: the paper's settings on VILA-U 7B, see PAPER; flags given beside it win
FREE = ("device", "save_every", "out", "micro_batch", "checkpointing", "preset", "cache")    # may change when a run goes on

# --preset paper: what the paper states is marked so, the rest is ours and fits one GPU (the paper's QLoRA variant).
PAPER = dict(
    model="mit-han-lab/vila-u-7b-256",                            # paper, 256 x 256 pictures
    mix=(0.3, 1.0, 1.0),                                            # paper: 0.3M interleaved, 1M and 1M others
    lora_rank=64, lora_alpha=16.0, quantize="nf4", checkpointing=True,                         # ours
    warmup_steps=3000, batch=64, micro_batch=2, warmup_lr=1e-4, save_every=100,                # ours
)


# ------------------------------------------------------------------------------------------------------------
# Batches: the mix, little padding


def toy_batches(shares: dict, config: Config, stage: str) -> Callable[[int], list[Sample]]:
    """{sample function: share} -> the batch of every step, a function of seed, stage and step alone: a resumed run sees
    what the uninterrupted one does."""
    def batch(step: int) -> list[Sample]:
        rng = random.Random(f"{config.seed}/{stage}/{step}")
        return [kind(rng, config.edits) for kind in rng.choices(list(shares), list(shares.values()), k=config.batch)]
    return batch


def published_batches(samples: dict[str, list[Sample]], model: UnifiedModel, run: "Run", config: Config, codes: CodeCache,
                      left_out: LeftOut) -> tuple[Callable[[int], list[Sample]], list[Sample]]:
    """Samples of files by kind -> the batch of every step, and the interleaved samples. The kinds are drawn in the
    ratio --mix, the samples of a kind in a shuffled order that starts over when it is through: a function of seed and
    step alone.

    Only pictures that the run will show are encoded, now; broken ones are left out here, before training. Counts and
    what was left out go to data.json."""
    order = random.Random(f"{config.seed}/mix").choices(KINDS, config.mix, k=config.warmup_steps * config.batch)
    kept, counts, seen, places = {kind: [] for kind in KINDS}, {}, Counter(), []
    for kind in (kind for kind in KINDS if kind in order):
        draws = order.count(kind)
        pool = random.Random(f"{config.seed}/{kind}").sample(samples[kind], len(samples[kind]))
        found = itertools.islice(keep_usable(pool, model, codes, left_out), draws)
        kept[kind] = list(tqdm(found, desc=f"codes of {kind} samples", total=min(draws, len(pool))))
        if not kept[kind]:
            raise UserError(f"--data: no usable {kind} sample is left, but --mix {shown(config.mix)} asks for some")
        counts[kind] = {"samples": len(kept[kind]), "draws": draws, "epochs": round(draws / len(kept[kind]), 2)}
        tqdm.write(f"{kind:14} {len(kept[kind]):9,} samples, {draws:,} of {len(order):,} draws: "
                   f"{counts[kind]['epochs']} epochs")
    codes.flush()
    tqdm.write(f"image codes: {codes.encoded:,} pictures encoded now, the others were in {codes.folder}")
    told = {"kinds": counts, "left_out": left_out.reasons(), "records": left_out.list}
    (run.folder / "data.json").write_text(json.dumps(told, indent=1))
    for kind in order:
        places.append((kind, seen[kind] % len(kept[kind])))
        seen[kind] += 1

    def batch(step: int) -> list[Sample]:
        return [kept[kind][i] for kind, i in places[step * config.batch:(step + 1) * config.batch]]
    return batch, kept["interleaved"]
WASTE = 0.1          # a micro-batch is at most this share padding


def micro_batches(samples: list[Sample], model: UnifiedModel, codes: CodeCache, most: int
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


# ------------------------------------------------------------------------------------------------------------
# Eq. (1)


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


# ------------------------------------------------------------------------------------------------------------
# The miniature


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


# ------------------------------------------------------------------------------------------------------------
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


# ------------------------------------------------------------------------------------------------------------
# Stages 2 and 3: the decoder


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear ramp over the first twentieth, then a cosine down to a tenth."""
    ramp = max(1, steps // 20)
    return peak * min((step + 1) / ramp, 0.55 + 0.45 * math.cos(math.pi * step / steps))


def train_decoder(model: UnifiedModel, run: Run, config: Config, stage: str, steps: int, lr: float,
                  batch: Callable[[int], list[Sample]], codes: CodeCache, start: int, tensors: dict[str, Tensor]) -> None:
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
    check_settings(folder, state.get("settings", {}), asdict(config), FREE)
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
    prepare_training(model, config.lora_rank, config.lora_alpha, config.seed)
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
                          toy_batches(PRETRAINING, config, stage), CodeCache(model), here, held)
        else:
            rng, codes, batch = random.Random(0), CodeCache(model), toy_batches(dict(zip((toy_story, toy_i2t, toy_t2i), config.mix)), config, stage)
            prompts, judges = [toy_prompt(rng, 2, "heldout") for _ in range(6)], (RulesText(), RulesVisual())
            if config.data:
                codes, judges = CodeCache(model, Path(config.cache)), (None, None)
                batch, prompts = published_batches(samples, model, run, config, codes, left_out)
            show(model, run, "before", "before the warm-up: it cannot interleave", prompts[:6], codes, judges)
            train_decoder(model, run, config, stage, config.warmup_steps, config.warmup_lr, batch, codes, here, held)
            show(model, run, "after", "after the warm-up", prompts[:6], codes, judges)
        checkpoint(model, run, config, STAGES[STAGES.index(stage) + 1], 0, {})


def show(model: UnifiedModel, run: Run, name: str, title: str, prompts: list[Sample], codes: CodeCache,
         judges: tuple) -> None:
    """A sheet of answers to fixed prompts."""
    if not prompts:
        return
    rows = [model.prompt(s.prompt, codes(s.prompt_pictures)) for s in prompts]
    budget = min(2 * (model.vision_config.positions + 48), model.decoder.config.context - max(map(len, rows)))
    trajectories = model.generate(rows, 1, budget)
    answers = model.read_answers(trajectories)
    scores = judge([s.prompt for s in prompts], answers, *judges)
    run.sample(name, title, [group_record(s, [a], [c]) for s, a, c in zip(prompts, answers, scores)])


def is_done(folder: Path) -> bool:
    """Is there a finished warm-up model?"""
    state, _ = load_training(folder / "policy")
    return state is not None and state["stage"] == "done"


def check(config: Config) -> None:
    """Settings that cannot work, found before anything is loaded."""
    check_config(config)
    weights = dict(zip(KINDS, config.mix))
    if config.data:
        kinds = {READERS[name][1] for name, _ in parse_sources(config.data, "--data")}
        for kind in KINDS:
            if weights[kind] and kind not in kinds:
                fitting = " or ".join(name for name, (_, of) in READERS.items() if of == kind)
                raise UserError(f"--mix {shown(config.mix)} asks for {kind} samples, but --data has no source of them: add "
                                f"{fitting}, or give them weight 0")
    if not config.model and (config.lora_rank or config.quantize != "none"):
        raise UserError("--lora-rank and --quantize: the miniature is trained from nothing, expected --model as well")


def main() -> None:
    config = parse_config(Config, presets={"paper": PAPER})
    check(config)
    warm_up(config)
    print(f"warm-up done: {write_report(Path(config.out))}")
if __name__ == "__main__":
    run_main(main)
