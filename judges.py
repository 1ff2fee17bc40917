"""The published judges of Eq. (5), in plain PyTorch and from their published weights.

    judge         what it scores              scale 0..1                        published weights
    ImageReward   a picture, given its text   r_v: normal CDF of its reward     THUDM/ImageReward
    ClipScore     a picture, given its text   r_v: 2.5 max(0, cosine), <= 1     openai/clip-vit-large-patch14
    LlavaCritic   a text, given the prompt    r_t: the score in its reply       lmms-lab/llava-critic-7b

The paper trains with LLaVA-Critic (arXiv 2410.02712) and ImageReward (arXiv 2304.05977). CLIP-score (arXiv
2104.08718) is its ablation. The judges of the toy world and Eq. (5) itself are in rewards.py.
tests/test_judges.py holds every network here to what its official implementation gives.

    python judges.py --judge image-reward=FOLDER --text "a fox in the snow" --images fox.png,cat.png
    python judges.py --judge llava-critic=FOLDER --question "How long?" --images egg.png --text "9 minutes."
"""
from common import (Natural, UserError, free_bytes, parse_config, pick_device, read_json, read_picture,
                    read_text, reading, run_main, snapshot, split_paths)

import math
import re
import unicodedata
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from model import (COMPACT, NAMES, ROOM, Decoder, DecoderConfig, KVCache, Stored, decoder_config, fill,
                   row_bytes, stored_tensors, tensor_files)
from tokenizer import (CACHE_SIZE, SIGLIP_HEADS, Attention, Block, SiglipTower, TowerConfig, byte_pairs,
                       preprocess)

Picture = np.ndarray | Image.Image          # uint8 [H, W, 3], or a PIL image of any mode


def as_image(picture: Picture) -> Image.Image:
    """An array as a PIL image; a PIL image as it is."""
    return Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture


def judge_folder(source: str | Path, name: str) -> Path:
    """The folder of a judge: a folder, the folder of a file, or the snapshot of a hub id."""
    source = Path(source)
    if source.is_dir():
        return source
    return source.parent if source.is_file() else snapshot(str(source), name)


# ------------------------------------------------------------------------------------------------------------
# The judges' text: WordPiece (ImageReward), byte-level BPE (CLIP-score and LLaVA-Critic)

class WordPiece:
    """BERT's uncased tokenizer from vocab.txt: words, each cut into pieces from the left, the longest first.

    Gives the ids of transformers' slow BertTokenizer. `added` are special tokens behind the vocabulary: BLIP
    has [DEC] and [ENC]. Raises UserError for a file that is no such vocabulary.
    """

    def __init__(self, vocab_file: Path, added: tuple[str, ...] = ()):
        pieces = read_text(vocab_file).split("\n")
        if pieces[-1] == "":
            pieces = pieces[:-1]
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.special = ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"]
        for token in self.special:
            if token not in self.ids:
                raise UserError(f"{vocab_file}: not a BERT vocabulary, it lacks {token}")
        for token in added:
            self.special.append(token)
            self.ids.setdefault(token, len(self.ids))

    def encode(self, text: str, length: int | None = None) -> list[int]:
        """text -> ids between [CLS] and [SEP], cut to `length` with [SEP] kept."""
        ids = []
        for part in re.split("(" + "|".join(map(re.escape, self.special)) + ")", text):
            if part in self.special:
                ids.append(self.ids[part])
                continue
            for word in bert_words(part):
                ids += self.pieces(word)
        if length is not None:
            ids = ids[:length - 2]
        return [self.ids["[CLS]"], *ids, self.ids["[SEP]"]]

    def rows(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """texts -> ids and mask [B, length], int64, zeros behind the text"""
        rows = [self.encode(text, length) for text in texts]
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
        return ids, mask

    def pieces(self, word: str) -> list[int]:
        """One word -> ids; [UNK] alone where a part is no piece, or beyond 100 characters."""
        ids, start = [], 0
        while start < len(word) <= 100:
            mark = "##" if start else ""
            stop = next((e for e in range(len(word), start, -1) if mark + word[start:e] in self.ids), None)
            if stop is None:
                break
            ids.append(self.ids[mark + word[start:stop]])
            start = stop
        return ids if start == len(word) else [self.ids["[UNK]"]]


def bert_words(text: str) -> list[str]:
    """Text -> BERT's words: lower case, without accents, each punctuation mark and ideograph a word."""
    clean = []
    for c in text:
        category = unicodedata.category(c)
        if c in "\t\n\r" or category == "Zs":
            clean.append(" ")
        elif c not in "\0\ufffd" and category[0] != "C":
            clean.append(f" {c} " if is_ideograph(c) else c)
    lower = " ".join("".join(map(str.lower, word)) for word in "".join(clean).split())
    letters = [c for c in unicodedata.normalize("NFD", lower) if unicodedata.category(c) != "Mn"]
    return "".join(f" {c} " if is_punctuation(c) else c for c in letters).split()

IDEOGRAPHS = [(0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
              (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)]


def is_ideograph(c: str) -> bool:
    """A Chinese character, as BERT counts them."""
    return any(low <= ord(c) <= high for low, high in IDEOGRAPHS)


def is_punctuation(c: str) -> bool:
    """Punctuation, as BERT counts it: all ASCII signs belong to it."""
    return c in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~" or unicodedata.category(c)[0] == "P"


# GPT-2's alphabet: a visible character for every byte
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = {b: chr(b) for b in VISIBLE}
ALPHABET |= {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(VISIBLE)))}
BYTES = {c: b for b, c in ALPHABET.items()}
CONTRACTION = "'s|'t|'re|'ve|'m|'ll|'d"
WHITE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")   # White_Space


def kind_of(c: str) -> str:
    """Letter L, number N, line end R, space " ", other white space W, anything else P.

    This is all that the published patterns look at.
    """
    if c == " ":
        return c
    if c in "\r\n":
        return "R"
    if WHITE.match(c):
        return "W"
    category = unicodedata.category(c)[0]
    return category if category in "LN" else "P"


class ByteText:
    """Byte-level BPE from vocab.json and merges.txt.

    Text is cut into words, the bytes of a word are written in ALPHABET, and merges join them. CLIP and Qwen2
    differ in how text is normalised, in how it is cut into words, and in CLIP's </w>.
    """
    contraction: re.Pattern  # a word on the text itself, tried first
    words: re.Pattern        # a word on the string of kinds (`kind_of`)
    end = ""                 # written behind a word

    def __init__(self, vocab: dict[str, int], merges: list[str], added: dict[str, int]):
        self.vocab, self.added = vocab, added
        self.rank = {tuple(line.split(" ")): i for i, line in enumerate(merges)}
        longest_first = sorted(added, key=len, reverse=True)
        self.cut = re.compile("(" + ("|".join(map(re.escape, longest_first)) or "(?!)") + ")")
        self.cache: dict[str, list[int]] = {}

    @classmethod
    def from_folder(cls, folder: Path) -> "ByteText":
        """vocab.json, merges.txt and, where there is one, added_tokens.json of a checkpoint."""
        vocab, file = read_json(folder / "vocab.json"), folder / "added_tokens.json"
        added = read_json(file) if file.exists() else {}
        added |= {t: vocab[t] for t in ("<|startoftext|>", "<|endoftext|>") if t in vocab}
        lines = read_text(folder / "merges.txt").split("\n")
        with reading(folder, "a byte-level BPE vocabulary in vocab.json and merges.txt"):
            return cls(vocab, [line for line in lines if line and not line.startswith("#version")], added)

    def id(self, token: str) -> int:
        """The id of an added token."""
        return self.added[token]

    def normalise(self, text: str) -> str:
        """What is done to the whole text first."""
        return unicodedata.normalize("NFC", text)

    def encode(self, text: str) -> list[int]:
        """text -> ids. Added tokens in the text become their ids; nothing is put in front or behind."""
        ids = []
        for part in self.cut.split(self.normalise(text)):
            if part in self.added:
                ids.append(self.added[part])
                continue
            kinds, at = "".join(map(kind_of, part)), 0
            while at < len(part):
                match = self.contraction.match(part, at) or self.words.match(kinds, at)
                if match:
                    ids += self.merge(part[at:match.end()])
                at = match.end() if match else at + 1
        return ids

    def merge(self, word: str) -> list[int]:
        """One word -> ids."""
        if word not in self.cache:
            letters = [ALPHABET[b] for b in word.encode("utf-8", "replace")]
            letters[-1] += self.end
            symbols = byte_pairs(letters, lambda left, right: self.rank.get((left, right)))
            if len(self.cache) >= CACHE_SIZE:
                self.cache.clear()
            self.cache[word] = [self.vocab[symbol] for symbol in symbols]
        return self.cache[word]


class QwenText(ByteText):
    """Qwen2's tokenizer."""
    contraction = re.compile(CONTRACTION, re.IGNORECASE)
    words = re.compile("[ WP]?L+|N| ?P+R*|[RW ]*R+|[RW ]+(?![LNP])|[RW ]+")

    def __init__(self, vocab: dict[str, int], merges: list[str], added: dict[str, int]):
        super().__init__(vocab, merges, added)
        self.pieces = {i: piece for piece, i in vocab.items()}
        self.names = {i: token for token, i in added.items()}

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """ids -> text; bytes that are no UTF-8 become U+FFFD. `skip_special` leaves added tokens out."""
        texts, run = [], bytearray()
        for i in ids:
            if i not in self.names:
                run += bytes(BYTES[c] for c in self.pieces[i])
                continue
            texts.append(run.decode("utf-8", "replace"))
            run = bytearray()
            if not skip_special:
                texts.append(self.names[i])
        return "".join(texts) + run.decode("utf-8", "replace")


class ClipText(ByteText):
    """CLIP's tokenizer as transformers' CLIPTokenizerFast has it.

    The original repairs broken text with ftfy first, this one does not. They agree on clean text.
    """
    contraction, words, end = re.compile(CONTRACTION), re.compile("L+|N|P+"), "</w>"

    def normalise(self, text: str) -> str:
        return "".join(map(str.lower, WHITE.sub(" ", unicodedata.normalize("NFC", text))))

    def rows(self, texts: list[str], length: int = 77) -> tuple[Tensor, Tensor]:
        """texts -> ids [B, length] and the place of each end token [B].

        A row is start token, text, end token, filled up with the end token. CLIP reads the state at the first
        one.
        """
        start, end = self.added["<|startoftext|>"], self.added["<|endoftext|>"]
        rows = [[start, *self.encode(text)[:length - 2], end] for text in texts]
        ids = torch.tensor([row + [end] * (length - len(row)) for row in rows])
        return ids, torch.tensor([row.index(end) for row in rows])


# ------------------------------------------------------------------------------------------------------------
# What ImageReward and CLIP share: pictures, the vision tower, weights of any file type

PIXEL_MEAN = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]      # of CLIP and of BLIP
PIXEL_STD = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]


def short_side_to(picture: Image.Image, size: int) -> Image.Image:
    """Resize (bicubic) so that the short side has `size` pixels."""
    w, h = picture.size
    scaled = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    return picture.resize(scaled, Image.BICUBIC)


def crop_square(picture: Image.Image, left: int, top: int, size: int) -> Tensor:
    """A square of a picture -> normalised pixels [3, size, size]."""
    square = picture.crop((left, top, left + size, top + size)).convert("RGB")
    pixels = torch.from_numpy(np.asarray(square).copy()).permute(2, 0, 1).float() / 255
    return (pixels - PIXEL_MEAN) / PIXEL_STD


def transformers_square(picture: Picture, size: int) -> Tensor:
    """The middle of a picture [3, size, size] as transformers' CLIP reads it.

    RGB comes first, and the corner is rounded down.
    """
    picture = short_side_to(as_image(picture).convert("RGB"), size)
    return crop_square(picture, (picture.width - size) // 2, (picture.height - size) // 2, size)


def torchvision_square(picture: Picture, size: int) -> Tensor:
    """The middle of a picture [3, size, size] as ImageReward and OpenAI's CLIP read it with torchvision.

    RGB comes last, and the corner is rounded half to even.
    """
    picture = short_side_to(as_image(picture), size)
    return crop_square(picture, round((picture.width - size) / 2), round((picture.height - size) / 2), size)


class ClassTower(nn.Module):
    """A vision transformer with a class token in front.

    CLIP's has a norm before the blocks and no bias in the patch layer (pre_norm); BLIP's is the other way
    round.
    """

    def __init__(self, config: TowerConfig, activation: str, eps: float, pre_norm: bool):
        super().__init__()
        self.image_size = config.image_size
        size = config.patch_size
        self.patch = nn.Conv2d(3, config.width, size, stride=size, bias=not pre_norm)
        self.cls = nn.Parameter(torch.zeros(config.width))
        self.position = nn.Parameter(torch.zeros(config.positions + 1, config.width))
        self.pre_norm = nn.LayerNorm(config.width, eps=eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(config.width, config.heads, config.mlp_width, activation, eps)
                                    for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, eps=eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> [B, 1 + N, C], the class token first"""
        x = self.patch(pixels).flatten(2).transpose(1, 2)                              # (B, N, C)
        x = self.pre_norm(torch.cat((self.cls.expand(len(x), 1, -1), x), dim=1) + self.position)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def read_pytorch(file: Path) -> dict[str, Tensor]:
    """The tensors of a PyTorch file, weights only, mapped from disk. Raises UserError for any other file."""
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except Exception as error:               # not a zip, cut, or with more than tensors: torch's first line
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: not a whole PyTorch file of weights ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file}: expected a dictionary of tensors")
    return state


def stored_in(file: Path, state: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Stored]:
    """The mapped tensors of a PyTorch file, as `fill` wants them: read as a copy in this type."""
    return {name: Stored(file, tuple(value.shape), partial(value.to, dtype, copy=True))
            for name, value in state.items()}


def needed(stored: dict[str, Stored], not_needed: re.Pattern) -> dict[str, Stored]:
    """The stored tensors without those that we have no use for."""
    return {name: tensor for name, tensor in stored.items() if not not_needed.match(name)}


# ------------------------------------------------------------------------------------------------------------
# ImageReward, the paper's visual judge

class BertLayer(nn.Module):
    """BERT's layer with cross-attention to a picture. Norms come after the sums, unlike in `Block`."""

    def __init__(self, width: int, heads: int, mlp_width: int, picture_width: int, eps: float):
        super().__init__()
        self.attn, self.cross = Attention(width, heads), Attention(width, heads, context_width=picture_width)
        self.fc1, self.fc2 = nn.Linear(width, mlp_width), nn.Linear(mlp_width, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width, eps=eps) for _ in range(3))

    def forward(self, x: Tensor, mask: Tensor, picture: Tensor) -> Tensor:
        """x [B, T, C], mask [B, 1, 1, T], picture [B, S, picture_width] -> [B, T, C]"""
        x = self.norm1(x + self.attn(x, mask=mask))
        x = self.norm2(x + self.cross(x, context=picture))
        return self.norm3(x + self.fc2(F.gelu(self.fc1(x))))


class Blip(nn.Module):
    """ImageReward's network: BLIP's picture tower, BERT that looks at the picture, five linear layers."""
    MLP = (1024, 128, 64, 16, 1)                    # with dropout and no activation between them

    def __init__(self, tower: TowerConfig, text: dict):
        """text: the content of med_config.json."""
        super().__init__()
        width, eps = text["hidden_size"], text["layer_norm_eps"]
        self.tower = ClassTower(tower, "gelu", 1e-6, pre_norm=False)
        self.words = nn.Embedding(text["vocab_size"], width)
        self.position = nn.Parameter(torch.zeros(text["max_position_embeddings"], width))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.layers = nn.ModuleList(BertLayer(width, text["num_attention_heads"], text["intermediate_size"],
                                              tower.width, eps) for _ in range(text["num_hidden_layers"]))
        self.mlp = nn.Sequential(*(nn.Linear(a, b) for a, b in zip((width, *self.MLP), self.MLP)))

    def text_states(self, ids: Tensor, mask: Tensor, picture: Tensor) -> Tensor:
        """ids, mask [B, T], the tower's output [B, S, C] -> the text's states [B, T, width]"""
        x = self.norm(self.words(ids) + self.position[:ids.shape[1]])
        for layer in self.layers:
            x = layer(x, mask.bool()[:, None, None], picture)
        return x

    def forward(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
        """ids, mask [B, T], pixels [B, 3, H, W] -> raw rewards [B], from the state at the first position"""
        return self.mlp(self.text_states(ids, mask, self.tower(pixels))[:, 0])[:, 0]


BERT_LAYER = "blip.text_encoder.encoder.layer.{}."
BLIP_NAMES = {     # prefixes in ImageReward.pt -> here; {} is a number; the tower's qkv is cut in three first
    "blip.visual_encoder.cls_token": "tower.cls",
    "blip.visual_encoder.pos_embed": "tower.position",
    "blip.visual_encoder.patch_embed.proj.": "tower.patch.",
    "blip.visual_encoder.blocks.{}.attn.proj.": "tower.blocks.{}.attn.o_proj.",
    "blip.visual_encoder.blocks.{}.mlp.": "tower.blocks.{}.",
    "blip.visual_encoder.": "tower.",
    "blip.text_encoder.embeddings.word_embeddings.": "words.",
    "blip.text_encoder.embeddings.position_embeddings.weight": "position",
    "blip.text_encoder.embeddings.LayerNorm.": "norm.",
    BERT_LAYER + "attention.self.query.": "layers.{}.attn.q_proj.",
    BERT_LAYER + "attention.self.key.": "layers.{}.attn.k_proj.",
    BERT_LAYER + "attention.self.value.": "layers.{}.attn.v_proj.",
    BERT_LAYER + "attention.output.dense.": "layers.{}.attn.o_proj.",
    BERT_LAYER + "attention.output.LayerNorm.": "layers.{}.norm1.",
    BERT_LAYER + "crossattention.self.query.": "layers.{}.cross.q_proj.",
    BERT_LAYER + "crossattention.self.key.": "layers.{}.cross.k_proj.",
    BERT_LAYER + "crossattention.self.value.": "layers.{}.cross.v_proj.",
    BERT_LAYER + "crossattention.output.dense.": "layers.{}.cross.o_proj.",
    BERT_LAYER + "crossattention.output.LayerNorm.": "layers.{}.norm2.",
    BERT_LAYER + "intermediate.dense.": "layers.{}.fc1.",
    BERT_LAYER + "output.dense.": "layers.{}.fc2.",
    BERT_LAYER + "output.LayerNorm.": "layers.{}.norm3.",
    "mlp.layers.0.": "mlp.0.",
    "mlp.layers.2.": "mlp.1.",
    "mlp.layers.4.": "mlp.2.",
    "mlp.layers.6.": "mlp.3.",
    "mlp.layers.7.": "mlp.4.",
}
BLIP_NOT_NEEDED = re.compile(r"blip\.(text_encoder\.embeddings\.position_ids|vision_proj\.|text_proj\.)")


def load_blip(folder: Path, device: str | torch.device, dtype: torch.dtype) -> Blip:
    """ImageReward.pt, med_config.json and, where there is one, vit_config.json -> the network.

    Raises UserError, naming file and tensor, for what is missing, unknown or misshaped.
    """
    config, file, vision = read_json(folder / "med_config.json"), folder / "ImageReward.pt", {}
    if (folder / "vit_config.json").exists():
        vision = read_json(folder / "vit_config.json")
    state = {}
    for name, value in read_pytorch(file).items():
        if ".attn.qkv." in name:
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                state[name.replace("qkv", letter + "_proj")] = part
        elif name.endswith(("pos_embed", "cls_token")):
            state[name] = value.flatten(0, -3 if name.endswith("pos_embed") else -2)[0]
        else:
            state[name] = value
    blocks = {name.split(".")[3] for name in state if name.startswith("blip.visual_encoder.blocks.")}
    with reading(folder, "the med_config.json or a tensor of an ImageReward checkpoint"):
        width, _, patch_size, _ = state["blip.visual_encoder.patch_embed.proj.weight"].shape
        grid = round((len(state["blip.visual_encoder.pos_embed"]) - 1) ** 0.5)
        tower = TowerConfig(
            image_size=grid * patch_size, patch_size=patch_size, width=width,
            mlp_width=len(state["blip.visual_encoder.blocks.0.mlp.fc1.bias"]),
            layers=len(blocks), heads=vision.get("num_heads", 16))
        with torch.device("meta"):
            model = Blip(tower, config)
    fill(model, needed(stored_in(file, state, dtype), BLIP_NOT_NEEDED), BLIP_NAMES, folder, device, dtype)
    return model.requires_grad_(False).eval()


class ImageReward:
    """The visual judge of the paper: (texts, pictures) -> a score 0..1 a pair.

    source: hub id THUDM/ImageReward, or a folder with ImageReward.pt, med_config.json and BERT's vocab.txt.
    Beside the hub's files the vocabulary is that of bert-base-uncased. Raises UserError for anything else.
    """
    HUB = "THUDM/ImageReward"
    MEAN, STD = 0.16717362830052426, 1.0333394966054072     # of raw rewards, from the official implementation
    LENGTH, BATCH = 35, 16                                  # tokens a text may have, pairs at a time

    def __init__(self, source: str | Path, device: str | torch.device = "cpu",
                 dtype: torch.dtype = torch.float32):
        folder = judge_folder(source, "visual judge")
        self.model = load_blip(folder, device, dtype)
        vocab = folder / "vocab.txt"
        if not vocab.exists() and not Path(source).exists():
            vocab = snapshot("bert-base-uncased", "vocabulary of the visual judge", vocab.name) / vocab.name
        self.text = WordPiece(vocab, ("[DEC]", "[ENC]"))
        self.size, self.device, self.dtype = self.model.tower.image_size, device, dtype

    @torch.no_grad()
    def rewards(self, texts: list[str], pictures: list[Picture]) -> Tensor:
        """Standardised rewards [n] of n pairs, as the official ImageReward.score gives them."""
        raw = []
        for i in range(0, len(texts), self.BATCH):
            ids, mask = self.text.rows(texts[i:i + self.BATCH], self.LENGTH)
            pixels = torch.stack([torchvision_square(p, self.size) for p in pictures[i:i + self.BATCH]])
            pixels = pixels.to(self.device, self.dtype)
            raw.append(self.model(ids.to(self.device), mask.to(self.device), pixels).float())
        return (torch.cat(raw).cpu() - self.MEAN) / self.STD if raw else torch.zeros(0)

    def cuts(self, text: str) -> bool:
        """Whether a text is longer than what is read of it, as published: the first LENGTH tokens."""
        return len(self.text.encode(text)) > self.LENGTH

    def __call__(self, texts: list[str], pictures: list[np.ndarray]) -> list[float]:
        """r_v of each pair.

        Choice: the reward through the normal CDF. It is standardised on ImageReward's training data, so the
        result reads as a percentile and lies in 0..1 like the other parts.
        """
        return torch.special.ndtr(self.rewards(texts, pictures).double()).tolist()


# ------------------------------------------------------------------------------------------------------------
# CLIP-score, the visual judge of the paper's ablation

class Clip(nn.Module):
    """CLIP (arXiv 2103.00020): two towers and a linear layer behind each."""

    def __init__(self, tower: TowerConfig, text: dict, activations: tuple[str, str], eps: float, width: int):
        """text: text_config of the published config.json; activations: of the tower, of the text's blocks."""
        super().__init__()
        self.tower = ClassTower(tower, activations[0], eps, pre_norm=True)
        self.words = nn.Embedding(text["vocab_size"], text["hidden_size"])
        self.position = nn.Parameter(torch.zeros(text["max_position_embeddings"], text["hidden_size"]))
        self.blocks = nn.ModuleList(Block(text["hidden_size"], text["num_attention_heads"],
                                          text["intermediate_size"], activations[1], eps)
                                    for _ in range(text["num_hidden_layers"]))
        self.norm = nn.LayerNorm(text["hidden_size"], eps=eps)
        self.picture_out = nn.Linear(tower.width, width, bias=False)
        self.text_out = nn.Linear(text["hidden_size"], width, bias=False)

    def embed_pictures(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> unit vectors [B, width]"""
        return F.normalize(self.picture_out(self.tower(pixels)[:, 0]), dim=-1)

    def embed_texts(self, ids: Tensor, end: Tensor) -> Tensor:
        """ids [B, T] and the place of each end token [B] -> unit vectors [B, width]"""
        x = self.words(ids) + self.position[:ids.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)               # so what stands behind `end` changes nothing
        state = self.norm(x[torch.arange(len(x), device=x.device), end])
        return F.normalize(self.text_out(state), dim=-1)

CLIP_NAMES = {     # prefixes in the published files -> here; {} is a number
    "vision_model.embeddings.class_embedding": "tower.cls",
    "vision_model.embeddings.position_embedding.weight": "tower.position",
    "vision_model.embeddings.patch_embedding.": "tower.patch.",
    "vision_model.pre_layrnorm.": "tower.pre_norm.",                    # spelled so in the published files
    "vision_model.encoder.layers.{}.layer_norm1.": "tower.blocks.{}.norm1.",
    "vision_model.encoder.layers.{}.self_attn.out_proj.": "tower.blocks.{}.attn.o_proj.",
    "vision_model.encoder.layers.{}.self_attn.": "tower.blocks.{}.attn.",
    "vision_model.encoder.layers.{}.layer_norm2.": "tower.blocks.{}.norm2.",
    "vision_model.encoder.layers.{}.mlp.": "tower.blocks.{}.",
    "vision_model.post_layernorm.": "tower.norm.",
    "visual_projection.": "picture_out.",
    "text_model.embeddings.token_embedding.": "words.",
    "text_model.embeddings.position_embedding.weight": "position",
    "text_model.encoder.layers.{}.layer_norm1.": "blocks.{}.norm1.",
    "text_model.encoder.layers.{}.self_attn.out_proj.": "blocks.{}.attn.o_proj.",
    "text_model.encoder.layers.{}.self_attn.": "blocks.{}.attn.",
    "text_model.encoder.layers.{}.layer_norm2.": "blocks.{}.norm2.",
    "text_model.encoder.layers.{}.mlp.": "blocks.{}.",
    "text_model.final_layer_norm.": "norm.",
    "text_projection.": "text_out.",
}
CLIP_NOT_NEEDED = re.compile(r"logit_scale|(text|vision)_model\.embeddings\.position_ids")
# what the published config files leave out: CLIP's defaults in transformers
CLIP_TEXT = {"vocab_size": 49408, "max_position_embeddings": 77, "hidden_size": 512, "num_hidden_layers": 12,
             "num_attention_heads": 8, "intermediate_size": 2048, "hidden_act": "quick_gelu",
             "layer_norm_eps": 1e-5}
CLIP_VISION = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
               "intermediate_size": 3072, "hidden_act": "quick_gelu", "image_size": 224, "patch_size": 32}


def load_clip(folder: Path, device: str | torch.device, dtype: torch.dtype) -> Clip:
    """config.json and model.safetensors or pytorch_model.bin -> the network.

    Raises UserError, naming file and tensor, for what is missing, unknown or misshaped.
    """
    config = read_json(folder / "config.json")
    with reading(folder / "config.json", "the config of a CLIP model"):
        text, vision = CLIP_TEXT | config["text_config"], CLIP_VISION | config["vision_config"]
        tower = TowerConfig(image_size=vision["image_size"], patch_size=vision["patch_size"],
                            width=vision["hidden_size"], mlp_width=vision["intermediate_size"],
                            layers=vision["num_hidden_layers"], heads=vision["num_attention_heads"])
        with torch.device("meta"):
            model = Clip(tower, text, (vision["hidden_act"], text["hidden_act"]), text["layer_norm_eps"],
                         config["projection_dim"])
    file = folder / "model.safetensors"
    if file.exists():
        stored = stored_tensors([file])
    else:
        file = folder / "pytorch_model.bin"
        stored = stored_in(file, read_pytorch(file), dtype)
    fill(model, needed(stored, CLIP_NOT_NEEDED), CLIP_NAMES, folder, device, dtype)
    return model.requires_grad_(False).eval()


class ClipScore:
    """The visual judge of the paper's ablation: (texts, pictures) -> a score 0..1 a pair.

    source: hub id (openai/clip-vit-large-patch14, openai/clip-vit-base-patch32) or a folder in transformers'
    layout. Raises UserError for anything else.
    """
    HUB = "openai/clip-vit-large-patch14"
    BATCH = 32                                   # texts or pictures at a time

    def __init__(self, source: str | Path, device: str | torch.device = "cpu",
                 dtype: torch.dtype = torch.float32):
        folder = judge_folder(source, "visual judge")
        self.model = load_clip(folder, device, dtype)
        self.text = ClipText.from_folder(folder)
        with reading(folder / "vocab.json", "the vocabulary"):
            self.text.rows([""])                 # needs the start and the end token
        self.size, self.device, self.dtype = self.model.tower.image_size, device, dtype

    @torch.no_grad()
    def vectors(self, texts: list[str], pictures: list[Picture]) -> tuple[Tensor, Tensor]:
        """Unit vectors of the texts [n, width] and of the pictures [m, width], float32 on the CPU."""
        of_texts, of_pictures = [], []
        for i in range(0, len(texts), self.BATCH):
            ids, end = self.text.rows(texts[i:i + self.BATCH], len(self.model.position))
            of_texts.append(self.model.embed_texts(ids.to(self.device), end.to(self.device)))
        for i in range(0, len(pictures), self.BATCH):
            pixels = torch.stack([transformers_square(p, self.size) for p in pictures[i:i + self.BATCH]])
            of_pictures.append(self.model.embed_pictures(pixels.to(self.device, self.dtype)))
        return torch.cat(of_texts).float().cpu(), torch.cat(of_pictures).float().cpu()

    def cosine(self, texts: list[str], pictures: list[Picture]) -> list[float]:
        """The cosine of each pair."""
        if not texts:
            return []
        of_texts, of_pictures = self.vectors(texts, pictures)
        return (of_texts * of_pictures).sum(-1).tolist()

    def cuts(self, text: str) -> bool:
        """Whether a text is longer than what is read of it, as published: 77 tokens with start and end."""
        return len(self.text.encode(text)) + 2 > len(self.model.position)

    def __call__(self, texts: list[str], pictures: list[np.ndarray]) -> list[float]:
        """r_v of each pair.

        Choice: 2.5 max(0, cosine), at most 1. This is the rescaling of the CLIPScore paper (arXiv
        2104.08718).
        """
        return [min(1.0, 2.5 * max(0.0, value)) for value in self.cosine(texts, pictures)]


# ------------------------------------------------------------------------------------------------------------
# LLaVA-Critic, the paper's text judge: a LLaVA-OneVision (arXiv 2408.03326) that was trained to score
#
#     picture --tiles--> SigLIP tower --projector--> rows of features, a newline vector after each
#     text and features, in order --> Qwen2 decoder --> a reply in words --> `parse_score` --> 0..1

class Llava(nn.Module):
    """LLaVA-OneVision: a decoder of width C reads pictures as tiles of S x S pixels, G x G features each.

    aspect "anyres_max_M": the whole picture and its tiles, thinned out to about M tiles of features;
    "pad": the picture as one square tile. grids: the (width, height) in pixels that tiles can be laid out in,
    which a bound on the tiles of a picture makes fewer.
    """

    def __init__(self, decoder: DecoderConfig, tower: TowerConfig, aspect: str, grids: list[tuple[int, int]]):
        super().__init__()
        self.decoder, self.tower = Decoder(decoder), SiglipTower(tower)
        self.projector = nn.Sequential(nn.Linear(tower.width, decoder.hidden_size), nn.GELU(),
                                       nn.Linear(decoder.hidden_size, decoder.hidden_size))
        self.newline = nn.Parameter(torch.zeros(decoder.hidden_size))
        self.tower_config, self.aspect, self.grids = tower, aspect, grids

    def best_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """A picture's (width, height) -> the grid that keeps most of its pixels, then the least padded."""
        def cost(grid: tuple[int, int]) -> tuple[int, int]:
            scale = min(grid[0] / size[0], grid[1] / size[1])
            # a picture that is made larger has no more pixels than before
            pixels = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])
            return -pixels, grid[0] * grid[1] - pixels
        return min(self.grids, key=cost)

    def pixels(self, picture: Image.Image) -> Tensor:
        """An RGB picture -> tiles [n, 3, S, S] in -1..1: the whole picture, then its tiles row by row."""
        (w, h), S = picture.size, self.tower_config.image_size
        if self.aspect == "pad":
            side = max(w, h)
            square = Image.new("RGB", (side, side), (127, 127, 127))      # int(255 * SigLIP's mean)
            square.paste(picture, ((side - w) // 2, (side - h) // 2))
            return preprocess(square, S)[None]
        W, H = self.best_grid((w, h))
        if W / w < H / h:
            new_w, new_h = W, min(math.ceil(h * (W / w)), H)
        else:
            new_w, new_h = min(math.ceil(w * (H / h)), W), H
        canvas = Image.new("RGB", (W, H))
        canvas.paste(picture.resize((new_w, new_h), Image.BICUBIC), ((W - new_w) // 2, (H - new_h) // 2))
        tiles = [canvas.crop((x, y, x + S, y + S)) for y in range(0, H, S) for x in range(0, W, S)]
        return torch.stack([preprocess(tile, S) for tile in (picture, *tiles)])

    def features(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """The tiles [n, 3, S, S] of a picture of `size` (width, height) -> input embeddings for it [T, C]."""
        pixels = pixels.to(self.newline.device, self.newline.dtype)
        return self.arrange(self.projector(self.tower(pixels)), self.newline, size)

    def length(self, size: tuple[int, int]) -> int:
        """How many input embeddings a picture of `size` (width, height) takes."""
        S, (W, H) = self.tower_config.image_size, self.best_grid(size)
        tiles = torch.zeros(1 + (W // S) * (H // S), self.tower_config.positions, 1)
        return len(self.arrange(tiles, torch.zeros(1), size))

    def arrange(self, x: Tensor, newline: Tensor, size: tuple[int, int]) -> Tensor:
        """Projected tiles [n, G*G, C] of a picture of `size`, newline [C] -> its input embeddings [T, C].

        The whole picture comes first, then the rows of all tiles together, without padding, each with a
        newline behind it.
        """
        S, G = self.tower_config.image_size, self.tower_config.grid
        if self.aspect == "pad":
            return torch.cat((x[0], newline[None]))
        W, H = (side // S for side in self.best_grid(size))
        whole, tiles = x[0], x[1:].view(H, W, G, G, -1)
        x = tiles.permute(4, 0, 2, 1, 3).reshape(len(newline), H * G, W * G)           # (C, H*G, W*G)
        x = unpad(x, size)                                                             # (C, h, w)
        limit = int(self.aspect.rpartition("_")[2])
        times = math.sqrt(x.shape[1] * x.shape[2] / (limit * G ** 2))
        if times > 1.1:                                     # LLaVA-NeXT lets a tenth more through
            smaller = int(x.shape[1] // times), int(x.shape[2] // times)
            x = F.interpolate(x[None], smaller, mode="bilinear")[0]
        x = torch.cat((x, newline[:, None, None].expand(-1, x.shape[1], 1)), dim=2)    # (C, h, w + 1)
        return torch.cat((whole, x.flatten(1).T))

    def read(self, picture: Image.Image) -> Tensor:
        """An RGB picture -> input embeddings [T, C]."""
        return self.features(self.pixels(picture), picture.size)

    def embed(self, parts: list[list[int]], pictures: list[Tensor]) -> Tensor:
        """The token ids before, between and after the pictures, and what `read` gave for these -> [T, C]."""
        device = self.newline.device
        words = [self.decoder.embed(torch.tensor(ids, dtype=torch.long, device=device)) for ids in parts]
        embeddings = words[:1]
        for picture, text in zip(pictures, words[1:], strict=True):
            embeddings += [picture, text]
        return torch.cat(embeddings)

    @torch.no_grad()
    def generate(self, rows: list[Tensor], budget: int, stop: set[int] = frozenset(),
                 repetition_penalty: float = 1.0,
                 enough: Callable[[list[int]], bool] | None = None) -> list[list[int]]:
        """Greedy continuations of B embedded prompts [T, C], up to a token of `stop` or `budget` tokens.

        A row also ends where enough(its ids) holds; rows that have ended leave the batch.
        The penalty is for repeating what was generated, not what stands in the prompt: in LLaVA-NeXT too a
        prompt of embeddings has no ids. Raises UserError where prompt and budget exceed the context.
        """
        device, longest = self.newline.device, max(map(len, rows))
        self.check_length(longest, budget)
        cache = KVCache(len(self.decoder.layers), longest + budget)
        positions = torch.tensor([len(row) for row in rows], device=device)            # (B,)
        ids = torch.zeros(len(rows), 0, dtype=torch.long, device=device)               # (B, tokens so far)
        replies, alive = [[] for _ in rows], list(range(len(rows)))    # alive: the reply of each row, or None
        state = self.decoder.prefill(rows, cache)                                      # (B, C)
        for _ in range(budget):
            logits = self.decoder.lm_head(state).float()                               # (B, V)
            token = penalise(logits, ids, repetition_penalty).argmax(-1)               # (B,)
            ids = torch.cat((ids, token[:, None]), dim=1)
            for row, (n, new) in enumerate(zip(alive, token.tolist())):
                if n is None:
                    continue
                if new not in stop:
                    replies[n].append(new)
                if new in stop or (enough and enough(replies[n])):
                    alive[row] = None
            left = [row for row, n in enumerate(alive) if n is not None]
            if not left:
                break
            if len(left) <= COMPACT * len(alive):
                rows_left, alive = torch.tensor(left, device=device), [alive[row] for row in left]
                cache.select(rows_left)
                token, ids, positions = token[rows_left], ids[rows_left], positions[rows_left]
            state = self.decoder.step(self.decoder.embed(token), positions, cache)
            positions = positions + 1
        return replies

    def check_length(self, positions: int, budget: int) -> None:
        """Raises UserError where a prompt and the budget of its reply exceed the context."""
        context = self.decoder.config.context
        if positions + budget > context:
            raise UserError(f"text judge: a prompt of {positions} positions and a reply of {budget} exceed "
                            f"its context of {context}")


def penalise(logits: Tensor, ids: Tensor, penalty: float) -> Tensor:
    """transformers' repetition penalty: logits [B, V] of the tokens in ids [B, t] are made smaller."""
    values = logits.gather(1, ids)
    values = torch.where(values < 0, values * penalty, values / penalty)
    return logits.scatter(1, ids, values)


def unpad(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut the padding off features [C, H, W] of a picture of `size` (width, height).

    LLaVA-NeXT rounds up when it resizes and down when it unpads, so an edge row can be lost, and a very thin
    picture entirely. We keep that.
    """
    (w, h), (H, W) = size, x.shape[1:]
    if w / h > W / H:
        cut = (H - int(h * (W / w))) // 2
        return x[:, cut:H - cut]
    cut = (W - int(w * (H / h))) // 2
    return x[:, :, cut:W - cut]


TOWER = "model.vision_tower.vision_tower.vision_model."
LLAVA_NAMES = {     # prefixes in the published files -> here; {} is a number
    **NAMES["llm"],
    "model.mm_projector.": "projector.",
    "model.image_newline": "newline",
    TOWER + "embeddings.patch_embedding.": "tower.patch.",
    TOWER + "embeddings.position_embedding.weight": "tower.position",
    TOWER + "encoder.layers.{}.layer_norm1.": "tower.blocks.{}.norm1.",
    TOWER + "encoder.layers.{}.layer_norm2.": "tower.blocks.{}.norm2.",
    TOWER + "encoder.layers.{}.self_attn.out_proj.": "tower.blocks.{}.attn.o_proj.",
    TOWER + "encoder.layers.{}.self_attn.": "tower.blocks.{}.attn.",
    TOWER + "encoder.layers.{}.mlp.": "tower.blocks.{}.",
}
LLAVA_NOT_NEEDED = re.compile(re.escape(TOWER) + r"(post_layernorm|head)")


def load_llava(folder: Path, device: str | torch.device, quantize: str = "none", tiles: int = 0) -> Llava:
    """A checkpoint in the published layout -> model, tensors streamed in the type they are stored in.

    quantize "nf4": the decoder's linear layers in 4 bits. tiles: a picture is cut into at most so many (0: as
    the checkpoint has it). Raises UserError, naming file, tensor, found and
    expected shape, for what is missing, unknown or misshaped.
    """
    if quantize not in ("none", "nf4"):
        raise UserError(f"quantize {quantize}: expected nf4 or none")
    config = read_json(folder / "config.json")
    stored = stored_tensors(tensor_files(folder))
    with reading(folder, "the config.json or a tensor of a LLaVA-OneVision checkpoint"):
        model = empty_llava(config, {name: tensor.shape for name, tensor in stored.items()}, folder)
    if tiles:
        side = model.tower_config.image_size
        model.grids = [(w, h) for w, h in model.grids if w * h <= tiles * side ** 2]
        if not model.grids:
            raise UserError(f"--critic-tiles {tiles}: {folder / 'config.json'} has no image_grid_pinpoints "
                            f"of so few tiles")
    fill(model, needed(stored, LLAVA_NOT_NEEDED), LLAVA_NAMES, folder, device, quantize=quantize)
    return model.requires_grad_(False).eval()


def empty_llava(config: dict, shapes: dict[str, tuple], folder: Path) -> Llava:
    """The published config.json and the shapes of the tensors -> a model on the meta device."""
    decoder = decoder_config(config, folder / "config.json", qkv_bias=True)
    width, _, patch_size, _ = shapes[TOWER + "embeddings.patch_embedding.weight"]
    vision = config.get("vision_config") or {}     # the published file only names its tower: ...-patch14-384
    tower = TowerConfig(
        image_size=vision.get("image_size") or int(config["mm_vision_tower"].rpartition("-")[2]),
        patch_size=patch_size, width=width, mlp_width=shapes[TOWER + "encoder.layers.0.mlp.fc1.weight"][0],
        layers=len({name.split(".")[6] for name in shapes if name.startswith(TOWER + "encoder.layers.")}),
        heads=vision.get("num_attention_heads", SIGLIP_HEADS))
    grids = [(int(w), int(h)) for w, h in config["image_grid_pinpoints"]]
    aspect, merge = config["image_aspect_ratio"], config["mm_patch_merge_type"]
    if not re.fullmatch(r"pad|anyres_max_[1-9]\d*", str(aspect)) or merge != "spatial_unpad" or not grids:
        raise UserError(f"{folder / 'config.json'}: found {aspect}, {merge} and {len(grids)} "
                        f"image_grid_pinpoints, expected anyres_max_N or pad, spatial_unpad and at least one")
    with torch.device("meta"):
        return Llava(decoder, tower, aspect, grids)


# -- the question, and the score in a reply

# the published usage example of LLaVA-Critic, letter by letter; it stands behind the picture
POINTWISE = ("Given an image and a corresponding question, please serve as an unbiased and fair judge to "
             "evaluate the quality of answer answers provided by a Large Multimodal Model (LMM). Score the "
             "response out of 100 and explain your reasoning with specific details. Your task is provided as "
             "follows:\n"
             "Question: [{question}]\nThe LMM response: [{response}]\nASSISTANT:\n ")
PUBLISHED = "Given an image and a corresponding question"


def pointwise(question: str, response: str, pictures: int) -> str:
    """The question to the critic about a response, with an `<image>` mark in front for each picture.

    Choice: the published words name one picture. Without a picture, or with several, the first words say so.
    """
    given = {0: "Given a question", 1: PUBLISHED}.get(pictures, "Given images and a corresponding question")
    message = POINTWISE.replace(PUBLISHED, given)
    return "<image>\n" * pictures + message.format(question=question, response=response)


# 85, 72.5 or .85, but no part of a word, of 2024, of -5, of 3/4 or of a range such as 80-90
NUMBER = (r"(?<![\w.,-])(?<!out of )(?<!/)(?P<number>\d{1,3}(?:\.\d+)?|\.\d+)"
          r"(?![\d,]*\.?\d)(?![ \t]*(?:-|–|to)[ \t]*\d)")
SCALE = r"[ \t]*(?:(?P<percent>%)|(?:stars?[ \t]*)?(?:/|out of)[ \t]*(?P<most>[1-9]\d{0,2})(?![\d.,]*\d))"
ANY = "(?:" + SCALE + r"|(?![ \t]*(?:/|out of)[ \t]*\d))(?P<end>)"           # with a scale or without
# between a word like "score" and its number: "Score (out of 100): ", "score I would assign is "
BETWEEN = (r"(?:[ \t]*\(?(?:out of|/|[01][ \t]*[-–])[ \t]*(?P<label>[1-9]\d{0,2}))?"
           r"(?:[^\w\n.-]|-\s|\b(?:is|of|be|will|would|as|at|an?|to|for|the|this|that|it|I|response|answer|"
           r"assign(?:ed)?|given?|about|around|LMM|s)\b)*")
HEAD = r"\A[^\w\n]*(?:the[ \t]+)?(?:(?:final|overall|total)[ \t]+)?"
STOP = r"(?:\.?[^\w.\n]*\n|\.[^\w.\n]*[ \t][^\W\d])"                          # a line or a sentence is over


def label(words: str) -> str:
    """The pattern of a word like "score" up to its number. "A perfect score of 100" is nobody's score."""
    return rf"(?<!perfect )(?<!full )\b(?:{words})\b" + BETWEEN


SCORES = [(re.compile(pattern, re.IGNORECASE | re.MULTILINE), reply) for pattern, reply in (
    # what finds the score, in this order                                   a reply that it reads
    (HEAD + label("score|rating") + NUMBER + ANY + rf"(?={STOP}|\W*\Z)",    "Score: 85\nRight, but short."),
    (r"\A[^\w\n]*" + NUMBER + ANY + r"[^\w.\n]*$",                          "85%\nRight, but short."),
    (label(r"(?:final|overall|total)\s+(?:score|rating)") + NUMBER + ANY,   "Style: 9/10. Overall score: 85"),
    (label("score[sd]?|rating|rated?|graded?") + NUMBER + ANY,              "Short. I'd rate it 8.5/10."),
    (label("give|gave|award(?:ed)?") + NUMBER + SCALE,                      "Short. I would give it 8/10."),
    (NUMBER + r"[ \t]*(?:/|out of)[ \t]*(?P<most>100)\b",                   "It is short: 85/100, I think."),
    (NUMBER + r"[ \t]*stars?[ \t]*(?:/|out of)[ \t]*(?P<most>5|10)\b",      "This earns 3 stars out of 5."),
    (NUMBER + r"[ \t]*(?:/|out of)[ \t]*(?P<most>5|10)[ \t]*stars\b",       "This earns 3 out of 5 stars."),
    (r"^[^\w\n]*" + NUMBER + ANY + r"(?:[^\w.]*$|\.\s*\Z)",                 "It is short.\n85"))]
STANDS = 3           # what one of the first three finds stands, whatever the reply goes on to say


def match_score(reply: str) -> tuple[re.Match | None, int]:
    """The match of the first pattern of SCORES that finds something in a reply, and the pattern's place."""
    text = re.sub(r"[*_`\"'\[\]{}\\]", " ", reply)                    # markup, JSON
    for place, (pattern, _) in enumerate(SCORES):
        match = pattern.search(text)
        if match:
            return match, place
    return None, len(SCORES)


def parse_score(reply: str) -> float | None:
    """A judge's reply -> its score in 0..1, None if there is none or if it can be read in two ways.

    The patterns of SCORES are tried in order; of several matches the first counts. A range (80-90), and a
    score above its scale, is no score.

    Choice: the question asks for a score out of 100. Where a reply names its scale (8/10, 3 stars out of 5,
    85%), that scale counts. Where it names none, 0 is 0, a number above 10 is out of 100, and one below 1
    is a share of 1. A number from 1 to 10 is no score: 8 is as likely meant out of 10, and 1 out of 1.
    """
    match, _ = match_score(reply)
    if match is None:
        return None
    found, number = match.groupdict(), float(match["number"])
    scale = 100 if found.get("percent") else float(found.get("most") or found.get("label") or 0)
    if not scale:
        scale = 100 if number > 10 or not number else 1
        if 1 <= number <= 10:
            return None
    return number / scale if number <= scale else None


def score_stands(reply: str) -> bool:
    """Whether no further words can change the score of a reply that is still being written."""
    match, place = match_score(reply)
    return place < STANDS and bool(re.match(STOP, match.string[match.end("end"):]))


def critic_chat(message: str) -> str:
    """One user turn in the chat template that the critic was trained with (LLaVA-NeXT's qwen_1_5)."""
    return ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n")


def strip_marks(text: str) -> str:
    """Take marks out of a text to be judged, so that it cannot write the judge's turn or ask for pictures."""
    return re.sub(r"<\|\w+\|>|<image>", " ", text)


class LlavaCritic:
    """The text judge of the paper: prompts, their pictures, texts so far -> a score 0..1 or None each.

    None is for a reply without a score. `record` holds the latest (question, pictures, reply, score).
    tiles: a picture is cut into at most so many, 0 as published. source: hub id or folder; raises UserError
    for one that is no such checkpoint.
    """
    HUB = "lmms-lab/llava-critic-7b"
    BATCH, BUDGET = 8, 1024            # questions at a time on a CPU, tokens a reply may have
    RECORD = 1000                      # judgements in the record

    def __init__(self, source: str | Path, device: str | torch.device = "cpu", quantize: str = "none",
                 tiles: int = 0):
        folder = judge_folder(source, "text judge")
        self.text = QwenText.from_folder(folder)
        with reading(folder, "added_tokens.json"):
            self.stop = {self.text.id("<|im_end|>"), self.text.id("<|endoftext|>")}
        file = folder / "generation_config.json"
        settings = read_json(file) if file.exists() else {}
        self.repetition_penalty = settings.get("repetition_penalty", 1.0)
        self.model = load_llava(folder, device, quantize, tiles)
        self.record: deque[tuple[str, list[Picture], str, float | None]] = deque(maxlen=self.RECORD)

    def parts(self, message: str, pictures: list[Picture]) -> list[list[int]]:
        """A user's message -> ids before, between and after its `<image>` marks, one for each picture.

        Raises UserError where marks and pictures differ in number.
        """
        parts = critic_chat(message).split("<image>")
        if len(parts) != len(pictures) + 1:
            raise UserError(f"{len(parts) - 1} <image> marks for {len(pictures)} pictures: {message[:80]!r}")
        return [self.text.encode(part) for part in parts]               # each part alone, as in LLaVA-NeXT

    def length(self, parts: list[list[int]], pictures: list[Picture]) -> int:
        """How many positions a message takes."""
        return sum(map(len, parts)) + sum(self.model.length(as_image(p).size) for p in pictures)

    def rows_that_fit(self, positions: int) -> int:
        """How many questions of so many positions, replies included, are asked at a time: at least 1.

        On a GPU keys, values and the widest activation of a row share the free memory.
        """
        config, weight = self.model.decoder.config, self.model.newline
        free, bytes_a_number = free_bytes(weight.device), weight.element_size()
        if free is None:
            return self.BATCH
        row = row_bytes(config, positions, bytes_a_number)
        row += 3 * config.intermediate_size * positions * bytes_a_number       # gate, up and their product
        return max(1, int(ROOM * free) // row)

    def replies(self, messages: list[str], pictures: list[list[Picture]], max_new_tokens: int = BUDGET,
                repetition_penalty: float = 1.0, brief: bool = False) -> list[str]:
        """Greedy replies to users' messages, each with an `<image>` mark for each of its pictures.

        brief: a reply ends where no further words can change its score (`score_stands`).
        Questions of similar length are asked together, the longest first, and a picture of several questions
        is read once.
        Raises UserError where marks and pictures differ in number, or a message exceeds the context.
        """
        parts = [self.parts(*of) for of in zip(messages, pictures, strict=True)]
        lengths = [self.length(*of) for of in zip(parts, pictures)]
        order = sorted(range(len(parts)), key=lambda i: -lengths[i])
        replies, seen = [""] * len(parts), {}

        def row(i: int) -> Tensor:
            for p in pictures[i]:
                if id(p) not in seen:
                    seen[id(p)] = self.model.read(as_image(p).convert("RGB"))
            return self.model.embed(parts[i], [seen[id(p)] for p in pictures[i]])
        while order:
            longest = lengths[order[0]] + max_new_tokens
            self.model.check_length(lengths[order[0]], max_new_tokens)
            rows = self.rows_that_fit(longest)
            batch, order = order[:rows], order[rows:]
            texts = self.model.generate([row(i) for i in batch], max_new_tokens, self.stop,
                                        repetition_penalty, self.enough if brief else None)
            for i, ids in zip(batch, texts):
                replies[i] = self.text.decode(ids, skip_special=True)
        return replies

    def enough(self, ids: list[int]) -> bool:
        """Whether the score of a reply stands. It is looked for where a line or a sentence ends."""
        end = re.search(r"\n|\.\s", self.text.decode(ids[-2:], skip_special=True))
        return bool(end) and score_stands(self.text.decode(ids, skip_special=True))

    def check(self, prompt: str, pictures: list[Picture], budget: int) -> None:
        """Refuse a prompt whose pictures leave no room for an answer of `budget` tokens. Raises UserError."""
        question = pointwise(strip_marks(prompt), "", len(pictures))
        positions = self.length(self.parts(question, pictures), pictures)
        context = self.model.decoder.config.context
        if positions + budget + self.BUDGET > context:
            raise UserError(f"--prompts: the text judge cannot take the {len(pictures)} pictures of "
                            f"{prompt[:60]!r}: {positions} positions with the words, {budget} for the answer "
                            f"and {self.BUDGET} for the reply exceed its context of {context}; lower "
                            f"--critic-tiles, or leave pictures out")

    def __call__(self, prompts: list[str], pictures: list[list[Picture]], texts: list[list[str]],
                 brief: bool = True) -> list[float | None]:
        """r_t of n texts so far: the prompts, the pictures of each prompt, the texts of each answer so far.

        Choice: the score is the share of its scale, so that it lies in 0..1 like the other parts. Replies
        follow the published generation settings, with their repetition penalty.
        """
        questions = [pointwise(strip_marks(prompt), "\n".join(map(strip_marks, so_far)), len(shown))
                     for prompt, shown, so_far in zip(prompts, pictures, texts, strict=True)]
        replies = self.replies(questions, pictures, repetition_penalty=self.repetition_penalty, brief=brief)
        scores = [parse_score(reply) for reply in replies]
        self.record.extend(zip(questions, pictures, replies, scores, strict=True))
        return scores


# ------------------------------------------------------------------------------------------------------------
# Judges by name, and one judge run alone

JUDGES = {                       # part of Eq. (5) -> name on the command line -> judge
    "text": {"llava-critic": LlavaCritic},
    "visual": {"image-reward": ImageReward, "clip-score": ClipScore},
}


@dataclass
class Config:
    # -- judge
    judge: str = "image-reward"  # NAME, or NAME=FOLDER for weights on disk
    quantize: Literal["none", "nf4"] = "none"    # nf4: llava-critic's decoder in 4 bits
    critic_tiles: Natural = 0    # llava-critic: tiles that a picture is cut into at most; 0: as published
    # -- data
    text: str = "a fox in the snow"    # what the pictures are to show; for llava-critic: the answer
    images: str = ""             # picture files, separated by commas; for llava-critic: of the prompt
    question: str = ""           # for llava-critic: the prompt that the text answers
    # -- run
    device: str = "auto"         # cpu, cuda, mps; auto takes the best there is


def main() -> None:
    """Print a reward for every picture of --images, or llava-critic's reply about --text and its score."""
    config = parse_config(Config, names={"judge": [name for part in JUDGES.values() for name in part]})
    name, _, folder = config.judge.partition("=")
    files = [Path(file) for file in split_paths(config.images)]
    device = pick_device(config.device)
    if name in JUDGES["text"]:
        if not config.question:
            raise UserError(f"--judge {name} scores a text: expected --question")
        pictures = [read_picture(file, "--images") for file in files]
        judge_class = JUDGES["text"][name]
        judge = judge_class(folder or judge_class.HUB, device, config.quantize, config.critic_tiles)
        judge([config.question], [pictures], [[config.text]], brief=False)
        for _, _, reply, score in judge.record:
            print(f"{reply}\nr_t {'none' if score is None else round(score, 4)}")
    elif name in JUDGES["visual"]:
        if not files:
            raise UserError(f"--judge {name} scores pictures: expected --images")
        pictures = [read_picture(file, "--images") for file in files]
        judge = JUDGES["visual"][name](folder or JUDGES["visual"][name].HUB, device)
        for file, score in zip(files, judge([config.text] * len(files), pictures), strict=True):
            print(f"r_v {score:.4f}  {file}")
    else:
        raise UserError(f"--judge {name}: expected {' or '.join(JUDGES['text'] | JUDGES['visual'])}")


if __name__ == "__main__":
    run_main(main)
