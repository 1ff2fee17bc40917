"""How fast decoding is against its floor: bytes of weights a position reads over the memory's bandwidth.

    python tests/bench.py                                  # layers as wide as the 7B model's, 4 of the 32
    python tests/bench.py --layers 32                      # all of them (15 GiB)
    python tests/bench.py --layers 1 --rows 1 --repeats 1  # the smallest settings: does it run?

A text position reads every decoder weight once for the whole batch. An image position reads the decoder once
and the depth transformer D times. The text head, 132 M weights, is counted with text positions. NF4 has a
second floor on a CPU: unpacking, measured here on one layer.
"""
import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Callable

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from full_size import DECODER, DEPTH, VISION, make_parser

from model import KVCache, NF4Linear, Sampling, UnifiedModel


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    group = parser.add_argument_group("model")
    group.add_argument("--layers", type=int, default=4, help="decoder layers, of the 7B model's 32")
    group.add_argument("--context", type=int, default=300, help="positions that the cache holds already")
    group = parser.add_argument_group("measurement")
    group.add_argument("--rows", type=int, nargs="+", default=[1, 4, 8], help="batch sizes to measure")
    group.add_argument("--repeats", type=int, default=3, help="measured runs, of which the best counts")
    return parser.parse_args()


def seconds(action: Callable, repeats: int) -> float:
    """The best time of a few runs of `action`, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def size(module: torch.nn.Module) -> int:
    """Bytes of weights."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


def memory_bandwidth(repeats: int) -> float:
    """Bytes a second at which memory is read."""
    block = torch.ones(2 ** 28)                                        # 1 GiB
    return block.numel() * block.element_size() / seconds(block.sum, repeats)


def quantize(model: UnifiedModel, repeats: int) -> None:
    """Replace the decoder's linear layers by 4-bit ones and print what unpacking them costs."""
    for layer in model.decoder.layers:
        for owner in (layer.attn, layer.mlp):
            for name, child in list(owner.named_children()):
                setattr(owner, name, NF4Linear(child.weight))
    first = model.decoder.layers[0].mlp.up_proj
    rate = first.in_features * first.out_features / seconds(lambda: first.weight, repeats)
    weights = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear))
    print(f"unpacking NF4: {rate / 1e9:.2f} G weights/s, {weights / rate:.2f} s a position at any batch")


class Position:
    """One more position of each row behind a cache of `context` positions, to be run again and again."""

    def __init__(self, model: UnifiedModel, rows: int, context: int):
        self.model, self.context = model, context
        self.cache = KVCache(len(model.decoder.layers), context + 1)
        prompts = list(torch.randn(rows, context, DECODER.hidden_size, dtype=torch.bfloat16))
        model.decoder.prefill(prompts, self.cache)
        self.x = prompts[0][:1].expand(rows, -1)                       # (rows, C)
        self.positions = torch.full((rows,), context)
        self.uniform = torch.rand(rows, VISION.depth)

    def step(self) -> torch.Tensor:
        """States [rows, C]. The slot is written again at every call."""
        self.cache.used = self.context
        return self.model.decoder.step(self.x, self.positions, self.cache)

    def text(self) -> torch.Tensor:
        """Logits of the next token."""
        return self.model.decoder.lm_head(self.step())

    def image(self) -> tuple[torch.Tensor, torch.Tensor]:
        """D codes and their log-probabilities."""
        return self.model.sample_codes(self.step(), None, self.uniform, Sampling())


def measure(model: UnifiedModel, form: str, bandwidth: float, args: argparse.Namespace) -> None:
    """Print the time of text and image positions against their floors, one line each."""
    layers = size(model.decoder.layers)
    floors = {"text": layers + size(model.decoder.lm_head),
              "image": layers + VISION.depth * size(model.depth)}
    for rows in args.rows:
        position = Position(model, rows, args.context)
        for kind, action in (("text", position.text), ("image", position.image)):
            duration, floor = seconds(action, args.repeats), floors[kind] / bandwidth
            print(f"{form:5} batch {rows}  {kind:5} {duration:6.3f} s a position, "
                  f"{rows / duration:6.2f} positions/s; floor {floor:.3f} s, {duration / floor:.1f} times",
                  flush=True)


@torch.inference_mode()
def main() -> None:
    """Measure memory, then the model in bfloat16, then with its decoder in 4 bits."""
    args = parse_arguments()
    bandwidth = memory_bandwidth(args.repeats)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; "
          f"memory read at {bandwidth / 1e9:.1f} GB/s", flush=True)
    torch.set_default_dtype(torch.bfloat16)
    model = UnifiedModel(replace(DECODER, num_hidden_layers=args.layers), DEPTH, VISION).eval()
    torch.set_default_dtype(torch.float32)
    measure(model, "bf16", bandwidth, args)
    quantize(model, args.repeats)
    measure(model, "nf4", bandwidth, args)


if __name__ == "__main__":
    main()
