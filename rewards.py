"""Hybrid and step rewards (paper, Sec. 3.2, Eq. 5): r = r_t + r_v + r_f, each part on a 0..1 scale.

    part   judged                               judge            range                     cost
    r_t    every text, given the prompt         RulesText        share of attributes right  none
    r_v    every picture, given its own text    RulesVisual      share of attributes right  0.1 ms a picture
    r_f    the answer's form                    format_reward    0 or 1                     none

A judge is a callable; any other with the same signature can take its place. The two rule judges know the toy world;
learned judges have the same interface. `judge` returns all parts and the rewards of single steps, never only the sum.

    python rewards.py           # scores one right and three wrong answers and prints the parts
"""
import re
from dataclasses import dataclass
from typing import Callable

import numpy as np

import shapes
from tokenizer import Answer, Segment, run_main

PARTS = ("t", "v", "f")                  # text, visual, format: the order of Eq. (5)

# A judge gives None where it has no opinion (a reply without a score): no reward information, never a 0.
TextJudge = Callable[[str, list[str]], list[float | None]]                       # prompt, texts -> a score a text
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

    def __call__(self, prompt: str, texts: list[str]) -> list[float | None]:
        if wanted_steps(prompt) is None:
            return [None] * len(texts)
        true = shapes.states_of_prompt(prompt)[1:]
        return [agreement(shapes.parse_caption(text), true[k] if k < len(true) else None)
                for k, text in enumerate(texts)]


class RulesVisual:
    """r_v by rules: the scene a picture shows against the scene its own text names, right or wrong."""

    def __call__(self, texts: list[str], pictures: list[np.ndarray]) -> list[float]:
        return [agreement(shapes.parse_caption(text), scene)
                for text, scene in zip(texts, shapes.see(np.stack(pictures)))] if pictures else []


# ---------------------------------------------------------------------------------------------------------------------
# Eq. (5), and the step rewards of Eq. (6)

@dataclass
class Scores:
    """What the judges said of one answer. `steps` holds r_t or r_v of every segment, in the answer's order."""
    text: float | None
    visual: float | None
    format: float
    steps: list[float | None]

    def parts(self, chosen: tuple[str, ...] = PARTS) -> list[float | None]:
        """The chosen parts, in the order of Eq. (5)."""
        return [v for letter, v in zip(PARTS, (self.text, self.visual, self.format)) if letter in chosen]


def hybrid_rewards(group: list[Scores], chosen: tuple[str, ...] = PARTS) -> list[float]:
    """Eq. (5): r = r_t + r_v + r_f of every answer of a group, over the chosen parts.

    Choice: a part on which the judge had no opinion takes the group's mean of that part, never 0: no information.
    """
    totals = [0.0] * len(group)
    for column in zip(*(scores.parts(chosen) for scores in group)):
        known = [v for v in column if v is not None]
        mean = sum(known) / len(known) if known else 0.0
        totals = [total + (mean if v is None else v) for total, v in zip(totals, column)]
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
    scores = []
    for n, (prompt, answer) in enumerate(zip(prompts, answers)):
        texts = [s.text for s in answer.segments if s.text is not None]
        told = iter(text_judge(prompt, texts))
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
