"""Text and pictures into ids and codes and back; knows no decoder (paper, Sec. 3; VILA-U's tokenizers).

    text      -> ids          SentencePiece BPE as LLaMA uses it, read from tokenizer.model
    pictures  -> codes        SigLIP tower and residual quantizer: N positions of D codes; convolutions go back
    both      -> `Sequence`   one (T, D) array, and `Answer` for what comes back

The transformer pieces at the top serve every model here. B pictures, N positions, D depth, K codes, C width.

    python tokenizer.py --model out/warmup            # reconstruction with 1..D codes a position, as a PNG
"""
import heapq
import json
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common import UserError

THINK_START, THINK_END = "<think>", "</think>"
# Choice: <vis> and </vis> are the written form of VILA-U's own tokens: their pretrained meaning is "an image starts
# (ends) here", so there is nothing to relearn.
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"
SPECIAL_TOKENS = [IMAGE_START, IMAGE_END, "<vi_start>", "<vi_end>", THINK_START, THINK_END]
IMAGE_PLACEHOLDER = -200                # stands for an `<image>` mark among token ids, as in VILA-U


# ------------------------------------------------------------------------------------------------------------
# Transformer pieces
ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
               "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x)}


class Attention(nn.Module):
    """Multi-head attention, the one block behind every transformer here, the judges' included.

    Grouped heads (kv_heads < heads), rotary angles and a key/value cache are what a decoder adds; keys and values of
    something else (width context_width) are cross-attention.
    """

    def __init__(self, width: int, heads: int, kv_heads: int | None = None, bias: bool = True, out_bias: bool = True,
                 context_width: int | None = None):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, width // heads
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(context_width or width, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(context_width or width, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=out_bias)

    def forward(self, x: Tensor, causal: bool = False, mask: Tensor | None = None, rotary=None, attend=None,
                context: Tensor | None = None) -> Tensor:
        """x [B, T, C] -> [B, T, C]. rotary: (cos, sin) [B, T, head_dim]; attend(q, k, v) takes the place of the
        product, see model.KVCache; mask: boolean, True = may look, broadcast to [B, H, T, keys]; context
        [B, S, context_width]: whose keys."""
        B, T, _ = x.shape
        context = x if context is None else context
        q, k, v = (proj(of).unflatten(2, (-1, self.head_dim)).transpose(1, 2)             # (B, H, T, head_dim)
                   for proj, of in ((self.q_proj, x), (self.k_proj, context), (self.v_proj, context)))
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if attend is not None:
            y = attend(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                               enable_gqa=self.kv_heads != self.heads)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding, halves convention (LLaMA as published in Hugging Face layout). x [B, H, T, head_dim]."""
    a, b = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-b, a), dim=-1) * sin.unsqueeze(1)


class Block(nn.Module):
    """Pre-norm transformer block with biases: SigLIP's (tanh GELU, eps 1e-6), the depth transformer's (exact, 1e-5)."""

    def __init__(self, width: int, heads: int, mlp_width: int, activation: str, eps: float):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.fc1, self.fc2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor, **attention) -> Tensor:
        """x [B, T, C] -> [B, T, C]; keyword arguments go to Attention."""
        x = x + self.attn(self.norm1(x), **attention)
        return x + self.fc2(self.activation(self.fc1(self.norm2(x))))


# ------------------------------------------------------------------------------------------------------------
# Text
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6       # SentencePiece's types of pieces
SPACE = "\u2581"                                                              # how a piece writes a space


def read_message(data: bytes) -> list[tuple[int, int | bytes]]:
    """Protobuf wire format -> (field number, value) pairs: varints as int, everything else as bytes."""
    def varint(at: int) -> tuple[int, int]:
        value = shift = 0
        while True:
            value |= (data[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if data[at - 1] < 128:
                return value, at
    fields_found, at = [], 0
    while at < len(data):
        key, at = varint(at)
        if key & 7 == 0:
            value, at = varint(at)
        else:
            size, at = {1: (8, at), 5: (4, at)}[key & 7] if key & 7 != 2 else varint(at)
            value, at = data[at:at + size], at + size
            if len(value) < size:
                raise IndexError("the file ends inside a field")
        fields_found.append((key >> 3, value))
    return fields_found


def write_field(number: int, value: int | float | bytes) -> bytes:
    """One protobuf field: int as varint, float as 32 bits, bytes with their length."""
    def varint(n: int) -> bytes:
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value) if isinstance(value, int) else \
        varint(number << 3 | 2) + varint(len(value)) + value


def byte_pairs(symbols: list[str], rank, fixed: list[bool] | None = None) -> list[str]:
    """BPE: again and again join the neighbours of lowest rank(left, right), the leftmost of equals; None: never joined.
    Symbols that are `fixed` stay alone. They form a linked list; a heap holds the possible joins, stale ones are
    skipped when they come up, so that a long text costs little more than its length."""
    symbols, n = list(symbols), len(symbols)
    before, after, heap = list(range(-1, n - 1)), list(range(1, n + 1)), []

    def offer(left: int, right: int) -> None:
        if left >= 0 and right < n and not (fixed and (fixed[left] or fixed[right])):
            cost = rank(symbols[left], symbols[right])
            if cost is not None:
                heapq.heappush(heap, (cost, left, right, symbols[left], symbols[right]))
    for i in range(n - 1):
        offer(i, i + 1)
    while heap:
        _, left, right, *pair = heapq.heappop(heap)
        if [symbols[left], symbols[right]] != pair:
            continue
        symbols[left], symbols[right] = pair[0] + pair[1], None
        after[left] = after[right]
        if after[left] < n:
            before[after[left]] = left
        offer(before[left], left), offer(left, after[left])
    return [symbol for symbol in symbols if symbol is not None]


class TextTokenizer:
    """LLaMA's tokenizer: SentencePiece BPE with byte fallback, read from tokenizer.model, plus added tokens.

    encode/decode have the semantics of transformers' slow LlamaTokenizer with legacy=False, which VILA-U was trained
    with; encode_plain/decode_plain are SentencePiece's own. Raises UserError for a file that is not such a model.
    """

    def __init__(self, model_file: Path, added: dict[str, int] | None = None, plain: set[str] = frozenset()):
        """added: {token: id} beyond the file's pieces; those in `plain` are ordinary added tokens, not special ones."""
        try:
            self.model_bytes = Path(model_file).read_bytes()
            model = read_message(self.model_bytes)
            pieces = [dict(read_message(value)) for number, value in model if number == 1]
            trainer = dict(read_message(next((v for n, v in model if n == 2), b"")))
            normalizer = dict(read_message(next((v for n, v in model if n == 3), b"")))
            self.pieces = [piece[1].decode("utf-8") for piece in pieces]
            scores = [struct.unpack("<f", piece.get(2, bytes(4)))[0] for piece in pieces]
            self.types = [piece.get(3, NORMAL) for piece in pieces]
        except FileNotFoundError:
            raise UserError(f"{model_file}: missing (the text tokenizer)")
        except (IndexError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
            raise UserError(f"{model_file}: not a whole SentencePiece model ({error})")
        if not pieces or trainer.get(3, 1) != 2:
            raise UserError(f"{model_file}: expected a SentencePiece model of type BPE (2), found type "
                            f"{trainer.get(3, 1)} with {len(pieces)} pieces")
        if normalizer.get(2):
            raise UserError(f"{model_file}: has a character map, expected the identity normaliser")
        self.dummy_prefix, self.squeeze = bool(normalizer.get(3, 1)), bool(normalizer.get(4, 1))
        self.rank = {p: (-scores[i], i) for i, p in enumerate(self.pieces)
                     if self.types[i] in (NORMAL, USER_DEFINED, UNUSED)}
        self.bytes = {int(p[3:5], 16): i for i, p in enumerate(self.pieces) if self.types[i] == BYTE}
        self.unknown = self.types.index(UNKNOWN)
        users = sorted((p for i, p in enumerate(self.pieces) if self.types[i] == USER_DEFINED), key=len, reverse=True)
        self.symbols = re.compile("(" + "|".join(map(re.escape, users)) + ")|(.)", re.DOTALL) if users else None
        # Where no piece holds a space behind another character, text can be cut there and the parts cached.
        self.separable = not users and not any(re.search(f"[^{SPACE}]{SPACE}", p) for p in self.rank)
        self.cache: dict[str, list[int]] = {}
        self.plain, self.added = plain, {}
        self.base = {p: i for i, p in enumerate(self.pieces) if p in ("<unk>", "<s>", "</s>")}
        self._add(added or {})

    @classmethod
    def from_folder(cls, folder: Path) -> "TextTokenizer":
        """tokenizer.model, added_tokens.json and, where present, tokenizer_config.json of a checkpoint's llm/."""
        def read(name: str) -> dict:
            path = Path(folder) / name
            try:
                return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            except ValueError as error:
                raise UserError(f"{path}: not JSON ({error})")
        known = read("tokenizer_config.json").get("added_tokens_decoder", {})
        return cls(Path(folder) / "tokenizer.model", read("added_tokens.json"),
                   {entry["content"] for entry in known.values() if not entry.get("special", True)})

    def save(self, folder: Path) -> None:
        """What from_folder reads."""
        (Path(folder) / "tokenizer.model").write_bytes(self.model_bytes)
        (Path(folder) / "added_tokens.json").write_text(json.dumps(self.added))

    def add(self, tokens: list[str]) -> None:
        """Add special tokens behind the last id."""
        self._add({token: self.vocab_size + i for i, token in enumerate(tokens)})

    def _add(self, tokens: dict[str, int]) -> None:
        self.added |= tokens
        self.vocab_size = max([len(self.pieces) - 1, *self.added.values()]) + 1
        self.ids = {**self.base, **self.added}
        self.names = {i: token for token, i in self.ids.items()}
        self.cut = re.compile("(" + "|".join(map(re.escape, sorted(self.ids, key=len, reverse=True))) + ")")

    def knows(self, token: str) -> bool:
        return token in self.ids

    def id(self, token: str) -> int:
        """The id of a special or added token."""
        return self.ids[token]

    # -- encoding

    def encode(self, text: str) -> list[int]:
        """text -> ids, <s> in front; added tokens in the text become their ids."""
        ids = [self.base["<s>"]]
        if not text:
            return ids
        parts = self.cut.split(SPACE + text.replace(SPACE, " "))
        if len(parts) > 1 and parts[0] == SPACE and parts[1] not in self.plain:
            parts[0] = ""                         # no lone space before a special token that opens the text
        for part in parts:
            ids += [self.ids[part]] if part in self.ids else self._merge(part.replace(" ", SPACE))
        return ids

    def encode_with_images(self, text: str) -> list[int]:
        """The same with -200 at every `<image>`; each part is encoded by itself, as VILA-U's tokenizer_image_token."""
        first, *others = text.split("<image>")
        ids = self.encode(first)
        for part in others:
            ids += [IMAGE_PLACEHOLDER] + self.encode(part)[1:]
        return ids

    def encode_plain(self, text: str) -> list[int]:
        """SentencePiece's own encoding: no <s>, no added tokens."""
        if self.squeeze:
            text = re.sub(" +", " ", text.lstrip(" "))
        if not text:
            return []
        text = (" " * self.dummy_prefix + text).replace(" ", SPACE)
        return self._merge(text.rstrip(SPACE) if self.squeeze else text)

    def _merge(self, text: str) -> list[int]:
        """Spaces already written as U+2581 -> ids."""
        if not self.separable:
            return self._merge_part(text)
        ids = []
        for part in re.findall(f"{SPACE}*[^{SPACE}]+|{SPACE}+", text):
            if part not in self.cache:
                self.cache[part] = self._merge_part(part)
            ids += self.cache[part]
        return ids

    def _merge_part(self, text: str) -> list[int]:
        """BPE over characters; user-defined pieces stay whole. What is no piece at the end is spelled in bytes."""
        symbols, fixed = list(text), None
        if self.symbols:
            found = list(self.symbols.finditer(text))
            symbols, fixed = [m[0] for m in found], [m[1] is not None for m in found]
        ids = []
        for symbol in byte_pairs(symbols, lambda left, right: self.rank.get(left + right, (None,))[0], fixed):
            if symbol in self.rank:
                ids.append(self.rank[symbol][1])
            elif self.bytes:
                ids += [self.bytes[b] for b in symbol.encode("utf-8", "surrogatepass")]
            else:
                ids.append(self.unknown)
        return ids

    # -- decoding

    def decode(self, ids: list[int], skip_special: bool = False, spaces_between: bool = False) -> str:
        """ids -> text. Added tokens are written out (or left out); `spaces_between` puts a space on either side of
        them, transformers' default."""
        stretches, current = [], []
        for i in ids:
            special = i in self.names and self.names[i] not in self.plain
            if skip_special and special:
                continue
            if i in self.names and (not special or i >= len(self.pieces)):
                stretches += ([text] if (text := self._stretch(current)) else []) + [self.names[i]]
                current = []
            else:
                current.append(i)
        if current:
            stretches.append(self._stretch(current))
        return (" " if spaces_between else "").join(stretches)

    def _stretch(self, ids: list[int]) -> str:
        """A run of ids without added tokens: one leading space dropped, <s>, </s> and <unk> spelled out."""
        out, run = "", []
        for n, i in enumerate(ids):
            if i in self.names:
                out, run = out + self._text(run) + self.names[i], []
            else:
                piece = self.pieces[i]
                if n == 0 and piece.startswith(SPACE):
                    piece = piece[1:]              # what is left need not be a piece: then it is taken literally
                run.append((i, piece.replace(SPACE, " ") if piece in self.rank else piece))
        return out + self._text(run)

    def _text(self, pieces: list[tuple[int, str]]) -> str:
        """(id, its text) pairs -> text: byte pieces joined to UTF-8, a byte that belongs to no character is U+FFFD."""
        out, run = [], bytearray()
        for i, piece in pieces + [(None, "")]:
            if i is not None and self.types[i] == BYTE:
                run.append(int(piece[3:5], 16))
                continue
            while run:
                try:
                    out.append(run.decode("utf-8"))
                    run.clear()
                except UnicodeDecodeError as bad:
                    out.append(run[:bad.start].decode("utf-8") + "\ufffd")
                    del run[:bad.start + 1]
            if i is not None:
                out.append(" \u2047 " if self.types[i] == UNKNOWN else "" if self.types[i] == CONTROL else piece)
        return "".join(out)

    def decode_plain(self, ids: list[int]) -> str:
        """SentencePiece's own decoding."""
        pieces, fresh = [], self.dummy_prefix or self.squeeze
        for i in ids:
            piece = self.pieces[i]
            if fresh and self.types[i] not in (CONTROL, UNKNOWN, BYTE):
                if piece.startswith(SPACE):
                    piece = piece[1:]
                    fresh = self.squeeze and not piece
                else:
                    fresh = False
            elif self.types[i] in (UNKNOWN, BYTE):
                fresh = False
            if self.types[i] != CONTROL:
                pieces.append((i, piece.replace(SPACE, " ")))
        return self._text(pieces)


# ------------------------------------------------------------------------------------------------------------
# Pictures: VILA-U's image tokenizer (arXiv 2409.04429)
#
#     pixels [B, 3, H, W] --SigLIP tower--> features [B, N, C] --residual quantizer--> codes [B, N, D]
#     codes  [B, N, D]    --sum of the D code vectors--> [B, N, C] --picture decoder--> pixels [B, 3, H, W]

SIGLIP_HEADS = 16    # in no published file: every SigLIP that VILA-U and LLaVA use (base excepted) has 16 heads
GROUPS = 32          # of every GroupNorm in the picture decoder


@dataclass
class TowerConfig:
    image_size: int                  # pixels, square
    patch_size: int
    width: int                       # C: of the tower, and of the code vectors where there are any
    mlp_width: int
    layers: int                      # blocks that are used; VILA-U's published tower stores one more
    heads: int = field(default=SIGLIP_HEADS, kw_only=True)

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def positions(self) -> int:      # N
        return self.grid ** 2


@dataclass
class VisionConfig(TowerConfig):
    codebook_size: int               # K
    depth: int                       # D
    shared_codebook: bool            # one codebook for all depths, or one per depth
    ch: int                          # picture decoder: base channels
    ch_mult: tuple[int, ...]         # ... multiplier per resolution, finest first: len - 1 doublings
    num_res_blocks: int              # ... per level; a decoder has one more
    attn_resolutions: tuple[int, ...]
    z_channels: int
    resolution: int                  # ... what attn_resolutions are counted from
    decoder_latent_shape: tuple[int, int] | None = None   # resize the grid before decoding (the published 384 model)

    @classmethod
    def from_published(cls, config: dict, shapes: dict[str, tuple]) -> "VisionConfig":
        """config: vision_tower/config.json; shapes: of the tensors beside it, which alone tell the tower's sizes."""
        quantizer, tower = config["rqvaesiglip"], "rqvaesiglip.siglip_model.vision_model."
        decoder = quantizer["ddconfig"]
        width, _, patch_size, _ = shapes[tower + "embeddings.patch_embedding.weight"]
        positions, _ = shapes[tower + "embeddings.position_embedding.weight"]
        stored = 1 + max(int(name.split(".layers.")[1].split(".")[0]) for name in shapes
                         if name.startswith(tower + "encoder.layers."))
        rows, code_width = shapes["rqvaesiglip.quantizer.codebooks.0.weight"]
        if (rows, code_width) != (quantizer["n_embed"] + 1, width):
            raise UserError(f"vision_tower: codebook of shape {(rows, code_width)}, but config.json says n_embed = "
                             f"{quantizer['n_embed']} and the tower is {width} wide: expected "
                             f"{(quantizer['n_embed'] + 1, width)}")
        latent = quantizer.get("decoder_latent_shape")
        return cls(image_size=round(positions ** 0.5) * patch_size, patch_size=patch_size, width=width,
                   mlp_width=shapes[tower + "encoder.layers.0.mlp.fc1.weight"][0],
                   # VILA-U reads the tower's second-to-last hidden state; the key is ours, for towers without a spare
                   layers=config.get("vision_layers_used", stored - 1),
                   codebook_size=quantizer["n_embed"], depth=quantizer["code_shape"][-1],
                   shared_codebook=quantizer["shared_codebook"], ch=decoder["ch"], ch_mult=tuple(decoder["ch_mult"]),
                   num_res_blocks=decoder["num_res_blocks"], attn_resolutions=tuple(decoder["attn_resolutions"]),
                   z_channels=decoder["z_channels"], resolution=decoder["resolution"],
                   decoder_latent_shape=tuple(latent[:2]) if latent else None)

    def to_published(self) -> dict:
        """The rqvaesiglip part of vision_tower/config.json."""
        return {"n_embed": self.codebook_size, "code_shape": [self.grid, self.grid, self.depth],
                "latent_shape": [self.grid, self.grid, self.width], "embed_dim": self.width,
                "shared_codebook": self.shared_codebook, "decoder_latent_shape": self.decoder_latent_shape,
                "ddconfig": {"ch": self.ch, "ch_mult": self.ch_mult, "num_res_blocks": self.num_res_blocks,
                             "attn_resolutions": self.attn_resolutions, "z_channels": self.z_channels,
                             "resolution": self.resolution, "in_channels": 3, "out_ch": 3, "double_z": False,
                             "dropout": 0.0}}


# -- pictures

def preprocess(image: Image.Image | np.ndarray, size: int, crop: bool = False) -> Tensor:
    """-> float [3, size, size] in -1..1. VILA-U squashes what it reads to the square; pictures it is to learn to draw
    are cropped to a square first: the middle of a wide one, the top of a tall one."""
    image = (Image.fromarray(image) if isinstance(image, np.ndarray) else image).convert("RGB")
    if crop:
        side = min(image.size)
        left = (image.width - side) // 2
        image = image.crop((left, 0, left + side, side))
    pixels = np.asarray(image.resize((size, size), Image.BICUBIC), dtype=np.float32) / 255
    return torch.from_numpy((pixels - 0.5) / 0.5).permute(2, 0, 1).contiguous()


def to_pictures(pixels: Tensor) -> np.ndarray:
    """[..., 3, H, W], about -1..1 -> uint8 [..., H, W, 3], truncated as VILA-U's scripts do."""
    pixels = ((pixels.float() + 1) * 127.5).clamp(0, 255)
    return pixels.to(torch.uint8).movedim(-3, -1).cpu().numpy()


# -- pixels -> features -> codes

class SiglipTower(nn.Module):
    """SigLIP vision transformer (arXiv 2303.15343) up to its second-to-last layer, without the final norm."""

    def __init__(self, config: TowerConfig):
        super().__init__()
        self.patch = nn.Conv2d(3, config.width, config.patch_size, stride=config.patch_size)
        self.position = nn.Parameter(torch.randn(config.positions, config.width) * config.width ** -0.5)
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.mlp_width, "gelu_tanh", eps=1e-6)
                                    for _ in range(config.layers))

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> features [B, N, C]"""
        x = self.patch(pixels).flatten(2).transpose(1, 2) + self.position                 # (B, N, C)
        for block in self.blocks:
            x = block(x)
        return x


class ResidualQuantizer(nn.Module):
    """D codes for one vector: the nearest code, then the nearest to what is left, and so on (arXiv 2203.01941)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.depth = config.depth
        # The published tables end in one padding row, which is not a code; kept, so that saving is loading reversed.
        self.codebooks = nn.ModuleList(nn.Embedding(config.codebook_size + 1, config.width)
                                       for _ in range(1 if config.shared_codebook else config.depth))

    def codebook(self, d: int) -> Tensor:
        """The codes of depth d, [K, C]"""
        return self.codebooks[d if len(self.codebooks) > 1 else 0].weight[:-1]

    @torch.no_grad()
    def encode(self, features: Tensor) -> Tensor:
        """features [..., C] -> codes [..., D]"""
        residual, codes = features.float(), []
        for d in range(self.depth):
            table = self.codebook(d).float()                                              # (K, C)
            distance = (table ** 2).sum(1) - 2 * residual @ table.T                       # (..., K), less |residual|^2
            codes.append(distance.argmin(dim=-1))
            residual = residual - table[codes[-1]]
        return torch.stack(codes, dim=-1)

    def vectors(self, codes: Tensor) -> Tensor:
        """codes [..., D] -> their vectors [..., D, C]; the feature of a position is the sum over D."""
        return torch.stack([self.codebook(d)[codes[..., d]] for d in range(self.depth)], dim=-2)


# -- features -> pixels

def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = group_norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Single-head attention between all places of a feature map."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))           # (B, H*W, C)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)                  # (B, C, H, W)
        return x + self.proj_out(y)


class Upsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PictureDecoder(nn.Module):
    """The decoder of VQGAN (arXiv 2012.09841, taming-transformers) behind VILA-U's 1x1 convolution."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.grid, self.latent_shape = config.grid, config.decoder_latent_shape
        channels = config.ch * config.ch_mult[-1]
        self.post_quant_conv = nn.Conv2d(config.width, config.z_channels, 1)
        self.conv_in = nn.Conv2d(config.z_channels, channels, 3, padding=1)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = ResnetBlock(channels, channels), ResnetBlock(channels, channels)
        self.mid.attn_1 = AttnBlock(channels)
        levels, resolution = [], config.resolution // 2 ** (len(config.ch_mult) - 1)
        for i in reversed(range(len(config.ch_mult))):                  # coarsest first; published as up.3 ... up.0
            level = nn.Module()
            level.block, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                level.block.append(ResnetBlock(channels, config.ch * config.ch_mult[i]))
                channels = config.ch * config.ch_mult[i]
                if resolution in config.attn_resolutions:
                    level.attn.append(AttnBlock(channels))
            if i > 0:
                level.upsample = Upsample(channels)
            levels.insert(0, level)
            resolution *= 2
        self.up = nn.ModuleList(levels)
        self.norm_out = group_norm(channels)
        self.conv_out = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """features [B, N, C] -> pixels [B, 3, H, W], about -1..1, not clamped"""
        x = features.transpose(1, 2).unflatten(2, (self.grid, self.grid))                        # (B, C, grid, grid)
        if self.latent_shape is not None:
            x = F.interpolate(x, size=self.latent_shape, mode="bilinear")
        x = self.conv_in(self.post_quant_conv(x))
        x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))
        for level in reversed(self.up):
            for i, block in enumerate(level.block):
                x = block(x)
                if level.attn:
                    x = level.attn[i](x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)                                                                 # (B, c, 2h, 2w)
        return self.conv_out(F.silu(self.norm_out(x)))


class ImageTokenizer(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.tower, self.quantizer = SiglipTower(config), ResidualQuantizer(config)
        self.decoder = PictureDecoder(config)

    def encode(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] in -1..1 -> codes [B, N, D]"""
        return self.quantizer.encode(self.tower(pixels))

    def vectors(self, codes: Tensor) -> Tensor:
        """codes [..., D] -> code vectors [..., D, C]"""
        return self.quantizer.vectors(codes)

    def decode(self, codes: Tensor) -> Tensor:
        """codes [B, N, D] -> pixels [B, 3, H, W], about -1..1, not clamped"""
        return self.decoder(self.vectors(codes).sum(dim=-2))
VISION_NAMES = {     # prefixes in vision_tower/model.safetensors -> here; {} is a number
    "rqvaesiglip.siglip_model.vision_model.embeddings.patch_embedding.": "tower.patch.",
    "rqvaesiglip.siglip_model.vision_model.embeddings.position_embedding.weight": "tower.position",
    "rqvaesiglip.siglip_model.vision_model.encoder.layers.{}.layer_norm1.": "tower.blocks.{}.norm1.",
    "rqvaesiglip.siglip_model.vision_model.encoder.layers.{}.layer_norm2.": "tower.blocks.{}.norm2.",
    "rqvaesiglip.siglip_model.vision_model.encoder.layers.{}.self_attn.out_proj.": "tower.blocks.{}.attn.o_proj.",
    "rqvaesiglip.siglip_model.vision_model.encoder.layers.{}.self_attn.": "tower.blocks.{}.attn.",
    "rqvaesiglip.siglip_model.vision_model.encoder.layers.{}.mlp.": "tower.blocks.{}.",
    "rqvaesiglip.quantizer.codebooks.{}.weight": "quantizer.codebooks.{}.weight",
    "rqvaesiglip.post_quant_conv.": "decoder.post_quant_conv.",
    "rqvaesiglip.decoder.": "decoder.",
}


# ------------------------------------------------------------------------------------------------------------
# Sequences and answers


@dataclass
class Sequence:
    """Text and pictures as one array, the only form a model sees.

    A text position holds its id in column 0 (the other columns are 0), an image position its D codes. With D = 2 and
    images of N = 2 positions, '<s> a <im_start> IMAGE <im_end>' is

        tokens    [[1, 0], [263, 0], [380, 0], [17, 4], [9, 30], [381, 0]]
        is_image  [ False,    False,    False,    True,    True,    False]
    """
    tokens: Tensor               # [T, D] int64
    is_image: Tensor             # [T] bool

    def __len__(self) -> int:
        return len(self.tokens)

    def __add__(self, other: "Sequence") -> "Sequence":
        return Sequence(torch.cat((self.tokens, other.tokens)), torch.cat((self.is_image, other.is_image)))

    def __getitem__(self, part: slice) -> "Sequence":
        return Sequence(self.tokens[part], self.is_image[part])

    def to(self, device) -> "Sequence":
        return Sequence(self.tokens.to(device), self.is_image.to(device))


def pack(parts: list[list[int] | Tensor], depth: int) -> Sequence:
    """Lists of token ids and [N, D] code tensors, in order -> one Sequence."""
    tokens, is_image = [torch.zeros(0, depth, dtype=torch.long)], [torch.zeros(0, dtype=torch.bool)]
    for part in parts:
        picture = isinstance(part, Tensor)
        tokens.append(part if picture else F.pad(torch.tensor(part, dtype=torch.long)[:, None], (0, depth - 1)))
        is_image.append(torch.full((len(part),), picture))
    return Sequence(torch.cat(tokens), torch.cat(is_image))


def pad(rows: list[Tensor]) -> Tensor:
    """Ragged tensors -> one batch, zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@dataclass
class Segment:
    """One modality step of an answer: a text or a picture, and the positions start..stop-1 it was written at."""
    start: int
    stop: int
    text: str | None = None               # without its tags
    picture: np.ndarray | None = None     # uint8 [H, W, 3]
    codes: Tensor | None = None           # [N, D]


@dataclass
class Answer:
    """An answer as people and judges read it.

    `layout` spells the order of its pieces: T <think>, t </think>, V <vis>, v </vis>, w words, p picture, E </s>;
    a well-formed answer of two edits reads TwtVpvTwtVpvE.
    """
    layout: str
    segments: list[Segment]
    step_of: Tensor                       # [T] index of the segment each position belongs to; len(segments): none
    is_image: Tensor                      # [T] bool


def parse_answer(tokens: Tensor, is_image: Tensor, text: TextTokenizer) -> Answer:
    """tokens [T, D], is_image [T] of an answer -> its segments, pictures as codes (`UnifiedModel.read_answers` draws them).

    <vis> right before a picture and </vis> right after it belong to the picture's step, every other run of text is a
    text step, even where tags are missing or doubled: a broken answer has steps too. A last lone </s> is in no step.
    """
    letters = {text.id(THINK_START): "T", text.id(THINK_END): "t", text.id(IMAGE_START): "V", text.id(IMAGE_END): "v",
               text.id("</s>"): "E"}
    kinds = "".join("p" if image else letters.get(int(row[0]), "w") for row, image in zip(tokens, is_image))
    segments = []
    for match in re.finditer(r"V?p+v?|(?:(?!Vp)[^pE])+", kinds):
        start, stop = match.span()
        if "p" in match[0]:
            segments.append(Segment(start, stop, codes=tokens[start:stop][is_image[start:stop]]))
        else:
            words = [int(tokens[i, 0]) for i in range(start, stop) if kinds[i] == "w"]
            segments.append(Segment(start, stop, text=text.decode(words).strip()))
    steps = torch.full((len(tokens),), len(segments))
    for i, segment in enumerate(segments):
        steps[segment.start:segment.stop] = i
    return Answer(re.sub(r"w+", "w", re.sub(r"p+", "p", kinds)), segments, steps, is_image)
