"""Text and pictures as ids and codes, and back (paper, Sec. 3; VILA-U's tokenizers, arXiv 2409.04429).

    text      -> ids          SentencePiece BPE as LLaMA uses it, read from tokenizer.model
    pictures  -> codes        SigLIP tower and residual quantizer: N positions of D codes
    codes     -> pictures     convolutional decoder
    both      -> `Sequence`   one [T, D] array, the only form that a model sees
    an answer -> `Answer`     its texts and pictures step by step, and the layout that the format reward reads

The transformer pieces at the top serve every model of this project. B rows or pictures, T positions,
N positions of one image, D depth (codes a position), K codes a codebook, C width, H heads.

    python tokenizer.py --model out/warmup/policy/llm --text "a red circle"        # its ids and pieces
"""
from common import UserError, parse_config, read_json, reading, run_main

import heapq
import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

THINK_START, THINK_END = "<think>", "</think>"
# Choice: <vis> and </vis> of the paper are VILA-U's own tokens. Their pretrained meaning is "an image starts
# here" and "an image ends here", so there is nothing to relearn.
IMAGE_START, IMAGE_END = "<im_start>", "<im_end>"
SPECIAL_TOKENS = [IMAGE_START, IMAGE_END, "<vi_start>", "<vi_end>", THINK_START, THINK_END]
IMAGE_PLACEHOLDER = -200                # stands for an `<image>` mark among token ids, as in VILA-U


# ------------------------------------------------------------------------------------------------------------
# Transformer pieces

ACTIVATIONS = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
}


class Attention(nn.Module):
    """Multi-head attention, shared by every transformer here, the judges' included.

    Decoders pass `kv_heads` (grouped heads), `rotary` and, with a cache, `attend`. Pass `context` (of width
    `context_width`) for cross-attention.
    """

    def __init__(self, width: int, heads: int, kv_heads: int | None = None, bias: bool = True,
                 out_bias: bool = True, context_width: int | None = None):
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"a width that is a multiple of the number of heads, {width} and {heads}")
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads or heads, width // heads
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(context_width or width, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(context_width or width, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, width, bias=out_bias)

    def forward(self, x: Tensor, causal: bool = False, mask: Tensor | None = None,
                rotary: tuple[Tensor, Tensor] | None = None, attend: Callable | None = None,
                context: Tensor | None = None) -> Tensor:
        """x [B, T, C] -> [B, T, C].

        mask: boolean, True = may look, broadcast to [B, H, T, keys]
        rotary: cosines and sines [B, T, head_dim]
        attend: attend(q, k, v) -> y [B, H, T, head_dim] in place of the plain product, see model.KVCache
        context: [B, S, context_width], what keys and values are made of; None: x itself
        """
        B, T, _ = x.shape
        context = x if context is None else context
        q = self.q_proj(x).unflatten(2, (-1, self.head_dim)).transpose(1, 2)          # (B, H, T, head_dim)
        k = self.k_proj(context).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        v = self.v_proj(context).unflatten(2, (-1, self.head_dim)).transpose(1, 2)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        if attend is not None:
            y = attend(q, k, v)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal,
                                               enable_gqa=self.kv_heads != self.heads)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of x [B, H, T, head_dim]; the halves convention of LLaMA in Hugging Face's layout."""
    a, b = x.chunk(2, dim=-1)
    rotated = x * cos.unsqueeze(1) + torch.cat((-b, a), dim=-1) * sin.unsqueeze(1)
    return rotated.to(x.dtype)                  # the tables of a trained model are float32 under autocast


class Block(nn.Module):
    """Pre-norm transformer block with biases.

    SigLIP: tanh GELU, eps 1e-6. VILA-U's depth transformer: exact GELU, eps 1e-5.
    """

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
# Text: SentencePiece's model file, byte-pair encoding, LLaMA's tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6     # SentencePiece's types of pieces
BPE = 2                     # ... and its number for a model of byte-pair encoding
SPACE = "\u2581"            # a space inside a piece
CACHE_SIZE = 100_000        # words that a tokenizer remembers; then its cache starts again


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """A protobuf integer at byte `at` -> its value, and the byte behind it."""
    value = shift = 0
    while True:
        value |= (data[at] & 127) << shift
        at += 1
        shift += 7
        if data[at - 1] < 128:
            return value, at


def read_message(data: bytes) -> list[tuple[int, int | bytes]]:
    """Protobuf wire format -> (field number, value) pairs: varints as int, everything else as bytes."""
    pairs, at = [], 0
    while at < len(data):
        key, at = read_varint(data, at)
        number, wire_type = key >> 3, key & 7
        if wire_type == 0:
            value, at = read_varint(data, at)
        else:
            if wire_type == 2:
                size, at = read_varint(data, at)
            else:
                size = {1: 8, 5: 4}[wire_type]
            value, at = data[at:at + size], at + size
            if len(value) < size:
                raise IndexError("the file ends inside a field")
        pairs.append((number, value))
    return pairs


def varint(n: int) -> bytes:
    """An integer in protobuf's variable length."""
    if n > 127:
        return bytes([n & 127 | 128]) + varint(n >> 7)
    return bytes([n])


def write_field(number: int, value: int | float | bytes) -> bytes:
    """One protobuf field: int as varint, float as 32 bits, bytes with their length."""
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def parse_sentencepiece(data: bytes) -> tuple[list[str], list[float], list[int]]:
    """A tokenizer.model -> its pieces, their scores and their types, all in the order of the ids.

    Raises ValueError for a model that is not plain BPE. Other bytes raise ValueError, LookupError, TypeError,
    AttributeError or struct.error.
    """
    message = read_message(data)
    entries = [dict(read_message(value)) for number, value in message if number == 1]
    trainer = dict(read_message(next((value for number, value in message if number == 2), b"")))
    normalizer = dict(read_message(next((value for number, value in message if number == 3), b"")))
    kind = trainer.get(3, 1)
    if not entries or kind != BPE:
        raise ValueError(f"expected type BPE ({BPE}), found type {kind} with {len(entries)} pieces")
    if normalizer.get(2):
        raise ValueError("found a character map, expected the identity normaliser")
    pieces = [entry[1].decode("utf-8") for entry in entries]
    scores = [struct.unpack("<f", entry.get(2, bytes(4)))[0] for entry in entries]
    types = [entry.get(3, NORMAL) for entry in entries]
    if UNKNOWN not in types:
        raise ValueError("no unknown piece")
    return pieces, scores, types


def byte_pairs(symbols: list[str], rank: Callable[[str, str], float | tuple | None],
               fixed: list[bool] | None = None) -> list[str]:
    """Byte-pair encoding: repeatedly merge the adjacent pair with the lowest rank (ties: leftmost).

    rank(left, right) is None where the pair never merges; `fixed` symbols never do. The symbols form a linked
    list. A heap of possible merges keeps this near-linear; entries whose symbols have changed are discarded
    when popped.
    """
    symbols, n = list(symbols), len(symbols)
    before, after = list(range(-1, n - 1)), list(range(1, n + 1))
    heap = []

    def offer(left: int, right: int) -> None:
        if left < 0 or right >= n or (fixed and (fixed[left] or fixed[right])):
            return
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
        offer(before[left], left)
        offer(left, after[left])
    return [symbol for symbol in symbols if symbol is not None]


class TextTokenizer:
    """LLaMA's tokenizer: SentencePiece BPE with byte fallback, read from tokenizer.model, plus added tokens.

    `encode` and `decode` do what transformers' slow LlamaTokenizer with legacy=False does, which VILA-U was
    trained with. Raises UserError for a file that is no such model.
    """

    def __init__(self, model_file: Path, added: dict[str, int] | None = None, plain: set[str] = frozenset()):
        """added: {token: id} beyond the file's pieces. Those in `plain` are ordinary, not special tokens."""
        try:
            self.model_bytes = Path(model_file).read_bytes()
            self.pieces, scores, self.types = parse_sentencepiece(self.model_bytes)
            self.bytes = {int(p[3:5], 16): i for i, p in enumerate(self.pieces) if self.types[i] == BYTE}
        except FileNotFoundError:
            raise UserError(f"{model_file}: no such file (the text tokenizer; python warmup.py makes a "
                            f"checkpoint that has one)") from None
        except (OSError, ValueError, LookupError, TypeError, AttributeError, struct.error) as error:
            raise UserError(f"{model_file}: not a whole SentencePiece BPE model ({error})") from None
        self.rank = {piece: (-scores[i], i) for i, piece in enumerate(self.pieces)
                     if self.types[i] in (NORMAL, USER_DEFINED, UNUSED)}
        self.unknown = self.types.index(UNKNOWN)
        users = [piece for i, piece in enumerate(self.pieces) if self.types[i] == USER_DEFINED]
        users.sort(key=len, reverse=True)
        self.symbols = None
        if users:
            self.symbols = re.compile("(" + "|".join(map(re.escape, users)) + ")|(.)", re.DOTALL)
        # Where no piece holds a space behind another character, text can be cut there and the parts cached.
        self.separable = not users and not any(re.search(f"[^{SPACE}]{SPACE}", piece) for piece in self.rank)
        self.cache: dict[str, list[int]] = {}
        self.plain, self.added = plain, {}
        self.base = {p: i for i, p in enumerate(self.pieces) if p in ("<unk>", "<s>", "</s>")}
        self.add_ids(added or {})

    @classmethod
    def from_folder(cls, folder: Path) -> "TextTokenizer":
        """Read tokenizer.model, added_tokens.json and tokenizer_config.json of a checkpoint's llm/.

        The last two may be missing.
        """
        file, config = (Path(folder) / name for name in ("added_tokens.json", "tokenizer_config.json"))
        added = read_json(file) if file.exists() else {}
        if not all(isinstance(i, int) and 0 <= i < 2 ** 31 for i in added.values()):
            raise UserError(f"{file}: expected {{token: id}}")
        entries = read_json(config).get("added_tokens_decoder", {}) if config.exists() else {}
        with reading(config, "added_tokens_decoder"):
            plain = {entry["content"] for entry in entries.values() if not entry.get("special", True)}
        return cls(Path(folder) / "tokenizer.model", added, plain)

    def save(self, folder: Path) -> None:
        """Write what from_folder reads."""
        (Path(folder) / "tokenizer.model").write_bytes(self.model_bytes)
        (Path(folder) / "added_tokens.json").write_text(json.dumps(self.added), encoding="utf-8")

    def add(self, tokens: list[str]) -> None:
        """Add special tokens behind the last id."""
        self.add_ids({token: self.vocab_size + i for i, token in enumerate(tokens)})

    def add_ids(self, tokens: dict[str, int]) -> None:
        """Add tokens with these ids."""
        self.added |= tokens
        self.vocab_size = max([len(self.pieces) - 1, *self.added.values()]) + 1
        self.ids = {**self.base, **self.added}
        self.names = {i: token for token, i in self.ids.items()}
        self.cut = re.compile("(" + "|".join(map(re.escape, sorted(self.ids, key=len, reverse=True))) + ")")

    def knows(self, token: str) -> bool:
        """Whether this is a special or added token."""
        return token in self.ids

    def has(self, i: int) -> bool:
        """Whether an id belongs to a piece or token."""
        return i in self.names or i < len(self.pieces)

    def id(self, token: str) -> int:
        """The id of a special or added token."""
        return self.ids[token]

    def piece(self, i: int) -> str:
        """The token or piece behind an id."""
        return self.names[i] if i in self.names else self.pieces[i]

    # -- encoding

    def encode(self, text: str) -> list[int]:
        """text -> ids, <s> in front. Added tokens in the text become their ids."""
        ids = [self.base["<s>"]]
        if not text:
            return ids
        parts = self.cut.split(SPACE + text.replace(SPACE, " "))
        if len(parts) > 1 and parts[0] == SPACE and parts[1] not in self.plain:
            parts[0] = ""                         # no lone space before a special token that opens the text
        for part in parts:
            ids += [self.ids[part]] if part in self.ids else self.merge(part.replace(" ", SPACE))
        return ids

    def encode_with_images(self, text: str) -> list[int]:
        """text -> ids, with -200 at every `<image>`.

        As VILA-U's tokenizer_image_token: each part between the marks is encoded alone.
        """
        first, *others = text.split("<image>")
        ids = self.encode(first)
        for part in others:
            ids += [IMAGE_PLACEHOLDER] + self.encode(part)[1:]
        return ids

    def merge(self, text: str) -> list[int]:
        """Text without added tokens, spaces written as U+2581 -> ids, nothing put in front. Caches words."""
        if not self.separable:
            return self.merge_word(text)
        ids = []
        for word in re.findall(f"{SPACE}*[^{SPACE}]+|{SPACE}+", text):
            if word not in self.cache:
                if len(self.cache) >= CACHE_SIZE:
                    self.cache.clear()
                self.cache[word] = self.merge_word(word)
            ids += self.cache[word]
        return ids

    def merge_word(self, word: str) -> list[int]:
        """BPE over characters, user-defined pieces whole. A symbol that is no piece is spelled in bytes."""
        symbols, fixed = list(word), None
        if self.symbols:
            matches = list(self.symbols.finditer(word))
            symbols, fixed = [m[0] for m in matches], [m[1] is not None for m in matches]
        ids = []
        for symbol in byte_pairs(symbols, self.cost, fixed):
            if symbol in self.rank:
                ids.append(self.rank[symbol][1])
            elif self.bytes:
                ids += [self.bytes[b] for b in symbol.encode("utf-8", "surrogatepass")]
            else:
                ids.append(self.unknown)
        return ids

    def cost(self, left: str, right: str) -> float | None:
        """Minus the score of the piece that two symbols form, None if they form none."""
        return self.rank.get(left + right, (None,))[0]

    # -- decoding

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """ids -> text. Special tokens are written out, or left out with `skip_special`."""
        return "".join(self.stretches(ids, skip_special))

    def stretches(self, ids: list[int], skip_special: bool = False) -> list[str]:
        """ids -> text cut at the added tokens, each of which is an entry of its own."""
        texts, run = [], []
        for i in ids:
            special = i in self.names and self.names[i] not in self.plain
            if special and skip_special:
                continue
            if i in self.names and (not special or i >= len(self.pieces)):
                before = self.stretch(run)
                texts += [before, self.names[i]] if before else [self.names[i]]
                run = []
            else:
                run.append(i)
        return texts + [self.stretch(run)] if run else texts

    def stretch(self, ids: list[int]) -> str:
        """ids without added tokens -> text, without its leading space; <s>, </s>, <unk> are spelled out."""
        text, run = "", []
        for n, i in enumerate(ids):
            if i in self.names:
                text += self.spell(run) + self.names[i]
                run = []
                continue
            piece = self.pieces[i]
            if n == 0 and piece.startswith(SPACE):
                piece = piece[1:]             # what is left need not be a piece: then it is taken literally
            run.append((i, piece.replace(SPACE, " ") if piece in self.rank else piece))
        return text + self.spell(run)

    def spell(self, pieces: list[tuple[int, str]]) -> str:
        """(id, its text) pairs -> text. Byte pieces in a row are joined to UTF-8."""
        texts, run = [], bytearray()
        for i, piece in pieces:
            if self.types[i] == BYTE:
                run.append(int(piece[3:5], 16))
                continue
            texts.append(utf8(run))
            run = bytearray()
            if self.types[i] == UNKNOWN:
                texts.append(" \u2047 ")
            elif self.types[i] != CONTROL:
                texts.append(piece)
        return "".join(texts) + utf8(run)


def utf8(data: bytes) -> str:
    """Bytes -> text. As in SentencePiece, and unlike Python's "replace", each bad byte gives one U+FFFD."""
    text = ""
    while data:
        try:
            return text + data.decode("utf-8")
        except UnicodeDecodeError as error:
            text += data[:error.start].decode("utf-8") + "\ufffd"
            data = data[error.start + 1:]
    return text


# ------------------------------------------------------------------------------------------------------------
# Pictures: VILA-U's image tokenizer (arXiv 2409.04429)
#
#     pixels [B, 3, H, W] --SigLIP tower--> features [B, N, C] --residual quantizer--> codes [B, N, D]
#     codes  [B, N, D]    --sum of the D code vectors--> [B, N, C] --picture decoder--> pixels [B, 3, H, W]

SIGLIP_HEADS = 16    # in no published file; VILA-U's and LLaVA's SigLIP towers have 16, base sizes excepted
SIGLIP = "rqvaesiglip.siglip_model.vision_model."     # how the published names of the tower's tensors begin
GROUPS = 32          # of every GroupNorm in the picture decoder


@dataclass
class TowerConfig:
    """Sizes of a vision transformer."""
    image_size: int                  # pixels, square
    patch_size: int
    width: int                       # C: of the tower, and of the code vectors where there are any
    mlp_width: int
    layers: int                      # blocks that are used; VILA-U's published tower stores one more
    heads: int

    @property
    def grid(self) -> int:
        return self.image_size // self.patch_size

    @property
    def positions(self) -> int:      # N
        return self.grid ** 2


@dataclass
class VisionConfig(TowerConfig):
    """Sizes of the whole image tokenizer."""
    codebook_size: int               # K
    depth: int                       # D
    shared_codebook: bool            # one codebook for all depths, or one per depth
    ch: int                          # picture decoder: base channels
    ch_mult: tuple[int, ...]         # ... multiplier per resolution, finest first: len - 1 doublings
    num_res_blocks: int              # ... per level; a decoder has one more
    attn_resolutions: tuple[int, ...]
    z_channels: int
    resolution: int                  # ... what attn_resolutions are counted from
    decoder_latent_shape: tuple[int, int] | None = None   # resize the grid first (the published 384 model)

    @classmethod
    def from_published(cls, config: dict, shapes: dict[str, tuple]) -> "VisionConfig":
        """Sizes from vision_tower/config.json and from the shapes of the tensors beside it.

        The tower's sizes are in the shapes alone. Raises UserError where the codebook's shape is not that of
        the config; KeyError, TypeError or ValueError where something is missing.
        """
        quantizer = config["rqvaesiglip"]
        decoder, latent = quantizer["ddconfig"], quantizer.get("decoder_latent_shape")
        width, _, patch_size, _ = shapes[SIGLIP + "embeddings.patch_embedding.weight"]
        positions, _ = shapes[SIGLIP + "embeddings.position_embedding.weight"]
        layers = {name.removeprefix(SIGLIP).split(".")[2] for name in shapes
                  if name.startswith(SIGLIP + "encoder.layers.")}
        codebook = shapes["rqvaesiglip.quantizer.codebooks.0.weight"]
        expected = quantizer["n_embed"] + 1, width
        if codebook != expected:
            raise UserError(f"vision_tower: codebook of shape {codebook}, but config.json says n_embed = "
                            f"{quantizer['n_embed']} and the tower is {width} wide: expected {expected}")
        return cls(
            image_size=round(positions ** 0.5) * patch_size, patch_size=patch_size, width=width,
            mlp_width=shapes[SIGLIP + "encoder.layers.0.mlp.fc1.weight"][0],
            # VILA-U reads the second-to-last hidden state. The key is ours, for towers without a spare layer.
            layers=config.get("vision_layers_used", len(layers) - 1),
            heads=SIGLIP_HEADS,
            codebook_size=quantizer["n_embed"], depth=quantizer["code_shape"][-1],
            shared_codebook=quantizer["shared_codebook"],
            ch=decoder["ch"], ch_mult=tuple(decoder["ch_mult"]), num_res_blocks=decoder["num_res_blocks"],
            attn_resolutions=tuple(decoder["attn_resolutions"]), z_channels=decoder["z_channels"],
            resolution=decoder["resolution"],
            decoder_latent_shape=tuple(latent[:2]) if latent else None)

    def to_published(self) -> dict:
        """The rqvaesiglip part of vision_tower/config.json."""
        decoder = {"ch": self.ch, "ch_mult": self.ch_mult, "num_res_blocks": self.num_res_blocks,
                   "attn_resolutions": self.attn_resolutions, "z_channels": self.z_channels,
                   "resolution": self.resolution, "in_channels": 3, "out_ch": 3}
        return {"n_embed": self.codebook_size, "code_shape": [self.grid, self.grid, self.depth],
                "latent_shape": [self.grid, self.grid, self.width], "embed_dim": self.width,
                "shared_codebook": self.shared_codebook, "decoder_latent_shape": self.decoder_latent_shape,
                "ddconfig": decoder}


# -- pictures

def preprocess(image: Image.Image | np.ndarray, size: int, crop: bool = False) -> Tensor:
    """A picture -> float [3, size, size] in -1..1.

    As VILA-U does: pictures to be read are resized to a square ignoring aspect. Pictures to be drawn (`crop`)
    are first cropped to their largest square, centred if wide, top-aligned if tall.
    """
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
        x = self.patch(pixels).flatten(2).transpose(1, 2) + self.position             # (B, N, C)
        for block in self.blocks:
            x = block(x)
        return x


class ResidualQuantizer(nn.Module):
    """D codes for one vector: the nearest, then the nearest to what is left, and so on (arXiv 2203.01941)."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.depth = config.depth
        # The published tables end in a padding row, which is no code. It is loaded and saved with the others.
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
            table = self.codebook(d).float()                                          # (K, C)
            # squared distance without |residual|^2, which is the same for every code
            distance = (table ** 2).sum(1) - 2 * residual @ table.T                   # (..., K)
            codes.append(distance.argmin(dim=-1))
            residual = residual - table[codes[-1]]
        return torch.stack(codes, dim=-1)

    def vectors(self, codes: Tensor) -> Tensor:
        """codes [..., D] -> their vectors [..., D, C]; the feature of a position is the sum over D."""
        return torch.stack([self.codebook(d)[codes[..., d]] for d in range(self.depth)], dim=-2)


# -- features -> pixels
# Modules have their published names. Some exist only in some places (nin_shortcut, attn, upsample), as in the
# original, so `forward` looks whether they are there.

def group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(GROUPS, channels, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two convolutions beside a residual connection, which is a 1x1 convolution where the channels change."""

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
        q, k, v = (conv(h).flatten(2).transpose(1, 2) for conv in (self.q, self.k, self.v))    # (B, H*W, C)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)           # (B, C, H, W)
        return x + self.proj_out(y)


class Upsample(nn.Module):
    """Twice the height and width: nearest neighbour, then a convolution."""

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
        for i in reversed(range(len(config.ch_mult))):           # coarsest first; published as up.3 ... up.0
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
        x = features.transpose(1, 2).unflatten(2, (self.grid, self.grid))             # (B, C, grid, grid)
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
                x = level.upsample(x)                                                 # (B, c, 2h, 2w)
        return self.conv_out(F.silu(self.norm_out(x)))


class ImageTokenizer(nn.Module):
    """Pixels to codes and back: tower, quantizer and picture decoder together."""

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
    SIGLIP + "embeddings.patch_embedding.": "tower.patch.",
    SIGLIP + "embeddings.position_embedding.weight": "tower.position",
    SIGLIP + "encoder.layers.{}.layer_norm1.": "tower.blocks.{}.norm1.",
    SIGLIP + "encoder.layers.{}.layer_norm2.": "tower.blocks.{}.norm2.",
    SIGLIP + "encoder.layers.{}.self_attn.out_proj.": "tower.blocks.{}.attn.o_proj.",
    SIGLIP + "encoder.layers.{}.self_attn.": "tower.blocks.{}.attn.",
    SIGLIP + "encoder.layers.{}.mlp.": "tower.blocks.{}.",
    "rqvaesiglip.quantizer.codebooks.{}.weight": "quantizer.codebooks.{}.weight",
    "rqvaesiglip.post_quant_conv.": "decoder.post_quant_conv.",
    "rqvaesiglip.decoder.": "decoder.",
}


# ------------------------------------------------------------------------------------------------------------
# Sequences and answers

@dataclass
class Sequence:
    """Text and pictures as one array.

    A text position holds its id in column 0 (the other columns are 0), an image position its D codes. With
    D = 2 and images of N = 2 positions, '<s> a <im_start> IMAGE <im_end>' is

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
        is_picture = isinstance(part, Tensor)
        if not is_picture:
            part = F.pad(torch.tensor(part, dtype=torch.long)[:, None], (0, depth - 1))    # (T, D)
        tokens.append(part)
        is_image.append(torch.full((len(part),), is_picture))
    return Sequence(torch.cat(tokens), torch.cat(is_image))


def pad(rows: list[Tensor]) -> Tensor:
    """Ragged tensors -> one batch, zeros on the right."""
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)


@dataclass
class Segment:
    """One modality step of an answer: a text or a picture, at positions start..stop-1."""
    start: int
    stop: int
    text: str | None = None               # without its tags
    picture: np.ndarray | None = None     # uint8 [H, W, 3]
    codes: Tensor | None = None           # [N, D]


@dataclass
class Answer:
    """An answer as people and judges read it.

    `layout` spells its pieces in order: T <think>, t </think>, V <vis>, v </vis>, w words, p picture, E </s>.
    A well-formed answer of two edits reads TwtVpvTwtVpvE.
    """
    layout: str
    segments: list[Segment]
    step_of: Tensor                       # [T] index of a position's segment; len(segments): in none
    is_image: Tensor                      # [T] bool

    @property
    def texts(self) -> list[str]:
        """The texts alone, in order."""
        return [segment.text for segment in self.segments if segment.text is not None]


def parse_answer(tokens: Tensor, is_image: Tensor, text: TextTokenizer) -> Answer:
    """tokens [T, D], is_image [T] of an answer -> its segments, pictures as codes.

    `UnifiedModel.read_answers` decodes the pictures. <vis> right before a picture and </vis> right after it
    belong to the picture's step. Every other run of text is a text step, even where tags are missing or
    doubled: a broken answer has steps too. </s> is in no step.
    """
    letters = {text.id(THINK_START): "T", text.id(THINK_END): "t", text.id(IMAGE_START): "V",
               text.id(IMAGE_END): "v", text.id("</s>"): "E"}
    kinds = "".join("p" if image else letters.get(int(row[0]), "w") for row, image in zip(tokens, is_image))
    segments = []
    for match in re.finditer(r"V?p+v?|(?:(?!Vp)[^pE])+", kinds):
        start, stop = match.span()
        if "p" in match[0]:
            segments.append(Segment(start, stop, codes=tokens[start:stop][is_image[start:stop]]))
        else:
            words = [int(tokens[i, 0]) for i in range(start, stop) if kinds[i] == "w"]
            segments.append(Segment(start, stop, text=text.decode(words).strip()))
    step_of = torch.full((len(tokens),), len(segments))
    for i, segment in enumerate(segments):
        step_of[segment.start:segment.stop] = i
    layout = re.sub(r"w+", "w", re.sub(r"p+", "p", kinds))
    return Answer(layout, segments, step_of, is_image)


# ------------------------------------------------------------------------------------------------------------
# Run alone: the ids and pieces of a text

@dataclass
class Config:
    # -- data
    model: str = "out/warmup/policy/llm"         # a checkpoint's llm/ folder, with tokenizer.model
    text: str = "<think>a red circle at top left</think>"    # what to encode


def main() -> None:
    """Print each id of --text with its piece, then the text that the ids decode to."""
    config = parse_config(Config)
    tokenizer = TextTokenizer.from_folder(Path(config.model))
    ids = tokenizer.encode(config.text)
    for i in ids:
        print(f"{i:7}  {tokenizer.piece(i)}")
    print(f"{len(ids)} ids, which decode to: {tokenizer.decode(ids)}")


if __name__ == "__main__":
    run_main(main)
