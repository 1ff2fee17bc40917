"""Write small invented sets in the schemas of the paper's data and benchmarks. For users, and for the tests.

Nothing of the real sets is in here: pictures and words are the toy world's. Files and folders are those of
the real sets, so that every command on published data can be tried without them. One function for each set
writes its schema; the readers are in data.py.

    python tests/published_samples.py data               # data/activitynet, ...: 300 warm-up records in all
    python tests/published_samples.py data --share 0.1   # a tenth of the records
"""
import argparse
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
    """Write a scene as a picture file, enlarged -> the file's name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(shapes.render(scene))).resize(size, Image.BOX)
    image.save(path, **({"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}))
    return path.name


def chain(rng: random.Random, edits: int) -> tuple[str, list[shapes.Scene]]:
    """A random prompt of the toy world, its start and the states after each edit."""
    prompt = shapes.sample_prompt(rng, edits, "train").text
    return prompt, shapes.states_of_prompt(prompt)


def youtube_id(rng: random.Random) -> str:
    """A random YouTube id: 11 characters, - and _ among them, also in front."""
    return rng.choice("-_abcXYZ") + "".join(rng.choice("abcdefXYZ0123456789-_") for _ in range(10))


def activitynet(folder: Path, count: int, rng: random.Random) -> None:
    """train.json: videos with overlapping segments; frames/<video>/<segment>.jpg."""
    videos = {}
    for _ in range(count):
        video, (_, states) = "v_" + youtube_id(rng), chain(rng, rng.randint(2, 3))
        starts = [10.0 * i for i in range(len(states))]
        videos[video] = {"duration": starts[-1] + 12.5, "timestamps": [[s, s + 12.5] for s in starts],
                         "sentences": [" " * bool(i) + shapes.caption(s) for i, s in enumerate(states)]}
        for i, state in enumerate(states):
            picture(folder / "frames" / video / f"{i}.jpg", state)
    (folder / "train.json").write_text(json.dumps(videos))


def genhowto(folder: Path, count: int, rng: random.Random) -> None:
    """actions.test.txt and states.test.txt, joined by FILENAME; frames/<video>/<second>.jpg."""
    actions, states = [], []
    for i in range(count):
        video, (_, scenes) = youtube_id(rng), chain(rng, 2)
        row = {"VID_ID": video, "DS_CAT": 3, "DS_CAT_NAME": "ball", "FRAME_S1": 12, "FRAME_S2": 48,
               "FRAME_AC": 30, "SCORE": 0.91}
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
    """Rows of stories as they are in the parquet files; frames/<video>/<key>.jpg."""
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


def write_jsonl(file: Path, lines: list[dict]) -> None:
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def openstory(folder: Path, count: int, rng: random.Random) -> None:
    """story.jsonl, the rows as JSON lines."""
    write_jsonl(folder / "story.jsonl", openstory_rows(folder, count, rng))


def emova(folder: Path, count: int, rng: random.Random) -> None:
    """annotations/toy.json: LLaVA conversations, every fourth with two questions; toy/<number>.png."""
    records = []
    for i in range(count):
        scene = rng.choice(shapes.SCENES)
        turns = ["<image>\nwhat is it?", shapes.caption(scene)] + ["where is it?", scene.cell] * (i % 4 == 0)
        records.append({"id": f"{i:06d}", "image": "toy/" + picture(folder / "toy" / f"{i}.png", scene),
                        "conversations": [{"from": ("human", "gpt")[k % 2], "value": value}
                                          for k, value in enumerate(turns)]})
    (folder / "annotations").mkdir(exist_ok=True)
    (folder / "annotations" / "toy.json").write_text(json.dumps(records, indent=4))


def journeydb(folder: Path, count: int, rng: random.Random) -> None:
    """train/train_anno_realease_repath.jsonl (spelled so); train/imgs/000/<number>.jpg."""
    records = []
    for i, scene in enumerate(rng.sample(shapes.SCENES, count)):
        name = picture(folder / "train" / "imgs" / "000" / f"{i:08d}.jpg", scene)
        caption = shapes.caption(scene)
        records.append({"img_path": f"./000/{name}", "prompt": f"{caption}, flat colours --ar 3:2",
                        "Task1": {"Style": [], "Content": [], "Atmosphere": [], "Others": []},
                        "Task2": {"Caption": caption}})
    write_jsonl(folder / "train" / "train_anno_realease_repath.jsonl", records)


def stories(folder: Path, count: int, rng: random.Random) -> None:
    """stories.jsonl, our own form: prompt, pictures, steps."""
    records = []
    images = folder / "images"
    for i in range(count):
        prompt, (first, *states) = chain(rng, 2)
        steps = [{"text": shapes.caption(s), "image": "images/" + picture(images / f"{i}_{k}.png", s)}
                 for k, s in enumerate(states)]
        start = "images/" + picture(images / f"{i}_start.png", first)
        records.append({"prompt": prompt, "images": [start], "steps": steps})
    write_jsonl(folder / "stories.jsonl", records)


def mmie(folder: Path, count: int, rng: random.Random) -> None:
    """data.json: questions of the three categories in turn; images/<number>.png."""
    records = []
    for i in range(count):
        category, (prompt, (first, *states)) = ("SA", "PBL", "MSR")[i % 3], chain(rng, 2)
        name = "images/" + picture(folder / "images" / f"{i}.png", first)
        records.append({"id": f"{category}-0-{i:06d}",
                        "question": [{"text": prompt.replace(" <image>", ""), "image": name}],
                        "answer": [{"text": shapes.caption(s), "image": None} for s in states], "model": "gt",
                        "gt_answer": [{"text": shapes.caption(states[-1]), "image": None}]})
    (folder / "data.json").write_text(json.dumps(records))


def interleavedbench(folder: Path, count: int, rng: random.Random) -> None:
    """interleaved_bench.json: conversations of four tasks in turn, one of them without pictures."""
    tasks = ("wikihow_next_step", "education_generation", "image_editing", "multi_concept_gen")
    images, records = folder / "wiki_images_test", []
    for i in range(count):
        task, (prompt, states) = tasks[i % 4], chain(rng, 2)
        names = []
        if task == "education_generation":
            prompt = prompt.replace(" <image>", "")
        else:
            names = [f"{images.name}/{picture(images / f'{i}_{k}.png', s)}" for k, s in enumerate(states)]
        reply = " ".join(shapes.caption(s) + " <image>" * bool(names) for s in states[1:])
        records.append({"id": f"{task}_{i:06d}", "image": names, "task_name": task, "conversations": [
            {"from": "human", "value": prompt}, {"from": "gpt", "value": reply}]})
    (folder / "interleaved_bench.json").write_text(json.dumps(records))


def single_tasks(folder: Path, count: int, rng: random.Random) -> None:
    """questions.jsonl with images/<number>.png, and captions.txt, of the same scenes."""
    scenes, records = rng.sample(shapes.SCENES, count), []
    for i, scene in enumerate(scenes):
        name = "images/" + picture(folder / "images" / f"{i}.png", scene)
        records.append({"id": i, "image": name, "question": "what is it?", "answer": shapes.caption(scene)})
    write_jsonl(folder / "questions.jsonl", records)
    (folder / "captions.txt").write_text("".join(shapes.caption(scene) + "\n" for scene in scenes))


SETS = {                             # folder -> function, records
    "activitynet": (activitynet, 30),
    "genhowto": (genhowto, 30),
    "openstory": (openstory, 20),
    "jsonl": (stories, 20),
    "emova": (emova, 100),
    "journeydb": (journeydb, 100),
    "mmie": (mmie, 12),
    "interleavedbench": (interleavedbench, 12),
    "kept": (single_tasks, 24),
}


def make(folder: Path, share: float = 1.0, seed: int = 0) -> Path:
    """Write every set into a folder of its own; `share` of the records, at least 2."""
    for name, (write, count) in SETS.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        write(folder / name, max(2, round(share * count)), random.Random(f"{seed}/{name}"))
    return folder


def parse_share(text: str) -> float:
    """A share of the records, more than 0 and at most 1."""
    share = float(text)
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"expected a number above 0 and at most 1, found {text}")
    return share


def main() -> None:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("folder", type=Path, help="where to write, one folder for each set")
    parser.add_argument("--share", type=parse_share, default=1.0, help="share of the records [1]")
    parser.add_argument("--seed", type=int, default=0, help="of the scenes and prompts [0]")
    args = parser.parse_args()
    print(f"samples in {make(args.folder, args.share, args.seed)}")


if __name__ == "__main__":
    main()
