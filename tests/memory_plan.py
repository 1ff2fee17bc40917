"""Memory of one GPU in GRPO, computed from shapes; `python tests/full_size.py plan` prints it.

What is added up, in bytes:

    weights      4-bit ones take 4.5 bits; a full fine-tune has float32 ones, shared by the processes (FSDP2)
    copy         bf16 weights of a full fine-tune: all of them in a rollout, two layers at a time in an update
    gradients, optimizer (two moments), reference     float32 of all that is trained; gradients in an update
    KV cache     the answers of a process, each with its prompt
    activations  of one micro-batch, layers recomputed in the backward pass (--checkpointing)
    judges       LLaVA-Critic in 4 bits, ImageReward in float32

A rollout and an update follow each other, so a GPU needs the larger of the two sums. Not in it: what CUDA and
its allocator take (1 to 3 GiB), and what judges need beside their weights. `check` holds the sums against the
storages that are alive in a real update of small models.
"""
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path

import torch
from full_size_judges import BERT, LARGE, QWEN, SIGLIP
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import grpo
import warmup
from judges import Blip, Llava
from model import (LINEAR, DecoderConfig, DepthConfig, KVCache, NF4Linear, UnifiedModel, prepare_training,
                   row_bytes, trainable_state)
from tokenizer import TowerConfig, VisionConfig

GIB = 2 ** 30
PARTS = ("weights", "copy", "gradients", "optimizer", "reference", "KV cache", "activations", "judges")


COPIES = 4           # of logits in float32 that are alive together: these, log-probs, their gradients


@dataclass
class Shapes:
    """A model's sizes and what its numbers of parameters follow from."""
    decoder: DecoderConfig
    depth: DepthConfig
    vision: VisionConfig

    def __post_init__(self):
        with torch.device("meta"):
            model = UnifiedModel(self.decoder, self.depth, self.vision)
        sizes = {name: p.numel() for name, p in model.named_parameters()}
        shapes = [p.shape for name, p in model.named_parameters() if LINEAR.fullmatch(name)]
        self.frozen = sum(n for name, n in sizes.items() if name.startswith("vision."))
        self.policy = sum(sizes.values()) - self.frozen
        self.linear = sum(shape.numel() for shape in shapes)
        self.adapter_columns = sum(sum(shape) for shape in shapes)           # times the rank: adapters

    def trained(self, rank: int) -> int:
        """Trained parameters: adapters and two rows of the embedding and of lm_head, or the whole policy."""
        return self.adapter_columns * rank + 4 * self.decoder.hidden_size if rank else self.policy


def judge_bytes(config: grpo.Config) -> float:
    """The published judges that a run uses."""
    with torch.device("meta"):
        critic, reward = Llava(QWEN, SIGLIP, "anyres_max_9", [(384, 384)]), Blip(
            TowerConfig(patch_size=16, **LARGE), BERT)
    total = 0.0
    if config.text_reward == "llava-critic":
        for name, p in critic.named_parameters():
            four_bits = config.critic_quantize == "nf4" and LINEAR.fullmatch(name)
            total += p.numel() * (4.5 / 8 if four_bits else 2)
    if config.visual_reward == "image-reward":
        total += 4 * sum(p.numel() for p in reward.parameters())
    return total


def activations(s: Shapes, config: grpo.Config, prompt: int, pictures: int, size: int) -> float:
    """The peak inside the backward pass of one micro-batch; numbers of `size` bytes, logits in float32.

    It is reached in the head of the codes or of the text, or in the first layer that is recomputed.
    """
    d, k, v = s.decoder, s.depth, s.vision
    B, T, N, D = config.micro_batch, prompt + config.budget, v.positions, v.depth
    inputs = (d.num_hidden_layers + 1) * B * T * d.hidden_size * size
    kv = d.hidden_size * (d.num_key_value_heads or d.num_attention_heads) // d.num_attention_heads
    layer = B * T * size * (8 * d.hidden_size + 4 * kv + 5 * d.intermediate_size)
    text = B * (config.budget - pictures * N) * d.vocab_size * 4 * COPIES
    codes = B * pictures * N * D
    image = codes * (v.codebook_size * 4 * COPIES + k.layers * 20 * k.width * size)
    return inputs + max(layer, text + image)


def plan(s: Shapes, config: grpo.Config, processes: int, prompt: int = 300, size: int = 2
         ) -> dict[str, float]:
    """Bytes a GPU, by PARTS and for the two phases. size: bytes a number in a pass.

    prompt: positions of a prompt, here one with a picture.
    """
    full = config.lora_rank == 0
    shares = processes if full else 1
    trained = s.trained(config.lora_rank)
    pictures = config.budget // (s.vision.positions + 40)                    # 40: words and tags of a step
    four_bits = config.quantize == "nf4"
    frozen = s.linear * (4.5 / 8 if four_bits else size) + (s.policy - s.linear) * size
    rows = config.rows or config.prompts_per_update * config.group_size // processes
    parts = {
        "weights": (4 * s.policy / shares if full else frozen + 4 * trained) + size * s.frozen,
        "copy": 2 * s.policy if full and size == 2 else 0,
        "gradients": 4 * trained / shares,
        "optimizer": 8 * trained / shares,
        "reference": 4 * trained / shares,
        "KV cache": rows * row_bytes(s.decoder, prompt + config.budget, size),
        "activations": activations(s, config, prompt, pictures, size),
        "judges": judge_bytes(config),
    }
    both = sum(parts[name] for name in ("weights", "optimizer", "reference", "judges"))
    layers = parts["copy"] if processes == 1 else parts["copy"] * (
        1 - s.linear / s.policy * (1 - 2 / s.decoder.num_hidden_layers))
    # Adam's step on a GPU holds another list of tensors (foreach), when the activations have gone.
    return {**parts, "rollout": both + parts["copy"] + parts["KV cache"],
            "update": both + parts["gradients"] + max(layers + parts["activations"], 4 * trained / shares)}


def table(s: Shapes) -> str:
    """Both presets on 1, 8 and 32 GPUs, in GiB."""
    names = (*PARTS, "rollout", "update")
    lines = [f"{'GiB a GPU':14}{'GPUs':>5}" + "".join(f"{name:>12}" for name in names)]
    for name, preset in grpo.PRESETS.items():
        for processes in (1, 8, 32):
            config = grpo.Config(**preset)
            config.prompts_per_update = max(config.prompts_per_update, processes)        # one each, at least
            values = plan(s, config, processes)
            cells = "".join(f"{values[part] / GIB:12.1f}" for part in names)
            lines.append(f"{name:14}{processes:5}{cells}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# The plan against a real update of a small model

class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are made inside a with-block and still alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, self.add, out)
        return out

    def add(self, tensor: torch.Tensor) -> None:
        storage = tensor.detach().untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.drop(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def drop(self, key: int, size: int) -> None:
        self.alive.pop(key, None)
        self.now -= size


PROMPT = 50
SMALL = {            # name -> width, MLP, layers, heads, vocabulary; rank of the adapters (0: all is trained)
    "full, deep": ((192, 520, 8, 4, 600), 0),
    "full, wide": ((384, 1040, 2, 6, 2000), 0),
    "QLoRA": ((192, 512, 6, 4, 3000), 16),
}


def small_model(sizes: tuple[int, ...], four_bits: bool) -> UnifiedModel:
    width, inner, layers, heads, vocabulary = sizes
    model = UnifiedModel(
        DecoderConfig(hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                      num_attention_heads=heads, vocab_size=vocabulary, context=1024),
        DepthConfig(width=96, layers=3, heads=4),
        VisionConfig(image_size=32, patch_size=8, width=64, mlp_width=128, layers=1, heads=16,
                     codebook_size=3000, depth=4, shared_codebook=True, ch=32, ch_mult=(1, 1, 1, 1),
                     num_res_blocks=0, attn_resolutions=(), z_channels=32, resolution=32))
    with tempfile.TemporaryDirectory() as folder:
        model.text = warmup.miniature(0, Path(folder)).text
    for owner in [part for layer in model.decoder.layers for part in (layer.attn, layer.mlp)] * four_bits:
        for name, child in list(owner.named_children()):
            setattr(owner, name, NF4Linear(child.weight.detach()))
    return model


def random_rollout(model: UnifiedModel, rows: int, prompt: int, budget: int, pictures: int) -> grpo.Rollout:
    """Answers of random words and codes, all of `budget` positions."""
    N, D, T = model.vision_config.positions, model.vision_config.depth, prompt + budget
    generator = torch.Generator().manual_seed(0)
    tokens, mask = torch.zeros(rows, T, D, dtype=torch.long), torch.zeros(rows, T, D, dtype=torch.bool)
    is_image = torch.zeros(rows, T, dtype=torch.bool)
    tokens[..., 0] = torch.randint(300, (rows, T), generator=generator)
    mask[:, prompt:, 0] = True
    for i in range(pictures):
        start = prompt + i * (N + 40) + 40
        place = slice(start, start + N)
        is_image[:, place] = mask[:, place] = True
        tokens[:, place] = torch.randint(model.vision_config.codebook_size, (rows, N, D), generator=generator)
    advantages = torch.randn(rows, T, 1, generator=generator)
    return grpo.Rollout([], [], [], tokens, is_image, mask, torch.zeros(rows, T, D), advantages, {})


def measure(sizes: tuple[int, ...], rank: int) -> tuple[dict[str, float], dict[str, float]]:
    """One update of two micro-batches in float32 -> bytes by part as planned, and as measured."""
    torch.manual_seed(0)
    model = small_model(sizes, rank > 0)
    config = grpo.Config(lora_rank=rank, quantize="nf4" if rank else "none", micro_batch=1, budget=200,
                         group_size=2, prompts_per_update=1, checkpointing=True)
    s = Shapes(model.decoder.config, model.depth_config, model.vision_config)
    planned = plan(s, config, 1, PROMPT, size=4)
    prepare_training(model, rank, 16.0)
    model.decoder.checkpointing = True
    optimizer = torch.optim.Adam(model.policy_parameters(), lr=1e-4)
    batch = random_rollout(model, 2, PROMPT, config.budget, config.budget // (s.vision.positions + 40))
    live = Live()
    for tensor in [*model.parameters(), *model.buffers()]:
        live.add(tensor)
    got = {"weights": live.now}
    with live:
        reference = trainable_state(model)                               # alive, as the KL's reference is
        got["reference"] = sum(x.untyped_storage().nbytes() for x in reference.values())
        cache = KVCache(len(model.decoder.layers), PROMPT + config.budget)
        model.prefill([model.prompt("a red circle at top left")] * 2, cache)
        got["KV cache"] = sum(x.untyped_storage().nbytes() for x in [*cache.k, *cache.v])
        del cache
        grpo.update(model, optimizer, batch, batch.old_logp, config)
        moments = [x for state in optimizer.state.values() for x in state.values()]
        got["optimizer"] = sum(x.untyped_storage().nbytes() for x in moments)
        got["gradients"] = sum(p.grad.untyped_storage().nbytes() for p in model.policy_parameters()
                               if p.grad is not None)
        del moments
        live.peak = live.now
        grpo.update(model, optimizer, batch, batch.old_logp, config)
    got["update"] = live.peak
    return {name: planned[name] for name in got}, got


def check() -> str:
    """A table of planned and measured MiB for some small models."""
    names = ("weights", "reference", "KV cache", "optimizer", "gradients", "update")
    lines = [f"{'MiB':12}{'':10}" + "".join(f"{name:>12}" for name in names)]
    for name, (sizes, rank) in SMALL.items():
        for kind, values in zip(("planned", "measured"), measure(sizes, rank)):
            cells = "".join(f"{values[part] / 2 ** 20:12.1f}" for part in names)
            lines.append(f"{name:12}{kind:10}{cells}")
    return "\n".join(lines)
