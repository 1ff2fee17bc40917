"""Every tensor is where the model is. No GPU is needed: torch's fake tensors have a device and no data.

Where devices are mixed they raise an error, as a GPU does. Values, and the backward pass through a whole
model, need a real one: tests/gpu_smoke.py.
"""
import ctypes
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import grpo
import model as model_module
from model import (ENDED, IMAGE, TEXT, DecoderConfig, DepthConfig, KVCache, LoRALinear, NF4Linear,
                   NF4Product, Sampling, UnifiedModel, decision_logp, from_nf4, guide, prepare_training,
                   sample_index, to_nf4, trainable_state, unpacked)
from tokenizer import Sequence, VisionConfig

GPU = torch.device("cuda:0")
DECODER = DecoderConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
                        vocab_size=50, num_key_value_heads=2, context=64)
VISION = VisionConfig(image_size=24, patch_size=8, width=64, mlp_width=64, layers=1, heads=4,
                      codebook_size=16, depth=4, shared_codebook=False, ch=32, ch_mult=(1, 1, 1, 1),
                      num_res_blocks=0, attn_resolutions=(), z_channels=32, resolution=24)
N, D, C = VISION.positions, VISION.depth, DECODER.hidden_size
TRUE = 2 * N                    # places of a mask that are True, whichever they are
aten = torch.ops.aten


class FakeGPU(FakeTensorMode):
    """Tensors without data. What only data could answer is answered here.

    Boolean indexing asks how many places of a mask are True: TRUE of them. A truth value is True, an integer
    the next of `integers`, any other number 1.0.
    """
    integers = iter(())

    def may_turn_const(self, tensor) -> bool:
        """No tensor keeps its number on the side: it could not be moved to a device that is not there."""
        return False

    def dispatch(self, func, types, args=(), kwargs=None):
        if func is aten.nonzero.default:
            places = torch.zeros(TRUE, args[0].dim(), dtype=torch.long, device="meta")
            return FakeTensor(self, places, args[0].device)
        if func is aten._local_scalar_dense.default:
            return {torch.bool: True, torch.long: next(self.integers, 1)}.get(args[0].dtype, 1.0)
        if func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default):
            places = {index.device for index in args[1] if index is not None}
            if not places <= {args[0].device, torch.device("cpu")}:        # torch's fake tensors let it pass
                raise RuntimeError(f"indices on another device: {places} into {args[0].device}")
        return super().dispatch(func, types, args, kwargs)


@pytest.fixture(scope="module", autouse=True)
def guard():
    """A torch that was built without CUDA has no guard that switches between GPUs. The meta device's, which
    does nothing, takes its place in torch's table while these tests run."""
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    cuda, meta, size = 1, 14, 15                                           # c10/core/DeviceType.h
    table = (ctypes.c_void_p * size).in_dll(ctypes.CDLL(str(library)),
                                            "_ZN3c104impl26device_guard_impl_registryE")
    before = table[cuda]
    table[cuda] = before or table[meta]
    yield
    table[cuda] = before


@pytest.fixture
def mode():
    """Inside it every tensor is fake. What is cached for a device is forgotten before and after."""
    caches = (model_module.nf4_tables, model_module.nf4_buffer)
    for cache in caches:
        cache.cache_clear()
    with FakeGPU(allow_non_fake_inputs=True) as mode:
        yield mode
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def model(mode):
    """The sizes of the miniature's image head around a small decoder, all of it on the GPU."""
    with GPU:
        model = UnifiedModel(DECODER, DepthConfig(width=32, layers=2, heads=4), VISION).eval()
    model.text = SimpleNamespace(id=["<im_start>", "</s>", "<think>", "</think>"].index)
    model.opens_image = lambda prompt: len(prompt) == 5
    model.unconditional_prompt = lambda: sequence(3)
    return model


def sequence(length: int) -> Sequence:
    """A prompt as the tokenizer makes it: on the CPU."""
    return Sequence(torch.zeros(length, D, dtype=torch.long), torch.zeros(length, dtype=torch.bool))


def on_gpu(*tensors) -> bool:
    return all(tensor.device == GPU for tensor in tensors)


def batch(rows: int = 2, length: int = 15) -> tuple:
    """Whole sequences on the GPU: tokens, is_image, mask."""
    return (torch.zeros(rows, length, D, dtype=torch.long, device=GPU),
            torch.zeros(rows, length, dtype=torch.bool, device=GPU),
            torch.ones(rows, length, D, dtype=torch.bool, device=GPU))


def to_nf4_layers(model) -> None:
    for layer in model.decoder.layers:
        for owner in (layer.attn, layer.mlp):
            for name, child in list(owner.named_children()):
                setattr(owner, name, NF4Linear(child.weight.detach()))


def test_mixed_devices_are_found(mode):
    """The check itself: what a GPU refuses is refused here."""
    for mix in (lambda a, b: a + b, lambda a, b: a @ b, lambda a, b: torch.cat((a, b)),
                lambda a, b: torch.where(a > 0, a, b), lambda a, b: torch.searchsorted(a, b),
                lambda a, b: a.gather(0, b.long()), lambda a, b: a.index_select(0, b[0].int()),
                lambda a, b: b[a.long()], lambda a, b: b.index_put((a.long(),), b[:4, None])):
        assert on_gpu(mix(*torch.zeros(2, 4, 4, device=GPU)))
        with pytest.raises(RuntimeError, match="device"):
            mix(torch.zeros(4, 4, device=GPU), torch.zeros(4, 4))


def test_the_decoder_and_its_cache(model):
    assert on_gpu(model.decoder(torch.zeros(2, 7, C, device=GPU)))
    cache = KVCache(DECODER.num_hidden_layers, 12)
    state = model.decoder.prefill([torch.zeros(n, C, device=GPU) for n in (7, 4)], cache)
    cache.select(torch.tensor([0, 0, 1], device=GPU))
    places = torch.tensor([7, 7, 4], device=GPU)
    assert on_gpu(state, model.decoder.step(torch.zeros(3, C, device=GPU), places, cache), cache.bias)


def test_the_depth_transformer_and_its_sampler(model):
    state, blank = torch.zeros(2, 3, C, device=GPU)
    assert on_gpu(model.depth(state, torch.zeros(3, D, VISION.width, device=GPU)))
    uniform = torch.rand(3, D, device=GPU)
    assert on_gpu(*model.sample_codes(state, None, uniform, Sampling()),
                  *model.sample_codes(state, blank, uniform, Sampling(guidance=3.0)))


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0), Sampling(0.7, 5, 0.9, 3.0)], ids=str)
def test_the_distribution_and_the_draw(mode, sampling):
    logits = torch.zeros(2, 3, 50, device=GPU)
    keep = torch.zeros(3, 1, dtype=torch.long, device=GPU)
    logp = decision_logp(guide(*logits, sampling.guidance), sampling, IMAGE, keep)
    assert on_gpu(logp, *sample_index(logp, torch.rand(3, device=GPU)))


def test_what_a_row_does_next(model):
    left, token = torch.zeros(2, 3, dtype=torch.long, device=GPU)
    columns = model.next_mode(token, torch.full((3,), TEXT, device=GPU), left, 5)
    assert on_gpu(*columns) and [column.shape for column in columns] == 3 * [(3,)]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(guidance=3.0)], ids=str)
def test_the_sampling_loop(model, mode, sampling):
    """Three rows in every mode: together, apart, and when the first has left the batch."""
    modes = [[TEXT, IMAGE, IMAGE], [ENDED, TEXT, IMAGE], [TEXT, IMAGE], [IMAGE, IMAGE], [ENDED, ENDED]]
    mode.integers = iter(sum([[TEXT, TEXT, IMAGE], *modes], []))
    columns = model.sample_rows([sequence(4), sequence(5)], torch.tensor([0, 0, 1]), torch.rand(3, 12, D),
                                sampling)
    assert on_gpu(*columns) and next(mode.integers, None) is None, "the loop went through all of them"


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(guidance=3.0)], ids=str)
def test_scoring(model, sampling):
    assert on_gpu(model.log_probs(*batch(), sampling))


def test_4_bit_weights_and_adapters(model, monkeypatch):
    weight = torch.zeros(96, 64, device=GPU, dtype=torch.bfloat16)
    packed, scales = to_nf4(weight)
    assert on_gpu(packed, scales, from_nf4(packed, scales, weight.shape, weight.dtype))
    kept = SimpleNamespace(saved_tensors=(packed, scales), shape=weight.shape)
    gradient, *_ = NF4Product.backward(kept, torch.zeros(5, 96, device=GPU, dtype=torch.bfloat16))
    assert on_gpu(gradient) and gradient.shape == (5, 64)
    to_nf4_layers(model)
    assert on_gpu(model.log_probs(*batch()))
    monkeypatch.setattr(LoRALinear, "to", lambda layer, device: layer)     # fake parameters do not move
    with GPU:
        prepare_training(model, 2, 4.0)
    assert on_gpu(*model.parameters(), model.log_probs(*batch()))
    with unpacked(model):
        assert on_gpu(model.log_probs(*batch()))
    assert on_gpu(model.decoder.lm_head.weight, model.decoder.layers[0].mlp.up_proj.merged().weight)


@pytest.mark.parametrize("per_modality", [False, True])
def test_loss_and_advantages(mode, per_modality):
    _, is_image, mask = batch()
    weights = grpo.decision_weights(mask, is_image, per_modality)
    logp, old, ref = torch.zeros(3, *mask.shape, device=GPU)
    advantages = grpo.outcome_advantages(torch.zeros(4, 2, device=GPU))
    values = advantages[0, :, None, None].expand_as(logp)
    assert on_gpu(weights, advantages, *grpo.grpo_loss(logp, old, ref, values, weights, 0.2, 0.1))


def test_the_reference_and_the_update(model, monkeypatch):
    """All of both but the backward pass."""
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: None)
    tokens, is_image, mask = batch()
    logp, values = torch.zeros(mask.shape, device=GPU), torch.zeros(*is_image.shape, 1, device=GPU)
    rollout = grpo.Rollout([], [], [], tokens, is_image, mask, logp, values, {})
    config = grpo.Config(micro_batch=1)
    ref_logp = grpo.reference_logp(model, trainable_state(model), rollout, config)
    optimizer = torch.optim.Adam(model.policy_parameters())
    metrics = grpo.update(model, optimizer, rollout, ref_logp, config)
    assert on_gpu(ref_logp) and "loss" in metrics


@pytest.mark.parametrize("where, function", [("rotary_table", model_module.rotary_table),
                                             ("nf4_tables", model_module.nf4_tables)])
def test_a_table_that_stays_on_the_cpu_is_found(model, monkeypatch, where, function):
    """These tests fail if one table is on the wrong device."""
    def misplaced(*arguments):
        return tuple(table.cpu() for table in function(*arguments))
    weight = torch.zeros(64, 64, device=GPU)
    monkeypatch.setattr(model_module, where, misplaced)
    with pytest.raises(RuntimeError, match="device"):
        if where == "nf4_tables":
            from_nf4(*to_nf4(weight), weight.shape, weight.dtype)
        else:
            model.decoder(torch.zeros(2, 7, C, device=GPU))
