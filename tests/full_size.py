"""The 7B model at full size, with random weights: memory and time of loading, sampling and one GRPO update.

    python tests/full_size.py make DIR                     # 16 GB in the published layout (a few minutes)
    python tests/full_size.py load DIR --quantize nf4      # load time and peak memory, in a fresh process
    python tests/full_size.py rollout DIR --out ROLLOUT    # (a) bf16 base + LoRA: rollout and one update
    python tests/full_size.py update DIR --out ROLLOUT     # (b) NF4 base + LoRA: update on the same rollout
    python tests/full_size.py plan                         # memory a GPU of both presets on 1, 8 and 32 GPUs
    python tests/full_size.py plan --check                 # ... and the plan of small models against updates
    python tests/full_size.py shard --size 200M            # a full fine-tune update, one process and two

Random weights speak no language, so `make` writes a small grammar into a few rows of the embedding and of
lm_head: every state carries one large component that makes the right next token likely. An answer is then
one short text and one picture in most cases, and the format reward differs within a group. Everything else
is normal noise.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Callable

import torch
from safetensors.torch import load_file, save_file

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)]
import data
import grpo
import memory_plan
from common import averaged, end_processes, peak_gib, process_count, process_rank, start_processes, whole
from model import (NAMES, DecoderConfig, DepthConfig, Sampling, UnifiedModel, load, prepare_training, rename,
                   trainable_state, with_trainable, write_configs)
from rewards import RulesText, RulesVisual
from tokenizer import (BYTE, CONTROL, IMAGE_END, IMAGE_START, NORMAL, SPECIAL_TOKENS, THINK_END, THINK_START,
                       UNKNOWN, TextTokenizer, VisionConfig, write_field)

DECODER = DecoderConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
                        num_attention_heads=32, vocab_size=32006, rope_factor=2.0, context=4096)
DEPTH = DepthConfig(width=2560, layers=6, heads=40)
VISION = VisionConfig(image_size=256, patch_size=16, width=1024, mlp_width=4096, layers=23, heads=16,
                      codebook_size=16384, depth=4, shared_codebook=True, ch=128, ch_mult=(1, 1, 2, 2, 4),
                      num_res_blocks=2, attn_resolutions=(16,), z_channels=256, resolution=256)
SIZES = {                                            # --size of `shard` -> decoder and depth transformer
    "50M": (replace(DECODER, hidden_size=512, intermediate_size=1408, num_hidden_layers=6,
                    num_attention_heads=8), DepthConfig(width=256, layers=3, heads=4)),
    "200M": (replace(DECODER, hidden_size=1024, intermediate_size=2816, num_hidden_layers=8,
                     num_attention_heads=8), DepthConfig(width=512, layers=3, heads=8)),
    "600M": (replace(DECODER, hidden_size=1536, intermediate_size=4224, num_hidden_layers=14,
                     num_attention_heads=12), DepthConfig(width=1024, layers=4, heads=16)),
    "1B": (replace(DECODER, hidden_size=2048, intermediate_size=5632, num_hidden_layers=16,
                   num_attention_heads=16), DepthConfig(width=1280, layers=6, heads=20)),
}
SHARD = 5 * 10 ** 9                                  # bytes
PROMPT = "How do I saute potatoes?"


def write_tokenizer(folder: Path) -> TextTokenizer:
    """A SentencePiece model with 32,000 pieces, most of them arbitrary single characters."""
    pieces = [("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)]
    pieces += [(f"<0x{b:02X}>", BYTE) for b in range(256)]
    pieces += [(chr(0x3400 + i), NORMAL) for i in range(32000 - len(pieces))]
    model = b"".join(write_field(1, write_field(1, p.encode()) + write_field(2, 0.0) + write_field(3, k))
                     for p, k in pieces)
    trainer, normalizer = write_field(3, 2) + write_field(35, 1), write_field(3, 1) + write_field(4, 0)
    (folder / "tokenizer.model").write_bytes(model + write_field(2, trainer) + write_field(3, normalizer))
    text = TextTokenizer(folder / "tokenizer.model")
    text.add(SPECIAL_TOKENS)
    return text


def noise(shape: torch.Size, generator: torch.Generator, std: float = 0.02) -> torch.Tensor:
    """Normal noise in bfloat16."""
    return torch.empty(shape).normal_(0, std, generator=generator).bfloat16()


def grammar(text: TextTokenizer, weights: dict[str, torch.Tensor]) -> None:
    """Write the grammar into `weights`, in place.

    Component i of a token's embedding says what kind it is, component i of an lm_head row what it may follow.
    """
    names = (THINK_START, THINK_END, IMAGE_START, IMAGE_END, "</s>")
    think, done, start, end, stop = (text.id(name) for name in names)
    colon = text.encode("ASSISTANT:")[-1]
    embed, head = weights["decoder.embed.weight"], weights["decoder.lm_head.weight"]
    kinds = {"word": 0, colon: 1, think: 2, done: 3, start: 4, "picture": 5, end: 6}
    embed[:, 0] = 4.0
    for token, i in kinds.items():
        if not isinstance(token, str):
            embed[token] = 0
            embed[token, i] = 4.0
    weights["projector.2.bias"][5] = 4.0
    words = text.encode("How do I saute potatoes")[1:9]
    follows = {1: [think], 2: words, 0: words + [done], 3: [start], 5: [end], 6: [stop]}
    for i, following in follows.items():
        head[following, i] = 1.05 if following == [stop] else 1.5      # half of the answers do not stop


def make(folder: Path) -> None:
    """Write decoder, projector, depth transformer and image tokenizer as published.

    What a loader has to leave alone is there too: SigLIP's text tower, the tower's last layer, the codebooks'
    running means.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.device("meta"):
        model = UnifiedModel(DECODER, DEPTH, VISION)
    model.system_prompt = ""
    write_configs(model, folder)
    model.text = write_tokenizer(folder / "llm")
    model.text.save(folder / "llm")
    back = {part: {ours: theirs for theirs, ours in table.items()} for part, table in NAMES.items()}
    special = {n: noise(p.shape, generator) for n, p in model.state_dict().items()
               if n in ("decoder.embed.weight", "decoder.lm_head.weight", "projector.2.bias")}
    grammar(model.text, special)

    def value(name: str, shape: torch.Size) -> torch.Tensor:
        if name in special:
            return special[name]
        if "norm" in name and name.endswith("weight"):
            return torch.ones(shape, dtype=torch.bfloat16)
        # Loud output projections would drown the grammar.
        quiet = name.startswith("decoder") and ("o_proj" in name or "down_proj" in name)
        return noise(shape, generator, 0.0005 if quiet else 0.02)
    for part in NAMES:
        named = {rename(name, back[part]): (name, tensor.shape) for name, tensor in model.state_dict().items()
                 if rename(name, back[part])}
        if part == "vision_tower":
            add_surplus(named)
        write_part(folder / part, named, value)


def add_surplus(named: dict[str, tuple[str, torch.Size]]) -> None:
    """Add the tensors of the vision tower that a loader has to leave alone."""
    tower = "rqvaesiglip.siglip_model."
    last = {n.replace(".layers.22.", ".layers.23."): v for n, v in named.items() if ".layers.22." in n}
    named |= last
    named |= {n.replace("vision_model", "text_model"): v for n, v in named.items()
              if n.startswith(tower + "vision_model.encoder")}
    named[tower + "text_model.embeddings.token_embedding.weight"] = ("", torch.Size((32000, 1024)))
    shapes = {"weight": (16385, 1024), "embed_ema": (16384, 1024), "cluster_size_ema": (16384,)}
    for d in range(4):                                  # one copy a depth, as the official save writes them
        for name, shape in shapes.items():
            named.setdefault(f"rqvaesiglip.quantizer.codebooks.{d}.{name}", ("", torch.Size(shape)))


def write_part(folder: Path, named: dict[str, tuple[str, torch.Size]], value: Callable) -> None:
    """Write one folder of the layout in files of at most SHARD bytes, with an index where there are several.

    named: name in the file -> (name in the model, shape). value(name, shape): the tensor.
    """
    shards, size = [[]], 0
    for theirs, (ours, shape) in named.items():
        if size + 2 * shape.numel() > SHARD:
            shards, size = shards + [[]], 0
        shards[-1].append((theirs, ours, shape))
        size += 2 * shape.numel()
    index = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {theirs: value(ours, shape) for theirs, ours, shape in shard}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        index |= {theirs: name for theirs in tensors}
        print(folder / name, f"{(folder / name).stat().st_size / 1e9:.2f} GB", flush=True)
    if len(shards) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def peak() -> str:
    """The most resident memory of this process so far."""
    return f"peak resident {peak_gib(torch.device('cpu')):.1f} GiB"


class Timer:
    """A with-block that prints the seconds and the peak memory of a phase."""

    def __init__(self, name: str):
        self.name = name

    def __enter__(self):
        self.began = time.perf_counter()

    def __exit__(self, *_):
        print(f"{self.name}: {time.perf_counter() - self.began:.1f} s, {peak()}", flush=True)


def update(folder: Path, quantize: str, rank: int, file: Path, sample: bool) -> None:
    """One GRPO update of a group of two answers: sampled here, or read from `file`."""
    config = grpo.Config(model=str(folder), reward_weights=(0.0, 0.0, 1.0), credit="outcome", group_size=2,
                         prompts_per_update=1, micro_batch=2, budget=300, quantize=quantize, lora_rank=rank,
                         checkpointing=True)
    with Timer("load"):
        policy = load(folder, "cpu", quantize)
        prepare_training(policy, rank, 16.0)
        policy.decoder.checkpointing = True
        reference = trainable_state(policy)
    if sample:
        with Timer("rollout"):
            batch = grpo.rollout(policy, [data.Sample(PROMPT, [])], config, (RulesText(), RulesVisual()),
                                 data.CodeCache(policy), [(0,)])
        for answer, score in zip(batch.answers, batch.scores):
            print(answer.layout, len(answer.step_of), "positions, format", score.format)
        columns = ("tokens", "is_image", "mask", "old_logp", "advantages")
        save_file({name: getattr(batch, name).contiguous() for name in columns}, file)
    else:
        batch = grpo.Rollout(samples=[], answers=[], scores=[], metrics={}, **load_file(file))
    arrays = batch.tokens, batch.is_image, batch.mask
    with Timer("reference"), torch.no_grad(), with_trainable(policy, reference):
        ref_logp = policy.log_probs(*arrays, Sampling())
    if not sample:
        batch.old_logp = ref_logp              # of the 4-bit model itself, so that its ratio starts at 1
    optimizer = torch.optim.Adam(policy.policy_parameters(), lr=1e-4)
    with Timer("update"):
        metrics = grpo.update(policy, optimizer, batch, ref_logp, config)
        print({name: round(value, 4) for name, value in metrics.items()})


def shard_update(size: str, out: Path) -> None:
    """One update of a full fine-tune in this process or its share of it -> loss, peak and weights in `out`.

    The model is random and float32. The two answers hold a picture each; of two processes each has one.
    """
    start_processes("cpu")
    torch.manual_seed(0)
    decoder, depth = SIZES[size]
    vision = replace(VISION, width=256, mlp_width=512, layers=1, ch=32, num_res_blocks=0, codebook_size=2048)
    policy = UnifiedModel(decoder, depth, vision)
    with torch.no_grad():
        for p in policy.parameters():
            if p.dim() > 1:
                p.normal_(0, 0.02)
    prepare_training(policy, 0, 16.0, precision="float32")
    policy.decoder.checkpointing = True
    reference = trainable_state(policy)
    config = grpo.Config(micro_batch=1, budget=320, group_size=2, prompts_per_update=1)
    batch = memory_plan.random_rollout(policy, 2, 20, config.budget, 1)
    rows = slice(process_rank() * 2 // process_count(), (process_rank() + 1) * 2 // process_count())
    for name in ("tokens", "is_image", "mask", "old_logp", "advantages"):
        setattr(batch, name, getattr(batch, name)[rows].clone())
    began = time.perf_counter()
    ref_logp = grpo.reference_logp(policy, reference, batch, config)
    batch.old_logp = ref_logp.clone()
    # Choice: this eps makes a step follow its gradient; Adam's own makes a first step its sign, noise too.
    optimizer = torch.optim.Adam(policy.policy_parameters(), lr=1e-4, eps=1e-4)
    metrics = averaged(grpo.update(policy, optimizer, batch, ref_logp, config))
    seconds = time.perf_counter() - began
    peak_mib = peak_gib(policy.device) * 2 ** 10
    peaks = averaged({"peak_max": peak_mib})
    steps = {name: whole(p.detach() - reference[name]).flatten()[::97].clone()
             for name, p in policy.named_parameters() if p.requires_grad}
    if process_rank() == 0:
        numbers = torch.tensor([metrics["loss"], metrics["grad_norm"], peaks["peak_max"], seconds,
                                sum(p.numel() for p in policy.policy_parameters())], dtype=torch.float64)
        save_file({**steps, "numbers": numbers}, out)
    end_processes()


def shard(size: str) -> tuple[dict, dict, float]:
    """One update by one process and by two (gloo) -> the numbers of both, and how far their steps lie apart.

    The last is |step of two - step of one| / |step of one|, over every 97th weight.
    """
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for processes in (1, 2):
            out = Path(folder) / f"{processes}.safetensors"
            torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"] * (processes > 1)
            command = [sys.executable, *torchrun, __file__, "shard-worker", str(out), "--size", size]
            subprocess.run(command, check=True, env={"OMP_NUM_THREADS": "1", **os.environ})
            results.append(load_file(out))
    names = ("loss", "grad_norm", "peak_mib", "seconds", "parameters")
    one, two = (dict(zip(names, result.pop("numbers").tolist())) for result in results)
    a, b = (torch.cat([result[name] for name in sorted(result)]) for result in results)
    return one, two, ((b - a).norm() / a.norm()).item()


class HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """The description as it stands, and every default in --help."""


def make_parser(description: str) -> argparse.ArgumentParser:
    """A command line whose --help shows the description as it stands and every default."""
    return argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    group = parser.add_argument_group("what to do")
    group.add_argument("what", metavar="STEP", help="one of the steps above",
                       choices=("make", "load", "rollout", "update", "plan", "shard", "shard-worker"))
    group.add_argument("folder", type=Path, nargs="?", default=Path("out/full_size"),
                       help="the checkpoint that `make` writes and others read")
    group = parser.add_argument_group("model")
    group.add_argument("--quantize", choices=("none", "nf4"), default="none",
                       help="of `load`: nf4 loads the decoder's linear layers in 4 bits")
    group.add_argument("--lora-rank", type=int, default=16,
                       help="of `rollout` and `update`: the adapters' rank")
    group.add_argument("--size", choices=SIZES, default="200M", help="of `shard`: 1B takes 24 GiB")
    group.add_argument("--check", action="store_true", help="of `plan`: hold it against small updates")
    group = parser.add_argument_group("files")
    group.add_argument("--out", type=Path, default=Path("rollout.safetensors"),
                       help="the trajectories that `rollout` writes and `update` reads")
    return parser.parse_args()


def main() -> None:
    """One of the steps."""
    args = parse_arguments()
    if args.what == "make":
        with Timer("make"):
            make(args.folder)
    elif args.what == "load":
        with Timer(f"load, quantize {args.quantize}"):
            load(args.folder, "cpu", args.quantize)
    elif args.what == "plan":
        print(memory_plan.table(memory_plan.Shapes(DECODER, DEPTH, VISION)))
        if args.check:
            print(memory_plan.check())
    elif args.what == "shard":
        one, two, apart = shard(args.size)
        print(f"one process {one}\ntwo, each   {two}")
        share = two["peak_mib"] / one["peak_mib"]
        print(f"peak memory of two, each: {share:.2f} of one process's; steps apart: {apart:.1e}")
    elif args.what == "shard-worker":
        shard_update(args.size, args.folder)
    else:
        update(args.folder, "none" if args.what == "rollout" else "nf4", args.lora_rank, args.out,
               args.what == "rollout")


if __name__ == "__main__":
    main()
