"""Small invented samples in the schemas in which the paper's data and benchmarks are published.

Nothing of the real sets is in here: pictures and words are the toy world's. What a person with the real files would
have is what this writes, in small, so that the commands of the README run without them.

    python tests/published_samples.py data           # data/activitynet, data/genhowto, ... 300 warm-up records in all
"""
import csv
import json
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import shapes  # noqa: E402


def picture(path: Path, scene: shapes.Scene, size: tuple[int, int] = (96, 96)) -> str:
    """A scene as a picture file, enlarged -> its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = Image.fromarray(np.asarray(shapes.render(scene))).resize(size, Image.BOX)
    drawn.save(path, **({"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}))
    return path.name


def chain(rng: random.Random, edits: int) -> tuple[str, list[shapes.Scene]]:
    prompt = shapes.sample_prompt(rng, edits, "train").text
    return prompt, shapes.states_of_prompt(prompt)


def youtube_id(rng: random.Random) -> str:
    """11 characters, some with - and _ in the awkward places."""
    return rng.choice("-_abcXYZ") + "".join(rng.choice("abcdefXYZ0123456789-_") for _ in range(10))


def activitynet(folder: Path, count: int, rng: random.Random) -> None:
    told = {}
    for _ in range(count):
        video, (_, states) = "v_" + youtube_id(rng), chain(rng, rng.randint(2, 3))
        starts = [10.0 * i for i in range(len(states))]                     # segments overlap
        told[video] = {"duration": starts[-1] + 12.5, "timestamps": [[s, s + 12.5] for s in starts],
                       "sentences": [" " * bool(i) + shapes.caption(s) for i, s in enumerate(states)]}
        for i, state in enumerate(states):
            picture(folder / "frames" / video / f"{i}.jpg", state)
    (folder / "train.json").write_text(json.dumps(told))


def genhowto(folder: Path, count: int, rng: random.Random) -> None:
    actions, states = [], []
    for i in range(count):
        video, (_, scenes) = youtube_id(rng), chain(rng, 2)
        row = {"VID_ID": video, "DS_CAT": 3, "DS_CAT_NAME": "ball", "FRAME_S1": 12, "FRAME_S2": 48, "FRAME_AC": 30,
               "SCORE": 0.91}
        name = {"FILENAME": f"results/states_0/{i:04d}_{video}.jpg"}
        actions.append(row | {"FRAME_AC_PROMPT": shapes.caption(scenes[1])} | name)
        states.append(row | {"FRAME_S2_PROMPT": shapes.caption(scenes[2])} | name)
        for second, scene in zip((12, 30, 48), scenes):
            picture(folder / "frames" / video / f"{second}.jpg", scene)
    for name, rows in (("actions.test.txt", actions), ("states.test.txt", states)):
        with open(folder / name, "w", newline="") as file:
            table = csv.DictWriter(file, rows[0], quoting=csv.QUOTE_NONNUMERIC)
            table.writeheader()
            table.writerows(rows)


def openstory_rows(folder: Path, count: int, rng: random.Random) -> list[dict]:
    rows = []
    for _ in range(count):
        video, (_, states) = youtube_id(rng), chain(rng, rng.randint(2, 4))
        for i, state in enumerate(states):
            key = f"{video}_keyframe_00-00-{10 + i:02d}-400"
            rows.append({"__key__": key, "video_id": video, "time_stamp": key[-12:], "json": {
                "origin_caption": "a thing", "caption": shapes.caption(state),
                "mask": [{"value": 0, "label": "background"}]}})
            picture(folder / "frames" / video / f"{key}.jpg", state)
    return rows


def openstory(folder: Path, count: int, rng: random.Random) -> None:
    (folder / "story.jsonl").write_text("".join(json.dumps(row) + "\n" for row in openstory_rows(folder, count, rng)))


def emova(folder: Path, count: int, rng: random.Random) -> None:
    told = []
    for i in range(count):
        scene = rng.choice(shapes.SCENES)
        turns = ["<image>\nwhat is it?", shapes.caption(scene)] + ["where is it?", scene.cell] * (i % 4 == 0)
        told.append({"id": f"{i:06d}", "image": "toy/" + picture(folder / "toy" / f"{i}.png", scene), "conversations": [
            {"from": ("human", "gpt")[k % 2], "value": value} for k, value in enumerate(turns)]})
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / "toy.json").write_text(json.dumps(told, indent=4))


def journeydb(folder: Path, count: int, rng: random.Random) -> None:
    lines = []
    for i, scene in enumerate(rng.sample(shapes.SCENES, count)):
        name = picture(folder / "train" / "imgs" / "000" / f"{i:08d}.jpg", scene)
        lines.append({"img_path": f"./000/{name}", "prompt": f"{shapes.caption(scene)}, flat colours --ar 3:2",
                      "Task1": {"Style": [], "Content": [], "Atmosphere": [], "Others": []},
                      "Task2": {"Caption": shapes.caption(scene)}})
    (folder / "train" / "train_anno_realease_repath.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))


def read_jsonl(folder: Path, count: int, rng: random.Random) -> None:
    with open(folder / "stories.jsonl", "w") as lines:
        for i in range(count):
            prompt, (first, *states) = chain(rng, 2)
            steps = [{"text": shapes.caption(s), "image": "images/" + picture(folder / "images" / f"{i}_{k}.png", s)}
                     for k, s in enumerate(states)]
            start = "images/" + picture(folder / "images" / f"{i}_start.png", first)
            lines.write(json.dumps({"prompt": prompt, "images": [start], "steps": steps}) + "\n")


def mmie(folder: Path, count: int, rng: random.Random) -> None:
    told = []
    for i in range(count):
        kind, (prompt, (first, *states)) = ("SA", "PBL", "MSR")[i % 3], chain(rng, 2)
        name = "images/" + picture(folder / "images" / f"{i}.png", first)
        told.append({"id": f"{kind}-0-{i:06d}", "question": [{"text": prompt.replace(" <image>", ""), "image": name}],
                     "answer": [{"text": shapes.caption(s), "image": None} for s in states], "model": "gt",
                     "gt_answer": [{"text": shapes.caption(states[-1]), "image": None}]})
    (folder / "data.json").write_text(json.dumps(told))


def interleavedbench(folder: Path, count: int, rng: random.Random) -> None:
    told, tasks = [], ("wikihow_next_step", "education_generation", "image_editing", "multi_concept_gen")
    for i in range(count):
        task, (prompt, states) = tasks[i % 4], chain(rng, 2)
        names = [f"wiki_images_test/{picture(folder / 'wiki_images_test' / f'{i}_{k}.png', s)}"
                 for k, s in enumerate(states)] if task != "education_generation" else []
        prompt = prompt if names else prompt.replace(" <image>", "")
        told.append({"id": f"{task}_{i:06d}", "image": names, "task_name": task, "conversations": [
            {"from": "human", "value": prompt},
            {"from": "gpt", "value": " ".join(shapes.caption(s) + " <image>" * bool(names) for s in states[1:])}]})
    (folder / "interleaved_bench.json").write_text(json.dumps(told))


def kept(folder: Path, count: int, rng: random.Random) -> None:
    scenes = rng.sample(shapes.SCENES, count)
    with open(folder / "questions.jsonl", "w") as lines:
        for i, scene in enumerate(scenes):
            name = "images/" + picture(folder / "images" / f"{i}.png", scene)
            lines.write(json.dumps({"id": i, "image": name, "question": "what is it?",
                                    "answer": shapes.caption(scene)}) + "\n")
    (folder / "captions.txt").write_text("".join(shapes.caption(scene) + "\n" for scene in scenes))


SETS = {"activitynet": (activitynet, 30), "genhowto": (genhowto, 30), "openstory": (openstory, 20),
        "jsonl": (read_jsonl, 20), "emova": (emova, 100), "journeydb": (journeydb, 100), "mmie": (mmie, 12),
        "interleavedbench": (interleavedbench, 12), "kept": (kept, 24)}


def make(folder: Path, share: float = 1.0, seed: int = 0) -> Path:
    """Every set in a folder of its own; `share` of the records."""
    for name, (write, count) in SETS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        write(folder / name, max(2, round(share * count)), random.Random(f"{seed}/{name}"))
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("error: expected the folder to write to")
    print(f"samples in {make(Path(sys.argv[1]))}")
