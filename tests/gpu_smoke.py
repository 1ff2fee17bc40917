"""Everything that a GPU must show, in one run: a table, part by part, so that a run that is cut loses little.

    python tests/gpu_smoke.py                              # one GPU with 12 GB
    python tests/gpu_smoke.py --device cpu --small         # does the script itself work? (2 minutes, no GPU)
    python tests/gpu_smoke.py --only parity seeds          # parts

parity      the recorded outputs of the official implementation (tests/fixtures/vila_u_tiny), computed there
seeds       the same seed gives the same answers as on the CPU, in float32, guided or not, for any --rows
judges      scores of the tiny ImageReward and CLIP and replies of the tiny LLaVA-Critic against the CPU's
decode      layers of the 7B model, 4 of 32, in bf16, NF4 and NF4 unpacked: positions/s and memory; waits for
            the device and copies to and from it at a position, counted by the profiler
update      one GRPO update of the same layers with adapters (bf16 base), and of all weights of a smaller
            model with passes in bf16
scratch     `python grpo.py` from nothing: image tokenizer, pretraining, warm-up, GRPO, both evaluations
"""
import argparse
import gc
import json
import math
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import numpy as np
import torch
from bench import (MIDDLE, MINIATURE, SMALL, WIDE, machine, make_parser, random_model, random_rollout,
                   to_4_bits)
from conftest import FIXTURES, ROOT, RUN, flags
from conftest import SMALL as FEW_STEPS
from full_size import DECODER, DEPTH
from safetensors.torch import load_file
from test_vila_u import arrays, published_vocabulary

import grpo
from common import read_lines
from judges import ClipScore, ImageReward, LlavaCritic
from model import DepthConfig, Sampling, UnifiedModel, load, prepare_training, unpacked
from tokenizer import pack

WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "aten::_local_scalar_dense")
COPIES = ("Memcpy DtoH", "Memcpy HtoD")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    group = parser.add_argument_group("what to run")
    group.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="the parts to run")
    group.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    group.add_argument("--small", action="store_true", help="few steps and small sizes")
    group.add_argument("--json", type=Path, help="a file that the table is written to as well")
    return parser.parse_args()


def memory_gib(device: torch.device) -> float:
    """Peak of the device's memory since the last call; NaN on a CPU."""
    if device.type != "cuda":
        return float("nan")
    peak = torch.cuda.max_memory_allocated() / 2 ** 30
    torch.cuda.reset_peak_memory_stats()
    return peak


def timed(device: torch.device, action: Callable, *arguments) -> float:
    """Seconds of one call after one to warm up, the device's work included."""
    action(*arguments)
    wait = torch.cuda.synchronize if device.type == "cuda" else nullcontext
    wait()
    began = time.perf_counter()
    action(*arguments)
    wait()
    return time.perf_counter() - began


# ------------------------------------------------------------------------------------------------------------
# Numbers

@torch.no_grad()
def parity(device: torch.device, small: bool) -> dict:
    """Official numbers on the device -> the largest difference of each; codes and greedy ids are equal."""
    e = load_file(FIXTURES / "vila_u_tiny" / "expected.safetensors")
    model = load(FIXTURES / "vila_u_tiny", device).eval()
    tokens, is_image = arrays(SimpleNamespace(vision_config=model.vision_config), e["inter.input_ids"],
                              e["inter.image_codes"])
    mask = torch.zeros(tokens.shape, dtype=torch.bool)
    mask[..., 0], mask[is_image] = e["logprob.text_mask"].bool(), True
    real, batch = e["inter.attention_mask"].bool(), [x.to(device) for x in (tokens, is_image, mask)]
    hidden = model(*batch[:2])
    before = hidden[:, :-1][batch[1][:, 1:]]
    with published_vocabulary(model, e["inter.text_logits"].shape[-1]):
        pairs = {"text logits": (model.decoder.lm_head(hidden).cpu()[real], e["inter.text_logits"][real]),
                 "log-probs of codes": (model.log_probs(*batch).cpu()[is_image],
                                        e["logprob.image"].flatten(0, 1))}
    logits = model.depth(before, model.vision.vectors(batch[0][batch[1]]))
    pairs |= {"hidden states": (hidden.cpu()[real], e["inter.hidden_states"][real]),
              "code logits": (logits.cpu(), e["inter.rq_logits"].flatten(0, 1)),
              "pixels": (model.vision.decode(e["decode.codes"].to(device)).cpu(), e["decode.pixels_fp32"])}
    codes = model.vision.encode(e["encode.pixel_values"].to(device)).cpu()
    assert torch.equal(codes, e["encode.codes"].flatten(1, 2)), "the image tokenizer's codes differ"
    for ids, where, expected in zip(e["text.left.input_ids"], e["text.left.attention_mask"].bool(),
                                    e["text.left.greedy_ids"]):
        prompt = pack([ids[where].tolist()], model.vision_config.depth)
        row, = model.generate([prompt], 1, len(expected), Sampling(temperature=0))
        assert torch.equal(row.tokens[:, 0], expected[:len(row.tokens)]), "greedy text differs"
    worst = {name: (ours - theirs).abs().max().item() for name, (ours, theirs) in pairs.items()}
    assert max(worst.values()) < 1e-4, worst
    return worst


def seeds(device: torch.device, small: bool) -> dict:
    """The share of equal decisions on both devices, and with fewer rows at a time. A few may lie within
    rounding of a boundary; what follows them in that answer then differs too."""
    results, models = {}, [load(FIXTURES / "vila_u_tiny", where).eval() for where in ("cpu", device)]
    budget = models[0].vision_config.positions + 8
    for guidance in (1.0, 3.0):
        rows = []
        for model, most in ((models[0], 0), (models[1], 0), (models[1], 3)):
            prompts = [model.prompt("a red circle"), model.prompt("a fox", draw=True)]
            rows.append(model.generate(prompts, 4, budget, Sampling(guidance=guidance), rows=most))
        for name, others in (("CPU and device", rows[1]), ("3 rows at a time", rows[2])):
            equal = [torch.equal(a.tokens, b.tokens) for a, b in zip(rows[0], others)]
            results[f"guidance {guidance:g}, {name}"] = sum(equal) / len(equal)
    assert min(results.values()) > 0.7, results
    return {f"equal answers, {name}": share for name, share in results.items()}


def judges(device: torch.device, small: bool) -> dict:
    """The tiny judges on device and CPU -> the largest difference of a score; replies are equal."""
    texts, pictures = ["a fox", "a red circle"], [np.full((30, 20, 3), v, np.uint8) for v in (40, 200)]
    worst = {}
    for name, kind in (("image_reward_tiny", ImageReward), ("clip_tiny", ClipScore)):
        ours, cpu = (kind(FIXTURES / name, where)(texts, pictures) for where in (device, "cpu"))
        worst[f"scores, {name}"] = max(abs(a - b) for a, b in zip(ours, cpu))
    asked = ["<image>\nhello", "hello"], [pictures[:1], []], 16
    critic = FIXTURES / "llava_critic_tiny"
    ours, cpu = (LlavaCritic(critic, where).replies(*asked) for where in (device, "cpu"))
    assert max(worst.values()) < 1e-3 and ours == cpu, (worst, ours, cpu)
    return worst


def scratch(device: torch.device, small: bool) -> dict:
    """grpo.py in an empty folder -> seconds, first and last reward."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        if small:
            start([ROOT / "warmup.py", "--out", "out/warmup", "--device", device, *flags(FEW_STEPS)], folder)
        settings = flags({**RUN, "device": device}) if small else ["--device", device]
        start([ROOT / "grpo.py", *settings], folder)
        lines = read_lines(Path(folder) / "out" / "grpo" / "metrics.jsonl")
    return {"seconds": time.perf_counter() - began, "updates": lines[-1]["update"],
            "reward of the first update": lines[0]["reward"], "of the last": lines[-1]["reward"]}


def start(command: list, folder: str) -> None:
    """Run a script of ours in `folder`. Its errors are shown where it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True,
                          timeout=300)
    if done.returncode:
        sys.exit(f"{command[0]} failed:\n{done.stderr[-3000:]}")


# ------------------------------------------------------------------------------------------------------------
# Speed

def seven_billion(device: torch.device, small: bool) -> UnifiedModel:
    """Layers of the 7B model and its image head with random weights in bf16; small: the miniature's."""
    if small:
        return random_model(MINIATURE, DepthConfig(96, 2, 4), SMALL, torch.bfloat16).to(device)
    return random_model(replace(DECODER, num_hidden_layers=4), DEPTH, WIDE, torch.bfloat16).to(device)


def answers(model: UnifiedModel, kind: str, rows: int, budget: int, guidance: float = 1.0) -> None:
    """`rows` answers of `budget` positions to one prompt of 64: text that never ends, or pictures."""
    model.unconditional_prompt = lambda: pack([[3, 4, 5]], model.vision_config.depth)
    model.opens_image = lambda prompt: kind == "image"
    prompt = pack([[3] * 64], model.vision_config.depth)
    model.generate([prompt], rows, budget, Sampling(guidance=guidance))


def waits(model: UnifiedModel, device: torch.device, kind: str) -> dict:
    """Waits for the device, and copies between it and the CPU, of one answer's pass over its positions.

    They are counted by the profiler. The prompt's own are among them: a few in all, not a few a position.
    """
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    N, count = model.vision_config.positions, Counter()
    with torch.profiler.profile(activities=activities) as profile:
        answers(model, kind, 4, N)
    for event in profile.profiler.kineto_results.events():       # raw: a list of objects takes a minute
        count.update(name for name in WAITS + COPIES if event.name().startswith(name))
    return {f"{name} a position, {kind}": count[name] / N for name in WAITS + COPIES}


def decode(device: torch.device, small: bool) -> dict:
    """Positions/s and memory of text and pictures, in bf16, NF4 and NF4 unpacked."""
    model, rows, results = seven_billion(device, small), 4 if small else 32, {}
    budget = model.vision_config.positions if small else 256
    memory_gib(device)
    for form in ("bf16", "nf4", "nf4 unpacked"):
        if form == "nf4":
            to_4_bits(model)
            layer = model.decoder.layers[0].mlp.up_proj
            rate = layer.in_features * layer.out_features / timed(device, lambda layer: layer.weight, layer)
            results["unpacking, G weights/s"] = rate / 1e9
            memory_gib(device)
        with unpacked(model) if form == "nf4 unpacked" else nullcontext():
            for kind, guidance in (("text", 1.0), ("image", 1.0), ("image", 3.0)):
                name = f"{form} {kind}{' guided' if guidance != 1 else ''}, {rows} rows"
                duration = timed(device, answers, model, kind, rows, budget, guidance)
                results[f"{name}: positions/s"] = rows * budget / duration
                results[f"{name}: GiB"] = memory_gib(device)
    return results | waits(model, device, "text") | waits(model, device, "image")


def update(device: torch.device, small: bool) -> dict:
    """Positions/s and memory of an update: adapters on a bf16 base; all weights, passes in bf16."""
    results = {}
    for name, rank, precision in (("bf16 base, adapters of rank 64", 64, "auto"),
                                  ("all weights, passes in bf16", 0, "bf16")):
        if rank or small:
            model, rows, length = seven_billion(device, small), 2, 300 if not small else 60
        else:
            model = random_model(MIDDLE, DepthConfig(512, 4, 8), SMALL, torch.float32).to(device)
            rows, length = 8, 160
        model.text = SimpleNamespace(id=["<im_start>", "</s>", "<think>", "</think>"].index)
        prepare_training(model, rank, 16.0, precision=precision)
        with device:
            batch = random_rollout(model, rows, length)
        config = grpo.Config(precision=precision, lora_rank=rank)
        optimizer = torch.optim.Adam(model.policy_parameters(), lr=1e-5)
        memory_gib(device)
        duration = timed(device, grpo.update, model, optimizer, batch, batch.old_logp, config)
        results[f"{name}: positions/s"] = rows * length / duration
        results[f"{name}: GiB"] = memory_gib(device)
    return results


# The longest last: a run that is cut then has the others.
PARTS = {part.__name__: part for part in (parity, seeds, judges, decode, update, scratch)}


def main() -> None:
    """The parts of --only in turn, each with its lines of the table."""
    args = parse_arguments()
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("no GPU is here: --device cpu --small tries the script")
    device, table = torch.device(args.device), {}
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    torch.backends.cudnn.allow_tf32 = False                # convolutions in float32, as recorded
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    failed = []
    print(f"{name}, {machine()}\n\n| part | what | value |\n| --- | --- | ---: |")
    for part in args.only:
        began, values = time.perf_counter(), {}
        gc.collect()                                       # or memory counts the models of earlier parts
        try:
            values = PARTS[part](device, args.small)
        except (Exception, SystemExit):                    # the other parts run
            traceback.print_exc()
            failed.append(part)
        table[part] = {**values, "seconds of this part": time.perf_counter() - began}
        for what, value in table[part].items():
            if not math.isnan(value):
                print(f"| {part} | {what} | {value:.3g} |", flush=True)
        if args.json:
            args.json.write_text(json.dumps({"device": name, **machine(), "table": table}, indent=1))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
