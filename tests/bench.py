"""How fast decoding is against its floor: the bytes of weights a position reads over the memory's measured bandwidth.

    python tests/bench.py                   # layers as wide as the 7B model's, 4 of the 32; about two minutes
    python tests/bench.py --layers 32       # all of them (15 GiB)

A text position reads every decoder weight once for the whole batch; an image position reads the decoder and, D times,
the depth transformer. The head is 132 M weights in either case and counted with text positions. NF4 has a second floor
on a CPU: unpacking, measured here on one layer.
"""
import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from full_size import DECODER, DEPTH, VISION

from model import KVCache, NF4Linear, Sampling, UnifiedModel

CONTEXT = 300        # positions that the cache holds already


def seconds(action, repeats: int = 3) -> float:
    """The best of a few runs, after one to warm up."""
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return min(times[1:])


def size(module: torch.nn.Module) -> int:
    """Bytes of weights."""
    return sum(t.numel() * t.element_size() for t in [*module.parameters(), *module.buffers()])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    big = torch.empty(2 ** 28, dtype=torch.float32).fill_(1.0)                             # 1 GiB
    bandwidth = big.numel() * 4 / seconds(big.sum)
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}; memory read at {bandwidth / 1e9:.1f} GB/s")
    del big
    torch.set_default_dtype(torch.bfloat16)
    model = UnifiedModel(replace(DECODER, num_hidden_layers=args.layers), DEPTH, VISION).eval()
    torch.set_default_dtype(torch.float32)
    weight = model.decoder.layers[0].mlp.up_proj.weight
    for form in ("bf16", "nf4"):
        if form == "nf4":
            for owner in [part for layer in model.decoder.layers for part in (layer.attn, layer.mlp)]:
                for name, child in list(owner.named_children()):
                    setattr(owner, name, NF4Linear(child.weight))
            layer = NF4Linear(weight)
            rate = weight.numel() / seconds(lambda: layer.weight)
            unpack = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear)) / rate
            print(f"unpacking NF4: {rate / 1e9:.2f} G weights/s, {unpack:.2f} s a position at any batch")
        floors = {"text": size(model.decoder.layers) + size(model.decoder.lm_head),
                  "image": size(model.decoder.layers) + VISION.depth * size(model.depth)}
        for rows in (1, 4, 8):
            cache = KVCache(len(model.decoder.layers), CONTEXT + 1)
            x = torch.randn(rows, CONTEXT, DECODER.hidden_size, dtype=torch.bfloat16)
            model.decoder.prefill(list(x), cache)
            place, uniform = torch.full((rows,), CONTEXT), torch.rand(rows, VISION.depth)

            def state():
                cache.used = CONTEXT                           # the same slot again in every run
                return model.decoder.step(x[:, 0], place, cache)

            def text():
                return model.decoder.lm_head(state())

            def image():
                return model.sample_codes(state(), None, uniform, Sampling())
            for kind, action in (("text", text), ("image", image)):
                took, floor = seconds(action), floors[kind] / bandwidth
                print(f"{form:5} batch {rows}  {kind:5} {took:6.3f} s a position, {rows / took:6.2f} positions/s; "
                      f"floor {floor:.3f} s, {took / floor:.1f} times", flush=True)


if __name__ == "__main__":
    main()
