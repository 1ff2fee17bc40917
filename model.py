"""The unified decoder: one trajectory of text tokens and image codes (paper, Sec. 3; base model VILA-U).

    tokens    [B, T, D]  a text position holds its token id in column 0, an image position D residual codes
    is_image  [B, T]     which of the two a position is
    hidden    [B, T, C]  the state at position t predicts position t+1: lm_head its text token, the depth
                         transformer its D codes, one after the other

B rows, T positions, N positions of one image, D depth (codes a position), V text vocabulary, K codebook,
C width, H heads, P prompts, G answers a prompt.

Three verbs: `forward` gives hidden states, `log_probs` scores decisions, `generate` samples them. The
distribution that is sampled is the one that is scored: temperature, top-k, top-p and guidance live in `guide`
and `decision_logp`, which both call. Behind them come QLoRA, then loading and saving in VILA-U's layout.

    python model.py --prompt "paint it blue. <BEGIN> a red circle at top left <image>" --image start.png
                                # one interleaved answer from out/warmup: text, PNGs and a page
    python model.py --model mit-han-lab/vila-u-7b-256 --quantize nf4 --draw --guidance 3 --prompt "a fox"
                                # one picture from the published model
"""
from common import (Count, Naturals, NonNegative, NonNegatives, Seed, TopPs, UserError, check_replaceable,
                    claim, foreign, free_bytes, hash_folder, is_sharded, open_tensors, parse_config,
                    pick_device, picture_html, process_count, process_rank, read_json, read_picture,
                    read_tensor, reading, run_main, seeded, settled, sharded_like, snapshot, split_paths,
                    steps_html, thumbnail, total_bytes, write_folder, write_page, write_tensors, write_text)

import json
import math
import re
import warnings
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Callable, Literal, NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from tokenizer import (IMAGE_END, IMAGE_PLACEHOLDER, IMAGE_START, THINK_END, THINK_START, VISION_NAMES,
                       Answer, Attention, Block, ImageTokenizer, Sequence, TextTokenizer, VisionConfig, pack,
                       pad, parse_answer, preprocess, to_pictures)

VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")


# ------------------------------------------------------------------------------------------------------------
# The decoder (LLaMA) and its cache

@dataclass
class DecoderConfig:
    """Sizes of the text side, under the names of llm/config.json."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_factor: float = 1.0             # linear rope scaling: positions are divided by it (VILA-U: 2)
    context: int = 4096                  # positions a sequence may have
    attention_bias: bool = False
    qkv_bias: bool = False               # on q, k and v alone, as in Qwen2
    tied: bool = False                   # the file has no lm_head of its own, it is the embedding's copy


@dataclass
class DepthConfig:
    """Sizes of the depth transformer, from vision_tower/config.json and the codebook."""
    width: int
    layers: int
    heads: int


class KVCache:
    """Keys and values of every layer, for B rows that all write the same slot.

    A prompt fills the first slots of its row. The slots between its end and the end of the longest prompt are
    hidden by `bias`. From then on each pass writes slot `used` of every row:

        slot        0  1  2  3  4  5        two prompts of 4 and 2 positions, then two decoded positions
        row 0       p  p  p  p  a  a
        row 1       p  p  -  -  a  a        -: bias -inf; rotary angles follow positions, not slots
    """

    def __init__(self, layers: int, slots: int):
        self.slots, self.used = slots, 0
        self.k: list[Tensor | None] = [None] * layers    # [B, H, slots, head_dim]
        self.v: list[Tensor | None] = [None] * layers
        self.bias: Tensor | None = None                  # [B, 1, 1, slots], 0 or -inf; None: nothing hidden

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store keys and values of the next T slots and look at all slots so far.

        q, k, v [B, H, T, head_dim] -> [B, H, T, head_dim].
        """
        T = k.shape[2]
        if self.k[layer] is None:
            shape = (k.shape[0], k.shape[1], self.slots, k.shape[3])
            self.k[layer], self.v[layer] = k.new_zeros(shape), v.new_zeros(shape)
        end = self.used + T
        self.k[layer][:, :, self.used:end] = k
        self.v[layer][:, :, self.used:end] = v
        keys, values = self.k[layer][:, :, :end], self.v[layer][:, :, :end]
        mask = self.bias[..., :end] if T == 1 and self.bias is not None else None
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=T > 1,
                                              enable_gqa=q.shape[1] != k.shape[1])

    def hide(self, lengths: Tensor) -> None:
        """Hide what lies between the end of each prompt (lengths [B]) and the end of the longest one."""
        slot = torch.arange(self.slots, device=lengths.device)
        hidden = (slot >= lengths[:, None]) & (slot < self.used)
        self.bias = torch.zeros(hidden.shape, dtype=self.k[0].dtype, device=lengths.device)
        self.bias = self.bias.masked_fill(hidden, -torch.inf)[:, None, None]

    def select(self, rows: Tensor) -> None:
        """Keep the rows with these indices, in this order; an index may stand several times."""
        for layer in range(len(self.k)):
            self.k[layer], self.v[layer] = self.k[layer][rows], self.v[layer][rows]
        if self.bias is not None:
            self.bias = self.bias[rows]


class SwiGLU(nn.Module):
    """LLaMA's MLP: down(silu(gate x) * up x)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.norm1 = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.norm2 = nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps)
        self.attn = Attention(c.hidden_size, c.num_attention_heads, c.num_key_value_heads,
                              bias=c.attention_bias or c.qkv_bias, out_bias=c.attention_bias)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size)

    def forward(self, x: Tensor, **attention) -> Tensor:
        """x [B, T, C] -> [B, T, C]; keyword arguments go to Attention."""
        x = x + self.attn(self.norm1(x), **attention)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """LLaMA: embeddings in, normed hidden states out."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False       # True: recompute each layer in the backward pass to save memory
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.angles: tuple[Tensor, Tensor] | None = None     # of all positions, computed once a device

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [B, T] -> cos, sin [B, T, head_dim] in the model's type, computed in float32."""
        weight = self.norm.weight
        cos = None if self.angles is None else self.angles[0]
        if cos is None or cos.device != weight.device or cos.dtype != weight.dtype:
            with torch.inference_mode(False):                  # training reads the same table later
                self.angles = rotary_table(self.config, weight)
        return self.angles[0][positions], self.angles[1][positions]

    def forward(self, x: Tensor, positions: Tensor | None = None, attend: Callable | None = None) -> Tensor:
        """x [B, T, C] -> hidden states [B, T, C].

        Without `attend`: a causal pass over positions 0..T-1. With it: attend(layer, q, k, v) looks at a
        cache, and row b's t-th input stands at positions[b, t].
        """
        if positions is None:
            if x.shape[1] > self.config.context:
                raise UserError(f"a row of {x.shape[1]} positions exceeds the decoder's context of "
                                f"{self.config.context}: shorten the prompt, or lower --edits")
            positions = torch.arange(x.shape[1], device=x.device)[None]
        rotary = self.rotary(positions)
        for i, layer in enumerate(self.layers):
            attention = {"rotary": rotary, "causal": True}
            if attend is not None:
                attention = {"rotary": rotary, "attend": partial(attend, i)}
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False, **attention)
            else:
                x = layer(x, **attention)
        return self.norm(x)

    def prefill(self, rows: list[Tensor], cache: KVCache) -> Tensor:
        """Run prompts into an empty cache: embeddings [T_b, C] of each -> states [B, C] at their ends."""
        hidden = self(pad(rows), attend=cache.attend)
        cache.used = hidden.shape[1]
        lengths = torch.tensor([len(row) for row in rows], device=hidden.device)
        if min(map(len, rows)) < cache.used:
            cache.hide(lengths)
        return hidden[torch.arange(len(rows), device=hidden.device), lengths - 1]

    def step(self, x: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """Run one more position of each row: x [B, C] at positions [B] -> states [B, C]."""
        state = self(x[:, None], positions[:, None], cache.attend)[:, 0]
        cache.used += 1
        return state


def rotary_table(config: DecoderConfig, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines [context, head_dim] on the device and in the type of `weight`."""
    dim = config.hidden_size // config.num_attention_heads
    inv_freq = config.rope_theta ** (-torch.arange(0, dim, 2, device=weight.device).float() / dim)
    position = torch.arange(config.context, device=weight.device).float() / config.rope_factor
    angle = torch.outer(position, inv_freq).repeat(1, 2)               # (context, head_dim)
    return angle.cos().to(weight.dtype), angle.sin().to(weight.dtype)


# ------------------------------------------------------------------------------------------------------------
# The image head

class DepthTransformer(nn.Module):
    """The D codes of one position, each from the hidden state before it and the codes above it.

    This is the RQ head of VILA-U. Context at depth d: the projected hidden state (d = 0), or the projected
    sum of code vectors 1..d (d > 0).
    """

    def __init__(self, c: DepthConfig, hidden: int, code_dim: int, depth: int, codebook: int):
        super().__init__()
        self.from_hidden, self.from_codes = nn.Linear(hidden, c.width), nn.Linear(code_dim, c.width)
        self.position = nn.Parameter(torch.zeros(1, depth, c.width))
        self.blocks = nn.ModuleList(Block(c.width, c.heads, 4 * c.width, "gelu", eps=1e-5)
                                    for _ in range(c.layers))
        self.norm, self.out = nn.LayerNorm(c.width, eps=1e-5), nn.Linear(c.width, codebook)

    def forward(self, hidden: Tensor, vectors: Tensor) -> Tensor:
        """Teacher-forced: hidden [n, C] and the code vectors [n, D, code_dim] -> logits [n, D, K]."""
        sums = self.from_codes(vectors.cumsum(1)[:, :-1])              # (n, D-1, W)
        x = torch.cat((self.from_hidden(hidden)[:, None], sums), dim=1) + self.position
        for block in self.blocks:
            x = block(x, causal=True)
        return self.out(self.norm(x))

    def next_logits(self, d: int, x: Tensor, cache: KVCache) -> Tensor:
        """Logits [n, K] of depth d, the earlier depths in the cache.

        x is the hidden state [n, C] at d = 0, else the running sum of code vectors [n, code_dim].
        """
        project = self.from_codes if d else self.from_hidden
        x = project(x)[:, None] + self.position[:, d:d + 1]
        for i, block in enumerate(self.blocks):
            x = block(x, attend=partial(cache.attend, i))
        cache.used += 1
        return self.out(self.norm(x))[:, 0]


# ------------------------------------------------------------------------------------------------------------
# The distribution that is sampled and scored

TEXT, IMAGE, ENDED = 0, 1, 2      # what a row of `generate` does at a position


@dataclass(frozen=True)
class Sampling:
    """How decisions are sampled. The defaults are RL's: the model itself.

    Of text tokens and image codes alike, or a pair of numbers: of text tokens, of image codes.
    """
    temperature: float | tuple[float, float] = 1.0     # 0: greedy
    top_k: int | tuple[int, int] = 0                   # 0: off
    top_p: float | tuple[float, float] = 1.0           # 1: off
    guidance: float = 1.0        # classifier-free guidance for image codes; 1: off

    def of(self, mode: int) -> tuple[float, int, float]:
        """temperature, top_k and top_p of TEXT or of IMAGE."""
        both = (self.temperature, self.top_k, self.top_p)
        return tuple(value[mode] if isinstance(value, tuple) else value for value in both)


def guide(cond: Tensor, uncond: Tensor | None, scale: float) -> Tensor:
    """Classifier-free guidance on logits, at every depth: u + s (c - u), in float32 (VILA-U).

    The paper uses s = 3.
    Choice: the policy is the distribution that is sampled. With a scale other than 1, scoring runs the
    unconditional branch too, for policy, old policy and reference alike.
    """
    cond = cond.float()
    return cond if uncond is None else uncond.float() + scale * (cond - uncond.float())


def decision_logp(logits: Tensor, sampling: Sampling, mode: int, keep: Tensor | None = None) -> Tensor:
    """logits [..., V] -> log-probabilities [..., V] of the distribution that decisions come from, float32.

    mode: TEXT or IMAGE, whose settings count. Temperature, then top-k, then top-p with the crossing token
    kept: the order of VILA-U's code sampler.
    Choice: sampler and scorer call this one function. What is cut has -inf in both.
    keep [..., 1]: indices that are not cut, whatever their logits.
    """
    logits, (temperature, top_k, top_p) = logits.float(), sampling.of(mode)
    if temperature == 0:
        return torch.full_like(logits, -torch.inf).scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)
    uncut = logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -torch.inf)
    if top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered > top_p                       # mass before it already crosses
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), -torch.inf)
    if keep is not None and logits is not uncut:
        logits = logits.scatter(-1, keep, uncut.gather(-1, keep))
    return logits.log_softmax(-1)


def sample_index(logp: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Sample: log-probabilities [n, V], a uniform number in [0, 1) a row -> index [n], its logp [n].

    The index is where the cumulative distribution passes the uniform number, found where the model runs.
    Choice: a decision's random number belongs to its answer, position and depth. So a seed gives the same
    answers on every device and in every batch, but where a number lies within rounding of a boundary.
    """
    mass = logp.exp().cumsum(-1)
    target = uniform * (1 - 2 ** -22) * mass[:, -1]                  # below the whole mass after rounding too
    index = torch.searchsorted(mass, target[:, None], right=True)    # the first whose mass exceeds the target
    index = index.clamp(max=logp.shape[-1] - 1)                      # beyond it for NaN: see `generate`
    # A GPU sums in blocks, so the mass may grow by a rounding error where a cut index adds nothing.
    index = torch.where(logp.gather(-1, index).isneginf(), logp.argmax(-1, keepdim=True), index)
    return index[:, 0], logp.gather(-1, index)[:, 0]


# ------------------------------------------------------------------------------------------------------------
# The unified model

@dataclass
class Trajectory:
    """One sampled answer. Positions are the answer's, the prompt is kept beside them.

    Choice: every sampled text token (closing tags and </s> included) is one decision, every sampled code is
    one; prompt and padding are none. `mask` is recorded while sampling, it is never inferred from ids.
    """
    prompt: Sequence
    tokens: Tensor                # [T, D] int64
    is_image: Tensor              # [T] bool
    mask: Tensor                  # [T, D] bool, True on decisions
    logp: Tensor                  # [T, D] float32, under the sampled distribution
    truncated: bool               # ended by the length budget instead of </s>


def as_batch(trajectories: list[Trajectory], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Prompts and answers as one batch, padded on the right -> tokens, is_image, mask, logp.

    is_image is [B, T], the others are [B, T, D]; mask is False and logp 0 on prompts and padding.
    """
    columns = []
    for t in trajectories:
        before = (len(t.prompt), t.mask.shape[1])
        columns.append((torch.cat((t.prompt.tokens, t.tokens)),
                        torch.cat((t.prompt.is_image, t.is_image)),
                        torch.cat((t.mask.new_zeros(before), t.mask)),
                        torch.cat((t.logp.new_zeros(before), t.logp))))
    tokens, is_image, mask, logp = (pad(list(column)).to(device) for column in zip(*columns))
    return tokens, is_image, mask, logp


def by_modality(mask: Tensor, is_image: Tensor) -> tuple[Tensor, Tensor]:
    """Decisions mask [B, T, D] and is_image [B, T] -> text decisions and image decisions, [B, T, D] each."""
    image = mask & is_image[..., None]
    return mask & ~image, image


class UnifiedModel(nn.Module):
    """Text head, image head and image tokenizer around one decoder (VILA-U's architecture)."""

    def __init__(self, decoder: DecoderConfig, depth: DepthConfig, vision: VisionConfig):
        super().__init__()
        self.decoder = Decoder(decoder)
        self.projector = nn.Sequential(nn.Linear(vision.width, decoder.hidden_size), nn.GELU(),
                                       nn.Linear(decoder.hidden_size, decoder.hidden_size))
        self.depth = DepthTransformer(depth, decoder.hidden_size, vision.width, vision.depth,
                                      vision.codebook_size)
        self.vision = ImageTokenizer(vision).requires_grad_(False)    # trained by itself, then fixed
        self.depth_config, self.vision_config = depth, vision
        # Whoever builds the model sets these: `load`, or the warm-up for a model from nothing.
        self.text: TextTokenizer = None
        self.system_prompt = VICUNA
        self.configs: dict[str, dict] = {}               # the published config.json files, by folder
        self.source, self.quantize = "", "none"          # what the weights were loaded from, and how
        self.content = ""                                # with adapters: `checkpoint_hash` of the source
        self.adapter: dict | None = None                 # rank and alpha, if there are adapters
        self.precision: torch.dtype | None = None        # of passes, if it is not that of the weights
        self.rows = 0                                    # what `rows_that_fit` printed last
        self.register_buffer("unnamed", None, persistent=False)      # rows of lm_head that are no token's

    @property
    def device(self) -> torch.device:
        return self.projector[0].weight.device

    @property
    def sharded(self) -> bool:
        """Does each process hold a share of the weights? See `prepare_whole`."""
        return hasattr(self, "unshard")

    @property
    def pass_dtype(self) -> torch.dtype:
        """The type that passes compute in."""
        return self.precision or self.projector[0].weight.dtype

    def policy_parameters(self) -> list[nn.Parameter]:
        """What warm-up and GRPO train: decoder, both heads and projector, or adapters.

        The image tokenizer is never among them: its codes are targets.
        """
        return [p for p in self.parameters() if p.requires_grad]

    # -- hidden states

    def embed(self, tokens: Tensor, is_image: Tensor) -> Tensor:
        """tokens [B, T, D], is_image [B, T] -> input embeddings [B, T, C].

        An image position enters as the projected sum of its code vectors, in a prompt and in an answer alike.
        """
        x = self.decoder.embed(tokens[..., 0].masked_fill(is_image, 0))
        if is_image.any():
            x = x.index_put((is_image,), self.embed_codes(tokens[is_image]).to(x.dtype))
        return x

    def embed_codes(self, codes: Tensor) -> Tensor:
        """codes [n, D] -> input embeddings [n, C]."""
        return self.projector(self.vectors(codes).sum(-2))

    def vectors(self, codes: Tensor) -> Tensor:
        """codes [n, D] -> code vectors [n, D, code_dim] in the type of what they enter.

        The image tokenizer stays in the type it is stored in, whatever the policy trains in.
        """
        return self.vision.vectors(codes).to(self.projector[0].weight.dtype)

    def forward(self, tokens: Tensor, is_image: Tensor) -> Tensor:
        """Hidden states [B, T, C] of whole sequences, padded on the right: a causal model ignores padding."""
        return self.decoder(self.embed(tokens, is_image))

    # -- scoring

    def log_probs(self, tokens: Tensor, is_image: Tensor, mask: Tensor,
                  sampling: Sampling = Sampling()) -> Tensor:
        """THE scoring function: log-probability of every decision under the distribution it is sampled from.

        tokens [B, T, D] int64, is_image [B, T], mask [B, T, D] bool (True: score it; images whole or not at
        all) -> [B, T, D] float32, 0 where mask is False. A code that truncation has cut since it was sampled
        has -inf.
        Choice: not so with passes in bf16. Their rounding would cut some decisions before the policy has
        moved at all, so the decision that was sampled always stays.
        """
        rounded, (B, T) = self.pass_dtype != torch.float32, is_image.shape
        if self.sharded:
            tokens, is_image, mask = self.with_every_part(tokens, is_image, mask)
        before = self.forward(tokens, is_image)[:, :-1]      # alignment: the state one place before predicts
        logp = torch.zeros(tokens.shape, device=tokens.device)
        text = mask[:, :, 0] & ~is_image                                                   # (B, T)
        if text.any():
            logits, chosen = self.text_logits(before[text[:, 1:]]), tokens[text][:, :1]
            chances = decision_logp(logits, sampling, TEXT, chosen if rounded else None)   # (n, V)
            column = torch.zeros_like(mask)
            column[..., 0] = text
            logp = logp.masked_scatter(column, chances.gather(-1, chosen))
        image = mask[:, :, 0] & is_image                                                   # (B, T)
        if image.any():
            codes = tokens[image]                                                          # (n, D)
            vectors = self.vectors(codes)
            uncond = None
            if sampling.guidance != 1:
                uncond = self.depth(self.unconditional(codes), vectors)
            logits = guide(self.depth(before[image[:, 1:]], vectors), uncond, sampling.guidance)
            chosen = codes[..., None]
            chances = decision_logp(logits, sampling, IMAGE, chosen if rounded else None)  # (n, D, K)
            logp = logp.index_put((image,), chances.gather(-1, chosen)[..., 0])
        return logp[:B, :T]

    def with_every_part(self, tokens: Tensor, is_image: Tensor,
                        mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give a batch without text decisions or without pictures one more row that has both.

        Choice: FSDP gathers weights and reduces gradients where a pass reaches them, on all processes
        together. A process whose batch has no picture would leave the others waiting at the image head.
        """
        image = mask & is_image[..., None]
        if image.any() and (mask & ~image).any():
            return tokens, is_image, mask
        N, D = self.vision_config.positions, self.vision_config.depth
        picture = Sequence(torch.zeros(N, D, dtype=torch.long), torch.ones(N, dtype=torch.bool))
        row = self.unconditional_prompt() + picture
        decisions = row.is_image[:, None] | (torch.arange(D) == 0)
        decisions[0] = False
        extra = (column.to(tokens.device) for column in (row.tokens, row.is_image, decisions))
        return tuple(pad([*rows, last]) for rows, last in zip((tokens, is_image, mask), extra))

    def text_logits(self, states: Tensor) -> Tensor:
        """States [n, C] -> logits [n, V] of the next token. Rows that are no token's have -inf."""
        logits = self.decoder.lm_head(states)
        return logits if self.unnamed is None else logits.index_fill(-1, self.unnamed, -torch.inf)

    def unconditional(self, codes: Tensor) -> Tensor:
        """VILA-U's unconditional branch: the prompt is the empty one, and every image starts afresh.

        codes [n_images * N, D] of whole images -> hidden states [n_images * N, C] before each position.
        """
        N = self.vision_config.positions
        prompt = self.unconditional_prompt().to(codes.device)
        images = codes.view(-1, N, codes.shape[-1])
        tokens = torch.cat((prompt.tokens.expand(len(images), -1, -1), images), dim=1)
        is_image = torch.cat((prompt.is_image, torch.ones(N, dtype=torch.bool, device=codes.device)))
        hidden = self.forward(tokens, is_image.expand(len(images), -1))
        return hidden[:, -N - 1:-1].flatten(0, 1)

    # -- sampling

    def generate(self, prompts: list[Sequence], group: int = 1, budget: int = 512,
                 sampling: Sampling = Sampling(), seeds: list[tuple] | None = None,
                 rows: int = 0) -> list[Trajectory]:
        """Interleaved answers: `group` for each prompt, in order.

        A row in text mode samples a token. <im_start> switches it to image mode for exactly N positions of
        D codes, then it is in text mode again and has to choose <im_end> itself. It ends at </s> or after
        `budget` positions. An image that does not fit any more is not started: the row ends as truncated.
        Nothing is forced but the prompt, which may end in <im_start>: then the answer starts with an image.
        Choice: what the policy should learn, closing tags included, is its own decision.

        seeds: one tuple for each prompt, by default its place in the list. Answer g of prompt p follows from
        (*seeds[p], g) alone: neither the batch nor `rows` nor the device changes it. (Other batches sum in
        another order. That can move a decision whose random number lies within rounding of a boundary.)
        rows: answers in the KV cache at a time (0: as many as fit the device's free memory).
        Raises UserError where a prompt and its budget exceed the decoder's context, or where the budget is
        too small for the image that a prompt opens, or where a probability is not finite.
        """
        N, D = self.vision_config.positions, self.vision_config.depth
        context = self.decoder.config.context
        longest = max(map(len, prompts), default=0)
        if longest + budget > context:
            raise UserError(f"a prompt of {longest} positions and an answer of up to {budget} exceed the "
                            f"decoder's context of {context}: shorten the prompt or lower --budget")
        if budget < N and any(self.opens_image(prompt) for prompt in prompts):
            raise UserError(f"an image takes {N} positions, but the budget is {budget}: raise --budget")
        seeds = seeds or [(p,) for p in range(len(prompts))]
        answers = [(p, torch.rand(budget, D, generator=seeded(*seeds[p], g)))
                   for p in range(len(prompts)) for g in range(group)]
        rows = rows or self.rows_that_fit(len(answers), longest + budget, sampling.guidance != 1)
        trajectories = []
        for start in range(0, len(answers), rows):
            places, uniforms = zip(*answers[start:start + rows])
            first = places[0]
            part, index = prompts[first:places[-1] + 1], torch.tensor(places) - first
            columns = self.sample_rows(part, index, torch.stack(uniforms), sampling)
            columns = [column.cpu().clone() for column in columns]
            if not columns[1].isfinite().all():
                raise UserError("sampling met a probability that is not finite: the weights are broken "
                                "(lower --lr), or --temperature is too close to 0")
            for p, tokens, logp, mode, truncated in zip(places, *columns):
                n = int((mode != ENDED).sum())
                is_image = mode[:n] == IMAGE
                decisions = is_image[:, None] | (torch.arange(D) == 0)     # D codes, or one token
                trajectories.append(Trajectory(prompts[p], tokens[:n], is_image, decisions, logp[:n],
                                               bool(truncated)))
        return trajectories

    def rows_that_fit(self, answers: int, positions: int, guided: bool) -> int:
        """How many of `answers` rows of `positions` fit beside the weights: all on a CPU, at least 1.

        A number below `answers` is printed when it changes. Guidance takes up to one more image a row.
        """
        free = free_bytes(self.device)
        if guided:
            positions += len(self.unconditional_prompt()) + self.vision_config.positions
        row = row_bytes(self.decoder.config, positions, self.pass_dtype.itemsize)
        rows = max(1, answers if free is None else min(answers, int(ROOM * free) // row))
        if rows < answers and rows != self.rows:
            self.rows = rows
            tqdm.write(f"--rows: {rows} of {answers} answers at a time ({row / 2 ** 20:,.0f} MiB of keys and "
                       f"values each, {free / 2 ** 30:.1f} GiB free)")
        return rows

    @torch.inference_mode()
    def sample_rows(self, prompts: list[Sequence], index: Tensor, uniform: Tensor, sampling: Sampling
                    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loop of `generate`, one position of every row at a time. Rows that have ended leave the batch.

        prompts [P], index [B] which of them each row answers, uniform [B, budget, D] its random numbers
        -> tokens [B, budget, D], logp [B, budget, D], mode [B, budget] (TEXT, IMAGE, ENDED), truncated [B].
        """
        (B, budget, D), device = uniform.shape, self.device
        index, uniform = index.to(device), uniform.to(device)
        kv = KVCache(len(self.decoder.layers), max(map(len, prompts)) + budget)
        state = self.prefill(prompts, kv)[index]               # (B, C)
        kv.select(index)                                       # a prompt's cache serves its whole group
        place = torch.tensor([len(prompt) for prompt in prompts], device=device)[index]    # (B,) next one
        opens = torch.tensor([self.opens_image(prompt) for prompt in prompts], device=device)[index]
        left = self.vision_config.positions * opens            # (B,) positions left of its image
        mode = torch.where(opens, IMAGE, TEXT)                 # (B,)
        answer = torch.arange(B, device=device)                # which answer a row of the batch writes
        uncond = Unconditional(self, B) if sampling.guidance != 1 else None
        all_tokens = torch.zeros(B, budget, D, dtype=torch.long, device=device)
        all_logp = torch.zeros(B, budget, D, device=device)
        all_modes = torch.full((B, budget), ENDED, device=device)
        truncated = torch.zeros(B, dtype=torch.bool, device=device)
        modes, answers = mode.tolist(), list(range(B))         # the same on the CPU
        for t in range(budget):
            counts = [modes.count(m) for m in (TEXT, IMAGE, ENDED)]
            text, image, _ = mode.argsort(stable=True).split(counts)
            blank = None
            if uncond:
                blank = uncond.states(answer[image], [a for a, m in zip(answers, modes) if m == IMAGE])
            tokens, logp = self.decide(state, text, image, blank, uniform[answer, t], sampling)
            all_tokens[answer, t], all_logp[answer, t], all_modes[answer, t] = tokens, logp, mode
            x = self.embed_sampled(tokens, image)              # (B, C)
            codes = x[image]                                   # (n_image, C)
            mode, left, cut = self.next_mode(tokens[:, 0], mode, left, budget - t - 1)
            truncated[answer] |= cut
            modes = mode.tolist()                              # the one wait for the device
            alive = len(modes) - modes.count(ENDED)
            if not alive:
                break
            if alive <= COMPACT * len(modes):
                keep = (mode == ENDED).long().argsort(stable=True)[:alive]
                kv.select(keep)
                x, mode, left, place, answer = (column[keep] for column in (x, mode, left, place, answer))
                answers = [a for a, m in zip(answers, modes) if m != ENDED]
                modes = [m for m in modes if m != ENDED]
            state = uncond.step(x, codes, place, kv) if uncond else self.decoder.step(x, place, kv)
            place = place + 1
        return all_tokens, all_logp, all_modes, truncated

    def prefill(self, prompts: list[Sequence], kv: KVCache) -> Tensor:
        """Write the prompts' keys and values -> the state [P, C] at each prompt's last position."""
        prompts = [prompt.to(self.device) for prompt in prompts]
        return self.decoder.prefill([self.embed(p.tokens, p.is_image) for p in prompts], kv)

    def embed_sampled(self, tokens: Tensor, image: Tensor) -> Tensor:
        """tokens [B, D] of one position, `image` the indices of its image rows -> input embeddings [B, C]."""
        x = self.decoder.embed(tokens[:, 0].index_fill(0, image, 0))
        if len(image):
            x[image] = self.embed_codes(tokens[image]).to(x.dtype)
        return x

    def decide(self, state: Tensor, text: Tensor, image: Tensor, blank: Tensor | None, uniform: Tensor,
               sampling: Sampling) -> tuple[Tensor, Tensor]:
        """Sample one position of each row: a token for the rows `text`, D codes for the rows `image`.

        state [B, C], blank [n_image, C] the unconditional states of the image rows, uniform [B, D]
        -> tokens [B, D], logp [B, D], 0 where nothing is decided.
        """
        tokens = torch.zeros(uniform.shape, dtype=torch.long, device=state.device)
        logp = torch.zeros(uniform.shape, device=state.device)
        if len(text):
            chances = decision_logp(self.text_logits(state[text]), sampling, TEXT)         # (n_text, V)
            tokens[text, 0], logp[text, 0] = sample_index(chances, uniform[text, 0])
        if len(image):
            tokens[image], logp[image] = self.sample_codes(state[image], blank, uniform[image], sampling)
        return tokens, logp

    def next_mode(self, token: Tensor, mode: Tensor, left: Tensor,
                  room: int) -> tuple[Tensor, Tensor, Tensor]:
        """What each row does next.

        token [B] its token or first code, mode [B], left [B] the positions left of its image, room the
        positions left in the budget -> mode [B], left [B], cut [B] (ended by the budget).
        """
        N = self.vision_config.positions
        opens = (mode == TEXT) & (token == self.text.id(IMAGE_START))
        ends = (mode == TEXT) & (token == self.text.id("</s>"))
        left = torch.where(opens, N, left - (mode == IMAGE).long())
        cut = (mode != ENDED) & ~ends
        if room:
            cut = cut & opens & (room < N)
        following = torch.where(left > 0, IMAGE, TEXT)
        return torch.where((mode == ENDED) | ends | cut, ENDED, following), left, cut

    def sample_codes(self, state: Tensor, blank: Tensor | None, uniform: Tensor, sampling: Sampling
                     ) -> tuple[Tensor, Tensor]:
        """D codes for each row, depth by depth: state [n, C], uniform [n, D] -> codes [n, D], logp [n, D].

        blank [n, C]: the states of the unconditional branch. Both branches go on with the same code.
        """
        n, x = len(state), state if blank is None else torch.cat((state, blank))
        cache, total = KVCache(len(self.depth.blocks), self.vision_config.depth), 0
        codes, logps = [], []
        for d in range(self.vision_config.depth):
            logits = self.depth.next_logits(d, x, cache)
            logits = guide(logits[:n], None if blank is None else logits[n:], sampling.guidance)
            code, logp = sample_index(decision_logp(logits, sampling, IMAGE), uniform[:, d])
            codes.append(code)
            logps.append(logp)
            total = total + self.vision.quantizer.codebook(d)[code].to(x.dtype)    # running sum (n, code_dim)
            x = total if blank is None else torch.cat((total, total))
        return torch.stack(codes, 1), torch.stack(logps, 1)

    # -- prompts and pictures

    def prompt(self, text: str, codes: list[Tensor] = (), draw: bool = False) -> Sequence:
        """A user's turn in the chat template (vicuna_v1).

        Each `<image>` mark becomes the codes [N, D] of the next picture inside <im_start> <im_end>.
        `draw` ends it with <im_start>: text-to-image.
        Raises UserError where marks and pictures differ in number.
        """
        marks = text.count("<image>")
        if marks != len(codes):
            raise UserError(f"the prompt has {marks} <image> marks for {len(codes)} pictures: {text[:80]!r}")
        text = chat(text.replace("<image>", IMAGE_START + "<image>" + IMAGE_END), self.system_prompt)
        return self.sequence(text + (" " + IMAGE_START if draw else ""), codes)

    def sequence(self, text: str, codes: list[Tensor] = ()) -> Sequence:
        """Written form with `<image>` marks, and the pictures' codes -> a Sequence, <s> in front."""
        parts, codes = [[]], iter(codes)
        for i in self.text.encode_with_images(text):
            if i == IMAGE_PLACEHOLDER:
                parts += [next(codes).cpu(), []]
            else:
                parts[-1].append(i)
        return pack(parts, self.vision_config.depth)

    def unconditional_prompt(self) -> Sequence:
        """What guidance compares with: an empty message, then <im_start>."""
        return self.prompt("", draw=True)

    def opens_image(self, prompt: Sequence) -> bool:
        """Does the answer to this prompt start with an image?"""
        return bool(not prompt.is_image[-1] and prompt.tokens[-1, 0] == self.text.id(IMAGE_START))

    @torch.no_grad()
    def decode_pictures(self, codes: Tensor) -> np.ndarray:
        """codes [n, N, D] -> uint8 [n, H, W, 3]. Equal pictures are decoded once."""
        unique, index = torch.unique(codes, dim=0, return_inverse=True)
        pictures = [to_pictures(self.vision.decode(part.to(self.device))) for part in unique.split(64)]
        return np.concatenate(pictures)[index.cpu().numpy()]

    @torch.no_grad()
    def encode_pictures(self, pictures: list[np.ndarray | Image.Image], crop: bool = False) -> Tensor:
        """Pictures of any size -> codes [n, N, D]; resized to a square, or cropped to one first."""
        dtype, codes = self.vision.tower.position.dtype, []
        for i in range(0, len(pictures), 64):
            pixels = [preprocess(p, self.vision_config.image_size, crop) for p in pictures[i:i + 64]]
            codes.append(self.vision.encode(torch.stack(pixels).to(self.device, dtype)).cpu())
        return torch.cat(codes)

    def read_answers(self, trajectories: list[Trajectory]) -> list[Answer]:
        """Trajectories as judges and people read them: segments with their texts and decoded pictures."""
        answers = [parse_answer(t.tokens, t.is_image, self.text) for t in trajectories]
        images = [s for a in answers for s in a.segments if s.codes is not None]
        if images:
            pictures = self.decode_pictures(torch.stack([s.codes for s in images]))
            for segment, picture in zip(images, pictures):
                segment.picture = picture
        return answers


COMPACT = 0.75       # ended rows leave the batch once this share of its rows, or less, is alive


class Unconditional:
    """The branch that guidance compares with.

    For each row in image mode it holds the empty prompt and the codes of that row's image so far. It is the
    second half of the decoder's pass; rows in text mode have no part in it.
    """

    def __init__(self, model: UnifiedModel, answers: int):
        prompt = model.unconditional_prompt()
        self.decoder, self.length = model.decoder, len(prompt)
        self.cache = KVCache(len(model.decoder.layers), len(prompt) + model.vision_config.positions)
        self.start = model.prefill([prompt], self.cache)       # (1, C) predicts an image's first position
        self.state, self.slot = self.start[:0], torch.zeros(0, dtype=torch.long, device=model.device)
        # The row of the cache that belongs to an answer; 0 where it has none.
        self.seat = torch.zeros(answers, dtype=torch.long, device=model.device)
        self.drawing: list[int] = []                           # the answers that have a row

    def states(self, answers: Tensor, drawing: list[int]) -> Tensor:
        """States [n, C] of the answers that are in image mode now.

        answers [n] and drawing: the indices of these answers, on the device and as a list.
        """
        if drawing != self.drawing:
            seat = self.seat[answers]                          # 0, the empty prompt alone, for a new image
            self.cache.select(torch.cat((seat.new_zeros(1), seat)))
            self.state = torch.cat((self.start, self.state))[seat]
            self.slot = torch.cat((self.slot.new_full((1,), self.length), self.slot))[seat]
            self.seat.zero_()
            self.seat[answers] = torch.arange(1, len(drawing) + 1, device=seat.device)
            self.drawing = drawing
        return self.state

    def step(self, x: Tensor, codes: Tensor, place: Tensor, kv: KVCache) -> Tensor:
        """One decoder pass over both branches: x [B, C] at `place` [B], the embedded codes [n, C] behind it.

        Returns the states [B, C] of x; those of the codes stay here.
        """
        B, n = len(x), len(codes)
        rows = torch.arange(1, n + 1, device=x.device)
        slots = torch.arange(self.cache.slots, device=x.device)
        seen = slots <= self.slot[:, None, None, None]         # (n, 1, 1, slots)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """The first B rows look at the answers' cache, the others at this branch's own."""
            y = kv.attend(layer, q[:B], k[:B], v[:B])
            if not n:
                return y
            keys, values = self.cache.k[layer], self.cache.v[layer]
            keys[rows, :, self.slot], values[rows, :, self.slot] = k[B:, :, 0], v[B:, :, 0]
            own = F.scaled_dot_product_attention(q[B:], keys[1:], values[1:], attn_mask=seen,
                                                 enable_gqa=q.shape[1] != k.shape[1])
            return torch.cat((y, own))
        inputs, positions = torch.cat((x, codes)), torch.cat((place, self.slot))
        state = self.decoder(inputs[:, None], positions[:, None], attend)[:, 0]            # (B + n, C)
        kv.used += 1
        self.slot = self.slot + 1
        self.state = state[B:]
        return state[:B]


def chat(text: str, system: str) -> str:
    """The conversation template of the published model (vicuna_v1) with one user turn.

    An empty message is treated like a missing one, as there: nothing stands between 'USER:' and 'ASSISTANT:'.
    """
    return f"{system} USER: {text} ASSISTANT:" if text.strip() else f"{system} USER:ASSISTANT:"


ROOM = 0.8           # share of the free memory that keys and values may take; the rest is for activations


def row_bytes(decoder: DecoderConfig, positions: int, bytes_a_number: int) -> int:
    """What the keys and values of one row take in the cache (VILA-U 7B in bf16: 512 KiB a position)."""
    head_dim = decoder.hidden_size // decoder.num_attention_heads
    heads = decoder.num_key_value_heads or decoder.num_attention_heads
    return 2 * decoder.num_hidden_layers * heads * head_dim * positions * bytes_a_number


def check_memory(source: str, budget: int, rows: int, device: torch.device, quantize: str = "none",
                 base: str = "", unpack: bool = False) -> None:
    """Refuse, before any weight is read, what the device cannot hold: `rows` (0: one) answers of `budget`.

    The estimate is a lower bound: keys and values in 16 bits beside the decoder's files, 4.5 bits a weight
    with quantize "nf4", and with `unpack` the whole weights beside them. Raises UserError with the numbers.
    """
    folder = checkpoint_folder(source)
    if adapter := adapter_settings(folder, base, quantize):
        with base_of(folder):
            folder, quantize = checkpoint_folder(adapter["base"]), adapter["quantize"]
    with reading(folder / "llm" / "config.json", "the file"):
        decoder = decoder_config(read_json(folder / "llm" / "config.json"), folder / "llm" / "config.json")
    if budget >= decoder.context:
        raise UserError(f"--budget {budget}: the decoder of {source} has a context of {decoder.context} "
                        f"positions, prompt included")
    files = tensor_files(folder / "llm")
    numbers = sum(math.prod(tensor.shape) for tensor in stored_tensors(files).values())
    stored = sum(file.stat().st_size for file in files)
    weights = numbers * 4.5 / 8 + unpack * stored if quantize == "nf4" else stored
    cache, total = max(1, rows) * row_bytes(decoder, budget, 2), total_bytes(device)
    if total and weights + cache > total:
        gib = [f"{size / 2 ** 30:.1f} GiB" for size in (cache, weights, total)]
        raise UserError(f"--rows {rows} --budget {budget}: keys and values of {max(1, rows)} answers take at "
                        f"least {gib[0]} beside {gib[1]} of weights, but {device} has {gib[2]}: lower one of "
                        f"them")


def check_budget(policy: UnifiedModel, budget: int, name: str) -> None:
    """Refuse a budget without room for an image. Raises UserError."""
    positions = policy.vision_config.positions
    if budget < positions:
        raise UserError(f"--budget {budget}: one image of {name} takes {positions} positions, expected more "
                        f"than that for each step")


# ------------------------------------------------------------------------------------------------------------
# QLoRA: a frozen base in 4 bits (NF4, arXiv 2305.14314) and trained low-rank adapters (arXiv 2106.09685)

NF4_BLOCK = 64       # weights that share one scale, their largest absolute value
# 16 quantiles of the normal distribution, scaled to -1..1, with an exact 0: the table of bitsandbytes
NF4 = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
                    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
                    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
                    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0])


@cache
def nf4_tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The bounds [15] between neighbouring values and the pairs [256] that a byte stands for.

    A pair is two float32 values in the bits of one int64, so that a look-up moves both at once. They are
    computed once a device.
    """
    with torch.inference_mode(False):
        bounds = (NF4[1:] + NF4[:-1]) / 2                      # a weight goes to the nearer of two values
        pairs = torch.stack((NF4.repeat_interleave(16), NF4.repeat(16)), 1).view(torch.int64)[:, 0]
        return bounds.to(device), pairs.to(device)


@cache
def nf4_buffer(blocks: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory [blocks, 64] for a weight that is used once and then forgotten, the same at every call.

    On a CPU fresh memory costs more than the arithmetic that fills it.
    """
    with torch.inference_mode(False):                          # training fills the same memory later
        return torch.empty(blocks, NF4_BLOCK, dtype=dtype, device=device)


@torch.no_grad()
def to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantise a weight of n values in any shape -> bytes uint8 [n / 2], scales float32 [n / 64].

    A byte holds two 4-bit codes, the first in the high bits. The result equals bitsandbytes'
    quantize_4bit(quant_type="nf4", blocksize=64), value for value.
    """
    blocks = weight.reshape(-1, NF4_BLOCK)
    scales = blocks.abs().amax(1).float()
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=weight.device)
    bounds, _ = nf4_tables(weight.device)
    parts = zip(*(x.split(2 ** 16) for x in (codes, blocks, scales)))     # 4 M values at a time
    for code, block, scale in parts:
        scaled = block.float() * (1 / scale.clamp(min=1e-38))[:, None]
        code.copy_(torch.bucketize(scaled, bounds, out_int32=True))
    codes = codes.view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], scales


def from_nf4(packed: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype,
             out: Tensor | None = None) -> Tensor:
    """The inverse of `to_nf4` -> weight [out, in], in the memory of `out` [n / 64, 64] if there is one.

    Computed in float32, then rounded to `dtype`. On a CPU a part at a time, which stays in its cache.
    """
    if out is None:
        out = torch.empty(len(scales), NF4_BLOCK, dtype=dtype, device=packed.device)
    _, pairs = nf4_tables(packed.device)
    n = 2 ** 14 if packed.device.type == "cpu" else len(scales)
    for part, bytes_, scale in zip(out.split(n), packed.split(n * NF4_BLOCK // 2), scales.split(n)):
        values = pairs.index_select(0, bytes_.int()).view(torch.float32).view(-1, NF4_BLOCK)
        torch.mul(values, scale[:, None], out=part)
    return out.view(shape)


class NF4Product(torch.autograd.Function):
    """x W^T for a W in 4 bits.

    The backward pass unpacks it again: only one layer's full weight exists at a time, in `nf4_buffer`.
    """

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed, scales)
        ctx.shape = shape
        out = nf4_buffer(len(scales), x.dtype, x.device)
        return F.linear(x, from_nf4(packed, scales, shape, x.dtype, out))

    @staticmethod
    def backward(ctx, grad: Tensor):
        packed, scales = ctx.saved_tensors
        out = nf4_buffer(len(scales), grad.dtype, grad.device)
        return grad @ from_nf4(packed, scales, ctx.shape, grad.dtype, out), None, None, None


class NF4Linear(nn.Module):
    """A frozen linear layer with its weight in 4 bits and a scale per 64 weights: 4.5 bits a weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed, scales = to_nf4(weight)
        self.register_buffer("packed", packed)
        self.register_buffer("scales", scales)
        self.bias, self.dtype = bias, weight.dtype
        self.full: Tensor | None = None                        # the whole weight, inside `unpacked`

    @property
    def weight(self) -> Tensor:
        return from_nf4(self.packed, self.scales, (self.out_features, self.in_features), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.full is None:
            y = NF4Product.apply(x, self.packed, self.scales, (self.out_features, self.in_features))
        else:
            y = F.linear(x, self.full)
        return y if self.bias is None else y + self.bias


@contextmanager
def unpacked(model: nn.Module):
    """Keep every 4-bit weight of `model` unpacked as well inside a with-block, the packed ones beside it.

    Each is then unpacked once instead of once a pass. The results are the same. It costs the memory of the
    unpacked weights, 13 GB for the linear layers of a 7B decoder in bfloat16.
    """
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    try:
        for layer in layers:
            layer.full = layer.weight
        yield model
    finally:
        for layer in layers:
            layer.full = None


class LoRALinear(nn.Module):
    """A linear layer with an adapter: base(x) + alpha / r B A x.

    B starts at zero, so that a fresh adapter changes nothing. A and B are float32.
    """

    def __init__(self, base: nn.Linear | NF4Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        bound = base.in_features ** -0.5                               # as torch's own linear layers start
        a = torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.a = nn.Parameter(a)
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))

    def merged(self) -> nn.Linear:
        """One plain layer with the same output."""
        weight = self.base.weight
        linear = nn.Linear(self.base.in_features, self.base.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter((weight.float() + self.scale * self.b @ self.a).to(weight.dtype))
        linear.bias = self.base.bias
        return linear


class AddedRows(nn.Module):
    """A frozen embedding or lm_head [V, C] with trained rows of their own for the added tokens `ids`.

    Choice: <think> and </think> start as the mean row. The two rows start equal, so adapters inside the
    layers could never distinguish the tokens, as input or as output. We therefore train these two rows (of
    32,006) as well.
    """

    def __init__(self, base: nn.Embedding | nn.Linear, ids: list[int]):
        super().__init__()
        self.base, self.ids = base, ids
        self.rows = nn.Parameter(base.weight[ids].float())                                 # (added, C)

    @property
    def weight(self) -> Tensor:
        weight = self.base.weight.clone()
        weight[self.ids] = self.rows.to(weight.dtype)
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """Token ids [...] -> embeddings [..., C], or states [..., C] -> logits [..., V]."""
        y = self.base(x)
        if isinstance(self.base, nn.Linear):                           # logits [..., V]
            own = F.linear(x, self.rows.to(x.dtype))
            for n, i in enumerate(self.ids):
                y[..., i] = own[..., n]
            return y
        for i, row in zip(self.ids, self.rows):                        # embeddings [..., C]
            y = torch.where((x == i)[..., None], row.to(y.dtype), y)
        return y


def prepare_training(model: UnifiedModel, rank: int, alpha: float, seed: int = 0,
                     precision: str = "auto") -> None:
    """Prepare a model for training: all of it (rank 0), or adapters.

    Rank 0 trains the whole policy, see `prepare_whole`. Another rank freezes it and adds adapters to every
    linear layer of the decoder; a model that was loaded with adapters keeps them.
    Raises UserError where the model has other adapters than asked for, or 4-bit weights are to be trained.
    """
    if (rank or model.adapter) and precision != "auto":
        raise UserError(f"--precision {precision}: with adapters passes have the type of the frozen base, "
                        f"leave it out")
    if model.adapter and rank and model.adapter != {"rank": rank, "alpha": alpha}:
        raise UserError(f"--lora-rank {rank} --lora-alpha {alpha}: the model already has adapters of rank "
                        f"{model.adapter['rank']} and alpha {model.adapter['alpha']}")
    if model.adapter:
        return
    if not rank:
        if any(isinstance(m, NF4Linear) for m in model.modules()):
            raise UserError("--quantize nf4: 4-bit weights cannot be trained themselves: add --lora-rank")
        prepare_whole(model, precision)
        return
    model.requires_grad_(False)
    generator, decoder = torch.Generator().manual_seed(seed), model.decoder
    for owner in [part for layer in decoder.layers for part in (layer.attn, layer.mlp)]:
        for name, child in list(owner.named_children()):
            setattr(owner, name, LoRALinear(child, rank, alpha, generator).to(model.device))
    ids = [model.text.id(token) for token in (THINK_START, THINK_END)]
    decoder.embed, decoder.lm_head = AddedRows(decoder.embed, ids), AddedRows(decoder.lm_head, ids)
    model.adapter = {"rank": rank, "alpha": alpha}
    model.content = checkpoint_hash(model.source) if model.source else ""


def merge(model: UnifiedModel) -> None:
    """Fold the adapters into plain layers (4-bit ones are unpacked): the same policy as an ordinary model."""
    with torch.no_grad():
        for owner in list(model.decoder.modules()):
            for name, child in list(owner.named_children()):
                if isinstance(child, LoRALinear):
                    setattr(owner, name, child.merged())
                elif isinstance(child, AddedRows):
                    child.base.weight = nn.Parameter(child.weight)
                    setattr(owner, name, child.base)
    model.adapter = None


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all trainable parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@contextmanager
def with_trainable(model: nn.Module, values: dict[str, Tensor]):
    """Swap the trainable parameters with `values` inside a with-block.

    Choice: the KL reference is this same model with the parameters it started from. So nothing frozen is in
    memory twice, and of a sharded model each process swaps its own shards.
    """
    def swap() -> None:
        for name, p in model.named_parameters():
            if p.requires_grad:
                now = p.detach().clone()
                p.copy_(values[name])
                values[name].copy_(now)
    with torch.no_grad():
        swap()
    try:
        yield model
    finally:
        with torch.no_grad():
            swap()


# ------------------------------------------------------------------------------------------------------------
# A full fine-tune: float32 weights, passes in bf16, and with several processes torch's FSDP2

def prepare_whole(model: UnifiedModel, precision: str) -> None:
    """Prepare the policy for training as a whole, its passes in `precision`.

    auto: float32 on a CPU, bf16 on a GPU. Trained weights are float32, because Adam's steps vanish in bf16.
    The image tokenizer, which is frozen, keeps the type it is stored in.
    One process runs bf16 passes under torch's autocast, several share the weights.
    """
    bf16 = precision == "bf16" or (precision == "auto" and model.device.type == "cuda")
    model.precision = torch.bfloat16 if bf16 else None
    for p in model.parameters():
        if p.requires_grad and p.dtype != torch.float32:
            p.data = p.data.float()
    if process_count() > 1:
        shard(model, bf16)
    elif bf16:
        for verb in VERBS:
            setattr(model, verb, torch.autocast(model.device.type, torch.bfloat16)(getattr(model, verb)))


VERBS = ("log_probs", "generate")                          # the calls that are passes, beside forward


def shard(model: UnifiedModel, bf16: bool) -> None:
    """Leave each process its share of every weight, gradient and optimizer state (torch's FSDP2).

    While a layer runs, every process has its whole weights, in bf16 with `bf16`.
    """
    # Imported here because one process need not wait 0.7 s for it.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    # Nothing here writes into a pass's output, which is what FSDP warns of.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    mesh = init_device_mesh(model.device.type, (process_count(),))
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    for unit in (*model.decoder.layers, model.depth, model):
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=True,
                    ignored_params=set(model.vision.parameters()))
    for verb in VERBS:
        register_fsdp_forward_method(model, verb)


@contextmanager
def gathered(model: nn.Module):
    """Whole weights on every process inside a with-block that all enter: what `generate` needs.

    Choice: one gather a rollout. Answers differ in length, so processes must not meet inside `generate`.
    """
    units = [unit for unit in model.modules() if hasattr(unit, "unshard")]                 # FSDP2's
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(True, recurse=False)
            unit.reshard()


# ------------------------------------------------------------------------------------------------------------
# Weights by name: one loader for the policy and for every judge

class Stored(NamedTuple):
    """A tensor of a checkpoint that has not been read yet."""
    file: Path
    shape: tuple[int, ...]
    read: Callable[[], Tensor]       # a fresh copy on the CPU
    dtype: str = ""                  # as safetensors spells it: BF16


def stored_tensors(files: list[Path]) -> dict[str, Stored]:
    """The tensors of some safetensors files by name. Raises UserError where a file is damaged."""
    found = {}
    for file in files:
        with open_tensors(file) as tensors:
            for name in tensors.keys():
                part = tensors.get_slice(name)
                found[name] = Stored(file, tuple(part.get_shape()), partial(read_tensor, file, name, "cpu"),
                                     part.get_dtype())
    return found


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of one folder: those of its index, or the only one.

    Raises UserError where a file of the index is missing.
    """
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return [folder / "model.safetensors"]
    with reading(index, '{"weight_map": {tensor: file}}'):
        names = sorted(set(read_json(index)["weight_map"].values()))
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"{folder / name}: no such file, but {index} names it")
    return [folder / name for name in names]


def rename(name: str, table: dict[str, str]) -> str | None:
    """A tensor's name through a table of prefixes ({} is a number), None if no prefix fits."""
    for prefix, replacement in table.items():
        match = re.match(re.escape(prefix).replace(r"\{\}", r"(\d+)"), name)
        if match:
            return replacement.format(*match.groups()) + name[match.end():]
    return None


def fill(model: nn.Module, stored: dict[str, Stored], names: dict[str, str], folder: Path,
         device: str | torch.device, dtype: torch.dtype | None = None, quantize: str = "none") -> None:
    """Read every stored tensor to its place in a model that may still be on the meta device, one at a time.

    names: prefixes in the files -> prefixes here. dtype None: the type that most of the decoder is stored in,
    and for the image tokenizer that of its own, which is not trained and may be narrower.
    quantize "nf4": the decoder's linear layers in 4 bits.
    Raises UserError, naming file and tensor, for one that is unknown, missing or misshaped.
    """
    missing = set(model.state_dict())
    stored = {theirs: tensor for theirs, tensor in stored.items() if not BUFFERS.match(theirs)}
    of_vision = dtype
    if dtype is None:
        dtype, of_vision = (main_type(stored, names, part, folder) for part in ("decoder.", "vision."))
        if model.decoder.config.tied and EMBEDDING in stored:
            stored["lm_head.weight"] = stored[EMBEDDING]
        model.decoder.config.tied = False                      # from here on they are two layers
    for theirs, tensor in stored.items():
        ours = rename(theirs, names)
        if ours not in missing:
            raise UserError(f"{tensor.file}: unknown tensor {theirs}, or beyond the sizes of its config")
        value = tensor.read()
        if value.is_floating_point():
            value = value.to(of_vision if ours.startswith("vision.") else dtype)
        assign(model, ours, value.to(device), f"{tensor.file}: tensor {theirs}", quantize)
        missing.discard(ours)
    if missing:
        theirs = rename(min(missing), {ours: theirs for theirs, ours in names.items()})
        raise UserError(f"{folder}: tensor {theirs} is missing ({len(missing)} in all)")

BUFFERS = re.compile(r".*(\.inv_freq|_cached|position_ids|\.masked_bias)$")     # computed here, or not used
EMBEDDING = "model.embed_tokens.weight"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def main_type(stored: dict[str, Stored], names: dict[str, str], part: str, folder: Path) -> torch.dtype:
    """The type that most numbers of a part ("decoder." or "vision.") are stored in. All of it gets that."""
    counts = Counter()
    for theirs, tensor in stored.items():
        if (rename(theirs, names) or "").startswith(part):
            counts[tensor.dtype] += math.prod(tensor.shape)
    name = max(counts, key=counts.get, default="F32")
    if name not in FLOATS:
        raise UserError(f"{folder}: {part[:-1]} is stored as {name}, expected {' or '.join(FLOATS)}")
    return FLOATS[name]


# What is quantised and adapted.
LINEAR = re.compile(r"decoder\.layers\.\d+\.(attn|mlp)\.\w+_proj\.weight")


def assign(model: nn.Module, name: str, value: Tensor, what: str, quantize: str = "none") -> None:
    """Put a tensor where its parameter or buffer is, if the shapes agree.

    With quantize "nf4" a decoder layer's nn.Linear gives way to an NF4Linear.
    Raises UserError, beginning with `what`, for another shape.
    """
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    expected = getattr(owner, leaf).shape
    if value.shape != expected:
        raise UserError(f"{what} has shape {list(value.shape)}, expected {list(expected)}")
    if quantize == "nf4" and LINEAR.fullmatch(name):
        if value.numel() % NF4_BLOCK:
            raise UserError(f"--quantize nf4: {what} has {value.numel()} values, no multiple of {NF4_BLOCK}")
        layer, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(layer), leaf, NF4Linear(value, owner.bias))
    elif is_sharded(getattr(owner, leaf)):
        with torch.no_grad():
            getattr(owner, leaf).copy_(sharded_like(value, getattr(owner, leaf)))
    elif leaf in owner._parameters:
        setattr(owner, leaf, nn.Parameter(value, requires_grad=value.is_floating_point()))
    else:
        setattr(owner, leaf, value)


# ------------------------------------------------------------------------------------------------------------
# Checkpoints in the published layout: llm/, mm_projector/, vision_tower/

NAMES = {       # folder -> {prefix there: prefix here}; {} is a layer number
    "llm": {
        "model.embed_tokens.": "decoder.embed.",
        "model.layers.{}.input_layernorm.": "decoder.layers.{}.norm1.",
        "model.layers.{}.self_attn.": "decoder.layers.{}.attn.",
        "model.layers.{}.post_attention_layernorm.": "decoder.layers.{}.norm2.",
        "model.layers.{}.mlp.": "decoder.layers.{}.mlp.",
        "model.norm.": "decoder.norm.",
        "lm_head.": "decoder.lm_head.",
    },
    "mm_projector": {"layers.": "projector."},
    "vision_tower": {
        "rqtransformer.in_mlp_1.": "depth.from_codes.",
        "rqtransformer.in_mlp_2.": "depth.from_hidden.",
        "rqtransformer.pos_emb_d": "depth.position",
        "rqtransformer.head_transformer.blocks.{}.ln1.": "depth.blocks.{}.norm1.",
        "rqtransformer.head_transformer.blocks.{}.attn.query.": "depth.blocks.{}.attn.q_proj.",
        "rqtransformer.head_transformer.blocks.{}.attn.key.": "depth.blocks.{}.attn.k_proj.",
        "rqtransformer.head_transformer.blocks.{}.attn.value.": "depth.blocks.{}.attn.v_proj.",
        "rqtransformer.head_transformer.blocks.{}.attn.proj.": "depth.blocks.{}.attn.o_proj.",
        "rqtransformer.head_transformer.blocks.{}.ln2.": "depth.blocks.{}.norm2.",
        "rqtransformer.head_transformer.blocks.{}.mlp.0.": "depth.blocks.{}.fc1.",
        "rqtransformer.head_transformer.blocks.{}.mlp.2.": "depth.blocks.{}.fc2.",
        "rqtransformer.classifier_mlp.layer_norm.": "depth.norm.",
        "rqtransformer.classifier_mlp.linear.": "depth.out.",
        **{theirs: "vision." + ours for theirs, ours in VISION_NAMES.items()},
    },
}
ALL_NAMES = {theirs: ours for table in NAMES.values() for theirs, ours in table.items()}

# Stored but not needed: SigLIP's text tower, pooling head and last norm, the codebooks' statistics.
# SURPLUS goes beyond the model that is built: the tower's last layer, further copies of a shared codebook.
NOT_NEEDED = re.compile(r"rqvaesiglip\.("
                        r"siglip_model\.(text_model|vision_model\.(head|post_layernorm)|logit_)|"
                        r"logit_|"
                        r"quantizer\.codebooks\.\d+\.(embed_ema|cluster_size_ema)$)")
SURPLUS = re.compile(r"vision\.(tower\.blocks|quantizer\.codebooks)\.")


def checkpoint_folder(source: str) -> Path:
    """--model -> the folder of a checkpoint.

    source: a run directory (its policy/), a checkpoint directory, or a hub id, whose snapshot is fetched or
    found in the cache (HF_HOME and HF_HUB_OFFLINE are respected). Raises UserError where there is none.
    """
    for folder in (settled(Path(source) / "policy"), settled(Path(source))):
        if (folder / "llm").is_dir() or adapter_settings(folder):
            return folder
    is_hub_id = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", source) and not source.startswith("out/")
    if Path(source).exists() or not is_hub_id:
        raise UserError(f"--model {source}: no checkpoint there (expected the folders llm/, mm_projector/ "
                        f"and vision_tower/, or a run directory that holds them in policy/); python "
                        f"warmup.py makes one in out/warmup")
    return snapshot(source, "--model")


def checkpoint_hash(source: str | Path) -> str:
    """A hash of a checkpoint's weights, configs and tokenizer; of adapters it covers their base."""
    return hash_folder(checkpoint_folder(str(source)), ("", *NAMES))


def load(source: str | Path, device: str | torch.device = "cpu", quantize: str = "none",
         base: str = "") -> UnifiedModel:
    """A checkpoint in the published layout (hub id or folder) -> model.

    Sizes come from its config files and tensor shapes. Only needed tensors are read, one at a time, to
    `device`. They have the type they are stored in; with quantize "nf4" the decoder's linear layers have
    4 bits. A folder of adapters brings its base, as it was quantised when they were trained; `base` names a
    base that was moved since.
    Raises UserError, naming file, tensor and both shapes, for what is missing, unknown or misshaped.
    """
    folder = checkpoint_folder(str(source))
    if adapter := adapter_settings(folder, base, quantize):
        return load_adapters(folder, device, **adapter)
    configs = {part: read_json(folder / part / "config.json") for part in ("", *NAMES)}
    stored = stored_tensors(tensor_files(folder / "vision_tower"))
    with reading(folder, "one of its config.json files or its vision tensors"):
        model = empty_model(configs, {name: tensor.shape for name, tensor in stored.items()})
    model.text = TextTokenizer.from_folder(folder / "llm")              # small files first: they fail fast
    load_weights(model, folder, device, quantize)
    check_configs(model, folder)
    model.configs["llm"]["tie_word_embeddings"] = False
    fit_vocabulary(model, folder)
    model.source, model.quantize = str(folder.resolve() if Path(source).exists() else source), quantize
    return model


def empty_model(configs: dict[str, dict], shapes: dict[str, tuple]) -> UnifiedModel:
    """Published config files by folder, and shapes of the vision tensors -> a model on the meta device."""
    tower = configs["vision_tower"]
    head = tower["rqtransformer"]
    depth = DepthConfig(head["embed_dim"], head["head"]["n_layer"], head["head"]["block"]["n_head"])
    with torch.device("meta"):
        model = UnifiedModel(decoder_config(configs["llm"], "llm/config.json"), depth,
                             VisionConfig.from_published(tower, shapes))
    model.configs, model.system_prompt = configs, configs[""].get("system_prompt", VICUNA)
    return model


def decoder_config(llm: dict, file: str | Path, **more) -> DecoderConfig:
    """The published config of a LLaMA or Qwen2 decoder -> its sizes. `more`: fields that it does not state.

    Raises UserError, naming `file`, for a way to scale rotary angles that is not implemented.
    """
    scaling = llm.get("rope_scaling") or {}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind not in ("default", "linear"):
        raise UserError(f"{file}: rope_scaling of type {kind!r} is not implemented, expected linear or none")
    return DecoderConfig(
        hidden_size=llm["hidden_size"], intermediate_size=llm["intermediate_size"],
        num_hidden_layers=llm["num_hidden_layers"], num_attention_heads=llm["num_attention_heads"],
        vocab_size=llm["vocab_size"], num_key_value_heads=llm.get("num_key_value_heads"),
        rms_norm_eps=float(llm.get("rms_norm_eps", 1e-5)), rope_theta=float(llm.get("rope_theta", 10000.0)),
        rope_factor=float(scaling["factor"]) if kind == "linear" else 1.0, context=context_of(llm),
        attention_bias=llm.get("attention_bias", False), tied=llm.get("tie_word_embeddings", False), **more)


def context_of(llm: dict) -> int:
    """How many positions the decoder was trained for; VILA-U states it under its own key."""
    for key in ("tokenizer_model_max_length", "model_max_length"):
        if llm.get(key):
            return int(llm[key])
    return int(llm["max_position_embeddings"])


def load_weights(model: UnifiedModel, folder: Path, device: str | torch.device,
                 quantize: str = "none") -> None:
    """Every needed tensor of a checkpoint to its place in the model. Raises UserError, see `fill`."""
    stored, wanted = {}, set(model.state_dict())
    for part, table in NAMES.items():
        found = stored_tensors(tensor_files(folder / part))
        for theirs, tensor in found.items():
            ours = rename(theirs, table)
            surplus = ours is not None and SURPLUS.match(ours) and ours not in wanted
            if not NOT_NEEDED.match(theirs) and not surplus:
                stored[theirs] = tensor
    fill(model, stored, ALL_NAMES, folder, device, quantize=quantize)
    model.vision.requires_grad_(False)


# How our names of trained tensors end -> how PEFT's do, behind LLaMA's name of the layer.
PEFT = {"a": "lora_A.weight", "b": "lora_B.weight", "rows": "token_adapter.trainable_tokens_delta"}
# Settings of PEFT that make more of an adapter than LoRALinear: each has to be off.
NOT_READ = ("use_dora", "use_rslora", "alpha_pattern", "rank_pattern", "modules_to_save", "fan_in_fan_out")


def peft_name(name: str) -> str:
    """The name that PEFT gives to one of our trained tensors."""
    path, _, leaf = rename(name, {ours: theirs for theirs, ours in NAMES["llm"].items()}).rpartition(".")
    return f"base_model.model.{path}.{PEFT[leaf]}"


def peft_config(model: UnifiedModel) -> dict:
    """What adapter_config.json says about a model's adapters.

    The base is the decoder's folder llm/, an ordinary LLaMA. The rows of <think> and </think> are PEFT's
    trainable tokens: a base that lacks them needs `resize_token_embeddings` first.
    """
    layers = model.decoder.layers[0].named_modules()
    return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": f"{model.source}/llm",
            "r": model.adapter["rank"], "lora_alpha": model.adapter["alpha"], "bias": "none",
            "target_modules": [name.split(".")[1] for name, m in layers if isinstance(m, LoRALinear)],
            "trainable_token_indices": added_ids(model), "inference_mode": True}


def added_ids(model: UnifiedModel) -> dict[str, list[int]]:
    """Which rows of the embedding and of lm_head are trained beside the adapters."""
    return {"embed_tokens": model.decoder.embed.ids, "lm_head": model.decoder.lm_head.ids}


def adapter_settings(folder: Path, base: str = "", quantize: str = "none") -> dict | None:
    """Base, quantize, rank, alpha and content of a folder of adapters in PEFT's layout; None for any other.

    base: where the base is now, if it was moved. Ours have a base.json beside PEFT's files, {"quantize": how
    the base was loaded, "content": its hash}; of others `quantize` says how to load it. An adapter.json of
    earlier versions is read too.
    Raises UserError for adapters that are not plain LoRA, or were trained on a base that `quantize` changes.
    """
    file, ours, earlier = (folder / name for name in ("adapter_config.json", "base.json", "adapter.json"))
    if file.exists():
        with reading(file, "the file"):
            config = read_json(file)
            more = [key for key in NOT_READ if config.get(key)]
            if config["peft_type"] != "LORA" or more:
                raise UserError(f"{file}: expected plain LoRA, found {more or config['peft_type']}")
            about = {"quantize": quantize, "content": "", **(read_json(ours) if ours.exists() else {})}
            if quantize not in ("none", about["quantize"]):
                raise UserError(f"--quantize {quantize}: the base of the adapters in {folder} was not "
                                f"quantised when they were trained, leave it out")
            return {"base": base or config["base_model_name_or_path"].removesuffix("/llm"),
                    "quantize": about["quantize"], "content": about["content"],
                    "rank": int(config["r"]), "alpha": float(config["lora_alpha"])}
    if earlier.exists():
        with reading(earlier, "the file"):
            config = read_json(earlier)
            return {"base": base or config["base"], "content": "",
                    **{key: config[key] for key in ("quantize", "rank", "alpha")}}
    return None


@contextmanager
def base_of(folder: Path):
    """Put this around code that opens the base of the adapters in `folder`: its errors say so."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{folder}: the base of these adapters cannot be loaded (one that was moved is named "
                        f"with --base FOLDER): {error}") from None


def load_adapters(folder: Path, device: str | torch.device, base: str, quantize: str, rank: int,
                  alpha: float, content: str) -> UnifiedModel:
    """The base as it was when adapters were trained, with the adapters of this folder.

    Raises UserError where the base has another content than that.
    """
    with base_of(folder):
        model = load(base, device, quantize)
    prepare_training(model, rank, alpha)
    if content not in ("", model.content):
        raise UserError(f"{folder}: these adapters were trained on other weights than those in {base} now: "
                        f"name their base with --base FOLDER")
    load_adapter_weights(model, folder, device)
    return model


def load_adapter_weights(model: UnifiedModel, folder: Path, device: str | torch.device) -> None:
    """Read adapter_model.safetensors to its place in a model that has such adapters.

    Raises UserError where they differ.
    """
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    file, names = folder / "adapter_model.safetensors", {peft_name(name): name for name in trained}
    if (folder / "adapter_config.json").exists():
        ids = read_json(folder / "adapter_config.json").get("trainable_token_indices")
        if ids != added_ids(model):
            raise UserError(f"{folder / 'adapter_config.json'}: trainable_token_indices is {ids}, but the "
                            f"ids of {THINK_START} and {THINK_END} in the base are {added_ids(model)}")
    else:                                                                # earlier versions: our own names
        file, names = folder / "adapter.safetensors", {name: name for name in trained}
    stored = stored_tensors([file])
    if stored.keys() != names.keys():
        name = sorted(stored.keys() ^ names.keys())[0]
        raise UserError(f"{file}: tensor {name} is {'missing' if name in names else 'unknown'}")
    for name, tensor in stored.items():
        assign(model, names[name], tensor.read().float().to(device), f"{file}: tensor {name}")


def restore(model: UnifiedModel, folder: Path) -> None:
    """Put a checkpoint's trained weights into the model that its training started from."""
    if model.adapter:
        load_adapter_weights(model, folder, model.device)
    else:
        load_weights(model, folder, model.device)


def fit_vocabulary(model: UnifiedModel, folder: Path) -> None:
    """Bring tokenizer, embedding and lm_head to one size; the special tokens that are missing are added.

    Tables may be padded: new tokens take the rows behind the last token, and rows that are no token's are
    never sampled. Raises UserError for a token without a row, and for a tokenizer without VILA-U's tokens.
    Choice: new rows start as the mean of the tokens' rows, as VILA-U's own do.
    """
    text, decoder = model.text, model.decoder
    size, rows = text.vocab_size, decoder.config.vocab_size
    if size > rows:
        token = next(text.piece(i) for i in range(rows, size) if text.has(i))
        raise UserError(f"{folder / 'llm'}: the tokenizer has {size} ids, but the embedding has {rows} rows: "
                        f"{token} has none")
    for token in ("<s>", "</s>", IMAGE_START, IMAGE_END):
        if not text.knows(token):
            raise UserError(f"{folder / 'llm'}: the tokenizer has no {token}")
    new = [token for token in (THINK_START, THINK_END) if not text.knows(token)]
    text.add(new)
    with torch.no_grad():
        for layer in (decoder.embed, decoder.lm_head) if new else ():
            mean = layer.weight[:size].float().mean(0, keepdim=True).to(layer.weight.dtype)
            parts = layer.weight[:size], mean.expand(len(new), -1), layer.weight[text.vocab_size:]
            layer.weight = nn.Parameter(torch.cat(parts))
    decoder.config.vocab_size = len(decoder.embed.weight)
    unnamed = [i for i in range(decoder.config.vocab_size) if not text.has(i)]
    model.unnamed = torch.tensor(unnamed, device=model.device) if unnamed else None


def save(model: UnifiedModel, folder: Path, state: dict | None = None,
         tensors: dict[str, Tensor] | None = None) -> None:
    """Write a checkpoint, whole or not at all: the published layout, or the adapters alone, in PEFT's.

    state (JSON) and tensors are what training needs to go on (where it was, the optimizer). They become
    training.json and training.safetensors.
    """
    # All processes gather shards together. Only rank 0 writes; the others' small files are discarded.
    with write_folder(folder) if process_rank() == 0 else TemporaryDirectory() as new:
        new = Path(new)
        if model.adapter:
            write_text(new / "adapter_config.json", json.dumps(peft_config(model), indent=1))
            write_text(new / "base.json", json.dumps({"quantize": model.quantize, "content": model.content}))
            write_tensors({peft_name(name): value for name, value in trainable_state(model).items()},
                          new / "adapter_model.safetensors")
        else:
            write_published(model, new)
        if state is not None:
            write_text(new / "training.json", json.dumps(state))
            write_tensors(tensors or {}, new / "training.safetensors")


def write_published(model: UnifiedModel, folder: Path) -> None:
    """The published layout plus our added tokens: what `load` reads."""
    write_configs(model, folder)
    weights = model.state_dict()
    for part, table in NAMES.items():
        back = {ours: theirs for theirs, ours in table.items()}
        tensors = {rename(ours, back): w for ours, w in weights.items() if rename(ours, back)}
        write_tensors(tensors, folder / part / "model.safetensors")
    model.text.save(folder / "llm")


def write_configs(model: UnifiedModel, folder: Path) -> None:
    """Write the four config.json files of the published layout: VILA-U's own code builds its model from them.

    Other keys of a loaded checkpoint stay. The top file holds copies of the other three.
    """
    words, sizes = published_words(model), published_sizes(model)
    for part in NAMES:
        words[""][f"{part}_cfg"], sizes[""][f"{part}_cfg"] = words[part], sizes[part]
    for part in sizes:
        config = updated(updated(words[part], model.configs.get(part, {})), sizes[part])
        (folder / part).mkdir(parents=True, exist_ok=True)
        write_text(folder / part / "config.json", json.dumps(config, indent=1))


def updated(old: dict, new: dict) -> dict:
    """`old` with the values of `new`, dictionaries inside likewise."""
    both = {key: updated(old[key], value) for key, value in new.items()
            if isinstance(value, dict) and isinstance(old.get(key), dict)}
    return {**old, **new, **both}


def published_sizes(model: UnifiedModel) -> dict[str, dict]:
    """A model's sizes as the published config files state them, by folder."""
    d, k, v = model.decoder.config, model.depth_config, model.vision_config
    llm = {**{f: x for f, x in asdict(d).items() if f not in ("rope_factor", "context", "qkv_bias", "tied")},
           **({"rope_scaling": {"type": "linear", "factor": d.rope_factor}} if d.rope_factor != 1 else {})}
    tower = {"hidden_size": v.width, "vision_layers_used": v.layers, "rqvaesiglip": v.to_published(),
             "rqtransformer": {"embed_dim": k.width, "block_size": [v.grid, v.grid, v.depth],
                               "head": {"n_layer": k.layers, "block": {"n_head": k.heads}},
                               "input_embed_dim_1": v.width, "input_embed_dim_2": d.hidden_size,
                               "vocab_size": v.codebook_size}}
    return {"": {"hidden_size": d.hidden_size, "mm_hidden_size": v.width}, "llm": llm, "vision_tower": tower,
            "mm_projector": {}}


def published_words(model: UnifiedModel) -> dict[str, dict]:
    """What else the config files need, where no loaded one says it."""
    return {"": {"model_type": "vila_u_llama", "architectures": ["VILAULlamaModel"],
                 "image_aspect_ratio": "resize", "system_prompt": model.system_prompt},
            "llm": {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
                    "max_position_embeddings": model.decoder.config.context, "tie_word_embeddings": False,
                    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
            "vision_tower": {"model_type": "rqvaesigliptransformer_model",
                             "rqvaesiglip": {"ddconfig": {"double_z": False, "dropout": 0.0}}},
            "mm_projector": {"mm_projector_type": "mlp2x_gelu", "model_type": "v2l_projector"}}


def check_configs(model: UnifiedModel, folder: Path) -> None:
    """Hold every number of the config files against the model that their tensors have filled.

    Our own loader takes some sizes from shapes, VILA-U's code takes all from these files.
    Raises UserError with file and key for the first that disagrees.
    """
    def compare(file: Path, stated: dict, sizes: dict, path: str = "") -> None:
        for key, size in sizes.items():
            found = stated.get(key)
            if isinstance(size, dict) and isinstance(found, dict):
                compare(file, found, size, f"{path}{key}.")
            elif found is not None and found != size:
                raise UserError(f"{file}: {path}{key} is {found}, but the tensors beside it say {size}")
    for part, sizes in json.loads(json.dumps(published_sizes(model))).items():
        compare(folder / part / "config.json", model.configs[part], sizes)


def load_training(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """The state and tensors that `save` wrote beside the weights, ({}, {}) where there are none."""
    folder = settled(folder)
    if not (folder / "training.json").exists():
        return {}, {}
    with open_tensors(folder / "training.safetensors") as file:
        return read_json(folder / "training.json"), {name: file.get_tensor(name) for name in file.keys()}


# ------------------------------------------------------------------------------------------------------------
# Run alone: one interleaved answer

@dataclass
class Config:
    # -- model
    model: str = "out/warmup"    # run directory, checkpoint folder or hub id
    base: str = ""               # where the base of a model with adapters is now, if it was moved
    quantize: Literal["none", "nf4"] = "none"    # nf4: the decoder's linear layers in 4 bits
    merge: str = ""              # write the model, adapters folded in, to this folder, and stop
    # -- prompt
    prompt: str = "a red circle at top left"     # each `<image>` mark in it takes the next file of --image
    image: str = ""              # picture files for the prompt's <image> marks, separated by commas
    draw: bool = False           # text-to-image: the answer is one picture of the prompt
    # -- sampling
    budget: Count = 512          # positions an answer may have
    temperature: NonNegatives = 1.0    # 0: greedy; two numbers: of text tokens, of image codes
    top_k: Naturals = 0          # 0: off; VILA-U: 0,900
    top_p: TopPs = 1.0           # 1: off; VILA-U: 0.6,0.96, at --temperature 0.9,1
    guidance: NonNegative = 1.0  # for image codes; VILA-U and the paper draw with 3
    # -- run
    out: str = "out/answer"      # where answer.html and the PNGs go
    seed: Seed = 0               # of the sampling
    device: str = "auto"         # cpu, cuda, mps; auto takes the best there is


def write_answer_page(prompt: str, pictures: list[np.ndarray], answer: Answer, folder: Path) -> Path:
    """Write the answer as answer.html, texts and pictures in turn, with the pictures beside it as PNGs."""
    for earlier in (*folder.glob("prompt_[0-9]*.png"), *folder.glob("step_[0-9]*.png")):
        earlier.unlink()
    files = {f"prompt_{i}.png": picture for i, picture in enumerate(pictures)}
    files |= {f"step_{i}.png": s.picture for i, s in enumerate(answer.segments) if s.picture is not None}
    for name, picture in files.items():
        Image.fromarray(picture).save(folder / name)
    steps = [{"text": s.text, "picture": None if s.picture is None else thumbnail(s.picture, 256)}
             for s in answer.segments]
    start = "".join(picture_html(thumbnail(picture), "picture of the prompt") for picture in pictures)
    return write_page(folder / "answer.html", prompt, [f'<div class="row">{start}</div>', steps_html(steps)])


def write_merged(config: Config) -> None:
    """--merge: fold the adapters of --model into their base and write the result as an ordinary model.

    Raises UserError where the folder holds anything but an earlier result of this.
    """
    folder = Path(config.merge).resolve()
    check_replaceable(folder)
    if (folder / "training.json").exists() or foreign(folder):
        name = "training.json" if (folder / "training.json").exists() else foreign(folder)[0]
        raise UserError(f"--merge {config.merge}: holds {name}, which no merge wrote: choose another folder")
    model = load(config.model, pick_device(config.device), config.quantize, config.base)
    if not model.adapter:
        raise UserError(f"--merge {config.merge}: {config.model} has no adapters")
    if folder in (checkpoint_folder(config.model).resolve(), checkpoint_folder(model.source).resolve()):
        raise UserError(f"--merge {config.merge}: it holds the adapters or their base: choose another")
    rank = model.adapter["rank"]
    merge(model)
    save(model, folder)
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2 ** 30
    print(f"{config.merge}: {model.source} with the adapters of {config.model} (rank {rank}) folded in, "
          f"{size:.2f} GiB in the published layout")


def answer_prompt(config: Config, folder: Path) -> None:
    """One answer to --prompt, written to the folder and printed."""
    pictures = [read_picture(Path(name), "--image") for name in split_paths(config.image)]
    marks = config.prompt.count("<image>")
    if marks != len(pictures):
        raise UserError(f"--image: {len(pictures)} files, but {marks} <image> marks in --prompt")
    model = load(config.model, pick_device(config.device), config.quantize, config.base).eval()
    codes = list(model.encode_pictures(pictures)) if pictures else []
    prompt = model.prompt(config.prompt, codes, config.draw)
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.guidance)
    budget = max(1, min(config.budget, model.decoder.config.context - len(prompt)))
    trajectory, = model.generate([prompt], 1, budget, sampling, [(config.seed,)])
    answer, = model.read_answers([trajectory])
    page = write_answer_page(config.prompt, pictures, answer, folder)
    for segment in answer.segments:
        if segment.picture is None:
            print(segment.text)
        else:
            print(f"[picture {segment.picture.shape[1]}x{segment.picture.shape[0]}]")
    print(f"{answer.layout}{' (cut by --budget)' if trajectory.truncated else ''}; {page}")


def main() -> None:
    """One answer to one prompt, written to --out and printed; or adapters folded into their base."""
    config = parse_config(Config)
    if config.merge:
        write_merged(config)
        return
    with claim(config.out) as folder:
        answer_prompt(config, folder)


if __name__ == "__main__":
    run_main(main)
