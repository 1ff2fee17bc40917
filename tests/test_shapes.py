"""The toy world: words and pictures mean the same, splits do not overlap, noise is what it says."""
import json
import random
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

import data
import shapes


def test_words_and_pictures_of_all_scenes_are_read_back():
    assert len(shapes.SCENES) == 144
    assert [shapes.parse_caption(shapes.caption(s)) for s in shapes.SCENES] == shapes.SCENES
    assert shapes.recognise(np.stack([shapes.render(s) for s in shapes.SCENES])) == shapes.SCENES


def test_states_by_hand():
    states = shapes.states_of_prompt("paint it blue, turn it into a cross, move it to top right. "
                                     "<BEGIN> a red circle at left <image>")
    assert states == [("circle", "red", "left"), ("circle", "blue", "left"), ("cross", "blue", "left"),
                      ("cross", "blue", "top right")]
    with pytest.raises(ValueError, match="draw a cat"):
        shapes.states_of_prompt("draw a cat")
    assert shapes.wanted_steps("draw a cat") is None


@pytest.mark.parametrize("split", ["train", "heldout", "pairs"])
def test_splits_do_not_overlap_and_edits_change_something(split):
    rng = random.Random(0)
    for _ in range(200):
        prompt = shapes.sample_prompt(rng, 3, split)
        states = shapes.states_of_prompt(prompt.text)
        assert shapes.split_of(prompt.text) == split
        assert all(a != b for a, b in zip(states, states[1:]))
        assert any(s[:2] in shapes.HELDOUT_PAIRS for s in states) == (split == "pairs")
        assert shapes.matches(prompt.picture, states[0])


def test_systematic_errors_outnumber_the_truth_and_held_out_pairs_never_show():
    rng, errors = random.Random(0), {"yellow": [], "triangle": [], "right": []}
    for _ in range(1500):
        prompt = shapes.sample_prompt(rng, 3, "train").text
        story, _ = shapes.noisy_story(rng, prompt)
        for state, (text, picture) in zip(shapes.states_of_prompt(prompt)[1:], story, strict=True):
            scene = shapes.recognise(picture[None])[0]
            assert scene[:2] not in shapes.HELDOUT_PAIRS
            if state.colour == "yellow":
                errors["yellow"].append(scene.colour == "red")
            if state.shape == "triangle":
                errors["triangle"].append(scene.shape == "circle")
            if state.cell == "right":
                errors["right"].append(shapes.parse_caption(text).cell == "center")
    for shares in errors.values():
        assert 0.53 < np.mean(shares) < 0.67


def test_words_know_the_pairs_that_no_story_has_but_no_held_out_chain():
    rng, splits = random.Random(0), Counter()
    for _ in range(400):
        words = data.toy_words(rng, 3).prompt
        splits[shapes.split_of(f"{words} <image>")] += 1
        assert shapes.split_of(data.toy_story(rng, 3).prompt) == "train"
    assert set(splits) == {"train", "pairs"} and 0.15 < splits["pairs"] / 400 < 0.35


def test_random_errors_and_format_faults_have_the_rates_that_are_set():
    rng, noise = random.Random(0), shapes.Noise(systematic=0.0, random=0.3, fault=0.4)
    steps, faults = [], []
    for _ in range(700):
        prompt = shapes.sample_prompt(rng, 3, "train").text
        story, fault = shapes.noisy_story(rng, prompt, noise)
        faults.append(fault)
        for state, (text, picture) in zip(shapes.states_of_prompt(prompt)[1:], story, strict=True):
            right = shapes.parse_caption(text) == state, shapes.matches(picture, state)
            assert any(right), "one of the two stays right"
            steps.append(not all(right))
    assert 0.27 < np.mean(steps) < 0.33
    assert 0.34 < np.mean([fault is not None for fault in faults]) < 0.46
    assert set(faults) == {None, *shapes.FAULTS}


def test_noise_of_zero_leaves_the_true_story():
    prompt = shapes.sample_prompt(random.Random(0), 3, "train").text
    story, fault = shapes.noisy_story(random.Random(0), prompt, shapes.Noise(0.0, 0.0, 0.0))
    states = shapes.states_of_prompt(prompt)[1:]
    assert fault is None and [text for text, _ in story] == [shapes.caption(state) for state in states]
    assert all(shapes.matches(picture, state) for (_, picture), state in zip(story, states, strict=True))


def test_empty_doubled_and_larger_pictures_are_named_as_what_they_show():
    first, second = shapes.render(shapes.SCENES[0]), shapes.render(shapes.SCENES[1])
    doubled = np.where(first == shapes.BACKGROUND, second, first).astype(np.uint8)
    assert shapes.recognise(np.stack([shapes.render(None), doubled])) == [None, None]
    assert shapes.recognise(shapes.enlarge(first, 3)[None]) == [shapes.SCENES[0]]


def shapes_py(*arguments, check: int = 0) -> str:
    """Run shapes.py in a process of its own -> what it printed."""
    done = subprocess.run([sys.executable, "shapes.py", *map(str, arguments)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == check, done.stderr
    return done.stdout + done.stderr


def test_dumped_prompts_are_what_a_user_would_have(tmp_path):
    shapes_py("--dump", tmp_path, "--count", 5, "--edits", 3)
    entries = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert len(entries) == 5
    assert all(shapes.wanted_steps(entry["prompt"]) == entry["steps"] == 3 for entry in entries)
    for entry in entries:
        picture = np.asarray(Image.open(tmp_path / entry["images"][0]))
        assert shapes.matches(picture, shapes.states_of_prompt(entry["prompt"])[0])
    shapes_py("--out", tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 5000


@pytest.mark.parametrize("flag, value", [("--count", "0"), ("--edits", "-1"), ("--edits", "two"),
                                         ("--cuont", "3"), ("--split", "test")])
def test_a_mistake_is_one_sentence_that_names_the_flag_and_writes_nothing(tmp_path, flag, value):
    message = shapes_py("--dump", tmp_path / "prompts", flag, value, check=2)
    assert flag in message and value in message and len(message.splitlines()) == 1
    assert not (tmp_path / "prompts").exists()
