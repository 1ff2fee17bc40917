"""What is saved opens in other tools: llm/ in transformers' LlamaForCausalLM, adapters in PEFT and back.

Logits are compared in float64, so that the order of sums hides nothing.
"""
import json
import socket

import peft
import pytest
import torch
from conftest import FIXTURES
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from model import load, merge, prepare_training, save, trainable_state
from tokenizer import THINK_END, THINK_START

FOLDER = FIXTURES / "vila_u_tiny"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refused(*_):
        raise AssertionError("the network was asked")
    monkeypatch.setattr(socket.socket, "connect", refused)


@torch.no_grad()
def adapted():
    """The published checkpoint with adapters whose every number has been trained."""
    model = load(FOLDER)
    prepare_training(model, 3, 5.0)
    generator = torch.Generator().manual_seed(0)
    for p in model.policy_parameters():
        p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    return model.eval()


def rows(model) -> torch.Tensor:
    """Token ids of the whole vocabulary, the added ones included, in rows of one length."""
    ids = torch.randperm(model.text.vocab_size, generator=torch.Generator().manual_seed(0))
    return ids[:len(ids) // 5 * 5].view(5, -1)


@torch.no_grad()
def assert_equal_logits(ours, theirs):
    """ours: UnifiedModel, theirs: a LLaMA of transformers, with adapters or without."""
    ours, theirs, ids = ours.double(), theirs.eval().double(), rows(ours)
    tokens = torch.nn.functional.pad(ids[..., None], (0, ours.vision_config.depth - 1))
    expected = ours.decoder.lm_head(ours(tokens, torch.zeros_like(ids, dtype=torch.bool)))
    got = theirs(ids).logits
    assert got.shape == expected.shape and expected.std() > 0.1
    assert (got - expected).abs().max() < 1e-5


@pytest.mark.parametrize("of", ["published", "miniature"])
def test_a_saved_decoder_is_a_llama_of_transformers(of, tiny, tmp_path):
    save(load(FOLDER) if of == "published" else tiny, tmp_path / "saved")
    theirs, report = LlamaForCausalLM.from_pretrained(tmp_path / "saved" / "llm", output_loading_info=True)
    assert not any(report.values()), report
    assert_equal_logits(load(tmp_path / "saved"), theirs)


def test_saved_adapters_open_in_peft(tmp_path):
    model = adapted()
    save(model, tmp_path / "policy")
    base = LlamaForCausalLM.from_pretrained(FOLDER / "llm")
    base.resize_token_embeddings(model.text.vocab_size, mean_resizing=False)     # it lacks the added tokens
    assert_equal_logits(model, peft.PeftModel.from_pretrained(base, tmp_path / "policy"))


def test_adapters_on_a_saved_base_name_it_and_open_in_one_call(tmp_path):
    save(load(FOLDER), tmp_path / "base" / "policy")
    model = load(tmp_path / "base")
    prepare_training(model, 3, 5.0)
    save(model, tmp_path / "policy")
    theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "policy")
    assert theirs.peft_config["default"].base_model_name_or_path == str(tmp_path / "base" / "policy" / "llm")
    assert_equal_logits(model, theirs)


def test_adapters_of_peft_open_here(tmp_path):
    """PEFT trains and saves on the saved decoder. Loaded, merged and saved, the logits stay PEFT's."""
    save(load(FOLDER), tmp_path / "base")
    text = load(FOLDER).text
    ids = [text.id(THINK_START), text.id(THINK_END)]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, task_type="CAUSAL_LM",
        trainable_token_indices={"embed_tokens": ids, "lm_head": ids},
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    theirs = peft.get_peft_model(LlamaForCausalLM.from_pretrained(tmp_path / "base" / "llm"), config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.copy_(0.1 * torch.randn(p.shape, generator=generator))
    theirs.save_pretrained(tmp_path / "adapters")
    model, twin = load(tmp_path / "adapters"), load(tmp_path / "adapters")
    assert model.adapter == {"rank": 3, "alpha": 5.0}
    assert_equal_logits(model, theirs)
    merge(twin)
    save(twin, tmp_path / "merged")
    assert_equal_logits(load(tmp_path / "merged"), theirs)


def test_adapters_of_earlier_versions_are_read(tmp_path):
    model = adapted()
    save_file(trainable_state(model), tmp_path / "adapter.safetensors")
    (tmp_path / "adapter.json").write_text(json.dumps(
        {"base": str(FOLDER), "quantize": "none", "rank": 3, "alpha": 5.0}))
    again = load(tmp_path)
    assert again.adapter == model.adapter
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in trainable_state(model).items())
