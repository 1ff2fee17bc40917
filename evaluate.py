"""Evaluation: what share of answers is well-formed, right, and drawn as told (paper, Sec. 4, in miniature).

    rate          counted over the steps a prompt asks for (a missing step is wrong)
    format        the answer is well-formed and has the right number of steps
    text          the text names the true state
    visual        the picture shows what the generated text says, right or wrong
    visual_true   the picture shows the true state
    story         every text and every picture of the answer is right, and it is well-formed
    reward        Eq. (5) by the chosen judges

Each with a 95% interval (bootstrap over prompts), on fresh held-out prompts, sampled at the training temperature,
at a low one, and greedy: a model that was only sharpened gains at temperature 1 and nowhere else. `kept` are the
abilities the model had before: text-to-image and image-to-text, greedy, over all scenes.

    python evaluate.py --model out/grpo --prompts 384 --seed 7 --json grpo.json
    python evaluate.py --ladder         # the paper's ablation in small: trains and rates r_f, + r_t, + r_v, + process

The paper's benchmarks, MMIE and InterleavedBench (Sec. 4), from their published files: answers in the published schema,
scores by the published rules from the official judge's replies, or from our critic's.

    python evaluate.py --preset paper --benchmark mmie --data DIR --judge file:eval_result.json
    python evaluate.py --preset paper --benchmark interleavedbench --data DIR --judge llava-critic
"""
import hashlib
import html
import itertools
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Callable, Literal
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import shapes
from common import (STYLE, Count, Natural, NonNegative, TopP, UserError, Weights, add_line, check_settings,
                    parse_config, pick_device, read_json, read_lines, read_picture, run_main, write_report,
                    write_text, write_whole)
from data import (I2T_QUESTION, Broken, CodeCache, LeftOut, Question, Sample, as_list, captions, fingerprint,
                  id_of, interleavedbench, keep_usable, mmie, records, toy_prompt, understanding)
from judges import LlavaCritic, strip_marks
from model import Sampling, UnifiedModel, check_budget, load
from rewards import (check_judge, check_judges, format_reward, hybrid_rewards, judge, make_judge,
                     make_judges, own_text)
from tokenizer import Answer

RATES = ("format", "text", "visual", "visual_true", "story")
COLUMNS = (*RATES, "reward")
LOW = 0.4                            # temperature of the low-temperature arm


@dataclass
class Config:
    model: str = "out/warmup"        # run directory, checkpoint folder or hub id
    prompts: Count = 384             # fresh prompts
    split: Literal["heldout", "pairs", "train"] = "heldout"   # heldout: edit chains never trained on; pairs: colour-shape pairs never in a story
    seed: int = 7                    # of prompts and sampling
    json: str = ""                   # write the rates to this file
    edits: Count = 3                   # edits a prompt asks for
    temperature: NonNegative = 1.0         # of the sampled arm: the training temperature
    guidance: float = 1.0            # for image codes, in every arm
    top_k: Natural = 0                   # 0 = off
    top_p: TopP = 1.0               # 1 = off
    budget: Count = 160                # positions an answer may have
    batch: Count = 192                 # prompts at a time
    device: str = "auto"             # cpu, cuda, mps
    ladder: bool = False             # train from --model with more and more rewards, rate each rung
    text_reward: str = "rules"       # judges of the reward column, as in grpo.py
    visual_reward: str = "rules"     # rules, image-reward or clip-score, also NAME=FOLDER
    reward_weights: Weights = (1.0, 1.0, 1.0)    # of r_t, r_v and r_f in that column
    reward_device: str = ""          # where learned judges run; empty: with the model
    critic_quantize: Literal["none", "nf4"] = "none"    # nf4: the critic's decoder in 4 bits
    seeds: str = "0,1"               # of the ladder's runs
    updates: Count = 40                # of each of the ladder's runs
    benchmark: str = ""              # mmie, interleavedbench, understanding or t2i, instead of the toy world
    data: str = ""                   # its files: the published folder, or a JSONL
    judge: str = ""                  # file:REPLIES of a judge that ran elsewhere, or llava-critic (also NAME=FOLDER)
    before: str = ""                 # a second model, whose numbers stand beside: the warm-up model, say
    skip: Literal["both", "editing", "none"] = "both"   # InterleavedBench tasks without text aspects: both, editing or none
    out: str = ""                    # where answers, table and page go; empty: out/BENCHMARK
    preset: str = ""                 # paper: the paper's settings, see PAPER; flags given beside it win
# --preset paper: how answers are sampled for the benchmarks
PAPER = dict(
    model="out/grpo",                                             # what grpo.py --preset paper wrote
    guidance=3.0,                                                 # paper
    top_k=900, top_p=0.96,                                        # VILA-U's own code sampler
    budget=1300, batch=8,                                         # ours: four pictures and their texts
)


def rate_answer(prompt: str, answer: Answer) -> dict[str, float]:
    """One answer against the true states of its prompt -> a value in 0..1 for each of RATES."""
    true = shapes.states_of_prompt(prompt)[1:]
    pairs = [(shapes.parse_caption(own_text(answer.segments, i)), s.picture)
             for i, s in enumerate(answer.segments) if s.picture is not None]
    seen = shapes.recognise(np.stack([picture for _, picture in pairs])) if pairs else []
    told = [shapes.parse_caption(s.text) for s in answer.segments if s.text is not None]
    n = len(true)
    rates = {
        "format": format_reward(answer.layout, n),
        "text": sum(a == b for a, b in zip(told, true)) / n,
        "visual": min(1.0, sum(own is not None and own == scene for (own, _), scene in zip(pairs, seen)) / n),
        "visual_true": sum(a == b for a, b in zip(seen, true)) / n,
    }
    return {**rates, "story": float(min(rates["format"], rates["text"], rates["visual_true"]) == 1)}


def interval(values: np.ndarray, seed: int, resamples: int = 2000) -> list[float]:
    """values [P], one a prompt -> [mean, low, high], the 95% bootstrap interval over prompts."""
    draws = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[draws].mean(1), [2.5, 97.5])
    return [round(float(x), 4) for x in (values.mean(), low, high)]


def answer_all(model: UnifiedModel, samples: list[Sample], config: Config, sampling: Sampling, title: str
               ) -> list[Answer]:
    """One answer for each prompt, in batches, seeds fixed."""
    codes, answers = CodeCache(model), []
    for start in tqdm(range(0, len(samples), config.batch), desc=title, leave=False):
        part = samples[start:start + config.batch]
        prompts = [model.prompt(s.prompt, codes(s.prompt_pictures), s.draw) for s in part]
        seeds = [(config.seed, i) for i in range(start, start + len(part))]
        answers += model.read_answers(model.generate(prompts, 1, config.budget, sampling, seeds))
    return answers


def evaluate(model: UnifiedModel, config: Config) -> dict:
    """All rates of a model, as the JSON file holds them."""
    judges = make_judges(config, model.device)
    weights = config.reward_weights
    rng = random.Random(f"evaluate/{config.seed}")
    samples = [toy_prompt(rng, config.edits, config.split) for _ in range(config.prompts)]
    result = {}
    for arm, temperature in (("sampled", config.temperature), ("low", LOW), ("greedy", 0.0)):
        sampling = Sampling(temperature, config.top_k, config.top_p, config.guidance)
        answers = answer_all(model, samples, config, sampling, arm)
        rates = [rate_answer(s.prompt, a) for s, a in zip(samples, answers)]
        rewards = hybrid_rewards(judge([s.prompt for s in samples], answers, *judges), weights)
        rates = [{**r, "reward": reward} for r, reward in zip(rates, rewards)]
        result[arm] = {name: interval(np.array([r[name] for r in rates]), config.seed) for name in COLUMNS}
    greedy = Sampling(0.0)
    drawn = answer_all(model, [Sample(shapes.caption(s), [], draw=True) for s in shapes.SCENES], config, greedy, "t2i")
    asked = [Sample(f"<image> {I2T_QUESTION}", [shapes.render(s)]) for s in shapes.SCENES]
    read = answer_all(model, asked, config, greedy, "i2t")
    first = [next((s.picture for s in a.segments if s.picture is not None), None) for a in drawn]
    right = [p is not None and shapes.matches(p, scene) for p, scene in zip(first, shapes.SCENES)]
    named = [shapes.parse_caption(" ".join(s.text or "" for s in a.segments)) == scene
             for a, scene in zip(read, shapes.SCENES)]
    result["kept"] = {"t2i": round(float(np.mean(right)), 4), "i2t": round(float(np.mean(named)), 4)}
    return {**result, "prompts": config.prompts, "seed": config.seed, "split": config.split, "edits": config.edits,
            "model": str(config.model)}


def rates_table(results: dict[str, dict]) -> str:
    """Results by name -> rows a person can compare."""
    lines = [f"{'':24}" + "".join(f"{name:>22}" for name in COLUMNS)]
    for name, result in results.items():
        for arm in ("sampled", "low", "greedy"):
            cells = ["{:.3f} [{:.3f} {:.3f}]".format(*result[arm][rate]) for rate in COLUMNS]
            lines.append(f"{name + ' ' + arm:24}" + "".join(f"{c:>22}" for c in cells))
        lines.append(f"{name + ' kept':24}  t2i {result['kept']['t2i']:.3f}  i2t {result['kept']['i2t']:.3f}")
    return "\n".join(lines)


# ------------------------------------------------------------------------------------------------------------
# Before and after; the ladder


def before_and_after(run, prompts: list[str]) -> None:
    """Rate the warm-up model and the trained one on the same fresh prompts; table, evaluation.json, report.html. A run
    on other prompts than the toy world's gets the report alone: see --benchmark."""
    folder, results = Path(run.out), {}
    toy = all(shapes.wanted_steps(prompt) for prompt in prompts)
    for name, model in (("before", run.model), ("after", run.out)) if run.eval_prompts and toy else ():
        config = Config(model=str(model), prompts=run.eval_prompts, edits=run.edits, temperature=run.temperature,
                        guidance=run.eval_guidance or run.guidance, budget=run.budget, device=run.device,
                        batch=min(Config.batch, 4 * run.micro_batch), text_reward=run.text_reward,
                        visual_reward=run.visual_reward, reward_weights=run.reward_weights,
                        reward_device=run.reward_device, critic_quantize=run.critic_quantize)
        results[name] = evaluate(load(model, pick_device(run.device)), config)
    if results:
        print(rates_table(results))
        (folder / "evaluation.json").write_text(json.dumps(results, indent=1))
    print(f"answers, curves and rates: {write_report(folder, rates_table(results) if results else '')}")
LADDER = {      # rung -> GRPO settings, the rows of the paper's ablation
    "r_f": dict(reward_weights="0,0,1", credit="outcome"),
    "r_f + r_t": dict(reward_weights="1,0,1", credit="outcome"),
    "r_f + r_t + r_v": dict(credit="outcome"),
    "+ process": dict(credit="process"),
}
PAPER_LADDER = {"warm-up": (53.31, 1.97), "r_f": (53.56, 2.05), "r_f + r_t": (54.62, 2.30),
                "r_f + r_t + r_v": (57.83, 2.79), "+ process": (59.50, 3.13)}


def ladder(config: Config) -> None:
    """Train every rung from the same warm-up model with every seed, rate them, print one table."""
    device = pick_device(config.device)
    rows = {"warm-up": [evaluate(load(config.model, device), config)]}
    for rung, settings in LADDER.items():
        for seed in map(int, config.seeds.split(",")):
            out = f"out/ladder/{re.sub('[^a-z]+', '_', rung).strip('_')}-{seed}"
            flags = dict(model=config.model, out=out, seed=seed, updates=config.updates, edits=config.edits,
                         eval_prompts=0, device=config.device, **settings)
            subprocess.run([sys.executable, Path(__file__).with_name("grpo.py"),
                            *(f"--{name.replace('_', '-')}={value}" for name, value in flags.items())], check=True)
            rows.setdefault(rung, []).append(evaluate(load(out, device), replace(config, model=out)))
    print(f"mean (range) over GRPO seeds {config.seeds}; {config.prompts} held-out prompts, seed {config.seed}; sampled"
          f" at temperature {config.temperature}. The last column is the paper's own, from another model and task.")
    print(f"{'':24}" + "".join(f"{name:>19}" for name in RATES) + f"{'paper: MMIE, I.Bench':>24}")
    for rung, results in rows.items():
        for arm in ("sampled", "greedy"):
            values = [[r[arm][rate][0] for r in results] for rate in RATES]
            cells = "".join(f"{np.mean(v):>6.3f} ({min(v):.2f}-{max(v):.2f})" for v in values)
            paper = "{:>15} {:>8}".format(*PAPER_LADDER[rung]) if arm == "sampled" else ""
            print(f"{rung + ' ' + arm:24}{cells}{paper}")
    if config.json:
        Path(config.json).write_text(json.dumps(rows, indent=1))


# ------------------------------------------------------------------------------------------------------------
# Benchmarks: answers in the published schema -> judges' replies -> the published averages

Rows = dict[str, tuple[float, int]]      # row of the table -> its value and the records behind it


@dataclass
class Answered:
    """One model's answers to a benchmark, and what was said of them."""
    model: str
    folder: Path
    left_out: LeftOut
    questions: list[Question]
    answers: dict[str, dict]         # id -> {"answer": [{"text", "image"}], "layout", "truncated"}
    replies: dict[tuple[str, str], str] = field(default_factory=dict)               # (id, aspect) -> reply
    scores: dict[tuple[str, str], int | None] = field(default_factory=dict)         # None: no valid one

    def mean(self, ids: list[str], aspect: str) -> Rows:
        """{aspect: (mean, records)} of the valid scores, nothing where there is none."""
        found = [self.scores[id, aspect] for id in ids if self.scores.get((id, aspect)) is not None]
        return {aspect: (sum(found) / len(found), len(found))} if found else {}
# -- MMIE (arXiv 2410.10139): its dataset.py, prompts.py and main.py

MMIE_RUBRICS = {                 # the official criteria in our words; looked for in an id in this order
    "SA": "You judge a story told in words and pictures. Look at the quality of the text (clear, correct, engaging), "
          "the quality of the pictures, how well text and pictures fit together, consistency of the context (nothing "
          "contradicts what came before), innovation, and, strictly, one style throughout. Take one point off for harm "
          "or negative emotion.",
    "PBL": "You judge instructions given in words and pictures. Look at the quality of the text (clear, correct, easy "
           "to follow), the quality of the pictures, how well text and pictures fit together, the quality and "
           "usefulness of the method, creativity, and, strictly, one style throughout. Take one point off for harm or "
           "negative emotion.",
    "MSR": "You judge the solution of a problem. Look at whether the question's text is understood, whether its "
           "pictures are understood, how clear the reasoning is, how much of it is right, whether the final answer is "
           "right, and whether all is right and easy to follow. Compare with the correct answer.",
}
JUDGE_FORM = ("Begin with '### Feedback' and your analysis; then write '### Score' and, below it, one integer from 0 "
              "to {most}.")
MMIE_MOST, MMIE_SHOWN = 6, 3       # highest score; pictures after which an answer is cut


def mmie_view(question: Question, answer: list[dict], folder: Path) -> tuple[str, str, list[Path]]:
    """What MMIE's judge sees: question and answer as lines, pictures numbered through both. Once three were shown the
    answer is cut, texts included; the text that stands beside the last one is kept."""
    told, pictures, given = {"question": "", "answer": ""}, [], iter(question.prompt_pictures)
    for part, segments in (("question", question.record["question"]), ("answer", answer)):
        for segment in segments:
            full = part == "answer" and len(pictures) >= MMIE_SHOWN
            if segment["text"] is not None:
                told[part] += strip_marks(segment["text"]) + "\n"
            if segment["image"] is not None and not full:
                told[part] += f"Image-{len(pictures)}: <image>\n"
                pictures.append(next(given) if part == "question" else folder / segment["image"])
            if part == "answer" and len(pictures) >= MMIE_SHOWN:
                break
    return told["question"], told["answer"], pictures


def mmie_asks(question: Question, answer: list[dict], folder: Path, config: Config) -> list[tuple]:
    """[(aspect, message, pictures)] for a judge of ours; only of problems it is told the right answer."""
    asked, told, pictures = mmie_view(question, answer, folder)
    right = strip_marks(question.record["gt_answer"][0]["text"] or "not given")
    reference = f"### Correct Answer\n{right}\n" if question.group == "MSR" else ""
    return [("score", f"{MMIE_RUBRICS[question.group]} {JUDGE_FORM.format(most=MMIE_MOST)}\n### Question\n{asked}"
                      f"### Answer\n{told}{reference}### Feedback\n", pictures)]


def mmie_record(question: Question, answer: list[dict], folder: Path, model: str) -> dict:
    """The record to be evaluated, and its question's pictures beside the answer's, so that the folder is whole for the
    official judge."""
    for segment in question.record["question"]:
        if segment["image"] and not (folder / segment["image"]).exists():
            with write_whole(folder / segment["image"]) as new:
                new.write_bytes((question.origin[0].parent / segment["image"]).read_bytes())
    return {**question.record, "answer": answer, "model": model}


def mmie_rows(answered: Answered, config: Config) -> Rows:
    """x/6*100 of the valid scores; AVG over all records, so that the largest category weighs most."""
    rows = {}
    for group in MMIE_RUBRICS:
        for mean, count in answered.mean([q.id for q in answered.questions if q.group == group], "score").values():
            rows[group] = 100 / MMIE_MOST * mean, count
    return {**rows, **({"AVG": weighted_mean(rows)} if rows else {})}


def weighted_mean(rows: Rows) -> tuple[float, int]:
    """Categories -> the mean over all their records."""
    count = sum(n for _, n in rows.values())
    return sum(mean * n for mean, n in rows.values()) / count, count
# -- InterleavedBench (arXiv 2406.14643)

ASPECTS = {                      # InterleavedEval's five; the wording of its judge is not published, this one is ours
    "text quality": "the text alone: is it clear, correct, fluent, to the point?",
    "perceptual quality": "every picture by itself: is it sharp, natural and whole?",
    "image coherence": "the pictures among themselves and with those of the instruction: do things, people and style "
                       "stay the same?",
    "text-image coherence": "texts and pictures: does each picture show what the text beside it says?",
    "helpfulness": "does the answer follow the instruction and serve the one who asked?",
}
ASPECT_MOST = 5                  # 0: missing or useless
TEXT_ASPECTS = ("text quality", "text-image coherence")
EDITING, COMPOSITION = r"(?<![a-z])edit|magic_?brush", r"multi_?concept|subject"
SKIPS = {"both": f"{EDITING}|{COMPOSITION}", "editing": EDITING, "none": r"(?!)"}        # tasks without text aspects


def aspects_of(question: Question, config: Config) -> list[str]:
    """The aspects that count for a question: decided by its task, never by a score of 0."""
    first = str(next(iter(as_list(question.record.get("image"))), "")).split("/")[0]            # the folder of its task
    skipped = re.search(SKIPS[config.skip], f"{question.group} {question.id} {first}".lower())
    return [name for name in ASPECTS if not (skipped and name in TEXT_ASPECTS)]


def interleavedbench_asks(question: Question, answer: list[dict], folder: Path, config: Config) -> list[tuple]:
    """[(aspect, message, pictures)] for a judge of ours."""
    told = "\n".join(strip_marks(s["text"]) if kind == "text" else "<image>"
                     for s in answer for kind in ("text", "image") if s[kind])
    asked = "<image>".join(strip_marks(piece) for piece in question.prompt.split("<image>"))
    pictures = question.prompt_pictures + [folder / s["image"] for s in answer if s["image"]]
    return [(name, f"You judge an answer that is made of texts and pictures, in one respect only: {ASPECTS[name]} "
                   f"{JUDGE_FORM.format(most=ASPECT_MOST)}\n### Instruction\n{asked}\n### Answer\n{told}\n"
                   f"### Feedback\n", pictures) for name in aspects_of(question, config)]


def interleavedbench_record(question: Question, answer: list[dict], folder: Path, model: str) -> dict:
    """The published record with the answer as typed segments, [["text", ...], ["image", path], ...]."""
    typed = [[kind, s[kind]] for s in answer for kind in ("text", "image") if s[kind]]
    return {**question.record, "model": model, "prediction": typed}


def interleavedbench_rows(answered: Answered, config: Config) -> Rows:
    """The mean of each aspect over the records it applies to; AVG is the plain mean of the five."""
    rows = {}
    for name in ASPECTS:
        rows |= answered.mean([q.id for q in answered.questions if name in aspects_of(q, config)], name)
    return {**rows, **({"AVG": plain_mean(rows)} if len(rows) == len(ASPECTS) else {})}


def plain_mean(rows: Rows) -> tuple[float, int]:
    """Aspects -> the mean of their means."""
    return sum(mean for mean, _ in rows.values()) / len(rows), max(n for _, n in rows.values())


def same_answer(reply: str, accepted: list[str]) -> bool:
    """Equal but for case, punctuation and articles, as VQA accuracy has it; numbers keep sign and point, and an answer
    that is nothing but an article (option A) stays."""
    def bare(text: str) -> list[str]:
        words = re.sub(r"(?!-\d)(?!(?<=\d)\.\d)[^\w\s]", "", text.lower()).split()
        return [w for w in words if w not in ("a", "an", "the")] or words
    return bare(reply) in map(bare, accepted)


def understanding_rows(answered: Answered, config: Config) -> Rows:
    """Accuracy in percent."""
    said = [" ".join(s["text"] or "" for s in answered.answers[q.id]["answer"]) for q in answered.questions]
    right = [same_answer(text, q.record["accepted"]) for text, q in zip(said, answered.questions)]
    return {"accuracy": (100 * sum(right) / len(right), len(right))}


def t2i_rows(answered: Answered, config: Config) -> Rows:
    """Mean visual reward of the first picture for each caption; an answer without one counts 0."""
    _, visual = make_judges(config, pick_device(config.device))
    drawn = [(q.prompt, s["image"]) for q in answered.questions
             for s in [s for s in answered.answers[q.id]["answer"] if s["image"]][:1]]
    pictures = [read_picture(answered.folder / file, "an answer") for _, file in drawn]
    values = visual([text for text, _ in drawn], pictures)
    return {"visual reward": (sum(values) / len(answered.questions), len(answered.questions))}
# -- the paper's own numbers (other models, the official judges), printed beside ours in columns of their own

PAPER_MMIE = {"Anole": (48.95, 59.05, 51.72, 55.22), "GILL": (None, None, None, 51.58),
              "MiniGPT-5": (None, None, None, 50.92), "EMU-2": (None, None, None, 45.33),
              "paper QLoRA": (53.12, 60.34, 53.28, 57.27), "paper full": (56.87, 62.28, 54.31, 59.50)}
PAPER_INTERLEAVED = {"MiniGPT-5": (*[None] * 5, 1.82), "EMU-2": (*[None] * 5, 1.68), "GILL": (*[None] * 5, 1.84),
                     "paper QLoRA": (2.33, 3.39, 3.01, 2.75, 2.85, 2.87),
                     "paper full": (2.86, 3.58, 3.25, 3.02, 2.94, 3.13)}


@dataclass
class Benchmark:
    """How one benchmark is read, scored and, where it has a judge, written and asked."""
    read: Callable                   # path, left_out -> questions
    score: Callable                  # answered, config -> rows
    rows: tuple[str, ...]
    paper: dict[str, tuple]          # label -> a value a row
    aspects: Callable | None = None  # question, config -> what a judge gives scores for
    asks: Callable | None = None     # question, answer, folder, config -> [(aspect, message, pictures)]
    most: int = 0                    # highest score of a judge
    file: str = ""                   # the answers in the published schema
    record: Callable | None = None   # question, answer, folder, model -> what stands there
BENCHMARKS = {
    "mmie": Benchmark(mmie, mmie_rows, (*MMIE_RUBRICS, "AVG"), PAPER_MMIE, lambda question, config: ["score"],
                      mmie_asks, MMIE_MOST, "data.json", mmie_record),
    "interleavedbench": Benchmark(interleavedbench, interleavedbench_rows, (*ASPECTS, "AVG"), PAPER_INTERLEAVED,
                                  aspects_of, interleavedbench_asks, ASPECT_MOST, "predictions.json",
                                  interleavedbench_record),
    # beside these the paper's other measures of the same abilities
    "understanding": Benchmark(understanding, understanding_rows, ("accuracy", "MME-P", "SEED-Bench image", "MM-Vet"),
                               {"paper full": (None, 1425.2, 59.2, 32.8)}),
    "t2i": Benchmark(captions, t2i_rows, ("visual reward", "GenEval"), {"paper full": (None, 0.46)}),
}


def same_run(folder: Path, settings: dict) -> None:
    """Write how the folder was made; raises UserError where it was made in another way."""
    file = folder / "config.json"
    check_settings(folder, read_json(file)["settings"] if file.exists() else {}, settings)
    (folder / "answers").mkdir(parents=True, exist_ok=True)
    made = {"settings": settings, "command": " ".join(sys.argv), "torch": torch.__version__}
    write_text(file, json.dumps(made, indent=1))


def answer_questions(source: str, questions: list[Question], config: Config, folder: Path) -> Answered:
    """One answer for each question that fits the model, kept in answers.jsonl, pictures in answers/.

    A batch and its seed follow from the place in the list: a run that was killed goes on with the same answers."""
    model, left_out = load(source, pick_device(config.device)).eval(), LeftOut()
    if config.benchmark != "understanding":
        check_budget(model, config.budget, source)
    how = ("benchmark", "data", "seed", "temperature", "top_k", "top_p", "guidance", "budget", "batch")
    same_run(folder, {"model": f"{source} (weights {fingerprint(model)[:16]})",
                      **{name: getattr(config, name) for name in how}})
    codes = CodeCache(model)
    questions = list(keep_usable(questions, model, codes, left_out, config.budget))
    if not questions:
        raise UserError(f"{source}: no question of {config.data} fits this model")
    told = {line["id"]: line for line in read_lines(folder / "answers.jsonl")}
    sampling = Sampling(config.temperature, config.top_k, config.top_p, config.guidance)
    if config.benchmark == "understanding":
        sampling = Sampling(0.0)                                     # a short answer is right or wrong: greedy
    done = sum(q.id in told for q in questions)
    with tqdm(total=len(questions), initial=done, desc=f"answers of {source}") as bar:
        for start in range(0, len(questions), config.batch):
            part = questions[start:start + config.batch]
            if all(q.id in told for q in part):
                continue
            prompts = [model.prompt(q.prompt, codes(q.prompt_pictures), q.draw) for q in part]
            rows = model.generate(prompts, 1, config.budget, sampling, [(config.seed, q.id) for q in part])
            for question, row, answer in zip(part, rows, model.read_answers(rows)):
                if question.id not in told:
                    segments = as_segments(answer, question.id, folder)
                    told[question.id] = {"id": question.id, "answer": segments, "layout": answer.layout,
                                         "truncated": row.truncated}
                    add_line(folder / "answers.jsonl", told[question.id])
                    bar.update()
    return Answered(source, folder, left_out, questions, told)


def as_segments(answer: Answer, id: str, folder: Path) -> list[dict]:
    """An answer in MMIE's schema, a text with the picture behind it; the pictures as files in answers/. Their names are
    a hash of the id, which may hold anything."""
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
CRITIC_SIDE = 384                # pictures are shown to our critic at this size: one tile


def ask_critic(critic: LlavaCritic, name: str, asks: list[tuple], folder: Path) -> dict[tuple[str, str], str]:
    """[(id, aspect, message, pictures)] -> {(id, aspect): reply}, kept in replies.jsonl. A question beyond the critic's
    context gets a reply that says so, without a score."""
    lines = read_lines(folder / "replies.jsonl")
    replies = {(line["id"], line["aspect"]): line["reply"] for line in lines if line["judge"] == name}

    def reply(part: list[tuple]) -> list[str]:
        """Some questions at once; where one of them is too long, each alone."""
        shown = [[Image.open(p).convert("RGB") for p in pictures] for *_, pictures in part]
        for picture in itertools.chain(*shown):
            picture.thumbnail((CRITIC_SIDE, CRITIC_SIDE))
        try:
            return critic.replies([message for _, _, message, _ in part], shown,
                                  repetition_penalty=critic.repetition_penalty)
        except UserError as error:
            return [f"(not asked: {error})"] if len(part) == 1 else [r for ask in part for r in reply([ask])]
    todo = [ask for ask in asks if ask[:2] not in replies]
    with tqdm(total=len(asks), initial=len(asks) - len(todo), desc=f"judging {folder.name}") as bar:
        for start in range(0, len(todo), critic.BATCH):
            part = todo[start:start + critic.BATCH]
            for (id, aspect, *_), said in zip(part, reply(part)):
                add_line(folder / "replies.jsonl", {"id": id, "aspect": aspect, "judge": name, "reply": said})
                replies[id, aspect] = said
                bar.update()
    return replies


def read_replies(file: Path) -> dict[tuple[str, str], str]:
    """Replies that a judge gave elsewhere, {(id, aspect): reply}: MMIE's own eval_result.json ({"id", "gpt_feedback"}),
    or a list or lines of {"id", "aspect", "reply"}; where there is but one aspect it may be missing. A bare number is
    a score."""
    replies, left_out = {}, LeftOut()
    for line, record in records(file, left_out):
        with left_out.guard(file, line, id_of(record)):
            if not isinstance(record, dict) or not isinstance(record.get("id"), (str, int)):
                raise Broken("id is missing")
            said = record.get("reply", record.get("gpt_feedback"))
            if not isinstance(said, (str, int, float)):
                raise Broken("neither reply nor gpt_feedback")
            key = str(record["id"]), record.get("aspect", "score")
            if key in replies:
                raise Broken("a second reply for one id and aspect")
            replies[key] = said if isinstance(said, str) else f"### Score\n{said}"
    return replies


def find_score(reply: str, most: int) -> int | None:
    """The first number after '### Score', rounded half to even, if it is 0..most (MMIE's main.py)."""
    match = re.search(r"### Score.*?(-?\d{1,9}(?:\.\d+)?)", reply, re.DOTALL)
    score = round(float(match[1])) if match else -1
    return score if 0 <= score <= most else None


def score_replies(spec: Benchmark, answered: Answered, config: Config) -> None:
    """Replies -> scores. What has no valid one is counted: it is left out of the means, never a 0."""
    for question in answered.questions:
        for aspect in spec.aspects(question, config):
            reply = answered.replies.get((question.id, aspect))
            with answered.left_out.guard(*question.origin):
                score = None if reply is None else find_score(reply, spec.most)
                answered.scores[question.id, aspect] = score
                if score is None:
                    raise Broken("no reply" if reply is None else "no valid score in the reply", aspect)


def benchmark_table(rows: tuple[str, ...], ours: dict[str, Rows], paper: dict[str, tuple]) -> str:
    """Ours, with the records behind each value, then the paper's in columns of their own."""
    lines = [f"{'':24}" + "".join(f"{name:>16}" for name in ours) + "  |" + "".join(f"{name:>13}" for name in paper)]
    for i, row in enumerate(rows):
        mine = [f"{of[row][0]:.2f} ({of[row][1]})" if row in of else "-" for of in ours.values()]
        theirs = ["" if values[i] is None else f"{values[i]:.2f}" for values in paper.values()]
        lines.append(f"{row:24}" + "".join(f"{c:>16}" for c in mine) + "  |" + "".join(f"{c:>13}" for c in theirs))
    return "\n".join(lines)


def header(spec: Benchmark, config: Config, arms: dict[str, Answered], reasons: dict[str, dict]) -> str:
    """What has to stand above the numbers: whose they are, who judged, what was left out."""
    lines = [f"{config.benchmark}, {config.data}", "left of the bar ours, with the records behind each value; right of "
             "it the paper's own numbers: other models, other judges"]
    if spec.asks:
        judge = "LLaVA-Critic, NOT the official judge" if config.judge.startswith("llava-critic") else \
            f"replies from {config.judge.removeprefix('file:')}" if config.judge else \
            f"none; give {spec.file} to the official one and come back with --judge file:REPLIES"
        lines.append(f"judge: {judge}")
    if config.benchmark == "interleavedbench":
        tasks = {q.group for of in arms.values() for q in of.questions if len(aspects_of(q, config)) < len(ASPECTS)}
        lines.append(f"--skip {config.skip}: text aspects do not count for {', '.join(sorted(tasks)) or 'any task'}")
    if config.benchmark == "t2i":
        lines.append(f"visual reward: {config.visual_reward}")
    for name, of in arms.items():
        forms = [format_reward(of.answers[q.id]["layout"]) for q in of.questions]
        lines.append(f"{name}: {of.model}, {len(forms)} answers"
                     + f", {sum(forms) / len(forms):.1%} of them well-formed" * bool(spec.asks))
        lines += [f"    {reason}: {count}" for reason, count in reasons[name].items()]
    return "\n".join(lines)
PAGE = 200                       # answers that the page shows


def write_answers_page(of: Answered, title: str, table: str) -> Path:
    """answers.html: the table, then the first answers with what the judge said; pictures stay files beside it."""
    def shown(path: Path) -> str:
        return f'<img loading="lazy" src="{quote(os.path.relpath(path, of.folder))}">'
    said = {}
    for (id, aspect), reply in of.replies.items():
        said[id] = said.get(id, "") + f"{aspect}: {reply}\n"
    body = [f"<h1>{html.escape(title)}</h1><pre>{html.escape(table)}</pre>"
            f"<p>The first {min(PAGE, len(of.questions))} of {len(of.questions)} answers.</p>"]
    for q in of.questions[:PAGE]:
        start = "".join(map(shown, q.prompt_pictures))
        steps = "".join(f'<div class="step">{html.escape(s["text"] or "")}<br>'
                        f'{shown(of.folder / s["image"]) if s["image"] else ""}</div>'
                        for s in of.answers[q.id]["answer"])
        judged = f"<details><summary>judge</summary><pre>{html.escape(said.get(q.id, ''))}</pre></details>"
        body.append(f'<div class="group"><div class="prompt">{html.escape(q.id)} · {html.escape(q.group)}<br>'
                    f'{html.escape(q.prompt)}<br>{start}</div><div class="answer">{steps}</div>'
                    f'{judged * (q.id in said)}</div>')
    page = f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}" \
           ".step img,.prompt img{width:144px}</style>" + "\n".join(body)
    (of.folder / "answers.html").write_text(page, encoding="utf-8")
    return of.folder / "answers.html"


def run_benchmark(config: Config) -> None:
    """Answers of --model (and of --before), then replies, scores, table, results.json and answers.html."""
    spec, out = BENCHMARKS[config.benchmark], Path(config.out or f"out/{config.benchmark}")
    unread = LeftOut()
    questions = list(spec.read(Path(config.data), unread))
    if not questions:
        raise UserError(f"--data {config.data}: no usable question in it")
    if config.benchmark == "t2i" and config.visual_reward == "rules":
        for question in questions:
            if shapes.parse_caption(question.prompt) is None:
                raise UserError(f"--visual-reward rules: knows only the toy world's captions, not "
                                f"{question.prompt[:60]!r}; choose image-reward or clip-score")
    given = read_replies(Path(config.judge.removeprefix("file:"))) if config.judge.startswith("file:") else {}
    arms = {name: answer_questions(model, questions, config, out / name)
            for name, model in (("before", config.before), ("model", config.model)) if model}
    for of in arms.values():
        if spec.file:
            made = [spec.record(q, of.answers[q.id]["answer"], of.folder, of.model) for q in of.questions]
            write_text(of.folder / spec.file, json.dumps(made, indent=1, ensure_ascii=False))
    critic = None
    if config.judge.startswith("llava-critic"):
        device = pick_device(config.reward_device or config.device)
        critic = make_judge("text", config.judge, device, config.critic_quantize)
    for of in arms.values():
        of.replies = given
        if critic:
            asks = [(q.id, *ask) for q in of.questions
                    for ask in spec.asks(q, of.answers[q.id]["answer"], of.folder, config)]
            of.replies = ask_critic(critic, f"{config.judge} {config.critic_quantize}", asks, of.folder)
        if config.judge:
            score_replies(spec, of, config)
    ours = {name: spec.score(of, config) for name, of in arms.items()}
    reasons = {name: dict(Counter(unread.reasons()) + Counter(of.left_out.reasons())) for name, of in arms.items()}
    table = header(spec, config, arms, reasons) + "\n\n" + benchmark_table(spec.rows, ours, spec.paper)
    print(table)
    (out / "results.json").write_text(json.dumps({
        "benchmark": config.benchmark, "data": config.data, "judge": config.judge, "skip": config.skip,
        "models": {name: of.model for name, of in arms.items()}, "left_out": reasons,
        "rows": {name: {row: {"value": v, "records": n} for row, (v, n) in of.items()} for name, of in ours.items()},
        "paper": {name: dict(zip(spec.rows, values)) for name, values in spec.paper.items()}}, indent=1))
    for name, of in arms.items():
        print(f"answers: {write_answers_page(of, f'{config.benchmark}, {name}', table)}")


def check_benchmark(config: Config) -> None:
    """Settings of --benchmark that cannot work, found before anything is loaded."""
    problems = [
        (config.benchmark not in BENCHMARKS, f"--benchmark {config.benchmark}: expected {' or '.join(BENCHMARKS)}"),
        (not config.data, f"--benchmark {config.benchmark}: expected its files at --data as well"),
        (bool(config.data) and not Path(config.data).exists(), f"--data {config.data}: there is no such path"),
        (config.judge.partition("=")[0] not in ("", "llava-critic") and not config.judge.startswith("file:"),
         f"--judge {config.judge}: expected llava-critic, llava-critic=FOLDER or file:REPLIES"),
        (bool(config.judge) and config.benchmark in ("understanding", "t2i"),
         f"--judge {config.judge}: {config.benchmark} has no judge to choose (t2i: --visual-reward)"),
        (bool(config.before) and config.judge.startswith("file:"),
         f"--judge {config.judge}: replies are to the answers of one model, so leave --before out"),
    ]
    for wrong, sentence in problems:
        if wrong:
            raise UserError(sentence)
    if config.judge.startswith("llava-critic"):
        check_judge("--judge", "text", config.judge)


def main() -> None:
    """Rate one model in the toy world, climb the ladder, or run a benchmark."""
    config = parse_config(Config, presets={"paper": PAPER})
    check_judges(config)
    if config.benchmark:
        check_benchmark(config)
        return run_benchmark(config)
    if config.ladder:
        return ladder(config)
    result = evaluate(load(config.model, pick_device(config.device)), config)
    print(rates_table({Path(config.model).name: result}))
    if config.json:
        Path(config.json).write_text(json.dumps(result, indent=1))
if __name__ == "__main__":
    run_main(main)
