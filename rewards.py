"""Hybrid and step rewards (paper, Sec. 3.2, Eq. 5): r = r_t + r_v + r_f, each part on a 0..1 scale.

    part   judged                               judge           on a scale 0..1
    r_t    every text, given the prompt         RulesText       share of attributes right (the toy world)
                                                LlavaCritic     its score / 100 (the paper's)
    r_v    every picture, given its own text    RulesVisual     share of attributes right (the toy world)
                                                ImageReward     normal CDF of its standardised reward (the paper's)
                                                ClipScore       2.5 max(0, cosine) (the paper's ablation)
    r_f    the answer's form                    format_reward   0 or 1

A judge is a callable; any other with the same signature can take its place. `judge` returns all parts and the rewards
of single steps, never only the sum.

    python rewards.py           # scores one right and three wrong answers and prints the parts
"""
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor

import shapes
from common import UserError, pick_device, png, read_picture, run_main
from data import Sample
from judges import PUBLISHED, ClipScore, ImageReward, LlavaCritic
from tokenizer import Answer, Segment

# A judge gives None where it has no opinion (a reply without a score): no reward information, never a 0.
# A batch goes to a judge at once, so that a learned one can use its device well.
TextJudge = Callable[[list[str], list[list[str]]], list[list[float | None]]]     # prompts, texts of each -> scores
VisualJudge = Callable[[list[str], list[np.ndarray]], list[float | None]]        # texts, pictures -> a score a pair


# ---------------------------------------------------------------------------------------------------------------------
# r_f, r_t, r_v: one function each


def format_reward(answer: Answer, steps: int | None = None) -> float:
    """r_f: 1 for <think>text</think><vis>IMAGE</vis> again and again, then </s>; else 0. Where the prompt says how many
    steps it wants, another number is malformed too (Choice: else an answer that stops early loses nothing)."""
    match = re.fullmatch(r"(TwtVpv)+E", answer.layout)
    return float(match is not None and steps in (None, len(answer.segments) // 2))


def agreement(told: shapes.Scene | None, true: shapes.Scene | None) -> float:
    """Share of attributes (shape, colour, cell) two scenes have in common; 0 where one is none."""
    return sum(a == b for a, b in zip(told, true)) / len(told) if told and true else 0.0


class RulesText:
    """r_t by rules: the k-th text against the k-th state that the prompt's own words lead to. No opinion on prompts
    that are not the toy world's."""

    def __call__(self, prompts: list[str], texts: list[list[str]]) -> list[list[float | None]]:
        return [self.one(prompt, told) for prompt, told in zip(prompts, texts)]

    def one(self, prompt: str, texts: list[str]) -> list[float | None]:
        if wanted_steps(prompt) is None:
            return [None] * len(texts)
        true = shapes.states_of_prompt(prompt)[1:]
        return [agreement(shapes.parse_caption(text), true[k] if k < len(true) else None)
                for k, text in enumerate(texts)]


class RulesVisual:
    """r_v by rules: the scene a picture shows against the scene its own text names, right or wrong."""

    def __call__(self, texts: list[str], pictures: list[np.ndarray]) -> list[float]:
        return [agreement(shapes.parse_caption(text), scene)
                for text, scene in zip(texts, shapes.recognise(np.stack(pictures)))] if pictures else []


# ---------------------------------------------------------------------------------------------------------------------
# Eq. (5), and the step rewards of Eq. (6)


@dataclass
class Scores:
    """What the judges said of one answer. `steps` holds r_t or r_v of every segment, in the answer's order."""
    text: float | None
    visual: float | None
    format: float
    steps: list[float | None]

    @property
    def parts(self) -> tuple[float | None, float | None, float]:
        """In the order of Eq. (5)."""
        return self.text, self.visual, self.format


def hybrid_rewards(group: list[Scores], weights: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> list[float]:
    """Eq. (5): r = r_t + r_v + r_f of every answer of a group, each part times its weight (1 in the paper).

    Choice: a part on which the judge had no opinion takes the group's mean of that part, never 0: no information.
    """
    totals = [0.0] * len(group)
    for weight, column in zip(weights, zip(*(scores.parts for scores in group))):
        known = [v for v in column if v is not None]
        mean = sum(known) / len(known) if known else 0.0
        totals = [total + weight * (mean if v is None else v) for total, v in zip(totals, column)]
    return totals


def wanted_steps(prompt: str) -> int | None:
    """How many steps a prompt asks for, where its words say so (the toy world's do)."""
    try:
        return len(shapes.states_of_prompt(prompt)) - 1
    except ValueError:
        return None


def own_text(segments: list[Segment], i: int) -> str:
    """The text a picture was generated for: the segment before it, none if that is a picture too."""
    return (segments[i - 1].text or "") if i else ""


def judge(prompts: list[str], answers: list[Answer], text_judge: TextJudge, visual_judge: VisualJudge) -> list[Scores]:
    """All parts of Eq. (5) for each answer. r_t and r_v of an answer are the means of its steps' scores over as many
    steps as the prompt wants, or over as many as there are where it does not say: a missing step scores 0."""
    drawn = [(n, i) for n, a in enumerate(answers) for i, s in enumerate(a.segments) if s.picture is not None]
    pairs = [(own_text(answers[n].segments, i), answers[n].segments[i].picture) for n, i in drawn]
    visual = dict(zip(drawn, visual_judge([t for t, _ in pairs], [p for _, p in pairs])))
    texts = text_judge(prompts, [[s.text for s in a.segments if s.text is not None] for a in answers])
    scores = []
    for n, (prompt, answer) in enumerate(zip(prompts, answers)):
        told = iter(texts[n])
        steps = [next(told) if s.text is not None else visual[n, i] for i, s in enumerate(answer.segments)]
        wanted = wanted_steps(prompt)
        means = [mean_of([r for r, s in zip(steps, answer.segments) if (s.text is None) == is_visual], wanted)
                 for is_visual in (False, True)]
        scores.append(Scores(*means, format_reward(answer, wanted), steps))
    return scores


def mean_of(rewards: list[float | None], wanted: int | None) -> float | None:
    """Mean over the steps that have a score; steps that are missing count 0, steps without a score do not count."""
    scored = [r for r in rewards if r is not None]
    if rewards and not scored:
        return None
    return sum(scored) / max(len(scored), (wanted or 0) - (len(rewards) - len(scored)), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Choosing judges on the command line


def make_judges(text: str, visual: str, device: str | torch.device, critic_quantize: str = "none"
                ) -> tuple[TextJudge, VisualJudge]:
    """--text-reward and --visual-reward -> judges: a name, or NAME=FOLDER where the weights lie on disk."""
    check_judges(text, visual, critic_quantize)
    (text, text_from), (visual, visual_from) = (
        (name, folder or PUBLISHED.get(name)) for name, _, folder in (text.partition("="), visual.partition("=")))
    return (RulesText() if text == "rules" else LlavaCritic(text_from, device, critic_quantize),
            RulesVisual() if visual == "rules" else {"image-reward": ImageReward, "clip-score": ClipScore}[visual](
                visual_from, device))


def judge_device(name: str, device: str | torch.device) -> torch.device:
    """--reward-device, or where the policy is."""
    return pick_device(name, "--reward-device") if name else pick_device(str(device))


def check_judges(text: str, visual: str, critic_quantize: str) -> None:
    """Raises UserError for judges that there are not, before anything is loaded."""
    for flag, value, known in (("--text-reward", text.partition("=")[0], ("rules", "llava-critic")),
                               ("--visual-reward", visual.partition("=")[0], ("rules", "image-reward", "clip-score")),
                               ("--critic-quantize", critic_quantize, ("none", "nf4"))):
        if value not in known:
            raise UserError(f"{flag} {value}: expected {' or '.join(known)}")
    check_source("--text-reward", text)
    check_source("--visual-reward", visual)


def check_source(flag: str, value: str) -> None:
    """Raises UserError where NAME=FOLDER names no folder; with one slash it may be a hub id."""
    folder = value.partition("=")[2]
    if folder and not Path(folder).exists() and folder.count("/") != 1:
        raise UserError(f"{flag} {value}: there is no {folder}")


def shown_group(sample: Sample, answers: list[Answer], scores: list[Scores],
                advantages: list[Tensor] | None = None) -> dict:
    """One prompt and its answers as plain data: texts, pictures, each step's reward and (mean) advantage."""
    told = []
    for n, (answer, score) in enumerate(zip(answers, scores)):
        steps = [{"text": s.text, "picture": None if s.picture is None else png(s.picture), "reward": r,
                  "advantage": None if advantages is None else advantages[n][s.start:s.stop].mean().item()}
                 for s, r in zip(answer.segments, score.steps)]
        told.append({"steps": steps, "layout": answer.layout, "text": score.text, "visual": score.visual,
                     "format": score.format})
    shown = [read_picture(p, "a prompt") if isinstance(p, Path) else p for p in sample.prompt_pictures]
    return {"prompt": sample.prompt, "pictures": [png(p) for p in shown], "answers": told}


def main() -> None:
    """Score one right and three wrong answers."""
    prompt = "paint it blue, move it to center. <BEGIN> a red circle at top left <image>"
    right = shapes.states_of_prompt(prompt)[1:]
    texts = [shapes.caption(scene) for scene in right]
    for name, told, drawn, layout in [("right", texts, right, "TwtVpv" * 2 + "E"),
                                      ("pictures swapped", texts, right[::-1], "TwtVpv" * 2 + "E"),
                                      ("texts swapped", texts[::-1], right, "TwtVpv" * 2 + "E"),
                                      ("a tag missing", texts, right, "TwtVpvwtVpvE")]:
        segments = [s for text, scene in zip(told, drawn)
                    for s in (Segment(0, 0, text=text), Segment(0, 0, picture=shapes.render(scene)))]
        scores = judge([prompt], [Answer(layout, segments, None, None)], RulesText(), RulesVisual())[0]
        print(f"{name:18} r_t {scores.text:.2f}  r_v {scores.visual:.2f}  r_f {scores.format:.0f}  "
              f"r {hybrid_rewards([scores])[0]:.2f}")
if __name__ == "__main__":
    run_main(main)
