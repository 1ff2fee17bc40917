"""Rewards: each part answers to its own kind of mistake and to no other. Learned judges: test_judges.py."""
from dataclasses import replace

import numpy as np
import pytest
import torch

import shapes
from data import Sample
from rewards import RulesText, RulesVisual, RulesWeak, Scores, format_reward, hybrid_rewards, judge
from tokenizer import Answer, Segment

PROMPT = "paint it blue, move it to center. <BEGIN> a red circle at top left <image>"
SAMPLE = Sample(PROMPT, [shapes.render(shapes.states_of_prompt(PROMPT)[0])], steps=2)
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


@pytest.mark.parametrize("kind, layout, good", [
    ("understanding", "wE", 1), ("understanding", "w", 0), ("understanding", "E", 0),
    ("understanding", "TwtE", 0), ("understanding", "TwtVpvE", 0), ("understanding", "wVpvE", 0),
    ("t2i", "pvE", 1), ("t2i", "pE", 0), ("t2i", "pvwE", 0), ("t2i", "pvVpvE", 0), ("t2i", "pv", 0),
    ("interleaved", "wE", 0), ("interleaved", "pvE", 0), ("interleaved", "TwtVpvTwtVpvTwtVpvE", 1)])
def test_every_kind_of_prompt_has_its_own_form(kind, layout, good):
    assert format_reward(layout, ["a text"] * layout.count("w"), kind=kind) == good


def test_the_number_of_steps_is_the_samples_and_not_read_from_the_prompt():
    """The same answer of one step to the same words, which ask for two."""
    short = answer(texts=[shapes.caption(STATES[0])], scenes=STATES[:1])
    for steps, r_t, r_f in [(1, 1, 1), (2, 0.5, 0), (4, 0.25, 0), (None, 1, 1)]:
        s = judge([replace(SAMPLE, steps=steps)], [short], RulesText(), RulesVisual())[0]
        assert (s.text, s.visual, s.format) == (r_t, r_t, r_f)
    free = Sample("Tell it in three parts.", [], steps=3)
    s = judge([free], [answer()], lambda *asked: [0.9, 0.9], lambda *asked: [0.6, 0.6], "process")[0]
    assert s.visual == pytest.approx(0.4) and s.format == 0


def test_words_and_pictures_that_a_kind_does_not_want_have_no_reward():
    """The judge of the other part is asked as ever: about the words, or about the picture of the prompt."""
    def told(*asked):
        record.append(asked)
        return [0.7] * len(asked[0])
    picture, record = shapes.render(STATES[0]), []
    segments = [Segment(0, 0, text="a red circle"), Segment(0, 0, picture=picture)]
    question = judge([Sample("what is it?", [], kind="understanding")],
                     [Answer("wVpvE", segments, NONE, NONE)], told, told)[0]
    assert (question.text, question.visual, question.format) == (0.7, None, 0) and len(record) == 1
    drawing = judge([Sample("a fox", [], kind="t2i")], [Answer("pvwE", segments[::-1], NONE, NONE)],
                    told, told)[0]
    assert (drawing.text, drawing.visual, drawing.steps) == (None, 0.7, [0.7, None])
    assert record[1][0] == ["a fox"], "what a text-to-image picture shows is the prompt"
    empty = judge([Sample("a fox", [], kind="t2i")], [Answer("E", [], NONE, NONE)], told, told)[0]
    assert (empty.visual, empty.format) == (0, 0)


def test_a_missing_step_scores_zero():
    s = score(answer(texts=[shapes.caption(STATES[0])], scenes=STATES[:1], layout="TwtVpvE"))
    assert (s.text, s.visual, s.format) == (0.5, 0.5, 0)


def test_the_visual_judge_believes_the_generated_text_not_the_truth():
    wrong = [shapes.Scene("square", "green", "left"), shapes.Scene("cross", "yellow", "top")]
    s = score(answer(texts=[shapes.caption(x) for x in wrong], scenes=wrong))
    assert s.visual == 1 and s.text < 0.5


@pytest.mark.parametrize("scene, rules, weak", [
    (("circle", "red", "top left"), 1, 1), (("circle", "red", "bottom"), 2 / 3, 1),
    (("square", "red", "top left"), 2 / 3, 1 / 2), (("square", "blue", "top left"), 1 / 3, 0)])
def test_the_weak_visual_judge_does_not_see_where_the_object_is(scene, rules, weak):
    texts, pictures = ["a red circle at top left"], [shapes.render(shapes.Scene(*scene))]
    assert RulesVisual()(texts, pictures) == pytest.approx([rules])
    assert RulesWeak()(texts, pictures) == pytest.approx([weak])
    assert RulesWeak()(["no caption", texts[0]], [pictures[0], shapes.render(None)]) == [0, 0]


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
