"""The unified decoder: one trajectory of text tokens and image codes (paper, Sec. 3; VILA-U as the base model).

    tokens    [B, T, D]  a text position holds its token id in column 0, an image position holds D residual codes
    is_image  [B, T]     which of the two a position is
    hidden    [B, T, C]  the state at position t predicts position t+1: lm_head its text token, the depth
                         transformer its D codes, one after the other

B rows, T positions, N positions of one image, D depth (codes a position), V text vocabulary, K codebook, C width,
H heads, P prompts, G answers a prompt. Three verbs: `forward` gives hidden states, `log_probs` scores decisions (every
caller that needs a probability uses it), `generate` samples. What is sampled is what is scored: temperature, top-k,
top-p and guidance live in `guide` and `decision_logp`, which both call. Then QLoRA (a base in 4 bits, adapters), loading
and saving in VILA-U's published layout.

    python model.py --prompt "paint it blue. <BEGIN> a red circle at top left <image>" --image start.png
                                                        # one interleaved answer from out/warmup: text, PNGs, a page
    python model.py --model mit-han-lab/vila-u-7b-256 --quantize nf4 --draw --guidance 3 --prompt "a fox in the snow"
"""
import html
import json
import re
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from common import (Count, Natural, UserError, open_tensors, parse_config, pick_device, read_json,
                    read_picture, read_tensor, run_main, settle_folder, snapshot, write_tensors, write_whole)
from tokenizer import (IMAGE_END, IMAGE_PLACEHOLDER, IMAGE_START, THINK_END, THINK_START, VISION_NAMES,
                       Answer, Attention, Block, ImageTokenizer, Sequence, TextTokenizer, VisionConfig, pack,
                       pad, parse_answer, preprocess, to_pictures)

VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions.")


# ------------------------------------------------------------------------------------------------------------
# The decoder (LLaMA) and its cache


@dataclass
class DecoderConfig:
    """Sizes of the text side, the names of llm/config.json."""
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    num_key_value_heads: int | None = None
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_factor: float = 1.0             # linear rope scaling: positions are divided by it (VILA-U: 2)
    context: int = 4096                  # positions a sequence may have: tokenizer_model_max_length, model_max_length
    attention_bias: bool = False
    qkv_bias: bool = False               # on q, k and v alone, as in Qwen2


@dataclass
class DepthConfig:
    """Sizes of the depth transformer, from vision_tower/config.json and the codebook."""
    width: int
    layers: int
    heads: int


class KVCache:
    """Keys and values of one attention layer. Row b writes slot positions[b, t]: rows may be at different places.

    Nothing is padded on the left: what lies beyond a row's own position is hidden by the mask and overwritten later.
    """

    def __init__(self, size: int):
        self.size, self.k, self.v, self.positions = size, None, None, None

    def __call__(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        if self.k is None:
            self.k, self.v = (x.new_zeros(x.shape[0], x.shape[1], self.size, x.shape[3]) for x in (k, v))
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.k[rows, :, self.positions] = k.transpose(1, 2)              # (B, T, H, head_dim) at [b, :, position]
        self.v[rows, :, self.positions] = v.transpose(1, 2)
        return self.k[:, :, :self.keys], self.v[:, :, :self.keys]

    def at(self, positions: Tensor, keys: int) -> None:
        """The slots [B, T] that the next call writes, and how many slots it looks at."""
        self.positions, self.keys = positions, keys

    def repeat(self, times: int) -> None:
        """Give each row `times` copies: the prompt's prefill is shared by its group."""
        self.k, self.v = (x.repeat_interleave(times, 0) for x in (self.k, self.v))


class SwiGLU(nn.Module):
    """LLaMA's MLP: down(silu(gate x) * up x)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, inner, bias=False), nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    def __init__(self, c: DecoderConfig):
        super().__init__()
        self.norm1, self.norm2 = (nn.RMSNorm(c.hidden_size, eps=c.rms_norm_eps) for _ in range(2))
        self.attn = Attention(c.hidden_size, c.num_attention_heads, c.num_key_value_heads,
                              bias=c.attention_bias or c.qkv_bias, out_bias=c.attention_bias)
        self.mlp = SwiGLU(c.hidden_size, c.intermediate_size)

    def forward(self, x: Tensor, **attention) -> Tensor:
        x = x + self.attn(self.norm1(x), **attention)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """LLaMA: embeddings in, normed hidden states out."""

    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.config = config
        self.checkpointing = False       # recompute each layer in the backward pass instead of keeping its insides
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [B, T] -> cos, sin [B, T, head_dim], angles in float32."""
        dim = self.config.hidden_size // self.config.num_attention_heads
        inv_freq = self.config.rope_theta ** (-torch.arange(0, dim, 2, device=positions.device).float() / dim)
        angle = positions[..., None].float() / self.config.rope_factor * inv_freq          # (B, T, head_dim/2)
        angle = torch.cat((angle, angle), dim=-1)
        return angle.cos().to(self.norm.weight.dtype), angle.sin().to(self.norm.weight.dtype)

    def forward(self, x: Tensor, positions: Tensor | None = None, caches: list[KVCache] | None = None) -> Tensor:
        """x [B, T, C] -> [B, T, C]. Without caches: a causal pass over positions 0..T-1. With caches: row b's t-th
        input stands at positions[b, t] and sees every slot up to it."""
        if caches is None:
            positions = torch.arange(x.shape[1], device=x.device)[None]
            attention = dict(rotary=self.rotary(positions), causal=True)
        else:
            keys = int(positions.max()) + 1
            mask = torch.arange(keys, device=x.device) <= positions[:, None, :, None]      # (B, 1, T, keys)
            attention = dict(rotary=self.rotary(positions), mask=mask)
        for i, layer in enumerate(self.layers):
            if caches is not None:
                caches[i].at(positions, keys)
                attention["cache"] = caches[i]
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False, **attention)
            else:
                x = layer(x, **attention)
        return self.norm(x)


# ------------------------------------------------------------------------------------------------------------
# The image head


class DepthTransformer(nn.Module):
    """The D codes of one position, each given the hidden state before it and the codes above it (VILA-U's RQ head).

    Context at depth d: the projected hidden state (d = 0), the projected sum of code vectors 1..d (d > 0).
    """

    def __init__(self, c: DepthConfig, hidden: int, code_dim: int, depth: int, codebook: int):
        super().__init__()
        self.from_hidden, self.from_codes = nn.Linear(hidden, c.width), nn.Linear(code_dim, c.width)
        self.position = nn.Parameter(torch.zeros(1, depth, c.width))
        self.blocks = nn.ModuleList(Block(c.width, c.heads, 4 * c.width, "gelu", eps=1e-5) for _ in range(c.layers))
        self.norm, self.out = nn.LayerNorm(c.width, eps=1e-5), nn.Linear(c.width, codebook)

    def forward(self, hidden: Tensor, vectors: Tensor) -> Tensor:
        """Teacher-forced: hidden [n, C] and the code vectors [n, D, code_dim] -> logits [n, D, K]."""
        sums = self.from_codes(vectors.cumsum(1)[:, :-1])                                  # (n, D-1, W)
        x = torch.cat((self.from_hidden(hidden)[:, None], sums), dim=1) + self.position
        for block in self.blocks:
            x = block(x, causal=True)
        return self.out(self.norm(x))

    def step(self, d: int, x: Tensor, caches: list[KVCache]) -> Tensor:
        """One depth with the earlier ones in the caches: x [n, C] (d = 0: hidden state, else the running sum of
        code vectors) -> logits [n, K]."""
        x = (self.from_codes if d else self.from_hidden)(x)[:, None] + self.position[:, d:d + 1]
        at = torch.full((x.shape[0], 1), d, device=x.device)
        for block, cache in zip(self.blocks, caches):
            cache.at(at, d + 1)
            x = block(x, cache=cache)
        return self.out(self.norm(x))[:, 0]


# ------------------------------------------------------------------------------------------------------------
# The distribution that is sampled and scored


@dataclass(frozen=True)
class Sampling:
    """How a decision is drawn. The defaults are RL's: the model itself (temperature 1, nothing cut, no guidance)."""
    temperature: float = 1.0     # 0 = greedy
    top_k: int = 0               # 0 = off
    top_p: float = 1.0           # 1 = off
    guidance: float = 1.0        # classifier-free guidance for image codes; 1 = off


def guide(cond: Tensor, uncond: Tensor | None, scale: float) -> Tensor:
    """Classifier-free guidance on logits, at every depth: u + s (c - u), in float32 (VILA-U, Sec. 3; the paper: 3)."""
    cond = cond.float()
    return cond if uncond is None else uncond.float() + scale * (cond - uncond.float())


def decision_logp(logits: Tensor, sampling: Sampling) -> Tensor:
    """logits [..., V] -> log-probabilities [..., V] of the distribution decisions are drawn from, float32.

    Temperature, then top-k, then top-p with the crossing token kept, as VILA-U's code sampler orders them. What is
    cut has -inf: the scorer must see the same zeros as the sampler.
    """
    logits = logits.float()
    if sampling.temperature == 0:
        only = torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
        return only.log()
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(sampling.top_k).values[..., -1:], -torch.inf)
    if sampling.top_p < 1:
        ordered, index = logits.softmax(-1).sort(descending=True)
        beyond = ordered.cumsum(-1) - ordered > sampling.top_p              # mass before it already crosses
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(-1, index, beyond), -torch.inf)
    return logits.log_softmax(-1)


def sample_index(logp: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """log-probabilities [n, V] -> drawn index [n] and its log-probability [n]. Drawn on the generator's device, so
    that a seed gives the same answers wherever the model runs."""
    device = generator.device if generator is not None else logp.device
    index = torch.multinomial(logp.exp().to(device), 1, generator=generator).to(logp.device)
    return index[:, 0], logp.gather(-1, index)[:, 0]


# ------------------------------------------------------------------------------------------------------------
# The unified model


@dataclass
class Trajectory:
    """One sampled answer. Positions are the answer's, the prompt is kept beside them.

    `mask` is True for what the policy decided (every sampled text token, closing tags and </s> included, and every
    sampled code); it is recorded while sampling, never inferred from ids.
    """
    prompt: Sequence
    tokens: Tensor                # [T, D] int64
    is_image: Tensor              # [T] bool
    mask: Tensor                  # [T, D] bool
    logp: Tensor                  # [T, D] float32, under the sampled distribution
    truncated: bool               # ended by the length budget instead of </s>


def by_modality(mask: Tensor, is_image: Tensor) -> tuple[Tensor, Tensor]:
    """Decisions mask [B, T, D] and is_image [B, T] -> text decisions and image decisions, [B, T, D] each."""
    image = mask & is_image[..., None]
    return mask & ~image, image


class UnifiedModel(nn.Module):
    """Text head, image head and image tokenizer around one decoder (VILA-U's architecture, sizes from config)."""

    def __init__(self, decoder: DecoderConfig, depth: DepthConfig, vision: VisionConfig):
        super().__init__()
        self.decoder = Decoder(decoder)
        self.projector = nn.Sequential(nn.Linear(vision.width, decoder.hidden_size), nn.GELU(),
                                       nn.Linear(decoder.hidden_size, decoder.hidden_size))
        self.depth = DepthTransformer(depth, decoder.hidden_size, vision.width, vision.depth, vision.codebook_size)
        self.vision = ImageTokenizer(vision).requires_grad_(False)   # trained by itself, then fixed: codes are targets
        self.depth_config, self.vision_config = depth, vision
        self.text: TextTokenizer = None                              # set by load / the warm-up
        self.system_prompt = VICUNA
        self.source, self.quantize = "", "none"                      # what the weights were loaded from, and how
        self.adapter: dict | None = None                             # rank and alpha, if there are adapters

    @property
    def device(self) -> torch.device:
        return self.projector[0].weight.device

    def policy_parameters(self) -> list[nn.Parameter]:
        """What warm-up and GRPO train: decoder, both heads and projector, or adapters; never the image tokenizer."""
        return [p for p in self.parameters() if p.requires_grad]

    # -- hidden states ---------------------------------------------------------------------------------------------

    def embed(self, tokens: Tensor, is_image: Tensor) -> Tensor:
        """tokens [B, T, D], is_image [B, T] -> input embeddings [B, T, C]. An image position enters as the projected
        sum of its code vectors, whether it was given or generated."""
        x = self.decoder.embed(tokens[..., 0].masked_fill(is_image, 0))
        if is_image.any():
            picture = self.projector(self.vision.vectors(tokens[is_image]).sum(-2))        # (n, C)
            x = x.index_put((is_image,), picture.to(x.dtype))
        return x

    def forward(self, tokens: Tensor, is_image: Tensor) -> Tensor:
        """Hidden states [B, T, C] of whole sequences, padded on the right (a causal model never sees the padding)."""
        return self.decoder(self.embed(tokens, is_image))

    # -- scoring ---------------------------------------------------------------------------------------------------

    def log_probs(self, tokens: Tensor, is_image: Tensor, mask: Tensor, sampling: Sampling = Sampling()) -> Tensor:
        """THE scoring function: log-probability of every decision under the distribution it is drawn from.

        tokens [B, T, D] int64, is_image [B, T], mask [B, T, D] bool (True = score it; images whole or not at all)
        -> [B, T, D] float32, 0 where mask is False. A code that truncation has cut since it was drawn has -inf.
        """
        before = self.forward(tokens, is_image)[:, :-1]        # alignment: the state one place before predicts
        logp = torch.zeros(tokens.shape, device=tokens.device)
        text = mask[:, :, 0] & ~is_image
        if text.any():
            at = decision_logp(self.decoder.lm_head(before[text[:, 1:]]), sampling)          # (n, V)
            logp = logp.index_put((*text.nonzero().T, torch.zeros_like(tokens[..., 0][text])),
                                  at.gather(-1, tokens[text][:, :1])[:, 0])
        image = mask[:, :, 0] & is_image
        if image.any():
            codes = tokens[image]                                                          # (n, D)
            vectors = self.vision.vectors(codes)
            uncond = None
            if sampling.guidance != 1:
                uncond = self.depth(self.unconditional(codes), vectors)
            at = decision_logp(guide(self.depth(before[image[:, 1:]], vectors), uncond, sampling.guidance), sampling)
            logp = logp.index_put((image,), at.gather(-1, codes[..., None])[..., 0])       # (n, D)
        return logp

    def unconditional(self, codes: Tensor) -> Tensor:
        """codes [n_images * N, D] of whole images -> hidden states [n_images * N, C] before each position, where the
        prompt is the empty one and every image starts afresh (VILA-U's unconditional branch)."""
        N = self.vision_config.positions
        prompt = self.unconditional_prompt().to(codes.device)
        images = codes.view(-1, N, codes.shape[-1])
        tokens = torch.cat((prompt.tokens.expand(len(images), -1, -1), images), dim=1)
        is_image = torch.cat((prompt.is_image, torch.ones(N, dtype=torch.bool, device=codes.device)))
        hidden = self.forward(tokens, is_image.expand(len(images), -1))
        return hidden[:, -N - 1:-1].flatten(0, 1)

    # -- sampling --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(self, prompts: list[Sequence], group: int = 1, budget: int = 512, sampling: Sampling = Sampling(),
                 generator: torch.Generator | None = None) -> list[Trajectory]:
        """Interleaved answers: `group` for each prompt, in order. Rows are in different modes at the same time.

        A row in text mode draws a token; <im_start> switches it to image mode for exactly N positions of D codes; then
        it is in text mode again and has to choose <im_end> itself. A row ends at </s> or after `budget` positions; an
        image that does not fit any more is not started and the row ends as truncated. Nothing is forced but the prompt
        (which may end in <im_start>: then the answer starts with an image).
        Raises UserError where a prompt and its budget exceed the decoder's context, or the budget holds no image that
        a prompt opens.
        """
        N, D, device = self.vision_config.positions, self.vision_config.depth, self.device
        longest = max(len(p) for p in prompts)
        if budget < 1 or longest + budget > self.decoder.config.context:
            raise UserError(f"a prompt of {longest} positions and an answer of up to {budget} exceed the decoder's "
                            f"context of {self.decoder.config.context}: shorten the prompt or lower --budget")
        caches = [KVCache(longest + budget) for _ in self.decoder.layers]
        state = self.prefill(prompts, caches).repeat_interleave(group, 0)                  # (B, C)
        for cache in caches:
            cache.repeat(group)
        rows = len(state)
        place = torch.tensor([len(p) for p in prompts], device=device).repeat_interleave(group)   # next position
        if sampling.guidance != 1:
            empty = self.unconditional_prompt().to(device)
            blank_caches = [KVCache(len(empty) + N) for _ in self.decoder.layers]
            blank_start = self.prefill([empty], blank_caches).expand(rows, -1)             # predicts an image's start
            for cache in blank_caches:
                cache.repeat(rows)
            blank = blank_start
        alive = torch.ones(rows, dtype=torch.bool, device=device)
        drawing = torch.tensor([int(p.tokens[-1, 0]) == self.text.id(IMAGE_START) for p in prompts], device=device)
        if drawing.any() and budget < N:
            raise UserError(f"an image takes {N} positions, but the budget is {budget}: raise --budget")
        left = N * drawing.repeat_interleave(group).long()                                 # image positions to come
        truncated = torch.zeros(rows, dtype=torch.bool, device=device)
        columns = []
        for t in range(budget):
            text, image = alive & (left == 0), alive & (left > 0)
            tokens = torch.zeros(rows, D, dtype=torch.long, device=device)
            logp = torch.zeros(rows, D, device=device)
            if text.any():
                tokens[text, 0], logp[text, 0] = sample_index(decision_logp(self.decoder.lm_head(state[text]), sampling),
                                                      generator)
            if image.any():
                tokens[image], logp[image] = self.draw_codes(
                    state[image], blank[image] if sampling.guidance != 1 else None, sampling, generator)
            decided = text[:, None] & (torch.arange(D, device=device) == 0) | image[:, None]
            columns.append((tokens, image, decided, logp))
            opens = text & (tokens[:, 0] == self.text.id(IMAGE_START))
            ends = text & (tokens[:, 0] == self.text.id("</s>"))
            cut = alive & ~ends & ((t + 1 == budget) | (opens & (t + 1 + N > budget)))
            truncated |= cut
            alive = alive & ~ends & ~cut
            if not alive.any():
                break
            x = self.embed(tokens[:, None], image[:, None])                                # (B, 1, C)
            state = self.decoder(x, place[:, None], caches)[:, 0]
            if sampling.guidance != 1 and image.any():      # the other branch sees the codes and nothing else
                at = (len(empty) + (N - left).clamp(min=0) * image)[:, None]
                blank = torch.where(image[:, None], self.decoder(x, at, blank_caches)[:, 0], blank)
            left = torch.where(opens, N, left - image.long())
            if sampling.guidance != 1:
                blank = torch.where(opens[:, None], blank_start, blank)
            place = place + alive.long()
        tokens, is_image, mask, logp = (torch.stack(c, 1).cpu() for c in zip(*columns))    # (B, T, ...)
        lengths = mask[:, :, 0].sum(1).tolist()
        return [Trajectory(prompts[b // group], tokens[b, :n], is_image[b, :n], mask[b, :n], logp[b, :n],
                           bool(truncated[b])) for b, n in enumerate(lengths)]

    def prefill(self, prompts: list[Sequence], caches: list[KVCache]) -> Tensor:
        """Write the prompts' keys and values; the state [P, C] at each prompt's last position predicts its answer."""
        tokens, is_image = pad([p.tokens for p in prompts]), pad([p.is_image for p in prompts])
        tokens, is_image = tokens.to(self.device), is_image.to(self.device)
        positions = torch.arange(tokens.shape[1], device=self.device).expand(len(prompts), -1)
        hidden = self.decoder(self.embed(tokens, is_image), positions, caches)
        last = torch.tensor([len(p) - 1 for p in prompts], device=self.device)
        return hidden[torch.arange(len(prompts), device=self.device), last]

    def draw_codes(self, state: Tensor, blank: Tensor | None, sampling: Sampling,
                   generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """D codes for each row, depth by depth: state [n, C] -> codes [n, D], logp [n, D]. `blank` is the state of the
        unconditional branch; both branches go on with the same code."""
        n, both = len(state), state if blank is None else torch.cat((state, blank))
        caches = [KVCache(self.vision_config.depth) for _ in self.depth.blocks]
        codes, logps, x, total = [], [], both, 0
        for d in range(self.vision_config.depth):
            logits = self.depth.step(d, x, caches)
            logits = guide(logits[:n], None if blank is None else logits[n:], sampling.guidance)
            code, logp = sample_index(decision_logp(logits, sampling), generator)
            codes.append(code), logps.append(logp)
            total = total + self.vision.quantizer.codebook(d)[code]                        # running sum (n, code_dim)
            x = total if blank is None else torch.cat((total, total))
        return torch.stack(codes, 1), torch.stack(logps, 1)

    # -- prompts ---------------------------------------------------------------------------------------------------

    def prompt(self, text: str, codes: list[Tensor] = (), draw: bool = False) -> Sequence:
        """A user's turn in the chat template (vicuna_v1), `<image>` marks replaced by the given pictures' codes
        [N, D], each inside <im_start> <im_end>. `draw` ends it with <im_start>: text-to-image. Raises UserError where
        marks and pictures differ in number."""
        if text.count("<image>") != len(codes):
            raise UserError(f"the prompt has {text.count('<image>')} <image> marks for {len(codes)} pictures: "
                            f"{text[:80]!r}")
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

    @torch.no_grad()
    def decode_pictures(self, codes: Tensor) -> np.ndarray:
        """codes [n, N, D] -> uint8 [n, H, W, 3]. Equal pictures are decoded once."""
        if not len(codes):
            return np.zeros((0, self.vision_config.image_size, self.vision_config.image_size, 3), np.uint8)
        unique, index = torch.unique(codes, dim=0, return_inverse=True)
        drawn = [to_pictures(self.vision.decode(part.to(self.device))) for part in unique.split(64)]
        return np.concatenate(drawn)[index.cpu().numpy()]

    @torch.no_grad()
    def encode_pictures(self, pictures: list[np.ndarray | Image.Image], crop: bool = False) -> Tensor:
        """Pictures of any size -> codes [n, N, D]; squashed or cropped to the square first."""
        pixels = [torch.stack([preprocess(p, self.vision_config.image_size, crop) for p in pictures[i:i + 64]])
                  for i in range(0, len(pictures), 64)]
        dtype = self.projector[0].weight.dtype
        return torch.cat([self.vision.encode(p.to(self.device, dtype)).cpu() for p in pixels])

    def read_answers(self, trajectories: list[Trajectory]) -> list[Answer]:
        """Trajectories as judges and people read them: segments with their texts and decoded pictures."""
        answers = [parse_answer(t.tokens, t.is_image, self.text) for t in trajectories]
        drawn = [s for a in answers for s in a.segments if s.codes is not None]
        if drawn:
            for segment, picture in zip(drawn, self.decode_pictures(torch.stack([s.codes for s in drawn]))):
                segment.picture = picture
        return answers


def chat(text: str, system: str) -> str:
    """The conversation template of the published model (vicuna_v1) with one user turn. An empty message is treated
    like a missing one, as there: nothing stands between 'USER:' and 'ASSISTANT:'."""
    return f"{system} USER: {text} ASSISTANT:" if text.strip() else f"{system} USER:ASSISTANT:"


# ------------------------------------------------------------------------------------------------------------
# QLoRA: a frozen base in 4 bits (NF4, arXiv 2305.14314) and low-rank adapters that are trained (arXiv 2106.09685)

NF4_BLOCK = 64       # weights that share one scale, their largest absolute value
# 16 quantiles of the normal distribution, scaled to -1..1, with an exact 0: the table of bitsandbytes
NF4 = torch.tensor([-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
                    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
                    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
                    0.7229568362236023, 1.0])
NF4_BOUNDS = (NF4[1:] + NF4[:-1]) / 2                                       # a value between two goes to the nearer one
NF4_PAIRS = torch.stack((NF4.repeat_interleave(16), NF4.repeat(16)), 1)     # [256, 2]: what a byte holds


def to_nf4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight, any shape of n values -> bytes uint8 [n / 2], two 4-bit codes each, the first in the high bits, and
    scales float32 [n / 64]. bitsandbytes' quantize_4bit(quant_type="nf4", blocksize=64), value for value."""
    blocks = weight.reshape(-1, NF4_BLOCK)
    scales = blocks.abs().amax(1).float()
    codes = torch.empty(blocks.shape, dtype=torch.uint8, device=weight.device)
    for code, block, scale in zip(*(x.split(2 ** 16) for x in (codes, blocks, scales))):     # 4 M values at a time
        scaled = block.float() * (1 / scale.clamp(min=1e-38))[:, None]
        code.copy_(torch.bucketize(scaled, NF4_BOUNDS.to(weight.device), out_int32=True))
    codes = codes.view(-1, 2)
    return codes[:, 0] << 4 | codes[:, 1], scales


def from_nf4(packed: Tensor, scales: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """What `to_nf4` gave -> weight [out, in]. Computed in float32, then rounded to `dtype`."""
    weight = torch.empty(len(scales), NF4_BLOCK, dtype=dtype, device=packed.device)
    pairs = NF4_PAIRS.to(packed.device)
    for part, bytes_, scale in zip(weight.split(2 ** 16), packed.split(2 ** 21), scales.split(2 ** 16)):
        part.copy_(pairs.index_select(0, bytes_.int()).view(-1, NF4_BLOCK).mul_(scale[:, None]))
    return weight.view(shape)


class NF4Product(torch.autograd.Function):
    """x W^T for a W in 4 bits, which the backward pass unpacks again: in full, one layer's exists at a time."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, scales: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(packed, scales)
        ctx.shape = shape
        return F.linear(x, from_nf4(packed, scales, shape, x.dtype))

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad @ from_nf4(*ctx.saved_tensors, ctx.shape, grad.dtype), None, None, None


class NF4Linear(nn.Module):
    """A frozen linear layer with its weight in 4 bits and a scale per 64 weights: 4.5 bits a weight."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed, scales = to_nf4(weight)
        self.register_buffer("packed", packed), self.register_buffer("scales", scales)
        self.bias, self.dtype = bias, weight.dtype

    @property
    def weight(self) -> Tensor:
        return from_nf4(self.packed, self.scales, (self.out_features, self.in_features), self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        y = NF4Product.apply(x, self.packed, self.scales, (self.out_features, self.in_features))
        return y if self.bias is None else y + self.bias


class LoRALinear(nn.Module):
    """base(x) + alpha / r B A x. B starts at zero, so that a fresh adapter changes nothing; A and B are float32."""

    def __init__(self, base: nn.Linear | NF4Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        bound = base.in_features ** -0.5                               # as torch's own linear layers start
        self.a = nn.Parameter(torch.empty(rank, base.in_features).uniform_(-bound, bound, generator=generator))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.scale * F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))

    def merged(self) -> nn.Linear:
        """One plain layer that does the same."""
        weight = self.base.weight
        return plain_linear((weight.float() + self.scale * self.b @ self.a).to(weight.dtype), self.base.bias)


class AddedRows(nn.Module):
    """A frozen embedding or lm_head [V, C] with own, trained rows for the added tokens `ids`.

    Choice: <think> and </think> start as the same mean row. Adapters inside the layers could never tell them apart,
    neither read nor written, so these rows (two of 32,006) are trained along.
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
        y = self.base(x)
        if isinstance(self.base, nn.Linear):                                               # logits [..., V]
            ids = torch.tensor(self.ids, device=x.device)
            return y.index_copy(-1, ids, F.linear(x, self.rows.to(x.dtype)))
        for i, row in zip(self.ids, self.rows):                                            # embeddings [..., C]
            y = torch.where((x == i)[..., None], row.to(y.dtype), y)
        return y


def plain_linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """nn.Linear around a weight that is there already."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight), bias
    return linear


def prepare_training(model: "UnifiedModel", rank: int, alpha: float, seed: int = 0) -> None:
    """Decide what is trained, in float32 (Adam's steps are too small for bfloat16): with rank 0 the whole policy, else
    an adapter on every linear layer of the decoder, everything else frozen. A model that was loaded with its adapters
    keeps them. Raises UserError where it has others than asked for."""
    if model.adapter and rank and model.adapter != {"rank": rank, "alpha": alpha}:
        raise UserError(f"--lora-rank {rank} --lora-alpha {alpha}: the model already has adapters of rank "
                        f"{model.adapter['rank']} and alpha {model.adapter['alpha']}")
    if model.adapter:
        return
    if not rank:
        if any(isinstance(m, NF4Linear) for m in model.modules()):
            raise UserError("--quantize nf4: 4-bit weights cannot be trained themselves: add --lora-rank")
        model.float()
        return
    model.requires_grad_(False)
    generator, decoder = torch.Generator().manual_seed(seed), model.decoder
    for owner in [part for layer in decoder.layers for part in (layer.attn, layer.mlp)]:
        for name, child in list(owner.named_children()):
            setattr(owner, name, LoRALinear(child, rank, alpha, generator).to(model.device))
    ids = [model.text.id(token) for token in (THINK_START, THINK_END)]
    decoder.embed, decoder.lm_head = AddedRows(decoder.embed, ids), AddedRows(decoder.lm_head, ids)
    model.adapter = {"rank": rank, "alpha": alpha}


def merge(model: "UnifiedModel") -> None:
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


@contextmanager
def with_trainable(model: nn.Module, values: dict[str, Tensor]):
    """The model with its trained parameters as in `values`. The KL's reference is the policy with its first values: no
    second base, and for a full fine-tune no second image tokenizer."""
    now = {name: p.data for name, p in model.named_parameters() if p.requires_grad}
    def put(tensors):
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data = tensors[name]
    put(values)
    try:
        yield model
    finally:
        put(now)


def trainable_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all trained parameters, by name."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def check_budget(policy: UnifiedModel, budget: int, name: str) -> None:
    """An answer has to have room for an image."""
    if budget < policy.vision_config.positions:
        raise UserError(f"--budget {budget}: one image of {name} takes {policy.vision_config.positions} positions, "
                        f"expected more than that for each step")


# ------------------------------------------------------------------------------------------------------------
# Checkpoints in the published layout: llm/, mm_projector/, vision_tower/

NAMES = {       # folder -> {name there: name here}; {} is a layer number
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
# Stored but not needed: SigLIP's text tower, pooling head and last norm, the codebooks' training statistics; and what
# goes beyond the model that is built: the tower's last layer, further copies of a shared codebook.
NOT_NEEDED = re.compile(r"rqvaesiglip\.(siglip_model\.(text_model|vision_model\.(head|post_layernorm)|logit_)|logit_|"
                        r"quantizer\.codebooks\.\d+\.(embed_ema|cluster_size_ema)$)")
SURPLUS = re.compile(r"vision\.(tower\.blocks|quantizer\.codebooks)\.")


def rename(name: str, table: dict[str, str]) -> str | None:
    """A tensor's name through a table of prefixes, None if no prefix fits."""
    for theirs, ours in table.items():
        match = re.match(re.escape(theirs).replace(r"\{\}", r"(\d+)"), name)
        if match:
            return ours.format(*match.groups()) + name[match.end():]
    return None


def checkpoint_folder(source: str) -> Path:
    """A run directory (its policy/), a checkpoint directory, or a hub id whose snapshot is fetched or found in the
    cache (HF_HOME and HF_HUB_OFFLINE are respected). Raises UserError where there is none."""
    for folder in (Path(source) / "policy", Path(source)):
        settle_folder(folder)
        if (folder / "llm").is_dir() or (folder / "adapter.json").exists():
            return folder
    if Path(source).exists() or source.count("/") != 1 or source.startswith((".", "/", "out/")):
        raise UserError(f"--model {source}: no checkpoint there (expected the folders llm/, mm_projector/ and "
                        f"vision_tower/, or a run directory that holds them in policy/)")
    return snapshot(source, "--model")


def tensor_files(folder: Path) -> list[Path]:
    """The safetensors files of one part: those of its index, else the only one."""
    index = folder / "model.safetensors.index.json"
    try:
        names = sorted(set(read_json(index)["weight_map"].values())) if index.exists() else ["model.safetensors"]
    except (KeyError, TypeError, AttributeError):
        raise UserError(f'{index}: expected {{"weight_map": {{tensor: file}}}}')
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"{folder / name}: missing" + (f", but {index} names it" if index.exists() else ""))
    return [folder / name for name in names]


def load(source: str | Path, device: str | torch.device = "cpu", quantize: str = "none") -> UnifiedModel:
    """A checkpoint in the published layout (hub id or folder) -> model. Sizes come from its config files and tensor
    shapes; tensors stream one at a time to `device`, in the type they are stored in or, with quantize "nf4", the
    decoder's linear layers in 4 bits; only needed ones are read. A folder of adapters brings its base, as it was
    quantised when they were trained.

    Raises UserError, naming file, tensor, found and expected shape, for whatever is missing, unknown or mis-shaped."""
    folder = checkpoint_folder(str(source))
    if (folder / "adapter.json").exists():
        return load_adapters(folder, device)
    if quantize not in ("none", "nf4"):
        raise UserError(f"--quantize {quantize}: expected nf4 or none")
    llm, tower = read_json(folder / "llm" / "config.json"), read_json(folder / "vision_tower" / "config.json")
    shapes = {}
    for file in tensor_files(folder / "vision_tower"):
        with open_tensors(file) as tensors:
            shapes |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}
    try:
        vision = VisionConfig.from_published(tower, shapes)
        decoder = DecoderConfig(
            **{f: llm[f] for f in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                   "vocab_size")},
            **{f: llm[f] for f in ("num_key_value_heads", "rms_norm_eps", "rope_theta", "attention_bias")
               if llm.get(f)},
            rope_factor=(llm.get("rope_scaling") or {}).get("factor", 1.0),
            context=llm.get("tokenizer_model_max_length") or llm.get("model_max_length")
            or llm["max_position_embeddings"])
        head = tower["rqtransformer"]
        depth = DepthConfig(head["embed_dim"], head["head"]["n_layer"], head["head"]["block"]["n_head"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder}: its config.json files or vision tensors lack {error}")
    with torch.device("meta"):
        model = UnifiedModel(decoder, depth, vision)
    model.text = TextTokenizer.from_folder(folder / "llm")              # small files first: they fail fast
    model.system_prompt = read_json(folder / "config.json").get("system_prompt", VICUNA)
    read_weights(model, folder, device, quantize)
    add_tokens(model, [THINK_START, THINK_END])
    model.source, model.quantize = str(Path(source).resolve() if Path(source).exists() else source), quantize
    return model


def read_weights(model: UnifiedModel, folder: Path, device: str | torch.device, quantize: str = "none") -> None:
    """Every tensor of a checkpoint to its place in the model, which may still be on the meta device."""
    wanted = set(model.state_dict())
    missing = set(wanted)
    for part in NAMES:
        for file in tensor_files(folder / part):
            with open_tensors(file) as tensors:
                names = tensors.keys()
            for theirs in names:
                ours = rename(theirs, NAMES[part])
                if ours is None and not NOT_NEEDED.match(theirs):
                    raise UserError(f"{file}: unknown tensor {theirs}")
                if ours is None or SURPLUS.match(ours) and ours not in wanted:
                    continue
                if ours not in wanted:
                    raise UserError(f"{file}: tensor {theirs} is beyond the sizes that config.json gives")
                assign(model, ours, read_tensor(file, theirs, device), f"{file}: tensor {theirs}", quantize)
                missing.discard(ours)
    if missing:
        theirs = {part: rename(sorted(missing)[0], {b: a for a, b in NAMES[part].items()}) for part in NAMES}
        part, name = next((part, name) for part, name in theirs.items() if name)
        raise UserError(f"{folder / part}: tensor {name} is missing ({len(missing)} in all)")
    model.vision.requires_grad_(False)


def load_adapters(folder: Path, device: str | torch.device) -> UnifiedModel:
    """adapter.json (base, quantize, rank, alpha) and adapter.safetensors -> the base with these adapters."""
    told = read_json(folder / "adapter.json")
    try:
        base, quantize, rank, alpha = told["base"], told["quantize"], told["rank"], told["alpha"]
        model = load(base, device, quantize)
    except KeyError as error:
        raise UserError(f"{folder / 'adapter.json'}: lacks {error}")
    except UserError as error:
        raise UserError(f"{folder / 'adapter.json'}: its base cannot be loaded: {error}")
    prepare_training(model, rank, alpha)
    read_adapters(model, folder, device)
    return model


def read_adapters(model: UnifiedModel, folder: Path, device: str | torch.device) -> None:
    """adapter.safetensors to its place in a model that has such adapters."""
    file, wanted = folder / "adapter.safetensors", set(trainable_state(model))
    with open_tensors(file) as tensors:
        names = set(tensors.keys())
    if names != wanted:
        name = sorted(names ^ wanted)[0]
        raise UserError(f"{file}: tensor {name} is {'missing' if name in wanted else 'unknown'}")
    for name in sorted(wanted):
        assign(model, name, read_tensor(file, name, device), f"{file}: tensor {name}")


def restore(model: UnifiedModel, folder: Path) -> None:
    """Put a checkpoint's trained weights into the model that its training started from."""
    (read_adapters if model.adapter else read_weights)(model, folder, model.device)
LINEAR = re.compile(r"decoder\.layers\.\d+\.(attn|mlp)\.\w+_proj\.weight")      # what is quantised and adapted


def assign(model: nn.Module, name: str, value: Tensor, what: str, quantize: str = "none") -> None:
    """Put a tensor where its parameter or buffer is, if the shapes agree; a decoder layer's weight in 4 bits if asked
    for (its nn.Linear then gives way to an NF4Linear)."""
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
        return
    if leaf in owner._parameters:
        value = nn.Parameter(value, requires_grad=value.is_floating_point())
    setattr(owner, leaf, value)


def add_tokens(model: UnifiedModel, tokens: list[str]) -> None:
    """Add special tokens the checkpoint lacks; their embedding and lm_head rows start as the mean row, as VILA-U does
    for its own."""
    new = [token for token in tokens if not model.text.knows(token)]
    if not new:
        return
    model.text.add(new)
    with torch.no_grad():
        for layer in (model.decoder.embed, model.decoder.lm_head):
            mean = layer.weight.float().mean(0, keepdim=True).to(layer.weight.dtype)
            layer.weight = nn.Parameter(torch.cat((layer.weight, mean.expand(len(new), -1))))
    model.decoder.config.vocab_size += len(new)


def save(model: UnifiedModel, folder: Path, state: dict | None = None,
         tensors: dict[str, Tensor] | None = None) -> None:
    """Write a checkpoint, whole or not at all: in the published layout, or the adapters alone where there are any.
    `state` (JSON) and `tensors` are what training needs to go on (where it was, optimizer): training.json and
    training.safetensors."""
    with write_whole(folder) as new:
        new.mkdir()
        if model.adapter:
            told = {"base": model.source, "quantize": model.quantize, **model.adapter}
            (new / "adapter.json").write_text(json.dumps(told, indent=1))
            write_tensors(trainable_state(model), new / "adapter.safetensors")
        else:
            write_published(model, new)
        if state is not None:
            (new / "training.json").write_text(json.dumps(state))
            write_tensors(tensors or {}, new / "training.safetensors")


def write_published(model: UnifiedModel, folder: Path) -> None:
    """The published layout plus our added tokens: what `load` reads."""
    write_configs(model, folder)
    weights = model.state_dict()
    for part, table in NAMES.items():
        back = {ours: theirs for theirs, ours in table.items()}
        named = {rename(ours, back): w.contiguous() for ours, w in weights.items() if rename(ours, back)}
        write_tensors(named, folder / part / "model.safetensors")
    model.text.save(folder / "llm")


def write_configs(model: UnifiedModel, folder: Path) -> None:
    """The four config.json files of the published layout."""
    d, k, v = model.decoder.config, model.depth_config, model.vision_config
    llm = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
           **{f: x for f, x in asdict(d).items() if f not in ("rope_factor", "context", "qkv_bias")},
           "rope_scaling": {"type": "linear", "factor": d.rope_factor} if d.rope_factor != 1 else None,
           "max_position_embeddings": d.context, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    tower = {"model_type": "rqvaesigliptransformer_model", "hidden_size": v.width,
             "vision_layers_used": v.layers, "rqvaesiglip": v.to_published(),
             "rqtransformer": {"embed_dim": k.width, "block_size": [v.grid, v.grid, v.depth],
                               "head": {"n_layer": k.layers, "block": {"n_head": k.heads}},
                               "input_embed_dim_1": d.hidden_size, "input_embed_dim_2": v.width,
                               "vocab_size": v.codebook_size}}
    configs = {"": {"model_type": "vila_u_llama", "architectures": ["VILAULlamaModel"],
                    "image_aspect_ratio": "resize", "system_prompt": model.system_prompt},
               "llm": llm, "vision_tower": tower,
               "mm_projector": {"mm_projector_type": "mlp2x_gelu", "model_type": "v2l_projector"}}
    for part, config in configs.items():
        (folder / part).mkdir(parents=True, exist_ok=True)
        (folder / part / "config.json").write_text(json.dumps(config, indent=1))


def load_training(folder: Path) -> tuple[dict | None, dict[str, Tensor]]:
    """What `save` kept beside the weights: (None, {}) where there is no such checkpoint."""
    settle_folder(folder)
    if not (Path(folder) / "training.json").exists():
        return None, {}
    with open_tensors(Path(folder) / "training.safetensors") as file:
        return read_json(Path(folder) / "training.json"), {name: file.get_tensor(name) for name in file.keys()}


# ------------------------------------------------------------------------------------------------------------
# Run alone: one interleaved answer


@dataclass
class Config:
    prompt: str = "a red circle at top left"   # each `<image>` mark in it takes the next file of --image
    image: str = ""              # picture files for the prompt's <image> marks, separated by commas
    model: str = "out/warmup"    # run directory, checkpoint folder or hub id
    out: str = "out/answer"      # where answer.html and the PNGs go
    draw: bool = False           # text-to-image: the answer is one picture of the prompt
    seed: int = 0                # of the sampling
    budget: Count = 512          # positions an answer may have, if the decoder's context has room for them
    temperature: float = 1.0     # 0 = greedy
    top_k: Natural = 0           # 0 = off
    top_p: float = 1.0           # 1 = off
    guidance: float = 1.0        # for image codes; VILA-U and the paper draw with 3
    quantize: str = "none"       # nf4: the decoder's linear layers in 4 bits
    merge: str = ""              # write the model, its adapters folded in, to this folder in the published layout; stop
    device: str = "auto"         # cpu, cuda, mps


def answer_page(prompt: str, pictures: list[np.ndarray], answer: Answer, folder: Path) -> Path:
    """The answer as files: answer.html shows texts and pictures in turn, the pictures lie beside it as PNGs."""
    def show(name: str, picture: np.ndarray) -> str:
        Image.fromarray(picture).save(folder / name)
        return f'<img src="{name}" style="width:192px;image-rendering:pixelated">'
    body = [f"<h3>{html.escape(prompt)}</h3>"] + [show(f"prompt_{i}.png", p) for i, p in enumerate(pictures)] + ["<hr>"]
    for i, segment in enumerate(answer.segments):
        body.append(f"<p>{html.escape(segment.text)}</p>" if segment.picture is None
                    else show(f"step_{i}.png", segment.picture))
    (folder / "answer.html").write_text("<!doctype html><meta charset='utf-8'>" + "\n".join(body))
    return folder / "answer.html"


def main() -> None:
    """One answer to one prompt, printed and written to --out; or adapters folded into their base."""
    config = parse_config(Config)
    if config.merge:
        model = load(config.model, pick_device(config.device), config.quantize)
        if not model.adapter:
            raise UserError(f"--merge {config.merge}: {config.model} has no adapters")
        merge(model)
        return save(model, Path(config.merge))
    pictures = [read_picture(Path(name), "--image") for name in config.image.split(",") if name]
    marks = config.prompt.count("<image>")
    if marks != len(pictures):
        raise UserError(f"--image: {len(pictures)} files, but {marks} <image> marks in --prompt")
    model = load(config.model, pick_device(config.device), config.quantize).eval()
    prompt = model.prompt(config.prompt, list(model.encode_pictures(pictures)) if pictures else [], config.draw)
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.guidance)
    budget = max(1, min(config.budget, model.decoder.config.context - len(prompt)))
    rows = model.generate([prompt], 1, budget, sampling, torch.Generator().manual_seed(config.seed))
    answer = model.read_answers(rows)[0]
    for segment in answer.segments:
        print(segment.text if segment.picture is None else f"[picture {segment.picture.shape[1]}x"
                                                           f"{segment.picture.shape[0]}]")
    Path(config.out).mkdir(parents=True, exist_ok=True)
    print(f"{answer.layout}{' (cut by --budget)' if rows[0].truncated else ''}; "
          f"{answer_page(config.prompt, pictures, answer, Path(config.out))}")
if __name__ == "__main__":
    run_main(main)
