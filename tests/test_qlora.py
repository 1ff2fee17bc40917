"""QLoRA: 4-bit weights against bitsandbytes, adapters against dense layers, and both scripts with them."""
import copy
import json
from dataclasses import fields

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, RUN, SMALL, killed_after, metrics, run, same

import grpo
import warmup
from common import UserError, parse_config
from model import (LINEAR, LoRALinear, NF4Linear, Sampling, from_nf4, load, load_training, merge,
                   prepare_training, save, to_nf4, trainable_state, unpacked, with_trainable)
from tokenizer import THINK_END, THINK_START

FOLDER = ROOT / "tests" / "fixtures" / "vila_u_tiny"
CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 128), (96, 344), (3, 64)])
def test_nf4_equals_bitsandbytes(dtype, shape):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    weight[0, :64] = 0                                                     # a block without a scale
    theirs, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    packed, scales = to_nf4(weight)
    assert torch.equal(packed, theirs.flatten()) and torch.equal(scales, state.absmax)
    assert torch.equal(from_nf4(packed, scales, shape, dtype), functional.dequantize_4bit(theirs, state))


def test_nf4_by_hand():
    weight = torch.zeros(1, 64)
    weight[0, :4] = torch.tensor([2.0, -2.0, 0.5, 0.1])                    # scale 2: 1, -1, .25, .05
    packed, scales = to_nf4(weight)
    assert scales.tolist() == [2.0] and packed[:2].tolist() == [15 << 4 | 0, 10 << 4 | 8]
    values = from_nf4(packed, scales, (1, 64), torch.float32)[0, :4].tolist()
    assert values == pytest.approx([2, -2, 2 * 0.2461123, 2 * 0.0795803])


def test_4_bit_layers_compute_and_differentiate_like_their_dense_twins():
    """Two of one size: they are unpacked into the same memory."""
    layers = [NF4Linear(torch.randn(64, 64), torch.randn(64)) for _ in range(2)]
    x, twin_x = (torch.ones(5, 64).requires_grad_() for _ in range(2))
    y, twin = x, twin_x
    for layer in layers:
        y, twin = layer(y), F.linear(twin, layer.weight, layer.bias)
    assert torch.equal(y, twin)
    y.square().sum().backward()
    twin.square().sum().backward()
    assert torch.equal(x.grad, twin_x.grad) and x.grad.abs().sum() > 0


def test_an_unpacked_base_gives_the_same_answers_and_is_packed_again_afterwards():
    model = load(FOLDER, quantize="nf4")
    prepare_training(model, 2, 4.0)
    prompts, budget = [model.prompt("a"), model.prompt("b", draw=True)], model.vision_config.positions + 2
    packed = model.generate(prompts, 2, budget)
    layers = [m for m in model.modules() if isinstance(m, NF4Linear)]
    with pytest.raises(KeyError), unpacked(model):
        assert layers and all(torch.equal(layer.full, layer.weight) for layer in layers)
        for layer in layers:
            layer.packed = None                                # not read while its copy is there
        full = model.generate(prompts, 2, budget)
        raise KeyError
    assert all(layer.full is None for layer in layers), "the copies are freed, after an error too"
    for a, b in zip(packed, full):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logp, b.logp)


def some_batch(model):
    """Text and, for the image head, codes: whole sequences, every position but the first a decision."""
    N, D = model.vision_config.positions, model.vision_config.depth
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(model.vision_config.codebook_size, (2, N, D), generator=generator)
    rows = [model.sequence(f"{THINK_START}a b{THINK_END}<im_start><image><im_end></s>", [c]) for c in codes]
    tokens, is_image = torch.stack([r.tokens for r in rows]), torch.stack([r.is_image for r in rows])
    mask = is_image[..., None] | (torch.arange(D) == 0)
    mask[:, 0] = False
    return tokens, is_image, mask


def test_loading_in_4_bits_quantises_the_decoders_linear_layers_and_nothing_else():
    dense, small = load(FOLDER), load(FOLDER, quantize="nf4")
    found = 0
    for name, value in dense.state_dict().items():
        path, _, leaf = name.rpartition(".")
        if LINEAR.fullmatch(name):
            layer, found = small.get_submodule(path), found + 1
            assert isinstance(layer, NF4Linear) and torch.equal(layer.packed, to_nf4(value)[0])
        else:
            assert torch.equal(small.state_dict()[name], value), name
    assert found == 7 * dense.decoder.config.num_hidden_layers


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_adapters_start_as_the_base_are_trained_alone_and_come_back(tmp_path, quantize):
    model = load(FOLDER, quantize=quantize)
    batch = some_batch(model)
    dense = model.log_probs(*batch)
    prepare_training(model, 4, 8.0)
    before = model.log_probs(*batch)
    # not bit by bit: on some CPUs torch takes another kernel once a layer's weights are frozen
    assert torch.allclose(before, dense, rtol=0, atol=2e-5), "a fresh adapter changes nothing"
    first = trainable_state(model)
    frozen = {k: v.clone() for k, v in model.state_dict().items() if k not in first}
    optimizer = torch.optim.Adam(model.policy_parameters(), lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        (-model.log_probs(*batch).sum() / batch[2].sum()).backward()
        optimizer.step()
    after = model.log_probs(*batch).detach()
    assert after.sum() > before.sum() + 1
    assert all(torch.equal(model.state_dict()[k], v) for k, v in frozen.items()), "the base moved"
    last = trainable_state(model)
    assert not any(torch.equal(first[k], v) for k, v in last.items()), "some adapter was left out"
    with torch.no_grad(), with_trainable(model, first):
        assert torch.equal(model.log_probs(*batch), before), "the reference is the first state"
    assert torch.equal(model.log_probs(*batch), after)
    save(model, tmp_path / "policy", {"step": 3})
    names = {f.name for f in (tmp_path / "policy").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "base.json", "training.json",
                     "training.safetensors", "written.json"}
    again = load(tmp_path)
    assert torch.equal(again.log_probs(*batch), after)
    assert same(trainable_state(again), trainable_state(model))
    merge(again)
    assert not any(isinstance(m, (LoRALinear, NF4Linear)) for m in again.modules())
    assert torch.allclose(again.log_probs(*batch), after, atol=1e-4)
    save(again, tmp_path / "merged")
    assert torch.allclose(load(tmp_path / "merged").log_probs(*batch), after, atol=1e-4)


def test_adapters_learn_to_tell_the_added_tokens_apart():
    """<think> and </think> start with equal rows: without trained rows no adapter could separate them."""
    model = load(FOLDER)
    prepare_training(model, 2, 4.0)
    think, done = model.text.id(THINK_START), model.text.id(THINK_END)
    tokens, is_image, mask = some_batch(model)
    with torch.no_grad():
        logits = model.decoder.lm_head(model(tokens, is_image))
    assert torch.equal(logits[..., think], logits[..., done])
    optimizer = torch.optim.Adam(model.policy_parameters(), lr=1e-2)
    model.log_probs(tokens, is_image, mask & (tokens == think)).sum().neg().backward()
    optimizer.step()
    with torch.no_grad():
        logits = model.decoder.lm_head(model(tokens, is_image))
    assert (logits[..., think] - logits[..., done]).abs().max() > 1e-3


def test_checkpointing_does_not_change_the_gradient():
    model = load(FOLDER)
    batch, gradients = some_batch(model), []
    for on in (False, True):
        model.decoder.checkpointing = on
        model.zero_grad()
        model.log_probs(*batch).sum().backward()
        parts = [p.grad.flatten() for p in model.policy_parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))
    assert torch.equal(*gradients) and gradients[0].norm() > 0


def test_a_bfloat16_checkpoint_is_trained_in_float32():
    model = load(FOLDER).to(torch.bfloat16)
    whole, small = copy.deepcopy(model), copy.deepcopy(model)
    prepare_training(whole, 0, 16.0)
    prepare_training(small, 2, 16.0)
    for m in (whole, small):
        assert {p.dtype for p in m.policy_parameters()} == {torch.float32}
        m.log_probs(*some_batch(m)).sum().backward()
    assert small.decoder.layers[0].attn.q_proj.base.weight.dtype == torch.bfloat16
    with torch.no_grad():
        rows = small.generate([small.prompt("a", draw=True)], 2, small.vision_config.positions + 2,
                              Sampling(guidance=3.0))
    assert all(r.is_image.sum() == small.vision_config.positions for r in rows)


def test_both_scripts_run_with_qlora_resume_and_merge(warm, tmp_path, monkeypatch):
    torch.set_num_threads(1)
    adapters = dict(lora_rank=4, quantize="nf4", checkpointing=True)
    config = warmup.Config(out=str(tmp_path / "w"), model=str(warm), device="cpu", micro_batch=3, **adapters,
                           **SMALL)
    killed_after(5, lambda: warmup.warm_up(config), monkeypatch)
    warmup.warm_up(config)
    assert warmup.is_done(tmp_path / "w")
    assert {line["stage"] for line in metrics(tmp_path / "w")} == {"warmup"}
    whole, cut = (grpo.Config(model=str(tmp_path / "w"), out=str(tmp_path / name), **adapters, **RUN)
                  for name in ("whole", "cut"))
    grpo.train(whole, 0, 1, CPU)
    killed_after(3, lambda: grpo.train(cut, 0, 1, CPU), monkeypatch)
    grpo.train(cut, 0, 1, CPU)
    states = [{**trainable_state(load(tmp_path / name)), **load_training(tmp_path / name / "policy")[1]}
              for name in ("whole", "cut")]
    assert same(*states) and metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    record, base = (json.loads((tmp_path / "whole" / "policy" / name).read_text())
                    for name in ("adapter_config.json", "base.json"))
    assert record["base_model_name_or_path"] == str(warm.resolve() / "policy" / "llm")
    assert record["r"] == 4 and base["quantize"] == "nf4"
    run("model.py", "--model", tmp_path / "whole", "--merge", tmp_path / "merged")
    merged, adapted = load(tmp_path / "merged"), load(tmp_path / "whole")
    logp, expected = merged.log_probs(*some_batch(merged)), adapted.log_probs(*some_batch(adapted))
    assert torch.allclose(logp, expected, atol=1e-4)


@pytest.mark.parametrize("preset", ["paper", "paper-full"])
@pytest.mark.parametrize("script, data", [
    (warmup, ["--data", f"openstory={ROOT},emova={ROOT},journeydb={ROOT}"]), (grpo, ["--prompts", "x"])])
def test_the_papers_presets_fill_in_and_flags_beside_them_win(script, data, preset):
    values = script.PRESETS[preset]
    assert set(values) <= {f.name for f in fields(script.Config)}
    config = parse_config(script.Config, ["--preset", preset, "--save-every", "8", *data], script.PRESETS)
    assert config.save_every == 8 and config.preset == preset
    expected = {name: value for name, value in values.items() if name != "save_every"}
    assert {name: getattr(config, name) for name in expected} == expected
    assert (config.lora_rank > 0, config.quantize) == ((False, "none") if "full" in preset else (True, "nf4"))
    script.check(config)
    if script is grpo:
        script.check(config, world=32 if "full" in preset else 8)
        assert (config.group_size, config.updates, config.eval_sampling) == (4, 3000, "published")
    else:
        assert config.batch % 32 == 0
    with pytest.raises(UserError, match="article: expected paper or paper-full"):
        parse_config(script.Config, ["--preset", "article"], script.PRESETS)


@pytest.mark.parametrize("arguments, said", [
    (["grpo.py", "--quantize", "nf4", "--model", FOLDER, "--budget", "40"], "--lora-rank"),
    (["grpo.py", "--unpack", "--model", FOLDER, "--budget", "40"], "--unpack"),
    (["grpo.py", "--quantize", "int8"], "--quantize int8"),
    (["grpo.py", "--lora-rank", "-1"], "--lora-rank -1"),
    (["warmup.py", "--lora-rank", "4"], "--model"),
    (["model.py", "--model", FOLDER, "--merge", "nowhere"], "no adapters"),
    (["grpo.py", "--model", FOLDER, "--budget", "2"], "--budget 2"),
    (["warmup.py", "--preset", "paper"], "--preset paper: expected --data"),
    (["grpo.py", "--preset", "paper-full", "--model", FOLDER], "--preset paper-full: expected --prompts"),
])
def test_adapter_mistakes_are_one_sentence_and_write_nothing(tmp_path, arguments, said):
    out = run(*arguments, *(["--out", tmp_path / "out"] if arguments[0] != "model.py" else []), check=2)
    assert said in out and "Traceback" not in out and len(out.strip().splitlines()) == 1, out
    assert not (tmp_path / "out").exists() and not (ROOT / "nowhere").exists()


def test_damaged_adapters_are_refused(tmp_path):
    model = load(FOLDER)
    prepare_training(model, 2, 4.0)
    save(model, tmp_path / "policy")
    file, record = (tmp_path / "policy" / name for name in ("adapter_model.safetensors",
                                                            "adapter_config.json"))
    whole, text = file.read_bytes(), record.read_text()
    think = model.text.id(THINK_START)
    for spoil, expected in ((lambda: file.write_bytes(whole[:-9]), "adapter_model.safetensors"),
                            (file.unlink, "no such file"),
                            (lambda: record.write_text(text.replace('"r": 2', '"r": 3')), "shape"),
                            (lambda: record.write_text(text.replace('"LORA"', '"IA3"')), "IA3"),
                            (lambda: record.write_text(text.replace('"r": 2', '"r": 2, "use_dora": true')),
                             "use_dora"),
                            (lambda: record.write_text(text.replace(str(think), "1")), "trainable_token"),
                            (lambda: record.write_text(text.replace("vila_u_tiny", "gone")), "base"),
                            (lambda: record.write_text("{}"), "lacks"),
                            (lambda: record.write_text("{"), "not JSON")):
        spoil()
        with pytest.raises(UserError, match=expected):
            load(tmp_path)
        file.write_bytes(whole)
        record.write_text(text)
    with pytest.raises(UserError, match="rank 2"):
        prepare_training(load(tmp_path), 8, 4.0)
