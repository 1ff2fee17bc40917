"""The same work by others: a GRPO update by TRL, answers of text by transformers. Times are ours / theirs.

    python -m venv /tmp/peers
    /tmp/peers/bin/pip install -r tests/requirements.txt trl==1.16.0          # transformers==5.24.0 is in it
    /tmp/peers/bin/python tests/bench_peers.py --types fp32 bf16      # everything, 8 minutes on two cores
    /tmp/peers/bin/python tests/bench_peers.py --only generate --sizes miniature --rounds 3 --batches 1 8

Both sides have the same LLaMA weights, rows and lengths, and run in turn in one process, so that what else
the machine does meets both. A line gives the median of the rounds' ratios, their smallest and their largest.

update: loss, backward pass, clipping, Adam, of answers of text alone, with the KL to a reference whose
    log-probabilities are there already. TRL computes the entropy as well. The two losses must agree.
generate: greedy answers of a fixed length to equal prompts, which must be the same tokens. With --sampled
    both draw at temperature 1 instead, and answers differ. Ours keeps the log-probabilities too.
memory: the peak of one update, each side in a process of its own, imports included.

VILA-U's own sampler of pictures is no package that pip could install. It is not measured here.
"""
import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import torch
from bench import MIDDLE, MINIATURE, SMALL, machine, make_parser, random_model, random_rollout, show

import grpo
from common import peak_gib
from model import NAMES, DepthConfig, Sampling, UnifiedModel, rename
from tokenizer import pack

PARTS = ("update", "generate", "memory")
SIZES = {"miniature": MINIATURE, "width-1024": MIDDLE}
ROWS = {"miniature": 64, "width-1024": 8}                  # of an update
PROMPT, ANSWER = 16, 112                                   # positions of an update's rows
KL, LR = 0.2, 1e-5
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = make_parser(__doc__)
    group = parser.add_argument_group("what to measure")
    group.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="the parts to run")
    group.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="of the decoder")
    group.add_argument("--types", nargs="+", choices=TYPES, default=["fp32"], help="of the weights")
    group.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32], help="generate: rows")
    group.add_argument("--tokens", type=int, default=48, help="generate: length of an answer")
    group.add_argument("--sampled", action="store_true", help="generate: draw at temperature 1")
    group.add_argument("--rounds", type=int, default=7, help="times that both sides run in turn")
    group = parser.add_argument_group("results")
    group.add_argument("--json", type=Path, help="a file that the results are written to as well")
    group.add_argument("--peak", choices=("ours", "theirs"), help="memory of one side (what `memory` starts)")
    return parser.parse_args()


def llama(model: UnifiedModel):
    """The same decoder as transformers' LLaMA. It has weights of its own with the same values."""
    from transformers import LlamaConfig, LlamaForCausalLM
    c = model.decoder.config
    config = LlamaConfig(hidden_size=c.hidden_size, intermediate_size=c.intermediate_size,
                         num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
                         num_key_value_heads=c.num_attention_heads, vocab_size=c.vocab_size,
                         rms_norm_eps=c.rms_norm_eps, max_position_embeddings=c.context, use_cache=True,
                         bos_token_id=1, eos_token_id=None, pad_token_id=0, tie_word_embeddings=False)
    theirs = LlamaForCausalLM(config).to(model.decoder.norm.weight.dtype).eval()
    back = {ours: name for name, ours in NAMES["llm"].items()}
    theirs.load_state_dict({rename(name, back): weight.clone() for name, weight in model.state_dict().items()
                            if rename(name, back)})
    return theirs


def alternate(rounds: int, ours: Callable, theirs: Callable) -> dict:
    """Run both in turn, once to warm up and then `rounds` times -> median times, ratios ours / theirs."""
    times = {ours: [], theirs: []}
    for _ in range(rounds + 1):
        for side in (ours, theirs):
            began = time.perf_counter()
            side()
            times[side].append(time.perf_counter() - began)
    pairs = list(zip(times[ours][1:], times[theirs][1:]))
    ratios = [a / b for a, b in pairs]
    return {"ours s": statistics.median(a for a, _ in pairs),
            "theirs s": statistics.median(b for _, b in pairs),
            "ratio": statistics.median(ratios), "min": min(ratios), "max": max(ratios), "rounds": rounds}


# ------------------------------------------------------------------------------------------------------------
# An update

@dataclass
class Work:
    """One update's rows: the model, ours as a rollout, and the same in TRL's words."""
    model: UnifiedModel
    batch: grpo.Rollout
    inputs: dict[str, torch.Tensor]


def work(size: str, dtype: torch.dtype) -> Work:
    """Random answers of text, their log-probabilities, and a reference that differs a little."""
    model = random_model(SIZES[size], DepthConfig(96, 2, 4), SMALL, dtype)
    batch = random_rollout(model, ROWS[size], PROMPT + ANSWER, pictures=False)
    batch.advantages = torch.randn(len(batch.tokens), 1, 1).expand(-1, PROMPT + ANSWER, -1)
    ids, old = batch.tokens[..., 0], batch.old_logp[:, PROMPT:, 0]
    ones = torch.ones_like(ids)
    inputs = {"prompt_ids": ids[:, :PROMPT], "prompt_mask": ones[:, :PROMPT],
              "completion_ids": ids[:, PROMPT:], "completion_mask": ones[:, PROMPT:],
              "advantages": batch.advantages[:, 0, 0],
              "old_per_token_logps": old, "ref_per_token_logps": old - 0.1,
              "num_items_in_batch": torch.tensor(old.numel())}
    return Work(model, batch, inputs)


def our_update(of: Work) -> Callable:
    """A call that makes one update and returns its loss."""
    config = grpo.Config(kl=KL, clip=0.2)
    policy = [*of.model.decoder.parameters()]
    of.model.requires_grad_(False)
    for parameter in policy:
        parameter.requires_grad_(True)
    optimizer, reference = torch.optim.Adam(policy, lr=LR), of.batch.old_logp - 0.1
    return lambda: grpo.update(of.model, optimizer, of.batch, reference, config)["loss"]


def trl_update(of: Work, folder: Path) -> Callable:
    """The same by TRL's trainer: its loss, then what its loop does with it."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import GRPOConfig, GRPOTrainer
    theirs = llama(of.model)
    theirs.save_pretrained(folder / "model")
    words = {"<pad>": 0, "<s>": 1, "</s>": 2, "a": 3}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="a")),
                                        pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    config = GRPOConfig(output_dir=str(folder), use_cpu=True, beta=KL, epsilon=0.2, loss_type="grpo",
                        bf16=False, report_to=[], activation_checkpointing=False, num_generations=2,
                        per_device_train_batch_size=2, max_completion_length=ANSWER, temperature=1.0,
                        model_init_kwargs={"dtype": str(theirs.dtype).removeprefix("torch.")})
    trainer = GRPOTrainer(model=str(folder / "model"), reward_funcs=lambda completions, **_: [0.0, 1.0],
                          args=config, train_dataset=Dataset.from_dict({"prompt": ["a", "a"]}),
                          processing_class=tokenizer)
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.train()
    optimizer = torch.optim.Adam(model.parameters(), lr=LR, betas=(0.9, 0.999))

    def step() -> float:
        optimizer.zero_grad()
        loss = trainer.compute_loss(model, of.inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.item()
    return step


def update(args: argparse.Namespace) -> list[dict]:
    """One update of every size and type, in turn by both."""
    results = []
    for size in args.sizes:
        for dtype in args.types:
            of = work(size, TYPES[dtype])
            with tempfile.TemporaryDirectory() as folder:
                theirs = trl_update(of, Path(folder))
                ours = our_update(of)
                a, b = ours(), theirs()
                if abs(a - b) > (1e-4 if dtype == "fp32" else 0.02):
                    sys.exit(f"the losses differ: {a} and {b}")
                results.append(show({"what": f"update {size} {dtype}", "batch": ROWS[size], "loss": a,
                                     "their loss": b, **alternate(args.rounds, ours, theirs)}))
    return results


def memory(args: argparse.Namespace) -> list[dict]:
    """The peak of one update by each side."""
    results = []
    for size in args.sizes:
        for dtype in args.types:
            peaks = {}
            for side in ("ours", "theirs"):
                command = [sys.executable, __file__, "--peak", side, "--sizes", size, "--types", dtype]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                peaks[f"{side} GiB"] = float(out.splitlines()[-1])
            results.append(show({"what": f"memory of an update {size} {dtype}", **peaks,
                                 "ratio": peaks["ours GiB"] / peaks["theirs GiB"]}))
    return results


def peak(args: argparse.Namespace) -> None:
    """Two updates by one side -> GiB, in the last line."""
    of = work(args.sizes[0], TYPES[args.types[0]])
    with tempfile.TemporaryDirectory() as folder:
        step = our_update(of) if args.peak == "ours" else trl_update(of, Path(folder))
        step()
        step()
    print(peak_gib(of.model.device))


# ------------------------------------------------------------------------------------------------------------
# Answers of text

def same_answers(ours: torch.Tensor, theirs: torch.Tensor, where: str, dtype: str) -> float:
    """The share of equal tokens. In float32 all must be equal; sums in bf16 may move a near tie."""
    equal = (ours == theirs).float().mean().item()
    if dtype == "fp32" and equal < 1:
        sys.exit(f"{where}: {1 - equal:.1%} of the greedy tokens differ")
    return equal


@torch.inference_mode()
def generate(args: argparse.Namespace) -> list[dict]:
    """Answers of --tokens tokens to prompts of 32, each batch by both in turn."""
    results = []
    for size in args.sizes:
        for dtype in args.types:
            model = random_model(SIZES[size], DepthConfig(96, 2, 4), SMALL, TYPES[dtype])
            theirs = llama(model)
            for batch in args.batches:
                results.append(show(generate_batch(model, theirs, size, dtype, batch, args)))
    return results


def generate_batch(model: UnifiedModel, theirs, size: str, dtype: str, batch: int,
                   args: argparse.Namespace) -> dict:
    """One line of the table."""
    ids = torch.randint(3, model.decoder.config.vocab_size, (batch, 32))
    prompts = [pack([row.tolist()], model.vision_config.depth) for row in ids]
    sampling = Sampling(temperature=1.0 if args.sampled else 0.0)
    draw = {"do_sample": True, "top_k": 0, "temperature": 1.0} if args.sampled else {"do_sample": False}

    def our_answers() -> torch.Tensor:
        return torch.stack([row.tokens[:, 0] for row in model.generate(prompts, 1, args.tokens, sampling)])

    def their_answers() -> torch.Tensor:
        out = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=args.tokens,
                              min_new_tokens=args.tokens, **draw)
        return out[:, 32:]
    name = f"generate {size} {dtype} {'sampled' if args.sampled else 'greedy'}"
    equal = {} if args.sampled else {"equal": same_answers(our_answers(), their_answers(), name, dtype)}
    return {"what": name, "batch": batch, **equal, **alternate(args.rounds, our_answers, their_answers)}


def main() -> None:
    """The parts of --only, one after the other."""
    args = parse_arguments()
    if args.peak:
        peak(args)
        return
    import transformers
    import trl
    transformers.utils.logging.disable_progress_bar()
    versions = {**machine(), "transformers": transformers.__version__, "trl": trl.__version__}
    print(versions, flush=True)
    parts = {"update": update, "generate": generate, "memory": memory}
    results = [result for part in PARTS if part in args.only for result in parts[part](args)]
    if args.json:
        args.json.write_text(json.dumps({"machine": versions, "results": results}, indent=1))


if __name__ == "__main__":
    main()
