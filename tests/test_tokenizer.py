"""Text: every recorded case of SentencePiece and of transformers' slow LlamaTokenizer.

Pictures are tested in test_vila_u.py, answers in test_model.py, the judges' tokenizers in test_judges.py. Set
FIXTURES to a folder with tokenizers/ to check other cases of the same form.
"""
import hashlib
import json
import os
import re
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from conftest import FIXTURES, run

import shapes
import tokenizer
from common import UserError
from tokenizer import BYTE, CONTROL, SPACE, UNKNOWN, TextTokenizer, read_message, write_field
from warmup import train_bpe

CASES = FIXTURES / "tokenizers"
CACHE = Path(os.environ.get("TOKENIZER_CACHE", Path.home() / ".cache" / "unified-grpo-tests"))


def package_file(package: str, member: str, sha256: str) -> bytes:
    """A vocabulary from a package, fetched once without its dependencies. Skips where there is no index."""
    path = CACHE / sha256
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        folder = CACHE / package
        source = ["--no-binary", package.split("==")[0]] if "llama" in package else []
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder)]
        result = subprocess.run([*pip, *source, package], capture_output=True, text=True)
        files = list(folder.glob("*")) if folder.exists() else []
        if not files:
            pytest.skip(f"{package} could not be fetched: {result.stderr.strip().splitlines()[-1:]}")
        if files[0].suffix == ".whl":
            data = zipfile.ZipFile(files[0]).read(member)
        else:
            with tarfile.open(files[0]) as archive:
                data = next(archive.extractfile(m).read() for m in archive if m.name.endswith(member))
        path.write_bytes(data)
    data = path.read_bytes()
    assert hashlib.sha256(data).hexdigest() == sha256
    return data


def llama_model(folder: Path) -> Path:
    """LLaMA's tokenizer.model rebuilt from the three vocabulary arrays of a GGUF file (version 1)."""
    data = package_file("llama-cpp-python==0.1.83", "vendor/llama.cpp/models/ggml-vocab-llama.gguf",
                        "5e7501fc284947aba7a9d9dc29b96378b24a831dcaed414724ada0eb321844c0")
    at = 4 + 4 + 4                                                       # magic, version, tensors

    def number(form):
        nonlocal at
        value, = struct.unpack_from("<" + form, data, at)
        at += struct.calcsize(form)
        return value

    def text():
        nonlocal at
        n = number("I")
        at += n
        return data[at - n:at]

    def value(kind):
        if kind == 8:
            return text()
        if kind == 9:
            inner, count = number("I"), number("I")
            return [value(inner) for _ in range(count)]
        return number("BbHhIif?"[kind] if kind < 8 else "Qqd"[kind - 10])
    entries = {text().decode(): value(number("I")) for _ in range(number("I"))}
    rows = zip(*(entries[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type")))
    pieces = b"".join(write_field(1, write_field(1, token) + write_field(2, score) + write_field(3, kind))
                      for token, score, kind in rows)
    settings = write_field(2, write_field(3, 2) + write_field(35, 1)) + \
        write_field(3, write_field(3, 1) + write_field(4, 0))
    (folder / "tokenizer.model").write_bytes(pieces + settings)
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Vocabulary name -> model file, real ones fetched when first asked for."""
    files = {}

    def get(name: str) -> Path:
        if name not in files:
            folder = tmp_path_factory.mktemp(name)
            if name == "llama":
                files[name] = llama_model(folder)
            elif name == "mistral":
                files[name] = folder / "tokenizer.model"
                files[name].write_bytes(package_file(
                    "mistral-common==1.2.1", "mistral_common/data/tokenizer.model.v1",
                    "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"))
            else:
                files[name] = CASES / f"{name}.model"
        return files[name]
    return get


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def tokenizer_of(models, name: str, profile: str | None = None) -> TextTokenizer:
    """A vocabulary's tokenizer, with the added tokens of a recorded profile."""
    base = TextTokenizer(models(name))
    if profile:
        added = json.loads((CASES / "profiles.json").read_text())["llama"][profile]
        return TextTokenizer(models(name), {a["token"]: base.vocab_size + i for i, a in enumerate(added)},
                             {a["token"] for a in added if not a["special"]})
    return base


def normaliser(t: TextTokenizer) -> tuple[bool, bool]:
    """SentencePiece's settings add_dummy_prefix and remove_extra_whitespaces of a model file."""
    message = dict(read_message(next((v for n, v in read_message(t.model_bytes) if n == 3), b"")))
    return bool(message.get(3, 1)), bool(message.get(4, 1))


def encode_plain(t: TextTokenizer, text: str) -> list[int]:
    """SentencePiece's own encoding: no <s>, no added tokens, spaces treated as the model file says."""
    prefix, squeeze = normaliser(t)
    if squeeze:
        text = re.sub(" +", " ", text.lstrip(" "))
    if not text:
        return []
    text = (" " * prefix + text).replace(" ", SPACE)
    return t.merge(text.rstrip(SPACE) if squeeze else text)


def decode_plain(t: TextTokenizer, ids: list[int]) -> str:
    """SentencePiece's own decoding: no control pieces, spaces in front treated as the model file says."""
    prefix, squeeze = normaliser(t)
    pieces, at_start = [], prefix or squeeze
    for i in ids:
        piece, kind = t.pieces[i], t.types[i]
        if at_start and kind not in (CONTROL, UNKNOWN, BYTE):
            at_start = squeeze and piece == SPACE
            piece = piece.removeprefix(SPACE)
        elif kind in (UNKNOWN, BYTE):
            at_start = False
        if kind != CONTROL:
            pieces.append((i, piece.replace(SPACE, " ")))
    return t.spell(pieces)


def vocabularies(ending: str) -> list[str]:
    return sorted(f.name.removesuffix(ending) for f in CASES.glob("*" + ending))


@pytest.mark.parametrize("name", vocabularies("_sp.jsonl"))
def test_sentencepiece_cases(models, name):
    t, cases = tokenizer_of(models, name), lines(CASES / f"{name}_sp.jsonl")
    wrong = [c for c in cases
             if encode_plain(t, c["text"]) != c["ids"] or decode_plain(t, c["ids"]) != c["decoded"]]
    assert cases and not wrong, f"{len(wrong)} of {len(cases)}, first: {wrong[0]}"


@pytest.mark.parametrize("name", vocabularies("_hf.jsonl"))
def test_slow_llama_tokenizer_cases(models, name):
    cases = lines(CASES / f"{name}_hf.jsonl")
    for profile in sorted({c["profile"] for c in cases}):
        t = tokenizer_of(models, name, profile)
        for c in (c for c in cases if c["profile"] == profile):
            assert t.encode(c["text"]) == c["ids"], c
            decodings_agree(t, c)


def decodings_agree(t: TextTokenizer, c: dict) -> None:
    """Older transformers (`alt`, where recorded) decode some odd cases differently: ours are the older ones.

    By default transformers puts a space on either side of an added token.
    """
    expected = {**c, **c.get("alt", {})}
    assert " ".join(t.stretches(c["ids"])) == expected["decoded"], c
    assert " ".join(t.stretches(c["ids"], skip_special=True)) == expected["decoded_skip"], c
    assert t.decode(c["ids"]) == expected["decoded_nospace"], c


@pytest.mark.parametrize("name", sorted({*vocabularies("_decode.jsonl")} & {*vocabularies("_sp.jsonl")}))
def test_ids_that_no_encoder_produced(models, name):
    for c in lines(CASES / f"{name}_decode.jsonl"):
        if "decoded_sp" in c:
            assert decode_plain(tokenizer_of(models, name), c["ids"]) == c["decoded_sp"], c
        else:
            decodings_agree(tokenizer_of(models, name, c["profile"]), c)


@pytest.mark.parametrize("name", vocabularies("_image_prompt.jsonl"))
def test_image_prompts(models, name):
    t = tokenizer_of(models, name, "im")
    for c in lines(CASES / f"{name}_image_prompt.jsonl"):
        assert t.encode_with_images(c["text"]) == c["ids"], c


def test_a_trained_model_file_is_real_sentencepiece(tmp_path):
    """The reference library reads the toy world's tokenizer: same ids, same text. Common words stay whole."""
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = [shapes.caption(s) for s in shapes.SCENES]
    train_bpe(texts, 400, tmp_path / "tokenizer.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = TextTokenizer(tmp_path / "tokenizer.model")
    for text in texts + ["", " two  spaces ", "naïve ✓\n", "unknown words", "a"]:
        assert encode_plain(ours, text) == reference.encode(text)
        assert decode_plain(ours, reference.encode(text)) == reference.decode(reference.encode(text))
    assert len(encode_plain(ours, "a red circle at top left")) == 6


@pytest.mark.parametrize("unit", ["spaces make words. ", "nospaces"])
def test_encoding_time_grows_with_the_text_not_with_its_square(models, unit):
    t = TextTokenizer(models("tiny_llama"))
    times = []
    for repeat in (2000, 16000):
        t.cache.clear()
        began = time.perf_counter()
        t.encode(unit * repeat)
        times.append(time.perf_counter() - began)
    assert times[1] < 24 * times[0], "8 times the text may not cost 64 times the time"


@pytest.mark.parametrize("content", [b"", b"not a model at all", write_field(1, write_field(1, b"a"))])
def test_a_file_that_is_no_bpe_model_is_named(tmp_path, content):
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(UserError, match="tokenizer.model"):
        TextTokenizer(tmp_path / "tokenizer.model")


def test_a_missing_or_cut_tokenizer_is_named(models, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        TextTokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(models("tiny_llama").read_bytes()[:1000])
    with pytest.raises(UserError, match="tokenizer.model"):
        TextTokenizer(tmp_path / "tokenizer.model")


def test_a_full_cache_starts_again_and_changes_no_ids(models, monkeypatch):
    t, text = TextTokenizer(models("tiny_llama")), " ".join(f"word{i}" for i in range(50))
    ids = t.encode(text)
    t.cache.clear()
    monkeypatch.setattr(tokenizer, "CACHE_SIZE", 7)
    assert t.encode(text) == ids and 0 < len(t.cache) <= 7


def test_a_folder_is_read_as_it_was_saved(models, tmp_path):
    t = TextTokenizer(models("tiny_llama"))
    t.add(["<think>", "</think>"])
    t.save(tmp_path)
    again = TextTokenizer.from_folder(tmp_path)
    text = "<think>a red circle</think> at top left"
    assert again.encode(text) == t.encode(text) and again.vocab_size == t.vocab_size
    assert again.decode(again.encode(text)[1:], skip_special=True) == "a red circle at top left"


@pytest.mark.parametrize("file, content", [
    ("added_tokens.json", "[1, 2]"), ("added_tokens.json", "{"), ("tokenizer_config.json", "nothing"),
    ("tokenizer_config.json", '{"added_tokens_decoder": {"7": {"special": false}}}')])
def test_a_broken_file_beside_the_model_is_named(models, tmp_path, file, content):
    (tmp_path / "tokenizer.model").write_bytes(models("tiny_llama").read_bytes())
    (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=file):
        TextTokenizer.from_folder(tmp_path)


def test_ids_and_pieces_from_the_command_line(models, tmp_path):
    t = TextTokenizer(models("tiny_llama"))
    t.add(["<think>"])
    t.save(tmp_path)
    out = run("tokenizer.py", "--model", tmp_path, "--text", "<think>add salt")
    *rows, last = out.splitlines()
    assert [int(row.split()[0]) for row in rows] == t.encode("<think>add salt")
    assert rows[0].endswith("<s>") and rows[1].endswith("<think>") and last.endswith("<think>add salt")
    assert "tokenizer.model: no such file" in run("tokenizer.py", "--model", tmp_path / "no", check=2)
