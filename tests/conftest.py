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
    """An untrained miniature whose heads are sharp enough that sampling hits every branch: images, tags, ends."""
    from tokenizer import IMAGE_END, IMAGE_START, THINK_END, THINK_START
    from warmup import miniature
    model = miniature(0, tmp_path_factory.mktemp("text")).eval()
    with torch.no_grad():
        for codebook in model.vision.quantizer.codebooks:
            codebook.weight.normal_()
        favoured = [model.text.id(t) for t in (THINK_START, THINK_END, IMAGE_START, IMAGE_END, "</s>")]
        bias = model.decoder.embed.weight.mean(0)
        model.decoder.lm_head.weight[favoured] += 0.15 * torch.randn(len(favoured), len(bias))
    return model
