"""How to change it: the examples that the README shows, run as they stand there.

A change is a small file that a user runs in place of grpo.py, an edited line, or a file of prompts.
"""
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, RUN, flags
from PIL import Image

EXAMPLES = {
    "my_reward.py": """
# A new reward: a step is right or it is not, instead of the share of its attributes that are right.
import grpo
import rewards


def all_or_nothing(named, true, first=3):        # two scenes or None; first: attributes that count
    return float(named is not None and true is not None and named[:first] == true[:first])


rewards.agreement = all_or_nothing
grpo.run_main(grpo.main)         # python my_reward.py --out out/my-reward
""",
    "my_judge.py": """
# A new judge: one class, one line in a dict. It likes pictures with much red.
import grpo
import judges


class Red:
    HUB = ""                     # where its weights come from when --visual-reward names no folder

    def __init__(self, source, device):
        pass

    def __call__(self, texts, pictures):
        return [float(picture[..., 0].mean()) / 255 for picture in pictures]


judges.JUDGES["visual"]["red"] = Red
grpo.run_main(grpo.main)         # python my_judge.py --visual-reward red --out out/my-judge
""",
    "my_credit.py": """
# A new credit rule: every token and code of the best answers gets +1, of the others -1.
import torch

import grpo


def best_of_group(answers, scores, config):
    rewards = torch.tensor(grpo.hybrid_rewards(scores, config.reward_weights))
    values = torch.where(rewards == rewards.max(), 1.0, -1.0)
    return [value.expand(len(answer.step_of), 1) for answer, value in zip(answers, values)]


grpo.advantages = best_of_group
grpo.run_main(grpo.main)         # python my_credit.py --out out/my-credit
""",
    "my_world.sh": """
sed -i 's/^COLOURS = {/COLOURS = {"purple": (130, 50, 160), /' shapes.py
python shapes.py --out my-world.png
python warmup.py --out out/my-warmup
python grpo.py --model out/my-warmup --out out/my-world
""",
    "my_prompts.sh": """
# plant.jpg and potatoes.jpg: two photographs of your own in this folder
cat > my_prompts.jsonl <<'END'
{"prompt": "How do I water this plant? <image>", "images": ["plant.jpg"]}
{"prompt": "What is the next step? <image> Cut the potatoes.", "images": ["potatoes.jpg"]}
END
python grpo.py --prompts my_prompts.jsonl --reward-weights 0,0,1 --out out/my-prompts
""",
}
SMALL = {**RUN, "updates": 1, "group_size": 3}


def execute(command: list, folder) -> None:
    """A command in `folder`, which finds the repository's modules."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True,
                          env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


def steps_of(folder) -> list[dict]:
    """All steps of the rollout."""
    groups = json.loads((folder / "samples" / "000001.json").read_text())["groups"]
    return [step for group in groups for answer in group["answers"] for step in answer["steps"]]


def trial(name: str, talker, tmp_path, *more: str):
    """Run an example file for one update -> the run's folder."""
    (tmp_path / name).write_text(EXAMPLES[name])
    where = ["--model", talker, "--out", tmp_path / "out"]
    execute([sys.executable, name, *where, *flags(SMALL), *more], tmp_path)
    assert (tmp_path / "out" / "report.html").exists()
    return tmp_path / "out"


def test_the_readme_shows_these_examples():
    """Each code block of the README that names one of the files holds that example, word for word."""
    readme = (ROOT / "README.md").read_text()
    blocks = [block.strip() for block in re.findall(r"```\w+\n(.*?)```", readme, re.DOTALL)]
    for name, code in EXAMPLES.items():
        assert any(code.strip() in block for block in blocks), name


def test_a_new_reward(talker, tmp_path):
    rewards = {step["reward"] for step in steps_of(trial("my_reward.py", talker, tmp_path))}
    assert rewards <= {0.0, 1.0, None} and 0.0 in rewards


def test_a_new_judge(talker, tmp_path):
    steps = steps_of(trial("my_judge.py", talker, tmp_path, "--visual-reward", "red"))
    pictures = [step for step in steps if step["picture"]]
    assert pictures
    for step in pictures:
        pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(step["picture"]))))
        assert step["reward"] == pytest.approx(pixels[..., 0].mean() / 255)


def test_a_new_credit_rule(talker, tmp_path):
    values = {step["advantage"] for step in steps_of(trial("my_credit.py", talker, tmp_path))}
    assert values and values <= {1.0, -1.0}


def test_a_new_world(tmp_path):
    """The lines as a shell runs them, but for sizes: one step of each stage, one update."""
    for file in ROOT.glob("*.py"):
        shutil.copy(file, tmp_path)
    lines = EXAMPLES["my_world.sh"].strip().splitlines()
    short = {"warmup.py": "--tokenizer-steps 2 --pretrain-steps 1 --warmup-steps 1 --batch 4",
             "grpo.py": " ".join(flags(SMALL))}
    for line in lines:
        script = next((part for part in line.split() if part in short), "")
        line = line.replace("python ", f"{sys.executable} ", 1)
        execute(["sh", "-c", f"{line} {short.get(script, '')}"], tmp_path)
    execute([sys.executable, "-c", "import shapes; assert len(shapes.SCENES) == 180"], tmp_path)
    assert (tmp_path / "out" / "my-world" / "policy").is_dir() and (tmp_path / "my-world.png").exists()


def test_prompts_of_ones_own_with_photographs(warm, tmp_path):
    for name in ("plant.jpg", "potatoes.jpg"):
        noise = np.random.default_rng(0).integers(0, 255, (48, 64, 3), np.uint8)
        Image.fromarray(noise).resize((640, 480)).save(tmp_path / name)
    command = [sys.executable, ROOT / "grpo.py", "--model", warm, *flags(SMALL)]
    script = EXAMPLES["my_prompts.sh"].replace("python grpo.py", " ".join(map(str, command)))
    execute(["sh", "-ec", script], tmp_path)
    out = tmp_path / "out" / "my-prompts"
    page = (out / "report.html").read_text()
    assert "How do I water this plant?" in page and "The true answer" not in page
    assert page.count('alt="picture of the prompt" width="171"') >= 2, "photographs"
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 1
