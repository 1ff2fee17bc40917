"""Shared by all tests: the fixtures' folder, an untrained miniature that samples fast, a warm-up run."""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")                  # before torch is imported
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
os.environ["PET_MASTER_PORT"] = str(29500 + WORKER)            # torchrun's port, one for each worker

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FIXTURES = Path(os.environ.get("FIXTURES", ROOT / "tests" / "fixtures"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """An untrained miniature whose text head favours tags: sampling hits images, tags and ends."""
    from warmup import miniature
    model = miniature(0, tmp_path_factory.mktemp("text")).eval()
    for codebook in model.vision.quantizer.codebooks:
        torch.nn.init.normal_(codebook.weight)
    return talkative(model, "a red circle at top left")


@pytest.fixture(scope="session")
def talker(tiny, tmp_path_factory):
    """That miniature as a checkpoint. What `warm` samples is left to chance; this draws on any machine."""
    from model import save
    folder = tmp_path_factory.mktemp("talker")
    save(tiny, folder / "policy")
    return folder


@torch.no_grad()
def talkative(model, prompt: str):
    """Let the text head of an untrained model favour tags."""
    from tokenizer import IMAGE_END, IMAGE_START, THINK_END, THINK_START
    row = model.prompt(prompt)
    mean = model(row.tokens[None], row.is_image[None]).mean((0, 1))
    logits = {THINK_START: 4.2, THINK_END: 4.5, IMAGE_START: 6, IMAGE_END: 4.8, "</s>": 3.9}
    for token, logit in logits.items():
        model.decoder.lm_head.weight[model.text.id(token)] = logit * mean / mean.square().sum()
    return model


SMALL = dict(tokenizer_steps=10, pretrain_steps=6, warmup_steps=6, batch=4, save_every=4)
RUN = dict(updates=4, prompts_per_update=2, group_size=2, budget=48, save_every=2, eval_prompts=0,
           device="cpu")


def run(*arguments, check: int = 0, **environment) -> str:
    """A script in a process of its own, in the repository's root."""
    done = subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **environment})
    assert done.returncode == check, done.stderr[:3000]
    return done.stdout + done.stderr


def flags(settings: dict) -> list[str]:
    return [part for k, v in settings.items() for part in ("--" + k.replace("_", "-"), str(v))]


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """A warm-up run of a few steps: it knows nothing, but every part of it is real."""
    folder = tmp_path_factory.mktemp("runs") / "warmup"
    run("warmup.py", "--out", folder, *flags(SMALL))
    return folder


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def metrics(folder: Path) -> list[dict]:
    from common import read_lines
    lines = read_lines(folder / "metrics.jsonl")
    return [{k: v for k, v in line.items() if "seconds" not in k and k != "peak_gib"} for line in lines]


def killed_after(lines: int, start, monkeypatch) -> None:
    """Run until the given number of metric lines is written, then die where it stands."""
    import common
    with monkeypatch.context() as patch:
        log, count = common.Run.log, 0

        def dying(self, **values):
            nonlocal count
            count += 1
            if count > lines:
                raise KeyboardInterrupt
            log(self, **values)
        patch.setattr(common.Run, "log", dying)
        with pytest.raises(KeyboardInterrupt):
            start()


def shots(folder: Path, *names: str) -> None:
    """Picture files that are not square."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (30, 20), (200, 30, 30)).save(folder / name)


def write(path: Path, value: object) -> Path:
    """A text as it is, a list for *.jsonl as lines, anything else as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = isinstance(value, list) and path.suffix == ".jsonl"
    path.write_text("".join(json.dumps(v) + "\n" for v in value) if lines else
                    value if isinstance(value, str) else json.dumps(value, indent=1))
    return path
