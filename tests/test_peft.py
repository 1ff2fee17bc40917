"""What is saved opens in other tools: llm/ in transformers' LlamaForCausalLM, adapters in PEFT and back, and
every config.json states what VILA-U's own code needs to build the tensors beside it.

Logits are compared in float64, so that the order of sums hides nothing.
"""
import json
import socket
from shutil import copytree

import peft
import pytest
import torch
from conftest import FIXTURES, run
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaForCausalLM

from common import UserError
from model import (DecoderConfig, DepthConfig, UnifiedModel, load, merge, prepare_training, save,
                   trainable_state)
from tokenizer import THINK_END, THINK_START, VisionConfig

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


# ------------------------------------------------------------------------------------------------------------
# config.json files: VILA-U's own code builds its model from their numbers

TOWER, CODES = "rqvaesiglip.siglip_model.vision_model.", "rqvaesiglip.quantizer.codebooks."
HEAD = "rqtransformer.head_transformer.blocks."
SIZES = {       # folder and key -> what official constructors make of the number: tensors and their sizes
    "llm/vocab_size": lambda t: t["model.embed_tokens.weight"][0],
    "llm/hidden_size": lambda t: t["model.embed_tokens.weight"][1],
    "llm/intermediate_size": lambda t: t["model.layers.0.mlp.gate_proj.weight"][0],
    "llm/num_hidden_layers": lambda t: count(t, "model.layers."),
    "llm/num_key_value_heads": lambda t: t["model.layers.0.self_attn.k_proj.weight"][0] // 8,
    "llm/num_attention_heads": lambda t: t["model.layers.0.self_attn.q_proj.weight"][0] // 8,
    "vision_tower/hidden_size": lambda t: t[TOWER + "embeddings.patch_embedding.weight"][0],
    "vision_tower/vision_layers_used": lambda t: count(t, TOWER + "encoder.layers."),
    "vision_tower/rqvaesiglip.n_embed": lambda t: t[CODES + "0.weight"][0] - 1,
    "vision_tower/rqvaesiglip.embed_dim": lambda t: t["rqvaesiglip.post_quant_conv.weight"][1],
    "vision_tower/rqvaesiglip.code_shape": lambda t: [*grid(t), count(t, CODES)],
    "vision_tower/rqvaesiglip.latent_shape": lambda t: [*grid(t), t[CODES + "0.weight"][1]],
    "vision_tower/rqvaesiglip.ddconfig.ch": lambda t: t["rqvaesiglip.decoder.conv_out.weight"][1],
    "vision_tower/rqvaesiglip.ddconfig.ch_mult": lambda t: multipliers(t),
    "vision_tower/rqvaesiglip.ddconfig.num_res_blocks":
        lambda t: count(t, "rqvaesiglip.decoder.up.0.block.") - 1,
    "vision_tower/rqvaesiglip.ddconfig.z_channels": lambda t: t["rqvaesiglip.decoder.conv_in.weight"][1],
    "vision_tower/rqvaesiglip.ddconfig.in_channels":
        lambda t: t[TOWER + "embeddings.patch_embedding.weight"][1],
    "vision_tower/rqvaesiglip.ddconfig.out_ch": lambda t: t["rqvaesiglip.decoder.conv_out.weight"][0],
    "vision_tower/rqvaesiglip.ddconfig.resolution":
        lambda t: grid(t)[0] * t[TOWER + "embeddings.patch_embedding.weight"][2],
    "vision_tower/rqvaesiglip.ddconfig.attn_resolutions": lambda t: [grid(t)[0]],     # at the lowest of three
    "vision_tower/rqtransformer.embed_dim": lambda t: t["rqtransformer.pos_emb_d"][2],
    "vision_tower/rqtransformer.block_size": lambda t: [*grid(t), t["rqtransformer.pos_emb_d"][1]],
    "vision_tower/rqtransformer.head.n_layer": lambda t: count(t, HEAD),
    "vision_tower/rqtransformer.head.block.n_head": lambda t: t[HEAD + "0.attn.query.weight"][0] // 8,
    "vision_tower/rqtransformer.input_embed_dim_1": lambda t: t["rqtransformer.in_mlp_1.weight"][1],
    "vision_tower/rqtransformer.input_embed_dim_2": lambda t: t["rqtransformer.in_mlp_2.weight"][1],
    "vision_tower/rqtransformer.vocab_size": lambda t: t["rqtransformer.classifier_mlp.linear.weight"][0],
    "/hidden_size": lambda t: t["layers.2.weight"][0],
    "/mm_hidden_size": lambda t: t["layers.0.weight"][1],
}
# Numbers that say nothing about a tensor. Heads: only their product with the width of a head is in one.
OTHER = {"llm/bos_token_id", "llm/eos_token_id", "llm/pad_token_id", "llm/max_position_embeddings"}
UNTOLD = {"llm/num_attention_heads", "vision_tower/rqtransformer.head.block.n_head",
          "vision_tower/rqvaesiglip.ddconfig.resolution"}


def count(shapes: dict, prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix)})


def grid(shapes: dict) -> list[int]:
    return [round(shapes[TOWER + "embeddings.position_embedding.weight"][0] ** 0.5)] * 2


def multipliers(shapes: dict) -> list[int]:
    levels = count(shapes, "rqvaesiglip.decoder.up.")
    width = [shapes[f"rqvaesiglip.decoder.up.{i}.block.0.conv2.weight"][0] for i in range(levels)]
    return [w // shapes["rqvaesiglip.decoder.conv_out.weight"][1] for w in width]


def numbers(config: dict, path: str) -> dict:
    """Every whole number and list of them in a config, by folder and key."""
    found = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= numbers(value, f"{path}{key}.")
        elif all(type(x) is int for x in (value if isinstance(value, list) else [value])):
            found[path + key] = value
    return found


@pytest.fixture(scope="module")
def odd(tiny, tmp_path_factory):
    """A saved model whose sizes all differ, 8 numbers a head."""
    model = UnifiedModel(
        DecoderConfig(hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=6,
                      num_key_value_heads=2, vocab_size=tiny.text.vocab_size, context=100),
        DepthConfig(width=40, layers=4, heads=5),
        VisionConfig(image_size=28, patch_size=4, width=64, mlp_width=56, layers=1, heads=16,
                     codebook_size=23, depth=9, shared_codebook=False, ch=32, ch_mult=(1, 2, 3),
                     num_res_blocks=2, attn_resolutions=(7,), z_channels=12, resolution=28))
    model.text = tiny.text
    folder = tmp_path_factory.mktemp("odd")
    save(model, folder)
    return folder


def test_every_number_of_a_saved_config_is_that_of_the_tensors_beside_it(odd):
    shapes, found = {}, {}
    for part in ("llm", "mm_projector", "vision_tower"):
        with safe_open(odd / part / "model.safetensors", "pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}
        config = json.loads((odd / part / "config.json").read_text())
        found |= numbers(config, f"{part}/")
        assert json.loads((odd / "config.json").read_text())[f"{part}_cfg"] == config
    top = json.loads((odd / "config.json").read_text())
    found |= numbers({key: value for key, value in top.items() if not key.endswith("_cfg")}, "/")
    assert found.keys() == SIZES.keys() | OTHER, "a number that nothing is held against"
    expected = {key: size(shapes) for key, size in SIZES.items()}
    assert {key: found[key] for key in SIZES} == expected
    load(odd)


@pytest.mark.parametrize("key", sorted(SIZES.keys() - UNTOLD))
def test_a_config_that_disagrees_with_its_tensors_is_refused(key, odd, tmp_path):
    copytree(odd, tmp_path / "bad")
    folder, path = key.split("/")
    file = tmp_path / "bad" / folder / "config.json"
    config = json.loads(file.read_text())
    *outer, last = path.split(".")
    inner = config
    for name in outer:
        inner = inner[name]
    if isinstance(inner[last], list):
        inner[last][-1] += 1
    else:
        inner[last] += 1
    file.write_text(json.dumps(config))
    with pytest.raises(UserError) as error:
        load(tmp_path / "bad")
    assert str(tmp_path / "bad") in str(error.value) or folder in str(error.value)
    assert "\n" not in str(error.value)


def test_what_a_published_config_says_beside_its_sizes_survives_saving_and_merging(tmp_path):
    """Every key of the published files, with its value, but for the two rows of the added tokens."""
    model = adapted()
    save(model, tmp_path / "adapters")
    run("model.py", "--model", tmp_path / "adapters", "--merge", tmp_path / "merged")
    save(load(FOLDER), tmp_path / "saved")

    def without_rows(config: dict) -> dict:
        llama = config.get("model_type") == "llama"
        return {key: without_rows(value) if isinstance(value, dict) else value
                for key, value in config.items() if not (llama and key == "vocab_size")}

    def within(part: dict, whole: dict) -> bool:
        return all(key in whole and (within(value, whole[key]) if isinstance(value, dict)
                                     else whole[key] == value) for key, value in part.items())
    for folder in ("", "llm", "mm_projector", "vision_tower"):
        before = without_rows(json.loads((FOLDER / folder / "config.json").read_text()))
        assert len(before) > 3
        for name in ("saved", "merged"):
            assert within(before, json.loads((tmp_path / name / folder / "config.json").read_text())), folder
    rows = {json.loads((tmp_path / "saved" / "llm" / "config.json").read_text())["vocab_size"],
            json.loads((tmp_path / "saved" / "config.json").read_text())["llm_cfg"]["vocab_size"]}
    assert rows == {model.text.vocab_size}
