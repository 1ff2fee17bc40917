"""Rewards: each part answers to its own kind of mistake and to no other. Learned judges: test_judges.py."""
import numpy as np
import pytest
import torch

import shapes
from data import Sample
from rewards import RulesText, RulesVisual, Scores, format_reward, hybrid_rewards, judge
from tokenizer import Answer, Segment

PROMPT = "paint it blue, move it to center. <BEGIN> a red circle at top left <image>"
SAMPLE = Sample(PROMPT, [shapes.render(shapes.states_of_prompt(PROMPT)[0])])
NONE = torch.zeros(0, dtype=torch.long)
STATES = shapes.states_of_prompt(PROMPT)[1:]


def answer(texts=None, scenes=None, layout=None) -> Answer:
    texts = texts or [shapes.caption(s) for s in STATES]
    scenes = scenes or STATES
    segments = []
    for text, scene in zip(texts, scenes):
        segments += [Segment(0, 0, text=text), Segment(0, 0, picture=shapes.render(scene))]
    return Answer(layout or "TwtVpv" * len(texts) + "E", segments, NONE, NONE)


def score(a: Answer):
    return judge([SAMPLE], [a], RulesText(), RulesVisual())[0]


def test_a_right_answer_gets_everything():
    s = score(answer())
    assert (s.text, s.visual, s.format) == (1, 1, 1) and s.steps == [1, 1, 1, 1]
    assert hybrid_rewards([s]) == [3] and hybrid_rewards([s], (0, 0, 1)) == [1]
    assert hybrid_rewards([s], (0.5, 2, 0)) == [2.5]


def test_swapping_images_changes_only_the_visual_reward():
    s = score(answer(scenes=STATES[::-1]))
    assert (s.text, s.format) == (1, 1) and s.visual == pytest.approx(2 / 3)


def test_swapping_texts_changes_text_and_visual():
    s = score(answer(texts=[shapes.caption(x) for x in STATES[::-1]]))
    assert s.text == pytest.approx(2 / 3) and s.visual == pytest.approx(2 / 3) and s.format == 1


def test_breaking_a_tag_changes_only_the_format_reward():
    s = score(answer(layout="TwtVpvwtVpvE"))
    assert (s.text, s.visual, s.format) == (1, 1, 0)


@pytest.mark.parametrize("layout, good", [
    ("TwtVpvTwtVpvE", 1), ("TwtVpvE", 0), ("TwtVpvTwtVpv", 0), ("TwtVpTwtVpvE", 0), ("TtVpvTwtVpvE", 0),
    ("VpvTwtVpvTwtE", 0), ("wTwtVpvTwtVpvE", 0), ("TwtVpvTwtVpvwE", 0), ("TwtVpvTwtVpvTwtVpvE", 0), ("E", 0)])
def test_format_reward_by_layout(layout, good):
    assert format_reward(layout, ["a text"] * layout.count("w"), 2) == good


def test_a_missing_step_scores_zero():
    s = score(answer(texts=[shapes.caption(STATES[0])], scenes=STATES[:1], layout="TwtVpvE"))
    assert (s.text, s.visual, s.format) == (0.5, 0.5, 0)


def test_the_visual_judge_believes_the_generated_text_not_the_truth():
    wrong = [shapes.Scene("square", "green", "left"), shapes.Scene("cross", "yellow", "top")]
    s = score(answer(texts=[shapes.caption(x) for x in wrong], scenes=wrong))
    assert s.visual == 1 and s.text < 0.5


def test_noise_and_empty_boards_are_no_scene():
    rng = np.random.default_rng(0)
    junk = rng.integers(0, 256, (8, 24, 24, 3), dtype=np.uint8)
    assert shapes.recognise(junk) == [None] * 8
    assert shapes.recognise(np.stack([shapes.render(None)])) == [None]


def test_an_opinionless_judge_is_no_reward_and_not_zero():
    s = judge([SAMPLE], [answer()], lambda *asked: [None, 1.0], RulesVisual())[0]
    assert s.steps[0] is None and s.text == 1.0
    silent = judge([SAMPLE], [answer()], lambda *asked: [None, None], RulesVisual())[0]
    assert silent.text is None


def test_a_part_without_opinion_takes_the_groups_mean():
    """Texts .2, .6 and unknown: the unknown one counts .4."""
    group = [Scores(t, 0.5, 1.0, []) for t in (0.2, 0.6, None)]
    assert hybrid_rewards(group) == pytest.approx([1.7, 2.1, 1.9])
