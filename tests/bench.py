"""How fast the model decodes and learns, against the floor of the memory's bandwidth where there is one.

    python tests/bench.py                              # everything, 4 minutes on two idle cores
    python tests/bench.py --only decode-7b             # layers as wide as the 7B model's, 4 of the 32
    python tests/bench.py --only decode-1b             # a whole model of 1 B weights
    python tests/bench.py --only update                # GRPO updates in positions/s
    python tests/bench.py --only memory                # peak memory of a decode that is cut by --rows
    python tests/bench.py --only decode-7b --layers 1 --batches 1 --rounds 1     # the smallest: does it run?

Decoding: a text position reads every decoder weight and the text head once for the whole batch. An image
position reads the decoder once and the depth transformer D times. These bytes over the bandwidth are the
floor. NF4 has a second floor on a CPU: unpacking, which is measured alone. A position is what `generate` does
at one: a decoder pass, the distribution, the draw. Values are medians.
"""
import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from full_size import DECODER, DEPTH, VISION, make_parser

import grpo
from common import peak_gib
from model import (DecoderConfig, DepthConfig, KVCache, NF4Linear, Sampling, UnifiedModel, unpacked)
from tokenizer import pack

PARTS = ("decode-7b", "decode-1b", "update", "memory")
WIDE = replace(VISION, layers=1)                           # the pictures' way in takes no part in decoding
BILLION = replace(DECODER, hidden_size=2048, intermediate_size=5504, num_hidden_layers=16,
                  num_attention_heads=16)
MINIATURE = DecoderConfig(hidden_size=128, intermediate_size=352, num_hidden_layers=4, num_attention_heads=4,
                          vocab_size=512, context=2048)
MIDDLE = DecoderConfig(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16,
                       vocab_size=8192, context=2048)
SMALL = replace(VISION, image_size=24, patch_size=8, width=64, mlp_width=128, layers=1, codebook_size=1024,
                ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=0, attn_resolutions=(), z_channels=32,
                resolution=24)
UPDATES = {"miniature": (MINIATURE, DepthConfig(96, 2, 4), 64, 96),        # sizes, rows, positions a row
           "width 1024": (MIDDLE, DepthConfig(512, 4, 8), 8, 160)}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    group = parser.add_argument_group("what to measure")
    group.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the parts to run")
    group.add_argument("--layers", type=int, default=4, help="7B: decoder layers, of the model's 32")
    group.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="rows that are decoded")
    group.add_argument("--context", type=int, default=300, help="positions that the cache holds already")
    group.add_argument("--rounds", type=int, default=7, help="measurements, of which the median counts")
    group.add_argument("--rows", type=int, nargs="+", default=[32, 8, 4], help="memory: rows of 32 at a time")
    group = parser.add_argument_group("results")
    group.add_argument("--json", type=Path, help="a file that the results are written to as well")
    group.add_argument("--peak", action="store_true", help="memory of one decode (what `memory` starts)")
    return parser.parse_args()


def machine() -> dict:
    """What the numbers belong to."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": names[0] if names else platform.processor(), "threads": torch.get_num_threads(),
            "torch": torch.__version__, "python": platform.python_version()}


def seconds(rounds: int, action: Callable, *arguments) -> float:
    """The median time of action(*arguments), after one run to warm up."""
    times = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        action(*arguments)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def random_model(decoder: DecoderConfig, depth: DepthConfig, vision, dtype: torch.dtype) -> UnifiedModel:
    """A model of these sizes with random weights, whose answers no token ends or turns into a picture."""
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    model = UnifiedModel(decoder, depth, vision).eval()
    torch.set_default_dtype(torch.float32)
    model.text = SimpleNamespace(id=lambda token: -1)
    return model


# ------------------------------------------------------------------------------------------------------------
# Decoding

def size(module: torch.nn.Module) -> int:
    """Bytes of weights."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def memory_bandwidth(rounds: int) -> float:
    """Bytes a second at which memory is read."""
    block = torch.ones(2 ** 28)                                        # 1 GiB
    return block.numel() * block.element_size() / seconds(rounds, block.sum)


def to_4_bits(model: UnifiedModel) -> None:
    """Replace the decoder's linear layers by 4-bit ones."""
    for layer in model.decoder.layers:
        for owner in (layer.attn, layer.mlp):
            for name, child in list(owner.named_children()):
                setattr(owner, name, NF4Linear(child.weight))


def unpacking(layer: NF4Linear, rounds: int) -> dict:
    """What one row pays for a layer that is packed, in weights a second."""
    x = torch.zeros(1, layer.in_features, dtype=torch.bfloat16)
    packed = seconds(rounds, layer, x)
    with unpacked(layer):
        extra = packed - seconds(rounds, layer, x)
    return {"what": "unpacking NF4", "G weights/s": layer.in_features * layer.out_features / extra / 1e9}


class Position:
    """One more position of each row behind a cache of `context` positions, to be run again and again."""

    def __init__(self, model: UnifiedModel, rows: int, context: int):
        self.model, self.context, width = model, context, model.decoder.config.hidden_size
        self.cache = KVCache(len(model.decoder.layers), context + 1)
        prompt = torch.randn(context, width, dtype=torch.bfloat16)
        model.decoder.prefill([prompt], self.cache)
        self.cache.select(torch.zeros(rows, dtype=torch.long))
        self.x = prompt[:1].expand(rows, -1)                           # (rows, C)
        self.positions, self.rows = torch.full((rows,), context), torch.arange(rows)
        self.uniform = torch.rand(rows, model.vision_config.depth)

    def run(self, kind: str) -> torch.Tensor:
        """Tokens [rows, D]. The slot is written again at every call."""
        self.cache.used = self.context
        state = self.model.decoder.step(self.x, self.positions, self.cache)
        rows = (self.rows, self.rows[:0]) if kind == "text" else (self.rows[:0], self.rows)
        return self.model.decide(state, *rows, None, self.uniform, Sampling())[0]


def decode(name: str, model: UnifiedModel, bandwidth: float, args: argparse.Namespace) -> list[dict]:
    """The time of text and image positions against their floors."""
    layers, results = size(model.decoder.layers), []
    floors = {"text": layers + size(model.decoder.lm_head),
              "image": layers + model.vision_config.depth * size(model.depth)}
    for batch in args.batches:
        position = Position(model, batch, args.context)
        for kind in floors:
            duration, floor = seconds(args.rounds, position.run, kind), floors[kind] / bandwidth
            results.append(show({"what": f"{name} {kind}", "batch": batch, "seconds": duration,
                                 "positions/s": batch / duration, "floor": floor,
                                 "times floor": duration / floor}))
    return results


@torch.inference_mode()
def decode_all(name: str, config: DecoderConfig, depth: DepthConfig, args: argparse.Namespace) -> list[dict]:
    """bfloat16, then the same decoder in 4 bits."""
    bandwidth = memory_bandwidth(args.rounds)
    results = [show({"what": "reading memory", "GB/s": bandwidth / 1e9})]
    model = random_model(config, depth, WIDE, torch.bfloat16)
    results += decode(f"{name} bf16", model, bandwidth, args)
    to_4_bits(model)
    results.append(show(unpacking(model.decoder.layers[0].mlp.up_proj, args.rounds)))
    return results + decode(f"{name} nf4", model, bandwidth, args)


# ------------------------------------------------------------------------------------------------------------
# Updates and memory

def random_rollout(model: UnifiedModel, rows: int, length: int, pictures: bool = True) -> grpo.Rollout:
    """Answers of random tokens, a text and a picture in turn, behind prompts of 16 positions."""
    N, D = model.vision_config.positions, model.vision_config.depth
    is_image = torch.zeros(rows, length, dtype=torch.bool)
    for start in range(26, length - N, 10 + N) if pictures else ():
        is_image[:, start:start + N] = True
    tokens = torch.randint(model.decoder.config.vocab_size, (rows, length, D))
    tokens = torch.where(is_image[..., None], tokens % model.vision_config.codebook_size, tokens)
    mask = is_image[..., None] | (torch.arange(D) == 0)
    mask[:, :16] = False
    with torch.no_grad():
        logp = model.log_probs(tokens, is_image, mask)
    return grpo.Rollout([], [], [], tokens, is_image, mask, logp, torch.randn(rows, length, 1), {})


def update(args: argparse.Namespace) -> list[dict]:
    """One GRPO update of all weights in float32: forward, backward, optimizer."""
    results = []
    for name, (decoder, depth, rows, length) in UPDATES.items():
        model = random_model(decoder, depth, SMALL, torch.float32)
        batch, config = random_rollout(model, rows, length), grpo.Config()
        optimizer = torch.optim.Adam(model.policy_parameters(), lr=1e-5)
        duration = seconds(args.rounds, grpo.update, model, optimizer, batch, batch.old_logp, config)
        results.append(show({"what": f"update {name}", "batch": rows, "seconds": duration,
                             "positions/s": rows * length / duration}))
    return results


@torch.inference_mode()
def peak(args: argparse.Namespace) -> None:
    """Decode 32 answers to one prompt of 1,000 positions, --rows at a time -> the process's peak memory."""
    model = random_model(replace(DECODER, num_hidden_layers=args.layers), replace(DEPTH, layers=1), WIDE,
                         torch.bfloat16)
    before = peak_gib(model.device)
    prompt = pack([[3] * 1000], model.vision_config.depth)
    model.generate([prompt], 32, 8, Sampling(), rows=args.rows[0])
    print(json.dumps({"weights GiB": before, "peak GiB": peak_gib(model.device)}))


def memory(args: argparse.Namespace) -> list[dict]:
    """The same decode with fewer and fewer rows in the KV cache, each in a process of its own."""
    results = []
    for rows in args.rows:
        command = [sys.executable, __file__, "--peak", "--rows", rows, "--layers", args.layers]
        out = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
        results.append(show({"what": f"memory 7B-shaped, {args.layers} layers, 32 answers", "rows": rows,
                             **json.loads(out.splitlines()[-1])}))
    return results


def show(result: dict) -> dict:
    """Print one line of the table."""
    print("  ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
                    for name, value in result.items()).removeprefix("what "), flush=True)
    return result


def main() -> None:
    """The parts of --only, one after the other."""
    args = parse_arguments()
    if args.peak:
        peak(args)
        return
    print(machine(), flush=True)
    wide = replace(DECODER, num_hidden_layers=args.layers)
    parts = {"decode-7b": partial(decode_all, "7B", wide, DEPTH),
             "decode-1b": partial(decode_all, "1B", BILLION, DepthConfig(width=1280, layers=6, heads=20)),
             "update": update, "memory": memory}
    results = [result for part in PARTS if part in args.only for result in parts[part](args)]
    if args.json:
        args.json.write_text(json.dumps({"machine": machine(), "results": results}, indent=1))


if __name__ == "__main__":
    main()
