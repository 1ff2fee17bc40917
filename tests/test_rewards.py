"""Rewards: each part answers to its own kind of mistake and to no other. Learned judges: test_judges.py."""
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import rewards
import shapes
from common import UserError
from data import Sample
from rewards import (RulesText, RulesVisual, RulesWeak, Scores, check_judges, check_prompts, format_reward,
                     hybrid_rewards, judge, make_judges)
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


# ------------------------------------------------------------------------------------------------------------
# What a judge is asked, and what its scores become

EGG = Sample("How do I boil an egg? <image>", [np.full((4, 4, 3), 7, np.uint8)])


class Listener:
    """A text judge that scores 0.1 a word and keeps what it was asked."""

    def __init__(self):
        self.asked = []

    def __call__(self, prompts, pictures, texts):
        self.asked += zip(prompts, pictures, texts, strict=True)
        return [0.1 * len(" ".join(so_far).split()) for so_far in texts]


def story(*texts: str) -> Answer:
    return answer(texts=texts, scenes=[STATES[0]] * len(texts))


def test_a_text_judge_gets_the_pictures_of_the_prompt():
    listener = Listener()
    other = replace(EGG, prompt_pictures=[np.zeros((4, 4, 3), np.uint8)])
    judge([EGG, other], [story("Boil it."), story("Boil it.")], listener, None)
    (_, of_egg, _), (_, of_other, _) = listener.asked
    assert of_egg[0] is EGG.prompt_pictures[0] and of_other[0] is other.prompt_pictures[0]


def test_a_prompts_pictures_are_read_once_for_all_its_answers(monkeypatch):
    read, real = [], rewards.read_pictures
    monkeypatch.setattr(rewards, "read_pictures", lambda sample: read.append(sample) or real(sample))
    judge([SAMPLE] * 4, [answer() for _ in range(4)], RulesText(), RulesVisual())
    assert read == [SAMPLE]


def test_pictures_in_files_are_read_for_a_text_judge(tmp_path):
    from PIL import Image
    Image.new("RGB", (5, 3), "red").save(tmp_path / "a.png")
    listener = Listener()
    judge([replace(EGG, prompt_pictures=[tmp_path / "a.png"])], [story("Boil it.")], listener, None)
    assert listener.asked[0][1][0].tolist() == [[[255, 0, 0]] * 5] * 3


@pytest.mark.parametrize("credit, asked, steps", [
    ("process", [["Boil it."], ["Boil it.", "Eat it now."], ["So."]], [0.2, None, 0.5, None]),
    ("outcome", [["Boil it.", "Eat it now."], ["So."]], [None, None, 0.5, None])])
def test_process_asks_once_a_step_and_outcome_once_an_answer(credit, asked, steps):
    listener, answers = Listener(), [story("Boil it.", "Eat it now."), story("So.")]
    first, second = judge([EGG, EGG], answers, listener, None, credit)
    assert [texts for _, _, texts in listener.asked] == asked
    assert first.steps == pytest.approx(steps)
    assert (first.text, second.text) == pytest.approx((0.5, 0.1)), "the score of the whole text in both"
    assert len(first.unscored) == len(asked) - 1, "who was not asked is not counted as without a score"


def test_the_reward_of_eq5_is_the_same_number_under_both_credits():
    """A step without a score in a group of its own: neither the other group nor the earlier steps fill it."""
    answers = [story(*texts) for texts in (("Boil it.", "Eat it now."), ("So.", "?"),
                                           ("A b c d.", "E."), ("x", "y z"))]

    def forgetful(prompts, pictures, texts):
        return [None if so_far[-1] == "?" else score
                for so_far, score in zip(texts, Listener()(prompts, pictures, texts), strict=True)]
    for text_judge, visual_judge in ((forgetful, None), (RulesText(), RulesVisual())):
        rewards = [[hybrid_rewards(judge([sample] * 2, part, text_judge, visual_judge, credit))
                    for sample, part in ((EGG, answers[:2]), (SAMPLE, answers[2:]))]
                   for credit in ("process", "outcome")]
        assert rewards[0] == rewards[1]
        if text_judge is forgetful:
            assert rewards[0][0] == pytest.approx([1.5, 1.5]) and rewards[0][1] == pytest.approx([1.5, 1.3])


def test_rules_judge_each_step_by_its_own_text_and_the_whole_by_their_mean():
    halves = answer(texts=[shapes.caption(STATES[0]), shapes.caption(STATES[0])])
    for credit in ("process", "outcome"):
        scores, = judge([SAMPLE], [halves], RulesText(), None, credit)
        assert scores.steps[::2] == [1, pytest.approx(2 / 3)] and scores.text == pytest.approx(5 / 6)


@pytest.mark.parametrize("empty", ["", "  ", "\n\t", "\u200b", "\xa0"])
def test_empty_things_earn_nothing_and_nobody_is_asked(empty):
    listener, pictures = Listener(), []

    def see(texts, of):
        pictures.extend(texts)
        return [0.5] * len(texts)
    whole, hollow = judge([EGG, EGG], [story("Boil it.", "Eat it."), story("Boil it.", empty)], listener, see)
    assert (whole.format, hollow.format) == (1, 0)
    assert pictures == ["Boil it.", "Eat it.", "Boil it."] and "" not in pictures
    assert hollow.steps == [pytest.approx(0.2), 0.5, 0, 0] and hollow.visual == 0.25
    assert len(listener.asked) == 3
    nothing, = judge([EGG], [story(empty)], listener, see)
    assert (nothing.text, nothing.visual, nothing.format) == (0, 0, 0) and nothing.steps == [0, 0]
    assert len(listener.asked) == 3 and len(pictures) == 3


def test_a_picture_behind_a_picture_has_no_text_of_its_own():
    two = answer(layout="TwtVpvVpvE")
    two.segments = [two.segments[0], two.segments[1], two.segments[3]]
    scores, = judge([EGG], [two], None, lambda texts, pictures: [1.0] * len(texts))
    assert scores.steps == [None, 1, 0] and scores.visual == 0.5


def test_a_text_to_image_prompt_is_the_text_of_its_picture():
    caption, asked = Sample("a fox in the snow", [], kind="t2i"), []
    alone = Answer("pvE", [Segment(0, 0, picture=shapes.render(STATES[0]))], NONE, NONE)

    def see(texts, pictures):
        asked.extend(texts)
        return [0.7]
    assert judge([caption], [alone], None, see)[0].visual == 0.7 and asked == ["a fox in the snow"]


def test_texts_that_a_visual_judge_cuts_are_marked():
    class Short:
        def __call__(self, texts, pictures):
            return [0.5] * len(texts)

        def cuts(self, text):
            return len(text) > 10
    scores, = judge([EGG], [story("Boil it.", "Boil it for nine minutes.")], None, Short())
    assert scores.cut == [False, True]
    assert judge([EGG], [story("Boil it.")], None, RulesVisual())[0].cut == [False]


@pytest.mark.parametrize("scores, words", [
    ([0.5], "found 1 scores, expected a list of 2"), (None, "found None, expected a list of 2"),
    ([0.5, math.nan], "found nan"), ([0.5, math.inf], "found inf"), ([0.5, "good"], "found 'good'"),
    ([0.5, [1]], r"found \[1\]"), (0.5, "found 0.5, expected a list of 2")])
@pytest.mark.parametrize("part", ["text", "visual"])
def test_a_judge_that_breaks_its_contract_is_named_with_the_answer(part, scores, words):
    def critical(*asked):
        return scores
    judges = (critical, None) if part == "text" else (None, critical)
    with pytest.raises(UserError, match=f"{part} judge critical: {words}") as error:
        judge([EGG, EGG], [story("Boil it."), story("Fry it.")], *judges)
    assert len(str(error.value).splitlines()) == 1
    if isinstance(scores, list) and len(scores) == 2:
        assert f"step {2 if part == 'visual' else 1} of answer 2" in str(error.value)
        assert ("Fry it." if part == "visual" else "boil an egg") in str(error.value)


def test_scores_may_be_any_kind_of_number():
    scores, = judge([EGG], [story("Boil it.")], lambda *asked: [np.float32(0.5)],
                    lambda *asked: (1,))
    assert type(scores.text) is float and scores.text == 0.5 and type(scores.visual) is float


def settings(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{"text_reward": "rules", "visual_reward": "rules", "reward_weights": (1, 1, 1),
                              "reward_device": "", "critic_quantize": "none", "critic_tiles": 0,
                              "prompts": "mine.jsonl", "budget": 100, **changes})


def test_a_part_of_weight_0_is_judged_by_nobody():
    """The folders hold no weights: a judge that was made would fail."""
    cpu = torch.device("cpu")
    nobody = settings(text_reward="llava-critic=tests", visual_reward="image-reward=tests",
                      reward_weights=(0, 0, 1))
    assert make_judges(nobody, cpu) == (None, None)
    text, visual = make_judges(settings(visual_reward="", reward_weights=(1, 0, 1)), cpu)
    assert isinstance(text, RulesText) and visual is None
    with pytest.raises(UserError, match="vocab.json"):
        make_judges(settings(text_reward="llava-critic=tests"), cpu)
    scores, = judge([SAMPLE], [answer()], None, None)
    assert (scores.text, scores.visual, scores.format, scores.unscored) == (None, None, 1, [])
    assert hybrid_rewards([scores], (0, 0, 1)) == [1]


def test_a_weight_for_a_part_without_a_judge_is_refused():
    with pytest.raises(UserError, match="--reward-weights: 2 for the text part, but --text-reward names no"):
        check_judges(settings(text_reward="", reward_weights=(2, 1, 1)))
    with pytest.raises(UserError, match="visual part, but --visual-reward names no judge"):
        check_judges(settings(visual_reward=""))
    check_judges(settings(text_reward="", visual_reward="", reward_weights=(0, 0, 1)))


def test_a_judge_says_before_training_which_prompts_it_cannot_take():
    seen = []
    critic = SimpleNamespace(check=lambda prompt, pictures, budget: seen.append((prompt, pictures, budget)))
    check_prompts(critic, [EGG], 100)
    assert seen == [(EGG.prompt, EGG.prompt_pictures, 100)]
    check_prompts(RulesText(), [EGG], 100)
    check_prompts(None, [EGG], 100)
