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
"""
import html
import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import grpo
import shapes
from model import Sampling, UnifiedModel, load
from rewards import check_judges, format_reward, hybrid_rewards, judge, make_judges, own_text, parse_weights
from tokenizer import Answer, UserError, parse_config, pick_device, run_main
from warmup import I2T_QUESTION, Codes, Sample, read_metrics, toy_prompt

RATES = ("format", "text", "visual", "visual_true", "story")
COLUMNS = (*RATES, "reward")


@dataclass
class Config:
    model: str = "out/warmup"        # run directory, checkpoint folder or hub id
    prompts: int = 384               # fresh prompts
    split: str = "heldout"           # heldout: edit chains never trained on; pairs: colour-shape pairs never in a story
    seed: int = 7                    # of prompts and sampling
    json: str = ""                   # write the rates to this file
    edits: int = 3                   # edits a prompt asks for
    temperature: float = 1.0         # of the sampled arm: the training temperature
    low: float = 0.4                 # temperature of the low-temperature arm
    guidance: float = 1.0            # for image codes, in every arm
    budget: int = 160                # positions an answer may have
    batch: int = 192                 # prompts at a time
    device: str = "auto"             # cpu, cuda, mps
    ladder: bool = False             # train from --model with more and more rewards, rate each rung
    text_reward: str = "rules"       # judges of the reward column, as in grpo.py
    visual_reward: str = "rules"     # rules, image-reward or clip-score, also NAME=FOLDER
    reward_weights: str = "1,1,1"    # of r_t, r_v and r_f in that column
    reward_device: str = ""          # where learned judges run; empty: with the model
    critic_quantize: str = "none"    # nf4: the critic's decoder in 4 bits
    seeds: str = "0,1"               # of the ladder's runs
    updates: int = 40                # of each of the ladder's runs


def rate_answer(prompt: str, answer: Answer) -> dict[str, float]:
    """One answer against the true states of its prompt -> a value in 0..1 for each of RATES."""
    true = shapes.states_of_prompt(prompt)[1:]
    pairs = [(shapes.parse_caption(own_text(answer.segments, i)), s.picture)
             for i, s in enumerate(answer.segments) if s.picture is not None]
    seen = shapes.see(np.stack([picture for _, picture in pairs])) if pairs else []
    told = [shapes.parse_caption(s.text) for s in answer.segments if s.text is not None]
    n = len(true)
    rates = {
        "format": format_reward(answer, n),
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
    generator, codes, answers = torch.Generator().manual_seed(config.seed), Codes(model), []
    for start in tqdm(range(0, len(samples), config.batch), desc=title, leave=False):
        part = samples[start:start + config.batch]
        prompts = [model.prompt(s.prompt, codes(s.prompt_pictures), s.draw) for s in part]
        answers += model.answers(model.generate(prompts, 1, config.budget, sampling, generator))
    return answers


def evaluate(model: UnifiedModel, config: Config) -> dict:
    """All rates of a model, as the JSON file holds them."""
    device = pick_device(config.reward_device, "--reward-device") if config.reward_device else model.device
    judges = make_judges(config.text_reward, config.visual_reward, device, config.critic_quantize)
    weights = parse_weights(config.reward_weights)
    rng = random.Random(f"evaluate/{config.seed}")
    samples = [toy_prompt(rng, config.edits, config.split) for _ in range(config.prompts)]
    result = {}
    for arm, temperature in (("sampled", config.temperature), ("low", config.low), ("greedy", 0.0)):
        answers = answer_all(model, samples, config, Sampling(temperature, guidance=config.guidance), arm)
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


def table(results: dict[str, dict]) -> str:
    """Results by name -> rows a person can compare."""
    lines = [f"{'':24}" + "".join(f"{name:>22}" for name in COLUMNS)]
    for name, result in results.items():
        for arm in ("sampled", "low", "greedy"):
            cells = ["{:.3f} [{:.3f} {:.3f}]".format(*result[arm][rate]) for rate in COLUMNS]
            lines.append(f"{name + ' ' + arm:24}" + "".join(f"{c:>22}" for c in cells))
        lines.append(f"{name + ' kept':24}  t2i {result['kept']['t2i']:.3f}  i2t {result['kept']['i2t']:.3f}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------------
# report.html: one file that opens offline

STYLE = """body{font:14px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}pre{background:#f6f6f6;padding:.8em;overflow:auto;font-size:12px}
.curves{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0}figcaption{font-size:12px;color:#555}
.answer{display:flex;flex-wrap:wrap;gap:10px;border-top:1px solid #ddd;padding:8px 0;align-items:flex-start}
.step{max-width:150px;font-size:13px}.step img,.prompt img{width:84px;image-rendering:pixelated;border:1px solid #ccc}
.note{color:#777;font-size:11px}.parts{width:130px;color:#555;font-size:12px}.prompt{margin-top:1.2em;font-weight:600}
.group{margin-bottom:1em}"""


def curve(name: str, points: list[tuple[float, float]], width: int = 250, height: int = 90) -> str:
    """One metric as inline SVG with its first, lowest, highest and last value."""
    ys = [y for _, y in points]
    low, high, last = min(ys), max(ys), max(1, len(points) - 1)
    span = (high - low) or 1
    line = " ".join(f"{4 + i * (width - 8) / last:.1f},{height - 4 - (y - low) / span * (height - 8):.1f}"
                    for i, y in enumerate(ys))
    return (f'<figure><svg width="{width}" height="{height}" style="background:#fafafa;border:1px solid #ddd">'
            f'<polyline points="{line}" fill="none" stroke="#2563a8" stroke-width="1.5"/></svg><figcaption>'
            f'{html.escape(name)}: {ys[0]:.3g} → {ys[-1]:.3g} (min {low:.3g}, max {high:.3g})</figcaption></figure>')


def answer_html(answer: dict) -> str:
    """Text, picture, text, picture, as a person reads them; under each its reward and advantage."""
    parts = "<br>".join(f"{k} {answer[k]:.2f}" for k in ("text", "visual", "format") if answer[k] is not None)
    cells = [f'<div class="parts">{parts}<br><span class="note">{html.escape(answer["layout"])}</span></div>']
    for step in answer["steps"]:
        shown = (f'<img alt="picture" src="data:image/png;base64,{step["picture"]}">' if step["picture"]
                 else html.escape(step["text"]))
        notes = [f"{k[:3]} {step[k]:.2f}" for k in ("reward", "advantage") if step[k] is not None]
        cells.append(f'<div class="step">{shown}<div class="note">{" · ".join(notes)}</div></div>')
    return f'<div class="answer">{"".join(cells)}</div>'


def write_report(folder: Path, results: dict[str, dict] | None = None) -> Path:
    """report.html of a run directory: how it was made, curves, rates before and after, and its samples in order."""
    config = json.loads((folder / "config.json").read_text())
    metrics = read_metrics(folder / "metrics.jsonl")
    body = [f"<h1>{html.escape(folder.name)}</h1>",
            f"<details><summary>how this run was made</summary><pre>{html.escape(json.dumps(config, indent=1))}</pre>"
            f"</details>"]
    if results:
        body.append(f"<h2>Evaluation</h2><pre>{html.escape(table(results))}</pre>")
    for stage in dict.fromkeys(m.get("stage", "grpo") for m in metrics):
        lines = [m for m in metrics if m.get("stage", "grpo") == stage]
        names = [k for k, v in lines[-1].items() if k not in ("step", "stage") and isinstance(v, (int, float))]
        drawn = [curve(k, [(m["step"], m[k]) for m in lines if m.get(k) is not None]) for k in names]
        body.append(f'<h2>{html.escape(stage)}</h2><div class="curves">{"".join(drawn)}</div>')
    for file in sorted((folder / "samples").glob("*.json"), key=lambda f: (f.stat().st_mtime_ns, f.name)):
        sheet = json.loads(file.read_text())
        body.append(f"<h2>{html.escape(sheet['title'])}</h2>")
        for group in sheet["groups"]:
            start = "".join(f'<br><img alt="start" src="data:image/png;base64,{p}">' for p in group["pictures"])
            body.append(f'<div class="group"><div class="prompt">{html.escape(group["prompt"])}{start}</div>'
                        + "".join(map(answer_html, group["answers"])) + "</div>")
        judged = [f"[score: {'none' if j['score'] is None else j['score']}]\n{j['question']}\n--> {j['reply']}"
                  for j in sheet["judged"]]
        if judged:
            body.append(f"<details><summary>what the text judge was asked last, and said</summary><pre>"
                        f"{html.escape(chr(10).join(judged))}</pre></details>")
    page = f"<!doctype html><meta charset='utf-8'><title>{html.escape(folder.name)}</title><style>{STYLE}</style>"
    path = folder / "report.html"
    path.write_text(page + "\n".join(body))
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Before and after; the ladder

def before_and_after(run: grpo.Config) -> None:
    """Rate the warm-up model and the trained one on the same fresh prompts; table, evaluation.json, report.html."""
    folder, results = Path(run.out), {}
    for name, model in (("before", run.model), ("after", run.out)) if run.eval_prompts else ():
        config = Config(model=str(model), prompts=run.eval_prompts, edits=run.edits, temperature=run.temperature,
                        guidance=run.eval_guidance or run.guidance, budget=run.budget, device=run.device,
                        batch=min(Config.batch, 4 * run.micro_batch), text_reward=run.text_reward,
                        visual_reward=run.visual_reward, reward_weights=run.reward_weights,
                        reward_device=run.reward_device, critic_quantize=run.critic_quantize)
        results[name] = evaluate(load(model, pick_device(run.device)), config)
    if results:
        print(table(results))
        (folder / "evaluation.json").write_text(json.dumps(results, indent=1))
    print(f"answers, curves and rates: {write_report(folder, results)}")


LADDER = {      # rung -> GRPO settings, the rows of the paper's ablation
    "r_f": dict(reward_weights="0,0,1", credit="outcome"),
    "r_f + r_t": dict(reward_weights="1,0,1", credit="outcome"),
    "r_f + r_t + r_v": dict(credit="outcome"),
    "+ process": dict(credit="process"),
}
PAPER = {"warm-up": (53.31, 1.97), "r_f": (53.56, 2.05), "r_f + r_t": (54.62, 2.30), "r_f + r_t + r_v": (57.83, 2.79),
         "+ process": (59.50, 3.13)}        # MMIE, InterleavedBench as published: another model and another task


def ladder(config: Config) -> None:
    """Train every rung from the same warm-up model with every seed, rate them, print one table."""
    device = pick_device(config.device)
    rows = {"warm-up": [evaluate(load(config.model, device), config)]}
    for rung, settings in LADDER.items():
        for seed in map(int, config.seeds.split(",")):
            out = f"out/ladder/{re.sub('[^a-z]+', '_', rung).strip('_')}-{seed}"
            grpo.train(grpo.Config(model=config.model, out=out, seed=seed, updates=config.updates, edits=config.edits,
                                   eval_prompts=0, **settings), 0, 1, device)
            rows.setdefault(rung, []).append(evaluate(load(out, device), replace(config, model=out)))
            write_report(Path(out))
    print(f"mean (range) over GRPO seeds {config.seeds}; {config.prompts} held-out prompts, seed {config.seed}; sampled"
          f" at temperature {config.temperature}. The last column is the paper's own, from another model and task.")
    print(f"{'':24}" + "".join(f"{name:>19}" for name in RATES) + f"{'paper: MMIE, I.Bench':>24}")
    for rung, results in rows.items():
        for arm in ("sampled", "greedy"):
            values = [[r[arm][rate][0] for r in results] for rate in RATES]
            cells = "".join(f"{np.mean(v):>6.3f} ({min(v):.2f}-{max(v):.2f})" for v in values)
            print(f"{rung + ' ' + arm:24}{cells}" + ("{:>15} {:>8}".format(*PAPER[rung]) if arm == "sampled" else ""))
    if config.json:
        Path(config.json).write_text(json.dumps(rows, indent=1))


def main() -> None:
    """Rate one model, or climb the ladder."""
    config = parse_config(Config)
    if config.split not in ("heldout", "pairs", "train"):
        raise UserError(f"--split {config.split}: expected heldout, pairs or train")
    if config.prompts < 1:
        raise UserError(f"--prompts {config.prompts}: expected at least 1")
    check_judges(config.text_reward, config.visual_reward, config.critic_quantize)
    parse_weights(config.reward_weights)
    if config.ladder:
        return ladder(config)
    result = evaluate(load(config.model, pick_device(config.device)), config)
    print(table({Path(config.model).name: result}))
    if config.json:
        Path(config.json).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    run_main(main)
