"""Shared by all tests: the fixtures' folder and an untrained miniature, small enough to sample in milliseconds."""
import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
FIXTURES = Path(os.environ.get("FIXTURES", ROOT / "tests" / "fixtures"))


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """An untrained miniature whose text head favours tags, so that sampling hits every branch: images, tags, ends."""
    from tokenizer import IMAGE_END, IMAGE_START, THINK_END, THINK_START
    from warmup import miniature
    model = miniature(0, tmp_path_factory.mktemp("text")).eval()
    with torch.no_grad():
        for codebook in model.vision.quantizer.codebooks:
            codebook.weight.normal_()
        row = model.prompt("a red circle at top left")
        mean = model(row.tokens[None], row.is_image[None]).mean((0, 1))
        for token, logit in ((THINK_START, 4.2), (THINK_END, 4.5), (IMAGE_START, 6), (IMAGE_END, 4.8), ("</s>", 3.9)):
            model.decoder.lm_head.weight[model.text.id(token)] = logit * mean / mean.square().sum()
    return model
