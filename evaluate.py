"""Evaluation (paper, Sec. 4): rates in the toy world, the paper's ablation, the paper's benchmarks.

The toy world knows every right answer, so each answer gets a value in 0..1 for each of these:

    rate          counted over the steps that a prompt asks for (a missing step is wrong)
    format        the answer is well-formed and has the right number of steps
    text          the text names the true state
    visual        the picture shows what its own text says, right or wrong
    visual_true   the picture shows the true state
    story         every text and every picture of the answer is right, and it is well-formed
    reward        Eq. (5) by the chosen judges

The table holds means over fresh prompts with 95% bootstrap intervals, in three arms: sampled at the training
temperature, at a low one, and greedy. A model that was only sharpened gains in the first arm alone.
`kept` rates what the model could do before: text-to-image and image-to-text, greedy, over all scenes.

    python evaluate.py --model out/grpo                   # rates -> out/evaluate/evaluation.json
    python evaluate.py --compare out/grpo out/try         # runs side by side -> out/compare/compare.html
    python evaluate.py --reproduce                        # trains and rates every row of the paper's ablation
    python evaluate.py --preset paper --benchmark mmie --data DIR --judge file:eval_result.json
    python evaluate.py --preset paper --benchmark interleavedbench --data DIR --judge llava-critic

    --benchmark       --data                       answers           score
    mmie              MMIE's data.json, images/    data.json         number behind '### Score', x / 6 * 100;
                                                                     AVG over all records
    interleavedbench  interleaved_bench.json and   predictions.json  five aspects 0..5; AVG their plain mean
                      its folders of pictures
    understanding     questions.jsonl, a line      answers.jsonl     accuracy in percent, greedy, without
                      {image, question, answer}                      case, articles and punctuation
    t2i               captions.txt, one a line     answers.jsonl     --visual-reward of the first picture

The folder --out holds results.json and a folder model/ (and before/) with the answers and answers.html. The
first two need a judge: the official one's replies (file:REPLIES), or our local critic with the official
criteria in our words (llava-critic). The same command resumes a run that was interrupted.

    torchrun --nproc_per_node=8 evaluate.py ...           # the same tables, the work shared by 8 processes
"""
from common import (COLUMNS, Count, Interval, Names, Natural, Naturals, NonNegative, NonNegatives, Part, Seed,
                    TopPs, UserError, Weights, add_line, chart, check_config, check_content, check_settings,
                    claim, end_processes, flag_of, fold, free_folder, hash_files, machine, parse_config,
                    part_html, pick_device, picture_html, process_count, process_rank, read_json, read_lines,
                    read_picture, require, rounded, run_main, shown, start_processes, steps_html, thumbnail,
                    wait_for_all, write_comparison, write_page, write_report, write_text, write_whole)

import hashlib
import html
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import fmean
from typing import Callable, Hashable, Iterable, Iterator, Literal, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from tqdm import tqdm

import data
import shapes
from data import (I2T_QUESTION, Broken, CodeCache, LeftOut, Question, Sample, fingerprint, hash_samples,
                  keep_usable, toy_prompt)
from judges import LlavaCritic, strip_marks
from model import Sampling, UnifiedModel, check_budget, check_memory, checkpoint_hash, load
from rewards import (Scores, check_judge, check_judges, format_reward, hybrid_rewards, judge, judge_content,
                     judge_names, make_judge, make_judges, own_text)


@dataclass
class Config:
    # -- model
    model: str = "out/warmup"        # model to rate: run directory, checkpoint folder or hub id
    base: str = ""                   # where the base of a model with adapters is now, if it was moved
    before: str = ""                 # --benchmark: a second model to compare with, say the warm-up model
    # -- toy world
    prompts: Count = 384             # fresh prompts
    edits: Count = 3                 # edits that a prompt asks for
    split: Literal["heldout", "pairs", "train"] = "heldout"    # new: edit chains, colour-shape pairs, nothing
    compare: Names = ()              # run directories: one page of all, or one run's report anew; and stop
    # -- reproduction
    reproduce: bool = False          # train and rate all rows of ROWS, compare them, write one page
    only: Names = ()                 # rows; by default all
    seeds: str = "0,1,2,3,4"         # of each row's runs: of GRPO, and of the base model that it starts from
    updates: Count = 30              # GRPO updates of each run: before the best rows come near 1
    jobs: Count = 2                  # runs side by side, one thread each
    # -- sampling
    temperature: NonNegatives = 1.0  # of the sampled arm and of benchmarks; two: of text, of image codes
    top_k: Naturals = 0              # 0: off; two: of text tokens, of image codes
    top_p: TopPs = 1.0               # 1: off; two: of text tokens, of image codes
    guidance: NonNegative = 1.0      # for image codes; 1: the model itself
    budget: Count = 160              # positions that an answer may have
    batch: Count = 192               # prompts at a time; changes memory, never an answer's random numbers
    rows: Natural = 0                # answers in the KV cache at a time; 0: as many as fit the device
    # -- rewards
    text_reward: str = "rules"       # judge of r_t in the reward column, NAME or NAME=FOLDER
    visual_reward: str = "rules"     # judge of r_v there, and of --benchmark t2i, NAME or NAME=FOLDER
    reward_weights: Weights = (1.0, 1.0, 1.0)    # of r_t, r_v and r_f in the reward column
    reward_device: str = ""          # where learned judges run; empty: with the model
    critic_quantize: Literal["none", "nf4"] = "none"    # nf4: the critic's decoder in 4 bits
    critic_tiles: Natural = 0        # the critic: tiles of a picture at most; 0: as published
    # -- benchmark
    benchmark: str = ""              # rate on published files instead of the toy world
    data: str = ""                   # the files: the published folder, or one file
    judge: str = ""                  # file:REPLIES of one that ran elsewhere, or llava-critic[=FOLDER]
    skip: Literal["both", "editing", "none"] = "both"    # tasks of interleavedbench without text aspects
    # -- run
    out: str = ""                    # folder of the results; empty: out/evaluate, reproduce or BENCHMARK
    seed: Seed = 7                   # of prompts and sampling; --reproduce has its own, see FRESH
    device: str = "auto"             # cpu, cuda, mps; auto takes the best there is
    preset: str = ""                 # paper: the paper's settings, see PAPER; flags beside it win


# The published settings for answers to look at: VILA-U's own, of text tokens and of image codes
PUBLISHED = dict(temperature=(0.9, 1.0), top_k=(0, 900), top_p=(0.6, 0.96),
                 guidance=3.0)       # paper
# --preset paper: how answers to the benchmarks are sampled
PAPER = dict(
    model="out/grpo",                # what grpo.py --preset paper wrote
    **PUBLISHED,
    budget=1300, batch=8,            # ours: four pictures and their texts
)
RATES = tuple(name for name in COLUMNS if name != "reward")
LOW = 0.4                            # ours: temperature of the low arm


# ------------------------------------------------------------------------------------------------------------
# Work shared by processes

def share_out(file: Path, items: dict[Hashable, object], key: Callable[[dict], Hashable], batch: int,
              work: Callable[[list], Iterable[dict]], title: str) -> dict[Hashable, dict]:
    """Work on what `file` has no line for, each process on its share -> {key: line}, the same everywhere.

    items: {key: item}. work(items): a line for each, `batch` of them at a time. key(line): the item's key.
    Several processes append to files of their own, which rank 0 merges at the end, or at the next start after
    a kill. So a run goes on with any number of processes. They all see the same disk.
    """
    done = merged_lines(file, key)
    mine = list(items)[process_rank()::process_count()]
    todo = [items[name] for name in mine if name not in done]
    own = file if process_count() == 1 else file.with_name(f"{file.stem}-{process_rank()}.jsonl")
    with tqdm(total=len(mine), initial=len(mine) - len(todo), desc=title, leave=False,
              disable=process_rank() > 0) as bar:
        for start in range(0, len(todo), batch):
            for line in work(todo[start:start + batch]):
                add_line(own, line)
                bar.update()
    return merged_lines(file, key)


def merged_lines(file: Path, key: Callable[[dict], Hashable]) -> dict[Hashable, dict]:
    """Put the lines of all processes into `file` -> its lines by key."""
    wait_for_all()
    if process_rank() == 0:
        file.parent.mkdir(parents=True, exist_ok=True)
        parts = sorted(file.parent.glob(f"{file.stem}-*.jsonl"))
        if parts:
            lines = {key(line): line for part in (file, *parts) for line in read_lines(part, key)}
            write_text(file, "".join(json.dumps(line) + "\n" for line in lines.values()))
        for part in parts:
            part.unlink()
    wait_for_all()
    return {key(line): line for line in read_lines(file, key)}


def gather(own: object) -> list:
    """What each process has, in the order of the processes."""
    everyone = [own] * process_count()
    if process_count() > 1:
        dist.all_gather_object(everyone, own)
    return everyone


# ------------------------------------------------------------------------------------------------------------
# Rates in the toy world

def rate_answer(sample: Sample, answer) -> dict[str, float]:
    """Compare one answer (tokenizer.Answer) with the true states of its prompt -> 0..1 for each of RATES."""
    states = shapes.states_of_prompt(sample.prompt)[1:]
    texts = [shapes.parse_caption(text) for text in answer.texts]
    places = [i for i, s in enumerate(answer.segments) if s.picture is not None]
    captions = [shapes.parse_caption(own_text(sample, answer.segments, i)) for i in places]
    pictures = [answer.segments[i].picture for i in places]
    scenes = shapes.recognise(np.stack(pictures)) if pictures else []
    steps = len(states)
    matches = [caption is not None and caption == scene
               for caption, scene in zip(captions, scenes, strict=True)]
    rates = {
        "format": format_reward(answer.layout, answer.texts, steps),
        "text": sum(text == state for text, state in zip(texts, states)) / steps,
        "visual": min(1.0, sum(matches) / steps),
        "visual_true": sum(scene == state for scene, state in zip(scenes, states)) / steps,
    }
    rates["story"] = float(rates["format"] == rates["text"] == rates["visual_true"] == 1)
    return rates


def interval(values: np.ndarray, seed: int, resamples: int = 2000) -> list[float]:
    """values [P], one a prompt -> [mean, low, high] with the 95% bootstrap interval over prompts."""
    rows = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[rows].mean(1), [2.5, 97.5])
    return [round(float(x), 4) for x in (values.mean(), low, high)]


def open_model(source: str, config: Config, quantize: str = "none") -> UnifiedModel:
    """Load a model to --device if its answers fit beside it. Raises UserError."""
    device = pick_device(config.device)
    check_memory(source, config.budget, config.rows, device, quantize, config.base)
    return load(source, device, quantize, config.base).eval()


def rate_prompts(model: UnifiedModel, config: Config) -> dict[str, dict[str, list]]:
    """Rate a model in all three arms and on the single tasks -> {arm: {rate: a value for each prompt}}.

    Beside COLUMNS there is r_v, the visual reward alone; None where its judge gave no score.
    Until all is rated, --out/rates_WEIGHTS.jsonl keeps what is.
    """
    file = Path(config.out or "out/evaluate") / f"rates_{fingerprint(model)[:16]}.jsonl"
    judges = make_judges(config, model.device)
    rng = random.Random(f"evaluate/{config.seed}")
    samples = [toy_prompt(rng, config.edits, config.split) for _ in range(config.prompts)]

    def rate(part: list[Sample], answers: list) -> list[dict]:
        scores = judge(part, answers, *judges, "outcome")
        return [{"rates": rate_answer(sample, answer), "scores": [of.text, of.visual, of.format]}
                for sample, answer, of in zip(part, answers, scores, strict=True)]
    result = {}
    for arm, temperature in {"sampled": config.temperature, "low": LOW, "greedy": 0.0}.items():
        sampling = Sampling(temperature, config.top_k, config.top_p, config.guidance)
        lines = rate_all(model, samples, config, sampling, arm, rate, file)
        # A part without a score takes the mean over all prompts, which leaves the column's mean as it is.
        rewards = hybrid_rewards([Scores(*line["scores"], []) for line in lines], config.reward_weights)
        rates = [{**line["rates"], "reward": reward, "r_v": line["scores"][1]}
                 for line, reward in zip(lines, rewards, strict=True)]
        result[arm] = {name: [values[name] for values in rates] for name in (*COLUMNS, "r_v")}
    result["kept"] = rate_single_tasks(model, config, file)
    wait_for_all()
    if process_rank() == 0:
        file.unlink(missing_ok=True)
    return result


def evaluate(model: UnifiedModel, config: Config) -> dict:
    """Rate a model -> what evaluation.json holds."""
    return summary(rate_prompts(model, config), config)


def summary(values: dict[str, dict[str, list]], config: Config) -> dict:
    """The values of every prompt -> means with intervals, and how they were measured."""
    arms = {arm: {name: interval(np.array(of[name]), config.seed) for name in COLUMNS}
            for arm, of in values.items() if arm != "kept"}
    kept = {name: round(fmean(scenes), 4) for name, scenes in values["kept"].items()}
    return {**arms, "kept": kept, "prompts": config.prompts, "seed": config.seed, "split": config.split,
            "edits": config.edits, "model": str(config.model)}


def rate_all(model: UnifiedModel, samples: list[Sample], config: Config, sampling: Sampling, title: str,
             rate: Callable[[list[Sample], list], list[dict]], file: Path) -> list[dict]:
    """Sample an answer to each prompt and rate it -> what `rate` says of each, in order, kept in `file`.

    Random numbers follow from the seed and the prompt's place. Lines of other settings are passed over.
    """
    codes = CodeCache(model)
    names = ("seed", "edits", "split", "budget", "critic_quantize")
    judges = [judge_content(part, getattr(config, f"{part}_reward")) for part in ("text", "visual")]
    of = str((title, sampling, judges, *(getattr(config, name) for name in names)))

    def work(places: list[int]) -> list[dict]:
        part = [samples[place] for place in places]
        prompts = [model.prompt(s.prompt, codes(s.prompt_pictures), s.kind == "t2i") for s in part]
        seeds = [(config.seed, place) for place in places]
        rows = model.generate(prompts, 1, config.budget, sampling, seeds, config.rows)
        lines = rate(part, model.read_answers(rows))
        return [{"of": of, "place": place, **line} for place, line in zip(places, lines, strict=True)]
    places = {(of, place): place for place in range(len(samples))}
    done = share_out(file, places, lambda line: (line["of"], line["place"]), config.batch, work, title)
    return [done[key] for key in places]


def rate_single_tasks(model: UnifiedModel, config: Config, file: Path) -> dict[str, list[bool]]:
    """Rate what the model could do before, greedy and without guidance -> whether it can, for every scene.

    t2i: a caption, and the first picture of the answer shows it. i2t: a picture, and the answer names it.
    """
    captions = [Sample(shapes.caption(scene), [], kind="t2i") for scene in shapes.SCENES]
    questions = [Sample(f"<image> {I2T_QUESTION}", [shapes.render(scene)], shapes.caption(scene))
                 for scene in shapes.SCENES]

    def right(sample: Sample, answer) -> bool:
        if sample.kind != "t2i":
            text = " ".join(s.text or "" for s in answer.segments)
            return shapes.parse_caption(text) == shapes.parse_caption(sample.answer)
        picture = next((s.picture for s in answer.segments if s.picture is not None), None)
        return picture is not None and bool(shapes.matches(picture, shapes.parse_caption(sample.prompt)))

    def rate(part: list[Sample], answers: list) -> list[dict]:
        return [{"right": right(sample, answer)} for sample, answer in zip(part, answers, strict=True)]
    return {task: [line["right"] for line in
                   rate_all(model, samples, config, Sampling(0.0), task, rate, file)]
            for task, samples in {"t2i": captions, "i2t": questions}.items()}


def rates_table(results: dict[str, dict]) -> str:
    """Format results by name as a table, a row for each arm."""
    lines = [f"{'':24}" + "".join(f"{name:>22}" for name in COLUMNS)]
    for name, result in results.items():
        for arm in ("sampled", "low", "greedy"):
            cells = [str(Interval(*result[arm][rate])) for rate in COLUMNS]
            lines.append(f"{name + ' ' + arm:24}" + "".join(f"{text:>22}" for text in cells))
        lines.append(f"{name + ' kept':24}  t2i {result['kept']['t2i']:.3f}  i2t {result['kept']['i2t']:.3f}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# Before and after GRPO

def before_and_after(run, prompts: list[str]) -> None:
    """Rate the warm-up model and the trained one on the same fresh prompts: evaluation.json and report.html.

    run: the `grpo.Config` of a finished run. prompts: its prompts if they came from files. If these are not
    the toy world's, only the report is written: see --benchmark.
    """
    folder, results = Path(run.out), {}
    sampling = {name: getattr(run, name) for name in PUBLISHED}
    if run.eval_sampling == "published":
        sampling = PUBLISHED
    if run.eval_prompts and all(shapes.wanted_steps(prompt) for prompt in prompts):
        for name, model in (("before", run.model), ("after", run.out)):
            config = Config(
                model=str(model), base=run.base, prompts=run.eval_prompts, edits=run.edits, budget=run.budget,
                **sampling,
                batch=min(Config.batch, 4 * run.micro_batch), text_reward=run.text_reward,
                visual_reward=run.visual_reward, reward_weights=run.reward_weights,
                reward_device=run.reward_device, critic_quantize=run.critic_quantize,
                critic_tiles=run.critic_tiles, device=run.device, rows=run.rows, out=str(folder))
            began = time.perf_counter()
            results[name] = evaluate(open_model(model, config, run.quantize), config)
            results[name]["seconds"] = round(time.perf_counter() - began, 1)
    if process_rank() > 0:
        return
    if results:
        write_text(folder / "evaluation.json", json.dumps(results, indent=1))
        print(rates_table(results))
    print(f"answers, curves and rates: {write_report(folder)}")


# ------------------------------------------------------------------------------------------------------------
# --reproduce, the protocol: what is trained, what is compared, and the rule of the verdict

FRESH = 2026                         # seed of the prompts that rows are rated on; nothing was tuned on them
WARM_UP = dict(                      # of every base model: all settings of warmup.py that change its weights
    edits=3, mix=(2.0, 1.0, 1.0), loss="eq1", tokenizer_steps=500, pretrain_steps=200, warmup_steps=180,
    batch=48, lr=2e-3, warmup_lr=1e-3)
GRPO = dict(                         # of every run: all settings of grpo.py that change what it learns
    edits=3, prompts_per_update=16, group_size=4, epochs_per_rollout=1, lr=2e-4, clip=0.2, kl=0.2,
    credit="process", step_discount=0.5, normalise="kind", per_modality=False, text_reward="rules",
    visual_reward="rules", reward_weights=(1.0, 1.0, 1.0), temperature=1.0, top_k=0, top_p=1.0, guidance=1.0,
    score_guided=True, ramp=5, budget=160, lora_rank=0, lora_alpha=16.0, quantize="none")
# Choice: stories of 2 and 4 edits have base models of their own. One that has learned stories of 3 edits
# writes 3 steps whatever it is asked, so its format reward is 0 and GRPO has nothing to start from.
BASES = {                            # kind of base model -> how it differs from WARM_UP
    "base": {},
    "base-pretrained": {"warmup_steps": 0},
    "base-2-edits": {"edits": 2},
    "base-4-edits": {"edits": 4},
}
ROWS = {                             # row -> how it differs from GRPO; "base": its kind; updates 0: no GRPO
    "no-warm-up": {"base": "base-pretrained", "updates": 0},
    "warm-up": {"updates": 0},
    "r_f": {"reward_weights": (0.0, 0.0, 1.0), "credit": "outcome"},
    "r_f+r_t": {"reward_weights": (1.0, 0.0, 1.0), "credit": "outcome"},
    "r_f+r_t+r_v": {"credit": "outcome"},
    "process-as-printed": {"step_discount": 1.0, "normalise": "all"},
    "process": {},
    "G2-no-kl": {"group_size": 2, "prompts_per_update": 32, "kl": 0.0},
    "G2": {"group_size": 2, "prompts_per_update": 32},
    "G8": {"group_size": 8, "prompts_per_update": 8},
    "weak-judge": {"visual_reward": "rules-weak"},
    "qlora": {"lora_rank": 16, "quantize": "nf4", "lr": 2e-3},
    "no-warm-up-grpo": {"base": "base-pretrained"},
    "guided": {"guidance": 3.0},
    "guided-scored-unguided": {"guidance": 3.0, "score_guided": False},
    "per-modality": {"per_modality": True},
    "discount-0": {"step_discount": 0.0},
    "discount-1": {"step_discount": 1.0},
    "one-pool": {"normalise": "all"},
    "one-pool-discount-0": {"normalise": "all", "step_discount": 0.0},
    "2-edits-outcome": {"base": "base-2-edits", "edits": 2, "credit": "outcome"},
    "2-edits-process": {"base": "base-2-edits", "edits": 2},
    "4-edits-outcome": {"base": "base-4-edits", "edits": 4, "credit": "outcome"},
    "4-edits-process": {"base": "base-4-edits", "edits": 4},
    "warm-up-weak-judge": {"updates": 0, "visual_reward": "rules-weak"},     # how the two judges agree
}
PAPER_ROWS = {                       # row -> the paper's MMIE and InterleavedBench averages
    "no-warm-up": (None, 0.51),
    "warm-up": (53.31, 1.97),
    "r_f": (53.56, 2.05),
    "r_f+r_t": (54.62, 2.30),
    "r_f+r_t+r_v": (57.83, 2.79),
    "process-as-printed": (59.50, 3.13),
    "process": (59.50, 3.13),        # the paper's full method: Eq. (6), KL, G = 4
    "G2-no-kl": (53.04, 1.72),
    "G2": (55.14, 2.27),
    "weak-judge": (56.94, 2.58),     # CLIP-score
    "qlora": (57.27, 2.87),
}
CLAIMS = [                           # the first row is better than the second in a measure; whose claim it is
    ("warm-up", "no-warm-up", "format", "paper"),          # whether it interleaves at all
    ("r_f", "warm-up", "story", "paper"),
    ("r_f+r_t", "r_f", "story", "paper"),
    ("r_f+r_t+r_v", "r_f+r_t", "story", "paper"),
    ("process-as-printed", "r_f+r_t+r_v", "story", "paper"),
    ("process", "r_f+r_t+r_v", "story", "paper"),
    ("G2", "G2-no-kl", "story", "paper"),
    ("G2", "G2-no-kl", "kept", "ours"),
    ("process", "G2", "story", "paper"),
    ("process", "weak-judge", "story", "paper"),
    ("process", "qlora", "story", "paper"),
    ("process", "no-warm-up-grpo", "story", "ours"),
    ("G8", "process", "story", "ours"),
    ("guided", "guided-scored-unguided", "story", "ours"),
    ("per-modality", "process", "story", "ours"),
    ("process", "discount-0", "story", "ours"),
    ("process", "discount-1", "story", "ours"),
    ("process", "one-pool", "story", "ours"),
    ("discount-0", "one-pool-discount-0", "story", "ours"),
    ("discount-1", "process-as-printed", "story", "ours"),
    ("2-edits-process", "2-edits-outcome", "story", "ours"),
    ("4-edits-process", "4-edits-outcome", "story", "ours"),
]
LEVEL = 0.05                         # of the verdict, after Holm's correction over all claims
RESAMPLES = 2000


def bootstrap(values: np.ndarray) -> np.ndarray:
    """values [runs, prompts] -> RESAMPLES means of runs and of prompts drawn with replacement.

    Choice: both are drawn, because a claim is about new prompts and new runs. Each run has a base model of
    its own, so a drawn run is a drawn base model and a drawn seed as well.
    """
    rng, (runs, prompts) = np.random.default_rng(0), values.shape
    of_runs, of_prompts = (rng.multinomial(n, np.full(n, 1 / n), RESAMPLES) / n for n in (runs, prompts))
    return (of_runs * (of_prompts @ values.T)).sum(1)


def standard_error(values: np.ndarray) -> tuple[float, float]:
    """values [runs, prompts] -> the standard error of their mean and its degrees of freedom.

    The variances of the mean over runs and over prompts are added. Degrees of freedom: Welch, Satterthwaite.
    """
    parts = [(means.var(ddof=1) / len(means), len(means) - 1)
             for means in (values.mean(1), values.mean(0)) if len(means) > 1]
    total = sum(part for part, _ in parts)
    return total ** 0.5, total ** 2 / max(sum(part ** 2 / df for part, df in parts), 1e-300)


def students_t(freedom: float) -> tuple[np.ndarray, np.ndarray]:
    """Student's t as a table: values t >= 0, and the chance that |T| is larger.

    With T = sqrt(freedom) tan(a) the density of the angle a is proportional to cos(a) ** (freedom - 1).
    """
    angle = (np.arange(200_000) + 0.5) * np.pi / 400_000
    density = np.cos(angle) ** (freedom - 1)
    beyond = density[::-1].cumsum()[::-1] - density / 2
    return freedom ** 0.5 * np.tan(angle), beyond / density.sum()


def interval_and_p(values: np.ndarray) -> tuple[list[float], float]:
    """values [runs, prompts] -> the mean with its 95% interval [mean, low, high], p of a mean of 0.

    p is two-sided, by Student's t.
    Choice: not the share of resampled means beyond 0. Of five runs with one sign it would be about 0 always.
    The interval is the bootstrap's, stretched to the width of Student's t for the same reason: the plain
    percentiles of five runs are too narrow.
    """
    mean, means = float(values.mean()), bootstrap(values)
    error, freedom = standard_error(values)
    if error == 0 or means.std() == 0:
        return [mean, mean, mean], float(mean == 0)
    t, beyond = students_t(freedom)
    stretch = np.interp(-0.05, -beyond, t) * error / (1.96 * means.std())
    low, high = (mean + stretch * (value - mean) for value in np.percentile(means, [2.5, 97.5]))
    return [mean, float(low), float(high)], float(np.interp(abs(mean) / error, t, beyond))


def holm(p: list[float]) -> list[float]:
    """p-values -> Holm's adjusted ones: the smallest times n, the next times n - 1, .., never decreasing."""
    adjusted, largest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = largest
    return adjusted


def verdict(difference: float, adjusted_p: float) -> str:
    """The rule: a difference counts below LEVEL; then its sign decides."""
    if adjusted_p >= LEVEL:
        return "not distinguishable"
    return "reproduced" if difference > 0 else "opposite"


# ------------------------------------------------------------------------------------------------------------
# --reproduce, the runs: each a command of its own in a folder of its own

@dataclass
class Job:
    """Commands to run one after the other, and the file that the last one writes."""
    folder: Path
    commands: list[list[str]]
    reason: str = ""                 # why it failed


def command_of(script: str, settings: dict) -> list[str]:
    """A script and its settings by field name -> a command line."""
    flags = [flag_of(name if value else f"no_{name}") if isinstance(value, bool)
             else f"{flag_of(name)}={shown(value)}" for name, value in settings.items()]
    return [sys.executable, str(Path(__file__).with_name(script)), *flags]


def check_cached(folder: Path, settings: dict) -> None:
    """Refuse a folder whose run had other settings. Under "model" stands a hash of the base model.

    Choice: refuse rather than train anew, which would delete hours of work for a flag. Raises UserError.
    """
    if not (folder / "config.json").exists():
        return
    record = read_json(folder / "config.json")
    before = {**record["settings"], "model": (record["content"] or {}).get("model")}
    for name, value in json.loads(json.dumps(settings)).items():
        if before.get(name) != value:
            raise UserError(f"{folder}: its run had {flag_of(name)} {before.get(name)}, not {value}: choose "
                            f"another --out, or delete this folder")


def base_job(kind: str, seed: int, folder: Path, config: Config) -> Job:
    """Train the base model of a kind and a seed, unless it is there."""
    settings = {**WARM_UP, **BASES[kind], "seed": seed}
    check_cached(folder, settings)
    state = folder / "policy" / "training.json"
    if state.exists() and read_json(state).get("stage") == "done":
        return Job(folder, [])
    return Job(folder, [command_of("warmup.py", {**settings, "out": folder, "device": config.device})])


def run_job(row: str, seed: int, folder: Path, base: Path, config: Config) -> Job:
    """Train and rate one run of a row, or rate a base model, unless that is done."""
    settings = {**GRPO, "updates": config.updates, **ROWS[row], "seed": seed}
    settings.pop("base", None)
    check_cached(folder, {**settings, "model": checkpoint_hash(base)})
    rated = Config(model=str(folder if settings["updates"] else base), prompts=config.prompts, seed=FRESH,
                   edits=settings["edits"], guidance=settings["guidance"], budget=settings["budget"],
                   visual_reward=settings["visual_reward"], device=config.device, out=str(folder / "rates"))
    values, now = folder / "rates" / "values.json", asdict(rated)
    record = read_json(values) if values.exists() else {}
    if record.get("settings") == json.loads(json.dumps(now)) and (
            record["content"] == checkpoint_hash(rated.model)):
        return Job(folder, [])
    changed = {f.name: now[f.name] for f in fields(Config) if now[f.name] != f.default}
    commands = [command_of("evaluate.py", changed)]
    if settings["updates"]:
        options = {"model": base, "out": folder, "device": config.device, "eval_prompts": 0}
        commands.insert(0, command_of("grpo.py", {**settings, **options}))
    return Job(folder, commands)


def start(job: Job) -> subprocess.Popen:
    """Start the next command of a job with one thread; its output goes to FOLDER.log."""
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{job.folder}.log", "ab") as log:
        return subprocess.Popen(job.commands.pop(0), stdout=log, stderr=subprocess.STDOUT,
                                env={**os.environ, "OMP_NUM_THREADS": "1"})


def last_words(log: Path) -> str:
    """The last line that a command wrote, without the bars before it: an error's one sentence."""
    lines = [line.split("\r")[-1].strip() for line in log.read_text(errors="replace").splitlines(True)]
    return next((line.removeprefix("error: ") for line in reversed(lines) if line), "")


def run_jobs(jobs: list[Job], at_once: int, bar: tqdm) -> None:
    """Run the commands of all jobs, some side by side. A command that fails ends its job, with the reason.

    When this process is interrupted or terminated, the commands end with it.
    """
    waiting, running = [job for job in jobs if job.commands], {}
    for job in jobs:
        bar.initial, bar.n = bar.initial + (not job.commands), bar.n + (not job.commands)    # takes no time
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                job = waiting.pop(0)
                running[start(job)] = job
            for process in [process for process in running if process.poll() is not None]:
                job = running.pop(process)
                if process.returncode == 0 and job.commands:
                    running[start(job)] = job
                    continue
                if process.returncode:
                    job.reason = last_words(Path(f"{job.folder}.log")) or f"exit code {process.returncode}"
                bar.update()
            bar.set_postfix_str(" ".join(str(job.folder) for job in running.values()), refresh=False)
            time.sleep(0.2)
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait()


def reproduce(config: Config, out: Path) -> None:
    """Train and rate all rows, compare them, write reproduction.json, .md and .html.

    The same command goes on where it was interrupted: finished runs are not trained again.
    """
    seeds = list(dict.fromkeys(map(int, config.seeds.split(","))))
    rows = [row for row in ROWS if not config.only or row in config.only]
    kinds = {row: ROWS[row].get("base", "base") for row in rows}
    bases = {(kind, seed): base_job(kind, seed, out / kind / str(seed), config)
             for kind in dict.fromkeys(kinds.values()) for seed in seeds}
    runs = [(row, seed) for row in rows for seed in seeds]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    jobs = {}
    with tqdm(total=len(bases) + len(runs), desc="runs", smoothing=0) as bar:
        run_jobs(list(bases.values()), config.jobs, bar)
        for row, seed in runs:
            folder, base = out / row / str(seed), bases[kinds[row], seed]
            jobs[row, seed] = run_job(row, seed, folder, base.folder, config) if not base.reason else (
                Job(folder, [], f"its base model {base.folder}: {base.reason}"))
        run_jobs(list(jobs.values()), config.jobs, bar)
    measured = {row: {seed: read_values(job.folder) for (of, seed), job in jobs.items()
                      if of == row and not job.reason} for row in rows}
    result = {
        "settings": asdict(config), "base_models": WARM_UP, "grpo": GRPO, "prompts_seed": FRESH, **machine(),
        "rows": {row: row_result(row, measured[row]) for row in rows},
        "claims": claim_results(measured), "judges": judge_agreement(measured),
        "failed": {f"{row}/{seed}": job.reason for (row, seed), job in jobs.items() if job.reason}}
    write_text(out / "reproduction.json", json.dumps(result, indent=1))
    table = "\n".join(map(markdown, reproduction_parts(result)))
    write_text(out / "reproduction.md", table)
    print(table)
    curves = {row: {seed: read_lines(out / row / str(seed) / "metrics.jsonl") for seed in measured[row]}
              for row in rows if "updates" not in ROWS[row]}
    print(f"table, intervals and curves: {write_reproduction_page(out, result, curves)}")


# ------------------------------------------------------------------------------------------------------------
# --reproduce, the results: numbers, a table, a page

MEASURES = (*RATES, "story, greedy", "kept")


def read_values(folder: Path) -> dict[str, np.ndarray]:
    """A run's rates -> {measure: a value for each prompt}; kept: for each scene, of both single tasks."""
    values = read_json(folder / "rates" / "values.json")["values"]
    return {**{name: np.array(values["sampled"][name], float) for name in (*RATES, "r_v")},
            "story, greedy": np.array(values["greedy"]["story"]),
            "kept": np.array(values["kept"]["t2i"] + values["kept"]["i2t"], float)}


def row_result(row: str, runs: dict[int, dict]) -> dict:
    """A row's measures as [mean, low, high] over its runs and of each run, and the paper's numbers.

    Both are {} if no run finished.
    """
    columns = {name: np.stack([of[name] for of in runs.values()]) for name in MEASURES if runs}
    rates = {name: np.clip(interval_and_p(values)[0], 0, 1).tolist() for name, values in columns.items()}
    each = {name: values.mean(1).tolist() for name, values in columns.items()}
    return {"settings": ROWS[row], "runs": list(runs), "rates": rates, "each": each,
            "paper": PAPER_ROWS.get(row, (None, None))}


def claim_results(measured: dict[str, dict]) -> list[dict]:
    """Test every claim about rows that are here, paired by base model, seed and prompt.

    measured: row -> seed -> measure -> values. A claim without a pair of runs has no verdict.
    """
    results, tested = [], []
    for better, worse, measure, source in CLAIMS:
        if better not in measured or worse not in measured:
            continue
        result = {"claim": f"{better} > {worse}", "measure": measure, "source": source, "runs": 0}
        a, b = measured[better], measured[worse]
        pairs = [(a[seed][measure], b[seed][measure]) for seed in a if seed in b]
        if pairs:
            difference, p = interval_and_p(np.stack([x - y for x, y in pairs]))
            result |= {"runs": len(pairs), "difference": difference, "p": p,
                       "each": [float((x - y).mean()) for x, y in pairs]}
            tested.append(result)
        paper = zip(PAPER_ROWS.get(better, (None, None)), PAPER_ROWS.get(worse, (None, None)))
        result["paper"] = [round(a - b, 2) if source == "paper" and a and b else None for a, b in paper]
        results.append(result)
    for result, adjusted in zip(tested, holm([result["p"] for result in tested])):
        result |= {"adjusted_p": adjusted, "verdict": verdict(result["difference"][0], adjusted)}
    return results


def judge_agreement(measured: dict[str, dict]) -> dict:
    """How the weak visual judge agrees with the true rule on the warm-up models' answers: r_v of each answer.

    {} where the rows were not measured. The correlation is None where one judge gives one score to all.
    """
    true, weak = measured.get("warm-up", {}), measured.get("warm-up-weak-judge", {})
    both = sorted(set(true) & set(weak))
    if not both:
        return {}
    a, b = (np.concatenate([of[seed]["r_v"] for seed in both]) for of in (true, weak))
    spread = a.std() > 0 and b.std() > 0
    return {"answers": len(a), "equal": float((a == b).mean()), "mean_true": float(a.mean()),
            "mean_weak": float(b.mean()), "correlation": float(np.corrcoef(a, b)[0, 1]) if spread else None}


def reproduction_parts(result: dict) -> list[Part]:
    """reproduction.json as tables: rows, claims with their verdicts; judges and failures as sentences."""
    settings = result["settings"]
    paper = ["paper: MMIE", "paper: InterleavedBench"]
    rows, claims = [["row", "differs by", "runs", *MEASURES, *paper]], []
    for row, of in result["rows"].items():
        different = ", ".join(f"{name} {shown(value)}" for name, value in of["settings"].items())
        reasons = [reason for run, reason in result["failed"].items() if run.startswith(f"{row}/")]
        cells = [f"failed: {reasons[0]}", *[""] * (len(MEASURES) - 1)] if not of["rates"] else [
            Interval(*of["rates"][name]) for name in MEASURES]
        rows.append([row, different, str(len(of["runs"])), *cells, *map(rounded, of["paper"])])
    claims.append(["claim", "in", "difference", "runs with its sign", "p, Holm", "verdict", "whose", *paper])
    for of in result["claims"]:
        cells = ["", "", "", "not measured"]
        if of["runs"]:
            cells = [Interval(*of["difference"], least=-1.0), with_its_sign(of), f"{of['adjusted_p']:.4f}",
                     of["verdict"]]
        claims.append([of["claim"], of["measure"], *cells, of["source"], *map(rounded, of["paper"])])
    words = "".join(f"{run} failed: {reason}\n" for run, reason in result["failed"].items())
    if judges := result["judges"]:
        words += (f"rules-weak against rules, r_v of {judges['answers']} answers of the warm-up models: "
                  f"correlation {rounded(judges['correlation'])}, {judges['equal']:.0%} equal, mean "
                  f"{judges['mean_weak']:.2f} against {judges['mean_true']:.2f}.\n")
    made = (f"{settings['prompts']} fresh prompts (seed {result['prompts_seed']}); seeds "
            f"{settings['seeds']}, each with a base model of its own; {settings['updates']} updates; sampled "
            f"at temperature 1 unless it says greedy; 95% intervals; {result['machine']}.")
    return [Part("Rows", made, rows), Part("Claims", words, claims)]


def with_its_sign(claim: dict) -> str:
    """In how many runs a claim's difference has the sign of the mean, of how many."""
    return f"{sum(each * claim['difference'][0] > 0 for each in claim['each'])}/{claim['runs']}"


def markdown(part: Part) -> str:
    """A part as markdown."""
    lines = [f"| {' | '.join(map(str, cells))} |" for cells in part.rows]
    lines.insert(1, "|---" * len(part.rows[0]) + "|")
    return "\n".join([f"## {part.title}", "", part.words, "", *lines, ""])


def write_reproduction_page(out: Path, result: dict, curves: dict[str, dict[int, list[dict]]]) -> Path:
    """Write reproduction.html: the tables, intervals drawn, and the reward of each row's runs overlaid."""
    charts = [chart(f"{row}: reward, Eq. (5)", 3.0, "update", {
        f"seed {seed}": [(of["update"], of["reward"]) for of in lines] for seed, lines in runs.items()})
        for row, runs in curves.items() if runs]
    return write_page(out / "reproduction.html", "The paper's ablation, reproduced",
                      [*map(part_html, reproduction_parts(result)), '<div class="row">', *charts, "</div>"])


# ------------------------------------------------------------------------------------------------------------
# Benchmarks: how each is read, judged and averaged. Another one is a class here and a line in BENCHMARKS.

Rows = dict[str, tuple[float, int]]  # row of the table -> its value and the number of records behind it


class JudgeRequest(NamedTuple):
    """A question to a judge: a record's id, an aspect, a message with an `<image>` mark for each picture."""
    id: str
    aspect: str
    message: str
    pictures: list[Path]


@dataclass
class AnswerSet:
    """One model's answers to a benchmark, and what a judge replied."""
    model: str
    folder: Path
    left_out: LeftOut
    questions: list[Question]
    answers: dict[str, dict]         # id -> {"answer": [{"text", "image"}], "layout", "truncated"}
    replies: dict[tuple[str, str], str] = field(default_factory=dict)           # (id, aspect) -> reply
    scores: dict[tuple[str, str], int | None] = field(default_factory=dict)     # None: no valid score in it

    def segments(self, question: Question) -> list[dict]:
        """An answer in MMIE's schema, [{"text": str | None, "image": path from the folder | None}, ...]."""
        return self.answers[question.id]["answer"]

    def valid_scores(self, questions: list[Question], aspect: str) -> list[int]:
        """The scores of these questions in one aspect. A reply without one is left out, it is never a 0."""
        scores = [self.scores.get((question.id, aspect)) for question in questions]
        return [score for score in scores if score is not None]


class Benchmark:
    """What `run_benchmark` has to know. Each benchmark has

        read(path, left_out)    the published files -> questions
        rows(of, config)        the scores of an AnswerSet -> Rows

    and one with a judge has

        aspects(question, config)      what the judge gives scores for
        asks(question, of, config)     its requests, for our critic
        record(question, of)           the published record with the answer, for the official judge
    """
    ROWS: tuple[str, ...] = ()       # rows of the table
    PAPER: dict[str, tuple] = {}     # column of the paper's table -> its value in each row
    OTHER: dict[str, float] = {}     # the paper's full model in other measures of the same ability
    FILE = ""                        # holds the answers in the published schema; "": answers.jsonl is all
    MOST = 0                         # a judge's highest score; 0: there is no judge
    SHORT = False                    # answers are short texts, sampled greedily

    def check(self, questions: list[Question], config: Config) -> None:
        """Refuse questions that cannot be scored. Raises UserError."""

    def notes(self, answer_sets: list[AnswerSet], config: Config) -> list[str]:
        """Lines to stand above the table."""
        return []


JUDGE_FORM = ("Begin with '### Feedback' and your analysis; then write '### Score' and, below it, one "
              "integer from 0 to {most}.")
MMIE_RUBRICS = {                     # category -> the official criteria in our words
    "SA": "You judge a story told in words and pictures. Look at the quality of the text (clear, correct, "
          "engaging), the quality of the pictures, how well text and pictures fit together, consistency of "
          "the context (nothing contradicts what came before), innovation, and, strictly, one style "
          "throughout. Take one point off for harm or negative emotion.",
    "PBL": "You judge instructions given in words and pictures. Look at the quality of the text (clear, "
           "correct, easy to follow), the quality of the pictures, how well text and pictures fit together, "
           "the quality and usefulness of the method, creativity, and, strictly, one style throughout. Take "
           "one point off for harm or negative emotion.",
    "MSR": "You judge the solution of a problem. Look at whether the question's text is understood, whether "
           "its pictures are understood, how clear the reasoning is, how much of it is right, whether the "
           "final answer is right, and whether all is right and easy to follow. Compare with the correct "
           "answer.",
}


class MMIE(Benchmark):
    """MMIE (arXiv 2410.10139), after the dataset.py, prompts.py and main.py of its repository."""
    ROWS = (*MMIE_RUBRICS, "AVG")
    PAPER = {
        "MiniGPT-5": (47.63, 55.12, 42.17, 50.92),
        "EMU-2": (39.65, 46.12, 50.75, 45.33),
        "GILL": (46.72, 57.57, 39.33, 51.58),
        "Anole": (48.95, 59.05, 51.72, 55.22),
        "paper QLoRA": (53.12, 60.34, 53.28, 57.27),
        "paper full": (56.87, 62.28, 54.31, 59.50),
    }
    FILE = "data.json"
    MOST = 6
    PICTURES = 3                     # after so many the judge's view of an answer ends
    read = staticmethod(data.mmie)

    def aspects(self, question: Question, config: Config) -> list[str]:
        return ["score"]

    def view(self, question: Question, of: AnswerSet) -> tuple[str, str, list[Path]]:
        """The question and the answer as text, with pictures numbered across both, and the pictures.

        After three pictures the rest of the answer is dropped, except the text that belongs to the third
        picture, as in MMIE's dataset.py.
        """
        question_text, answer_text, pictures = "", "", []
        files = iter(question.prompt_pictures)
        for segment in question.record["question"]:
            if segment["text"] is not None:
                question_text += strip_marks(segment["text"]) + "\n"
            if segment["image"]:
                question_text += f"Image-{len(pictures)}: <image>\n"
                pictures.append(next(files))
        for segment in of.segments(question):
            if segment["text"] is not None:
                answer_text += strip_marks(segment["text"]) + "\n"
            if segment["image"] and len(pictures) < self.PICTURES:
                answer_text += f"Image-{len(pictures)}: <image>\n"
                pictures.append(of.folder / segment["image"])
            if len(pictures) >= self.PICTURES:
                break
        return question_text, answer_text, pictures

    def asks(self, question: Question, of: AnswerSet, config: Config) -> list[JudgeRequest]:
        """One request. The judge gets the correct answer for problems (MSR) only."""
        question_text, answer_text, pictures = self.view(question, of)
        reference = ""
        if question.group == "MSR":
            correct = strip_marks(question.record["gt_answer"][0]["text"] or "not given")
            reference = f"### Correct Answer\n{correct}\n"
        message = (f"{MMIE_RUBRICS[question.group]} {JUDGE_FORM.format(most=self.MOST)}\n"
                   f"### Question\n{question_text}### Answer\n{answer_text}{reference}### Feedback\n")
        return [JudgeRequest(question.id, "score", message, pictures)]

    def record(self, question: Question, of: AnswerSet) -> dict:
        """Copies the question's pictures beside the answer's: the judge needs one complete folder."""
        for segment in question.record["question"]:
            if segment["image"] and not (of.folder / segment["image"]).exists():
                with write_whole(of.folder / segment["image"]) as new:
                    new.write_bytes((question.origin[0].parent / segment["image"]).read_bytes())
        return {**question.record, "answer": of.segments(question), "model": of.model}

    def rows(self, of: AnswerSet, config: Config) -> Rows:
        """x / 6 * 100 of the valid scores of each category."""
        rows = {}
        for group in MMIE_RUBRICS:
            scores = of.valid_scores([q for q in of.questions if q.group == group], "score")
            if scores:
                rows[group] = 100 / self.MOST * fmean(scores), len(scores)
        if rows:
            rows["AVG"] = self.average(rows)
        return rows

    def average(self, rows: Rows) -> tuple[float, int]:
        """The mean over all records, so the largest category weighs most."""
        count = sum(n for _, n in rows.values())
        return sum(mean * n for mean, n in rows.values()) / count, count


ASPECTS = {                          # InterleavedEval's five; the judge's wording is ours, none is published
    "text quality": "the text alone: is it clear, correct, fluent, to the point?",
    "perceptual quality": "every picture by itself: is it sharp, natural and whole?",
    "image coherence": "the pictures among themselves and with those of the instruction: do things, people "
                       "and style stay the same?",
    "text-image coherence": "texts and pictures: does each picture show what the text beside it says?",
    "helpfulness": "does the answer follow the instruction and serve the one who asked?",
}
TEXT_ASPECTS = ("text quality", "text-image coherence")
EDITING = r"(?<![a-z])edit|magic_?brush"
COMPOSITION = r"multi_?concept|subject"
NO_TEXT_TASKS = {                    # --skip -> a pattern for the tasks whose text aspects do not count
    "both": f"{EDITING}|{COMPOSITION}",
    "editing": EDITING,
    "none": r"(?!)",
}


class InterleavedBench(Benchmark):
    """InterleavedBench with InterleavedEval's five aspects, each 0..5 (arXiv 2406.14643)."""
    ROWS = (*ASPECTS, "AVG")
    PAPER = {
        "MiniGPT-5": (1.22, 2.45, 1.62, 2.03, 1.77, 1.82),
        "EMU-2": (1.26, 2.28, 1.89, 1.34, 1.64, 1.68),
        "GILL": (0.75, 3.21, 2.25, 1.53, 1.48, 1.84),
        "paper QLoRA": (2.33, 3.39, 3.01, 2.75, 2.85, 2.87),
        "paper full": (2.86, 3.58, 3.25, 3.02, 2.94, 3.13),
    }
    FILE = "predictions.json"
    MOST = 5                         # 0: missing or useless
    read = staticmethod(data.interleavedbench)

    def aspects(self, question: Question, config: Config) -> list[str]:
        """The aspects that count for a question.

        Choice: its task decides, never a score of 0. The official script writes 0 for aspects that do not
        apply, and a bad answer earns 0 as well. It is not certain which tasks the published numbers skip, so
        there is --skip.
        """
        pictures = data.as_list(question.record.get("image"))
        folder = str(pictures[0]).split("/")[0] if pictures else ""            # a folder for each task
        task = f"{question.group} {question.id} {folder}".lower()
        without = TEXT_ASPECTS if re.search(NO_TEXT_TASKS[config.skip], task) else ()
        return [name for name in ASPECTS if name not in without]

    def typed(self, question: Question, of: AnswerSet) -> list[list[str]]:
        """The answer as typed segments, [["text", words], ["image", path], ...]."""
        return [[kind, segment[kind]] for segment in of.segments(question) for kind in ("text", "image")
                if segment[kind]]

    def asks(self, question: Question, of: AnswerSet, config: Config) -> list[JudgeRequest]:
        """One request for each aspect that counts."""
        instruction = "<image>".join(map(strip_marks, question.prompt.split("<image>")))
        segments = self.typed(question, of)
        answer = "\n".join(strip_marks(value) if kind == "text" else "<image>" for kind, value in segments)
        files = [of.folder / value for kind, value in segments if kind == "image"]
        requests = []
        for name in self.aspects(question, config):
            message = (f"You judge an answer that is made of texts and pictures, in one respect only: "
                       f"{ASPECTS[name]} {JUDGE_FORM.format(most=self.MOST)}\n"
                       f"### Instruction\n{instruction}\n### Answer\n{answer}\n### Feedback\n")
            requests.append(JudgeRequest(question.id, name, message, question.prompt_pictures + files))
        return requests

    def record(self, question: Question, of: AnswerSet) -> dict:
        return {**question.record, "model": of.model, "prediction": self.typed(question, of)}

    def rows(self, of: AnswerSet, config: Config) -> Rows:
        """The mean of each aspect over the records that it counts for."""
        rows = {}
        for name in ASPECTS:
            scores = of.valid_scores([q for q in of.questions if name in self.aspects(q, config)], name)
            if scores:
                rows[name] = fmean(scores), len(scores)
        if len(rows) == len(ASPECTS):
            rows["AVG"] = self.average(rows)
        return rows

    def average(self, rows: Rows) -> tuple[float, int]:
        """The plain mean of the aspects' means."""
        return fmean(mean for mean, _ in rows.values()), max(n for _, n in rows.values())

    def notes(self, answer_sets: list[AnswerSet], config: Config) -> list[str]:
        tasks = {q.group for of in answer_sets for q in of.questions
                 if TEXT_ASPECTS[0] not in self.aspects(q, config)}
        names = ", ".join(sorted(tasks)) or "any task"
        return [f"--skip {config.skip}: text aspects do not count for {names}"]


class Understanding(Benchmark):
    """Kept ability: short questions about pictures, of any origin."""
    ROWS = ("accuracy",)
    OTHER = {"MME-P": 1425.2, "SEED-Bench image": 59.2, "MM-Vet": 32.8}
    SHORT = True
    read = staticmethod(data.understanding)

    def rows(self, of: AnswerSet, config: Config) -> Rows:
        """Accuracy in percent."""
        right = [same_answer(" ".join(s["text"] or "" for s in of.segments(q)), q.record["accepted"])
                 for q in of.questions]
        return {"accuracy": (100 * fmean(right), len(right))}


def same_answer(reply: str, accepted: list[str]) -> bool:
    """Whether a reply equals an accepted answer but for case, punctuation and articles, as in VQA accuracy.

    Numbers keep sign and point. An answer that is nothing but an article (option A) stays.
    """
    def bare(text: str) -> list[str]:
        words = re.sub(r"(?!-\d)(?!(?<=\d)\.\d)[^\w\s]", "", text.lower()).split()
        return [word for word in words if word not in ("a", "an", "the")] or words
    return bare(reply) in map(bare, accepted)


class TextToImage(Benchmark):
    """Kept ability: pictures of captions, judged by --visual-reward."""
    ROWS = ("visual reward",)
    OTHER = {"GenEval": 0.46}
    read = staticmethod(data.captions)

    def check(self, questions: list[Question], config: Config) -> None:
        for question in questions if config.visual_reward.startswith("rules") else ():
            if shapes.parse_caption(question.prompt) is None:
                raise UserError(f"--visual-reward {config.visual_reward}: knows only the toy world's "
                                f"captions, not {question.prompt[:60]!r}; choose image-reward or clip-score")

    def rows(self, of: AnswerSet, config: Config) -> Rows:
        """The mean visual reward of each answer's first picture. An answer without a picture counts 0."""
        judge_picture = make_judge("visual", config.visual_reward, judge_device(config))
        captions, pictures = [], []
        for question in of.questions:
            files = [segment["image"] for segment in of.segments(question) if segment["image"]]
            if files:
                captions.append(question.prompt)
                pictures.append(read_picture(of.folder / files[0], "an answer"))
        count = len(of.questions)
        return {"visual reward": (sum(judge_picture(captions, pictures)) / count, count)}

    def notes(self, answer_sets: list[AnswerSet], config: Config) -> list[str]:
        return [f"visual reward: {config.visual_reward}"]


BENCHMARKS = {                       # --benchmark -> how it is run
    "mmie": MMIE(),
    "interleavedbench": InterleavedBench(),
    "understanding": Understanding(),
    "t2i": TextToImage(),
}


# ------------------------------------------------------------------------------------------------------------
# Running a benchmark: answers, replies, scores, table

def answer_questions(source: str, questions: list[Question], config: Config, folder: Path) -> AnswerSet:
    """Sample one answer to each question that fits the model: answers.jsonl, and pictures in answers/.

    Answers that are in the file already are not sampled again. Random numbers follow from the seed and the
    question's id alone, so a run that was killed goes on with the same answers, whatever --batch is now.
    Raises UserError where the folder was made with other settings, or where no question fits.
    """
    model, left_out = open_model(source, config), LeftOut()
    short = BENCHMARKS[config.benchmark].SHORT
    if not short:
        check_budget(model, config.budget, source)
    start_folder(folder, source, config)
    codes = CodeCache(model)
    own = questions[process_rank()::process_count()]
    usable = {question.id for question in keep_usable(own, model, codes, left_out, config.budget)}
    usable, counts = zip(*gather((usable, left_out.counts)))
    left_out.counts = sum(counts, Counter())
    questions = [question for question in questions if question.id in set().union(*usable)]
    if not questions:
        raise UserError(f"{source}: no question of {config.data} fits this model")
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.guidance)
    if short:
        sampling = Sampling(0.0)                       # Choice: a short answer is right or wrong, so greedy
    hashes = {question.id: hash_samples([question]) for question in questions}
    for line in (line for file in folder.glob("answers*.jsonl") for line in read_lines(file)):
        if line.get("question") and hashes.get(line["id"], line["question"]) != line["question"]:
            raise UserError(f"{folder}: question {line['id']} is not the one that was answered here: choose "
                            f"another --out, such as {free_folder(folder.parent)}")

    def work(part: list[Question]) -> Iterator[dict]:
        prompts = [model.prompt(q.prompt, codes(q.prompt_pictures), q.kind == "t2i") for q in part]
        seeds = [(config.seed, question.id) for question in part]
        rows = model.generate(prompts, 1, config.budget, sampling, seeds, config.rows)
        for question, row, answer in zip(part, rows, model.read_answers(rows), strict=True):
            yield {"id": question.id, "question": hashes[question.id],
                   "answer": write_segments(answer, question.id, folder), "layout": answer.layout,
                   "truncated": row.truncated}
    answers = share_out(folder / "answers.jsonl", {question.id: question for question in questions},
                        lambda line: line["id"], config.batch, work, f"answers of {source}")
    return AnswerSet(source, folder, left_out, questions, answers)


def start_folder(folder: Path, model: str, config: Config) -> None:
    """Write the settings behind the answers to config.json. Raises UserError where others stand there."""
    names = ("benchmark", "data", "seed", "temperature", "top_k", "top_p", "guidance", "budget")
    settings = {"model": model, **{name: getattr(config, name) for name in names}}
    file, content = folder / "config.json", {"model": checkpoint_hash(model)}
    before = read_json(file) if file.exists() else {}
    check_settings(folder.parent, before.get("settings", {}), settings, ("model", "data"))
    check_content(folder.parent, before.get("content", {}), content)
    wait_for_all()
    if process_rank() > 0:
        return
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({"settings": settings, "content": content, "command": " ".join(sys.argv),
                                 "torch": torch.__version__}, indent=1))


def write_segments(answer, id: str, folder: Path) -> list[dict]:
    """Write the pictures to answers/ -> the answer in MMIE's schema, each text with the picture behind it.

    The files are named by a hash of the id, which may hold any characters.
    """
    segments, name = [], hashlib.sha256(id.encode()).hexdigest()[:16]
    for i, segment in enumerate(answer.segments):
        if segment.picture is None:
            segments.append({"text": segment.text, "image": None})
            continue
        if not segments or segments[-1]["image"]:
            segments.append({"text": None, "image": None})
        segments[-1]["image"] = f"answers/{name}_{i}.png"
        Image.fromarray(segment.picture).save(folder / segments[-1]["image"])
    return segments


CRITIC_SIDE = 384                    # ours: pictures are scaled down to one tile for our critic


def ask_critic(critic: LlavaCritic, name: str, requests: list[JudgeRequest], folder: Path
               ) -> dict[tuple[str, str], str]:
    """Ask our critic -> {(id, aspect): reply}.

    replies.jsonl keeps the replies of each judge by its `name`; what is there is not asked again. Questions
    of similar length go together, whole batches between two writes.
    """
    hashes = {(r.id, r.aspect): hash_files(r.pictures, [r.message]) for r in requests}

    def key(line: dict) -> tuple[str, str, str, str]:
        return line["judge"], line["id"], line["aspect"], line.get("request", "")

    def work(part: list[JudgeRequest]) -> list[dict]:
        return [{"id": request.id, "aspect": request.aspect, "judge": name, "reply": reply,
                 "request": hashes[request.id, request.aspect]}
                for request, reply in zip(part, critic_replies(critic, part), strict=True)]
    requests = sorted(requests, key=lambda request: (len(request.pictures), len(request.message)))
    asked = {(name, r.id, r.aspect, hashes[r.id, r.aspect]): r for r in requests}
    lines = share_out(folder / "replies.jsonl", asked, key, 4 * critic.BATCH, work, f"judging {folder.name}")
    return {(id, aspect): lines[of, id, aspect, value]["reply"] for of, id, aspect, value in asked}


def critic_replies(critic: LlavaCritic, requests: list[JudgeRequest]) -> list[str]:
    """Ask some questions at once. If one exceeds the critic's context, each is asked alone and the long one
    gets a reply that says so, without a score."""
    messages = [request.message for request in requests]
    pictures = [[small_picture(path) for path in request.pictures] for request in requests]
    try:
        return critic.replies(messages, pictures, repetition_penalty=critic.repetition_penalty)
    except UserError as error:
        if len(requests) == 1:
            return [f"(not asked: {error})"]
        return [reply for request in requests for reply in critic_replies(critic, [request])]


def small_picture(path: Path) -> Image.Image:
    """A picture file at the critic's size."""
    picture = Image.fromarray(read_picture(path, "a picture to be judged"))
    picture.thumbnail((CRITIC_SIDE, CRITIC_SIDE))
    return picture


def read_replies(file: Path) -> dict[tuple[str, str], str]:
    """Read the replies of a judge that ran elsewhere -> {(id, aspect): reply}.

    file: MMIE's own eval_result.json ({"id", "gpt_feedback"}), or a list or lines of {"id", "aspect",
    "reply"}. The aspect may be missing where there is only one. A bare number is a score.
    """
    replies, left_out = {}, LeftOut()
    for line, record in data.records(file, left_out):
        with left_out.guard(file, line, data.id_of(record)):
            if not isinstance(record, dict) or not isinstance(record.get("id"), (str, int)):
                raise Broken("id is missing")
            reply, aspect = record.get("reply", record.get("gpt_feedback")), record.get("aspect", "score")
            if not isinstance(reply, (str, int, float)):
                raise Broken("neither reply nor gpt_feedback")
            if not isinstance(aspect, str):
                raise Broken("aspect is no text")
            if (str(record["id"]), aspect) in replies:
                raise Broken("a second reply for one id and aspect")
            replies[str(record["id"]), aspect] = reply if isinstance(reply, str) else f"### Score\n{reply}"
    return replies


def find_score(reply: str, most: int) -> int | None:
    """The first number after '### Score', rounded half to even, if it is 0..most (MMIE's main.py)."""
    match = re.search(r"### Score.*?(-?\d{1,9}(?:\.\d+)?)", reply, re.DOTALL)
    score = round(float(match[1])) if match else -1
    return score if 0 <= score <= most else None


def score_replies(benchmark: Benchmark, of: AnswerSet, config: Config) -> None:
    """Find the scores in all replies. Where there is no reply or no valid score, that is counted."""
    for question in of.questions:
        for aspect in benchmark.aspects(question, config):
            reply = of.replies.get((question.id, aspect))
            score = None if reply is None else find_score(reply, benchmark.MOST)
            of.scores[question.id, aspect] = score
            if score is None:
                reason = "no reply" if reply is None else "no valid score in the reply"
                of.left_out.add(*question.origin, reason, aspect)


def judge_answers(benchmark: Benchmark, answer_sets: list[AnswerSet], config: Config,
                  replies: dict[tuple[str, str], str]) -> None:
    """Fill in replies and scores by --judge: our critic's, or the `replies` of one that ran elsewhere."""
    critic = None
    if config.judge.startswith("llava-critic"):
        critic = make_judge("text", config.judge, judge_device(config), config.critic_quantize,
                            config.critic_tiles)
    for of in answer_sets:
        of.replies = replies
        if critic:
            requests = [request for question in of.questions
                        for request in benchmark.asks(question, of, config)]
            name = f"{judge_content('text', config.judge)} {config.critic_quantize}"
            of.replies = ask_critic(critic, name, requests, of.folder)
        score_replies(benchmark, of, config)


def judge_device(config: Config) -> torch.device:
    """Where a learned judge runs."""
    if config.reward_device:
        return pick_device(config.reward_device, "--reward-device")
    return pick_device(config.device)


def header(benchmark: Benchmark, config: Config, answer_sets: dict[str, AnswerSet], reasons: dict[str, dict]
           ) -> str:
    """What stands above the numbers: whose they are, who judged, what was left out."""
    lines = [f"{config.benchmark}, {config.data}"]
    if benchmark.MOST:
        judge_name = f"none; give {benchmark.FILE} to the official one, then use --judge file:REPLIES"
        if config.judge.startswith("llava-critic"):
            judge_name = "LLaVA-Critic, NOT the official judge"
        elif config.judge:
            judge_name = f"replies from {config.judge.removeprefix('file:')}"
        lines.append(f"judge: {judge_name}")
    lines += benchmark.notes(list(answer_sets.values()), config)
    for name, of in answer_sets.items():
        line = f"{name}: {of.model}, {len(of.questions)} answers"
        if benchmark.MOST:
            forms = [format_reward(of.answers[q.id]["layout"],
                                   [s["text"] for s in of.segments(q) if s["text"] is not None])
                     for q in of.questions]
            line += f", {fmean(forms):.1%} of them well-formed"
        lines.append(line)
        lines += [f"    {reason}: {count}" for reason, count in reasons[name].items()]
    return "\n".join(lines)


def benchmark_table(benchmark: Benchmark, ours: dict[str, Rows]) -> str:
    """Format our values with the number of records behind each. The paper's values stand right of a bar in
    columns of their own, its other metrics in a footnote."""
    paper = benchmark.PAPER
    lines = [f"{'':24}" + f"{'ours (records)':>{16 * len(ours)}}",
             f"{'':24}" + "".join(f"{name:>16}" for name in ours)]
    if paper:
        lines[0] += "  |  the paper's own numbers: other models, other judges"
        lines[1] += "  |" + "".join(f"{name:>13}" for name in paper)
    for i, row in enumerate(benchmark.ROWS):
        line = f"{row:24}"
        for rows in ours.values():
            cell = f"{rows[row][0]:.2f} ({rows[row][1]})" if row in rows else "-"
            line += f"{cell:>16}"
        if paper:
            line += "  |" + "".join(f"{values[i]:>13.2f}" for values in paper.values())
        lines.append(line)
    if benchmark.OTHER:
        others = ", ".join(f"{metric} {value}" for metric, value in benchmark.OTHER.items())
        lines.append(f"paper full, in other measures of the same ability, not this one: {others}")
    return "\n".join(lines)


PAGE = 50                            # answers that a page shows


def write_answers_page(of: AnswerSet, title: str, table: str) -> Path:
    """Write answers.html: the table, then the first answers with what the judge replied."""
    def picture(path: Path) -> str:
        return thumbnail(read_picture(path, "a picture of the page"))
    body = [f'<pre class="wide">{html.escape(table)}</pre>',
            f"<p>The first {min(PAGE, len(of.questions))} of {len(of.questions)} answers.</p>"]
    for question in of.questions[:PAGE]:
        start = [picture_html(picture(path), "picture of the question") for path in question.prompt_pictures]
        steps = [{"text": s["text"], "picture": s["image"] and picture(of.folder / s["image"])}
                 for s in of.segments(question)]
        replies = [f"<pre>{html.escape(f'{aspect}: {reply}')}</pre>"
                   for (id, aspect), reply in of.replies.items() if id == question.id]
        words = html.escape(f"{question.id} · {question.group}: {question.prompt}")
        body.append(f'<div class="group"><h3>{words}</h3><div class="row">{"".join(start)}</div>'
                    f'{steps_html(steps)}{fold("judge", *replies)}</div>')
    return write_page(of.folder / "answers.html", title, body)


def run_benchmark(config: Config, out: Path) -> None:
    """Answer the questions with --model (and --before), judge the answers, print and write the results."""
    benchmark, unread = BENCHMARKS[config.benchmark], LeftOut()
    questions = list(benchmark.read(Path(config.data), unread))
    if not questions:
        raise UserError(f"--data {config.data}: no usable question in it")
    benchmark.check(questions, config)
    replies = {}
    if config.judge.startswith("file:"):
        replies = read_replies(Path(config.judge.removeprefix("file:")))
    models = {"before": config.before, "model": config.model}
    answer_sets = {name: answer_questions(model, questions, config, out / name)
                   for name, model in models.items() if model}
    if benchmark.FILE and process_rank() == 0:
        for of in answer_sets.values():
            records = [benchmark.record(question, of) for question in of.questions]
            write_text(of.folder / benchmark.FILE, json.dumps(records, indent=1, ensure_ascii=False))
    if config.judge:
        judge_answers(benchmark, list(answer_sets.values()), config, replies)
    if process_rank() > 0:
        return
    ours = {name: benchmark.rows(of, config) for name, of in answer_sets.items()}
    reasons = {name: dict(Counter(unread.reasons()) + Counter(of.left_out.reasons()))
               for name, of in answer_sets.items()}
    table = header(benchmark, config, answer_sets, reasons) + "\n\n" + benchmark_table(benchmark, ours)
    write_text(out / "results.json", json.dumps({
        "benchmark": config.benchmark, "data": config.data, "judge": config.judge, "skip": config.skip,
        "models": {name: of.model for name, of in answer_sets.items()}, "left_out": reasons,
        "rows": {name: {row: {"value": value, "records": count} for row, (value, count) in rows.items()}
                 for name, rows in ours.items()},
        "paper": {name: dict(zip(benchmark.ROWS, values, strict=True))
                  for name, values in benchmark.PAPER.items()},
        "paper_other_metrics": benchmark.OTHER}, indent=1))
    pages = [write_answers_page(of, f"{config.benchmark}, {name}", table) for name, of in answer_sets.items()]
    print(table, *(f"answers: {page}" for page in pages), sep="\n")


# ------------------------------------------------------------------------------------------------------------
# The command line

def check(config: Config, world: int = 1) -> None:
    """Refuse settings that cannot work before anything is loaded. Raises UserError."""
    check_config(config)
    check_judges(config)
    require(config, "reproduce", world == 1 or not config.reproduce, "one process: it starts the others")
    require(config, "reward_device", world == 1 or ":" not in config.reward_device,
            "no number: under torchrun each process has its judges on its own device")
    seeds = re.fullmatch(r"\d{1,9}(,\d{1,9})*", config.seeds)
    require(config, "seeds", seeds, "whole numbers separated by commas")
    for run in config.compare:
        if not Path(run).is_dir():
            raise UserError(f"--compare {run}: expected a run directory")
    require(config, "only", set(config.only) <= set(ROWS), f"names of {', '.join(ROWS)}")
    require(config, "benchmark", config.benchmark in ("", *BENCHMARKS), " or ".join(BENCHMARKS))
    if not config.benchmark:
        for name in ("data", "judge", "before"):
            require(config, name, not getattr(config, name), "--benchmark beside it")
        return
    if config.benchmark == "t2i":
        check_judge("--visual-reward", "visual", config.visual_reward)
    if not config.data:
        raise UserError(f"--benchmark {config.benchmark}: expected its files at --data as well")
    if not Path(config.data).exists():
        raise UserError(f"--data {config.data}: no such file or folder")
    if not config.judge:
        return
    kind, from_file = config.judge.partition("=")[0], config.judge.startswith("file:")
    require(config, "judge", kind == "llava-critic" or from_file,
            "llava-critic, llava-critic=FOLDER or file:REPLIES")
    require(config, "judge", BENCHMARKS[config.benchmark].MOST > 0,
            f"no judge: {config.benchmark} has none to choose (t2i: --visual-reward)")
    require(config, "judge", not (from_file and config.before),
            "no --before beside it: the replies are to the answers of one model")
    if not from_file:
        check_judge("--judge", "text", config.judge)


def main() -> None:
    """Rate one model in the toy world, reproduce the paper's ablation, or run a benchmark."""
    config = parse_config(Config, presets={"paper": PAPER}, names={
        "benchmark": BENCHMARKS, "text_reward": judge_names("text"), "visual_reward": judge_names("visual")})
    _, world, _ = start_processes(config.device)
    check(config, world)
    if len(config.compare) == 1:
        print(f"report: {write_report(Path(config.compare[0]))}")
        return
    modes = {"compare": config.compare, config.benchmark: config.benchmark, "reproduce": config.reproduce}
    with claim(config.out or f"out/{next((name for name, on in modes.items() if on), 'evaluate')}") as out:
        if config.compare:
            runs = {str(Path(run)).removeprefix("out/"): Path(run) for run in config.compare}
            print(f"side by side: {write_comparison(runs, out)}")
        elif config.benchmark:
            run_benchmark(config, out)
        elif config.reproduce:
            reproduce(config, out)
        else:
            values = rate_prompts(open_model(config.model, config), replace(config, out=str(out)))
            result = summary(values, config)
            if process_rank() == 0:
                write_text(out / "evaluation.json", json.dumps(result, indent=1))
                write_text(out / "values.json", json.dumps(
                    {"settings": asdict(config), "content": checkpoint_hash(config.model), "values": values}))
            print(rates_table({Path(config.model).name: result}))
            print(f"rates: {out / 'evaluation.json'}, those of every prompt: {out / 'values.json'}")
    end_processes()


if __name__ == "__main__":
    run_main(main)
