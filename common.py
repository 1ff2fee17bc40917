"""What every script shares: its flags, its errors, its files, its run directory, a page to look at.

    flags       a dataclass is the command line: `parse_config`; annotations give ranges and choices
    errors      `UserError`: one sentence and exit code 2, never a traceback for a user's mistake
    files       read with one-sentence errors, written whole or not at all
    runs        `Run`: config.json (how it was made), metrics.jsonl, samples/; training state that resumes
    pages       `draw_sheet` (PNG) and `write_report` (one HTML file that opens offline)

Nothing here is from the paper, and nothing here knows a model or a task. Read it last.
"""
import os
import signal
import sys

# Every script imports this file first: Ctrl-C ends it quietly while the packages below are imported.
if os.path.dirname(os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or "")) \
        == os.path.dirname(os.path.abspath(__file__)):
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import base64
import difflib
import errno
import hashlib
import html
import inspect
import io
import itertools
import json
import math
import platform
import re
import shutil
import textwrap
import threading
import time
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Iterable, Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

try:
    import fcntl
except ImportError:                      # Windows
    fcntl = None
try:
    import resource
except ImportError:
    resource = None


class UserError(ValueError):
    """A mistake of the user's (a path, a flag, a file). It is shown as one sentence, without a traceback."""


# ------------------------------------------------------------------------------------------------------------
# Flags: one dataclass of settings per script, its fields are the command line

class Range(NamedTuple):
    """The numbers that a flag takes: low..high, or more than `low` where it is `open`."""
    low: float
    high: float = math.inf
    open: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open else value >= self.low
        return above and value <= self.high and abs(value) != math.inf

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.open else f"at least {self.low:g}"
        return low if self.high == math.inf else f"{low} and at most {self.high:g}"


Count = Annotated[int, Range(1, 10 ** 9)]
Natural = Annotated[int, Range(0, 10 ** 9)]
Seed = Annotated[int, Range(0, 2 ** 32 - 1)]
Positive = Annotated[float, Range(1e-6, 1e6)]
NonNegative = Annotated[float, Range(0, 1e6)]
Share = Annotated[float, Range(0, 1)]
TopP = Annotated[float, Range(0, 1, open=True)]
LearningRate = Annotated[float, Range(0, 1, open=True)]
Weights = tuple[float, float, float]


def parse_weights(text: str) -> Weights:
    """'1,1,0.5' -> (1.0, 1.0, 0.5). Raises ValueError for anything but three numbers."""
    first, second, third = map(float, text.split(","))
    return first, second, third


def expand_home(text: str) -> str:
    """A TEXT flag with '~' for a home folder: in front of a path, behind NAME= or file:, after a comma."""
    return re.sub(r"(?<![^=:,])~[^/\\,]*", lambda match: os.path.expanduser(match[0]), text)


def split_paths(text: str) -> list[str]:
    """Paths that are separated by commas -> the paths. One that exists may have commas in its own name."""
    parts, paths = text.split(","), []
    while parts:
        names = [",".join(parts[:n]) for n in range(len(parts), 0, -1)]
        paths.append(next((name for name in names if os.path.exists(name)), parts[0]))
        parts = parts[paths[-1].count(",") + 1:]
    return [path for path in paths if path]


def flag_of(name: str) -> str:
    """Field name -> flag: group_size -> --group-size."""
    return "--" + name.replace("_", "-")


def shown(value: object) -> str:
    """A setting as it is written on the command line."""
    return ",".join(f"{v:g}" for v in value) if isinstance(value, tuple) else str(value)


def require(config, name: str, holds: bool, expected: str) -> None:
    """Raise a UserError that names the flag, its value and what was expected, unless it `holds`."""
    if not holds:
        raise UserError(f"{flag_of(name)} {shown(getattr(config, name))}: expected {expected}")


def check_config(config) -> None:
    """Check every field against its annotation: a number's range, the choices of a Literal, three weights.

    Raises UserError for the first that does not fit. A Config made in code is checked as well.
    """
    for f in fields(config):
        value = getattr(config, f.name)
        if get_origin(f.type) is Annotated:
            kind, limits = get_args(f.type)
            words = f"a {'whole ' * (kind is int)}number, {limits}"
            require(config, f.name, isinstance(value, (int, kind)) and limits.holds(value), words)
        elif get_origin(f.type) is Literal:
            require(config, f.name, value in get_args(f.type), " or ".join(get_args(f.type)))
        elif f.type == Weights:
            fits = isinstance(value, tuple) and len(value) == 3 and any(value)
            fits = fits and all(0 <= w < math.inf for w in value)
            require(config, f.name, fits, "three numbers of at least 0, not all 0")


def flag_groups(Config) -> dict[str, tuple[str, str]]:
    """Read the source of a settings dataclass -> {field: (group, help text)}.

    A field, its default and its comment stand on one line; a line '# -- words' opens a group.
    """
    group, found = "settings", {}
    for line in inspect.getsource(Config).splitlines():
        if match := re.fullmatch(r"    # -- (.*)", line):
            group = match[1]
        elif match := re.match(r"    (\w+):.*?#\s*(.*)$", line):
            found[match[1]] = group, match[2]
    return found


def make_parser(Config, names: dict[str, Iterable[str]]) -> argparse.ArgumentParser:
    """The command line of a settings dataclass: one flag a field, in groups, with choices and default."""
    class Parser(argparse.ArgumentParser):
        def error(self, message):
            raise UserError(message)
    module = sys.modules[Config.__module__]
    layout = partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=118)
    usage = f"python {Path(module.__file__).name} [--flag value ...]"
    parser = Parser(description=module.__doc__, usage=usage, allow_abbrev=False, formatter_class=layout)
    sections, words = {}, flag_groups(Config)
    for f in fields(Config):
        group, text = words[f.name]
        section = sections.setdefault(group, parser.add_argument_group(group))
        options = {"type": expand_home, "metavar": "TEXT"}
        if f.type is bool:
            options = {"action": argparse.BooleanOptionalAction}
        elif get_origin(f.type) is Literal:
            options = {"type": str, "metavar": "|".join(c or "''" for c in get_args(f.type))}
        elif get_origin(f.type) is Annotated:
            options = {"type": get_args(f.type)[0], "metavar": "N" if get_args(f.type)[0] is int else "X"}
        elif f.type == Weights:
            options = {"type": parse_weights, "metavar": "X,X,X"}
        elif f.type in (int, float):
            options["metavar"] = "N" if f.type is int else "X"
        if f.name in names:
            text += f"; {', '.join(names[f.name])}"
        if f.default != "":
            text += f" [{shown(f.default)}]"
        section.add_argument(flag_of(f.name), default=f.default, help=text.replace("%", "%%"), **options)
    return parser


def parse_config(Config, argv: list[str] | None = None, presets: dict[str, dict] | None = None,
                 names: dict[str, Iterable[str]] | None = None):
    """The command line -> a checked Config.

    presets: {name: {field: value}}; `--preset NAME` changes defaults, flags given beside it win.
    names: {field: the names it takes}, for --help, where a dict of judges, readers or benchmarks holds them.
    Raises UserError for an unknown flag, a value of the wrong type, or one out of its range.
    """
    parser = make_parser(Config, names or {})
    args, unknown = parser.parse_known_args(argv)
    if presets and args.preset:
        if args.preset not in presets:
            raise UserError(f"--preset {args.preset}: expected {' or '.join(presets)}")
        parser.set_defaults(**presets[args.preset])
        args, unknown = parser.parse_known_args(argv)
    if unknown:
        near = difflib.get_close_matches(unknown[0].split("=")[0], parser._option_string_actions, 1)
        advice = f"did you mean {near[0]}?" if near else "see --help"
        raise UserError(f"unknown flag {unknown[0]}: {advice}")
    config = Config(**vars(args))
    check_config(config)
    return config


class Output:
    """A stream to print to. What it does not take (a closed pipe, an ASCII terminal) is lost, and no more."""

    def __init__(self, stream):
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="replace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self.attempt("write", text)
        return len(text)

    def flush(self) -> None:
        self.attempt("flush")

    def attempt(self, method: str, *arguments) -> None:
        """Call a method of the stream. After a failure nothing is printed any more."""
        try:
            getattr(self.stream, method)(*arguments)
        except OSError:
            self.stream = open(os.devnull, "w", encoding="utf-8")


def run_main(main) -> None:
    """Run a script: a user's mistake ends in one sentence and exit code 2, Ctrl-C in 130."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.stdout, sys.stderr = Output(sys.stdout), Output(sys.stderr)
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.OutOfMemoryError as error:
        print(f"error: out of memory ({str(error).split('. ')[0]}): lower --rows, --micro-batch, --batch or "
              f"--budget; what was saved before is intact", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if not error.filename and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        reason = f"{error.filename or 'a file'}: {(error.strerror or 'cannot be used').lower()}"
        print(f"error: {reason}; what was saved before is intact", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as stop:
        print(": ".join(["interrupted", *map(str, stop.args)]), file=sys.stderr)
        sys.exit(130)
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)                   # while Python shuts down


# ------------------------------------------------------------------------------------------------------------
# Devices, processes, random numbers

def pick_device(name: str, flag: str = "--device") -> torch.device:
    """'auto' (CUDA, then mps, then cpu) or a device's name -> the device.

    Raises UserError where it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{flag} {name}: not usable here ({str(error).splitlines()[0]})") from None


def start_processes(name: str) -> tuple[int, int, torch.device]:
    """--device -> rank, world size, device.

    Under torchrun this joins torch's process group: nccl on GPUs, gloo elsewhere.
    """
    device = pick_device(name)
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1, device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return dist.get_rank(), dist.get_world_size(), device


def averaged(metrics: dict, world: int, device: torch.device) -> dict:
    """Metrics of one process -> those over all processes: means, but the maximum of what ends in _max."""
    if world == 1:
        return metrics
    values = torch.tensor(list(metrics.values()), device=device)
    everyone = [torch.zeros_like(values) for _ in range(world)]
    dist.all_gather(everyone, values)
    merged = torch.stack(everyone)                                                         # (world, metrics)
    return {name: (merged[:, i].max() if name.endswith("_max") else merged[:, i].mean()).item()
            for i, name in enumerate(metrics)}


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Replace the gradients of an optimizer's parameters by their means over all processes.

    A parameter without a gradient here may have one elsewhere: perhaps no picture was sampled here.
    Its gradient here counts as 0.
    """
    if not dist.is_initialized():
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            dist.all_reduce(p.grad)
            p.grad /= dist.get_world_size()


def check_finite(what: str, value: float, flag: str = "--lr") -> None:
    """Stop training before an update that would break the weights. Raises UserError."""
    if not math.isfinite(value):
        raise UserError(f"{what} became {value}: lower {flag}; the last good checkpoint is intact")


def peak_gib(device: torch.device) -> float:
    """The most memory in use so far, in GiB: allocated on the GPU, or resident on the CPU (Windows: 0)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    if resource is None:
        return 0.0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2 ** 30


def total_bytes(device: torch.device) -> int:
    """The device's memory in bytes, 0 where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "mps":
        return torch.mps.recommended_max_memory()
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0


def free_bytes(device: torch.device) -> int | None:
    """Memory that a GPU has left for new tensors, in bytes. None on a CPU, where nothing is cut to fit."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return total_bytes(device) - torch.mps.driver_allocated_memory()
    return None


def seeded(*parts: object) -> torch.Generator:
    """A CPU generator whose seed is a hash of the parts, so that (0, 12) and (1, 2) never share one."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


# ------------------------------------------------------------------------------------------------------------
# Files: read with one-sentence errors, written whole or not at all

def read_text(path: Path) -> str:
    """A UTF-8 file's text. Raises UserError where there is none."""
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def read_json(path: Path) -> dict:
    """A JSON file that holds an object. Raises UserError where there is none."""
    try:
        value = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {str(value)[:40]!r}")
    return value


@contextmanager
def reading(path: Path, what: str):
    """Put this around code that takes values out of a file's content.

    A value that is missing or of another type becomes a UserError: '`path`: `what` lacks ...'.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise UserError(f"{path}: {what} lacks {error}") from None


def read_lines(path: Path, *needed: str) -> list[dict]:
    """The JSON lines of a log of our own, [] where there is none. `needed`: keys that each line has.

    Half a line, left by a kill, and any other broken one are taken out of the file, with one warning.
    """
    lines, broken = [], 0
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            lines.append({**line, **{key: line[key] for key in needed}})
        except (ValueError, RecursionError, TypeError, KeyError):
            broken += 1
    if broken:
        tqdm.write(f"warning: {path}: {broken} broken lines are dropped", file=sys.stderr)
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return lines


def add_line(path: Path, line: dict) -> None:
    """Append one JSON line."""
    with open(path, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")


@contextmanager
def write_whole(path: Path):
    """Write a file whole or not at all: yields a path beside it, which takes its place at the end."""
    path = Path(path)
    new = path.with_name(path.name + ".new")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


WRITTEN = "written.json"         # in a folder that `write_folder` made: the names of its files


def foreign(folder: Path) -> list[str]:
    """The files and folders in a folder that `write_folder` did not put there."""
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}
    if not (folder / WRITTEN).is_file():
        return sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    with reading(folder / WRITTEN, "the file"):
        return sorted(names - set(read_json(folder / WRITTEN)["files"]) - {WRITTEN})


def check_replaceable(folder: Path) -> None:
    """Refuse a folder that is neither new nor empty nor made by `write_folder`. Raises UserError."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: a file is there, expected a folder or nothing")
    if folder.is_dir() and not (folder / WRITTEN).is_file() and any(folder.iterdir()):
        raise UserError(f"{folder}: holds {foreign(folder)[0]}, and only checkpoints that were written here "
                        f"are ever replaced: choose another folder")


@contextmanager
def write_folder(folder: Path):
    """Write a folder whole or not at all: yields a folder beside it, which takes its place at the end.

    A kill at any moment leaves the old one or the new one, perhaps under the name NAME.old (see `settled`).
    What others put into the old one is in the new one afterwards.
    Raises UserError where the folder, NAME.new or NAME.old is not of our making.
    """
    folder = Path(folder).resolve()
    check_replaceable(folder)
    new, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for beside in (new, old):
        check_replaceable(beside)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    write_text(new / WRITTEN, json.dumps({"files": []}))               # so that what a kill leaves is ours
    try:
        yield new
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    write_text(new / WRITTEN, json.dumps({"files": foreign(new)}))
    if folder.exists():
        remove_folder(old, new)
        folder.rename(old)
    new.rename(folder)
    remove_folder(old, folder)


def remove_folder(folder: Path, heir: Path | None = None) -> None:
    """Delete the files that `write_folder` put into a folder. Others stay, or move to `heir`."""
    if not (folder / WRITTEN).is_file():
        return
    strange = foreign(folder)
    for name in strange if heir else ():
        place = heir / name
        place.parent.mkdir(parents=True, exist_ok=True)
        (folder / name).rename(place.with_name(place.name + ".old") if place.exists() else place)
    if heir or not strange:
        shutil.rmtree(folder)
    else:
        for name in read_json(folder / WRITTEN)["files"]:
            (folder / name).unlink(missing_ok=True)
        write_text(folder / WRITTEN, json.dumps({"files": []}))


def settled(folder: Path) -> Path:
    """The folder, or NAME.old where a kill between the two renames of `write_folder` left only that."""
    old = Path(folder).with_name(Path(folder).name + ".old")
    return old if (old / WRITTEN).is_file() and not Path(folder).exists() else Path(folder)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all."""
    with write_whole(path) as new:
        new.write_bytes(text.encode("utf-8", "replace"))


HASHED, BLOCK = 2 ** 28, 2 ** 18     # bytes of a file that its hash covers at least, and how many in a row


def hash_files(files: Iterable[Path], texts: Iterable[str] = ()) -> str:
    """A short hash of files' names, sizes and contents, whatever their folder is called, and of texts.

    Choice: above HASHED bytes every n-th block counts, so that 15 GB take a second or two. Training moves
    nearly every weight, so other weights are found all the same.
    """
    digest = hashlib.sha256()
    for text in texts:
        digest.update(f"{text!r}\n".encode())
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode("utf-8", "replace"))
        with open(path, "rb") as file:
            for start in range(0, size, BLOCK * max(1, -(-size // HASHED))):
                file.seek(start)
                digest.update(file.read(BLOCK))
    return digest.hexdigest()[:16]


MODEL_FILES = (".safetensors", ".json", ".model", ".txt", ".pt", ".bin")


def hash_folder(folder: Path, parts: Iterable[str] = ("",)) -> str:
    """The hash of the model in a folder and these subfolders, without the state of its training."""
    files = [file for part in parts for file in sorted((folder / part).glob("*"))
             if file.suffix in MODEL_FILES and file.is_file() and file.stem != "training"
             and file.name != WRITTEN]
    return hash_files(files)


def open_tensors(path: Path):
    """A safetensors file, opened. Raises UserError where it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def read_tensor(path: Path, name: str, device: str | torch.device) -> Tensor:
    """One tensor of a safetensors file, copied to a device.

    Re-opens the file for every tensor: mapped pages count as resident memory until the mapping is closed.
    """
    with open_tensors(path) as file:
        return file.get_tensor(name).to(device, copy=True)


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises UserError where the disk does not take it."""
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:                # a full disk, say: the caller's folder is not replaced
        raise UserError(f"{path}: cannot be written ({error}); what was saved before is intact") from None


def snapshot(source: str, where: str) -> Path:
    """The folder with a hub id's files, fetched or from the cache. Raises UserError where there are none."""
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(source))
    except Exception as error:                      # offline, unknown id, no rights: the hub's own first line
        reason = str(error).splitlines()[0]
        raise UserError(f"{where} {source}: neither a folder nor a model that the hub gives out "
                        f"({reason})") from None


def read_picture(path: Path, where: str) -> np.ndarray:
    """A picture file as a viewer shows it -> uint8 [H, W, 3]. Raises UserError where it cannot be read.

    Turned as its EXIF data says, 16 bits and floats scaled to 8 bits, transparent parts white, first frame.
    """
    try:
        with Image.open(path) as image:
            image = ImageOps.exif_transpose(image)
            if image.mode[0] in "IF":                                # grey: 16 or 32 bits, or floats
                image = Image.fromarray(to_8_bits(np.asarray(image)))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            return np.array(image.convert("RGB"))
    except FileNotFoundError:
        raise UserError(f"{where}: {path}: no such file") from None
    except Exception as error:           # Choice: any. Pillow's decoders raise whatever their libraries do.
        raise UserError(f"{where}: {path} is not a picture that can be read ({error})") from None


def to_8_bits(grey: np.ndarray) -> np.ndarray:
    """Grey values of any range -> uint8: the smallest of 1, 255 and 65,535 that holds them becomes white."""
    values = np.nan_to_num(grey.astype(np.float64), posinf=0, neginf=0)
    low = min(0.0, values.min())
    tops = (1, 255, 65_535) if grey.dtype.kind == "f" else (65_535,)
    high = next((top for top in tops if values.max() <= top), values.max())
    return ((values - low) / (high - low) * 255).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------------------------
# A run's directory and its training state

def check_settings(folder: Path, before: dict, now: dict, free: tuple[str, ...] = ()) -> None:
    """Refuse to resume a run that was started with other settings, but for the `free` ones.

    before, now: settings by field name; before is empty for a new run.
    Raises UserError for the first that differs.
    """
    now = json.loads(json.dumps(now))
    for key, value in before.items():
        if key not in free and now.get(key, value) != value:
            raise UserError(f"{folder}: this run was started with {flag_of(key)} {value}, not {now[key]}: "
                            f"give the other one a folder of its own, --out {free_folder(folder)}")


def check_content(folder: Path, before: dict, now: dict) -> None:
    """Refuse to resume a run if what a flag names is not what it was.

    before, now: {flag: hash} of weights and data; before may be empty. Raises UserError for the first change.
    """
    for key, value in before.items():
        if now.get(key, value) != value:
            raise UserError(f"{folder}: the content of {flag_of(key)} is not what this run was started with: "
                            f"bring that back, or give the other one a folder of its own, "
                            f"--out {free_folder(folder)}")


def free_folder(folder: Path) -> Path:
    """FOLDER-2, or the first number from there on that is not taken."""
    names = (Path(f"{folder}-{n}") for n in itertools.count(2))
    return next(path for path in names if not path.exists())


LOCK = "run.lock"                # in every folder that results go to; empty unless a run is alive
BEAT, DEAD = 15, 60              # seconds between signs of life, and without one until a run counts as dead
GOES_ON = {"policy*/training.json": "the same command goes on from the last checkpoint",
           "*/answers.jsonl": "the same command goes on behind the last answer"}


@contextmanager
def claim(out: str | Path, resume: bool = True):
    """Make the folder for results, and keep other runs out of it until the block ends.

    A run that dies leaves its lock to the next one. Across machines this needs a disk that passes file locks
    on, or else a clock that is right to DEAD seconds. Ctrl-C names what the run goes on from.
    Raises UserError where another run is alive, or where the folder holds something that no run wrote;
    OSError where nothing can be written.
    """
    folder = Path(out)
    file, names = folder / LOCK, {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if names and LOCK not in names and not {"config.json", "metrics.jsonl"} <= names:
        raise UserError(f"--out {folder}: holds {min(names)}, which no run wrote: choose a new or an empty "
                        f"folder")
    folder.mkdir(parents=True, exist_ok=True)
    with open(file, "a+", encoding="utf-8") as lock:
        take(lock, folder)
        ended = threading.Event()
        threading.Thread(target=show_life, args=(file, ended), daemon=True).start()
        try:
            yield folder
        except KeyboardInterrupt as stop:
            if resume and not stop.args:
                stop.args = tuple(words for name, words in GOES_ON.items() if any(folder.glob(name)))[:1]
            raise
        finally:
            ended.set()
            lock.truncate(0)
            with suppress(OSError):
                if [path.name for path in folder.iterdir()] == [LOCK]:           # nothing came of it
                    file.unlink()
                    folder.rmdir()


def take(lock, folder: Path) -> None:
    """Lock an open file and write into it whose it is. Raises UserError where another run holds it."""
    lock.seek(0)
    owner, _, machine = lock.read().partition(" on ")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        alive = False
    except BlockingIOError:
        alive = True
    except (AttributeError, OSError):                # no fcntl (Windows), a disk without locks: ask the clock
        alive, machine = False, machine or "?"
    silent = time.time() - os.fstat(lock.fileno()).st_mtime
    if alive or (owner and machine != platform.node() and silent < DEAD):
        raise UserError(f"{folder}: another run is writing here ({owner} on {machine}, {silent:.0f} seconds "
                        f"ago): wait for it, or choose another --out")
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}")
    lock.flush()


def show_life(file: Path, ended: threading.Event) -> None:
    """Touch a lock every BEAT seconds."""
    while not ended.wait(BEAT):
        with suppress(OSError):
            os.utime(file)


class Run:
    """A run directory: config.json (settings, versions), metrics.jsonl, policy/, samples/."""

    def __init__(self, config, lines: int = 0, content: dict | None = None):
        """Make the folder, write config.json and open metrics.jsonl.

        config: a settings dataclass with a field `out`.
        lines: how many lines of an earlier metrics.jsonl the checkpoint had seen; the rest is dropped.
        content: hashes of the weights and data that the run depends on, by flag.
        """
        self.folder, self.content = Path(config.out), content
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.json", json.dumps(
            {"settings": asdict(config), "content": content, "command": " ".join(sys.argv),
             "python": platform.python_version(),
             "torch": torch.__version__, "threads": torch.get_num_threads()}, indent=1))
        self.metrics = self.folder / "metrics.jsonl"
        earlier = read_metrics(self.metrics)[:lines]
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in earlier))
        self.lines = len(earlier)

    def log(self, **metrics) -> None:
        """Append one flat object, floats rounded to six places."""
        line = {k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()}
        add_line(self.metrics, line)
        self.lines += 1

    def sample(self, name: str, title: str, groups: list[dict], judged: list[dict] = ()) -> None:
        """Keep answers for people: samples/NAME.json for the report, samples/NAME.png as a sheet.

        groups: `rewards.group_record` of each prompt.
        judged: questions to a learned judge and its replies.
        """
        file = self.folder / "samples" / f"{name}.json"
        write_text(file, json.dumps({"title": title, "groups": groups, "judged": list(judged)}))
        draw_sheet(groups, file.with_suffix(".png"))


def start_over(folder: Path) -> None:
    """Delete what an earlier run wrote into a run directory, and nothing else."""
    remove_folder(settled(folder / "policy"))
    sheets = [file for end in ("json", "png") for file in (folder / "samples").glob(f"{'[0-9]' * 6}*.{end}")]
    for file in (*sheets, *(folder / name for name in ("metrics.jsonl", "evaluation.json", "report.html"))):
        file.unlink(missing_ok=True)


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, none where there is no such file."""
    return read_lines(path)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors, for a safetensors file."""
    return {f"optimizer.{i}.{key}": value for i, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of `optimizer_tensors` back; others are passed over."""
    state = optimizer.state_dict()
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            state["state"].setdefault(int(i), {})[key] = value
    optimizer.load_state_dict(state)


# ------------------------------------------------------------------------------------------------------------
# Something to look at: sheets (PNG) and pages (HTML)

def png(picture: np.ndarray) -> str:
    """uint8 [H, W, 3] -> a base64 PNG of at most 256 pixels a side, for JSON and HTML."""
    data, image = io.BytesIO(), Image.fromarray(picture)
    image.thumbnail((256, 256))
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def draw_sheet(groups: list[dict], path: Path, size: int = 72) -> None:
    """A PNG with one row an answer: the parts of its reward, then its texts and pictures in turn."""
    rows = [(group, answer) for group in groups for answer in group["answers"]]
    columns = max((len(a["steps"]) for _, a in rows), default=1)
    sheet = Image.new("RGB", (200 + columns * (size + 60), max(1, len(rows)) * (size + 26)), "white")
    pen = ImageDraw.Draw(sheet)

    def paste(data: str, x: int, y: int) -> None:
        picture = Image.open(io.BytesIO(base64.b64decode(data)))
        sheet.paste(picture.resize((size, size), Image.NEAREST), (x, y))
    for row, (group, answer) in enumerate(rows):
        top = row * (size + 26)
        pen.text((4, top), group["prompt"][:180], fill="gray")
        if group["pictures"]:
            paste(group["pictures"][0], 4, top + 16)
        parts = [f"{k} {answer[k]:.2f}" for k in ("text", "visual", "format") if answer[k] is not None]
        pen.multiline_text((size + 12, top + 18), "\n".join([*parts, answer["layout"]]), fill="black")
        for i, step in enumerate(answer["steps"]):
            x = 200 + i * (size + 60)
            if step["picture"]:
                paste(step["picture"], x, top + 16)
            else:
                pen.multiline_text((x, top + 20), textwrap.fill(step["text"], 18), fill="black")
    sheet.save(path)


STYLE = """body{font:14px/1.45 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}
h1{font-size:1.5em}h2{font-size:1.15em;margin-top:2em}pre{background:#f6f6f6;padding:.8em;overflow:auto;font-size:12px}
.curves{display:flex;flex-wrap:wrap;gap:12px}figure{margin:0}figcaption{font-size:12px;color:#555}
.answer{display:flex;flex-wrap:wrap;gap:10px;border-top:1px solid #ddd;padding:8px 0;align-items:flex-start}
.step{max-width:150px;font-size:13px}
.step img,.prompt img{width:144px;image-rendering:pixelated;border:1px solid #ccc}
.note{color:#777;font-size:11px}.parts{width:130px;color:#555;font-size:12px}.prompt{margin-top:1.2em;font-weight:600}
.group{margin-bottom:1em}"""


def write_page(path: Path, title: str, body: list[str]) -> Path:
    """Write one HTML file that opens offline; `body` holds HTML, the title is escaped here."""
    head = f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    write_text(path, "\n".join([head, f"<h1>{html.escape(title)}</h1>", *body]))
    return path


def curve(name: str, values: list[float], width: int = 250, height: int = 90) -> str:
    """One metric as inline SVG with its first, lowest, highest and last value."""
    low, high, last = min(values), max(values), max(1, len(values) - 1)
    span = (high - low) or 1
    line = " ".join(f"{4 + i * (width - 8) / last:.1f},{height - 4 - (y - low) / span * (height - 8):.1f}"
                    for i, y in enumerate(values))
    style = "background:#fafafa;border:1px solid #ddd"
    return (f'<figure><svg width="{width}" height="{height}" style="{style}">'
            f'<polyline points="{line}" fill="none" stroke="#2563a8" stroke-width="1.5"/></svg><figcaption>'
            f'{html.escape(name)}: {values[0]:.3g} → {values[-1]:.3g} (min {low:.3g}, max {high:.3g})'
            f'</figcaption></figure>')


def picture_html(source: str, alt: str) -> str:
    """An <img> of a file beside the page, or of a base64 PNG."""
    source = source if "." in source else f"data:image/png;base64,{source}"
    return f'<img alt="{html.escape(alt)}" loading="lazy" src="{source}">'


def answer_html(answer: dict) -> str:
    """Text, picture, text, picture, as a person reads them; under each its reward and advantage."""
    parts = "<br>".join(f"{k} {answer[k]:.2f}" for k in ("text", "visual", "format") if answer[k] is not None)
    cells = [f'<div class="parts">{parts}<br><span class="note">{html.escape(answer["layout"])}</span></div>']
    for step in answer["steps"]:
        inside = picture_html(step["picture"], "picture") if step["picture"] else html.escape(step["text"])
        notes = [f"{k} {step[k]:.2f}" for k in ("reward", "advantage") if step[k] is not None]
        cells.append(f'<div class="step">{inside}<div class="note">{" · ".join(notes)}</div></div>')
    return f'<div class="answer">{"".join(cells)}</div>'


def sheet_html(sheet: dict) -> list[str]:
    """One file of samples/: prompts with their answers, and what a learned judge was asked."""
    body = [f"<h2>{html.escape(sheet['title'])}</h2>"]
    for group in sheet["groups"]:
        start = "".join("<br>" + picture_html(p, "picture of the prompt") for p in group["pictures"])
        body.append(f'<div class="group"><div class="prompt">{html.escape(group["prompt"])}{start}</div>'
                    + "".join(map(answer_html, group["answers"])) + "</div>")
    judged = [f"[score: {'none' if j['score'] is None else j['score']}]\n{j['question']}\n--> {j['reply']}"
              for j in sheet["judged"]]
    if judged:
        text = html.escape("\n".join(judged))
        body.append(f"<details><summary>what the text judge was asked last, and its replies</summary>"
                    f"<pre>{text}</pre></details>")
    return body


def write_report(folder: Path, table: str = "") -> Path:
    """Write a run directory's report.html: settings, the evaluation's `table`, curves, samples in order."""
    metrics = read_metrics(folder / "metrics.jsonl")
    settings = html.escape(json.dumps(read_json(folder / "config.json"), indent=1))
    body = [f"<details><summary>how this run was made</summary><pre>{settings}</pre></details>"]
    if table:
        body.append(f"<h2>Evaluation</h2><pre>{html.escape(table)}</pre>")
    for stage in dict.fromkeys(m.get("stage", "grpo") for m in metrics):
        lines = [m for m in metrics if m.get("stage", "grpo") == stage]
        last = {k: v for k, v in lines[-1].items() if k not in ("step", "stage")}
        names = [k for k, v in last.items() if isinstance(v, (int, float))]
        curves = [curve(k, [m[k] for m in lines if m.get(k) is not None]) for k in names]
        body.append(f'<h2>{html.escape(stage)}</h2><div class="curves">{"".join(curves)}</div>')
    for file in sorted((folder / "samples").glob("*.json")):
        body += sheet_html(read_json(file))
    return write_page(folder / "report.html", folder.name, body)
