"""TODO"""
import json
import math
import re
import unicodedata
from collections import deque
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common import UserError, open_tensors, read_json, read_text, read_tensor, snapshot
from model import NAMES, Decoder, DecoderConfig, KVCache, assign, rename, tensor_files
from tokenizer import (SIGLIP_HEADS, VISION_NAMES, Attention, Block, SiglipTower, TowerConfig, byte_pairs,
                       pad, preprocess)

# ------------------------------------------------------------------------------------------------------------
# The judges' text: WordPiece (BERT), byte-level BPE (CLIP and Qwen2)


class WordPiece:
    """BERT's uncased tokenizer from vocab.txt: words, then the longest known pieces from the left. Matches
    transformers' slow BertTokenizer. `added` are special tokens behind the vocabulary: BLIP has [DEC] and [ENC]."""

    def __init__(self, vocab_file: Path, added: tuple[str, ...] = ()):
        pieces = read_text(vocab_file).split("\n")
        pieces = pieces[:-1] if pieces[-1] == "" else pieces
        self.ids = {piece: i for i, piece in enumerate(pieces)}
        self.special = ["[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]"]
        lost = [token for token in self.special if token not in self.ids]
        if lost:
            raise UserError(f"{vocab_file}: not a BERT vocabulary, it lacks {lost[0]}")
        for token in added:
            self.special.append(token)
            self.ids.setdefault(token, len(self.ids))
        self.pieces = {i: piece for piece, i in self.ids.items()}

    def encode(self, text: str, length: int | None = None) -> list[int]:
        """text -> ids between [CLS] and [SEP], cut to `length` with [SEP] kept."""
        ids = []
        for part in re.split("(" + "|".join(map(re.escape, self.special)) + ")", text):
            ids += [self.ids[part]] if part in self.special else [i for w in self._words(part) for i in self._pieces(w)]
        return [self.ids["[CLS]"], *(ids if length is None else ids[:length - 2]), self.ids["[SEP]"]]

    def rows(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """texts -> ids and mask [B, length], int64, zeros behind the text"""
        rows = [self.encode(text, length) for text in texts]
        ids = torch.tensor([row + [0] * (length - len(row)) for row in rows])
        return ids, torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])

    def _words(self, text: str) -> list[str]:
        out = []
        for c in text:
            kind = unicodedata.category(c)
            if c in "\t\n\r" or kind == "Zs":
                out.append(" ")
            elif c not in "\0\ufffd" and kind[0] != "C":
                out.append(f" {c} " if is_ideograph(c) else c)
        text = unicodedata.normalize("NFD", " ".join("".join(map(str.lower, word)) for word in "".join(out).split()))
        return "".join(f" {c} " if is_punctuation(c) else c for c in text if unicodedata.category(c) != "Mn").split()

    def _pieces(self, word: str) -> list[int]:
        ids, start = [], 0
        while start < len(word) <= 100:
            mark = "##" if start else ""
            stop = next((e for e in range(len(word), start, -1) if mark + word[start:e] in self.ids), None)
            if stop is None:
                break
            ids.append(self.ids[mark + word[start:stop]])
            start = stop
        return ids if start == len(word) else [self.ids["[UNK]"]]

    def decode(self, ids: list[int], raw: bool = False) -> str:
        """ids -> text, without special tokens and with the spaces before punctuation taken out; raw: as they are."""
        pieces = [self.pieces[i] for i in ids if raw or self.pieces[i] not in self.special]
        text = " ".join(pieces).replace(" ##", "").strip()
        if not raw:
            for a, b in ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
                         (" 'm", "'m"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")):
                text = text.replace(a, b)
        return text


def is_ideograph(c: str) -> bool:
    """CJK, as BERT counts it."""
    return any(low <= ord(c) <= high for low, high in (
        (0x4E00, 0x9FFF), (0x3400, 0x4DBF), (0x20000, 0x2A6DF), (0x2A700, 0x2B73F), (0x2B740, 0x2B81F),
        (0x2B820, 0x2CEAF), (0xF900, 0xFAFF), (0x2F800, 0x2FA1F)))


def is_punctuation(c: str) -> bool:
    return c in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~" or unicodedata.category(c)[0] == "P"
# GPT-2's alphabet: a visible character for every byte
VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
ALPHABET = {b: chr(b) for b in VISIBLE}
ALPHABET |= {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(VISIBLE)))}
BYTES = {c: b for b, c in ALPHABET.items()}
CONTRACTION = "'s|'t|'re|'ve|'m|'ll|'d"
WHITE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")    # Unicode White_Space


def kind_of(c: str) -> str:
    """What the published splitting patterns look at: L letter, N number, R line end, W white space, P the rest."""
    if c in "\r\n ":
        return " " if c == " " else "R"
    return "W" if WHITE.match(c) else k if (k := unicodedata.category(c)[0]) in "LN" else "P"


class ByteText:
    """Byte-level BPE from vocab.json and merges.txt: text is split into words, a word's bytes are written in ALPHABET,
    merges join them. CLIP and Qwen2 differ in normalisation, in how words are split, and in CLIP's </w>."""
    contraction: re.Pattern  # on the text, before anything else
    words: re.Pattern        # on a string of kinds (`kind_of`)
    end = ""                 # written behind a word

    def __init__(self, vocab: dict[str, int], merges: list[str], added: dict[str, int]):
        self.vocab, self.added = vocab, added
        self.rank = {tuple(line.split(" ")): i for i, line in enumerate(merges)}
        self.pieces = {i: piece for piece, i in vocab.items()} | {i: token for token, i in added.items()}
        self.cut = re.compile("(" + "|".join(map(re.escape, sorted(added, key=len, reverse=True))) + ")")
        self.cache: dict[str, list[int]] = {}

    @classmethod
    def from_folder(cls, folder: Path) -> "ByteText":
        """vocab.json, merges.txt and, where there is one, added_tokens.json of a checkpoint."""
        folder = Path(folder)
        try:
            vocab = json.loads(read_text(folder / "vocab.json"))
            file = folder / "added_tokens.json"
            added = json.loads(read_text(file)) if file.exists() else {}
            merges = read_text(folder / "merges.txt").split("\n")
            merges = [line for line in merges if line and not line.startswith("#version")]
            return cls(vocab, merges, added | {t: vocab[t] for t in ("<|startoftext|>", "<|endoftext|>") if t in vocab})
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: vocab.json and merges.txt are no byte-level BPE vocabulary ({error})")

    def id(self, token: str) -> int:
        """The id of an added token."""
        return self.added[token]

    def normalise(self, text: str) -> str:
        return unicodedata.normalize("NFC", text)

    def encode(self, text: str) -> list[int]:
        """text -> ids; added tokens in it become theirs; nothing is put in front or behind."""
        ids = []
        for part in self.cut.split(self.normalise(text)):
            if part in self.added:
                ids.append(self.added[part])
                continue
            kinds, at = "".join(map(kind_of, part)), 0
            while at < len(part):
                match = self.contraction.match(part, at) or self.words.match(kinds, at)
                ids += self._word(part[at:match.end()]) if match else []
                at = match.end() if match else at + 1
        return ids

    def _word(self, word: str) -> list[int]:
        if word not in self.cache:
            letters = [ALPHABET[b] for b in word.encode("utf-8", "replace")]
            letters[-1] += self.end
            joined = byte_pairs(letters, lambda left, right: self.rank.get((left, right)))
            self.cache[word] = [self.vocab[symbol] for symbol in joined]
        return self.cache[word]

    def decode(self, ids: list[int], skip_special: bool = False) -> str:
        """ids -> text; bytes that are no UTF-8 become U+FFFD."""
        out, run = [], bytearray()
        for i in [*ids, None]:
            if i is not None and i not in self.added.values():
                word = self.pieces[i]
                ends = bool(self.end) and word.endswith(self.end)
                run += bytes(BYTES[c] for c in (word[:-len(self.end)] if ends else word)) + b" " * ends
            else:
                out.append(run.decode("utf-8", "replace"))
                run = bytearray()
                if i is not None and not skip_special:
                    out.append(self.pieces[i])
        return "".join(out)


class QwenText(ByteText):
    """Qwen2's tokenizer."""
    contraction = re.compile(CONTRACTION, re.IGNORECASE)
    words = re.compile("[ WP]?L+|N| ?P+R*|[RW ]*R+|[RW ]+(?![LNP])|[RW ]+")


class ClipText(ByteText):
    """CLIP's tokenizer as transformers' CLIPTokenizerFast has it (NFC and lower case where the original repairs broken
    text with ftfy first; the two agree on clean text)."""
    contraction, words, end = re.compile(CONTRACTION), re.compile("L+|N|P+"), "</w>"

    def normalise(self, text: str) -> str:
        return "".join(map(str.lower, WHITE.sub(" ", unicodedata.normalize("NFC", text))))

    def rows(self, texts: list[str], length: int = 77) -> tuple[Tensor, Tensor]:
        """texts -> ids [B, length] between start and end token, filled up with the end token; index of the first end
        token [B], where CLIP reads the text's state."""
        start, end = self.added["<|startoftext|>"], self.added["<|endoftext|>"]
        rows = [[start, *self.encode(text)[:length - 2], end] for text in texts]
        return torch.tensor([row + [end] * (length - len(row)) for row in rows]), \
            torch.tensor([row.index(end) for row in rows])


# ------------------------------------------------------------------------------------------------------------
# The paper's visual judges: ImageReward, and CLIP-score for the ablation

PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)       # CLIP's, BLIP's


def centre_square(picture: Image.Image | np.ndarray, size: int, rgb_first: bool) -> Tensor:
    """-> normalised pixels [3, size, size]: short side to `size` (bicubic), then the middle.

    CLIP as in transformers converts to RGB first and rounds the crop's corner down; torchvision, behind ImageReward,
    works in the file's own mode and rounds half to even."""
    picture = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    picture = picture.convert("RGB") if rgb_first else picture
    w, h = picture.size
    w, h = (size, int(size * h / w)) if w <= h else (int(size * w / h), size)
    left, top = ((w - size) // 2, (h - size) // 2) if rgb_first else (round((w - size) / 2), round((h - size) / 2))
    picture = picture.resize((w, h), Image.BICUBIC).crop((left, top, left + size, top + size)).convert("RGB")
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1).float() / 255
    mean, std = (torch.tensor(x)[:, None, None] for x in (PIXEL_MEAN, PIXEL_STD))
    return (pixels - mean) / std


class ClassTower(nn.Module):
    """A vision transformer with a class token in front: CLIP's (norm before, no patch bias), BLIP's (neither)."""

    def __init__(self, tower: TowerConfig, activation: str, eps: float, pre_norm: bool):
        super().__init__()
        self.patch = nn.Conv2d(3, tower.width, tower.patch_size, stride=tower.patch_size, bias=not pre_norm)
        self.cls, self.position = (nn.Parameter(torch.zeros(shape)) for shape in (
            (tower.width,), (tower.positions + 1, tower.width)))
        self.pre_norm = nn.LayerNorm(tower.width, eps=eps) if pre_norm else nn.Identity()
        self.blocks = nn.ModuleList(Block(tower.width, tower.heads, tower.mlp_width, activation, eps)
                                    for _ in range(tower.layers))
        self.norm = nn.LayerNorm(tower.width, eps=eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> [B, 1 + N, C], the class token first"""
        x = self.patch(pixels).flatten(2).transpose(1, 2)                                  # (B, N, C)
        x = self.pre_norm(torch.cat((self.cls.expand(len(x), 1, -1), x), dim=1) + self.position)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


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
    """ImageReward's network (arXiv 2304.05977): BLIP's picture tower, BERT that looks at it, five linear layers."""
    MLP = (1024, 128, 64, 16, 1)                    # with dropout and no activation between them

    def __init__(self, tower: TowerConfig, text: dict):
        super().__init__()
        width, eps = text["hidden_size"], text["layer_norm_eps"]
        self.tower = ClassTower(tower, "gelu", 1e-6, pre_norm=False)
        self.words = nn.Embedding(text["vocab_size"], width)
        self.position = nn.Parameter(torch.zeros(text["max_position_embeddings"], width))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.layers = nn.ModuleList(BertLayer(width, text["num_attention_heads"], text["intermediate_size"],
                                              tower.width, eps) for _ in range(text["num_hidden_layers"]))
        self.mlp = nn.Sequential(*(nn.Linear(a, b) for a, b in zip((width, *self.MLP), self.MLP)))

    def read(self, ids: Tensor, mask: Tensor, picture: Tensor) -> Tensor:
        """ids, mask [B, T], the tower's output [B, S, C] -> the text's states [B, T, width]"""
        x = self.norm(self.words(ids) + self.position[:ids.shape[1]])
        for layer in self.layers:
            x = layer(x, mask.bool()[:, None, None], picture)
        return x

    def forward(self, ids: Tensor, mask: Tensor, pixels: Tensor) -> Tensor:
        """-> raw rewards [B], from the first position's state"""
        return self.mlp(self.read(ids, mask, self.tower(pixels))[:, 0])[:, 0]
BLIP_NAMES = {     # names in ImageReward.pt -> here; the tower's joint qkv is cut in three first
    "blip.visual_encoder.cls_token": "tower.cls",
    "blip.visual_encoder.pos_embed": "tower.position",
    "blip.visual_encoder.patch_embed.proj.": "tower.patch.",
    "blip.visual_encoder.blocks.{}.attn.proj.": "tower.blocks.{}.attn.o_proj.",
    "blip.visual_encoder.blocks.{}.mlp.": "tower.blocks.{}.",
    "blip.visual_encoder.": "tower.",
    "blip.text_encoder.embeddings.word_embeddings.": "words.",
    "blip.text_encoder.embeddings.position_embeddings.weight": "position",
    "blip.text_encoder.embeddings.LayerNorm.": "norm.",
    **{f"blip.text_encoder.encoder.layer.{{}}.{theirs}.{there}.": f"layers.{{}}.{here}."
       for theirs, ours, norm in (("attention", "attn", "norm1"), ("crossattention", "cross", "norm2"))
       for there, here in (("self.query", ours + ".q_proj"), ("self.key", ours + ".k_proj"),
                           ("self.value", ours + ".v_proj"), ("output.dense", ours + ".o_proj"),
                           ("output.LayerNorm", norm))},
    "blip.text_encoder.encoder.layer.{}.intermediate.dense.": "layers.{}.fc1.",
    "blip.text_encoder.encoder.layer.{}.output.dense.": "layers.{}.fc2.",
    "blip.text_encoder.encoder.layer.{}.output.LayerNorm.": "layers.{}.norm3.",
    **{f"mlp.layers.{theirs}.": f"mlp.{ours}." for ours, theirs in enumerate((0, 2, 4, 6, 7))},
}
BLIP_NOT_NEEDED = re.compile(r"blip\.(text_encoder\.embeddings\.position_ids|vision_proj\.|text_proj\.)")


def read_state(file: Path) -> dict[str, Tensor]:
    """A PyTorch file (weights only, mapped from disk) or a safetensors file -> its tensors."""
    if file.suffix == ".safetensors":
        with open_tensors(file) as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise UserError(f"{file}: missing")
    except Exception as error:                       # not a zip, cut, or holding more than tensors: torch's first line
        raise UserError(f"{file}: not a whole PyTorch file of weights ({str(error).splitlines()[0]})")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{file}: expected a dictionary of tensors")
    return state


def fill(model: nn.Module, state: dict[str, Tensor], table: dict[str, str], not_needed: re.Pattern, file: Path,
         device: str | torch.device, dtype: torch.dtype) -> None:
    """Every needed tensor to its place in a model on the meta device. Raises UserError, naming file and tensor."""
    missing = set(model.state_dict())
    for name, value in state.items():
        if not_needed.match(name):
            continue
        ours = rename(name, table)
        if ours not in missing:
            raise UserError(f"{file}: unknown tensor {name}, or beyond the sizes that its config gives")
        assign(model, ours, value.to(device, dtype, copy=True), f"{file}: tensor {name}")
        missing.discard(ours)
    if missing:
        name = rename(min(missing), {ours: theirs for theirs, ours in table.items()})
        raise UserError(f"{file}: tensor {name} is missing ({len(missing)} in all)")
    model.requires_grad_(False).eval()


def judge_folder(source: str | Path, name: str) -> Path:
    """A folder, a file in one, or a hub id's snapshot."""
    source = Path(source)
    return source if source.is_dir() else source.parent if source.is_file() else snapshot(str(source), name)


class ImageReward:
    """The visual judge of the paper: (texts, pictures) -> a score 0..1 a pair.

    source: hub id THUDM/ImageReward, or a folder with ImageReward.pt and med_config.json; BERT's vocab.txt lies beside
    them or comes from the hub (bert-base-uncased). Raises UserError for anything else."""
    HUB = "THUDM/ImageReward"
    MEAN, STD, LENGTH, BATCH = 0.16717362830052426, 1.0333394966054072, 35, 16

    def __init__(self, source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        folder = judge_folder(source, "visual judge")
        config, file = read_json(folder / "med_config.json"), folder / "ImageReward.pt"
        vocab = folder / "vocab.txt"
        if not vocab.exists() and not Path(source).exists():
            vocab = snapshot("bert-base-uncased", "vocabulary of the visual judge") / "vocab.txt"
        self.text = WordPiece(vocab, ("[DEC]", "[ENC]"))
        state = {}
        for name, value in read_state(file).items():
            if ".attn.qkv." in name:
                state |= {name.replace("qkv", letter + "_proj"): part for letter, part in zip("qkv", value.chunk(3))}
            else:
                state[name] = value[0] if name.endswith("pos_embed") else value[0, 0] if name.endswith("cls_token") \
                    else value
        try:
            width, _, patch, _ = state["blip.visual_encoder.patch_embed.proj.weight"].shape
            grid = round((len(state["blip.visual_encoder.pos_embed"]) - 1) ** 0.5)
            layers = len({name.split(".")[3] for name in state if name.startswith("blip.visual_encoder.blocks.")})
            heads = read_json(folder / "vit_config.json")["num_heads"] if (folder / "vit_config.json").exists() else 16
            tower = TowerConfig(image_size=grid * patch, patch_size=patch, width=width, layers=layers, heads=heads,
                                mlp_width=len(state["blip.visual_encoder.blocks.0.mlp.fc1.bias"]))
            with torch.device("meta"):
                self.model = Blip(tower, config)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder}: not an ImageReward checkpoint: its med_config.json or tensors lack {error}")
        fill(self.model, state, BLIP_NAMES, BLIP_NOT_NEEDED, file, device, dtype)
        self.size, self.device, self.dtype = tower.image_size, device, dtype

    @torch.no_grad()
    def rewards(self, texts: list[str], pictures: list[np.ndarray | Image.Image]) -> Tensor:
        """Standardised rewards [n] of n pairs, as ImageReward.score gives them."""
        raw = []
        for i in range(0, len(texts), self.BATCH):
            ids, mask = self.text.rows(texts[i:i + self.BATCH], self.LENGTH)
            pixels = torch.stack([centre_square(p, self.size, rgb_first=False) for p in pictures[i:i + self.BATCH]])
            pixels = pixels.to(self.device, self.dtype)
            raw.append(self.model(ids.to(self.device), mask.to(self.device), pixels).float())
        return (torch.cat(raw).cpu() - self.MEAN) / self.STD if raw else torch.zeros(0)

    def score(self, prompt: str, images: list[np.ndarray | Image.Image]) -> list[float]:
        """One prompt, several pictures -> standardised rewards."""
        return self.rewards([prompt] * len(images), images).tolist()

    def __call__(self, texts: list[str], pictures: list[np.ndarray]) -> list[float]:
        """r_v. Choice: through the normal CDF: rewards are standardised on the training data, so it is a percentile."""
        return torch.special.ndtr(self.rewards(texts, pictures).double()).tolist()


class Clip(nn.Module):
    """CLIP (arXiv 2103.00020): two towers and a linear layer behind each."""

    def __init__(self, tower: TowerConfig, text: dict, activations: tuple[str, str], eps: float, width: int):
        super().__init__()
        self.tower = ClassTower(tower, activations[0], eps, pre_norm=True)
        self.words = nn.Embedding(text["vocab_size"], text["hidden_size"])
        self.position = nn.Parameter(torch.zeros(text["max_position_embeddings"], text["hidden_size"]))
        self.blocks = nn.ModuleList(Block(text["hidden_size"], text["num_attention_heads"], text["intermediate_size"],
                                          activations[1], eps) for _ in range(text["num_hidden_layers"]))
        self.norm = nn.LayerNorm(text["hidden_size"], eps=eps)
        self.picture_out = nn.Linear(tower.width, width, bias=False)
        self.text_out = nn.Linear(text["hidden_size"], width, bias=False)

    def pictures(self, pixels: Tensor) -> Tensor:
        """pixels [B, 3, H, W] -> unit vectors [B, width]"""
        return F.normalize(self.picture_out(self.tower(pixels)[:, 0]), dim=-1)

    def texts(self, ids: Tensor, end: Tensor) -> Tensor:
        """ids [B, T] and the place of each end token [B] -> unit vectors [B, width]. Causal: what follows is unseen."""
        x = self.words(ids) + self.position[:ids.shape[1]]
        for block in self.blocks:
            x = block(x, causal=True)
        return F.normalize(self.text_out(self.norm(x[torch.arange(len(x), device=x.device), end])), dim=-1)
CLIP_NAMES = {
    **{f"{theirs}.encoder.layers.{{}}.{there}": f"{ours}blocks.{{}}.{here}"
       for theirs, ours in (("vision_model", "tower."), ("text_model", ""))
       for there, here in (("layer_norm1.", "norm1."), ("layer_norm2.", "norm2."), ("mlp.", ""),
                           ("self_attn.out_proj.", "attn.o_proj."), ("self_attn.", "attn."))},
    "vision_model.embeddings.class_embedding": "tower.cls",
    "vision_model.embeddings.position_embedding.weight": "tower.position",
    "vision_model.embeddings.patch_embedding.": "tower.patch.",
    "vision_model.pre_layrnorm.": "tower.pre_norm.",                    # spelled so in the published files
    "vision_model.post_layernorm.": "tower.norm.",
    "text_model.embeddings.token_embedding.": "words.",
    "text_model.embeddings.position_embedding.weight": "position",
    "text_model.final_layer_norm.": "norm.",
    "visual_projection.": "picture_out.",
    "text_projection.": "text_out.",
}
CLIP_NOT_NEEDED = re.compile(r"logit_scale|(text|vision)_model\.embeddings\.position_ids")


class ClipScore:
    """The visual judge of the paper's ablation: (texts, pictures) -> a score 0..1 a pair.

    source: hub id (openai/clip-vit-large-patch14, openai/clip-vit-base-patch32) or a folder in transformers' layout.
    Raises UserError for anything else."""
    HUB, BATCH = "openai/clip-vit-large-patch14", 32

    def __init__(self, source: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32):
        folder = judge_folder(source, "visual judge")
        config = read_json(folder / "config.json")
        file = folder / "model.safetensors"
        file = file if file.exists() else folder / "pytorch_model.bin"
        try:
            # the published files leave out what is CLIP's default
            text = {"vocab_size": 49408, "max_position_embeddings": 77, "hidden_size": 512, "num_hidden_layers": 12,
                    "num_attention_heads": 8, "intermediate_size": 2048, "hidden_act": "quick_gelu",
                    "layer_norm_eps": 1e-5, **config["text_config"]}
            vision = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
                   "hidden_act": "quick_gelu", "image_size": 224, "patch_size": 32, **config["vision_config"]}
            tower = TowerConfig(image_size=vision["image_size"], patch_size=vision["patch_size"], width=vision["hidden_size"],
                                layers=vision["num_hidden_layers"], mlp_width=vision["intermediate_size"],
                                heads=vision["num_attention_heads"])
            with torch.device("meta"):
                self.model = Clip(tower, text, (vision["hidden_act"], text["hidden_act"]), text["layer_norm_eps"],
                                  config["projection_dim"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{folder / 'config.json'}: not a CLIP model's: it lacks {error}")
        self.text = ClipText.from_folder(folder)
        fill(self.model, read_state(file), CLIP_NAMES, CLIP_NOT_NEEDED, file, device, dtype)
        self.size, self.length = tower.image_size, text["max_position_embeddings"]
        self.device, self.dtype = device, dtype

    @torch.no_grad()
    def vectors(self, texts: list[str], pictures: list[np.ndarray | Image.Image]) -> tuple[Tensor, Tensor]:
        """-> unit vectors of the texts [n, width] and of the pictures [m, width]"""
        said, seen = [], []
        for i in range(0, len(texts), self.BATCH):
            ids, end = self.text.rows(texts[i:i + self.BATCH], self.length)
            said.append(self.model.texts(ids.to(self.device), end.to(self.device)))
        for i in range(0, len(pictures), self.BATCH):
            pixels = torch.stack([centre_square(p, self.size, rgb_first=True) for p in pictures[i:i + self.BATCH]])
            seen.append(self.model.pictures(pixels.to(self.device, self.dtype)))
        return torch.cat(said).float().cpu(), torch.cat(seen).float().cpu()

    def cosine(self, texts: list[str], pictures: list[np.ndarray | Image.Image]) -> list[float]:
        """The cosine of each pair."""
        if not texts:
            return []
        said, seen = self.vectors(texts, pictures)
        return (said * seen).sum(-1).tolist()

    def __call__(self, texts: list[str], pictures: list[np.ndarray]) -> list[float]:
        """r_v: 2.5 max(0, cosine), at most 1 (the rescaling of the CLIPScore paper, arXiv 2104.08718)."""
        return [min(1.0, 2.5 * max(0.0, value)) for value in self.cosine(texts, pictures)]


# ------------------------------------------------------------------------------------------------------------
# The paper's text judge: LLaVA-Critic (arXiv 2410.02712), a LLaVA-OneVision (arXiv 2408.03326) trained to score
#
#     picture --tiles--> SigLIP tower --projector--> rows of features, a newline vector after each
#     text and features, in order --> Qwen2 decoder --> a reply in words --> `parse_score` --> 0..1

TOWER = "model.vision_tower.vision_tower.vision_model."
LLAVA_NAMES = {     # names in the published files -> here, as in model.NAMES
    **NAMES["llm"],
    **{theirs.replace("rqvaesiglip.siglip_model.vision_model.", TOWER): ours
       for theirs, ours in VISION_NAMES.items() if ".siglip_model." in theirs},
    "model.mm_projector.": "projector.",
    "model.image_newline": "newline",
}
LLAVA_NOT_NEEDED = re.compile(re.escape(TOWER) + r"(post_layernorm|head|embeddings\.position_ids)|.*\.inv_freq$")


class Llava(nn.Module):
    """Pictures as tiles of S pixels, G x G features a tile, in front of a decoder of width C (LLaVA-NeXT's code).

    aspect "anyres_max_M": the whole picture and its tiles, thinned out to about M tiles of features; "pad": the picture
    as one square tile. grids: the (width, height) in pixels that tiles can be laid out in."""

    def __init__(self, decoder: DecoderConfig, tower: TowerConfig, aspect: str, grids: list[tuple[int, int]]):
        super().__init__()
        self.decoder, self.tower = Decoder(decoder), SiglipTower(tower)
        self.projector = nn.Sequential(nn.Linear(tower.width, decoder.hidden_size), nn.GELU(),
                                       nn.Linear(decoder.hidden_size, decoder.hidden_size))
        self.newline = nn.Parameter(torch.zeros(decoder.hidden_size))
        self.tower_config, self.aspect, self.grids = tower, aspect, grids

    def best_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """A picture's (width, height) -> the grid that keeps most of its pixels, then the one with least padding."""
        def lost(grid: tuple[int, int]) -> tuple[int, int]:
            scale = min(grid[0] / size[0], grid[1] / size[1])
            kept = min(int(size[0] * scale) * int(size[1] * scale), size[0] * size[1])     # enlarging adds nothing
            return -kept, grid[0] * grid[1] - kept
        return min(self.grids, key=lost)

    def pixels(self, picture: Image.Image) -> Tensor:
        """An RGB picture of any size -> tiles [n, 3, S, S] in -1..1, the whole picture first, then row by row."""
        (w, h), S = picture.size, self.tower_config.image_size
        if self.aspect == "pad":
            square = Image.new("RGB", (max(w, h),) * 2, (127, 127, 127))               # int(255 * SigLIP's mean)
            square.paste(picture, ((max(w, h) - w) // 2, (max(w, h) - h) // 2))
            return preprocess(square, S)[None]
        W, H = self.best_grid((w, h))
        fitted = (W, min(math.ceil(h * (W / w)), H)) if W / w < H / h else (min(math.ceil(w * (H / h)), W), H)
        canvas = Image.new("RGB", (W, H))
        canvas.paste(picture.resize(fitted, Image.BICUBIC), ((W - fitted[0]) // 2, (H - fitted[1]) // 2))
        tiles = [canvas.crop((x, y, x + S, y + S)) for y in range(0, H, S) for x in range(0, W, S)]
        return torch.stack([preprocess(tile, S) for tile in (picture, *tiles)])

    def features(self, pixels: Tensor, size: tuple[int, int]) -> Tensor:
        """Tiles [n, 3, S, S] of a picture of `size` (width, height) -> what the decoder reads for it [T, C]."""
        S, G, newline = self.tower_config.image_size, self.tower_config.grid, self.newline
        x = self.projector(self.tower(pixels.to(newline.device, newline.dtype)))           # (n, G*G, C)
        if self.aspect == "pad":
            return torch.cat((x[0], newline[None]))
        W, H = (side // S for side in self.best_grid(size))
        whole, x = x[0], x[1:].view(H, W, G, G, -1).permute(4, 0, 2, 1, 3).reshape(len(newline), H * G, W * G)
        x = unpad(x, size)                                                                 # (C, h, w)
        times = math.sqrt(x.shape[1] * x.shape[2] / (int(self.aspect.rpartition("_")[2]) * G ** 2))
        if times > 1.1:                                     # LLaVA-NeXT lets a tenth more through
            x = F.interpolate(x[None], (int(x.shape[1] // times), int(x.shape[2] // times)), mode="bilinear")[0]
        x = torch.cat((x, newline[:, None, None].expand(-1, x.shape[1], 1)), dim=2)        # (C, h, w + 1)
        return torch.cat((whole, x.flatten(1).T))

    def embed(self, parts: list[list[int]], pictures: list[Image.Image]) -> Tensor:
        """The token ids before, between and after the pictures -> input embeddings [T, C]."""
        words = [self.decoder.embed(torch.tensor(ids, dtype=torch.long, device=self.newline.device)) for ids in parts]
        shown = [self.features(self.pixels(picture), picture.size) for picture in pictures]
        return torch.cat(words[:1] + [x for pair in zip(shown, words[1:]) for x in pair])

    @torch.no_grad()
    def generate(self, rows: list[Tensor], budget: int, stop: set[int] = frozenset(),
                 repetition_penalty: float = 1.0) -> list[list[int]]:
        """Greedy continuations of embedded prompts [T, C], ended before a token of `stop` or after `budget` tokens.

        The penalty sees what was generated, not the prompt: in LLaVA-NeXT too a prompt of embeddings has no ids."""
        device = self.newline.device
        longest, context = max(len(row) for row in rows), self.decoder.config.context
        if longest + budget > context:
            raise UserError(f"text judge: {longest} positions and a reply of {budget} exceed its context of {context}")
        place = torch.tensor([len(row) for row in rows], device=device)                    # (B,) next position
        cache = KVCache(len(self.decoder.layers), longest + budget)
        state = self.decoder.prefill(rows, cache)                                          # (B, C)
        ids = torch.zeros(len(rows), 0, dtype=torch.long, device=device)
        ends = torch.tensor(sorted(stop), dtype=torch.long, device=device)
        for _ in range(budget):
            logits = self.decoder.lm_head(state).float()                                   # (B, V)
            said = logits.gather(1, ids)
            said = torch.where(said < 0, said * repetition_penalty, said / repetition_penalty)
            token = logits.scatter(1, ids, said).argmax(-1)
            ids = torch.cat((ids, token[:, None]), dim=1)
            if torch.isin(ids, ends).any(1).all():
                break
            state = self.decoder.step(self.decoder.embed(token), place, cache)
            place = place + 1
        return [row[:next((i for i, token in enumerate(row) if token in stop), len(row))] for row in ids.tolist()]


def unpad(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Cut off the rows or columns of features [C, H, W] that padding made, for a picture of `size` (width, height).
    LLaVA-NeXT rounds down here and up in the pixels: an edge of the picture may go, and all of a thread-thin one."""
    (w, h), (H, W) = size, x.shape[1:]
    if w / h > W / H:
        cut = (H - int(h * (W / w))) // 2
        return x[:, cut:H - cut]
    cut = (W - int(w * (H / h))) // 2
    return x[:, :, cut:W - cut]


def load_llava(folder: Path, device: str | torch.device, quantize: str = "none") -> Llava:
    """A checkpoint in the published layout -> model, tensors streamed in the type they are stored in.

    Raises UserError, naming file, tensor, found and expected shape, for whatever is missing, unknown or mis-shaped."""
    if quantize not in ("none", "nf4"):
        raise UserError(f"quantize {quantize}: expected nf4 or none")
    config, files, shapes = read_json(folder / "config.json"), {}, {}
    for file in tensor_files(folder):
        with open_tensors(file) as tensors:
            for name in tensors.keys():
                files[name], shapes[name] = file, tuple(tensors.get_slice(name).get_shape())
    try:
        decoder = DecoderConfig(
            **{f: config[f] for f in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                                      "vocab_size", "num_key_value_heads", "rms_norm_eps", "rope_theta")},
            context=config.get("tokenizer_model_max_length") or config["max_position_embeddings"], qkv_bias=True)
        width, _, patch_size, _ = shapes[TOWER + "embeddings.patch_embedding.weight"]
        told = config.get("vision_config") or {}       # the published file only names its tower: ...-patch14-384
        tower = TowerConfig(
            image_size=told.get("image_size") or int(config["mm_vision_tower"].rpartition("-")[2]),
            patch_size=patch_size, width=width, mlp_width=shapes[TOWER + "encoder.layers.0.mlp.fc1.weight"][0],
            layers=len({name.split(".")[6] for name in shapes if name.startswith(TOWER + "encoder.layers.")}),
            heads=told.get("num_attention_heads", SIGLIP_HEADS))
        grids = [(int(w), int(h)) for w, h in config["image_grid_pinpoints"]]
        aspect, merge = config["image_aspect_ratio"], config["mm_patch_merge_type"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}: not a LLaVA-OneVision checkpoint: its config.json or tensors lack {error}")
    if not re.fullmatch(r"pad|anyres_max_[1-9]\d*", str(aspect)) or merge != "spatial_unpad" or not grids:
        raise UserError(f"{folder / 'config.json'}: found {aspect}, {merge} and {len(grids)} image_grid_pinpoints, "
                        "expected anyres_max_N or pad, spatial_unpad and some")
    with torch.device("meta"):
        model = Llava(decoder, tower, aspect, grids)
    needed = {name: rename(name, LLAVA_NAMES) for name in files if not LLAVA_NOT_NEEDED.match(name)}
    wanted, missing = set(model.state_dict()), set(model.state_dict()) - set(needed.values())
    for name, ours in needed.items():
        if ours not in wanted:
            raise UserError(f"{files[name]}: unknown tensor {name}, or beyond the sizes that config.json gives")
    if missing:
        name = rename(min(missing), {ours: theirs for theirs, ours in LLAVA_NAMES.items()})
        raise UserError(f"{folder}: tensor {name} is missing ({len(missing)} in all)")
    for name, ours in needed.items():          # `assign` is where the decoder's linear layers become 4-bit ones
        assign(model, ours, read_tensor(files[name], name, device), f"{files[name]}: tensor {name}", quantize)
    return model.requires_grad_(False).eval()
# the published usage example of LLaVA-Critic, letter by letter
POINTWISE = ("Given an image and a corresponding question, please serve as an unbiased and fair judge to evaluate the "
             "quality of answer answers provided by a Large Multimodal Model (LMM). Score the response out of 100 and "
             "explain your reasoning with specific details. Your task is provided as follows:\n"
             "Question: [{question}]\nThe LMM response: [{response}]\nASSISTANT:\n ")
NUMBER = r"(?<![\w.-])(?<!out of )(?<!/)(\d{1,3}(?:\.\d+)?)(?![\d,]*\.?\d)(?!\s*(?:-|–|to)\s*\d)"         # no range
SCALE = r"(?:\s*(?:/|out of)\s*([1-9]\d{0,2}))?"
LABEL = (r"(?<!perfect )(?<!full )\b{}\b(?:\s*\(?(?:out of|/|0\s*[-–])\s*100)?"
         r"(?:[^\w\n.-]|-\s|\b(?:is|of|be|will|would|as|at|an?|to|for|the|this|that|it|I|response|answer|assign(?:ed)?|"
         r"given?|about|around|LMM|s)\b)*")
SCORES = [re.compile(pattern, re.IGNORECASE | re.MULTILINE) for pattern in (
    LABEL.format(r"(?:final|overall|total)\s+(?:score|rating)") + NUMBER + SCALE,
    LABEL.format(r"(?:score[sd]?|rating|rated?|graded?)") + NUMBER + SCALE,
    NUMBER + r"\s*(?:/|out of)\s*(100)\b",
    r"^[^\w\n]*" + NUMBER + SCALE + r"(?:[^\w.]*$|\.\s*\Z)")]              # "1." on a line of its own is a list


def parse_score(reply: str) -> float | None:
    """A judge's reply -> its score on a scale of 100, None if there is none. A final or overall score goes before any
    other, that before a bare 85/100, that before a number alone on its line; of several the first. Another scale
    counts only where it is spelled out (8.5/10); a range (80-90) is no score."""
    text = re.sub(r"[*_`\"'\[\]{}\\]", " ", reply)                    # markup, JSON
    match = next(filter(None, (pattern.search(text) for pattern in SCORES)), None)
    return 100 * float(match[1]) / float(match[2] or 100) if match else None


def critic_chat(message: str) -> str:
    """One user turn in the chat template that the critic was trained with (LLaVA-NeXT's qwen_1_5)."""
    return ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n")


def strip_marks(text: str) -> str:
    """Marks in what is judged taken out: it must not write the judge's turn, nor ask for pictures."""
    return re.sub(r"<\|\w+\|>|<image>", " ", text)


class LlavaCritic:
    """The text judge: (prompt, texts) -> a score 0..1 for each text, None where the reply holds none.

    `seen` holds the latest (question, reply, score), `asked` and `unparsable` count all. Raises UserError for a source
    (hub id or folder) that is no such checkpoint."""
    HUB = "lmms-lab/llava-critic-7b"
    BATCH, BUDGET, KEEP = 8, 1024, 1000      # questions at a time, tokens a reply may have, judgements kept

    def __init__(self, source: str | Path, device: str | torch.device = "cpu", quantize: str = "none"):
        folder = judge_folder(source, "text judge")
        self.text = QwenText.from_folder(folder)
        self.model = load_llava(folder, device, quantize)
        self.stop = {self.text.id("<|im_end|>"), self.text.id("<|endoftext|>")}
        told = read_json(folder / "generation_config.json") if (folder / "generation_config.json").exists() else {}
        self.repetition_penalty = told.get("repetition_penalty", 1.0)
        self.seen, self.asked, self.unparsable = deque(maxlen=self.KEEP), 0, 0

    def reply(self, prompt: str, pictures: list[np.ndarray | Image.Image] = (), max_new_tokens: int = BUDGET) -> str:
        """What the model answers, greedily, to a user's message with an `<image>` mark for each picture."""
        return self.replies([prompt], [pictures], max_new_tokens)[0]

    def replies(self, prompts: list[str], pictures: list[list[np.ndarray | Image.Image]], max_new_tokens: int = BUDGET,
                repetition_penalty: float = 1.0) -> list[str]:
        """`reply` for several messages, batched. Raises UserError where marks and pictures differ in number."""
        rows = []
        for prompt, shown in zip(prompts, pictures):
            ids = [self.text.encode(part) for part in critic_chat(prompt).split("<image>")]   # each alone: LLaVA-NeXT
            if len(ids) != len(shown) + 1:
                raise UserError(f"{len(ids) - 1} <image> marks for {len(shown)} pictures: {prompt[:80]!r}")
            shown = [(Image.fromarray(p) if isinstance(p, np.ndarray) else p).convert("RGB") for p in shown]
            rows.append(self.model.embed(ids, shown))
        return [self.text.decode(ids, skip_special=True) for i in range(0, len(rows), self.BATCH)
                for ids in self.model.generate(rows[i:i + self.BATCH], max_new_tokens, self.stop, repetition_penalty)]

    def __call__(self, prompts: list[str], texts: list[list[str]]) -> list[list[float | None]]:
        """r_t of each text of each answer: the published pointwise question about all that was said up to it.

        Choice: replies follow the published generation settings, so with their repetition penalty. Pictures are not
        shown."""
        questions = [POINTWISE.format(question=strip_marks(prompt), response="\n".join(map(strip_marks, told[:k + 1])))
                     for prompt, told in zip(prompts, texts) for k in range(len(told))]
        replies = self.replies(questions, [()] * len(questions), repetition_penalty=self.repetition_penalty)
        found = [parse_score(reply) for reply in replies]
        scores = [None if score is None else min(score / 100, 1.0) for score in found]
        self.seen.extend(zip(questions, replies, scores))
        self.asked, self.unparsable = self.asked + len(scores), self.unparsable + scores.count(None)
        rest = iter(scores)
        return [[next(rest) for _ in told] for told in texts]
JUDGES = {                       # part of Eq. (5) -> name on the command line -> judge
    "text": {"llava-critic": LlavaCritic},
    "visual": {"image-reward": ImageReward, "clip-score": ClipScore},
}
