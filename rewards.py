"""Hybrid reward and step rewards (paper, Sec. 3.2): Eq. (5), r = r_t + r_v + r_f, each part between 0 and 1.

    part   judged                               judge           scale 0..1
    r_t    every text, given the prompt         RulesText       share of attributes that are right (toy world)
                                                LlavaCritic     its score over the scale (the paper's judge)
    r_v    every picture, given its own text    RulesVisual     share of attributes that are right (toy world)
                                                ImageReward     normal CDF of its reward (the paper's judge)
                                                ClipScore       2.5 max(0, cosine) (the paper's ablation)
                                                RulesWeak       shape and colour alone (toy world)
    r_f    the form of the answer               format_reward   0 or 1

A judge is a callable, and any callable of the same signature can take its place. The published judges are in
judges.py. `judge` returns the parts and the reward of every step, never only their sum: Eq. (4) trains on the
sum (`hybrid_rewards`), Eq. (6) on the steps.

    python rewards.py           # score one right and three wrong answers and print the parts
"""
from common import UserError, hash_folder, pick_device, read_picture, run_main, thumbnail

import argparse
import math
import re
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from types import SimpleNamespace
from typing import Callable

import numpy as np
import torch
from torch import Tensor

import judges
import shapes
from tokenizer import Answer, Segment

# A judge gives None where it has no opinion, for example where a reply holds no score. None is no
# information, it is never a 0. A judge gets a whole batch at once, so that a learned one can use its
# device well. Pictures of prompts are arrays; pictures of answers too.
#   TextJudge     prompts, the pictures of each prompt, the texts of each answer up to the judged one
#                 -> a score for each of these answers so far
#   VisualJudge   texts, pictures -> a score for each picture
Score = float | None
TextJudge = Callable[[list[str], list[list[np.ndarray]], list[list[str]]], list[Score]]
VisualJudge = Callable[[list[str], list[np.ndarray]], list[Score]]


# ------------------------------------------------------------------------------------------------------------
# r_f, r_t, r_v: one function or class each

def visible(text: str | None) -> bool:
    """Whether a text has a character that a reader sees."""
    return any(c.isprintable() and not c.isspace() for c in text or "")

FORMS = {                        # kind of a prompt (data.KINDS) -> the layout of its answer, see `Answer`
    "interleaved": r"(TwtVpv)+E",
    "understanding": r"wE",      # words alone
    "t2i": r"pvE",               # one picture, that the prompt opens
}


def format_reward(layout: str, texts: list[str], steps: int | None = None,
                  kind: str = "interleaved") -> float:
    """r_f: 1 for <think>text</think><vis>IMAGE</vis> again and again, then </s>; else 0.

    layout: `Answer.layout`; texts: of the answer's text steps. A text without a visible character breaks the
    form. Prompts of other kinds have forms of their own (FORMS).
    Choice: where the number of steps is known, another number of steps is malformed too. Otherwise an answer
    that stops early would lose nothing.
    """
    well_formed = re.fullmatch(FORMS[kind], layout) is not None and all(map(visible, texts))
    return float(well_formed and steps in (None, layout.count("TwtVpv")))


def wanted(sample) -> tuple[int | None, int | None]:
    """How many texts and how many pictures the answer to a `data.Sample` should have; None: not known."""
    return {"understanding": (1, 0), "t2i": (0, 1)}.get(sample.kind, (sample.steps, sample.steps))


def agreement(named: shapes.Scene | None, true: shapes.Scene | None, first: int = 3) -> float:
    """Share of the first attributes (shape, colour, cell) that two scenes share; 0 where one is None."""
    return sum(a == b for a, b in zip(named[:first], true[:first])) / first if named and true else 0.0


class RulesText:
    """r_t in the toy world: the k-th text against the k-th state that the words of the prompt lead to.

    It needs no pictures, and it has no opinion on prompts that are not the toy world's.
    """
    own_step = True              # a score is about the last text alone, not about the text so far

    def __call__(self, prompts: list[str], pictures: list, texts: list[list[str]]) -> list[Score]:
        """prompts [n], pictures (not looked at), texts up to the judged one -> n scores 0..1 or None."""
        return [self.score(prompt, so_far) for prompt, so_far in zip(prompts, texts)]

    def score(self, prompt: str, texts: list[str]) -> Score:
        """The last of an answer's texts so far. A text beyond the last true state scores 0."""
        if shapes.wanted_steps(prompt) is None:
            return None
        true = shapes.states_of_prompt(prompt)[1:]
        state = true[len(texts) - 1] if len(texts) <= len(true) else None
        return agreement(shapes.parse_caption(texts[-1]), state)


class RulesVisual:
    """r_v in the toy world: the scene in a picture against the scene that its text names, right or wrong."""
    attributes = 3               # of shape, colour, cell: how many are compared

    def __call__(self, texts: list[str], pictures: list[np.ndarray]) -> list[float]:
        """texts [n], pictures uint8 [H, W, 3] -> n scores 0..1."""
        scenes = shapes.recognise(np.stack(pictures)) if pictures else []
        return [agreement(shapes.parse_caption(text), scene, self.attributes)
                for text, scene in zip(texts, scenes)]


class RulesWeak(RulesVisual):
    """r_v that does not look where the object is. It stands for CLIP-score in the paper's ablation.

    CLIP matches texts and pictures much like bags of words (arXiv 2210.01936): it sees what there is and
    hardly how it is arranged. So a policy can put the object anywhere without losing reward.
    """
    attributes = 2


# ------------------------------------------------------------------------------------------------------------
# Eq. (5), and the step rewards of Eq. (6)

@dataclass
class Scores:
    """The rewards of one answer. `steps` holds r_t or r_v of every segment, in the answer's order."""
    text: Score
    visual: Score
    format: float
    steps: list[Score]                                     # None: without a score, or nobody was asked
    unscored: list[bool] = field(default_factory=list)     # of each step in question: it got no score
    cut: list[bool] = field(default_factory=list)          # of each judged picture: its text was cut to fit


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


def own_text(sample, segments: list[Segment], i: int) -> str:
    """The text that the picture at i was generated for: the segment before it, "" if that is a picture too.

    For a text-to-image prompt (kind "t2i") it is the prompt.
    """
    if sample.kind == "t2i":
        return sample.prompt
    return (segments[i - 1].text or "") if i else ""


def judge(samples: list, answers: list[Answer], text_judge: TextJudge | None,
          visual_judge: VisualJudge | None, credit: str = "process") -> list[Scores]:
    """All parts of Eq. (5) for each answer; a part without a judge is None.

    samples: the `data.Sample` that each answer belongs to.
    credit: "process" asks the text judge once a text step, about the text so far; "outcome" once an answer,
    about the whole text.
    r_v is the mean over pictures. If the number of steps is known (`wanted`), missing ones count as 0;
    otherwise the mean is over the steps that are there. A part that the prompt's kind does not have is None.

    Choice: r_t is the score of the whole text under both credits, so the reward in the log is the one that
    Eq. (4) trains on. The last step's text so far is the whole text. The rules judge each step's own text
    alone (`own_step`), so for them it is the mean over steps, as in r_v.
    """
    own_step = getattr(text_judge, "own_step", False)
    texts = ask_text(samples, answers, text_judge, own_step or credit == "process") if text_judge else {}
    pictures = ask_visual(samples, answers, visual_judge) if visual_judge else {}
    cuts = getattr(visual_judge, "cuts", lambda text: False)
    rewards = [({}, {}) for _ in answers]                  # r_t and r_v of each answer, by segment
    for kind, part in enumerate((texts, pictures)):
        for (n, i), reward in part.items():
            rewards[n][kind][i] = reward
    scores = []
    for sample, answer, (r_t, r_v) in zip(samples, answers, rewards, strict=True):
        segments, (n_texts, n_pictures) = answer.segments, wanted(sample)
        whole = [r for i, r in r_t.items() if visible(segments[i].text)]
        text = mean_reward(list(r_t.values()), n_texts) if own_step or not whole else whole[-1]
        scores.append(Scores(
            text=text if text_judge and n_texts != 0 else None,
            visual=mean_reward(list(r_v.values()), n_pictures) if visual_judge and n_pictures != 0 else None,
            format=format_reward(answer.layout, answer.texts, sample.steps, sample.kind),
            steps=[(r_t | r_v).get(i) for i in range(len(segments))],
            unscored=[r is None for r in (r_t | r_v).values()],
            cut=[cuts(own_text(sample, segments, i)) for i in r_v]))
    return scores


Place = tuple[int, int]          # answer, segment


def ask_text(samples: list, answers: list[Answer], text_judge: TextJudge,
             every_step: bool) -> dict[Place, Score]:
    """Ask about every text so far, or once an answer about the whole text.

    Choice: a text without a visible character earns 0, and nobody is asked. Words in the answer to a
    text-to-image prompt have no reward: they break the form.
    """
    empty, asked = {}, []
    for n, answer in enumerate(answers):
        if wanted(samples[n])[0] == 0:
            continue
        texts = {(n, i): visible(s.text) for i, s in enumerate(answer.segments) if s.text is not None}
        empty |= {place: 0.0 for place, there in texts.items() if not there}
        steps = [place for place, there in texts.items() if there]
        asked += steps if every_step else steps[-1:]
    pictures = {key: read_pictures(sample) for key, sample in {id(s): s for s in samples}.items()}
    so_far = [[s.text for s in answers[n].segments[:i + 1] if s.text is not None] for n, i in asked]
    return empty | ask("text judge", text_judge, asked, [samples[n].prompt for n, _ in asked],
                       [pictures[id(samples[n])] for n, _ in asked], so_far)


def ask_visual(samples: list, answers: list[Answer], visual_judge: VisualJudge) -> dict[Place, Score]:
    """Ask about every picture, given its own text.

    Choice: a picture without a text of its own earns 0, and nobody is asked. A picture in the answer to an
    understanding prompt has no reward: it breaks the form.
    """
    texts = {(n, i): own_text(samples[n], answer.segments, i) for n, answer in enumerate(answers)
             for i, s in enumerate(answer.segments) if s.picture is not None and wanted(samples[n])[1] != 0}
    asked = [place for place, text in texts.items() if visible(text)]
    pictures = [answers[n].segments[i].picture for n, i in asked]
    return dict.fromkeys(texts, 0.0) | ask("visual judge", visual_judge, asked,
                                           [texts[place] for place in asked], pictures)


def ask(part: str, judge: Callable, places: list[Place], *columns: list) -> dict[Place, Score]:
    """Call a judge with its columns, one entry a place -> the score of each place, a float or None.

    Raises UserError, naming judge and answer, where the scores are not as many, or one is no finite number.
    """
    if not places:
        return {}
    scores, who = judge(*columns), f"{part} {getattr(judge, '__name__', type(judge).__name__)}"
    if not isinstance(scores, (list, tuple)) or len(scores) != len(places):
        found = f"{len(scores)} scores" if isinstance(scores, (list, tuple)) else f"{scores!r:.60}"
        raise UserError(f"{who}: found {found}, expected a list of {len(places)}, one for each step of "
                        f"{len({n for n, _ in places})} answers from {columns[0][0]!r:.100} on")
    for (n, i), score, asked in zip(places, scores, columns[0]):
        if score is not None and not (isinstance(score, Real) and math.isfinite(score)):
            raise UserError(f"{who}: found {score!r:.60}, expected a finite number or None, for step {i + 1} "
                            f"of answer {n + 1}, asked with {asked!r:.100}")
    return {place: None if score is None else float(score) for place, score in zip(places, scores)}


def read_pictures(sample) -> list[np.ndarray]:
    """The pictures of a prompt (a `data.Sample`); those that are files are read."""
    return [read_picture(p, "a prompt") if isinstance(p, Path) else p for p in sample.prompt_pictures]


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

RULES = {"text": {"rules": RulesText}, "visual": {"rules": RulesVisual, "rules-weak": RulesWeak}}


def judge_names(part: str) -> list[str]:
    """The names that --text-reward (part "text") or --visual-reward ("visual") takes."""
    return [*RULES[part], *judges.JUDGES[part]]


def make_judge(part: str, spec: str, device: torch.device, quantize: str = "none", tiles: int = 0):
    """NAME or NAME=FOLDER -> a judge. Raises UserError where its weights are missing or damaged."""
    name, _, folder = spec.partition("=")
    if name in RULES[part]:
        return RULES[part][name]()
    judge_class = judges.JUDGES[part][name]
    options = {"quantize": quantize, "tiles": tiles} if part == "text" else {}
    return judge_class(folder or judge_class.HUB, device, **options)


def judge_content(part: str, spec: str) -> str:
    """What a judge is, whatever its folder is called: its name and a hash of its weights."""
    name, _, folder = spec.partition("=")
    if name not in judges.JUDGES[part]:
        return name
    folder = judges.judge_folder(folder or judges.JUDGES[part][name].HUB, f"{part} judge")
    return f"{name} {hash_folder(folder)}"


def make_judges(config, device: torch.device) -> tuple[TextJudge | None, VisualJudge | None]:
    """The settings under "rewards" -> the two judges; None for a part of weight 0, which nobody judges."""
    if config.reward_device:
        device = pick_device(config.reward_device, "--reward-device")
    (r_t, r_v, _), text, visual = config.reward_weights, None, None
    if r_t:
        text = make_judge("text", config.text_reward, device, config.critic_quantize, config.critic_tiles)
    if r_v:
        visual = make_judge("visual", config.visual_reward, device)
    return text, visual


def check_judges(config) -> None:
    """Refuse judges that do not exist before anything is loaded. Raises UserError."""
    r_t, r_v, _ = config.reward_weights
    for flag, part, spec, weight in (("--text-reward", "text", config.text_reward, r_t),
                                     ("--visual-reward", "visual", config.visual_reward, r_v)):
        if weight and not spec:
            raise UserError(f"--reward-weights: {weight:g} for the {part} part, but {flag} names no judge: "
                            f"expected {' or '.join(judge_names(part))}, or weight 0")
        if spec:
            check_judge(flag, part, spec)


def check_prompts(text_judge: TextJudge | None, samples: list, budget: int) -> None:
    """Refuse prompts whose pictures a text judge cannot take beside answers of `budget`. Raises UserError.

    A judge that has such a limit says so itself, in a method `check`.
    """
    for sample in samples if hasattr(text_judge, "check") else ():
        text_judge.check(sample.prompt, read_pictures(sample), budget)


def check_rules(config, samples: list) -> None:
    """Refuse prompts (of --prompts) that the rule judges cannot judge. Raises UserError."""
    r_t, r_v, _ = config.reward_weights
    for sample in samples:
        n_texts, n_pictures = wanted(sample)
        asked = (r_t and n_texts != 0 and config.text_reward in RULES["text"],
                 r_v and n_pictures != 0 and config.visual_reward in RULES["visual"])
        known = shapes.parse_caption if sample.kind == "t2i" else shapes.wanted_steps
        if any(asked) and known(sample.prompt) is None:
            raise UserError(f"--prompts {config.prompts}: the rule judges know only the toy world's edits, "
                            f"not {sample.prompt[:60]!r}; choose --text-reward and --visual-reward, or give "
                            f"them weight 0")


def check_judge(flag: str, part: str, spec: str) -> None:
    """Raises UserError for an unknown name, or a FOLDER that is neither there nor a hub id (one slash)."""
    name, _, folder = spec.partition("=")
    if name not in judge_names(part):
        raise UserError(f"{flag} {spec}: expected {' or '.join(judge_names(part))}")
    if folder and not Path(folder).exists() and folder.count("/") != 1:
        raise UserError(f"{flag} {spec}: no such file or folder")


# ------------------------------------------------------------------------------------------------------------
# Answers and their rewards as plain data, for sheets and reports

def true_steps(prompt: str) -> list[dict]:
    """The right answer to a toy prompt as the steps of a record, [] for other prompts."""
    states = shapes.states_of_prompt(prompt)[1:] if shapes.wanted_steps(prompt) else []
    return [step for state in states for step in ({"text": shapes.caption(state), "picture": None},
                                                  {"text": None, "picture": thumbnail(shapes.render(state))})]


def right_steps(prompt: str, answer: Answer) -> list[bool | None]:
    """Whether each step is the true one: the k-th text names, the k-th picture shows the k-th true state.

    None for each where the prompt is not the toy world's. A step beyond the last true state is wrong.
    """
    if not shapes.wanted_steps(prompt):
        return [None] * len(answer.segments)
    states = {kind: iter(shapes.states_of_prompt(prompt)[1:]) for kind in ("text", "picture")}
    right = []
    for s in answer.segments:
        if s.picture is None:
            named, true = shapes.parse_caption(s.text), next(states["text"], None)
        else:
            named, true = shapes.recognise(s.picture[None])[0], next(states["picture"], None)
        right.append(named is not None and named == true)
    return right


def group_record(sample, answers: list[Answer], scores: list[Scores],
                 advantages: list[Tensor] | None = None) -> dict:
    """One prompt (a `data.Sample`), its true answer if that is known, and its answers, as JSON.

    Each step has its text or picture, whether it is right, its reward and its mean advantage.
    """
    records = []
    for n, (answer, score) in enumerate(zip(answers, scores)):
        right = right_steps(sample.prompt, answer)
        steps = [{"text": s.text, "picture": None if s.picture is None else thumbnail(s.picture),
                  "right": right[i], "reward": score.steps[i],
                  "advantage": None if advantages is None else advantages[n][s.start:s.stop].mean().item()}
                 for i, s in enumerate(answer.segments)]
        records.append({"steps": steps, "layout": answer.layout, "text": score.text, "visual": score.visual,
                        "format": score.format})
    return {"prompt": sample.prompt, "pictures": list(map(thumbnail, read_pictures(sample))),
            "truth": true_steps(sample.prompt), "answers": records}


def main() -> None:
    """Score one right and three wrong answers."""
    argparse.ArgumentParser(description=__doc__, usage="python rewards.py",
                            formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    prompt = "paint it blue, move it to center. <BEGIN> a red circle at top left <image>"
    sample = SimpleNamespace(prompt=prompt, prompt_pictures=[], kind="interleaved", steps=2)
    right = shapes.states_of_prompt(prompt)[1:]
    texts, good = [shapes.caption(scene) for scene in right], "TwtVpvTwtVpvE"
    for name, captions, scenes, layout in [("right", texts, right, good),
                                           ("pictures swapped", texts, right[::-1], good),
                                           ("texts swapped", texts[::-1], right, good),
                                           ("a tag missing", texts, right, "TwtVpvwtVpvE")]:
        segments = [segment for text, scene in zip(captions, scenes)
                    for segment in (Segment(0, 0, text=text), Segment(0, 0, picture=shapes.render(scene)))]
        answer = Answer(layout, segments, torch.zeros(0), torch.zeros(0))
        scores, = judge([sample], [answer], RulesText(), RulesVisual())
        print(f"{name:18} r_t {scores.text:.2f}  r_v {scores.visual:.2f}  r_f {scores.format:.0f}  "
              f"r {hybrid_rewards([scores])[0]:.2f}")


if __name__ == "__main__":
    run_main(main)
