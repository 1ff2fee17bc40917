"""Hybrid reward and step rewards (paper, Sec. 3.2): Eq. (5), r = r_t + r_v + r_f, each part between 0 and 1.

    part   judged                               judge           scale 0..1
    r_t    every text, given the prompt         RulesText       share of attributes that are right (toy world)
                                                LlavaCritic     its score / 100 (the paper's judge)
    r_v    every picture, given its own text    RulesVisual     share of attributes that are right (toy world)
                                                ImageReward     normal CDF of its reward (the paper's judge)
                                                ClipScore       2.5 max(0, cosine) (the paper's ablation)
    r_f    the form of the answer               format_reward   0 or 1

A judge is a callable, and any callable of the same signature can take its place. The published judges are in
judges.py. `judge` returns the parts and the reward of every step, never only their sum: Eq. (4) trains on the
sum (`hybrid_rewards`), Eq. (6) on the steps.

    python rewards.py           # score one right and three wrong answers and print the parts
"""
import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Callable

import numpy as np
import torch
from torch import Tensor

import judges
import shapes
from common import UserError, hash_folder, pick_device, png, read_picture, run_main
from tokenizer import Answer, Segment

# A judge gives None where it has no opinion, for example where a reply holds no score. None is no
# information, it is never a 0. A judge gets a whole batch at once, so that a learned one can use its
# device well.
#   TextJudge     prompts, the texts of each answer -> a score for each text
#   VisualJudge   texts, pictures                   -> a score for each picture
TextJudge = Callable[[list[str], list[list[str]]], list[list[float | None]]]
VisualJudge = Callable[[list[str], list[np.ndarray]], list[float | None]]


# ------------------------------------------------------------------------------------------------------------
# r_f, r_t, r_v: one function or class each

def format_reward(layout: str, steps: int | None = None) -> float:
    """r_f: 1 for <think>text</think><vis>IMAGE</vis> again and again, then </s>; else 0.

    layout: `Answer.layout`. Choice: where the prompt says how many steps it wants, another number of steps is
    malformed too. Otherwise an answer that stops early would lose nothing.
    """
    well_formed = re.fullmatch(r"(TwtVpv)+E", layout) is not None
    return float(well_formed and steps in (None, layout.count("TwtVpv")))


def agreement(named: shapes.Scene | None, true: shapes.Scene | None) -> float:
    """Share of the attributes (shape, colour, cell) that two scenes have in common; 0 where one is None."""
    return sum(a == b for a, b in zip(named, true)) / len(named) if named and true else 0.0


class RulesText:
    """r_t in the toy world: the k-th text against the k-th state that the words of the prompt lead to.

    It has no opinion on prompts that are not the toy world's.
    """

    def __call__(self, prompts: list[str], texts: list[list[str]]) -> list[list[float | None]]:
        """prompts [B], the texts of each answer -> a score 0..1 or None for each text."""
        return [self.score(prompt, texts_of) for prompt, texts_of in zip(prompts, texts)]

    def score(self, prompt: str, texts: list[str]) -> list[float | None]:
        """One answer. A text beyond the last true state scores 0."""
        steps = shapes.wanted_steps(prompt)
        if steps is None:
            return [None] * len(texts)
        true = [*shapes.states_of_prompt(prompt)[1:], *[None] * len(texts)]
        return [agreement(shapes.parse_caption(text), state) for text, state in zip(texts, true)]


class RulesVisual:
    """r_v in the toy world: the scene in a picture against the scene that its text names, right or wrong."""

    def __call__(self, texts: list[str], pictures: list[np.ndarray]) -> list[float]:
        """texts [n], pictures uint8 [H, W, 3] -> n scores 0..1."""
        scenes = shapes.recognise(np.stack(pictures)) if pictures else []
        return [agreement(shapes.parse_caption(text), scene) for text, scene in zip(texts, scenes)]


# ------------------------------------------------------------------------------------------------------------
# Eq. (5), and the step rewards of Eq. (6)

@dataclass
class Scores:
    """The rewards of one answer. `steps` holds r_t or r_v of every segment, in the answer's order."""
    text: float | None
    visual: float | None
    format: float
    steps: list[float | None]


def hybrid_rewards(group: list[Scores],
                   weights: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> list[float]:
    """Eq. (5): r = r_t + r_v + r_f for every answer of one group, each part times its weight (paper: 1).

    Choice: a part without a score takes its mean over the group, never 0. It is no information, no failure.
    """
    totals = [0.0] * len(group)
    for weight, part in zip(weights, ("text", "visual", "format")):
        values = [getattr(scores, part) for scores in group]
        known = [value for value in values if value is not None]
        mean = sum(known) / len(known) if known else 0.0
        totals = [total + weight * (mean if value is None else value) for total, value in zip(totals, values)]
    return totals


def own_text(segments: list[Segment], i: int) -> str:
    """The text that a picture was generated for: the segment before it, "" if that is a picture too."""
    return (segments[i - 1].text or "") if i else ""


def judge(prompts: list[str], answers: list[Answer], text_judge: TextJudge | None,
          visual_judge: VisualJudge | None) -> list[Scores]:
    """All parts of Eq. (5) for each answer; a judge that is None has no opinion on anything.

    r_t and r_v are means over steps. If the prompt says how many steps it wants, missing ones count as 0;
    otherwise the mean is over the steps that are there.
    """
    texts = [[s.text for s in answer.segments if s.text is not None] for answer in answers]
    pairs = [(own_text(answer.segments, i), s.picture) for answer in answers
             for i, s in enumerate(answer.segments) if s.picture is not None]
    text_scores = text_judge(prompts, texts) if text_judge else [[None] * len(row) for row in texts]
    visual_scores = [None] * len(pairs)
    if visual_judge:
        visual_scores = visual_judge([text for text, _ in pairs], [picture for _, picture in pairs])
    of_text, of_picture = iter(sum(text_scores, [])), iter(visual_scores)
    scores = []
    for prompt, answer in zip(prompts, answers):
        steps = [next(of_text if s.text is not None else of_picture) for s in answer.segments]
        wanted = shapes.wanted_steps(prompt)
        kinds = [s.text is not None for s in answer.segments]
        text = mean_reward([r for r, is_text in zip(steps, kinds) if is_text], wanted)
        visual = mean_reward([r for r, is_text in zip(steps, kinds) if not is_text], wanted)
        scores.append(Scores(text, visual, format_reward(answer.layout, wanted), steps))
    return scores


def mean_reward(rewards: list[float | None], wanted: int | None) -> float | None:
    """Mean over an answer's steps of one kind.

    A missing step counts as 0, a step without a score does not count.
    """
    scored = [reward for reward in rewards if reward is not None]
    if rewards and not scored:
        return None
    unscored = len(rewards) - len(scored)
    return sum(scored) / max(1, len(scored), (wanted or 0) - unscored)


# ------------------------------------------------------------------------------------------------------------
# Judges by name: --text-reward and --visual-reward, NAME or NAME=FOLDER

RULES = {"text": RulesText, "visual": RulesVisual}


def judge_names(part: str) -> list[str]:
    """The names that --text-reward (part "text") or --visual-reward ("visual") takes."""
    return ["rules", *judges.JUDGES[part]]


def make_judge(part: str, spec: str, device: torch.device, quantize: str = "none"):
    """NAME or NAME=FOLDER -> a judge. Raises UserError where its weights are missing or damaged."""
    name, _, folder = spec.partition("=")
    if name == "rules":
        return RULES[part]()
    judge_class = judges.JUDGES[part][name]
    options = {"quantize": quantize} if part == "text" else {}
    return judge_class(folder or judge_class.HUB, device, **options)


def judge_content(part: str, spec: str) -> str:
    """What a judge is, whatever its folder is called: its name and a hash of its weights."""
    name, _, folder = spec.partition("=")
    if name == "rules":
        return name
    folder = judges.judge_folder(folder or judges.JUDGES[part][name].HUB, f"{part} judge")
    return f"{name} {hash_folder(folder)}"


def make_judges(config, device: torch.device) -> tuple[TextJudge, VisualJudge]:
    """--text-reward, --visual-reward, --reward-device and --critic-quantize -> the two judges."""
    if config.reward_device:
        device = pick_device(config.reward_device, "--reward-device")
    return (make_judge("text", config.text_reward, device, config.critic_quantize),
            make_judge("visual", config.visual_reward, device))


def check_judges(config) -> None:
    """Refuse judges that do not exist before anything is loaded. Raises UserError."""
    check_judge("--text-reward", "text", config.text_reward)
    check_judge("--visual-reward", "visual", config.visual_reward)


def check_rules(config, prompts: list[str]) -> None:
    """Refuse prompts (of --prompts) that the rule judges cannot judge. Raises UserError."""
    r_t, r_v, _ = config.reward_weights
    if not ((r_t and config.text_reward == "rules") or (r_v and config.visual_reward == "rules")):
        return
    for prompt in prompts:
        if shapes.wanted_steps(prompt) is None:
            raise UserError(f"--prompts {config.prompts}: the rule judges know only the toy world's edits, "
                            f"not {prompt[:60]!r}; choose --text-reward and --visual-reward, or give them "
                            f"weight 0")


def check_judge(flag: str, part: str, spec: str) -> None:
    """Raises UserError for an unknown name, or a FOLDER that is neither there nor a hub id (one slash)."""
    name, _, folder = spec.partition("=")
    if name not in judge_names(part):
        raise UserError(f"{flag} {spec}: expected {' or '.join(judge_names(part))}")
    if folder and not Path(folder).exists() and folder.count("/") != 1:
        raise UserError(f"{flag} {spec}: there is no {folder}")


# ------------------------------------------------------------------------------------------------------------
# Answers and their rewards as plain data, for sheets and reports

def group_record(sample, answers: list[Answer], scores: list[Scores],
                 advantages: list[Tensor] | None = None) -> dict:
    """One prompt (a `data.Sample`) and its answers as JSON.

    Each step has its text or picture, its reward and its mean advantage.
    """
    records = []
    for n, (answer, score) in enumerate(zip(answers, scores)):
        steps = [{"text": s.text, "picture": None if s.picture is None else png(s.picture), "reward": reward,
                  "advantage": None if advantages is None else advantages[n][s.start:s.stop].mean().item()}
                 for s, reward in zip(answer.segments, score.steps)]
        records.append({"steps": steps, "layout": answer.layout, "text": score.text, "visual": score.visual,
                        "format": score.format})
    pictures = [read_picture(p, "a prompt") if isinstance(p, Path) else p for p in sample.prompt_pictures]
    return {"prompt": sample.prompt, "pictures": [png(p) for p in pictures], "answers": records}


def main() -> None:
    """Score one right and three wrong answers."""
    argparse.ArgumentParser(description=__doc__, usage="python rewards.py",
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    prompt = "paint it blue, move it to center. <BEGIN> a red circle at top left <image>"
    right = shapes.states_of_prompt(prompt)[1:]
    texts, good = [shapes.caption(scene) for scene in right], "TwtVpvTwtVpvE"
    for name, captions, scenes, layout in [("right", texts, right, good),
                                           ("pictures swapped", texts, right[::-1], good),
                                           ("texts swapped", texts[::-1], right, good),
                                           ("a tag missing", texts, right, "TwtVpvwtVpvE")]:
        segments = [segment for text, scene in zip(captions, scenes)
                    for segment in (Segment(0, 0, text=text), Segment(0, 0, picture=shapes.render(scene)))]
        answer = Answer(layout, segments, torch.zeros(0), torch.zeros(0))
        scores, = judge([prompt], [answer], RulesText(), RulesVisual())
        print(f"{name:18} r_t {scores.text:.2f}  r_v {scores.visual:.2f}  r_f {scores.format:.0f}  "
              f"r {hybrid_rewards([scores])[0]:.2f}")


if __name__ == "__main__":
    run_main(main)
