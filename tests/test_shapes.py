"""The toy world: words and pictures mean the same, splits do not overlap, noise is what it says."""
import json
import random
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT

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
    with pytest.raises(ValueError):
        shapes.states_of_prompt("draw a cat")


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
    rng, drawn, told = random.Random(0), {"yellow": [], "triangle": []}, []
    for _ in range(1500):
        prompt = shapes.sample_prompt(rng, 3, "train").text
        story, _ = shapes.noisy_story(rng, prompt)
        for state, (text, picture) in zip(shapes.states_of_prompt(prompt)[1:], story):
            seen = shapes.recognise(picture[None])[0]
            assert seen[:2] not in shapes.HELDOUT_PAIRS
            if state.colour == "yellow":
                drawn["yellow"].append(seen.colour == "red")
            if state.shape == "triangle":
                drawn["triangle"].append(seen.shape == "circle")
            if state.cell == "right":
                told.append(shapes.parse_caption(text).cell == "center")
    for share in (*map(np.mean, drawn.values()), np.mean(told)):
        assert 0.53 < share < 0.67


def test_dumped_prompts_are_what_a_user_would_have(tmp_path):
    subprocess.run([sys.executable, "shapes.py", "--dump", str(tmp_path), "--count", "5"], cwd=ROOT, check=True)
    entries = [json.loads(line) for line in (tmp_path / "prompts.jsonl").read_text().splitlines()]
    assert len(entries) == 5 and all((tmp_path / e["images"][0]).exists() for e in entries)
    subprocess.run([sys.executable, "shapes.py", "--out", str(tmp_path / "sheet.png")], cwd=ROOT, check=True)
    assert (tmp_path / "sheet.png").stat().st_size > 5000
