"""TODO"""
import argparse
import base64
import difflib
import errno
import html
import inspect
import io
import json
import math
import os
import platform
import re
import resource
import shutil
import sys
import textwrap
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


class UserError(ValueError):
    """A mistake of the user's (a path, a flag, a file): shown as one sentence, without a traceback."""


def parse_config(Config, argv: list[str] | None = None, presets: dict[str, dict] | None = None):
    """A dataclass is the command line: each field a flag, its default the default, its comment the help text. With
    presets ({name: {field: value}}), --preset NAME changes defaults; flags given beside it win."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(message)
    comments = dict(re.findall(r"^    (\w+):.*?#\s*(.*)$", inspect.getsource(Config), re.MULTILINE))
    parser = Parser(description=sys.modules[Config.__module__].__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Config):
        kind = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), default=f.default,
                            help=comments.get(f.name, "").replace("%", "%%") + f" [{f.default}]", **kind)
    args, unknown = parser.parse_known_args(argv)
    if presets and args.preset:
        if args.preset not in presets:
            raise UserError(f"--preset {args.preset}: expected {' or '.join(presets)}")
        parser.set_defaults(**presets[args.preset])
        args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
        raise UserError(f"unknown flag {unknown[0]}" + (f": did you mean {near[0]}?" if near else ": see --help"))
    return Config(**vars(args))


def run_main(main) -> None:
    """Run a script: a user's mistake ends in one sentence and exit code 2, Ctrl-C in 130."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS):
            raise
        print(f"error: cannot write {error.filename or 'a file'}: {error.strerror}; what was saved before is intact",
              file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def parse_weights(text: str, flag: str = "--reward-weights", of: str = "text, visual, format"
                  ) -> tuple[float, float, float]:
    """A flag's a,b,c -> three numbers of at least 0."""
    try:
        weights = tuple(float(part) for part in text.split(","))
        if len(weights) == 3 and all(0 <= w < math.inf for w in weights) and any(weights):
            return weights
    except ValueError:
        pass
    raise UserError(f"{flag} {text}: expected three numbers of at least 0, for {of}, not all 0")


# ---------------------------------------------------------------------------------------------------------------------
# Devices and processes


def pick_device(name: str, flag: str = "--device") -> torch.device:
    if name == "auto":
        name = ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{flag} {name}: not usable here ({str(error).splitlines()[0]})")


def start_processes(name: str) -> tuple[int, int, torch.device]:
    """rank, world size and device; under torchrun torch's own process group (nccl on GPUs, gloo elsewhere)."""
    device = pick_device(name)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def averaged(metrics: dict, world: int, device: torch.device) -> dict:
    """Metrics over all processes: means, but the largest ratio."""
    if world == 1:
        return metrics
    values = torch.tensor(list(metrics.values()), device=device)
    everyone = [torch.zeros_like(values) for _ in range(world)]
    dist.all_gather(everyone, values)
    merged = torch.stack(everyone)                                                         # (world, metrics)
    return {k: (merged[:, i].max() if k == "ratio_max" else merged[:, i].mean()).item() for i, k in enumerate(metrics)}


def peak_gib(device: torch.device) -> float:
    """The most memory that was in use so far: on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2 ** 30


# ---------------------------------------------------------------------------------------------------------------------
# Files: read with one-sentence errors, written whole or not at all


def read_text(file: Path) -> str:
    """A UTF-8 file, or UserError."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error})")


def read_json(path: Path) -> dict:
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: missing")
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})")


def open_tensors(path: Path):
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path}: missing")
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})")


def read_tensor(path: Path, name: str, device: str | torch.device) -> Tensor:
    """One tensor, copied. The file is mapped anew for each: pages of a mapping count as resident until it is gone."""
    with open_tensors(path) as file:
        return file.get_tensor(name).to(device, copy=True)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:                       # a full disk, say: the caller's folder is not replaced
        raise UserError(f"{path}: cannot be written ({error}); what was saved before is intact")


def snapshot(source: str, where: str) -> Path:
    """A hub id's files, fetched or found in the cache. Raises UserError where there are none."""
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(source))
    except Exception as error:                             # offline, unknown id, no rights: the hub's own first line
        raise UserError(f"{where} {source}: neither a folder nor a model that the hub gives out "
                        f"({str(error).splitlines()[0]})")


def read_picture(path: Path, where: str) -> np.ndarray:
    """A picture file -> uint8 [H, W, 3]."""
    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: {path} is not a picture that can be read ({error})")


@contextmanager
def write_folder(folder: Path):
    """Write a folder whole or not at all: yields an empty folder beside it that takes its place at the end.

    A kill at any moment leaves the old folder or the new one, under its name or as NAME.old (see `settle_folder`).
    """
    folder = Path(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    settle_folder(folder)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        folder.rename(old)
    new.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def settle_folder(folder: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    old = Path(folder).with_name(Path(folder).name + ".old")
    if old.exists() and not Path(folder).exists():
        old.rename(folder)


# -- answers and replies, one line each as they come, so that a killed run goes on

def read_lines(file: Path) -> list[dict]:
    """JSON lines; half a line, left by a kill, is cut off."""
    data = file.read_bytes() if file.exists() else b""
    whole = data[:data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(file, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def write_whole(file: Path, data: bytes) -> None:
    """A file that is there whole or not at all, also where the run is killed."""
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_name(file.name + ".half")
    half.write_bytes(data)
    half.replace(file)


def add_line(file: Path, line: dict) -> None:
    with open(file, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")


# ---------------------------------------------------------------------------------------------------------------------
# A run's folder: settings, metrics, training state


def check_settings(folder: Path, made: dict, now: dict) -> None:
    """What was made with other settings is not gone on with: raises UserError naming the first that differs."""
    free = ("device", "reward_device", "save_every", "updates", "resume", "eval_prompts", "eval_guidance", "out",
            "micro_batch", "checkpointing", "preset", "cache")
    for key, value in made.items():
        if key not in free and now.get(key, value) != value:
            raise UserError(f"{folder}: was made with --{key.replace('_', '-')} {value}, not {now[key]}: choose "
                            f"another --out, or delete the folder")


class Run:
    """A run directory: config.json (settings, versions), metrics.jsonl (a line a step), policy/, samples/."""

    def __init__(self, config, lines: int = 0):
        """`lines`: how many lines of an earlier metrics.jsonl are this run's own (what a checkpoint had written)."""
        self.folder = Path(config.out)
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        made = {"settings": asdict(config), "command": " ".join(sys.argv), "python": platform.python_version(),
                "torch": torch.__version__, "threads": torch.get_num_threads()}
        (self.folder / "config.json").write_text(json.dumps(made, indent=1))
        self.metrics = self.folder / "metrics.jsonl"
        kept = self.metrics.read_text().splitlines()[:lines] if self.metrics.exists() else []
        self.metrics.write_text("".join(line + "\n" for line in kept))
        self.lines = len(kept)

    def log(self, **metrics) -> None:
        """One flat object a step."""
        with open(self.metrics, "a") as file:
            file.write(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()}) + "\n")
        self.lines += 1

    def sample(self, name: str, title: str, groups: list[dict], judged: list[dict] = ()) -> None:
        """Answers for people: samples/NAME.json for the report and samples/NAME.png, a sheet to look at. `judged` are a
        learned judge's questions and replies."""
        file = self.folder / "samples" / f"{name}.json"
        file.write_text(json.dumps({"title": title, "groups": groups, "judged": list(judged)}))
        draw_sheet(groups, file.with_suffix(".png"))


def read_metrics(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An Adam's state as named tensors, for safetensors."""
    return {f"optimizer.{i}.{key}": value for i, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state = optimizer.state_dict()
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            state["state"].setdefault(int(i), {})[key] = value
    optimizer.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------------------------
# Something to look at: sheets and pages


def png(picture) -> str:
    """uint8 [H, W, 3] -> base64 PNG of at most 256 pixels a side, for JSON and HTML."""
    data, image = io.BytesIO(), Image.fromarray(picture)
    image.thumbnail((256, 256))
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def draw_sheet(groups: list[dict], path: Path, size: int = 72) -> None:
    """One row an answer: its texts and pictures in turn, reward parts in front."""
    rows = [(group, answer) for group in groups for answer in group["answers"]]
    columns = max((len(a["steps"]) for _, a in rows), default=1)
    page = Image.new("RGB", (200 + columns * (size + 60), max(1, len(rows)) * (size + 26)), "white")
    pen = ImageDraw.Draw(page)

    def paste(data: str, x: int, y: int) -> None:
        page.paste(Image.open(io.BytesIO(base64.b64decode(data))).resize((size, size), Image.NEAREST), (x, y))
    for row, (group, answer) in enumerate(rows):
        top = row * (size + 26)
        pen.text((4, top), group["prompt"][:180], fill="gray")
        if group["pictures"]:
            paste(group["pictures"][0], 4, top + 16)
        parts = [f"{k} {answer[k]:.2f}" for k in ("text", "visual", "format") if answer[k] is not None]
        pen.multiline_text((size + 12, top + 18), "\n".join(parts + [answer["layout"]]), fill="black")
        for i, step in enumerate(answer["steps"]):
            x = 200 + i * (size + 60)
            if step["picture"]:
                paste(step["picture"], x, top + 16)
            else:
                pen.multiline_text((x, top + 20), textwrap.fill(step["text"], 18), fill="black")
    page.save(path)
STYLE = """body{font:14px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}pre{background:#f6f6f6;padding:.8em;overflow:auto;font-size:12px}
.curves{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0}figcaption{font-size:12px;color:#555}
.answer{display:flex;flex-wrap:wrap;gap:10px;border-top:1px solid #ddd;padding:8px 0;align-items:flex-start}
.step{max-width:150px;font-size:13px}.step img,.prompt img{width:84px;image-rendering:pixelated;border:1px solid #ccc}
.note{color:#777;font-size:11px}.parts{width:130px;color:#555;font-size:12px}.prompt{margin-top:1.2em;font-weight:600}
.group{margin-bottom:1em}"""


def curve(name: str, points: list[tuple[float, float]], width: int = 250, height: int = 90) -> str:
    """One metric as inline SVG with its first, lowest, highest and last value."""
    ys = [y for _, y in points]
    low, high, last = min(ys), max(ys), max(1, len(points) - 1)
    span = (high - low) or 1
    line = " ".join(f"{4 + i * (width - 8) / last:.1f},{height - 4 - (y - low) / span * (height - 8):.1f}"
                    for i, y in enumerate(ys))
    return (f'<figure><svg width="{width}" height="{height}" style="background:#fafafa;border:1px solid #ddd">'
            f'<polyline points="{line}" fill="none" stroke="#2563a8" stroke-width="1.5"/></svg><figcaption>'
            f'{html.escape(name)}: {ys[0]:.3g} → {ys[-1]:.3g} (min {low:.3g}, max {high:.3g})</figcaption></figure>')


def answer_html(answer: dict) -> str:
    """Text, picture, text, picture, as a person reads them; under each its reward and advantage."""
    parts = "<br>".join(f"{k} {answer[k]:.2f}" for k in ("text", "visual", "format") if answer[k] is not None)
    cells = [f'<div class="parts">{parts}<br><span class="note">{html.escape(answer["layout"])}</span></div>']
    for step in answer["steps"]:
        shown = (f'<img alt="picture" src="data:image/png;base64,{step["picture"]}">' if step["picture"]
                 else html.escape(step["text"]))
        notes = [f"{k[:3]} {step[k]:.2f}" for k in ("reward", "advantage") if step[k] is not None]
        cells.append(f'<div class="step">{shown}<div class="note">{" · ".join(notes)}</div></div>')
    return f'<div class="answer">{"".join(cells)}</div>'


def write_report(folder: Path, table: str = "") -> Path:
    """report.html of a run directory: how it was made, curves, rates before and after, and its samples in order."""
    config = json.loads((folder / "config.json").read_text())
    metrics = read_metrics(folder / "metrics.jsonl")
    body = [f"<h1>{html.escape(folder.name)}</h1>",
            f"<details><summary>how this run was made</summary><pre>{html.escape(json.dumps(config, indent=1))}</pre>"
            f"</details>"]
    if table:
        body.append(f"<h2>Evaluation</h2><pre>{html.escape(table)}</pre>")
    for stage in dict.fromkeys(m.get("stage", "grpo") for m in metrics):
        lines = [m for m in metrics if m.get("stage", "grpo") == stage]
        names = [k for k, v in lines[-1].items() if k not in ("step", "stage") and isinstance(v, (int, float))]
        drawn = [curve(k, [(m["step"], m[k]) for m in lines if m.get(k) is not None]) for k in names]
        body.append(f'<h2>{html.escape(stage)}</h2><div class="curves">{"".join(drawn)}</div>')
    for file in sorted((folder / "samples").glob("*.json"), key=lambda f: (f.stat().st_mtime_ns, f.name)):
        sheet = json.loads(file.read_text())
        body.append(f"<h2>{html.escape(sheet['title'])}</h2>")
        for group in sheet["groups"]:
            start = "".join(f'<br><img alt="start" src="data:image/png;base64,{p}">' for p in group["pictures"])
            body.append(f'<div class="group"><div class="prompt">{html.escape(group["prompt"])}{start}</div>'
                        + "".join(map(answer_html, group["answers"])) + "</div>")
        judged = [f"[score: {'none' if j['score'] is None else j['score']}]\n{j['question']}\n--> {j['reply']}"
                  for j in sheet["judged"]]
        if judged:
            body.append(f"<details><summary>what the text judge was asked last, and said</summary><pre>"
                        f"{html.escape(chr(10).join(judged))}</pre></details>")
    page = f"<!doctype html><meta charset='utf-8'><title>{html.escape(folder.name)}</title><style>{STYLE}</style>"
    path = folder / "report.html"
    path.write_text(page + "\n".join(body))
    return path
