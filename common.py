"""What every script shares: its flags, its errors, its files, its run directory, a page to look at.

    flags       a dataclass is the command line: `parse_config`; annotations give ranges and choices
    errors      `UserError`: one sentence and exit code 2, never a traceback for a user's mistake
    files       read with one-sentence errors, written whole or not at all
    runs        `Run`: config.json (how it was made), metrics.jsonl, samples/; training state that resumes
    pages       `draw_sheet` (PNG); `write_report`, `write_comparison` (HTML files that open offline)

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
import subprocess
import textwrap
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import Field, asdict, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from statistics import fmean, pstdev
from typing import Annotated, Callable, Iterable, Literal, NamedTuple, get_args, get_origin
from urllib.parse import quote

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
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
    """The numbers that a flag takes: low..high, or more than `low` where it is `open`.

    pair: two numbers as well as one, as a tuple: the first for text tokens, the second for image codes.
    """
    low: float
    high: float = math.inf
    open: bool = False
    pair: bool = False

    def holds(self, value: float) -> bool:
        above = value > self.low if self.open else value >= self.low
        return above and value <= self.high and abs(value) != math.inf

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.open else f"at least {self.low:g}"
        limits = low if self.high == math.inf else f"{low} and at most {self.high:g}"
        return limits + ", or two of them as TEXT,IMAGE" * self.pair


Count = Annotated[int, Range(1, 10 ** 9)]
Natural = Annotated[int, Range(0, 10 ** 9)]
Seed = Annotated[int, Range(0, 2 ** 32 - 1)]
Positive = Annotated[float, Range(1e-6, 1e6)]
NonNegative = Annotated[float, Range(0, 1e6)]
Share = Annotated[float, Range(0, 1)]
LearningRate = Annotated[float, Range(0, 1, open=True)]
Weights = tuple[float, float, float]
Names = tuple[str, ...]                      # a flag that takes one or more words
Naturals = Annotated[int, Range(0, 10 ** 9, pair=True)]
Positives = Annotated[float, Range(1e-6, 1e6, pair=True)]
NonNegatives = Annotated[float, Range(0, 1e6, pair=True)]
TopPs = Annotated[float, Range(0, 1, open=True, pair=True)]


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


def parse_numbers(number: type, text: str) -> float | tuple[float, float]:
    """'0.9' -> 0.9 and '0.9,1' -> (0.9, 1.0). Raises ArgumentTypeError for anything else."""
    try:
        first, *more = map(number, text.split(","))
    except ValueError:
        first, more = None, [None, None]
    if len(more) > 1:
        words = "whole numbers" if number is int else "numbers"
        raise argparse.ArgumentTypeError(f"{text!r}: expected one or two {words}, X or TEXT,IMAGE")
    return (first, *more) if more else first


def plain_type(f: Field):
    """The annotation of a setting; of one that may be None, `X | None`, it is X."""
    return get_args(f.type)[0] if f.default is None else f.type


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
        if get_origin(plain_type(f)) is Annotated:
            kind, limits = get_args(plain_type(f))
            words = f"a {'whole ' * (kind is int)}number, {limits}"
            values = value if limits.pair and isinstance(value, tuple) and len(value) == 2 else (value,)
            fits = all(isinstance(v, (int, kind)) and limits.holds(v) for v in values)
            require(config, f.name, fits or value is f.default is None, words)
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
        elif get_origin(plain_type(f)) is Annotated:
            kind, limits = get_args(plain_type(f))
            letter = "N" if kind is int else "X"
            options = {"type": kind, "metavar": letter}
            if limits.pair:
                options = {"type": partial(parse_numbers, kind), "metavar": f"{letter}[,{letter}]"}
        elif f.type == Weights:
            options = {"type": parse_weights, "metavar": "X,X,X"}
        elif f.type == Names:
            options |= {"type": str, "nargs": "+"}
        elif f.type in (int, float):
            options["metavar"] = "N" if f.type is int else "X"
        if f.name in names:
            text += f"; {', '.join(names[f.name])}"
        if f.default not in ("", None, ()):
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
        leave(f"error: {error}", 2)
    except torch.OutOfMemoryError as error:
        leave(f"error: out of memory ({str(error).split('. ')[0]}): lower --rows, --micro-batch, --batch or "
              f"--budget; what was saved before is intact", 2)
    except OSError as error:
        if not error.filename and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise
        reason = f"{error.filename or 'a file'}: {(error.strerror or 'cannot be used').lower()}"
        leave(f"error: {reason}; what was saved before is intact", 2)
    except KeyboardInterrupt as stop:
        leave(": ".join(["interrupted", *map(str, stop.args)]), 130)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        lost(str(error).splitlines()[0][:120])
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)                   # while Python shuts down


def lost(reason: str) -> None:
    """End a process that cannot go on without the others."""
    leave(f"error: another process has ended or cannot be reached ({reason}); the same command goes on from "
          f"the last checkpoint, if there is one", 1)


def leave(sentence: str, code: int) -> None:
    """End the script with one sentence; of several processes the first that fails prints its own."""
    if first_to_fail():
        print(sentence, file=sys.stderr, flush=True)
    if dist.is_initialized():
        os._exit(code)                   # without torch's clean-up, which may wait for the other processes
    sys.exit(code)


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


# How long a process waits for the others: at the start, and later, when one may still be asking a judge.
# torchrun ends all processes as soon as one of them fails, whatever these are.
MEETING, PATIENCE = timedelta(minutes=2), timedelta(hours=6)


def start_processes(name: str) -> tuple[int, int, torch.device]:
    """--device -> rank, world size, device.

    Under torchrun this joins torch's process group: nccl on GPUs, gloo elsewhere. Only rank 0 prints from
    then on. Raises UserError where the processes cannot meet.
    """
    device, world = pick_device(name), int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1, device
    if device.type == "cuda":
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}", "a process of torchrun has --device")
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        try:
            store, rank, _ = next(dist.rendezvous("env://", timeout=MEETING))
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank,
                                    world_size=world, timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(f"the {world} processes cannot meet at {where}: is the port in use? "
                            f"({str(error).splitlines()[0]})") from None
        signal.signal(signal.SIGTERM, lambda *_: lost("torchrun stops this one"))
        if rank > 0:
            sys.stdout = open(os.devnull, "w")
    return dist.get_rank(), world, device


def process_rank() -> int:
    """This process's number, 0 without torchrun."""
    return dist.get_rank() if dist.is_initialized() else 0


def process_count() -> int:
    """How many processes train together, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all() -> None:
    """Go on when all processes have come here."""
    if dist.is_initialized():
        dist.barrier()


def summed(value: Tensor) -> Tensor:
    """The sum of a tensor over all processes, in its place."""
    if dist.is_initialized():
        dist.all_reduce(value)
    return value


def end_processes() -> None:
    """Leave torch's process group when all have come here."""
    wait_for_all()
    if dist.is_initialized():
        dist.destroy_process_group()


def note_processes(state: dict) -> None:
    """Print that a run goes on with another number of processes than its checkpoint was written by."""
    before, now = state.get("processes", process_count()), process_count()
    if before != now:
        print(f"the checkpoint was written by {before} processes, {now} go on: same prompts and answers, "
              f"sums in another order")


def first_to_fail() -> bool:
    """Is this the first process of the run that fails? The others need no sentence of their own."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    try:                                             # torchrun's own table of keys
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, timeout=timedelta(seconds=10))
        return store.add("failed/" + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), 1) == 1
    except (KeyError, ValueError, RuntimeError):
        return True


def averaged(metrics: dict) -> dict:
    """Metrics of one process -> those over all processes: means, but the maxima of *_max and peak_gib.

    All processes call this together, with the same names in the same order.
    """
    if not dist.is_initialized():
        return metrics
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    values = torch.tensor(list(metrics.values()), dtype=torch.float64, device=device)
    everyone = [torch.zeros_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, values)
    merged = torch.stack(everyone)                                                         # (world, metrics)
    return {name: (merged[:, i].max() if name.endswith(("_max", "peak_gib")) else merged[:, i].mean()).item()
            for i, name in enumerate(metrics)}


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Replace the gradients of an optimizer's parameters by their means over all processes.

    A parameter without a gradient gets 0: no picture was sampled, perhaps in this process alone. Gradients of
    sharded parameters are averaged already.
    """
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if not isinstance(p, DTensor):
                p.grad = summed(p.grad) / process_count()


def whole(value: Tensor) -> Tensor:
    """Gather a sharded tensor; all processes call this together. Any other tensor is returned as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def sharded_like(value: Tensor, p: Tensor) -> Tensor:
    """A whole tensor -> this process's shard of it where `p`, of the same shape, is sharded."""
    if not isinstance(p, DTensor) or value.shape != p.shape:
        return value
    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def check_finite(what: str, value: float, flag: str = "--lr") -> None:
    """Stop training before an update that would break the weights. Raises UserError."""
    if not math.isfinite(value):
        raise UserError(f"{what} became {value}: lower {flag}; the last good checkpoint is intact")


def peak_gib(device: torch.device) -> float:
    """The most memory in use so far, in GiB: allocated on the GPU, or resident on the CPU (Windows: 0)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
    status = Path("/proc/self/status")                     # Linux: getrusage may give the parent's peak
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if found:
        return int(found[1]) / 2 ** 20
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


def read_lines(path: Path, key: Callable[[dict], object] = dict) -> list[dict]:
    """The JSON lines of a log of our own, [] where there is none. `key` takes from a line what it must hold.

    Half a line, left by a kill, and any other broken one are taken out of the file, with one warning. Of
    several processes only rank 0 does so.
    """
    lines, broken = [], 0
    for text in path.read_bytes().splitlines() if path.exists() else ():
        try:
            line = json.loads(text)
            key(line)
            lines.append(line)
        except (ValueError, RecursionError, TypeError, KeyError):
            broken += 1
    if broken and process_rank() == 0:
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


# safetensors' names of the types
DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
          torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL"}


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Write a safetensors file, one tensor after the other.

    The format is a length of 8 bytes, a JSON header with every tensor's place, then the tensors' bytes.
    Sharded tensors are gathered one at a time, by all processes together; rank 0 writes.
    Raises UserError where the disk does not take it.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))     # so all are aligned
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name in names:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {"dtype": DTYPES[tensors[name].dtype], "shape": list(tensors[name].shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    try:
        with open(path if process_rank() == 0 else os.devnull, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for name in names:
                value = whole(tensors[name].detach())
                if process_rank() == 0:
                    file.write(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    except OSError as error:             # a full disk, say: the caller's folder is not replaced
        reason = error.strerror
        raise UserError(f"{path}: cannot be written ({reason}); what was saved before is intact") from None


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
GOES_ON = {"*/*/config.json": "the same command goes on, finished runs are not trained again",
           "policy*/training.json": "the same command goes on from the last checkpoint",
           "*/answers*.jsonl": "the same command goes on behind the last answer",
           "rates_*.jsonl": "the same command goes on behind the last answer"}


@contextmanager
def claim(out: str | Path, resume: bool = True):
    """Make the folder for results, and keep other runs out of it until the block ends.

    A run that dies leaves its lock to the next one. Across machines this needs a disk that passes file locks
    on, or else a clock that is right to DEAD seconds. Ctrl-C names what the run goes on from.
    Raises UserError where another run is alive, or where the folder holds something that no run wrote;
    OSError where nothing can be written.
    """
    folder = Path(out)
    if process_rank() > 0:
        yield folder
        return
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


def machine() -> dict[str, str]:
    """The processor, the GPUs, the versions and the commit (-dirty: with changes) of a run."""
    info, here = Path("/proc/cpuinfo"), Path(__file__).parent
    names = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    processor = (names or [platform.processor() or platform.machine()])[0]
    commit = ""
    if shutil.which("git"):
        command = ["git", "-C", here, "describe", "--always", "--dirty"]
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    words = ", ".join([processor, f"{os.cpu_count()} cores", *gpus])
    return {"machine": words, "system": platform.platform(), "python": platform.python_version(),
            "torch": torch.__version__, "commit": commit or "unknown"}


class Run:
    """A run directory: config.json (settings, versions), metrics.jsonl, policy/, samples/."""

    def __init__(self, config, lines: int = 0, content: dict | None = None):
        """Make the folder, write config.json and open metrics.jsonl. Of several processes only rank 0 writes.

        config: a settings dataclass with a field `out`.
        lines: how many lines of an earlier metrics.jsonl the checkpoint had seen; the rest is dropped.
        content: hashes of the weights and data that the run depends on, by flag.
        """
        self.folder, self.lines, self.writes = Path(config.out), lines, process_rank() == 0
        self.content = content
        if not self.writes:
            return
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.json", json.dumps(
            {"settings": asdict(config), "content": content, "command": " ".join(sys.argv), **machine(),
             "threads": torch.get_num_threads(), "processes": process_count()}, indent=1))
        self.metrics = self.folder / "metrics.jsonl"
        earlier = read_lines(self.metrics)[:lines]
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in earlier))
        self.lines = len(earlier)

    def log(self, **metrics) -> None:
        """Append one flat object, floats rounded to six places."""
        self.lines += self.writes
        if not self.writes:
            return
        line = {k: round(v, 6) if isinstance(v, float) else v for k, v in metrics.items()}
        add_line(self.metrics, line)

    def sample(self, name: str, title: str, groups: list[dict], judged: list[dict] = ()) -> None:
        """Keep answers for people: samples/NAME.json for the report, samples/NAME.png as a sheet.

        groups: `rewards.group_record` of each prompt. A sheet *after.png has those of *before.json beside it.
        judged: questions to a learned judge and its replies.
        """
        if not self.writes:
            return
        file, earlier = self.folder / "samples" / f"{name}.json", []
        write_text(file, json.dumps({"title": title, "groups": groups, "judged": list(judged)}))
        for before in file.parent.glob("*before.json") if name.endswith("after") else ():
            earlier = read_json(before)["groups"]
        draw_sheet(groups, file.with_suffix(".png"), earlier)


def start_over(folder: Path) -> None:
    """Delete what an earlier run wrote into a run directory, and nothing else."""
    remove_folder(settled(folder / "policy"))
    sheets = [file for end in ("json", "png") for file in (folder / "samples").glob(f"{'[0-9]' * 6}*.{end}")]
    for file in (*sheets, *(folder / name for name in ("metrics.jsonl", "evaluation.json", "report.html"))):
        file.unlink(missing_ok=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """An optimizer's state as named tensors, for a safetensors file."""
    return {f"optimizer.{i}.{key}": value for i, state in optimizer.state_dict()["state"].items()
            for key, value in state.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put the tensors of `optimizer_tensors` back; others are passed over."""
    state, trained = optimizer.state_dict(), [p for group in optimizer.param_groups for p in group["params"]]
    for name, value in tensors.items():
        if name.startswith("optimizer."):
            _, i, key = name.split(".")
            state["state"].setdefault(int(i), {})[key] = sharded_like(value, trained[int(i)])
    optimizer.load_state_dict(state)


# ------------------------------------------------------------------------------------------------------------
# Something to look at. Answers and groups are those of `rewards.group_record`

SIDE = 96            # pixels on the screen that the shorter side of a picture has at least
LETTERS = {"T": "think", "w": "words", "t": "/think", "V": "vis", "p": "picture", "v": "/vis", "E": "end"}


def png(picture: np.ndarray) -> str:
    """uint8 [H, W, 3] -> a base64 PNG of at most 256 pixels a side, for JSON and HTML."""
    data, image = io.BytesIO(), Image.fromarray(picture)
    image.thumbnail((256, 256))
    image.save(data, "PNG")
    return base64.b64encode(data.getvalue()).decode()


def enlarged(source: str | Path) -> Image.Image:
    """A base64 PNG or a picture file, enlarged by a whole number until its shorter side has SIDE pixels."""
    image = Image.open(source if isinstance(source, Path) else io.BytesIO(base64.b64decode(source)))
    zoom = math.ceil(SIDE / min(image.size))
    return image.resize((image.width * zoom, image.height * zoom), Image.NEAREST)


def pairs(steps: list[dict]) -> list[list[dict]]:
    """Steps -> each text together with the picture that follows it."""
    found = []
    for step in steps:
        if found and step["picture"] and not found[-1][-1]["picture"]:
            found[-1].append(step)
        else:
            found.append([step])
    return found


def parts_of(answer: dict) -> str:
    """The parts of an answer's reward, and its form: in words where it is not as the prompt asks."""
    parts = {"r_t": answer["text"], "r_v": answer["visual"], "r_f": answer["format"]}
    words = ", ".join(f"{name} {value:.2f}" for name, value in parts.items() if value is not None)
    form = " ".join(LETTERS[letter] for letter in answer["layout"])
    return f"{words}; form {'as asked' if answer['format'] else f'wrong: {form}'}"


def draw_sheet(groups: list[dict], path: Path, earlier: list[dict] = ()) -> None:
    """A PNG: each prompt and below it an answer a row. `earlier` answers to the same prompts stand left."""
    sides = [earlier, groups] if len(earlier) == len(groups) else [groups]
    lengths = [len(pairs(a["steps"])) for side in sides for group in side for a in group["answers"]]
    half, rows = max([3, *lengths]), []              # columns of one side; rows of cells
    for of in zip(*sides):
        # column, columns of room, text, picture
        rows.append([(0, half * len(sides), of[0]["prompt"], None)])
        rows.append([(i, 1, "", p) for i, p in enumerate(of[0]["pictures"])])
        for answers in itertools.zip_longest(*(group["answers"] for group in of)):
            places = [(n * half, answer) for n, answer in enumerate(answers) if answer]
            rows.append([(left, half, parts_of(answer), None) for left, answer in places])
            rows.append([(left + i, 1, step["text"] or "", step["picture"]) for left, answer in places
                         for i, pair in enumerate(pairs(answer["steps"])) for step in pair])
    rows = [[(column, room, text, p and enlarged(p)) for column, room, text, p in row] for row in rows]
    cell = 24 + max([p.width for row in rows for *_, p in row if p], default=SIDE)
    rows = [[(8 + column * cell, textwrap.wrap(text, room * cell // 8), p) for column, room, text, p in row]
            for row in rows]
    words = [18 * max([len(lines) for _, lines, _ in row], default=0) for row in rows]     # heights of rows
    pictures = [max([p.height for *_, p in row if p], default=0) for row in rows]
    tops = list(itertools.accumulate((6 + a + b for a, b in zip(words, pictures)), initial=6))
    sheet = Image.new("RGB", (half * len(sides) * cell + 8, tops[-1]), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, top, down in zip(rows, tops, words):
        for x, lines, picture in row:
            pen.multiline_text((x, top), "\n".join(lines), fill="#1c1c1c", font=font)
            if picture:
                sheet.paste(picture, (x, top + down))
    sheet.save(path)


# ------------------------------------------------------------------------------------------------------------
# Pages (HTML): pieces from small to large

STYLE = """
:root{--page:#fff;--ink:#1c1c1c;--soft:#555;--line:#bbb;--card:#f5f5f3;--good:#176b2c;--bad:#b3261e;
--c0:#1f5fa8;--c1:#b3470a;--c2:#1c7a3d;--c3:#8a3d9e;--c4:#7a5b00;--c5:#555;color-scheme:light dark}
@media screen and (prefers-color-scheme:dark){:root{--page:#16181b;--ink:#ececec;--soft:#b8b8b8;--line:#555;
--card:#22262a;--good:#7bd88f;--bad:#ff9d94;--c0:#8ab8f5;--c1:#f5a66b;--c2:#7bd88f;--c3:#d9a3ea;--c4:#e3c562;
--c5:#bbb}}
body{font:16px/1.4 system-ui,sans-serif;max-width:1120px;margin:1.5em auto;padding:0 12px;color:var(--ink);
background:var(--page);overflow-wrap:break-word}h1{font-size:1.5em}h2{font-size:1.3em;margin:1.6em 0 .4em}
h3{font-size:1.05em;margin:.8em 0 .2em}p{margin:.4em 0;max-width:75ch}.headline{font-size:1.3em}
figure{margin:0;max-width:336px}figure,.part,.pair{break-inside:avoid}
figcaption,table,.note{font-size:13px}.note svg{float:left;margin:5px 5px 0 0}
pre{white-space:pre-wrap;background:var(--card);padding:.8em;font-size:13px}.wide{overflow-x:auto}
pre.wide{white-space:pre}.row{display:flex;flex-wrap:wrap;gap:12px 26px;align-items:start}
.answer .row{gap:10px 6px}.note{white-space:nowrap}.soft{white-space:normal}
.part{display:inline-block;vertical-align:top;max-width:min(520px,100%);padding-right:24px;
box-sizing:border-box}
svg{display:block;font-size:12px}svg text{fill:currentColor}td svg{display:inline;margin-left:4px}
table{border-collapse:collapse;margin:.4em 0}
td,th{padding:2px 6px;text-align:left;vertical-align:top;border-top:1px solid var(--line)}
.group{background:var(--card);padding:2px 12px 12px;margin:14px 0;border-radius:6px}
.sides{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,480px),1fr));gap:4px 20px}
.answer{border-top:1px solid var(--line);padding:6px 0}
.pair{min-width:150px;max-width:258px;width:min-content}
img{display:block;image-rendering:pixelated;max-width:100%;height:auto;
border:1px solid var(--line);margin:3px 0}
.right{color:var(--good)}.wrong,.missing{color:var(--bad)}summary{cursor:pointer;margin:.4em 0}"""
COLUMNS = {          # of an evaluation -> what it counts
    "format": "well-formed, with as many steps as asked", "text": "the text names the true state",
    "visual": "the picture shows what its own text says", "visual_true": "the picture shows the true state",
    "story": "all texts and pictures right, well-formed", "reward": "Eq. (5), the sum of three parts"}
ARMS = {"sampled": "Sampled as in training", "greedy": "Greedy", "low": "Sampled at a low temperature"}
CHARTS = (           # title with the unit, metrics, top of the scale (None: their largest value)
    ("Reward and its parts, 0..1", "reward.*", 1.0),
    ("KL to the reference, Eq. (7), nats", "kl/.*", None),
    ("Ratio, Eq. (3), and share clipped", "ratio_.*|clip_frac/.*|logp_gap", 2.0),
    ("Texts and pictures an answer", "steps_per_answer", None),
    ("Standard deviation in a group", "spread/.*", None),
    ("Shares, 0..1", "truncated|no_score|cut_texts|zero_spread|text_share|padding", 1.0),
    ("Norm of the gradient", "grad_norm", None),
    ("Seconds, stacked", "seconds/.*", None),
    ("Seconds in all", "seconds", None),
    ("Peak memory, GiB", "peak_gib", None),
    ("Loss, nats a decision", "loss.*", None))
METRICS = {          # metric whose name does not say it -> what it is
    "truncated": "answers cut by the budget", "no_score": "steps that a judge gave no score",
    "cut_texts": "texts that a judge read in part", "zero_spread": "groups without any advantage",
    "text_share": "text among all decisions", "ratio_max": "1 but for later updates on a rollout",
    "logp_gap": "sampler against scorer", "padding": "of a batch"}
LEGEND = (
    "r_t, r_v and r_f are the text, visual and format rewards of Eq. (5), each 0..1. The form that is asked "
    "for: think, words, /think, vis, picture, /vis for every step, then end. Right and wrong compare with "
    "the true answer; a picture's reward compares it with its own text. An advantage is a step's mean.")


class Part(NamedTuple):
    """A piece of a page or of a print-out: a title, sentences, rows of plain cells with the header first."""
    title: str
    words: str = ""
    rows: list[list[str]] = ()


def write_page(path: Path, title: str, body: list[str]) -> Path:
    """Write one HTML file that opens offline; `body` holds HTML, the title is escaped here."""
    title = html.escape(title)
    head = ('<!doctype html><html lang="en"><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<title>{title}</title><style>{STYLE}</style>')
    write_text(path, "\n".join([head, f"<h1>{title}</h1>", *body]))
    return path


def fold(title: str, *body: str) -> str:
    """HTML that is shown when its title is clicked, "" without a body."""
    return f"<details><summary>{html.escape(title)}</summary>{''.join(body)}</details>" if any(body) else ""


def picture_html(source: str | Path, alt: str, folder: Path = Path()) -> str:
    """An <img> of a base64 PNG, or of a file by its path from `folder`, where the page lies."""
    link = f"data:image/png;base64,{source}"
    if isinstance(source, Path):
        link = quote(os.path.relpath(source, folder))
    width = min(256, enlarged(source).width)
    return f'<img alt="{html.escape(alt)}" width="{width}" loading="lazy" src="{link}">'


def bar(value: float, top: float) -> str:
    """A small bar from the middle, to the right where positive, to the left where negative, full at `top`."""
    length = 17 * min(1.0, abs(value) / top)
    x, colour = (17.5, "--c0") if value >= 0 else (17.5 - length, "--c1")
    return (f'<svg width="35" height="10" aria-hidden="true"><path d="M17.5 0V10" stroke="currentColor"/>'
            f'<rect x="{x:.1f}" y="2" width="{length:.1f}" height="6" style="fill:var({colour})"/></svg>')


def steps_html(steps: list[dict], folder: Path = Path()) -> str:
    """Texts and pictures in turn, each text with its picture; below each its mark, reward and advantage."""
    cells = ""
    for pair in pairs(steps):
        cells += '<div class="pair">'
        for step in pair:
            cells += html.escape(step["text"] or "")
            if step["picture"]:
                cells += picture_html(step["picture"], f"picture: {pair[0]['text'] or 'no text'}", folder)
            if step.get("right") is not None:
                mark = ("wrong", "✗ wrong"), ("right", "✓ right")
                cells += '<div class="note {}">{}</div>'.format(*mark[step["right"]])
            for name, top, form in (("reward", 1.0, ".2f"), ("advantage", 2.0, "+.2f")):
                if step.get(name) is not None:
                    cells += f'<div class="note">{bar(step[name], top)}{name} {step[name]:{form}}</div>'
        cells += "</div>"
    return f'<div class="row">{cells}</div>'


def group_html(sides: dict[str, dict], most: int = 1) -> str:
    """One prompt, its true answer, and below them the answers of each side (name -> group) side by side.

    Answers beyond the first `most` are folded.
    """
    group = next(iter(sides.values()))
    start = "".join(picture_html(p, "picture of the prompt") for p in group["pictures"])
    body = f'<h3>{html.escape(group["prompt"])}</h3><div class="row">{start}'
    if group.get("truth"):
        body += f'<div>The true answer:{steps_html(group["truth"])}</div>'
    body += '</div><div class="sides">'
    for name, of in sides.items():
        answers = [f'<div class="answer"><div class="note soft">answer {n}: {html.escape(parts_of(answer))}'
                   f'</div>{steps_html(answer["steps"])}</div>' for n, answer in enumerate(of["answers"], 1)]
        rest = fold(f"{len(answers) - most} more answers to this prompt", *answers[most:])
        body += f'<div><h3>{name}</h3><div class="sides">{"".join(answers[:most])}</div>{rest}</div>'
    return f'<div class="group">{body}</div></div>'


def part_html(part: Part) -> str:
    """A part as HTML. A number with a sign and two decimals gets a bar."""
    lines, tag = [], "th"
    for row in part.rows:
        bars = [bar(float(cell), 2.0) if re.fullmatch(r"[+-]\d+\.\d\d", cell) else "" for cell in row]
        lines.append("".join(f"<{tag}>{html.escape(c)}{b}</{tag}>" for c, b in zip(row, bars, strict=True)))
        tag = "td"
    words = "".join(f"<p>{html.escape(line)}</p>" for line in part.words.splitlines())
    table = f'<div class="wide"><table><tr>{"<tr>".join(lines)}</table></div>' if lines else ""
    return f'<div class="part"><h3>{html.escape(part.title)}</h3>{words}{table}</div>'


def part_text(part: Part) -> str:
    """A part as plain text, its columns aligned."""
    widths = [max(map(len, column)) for column in itertools.zip_longest(*part.rows, fillvalue="")]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in part.rows]
    return "\n".join(["", part.title, *textwrap.wrap(part.words, 100), *rows])


def chart(title: str, lines: dict[str, list[tuple[float, float]]], top: float | None, across: str) -> str:
    """Named lines of points (x, y) on one pair of axes as inline SVG: thin the values, thick their mean over
    an eighth of the line. `top` is the highest y of a fixed scale. "stacked" in the title draws areas."""
    stacked, body, keys, below = "stacked" in title, "", "", Counter()
    xs, ys = zip(*(point for line in lines.values() for point in line), strict=True)
    first, last, low, high = min(xs), max(*xs, min(xs) + 1), min(0.0, *ys), top or max(ys)
    if stacked:
        high = max(sum(y for _, y in of) for of in zip(*lines.values()))
    quarter = max(high / 4, -low, 1e-9)                    # of the scale: a round number
    unit = 10 ** math.floor(math.log10(quarter))
    quarter = unit * min(k for k in (1, 2, 2.5, 4, 5, 10) if k * unit >= 0.9999 * quarter)
    low, high = -quarter * (low < 0), quarter * (4 - (low < 0))

    def at(x: float, y: float) -> str:
        share = (min(max(y, low), high) - low) / (high - low)
        return f"{50 + 274 * (x - first) / (last - first):.1f},{150 - 140 * share:.1f}"
    for i in range(5):
        y, x = low + (high - low) * i / 4, round(first + (last - first) * i / 4)
        level, place = 150 - 35 * i, at(x, low).partition(",")[0]
        body += (f'<path d="M50 {level}H324" style="stroke:var(--line)"/><text x="46" y="{level + 4}" '
                 f'text-anchor="end">{y:.3g}</text><text x="{place}" y="166" text-anchor="middle">{x}</text>')
    for i, (name, line) in enumerate(lines.items()):
        colour, every, wide = f"var(--c{i % 6})", math.ceil(len(line) / 200), max(1, len(line) // 16)
        means = [(line[n][0], fmean(y for _, y in line[max(0, n - wide):n + wide + 1]))
                 for n in range(0, len(line), every)]
        if stacked:
            edge = [at(x, below[x]) for x, _ in line[::every]]
            below.update(dict(line))
            edge += [at(x, below[x]) for x, _ in reversed(line[::every])]
            body += f'<polygon points="{" ".join(edge)}" style="fill:{colour}"/>'
        for points, style in ((line[::every], "1;opacity:.5"), (means, "2.5")) if not stacked else ():
            path = " ".join(at(*point) for point in points)
            body += f'<polyline points="{path}" style="fill:none;stroke:{colour};stroke-width:{style}"/>'
        words = f"{name}: {line[0][1]:.3g} → {line[-1][1]:.3g}"
        words += f" ({METRICS[name]})" if name in METRICS else ""
        keys += f'<br><b style="color:{colour}">▬</b> {html.escape(words)}'
    title, words = html.escape(title), html.escape(f"by {across}: {', '.join(lines)}")
    return (f'<figure><b>{title}</b><svg width="336" height="184" role="img" aria-label="{title} {words}">'
            f'{body}<text x="185" y="182" text-anchor="middle">{across}</text></svg>'
            f'<figcaption>first → last{keys}</figcaption></figure>')


def curves_html(runs: dict[str, list[dict]]) -> str:
    """Charts of one run's metrics in groups; of several runs (name -> lines) one a metric, overlaid."""
    body, stages = "", {}                                  # stages: stage -> metric -> run -> points
    for run, lines in runs.items():
        for m in lines:
            across = "step" if "step" in m else "update"
            metrics = stages.setdefault((m.get("stage", ""), across), {})
            for name, value in m.items():
                if name != across and isinstance(value, (int, float)) and math.isfinite(value):
                    metrics.setdefault(name, {}).setdefault(run, []).append((m[across], value))
    for (stage, across), metrics in stages.items():
        zeros = [name for name, of in metrics.items() if not any(y for line in of.values() for _, y in line)]
        names, charts = [name for name in metrics if name not in zeros], []
        for title, pattern, top in (*CHARTS, *((name, re.escape(name), None) for name in names)):
            group = [name for name in names if re.fullmatch(pattern, name)]
            names = [name for name in names if name not in group]          # each stands in one chart
            if group and len(runs) == 1:
                charts.append(chart(title, {n: of for n in group for of in metrics[n].values()}, top, across))
            else:
                charts += [chart(name, metrics[name], top, across) for name in group]
        body += f'<h3>{html.escape(stage)}</h3><div class="row">{"".join(charts)}</div>'
        zeros = [f"{name} ({METRICS[name]})" if name in METRICS else name for name in zeros]
        body += f"<p>Zero all the time: {html.escape(', '.join(zeros))}.</p>" if zeros else ""
    return body


def rates_html(results: dict[str, dict]) -> str:
    """Evaluations by name -> for each arm a picture of the means with 95% intervals, and the table."""
    cards = ""
    for arm, title in ARMS.items():
        body, rows, y = "", [["rate", "", "mean", "95% interval"]], 0
        for rate, meaning in COLUMNS.items():
            top = 1.0 if rate != "reward" else 3.0
            body += f'<text y="{y + 14}"><tspan font-weight="700">{rate}</tspan> {meaning}</text>'
            for i, (name, result) in enumerate(results.items()):
                y, (mean, low, high) = y + 18, result[arm][rate]
                x, left, right = (92 + 190 * min(1.0, value / top) for value in (mean, low, high))
                body += (f'<text x="86" y="{y + 14}" text-anchor="end">{html.escape(name[-13:])}</text>'
                         f'<path d="M92 {y + 10}h190" style="stroke:var(--line)"/>'
                         f'<g style="color:var(--c{i % 6})" fill="currentColor" stroke="currentColor">'
                         f'<path d="M{left:.1f} {y + 10}H{right:.1f}" stroke-width="3"/>'
                         f'<circle cx="{x:.1f}" cy="{y + 10}" r="4"/></g>'
                         f'<text x="290" y="{y + 14}">{mean:.3f}</text>')
                rows.append([rate, name, f"{mean:.3f}", f"{low:.3f}–{high:.3f}"])
            y += 28
        words = f"{title}: rates with their intervals, the numbers of the table below"
        cards += (f'<figure><b>{title}</b><svg width="336" height="{y}" role="img" aria-label="{words}">'
                  f'{body}</svg>{part_html(Part("", rows=rows))}</figure>')
    single = "; ".join(f"{name}: " + ", ".join(f"{task} {share:.2f}" for task, share in of["kept"].items())
                       for name, of in results.items())
    return (f'<p>A grey line runs from 0 to 1 (reward: to 3).</p><div class="row">{cards}</div>'
            f"<p>Kept tasks, greedy (t2i: text to image, i2t: image to text): {html.escape(single)}.</p>")


def read_run(folder: Path) -> list[dict]:
    """The metrics of a run's folder, the reward as the mean of its parts by weight, in 0..1."""
    lines, _, _ = read_text(folder / "metrics.jsonl").rpartition("\n")          # half a line may follow
    lines, settings = list(map(json.loads, lines.splitlines())), read_json(folder / "config.json")["settings"]
    if not lines:
        raise UserError(f"{folder / 'metrics.jsonl'}: no line of metrics")
    total = sum(settings.get("reward_weights", [1]))
    for line in lines:
        if "reward" in line:
            line["reward, mean of its parts"] = line.pop("reward") / total
    return lines


def headline(folder: Path) -> str:
    """What came out of a run, in words and numbers."""
    lines, file, words = read_run(folder), folder / "evaluation.json", ""
    seconds = f"{lines[-1].get('update', len(lines))} updates, {sum(line['seconds'] for line in lines):.0f} s"
    if file.exists():
        before, after = (read_json(file)[name] for name in ("before", "after"))
        first, last = (of["greedy"]["story"][0] for of in (before, after))
        split = {"heldout": "held-out"}.get(after["split"], after["split"])
        words = f"greedy stories right: {first:.0%} → {last:.0%} on {after['prompts']} {split} prompts; "
        if "seconds" in after:
            seconds += f", evaluation {before['seconds'] + after['seconds']:.0f} s"
        seconds += f"; kept tasks {min(after['kept'].values()):.2f}"
    return f'<p class="headline">{html.escape(words + seconds)}</p>'


def settings_html(runs: dict[str, Path]) -> str:
    """How a run was made: settings, machine, versions. Of several runs only what differs."""
    columns = [{**config["settings"], **{k: v for k, v in config.items() if k != "settings"}}
               for config in (read_json(folder / "config.json") for folder in runs.values())]
    rows = [[key, *(str(column.get(key, "-")) for column in columns)]
            for key in dict.fromkeys(key for column in columns for key in column)]
    rows = [row for row in rows if len(row) == 2 or len(set(row[1:])) > 1]
    return part_html(Part("", "", [["", *runs], *rows]))


def section(title: str, file: Path, make: Callable[[], str]) -> str:
    """A titled piece of a page. Where a run's folder lacks what it needs, a sentence says what."""
    try:
        with reading(file, "the file"):
            body = make()
    except (UserError, OSError) as error:
        body = f'<p class="missing">{html.escape(f"This cannot be shown. {error}")}</p>'
    return (f"<h2>{html.escape(title)}</h2>" if title and body else "") + body


def answers_html(samples: Path) -> str:
    """The same prompts before and after, side by side, or what there is of the two."""
    sheets = {side: read_json(file) for side in ("before", "after") for file in samples.glob(f"*{side}.json")}
    if not sheets:
        raise UserError(f"{samples}: no answers, *before.json and *after.json")
    groups = zip(*(sheet["groups"] for sheet in sheets.values()), strict=True)
    return f"<p>{LEGEND}</p>" + "".join(group_html(dict(zip(sheets, of))) for of in groups)


def worked_html(samples: Path) -> str:
    """Of the first sheet the group whose step rewards differ most, and how its advantages came about."""
    def spread(group: dict) -> float:
        return pstdev([step["reward"] or 0.0 for answer in group["answers"] for step in answer["steps"]])
    file = min(samples.glob("*.json"), default=samples / "000000_before.json")
    group = max(read_json(file)["groups"], key=spread)
    parts = "".join(part_html(Part(*part)) for part in group["worked"])
    return group_html({"": group}, 99) + parts


def rollouts_html(samples: Path) -> str:
    """The latest rollouts, and what a learned text judge was asked, folded."""
    body = ""
    for file in sorted(samples.glob("*[0-9].json"))[-3:]:
        sheet = read_json(file)
        asked = ""
        for j in sheet["judged"]:
            score = "none" if j["score"] is None else j["score"]
            asked += "".join(picture_html(p, "picture of the question") for p in j.get("pictures", ()))
            words = html.escape(f"{j['question']}\n--> {j['reply']}")
            asked += f"<pre>[score: {score}]\n{words}</pre>"
        body += fold(sheet["title"], *(group_html({"": group}) for group in sheet["groups"]),
                     fold("what the text judge was asked last, and its replies", asked))
    return body


def write_report(folder: Path) -> Path:
    """Write a run directory's report.html. What the directory lacks is named on the page."""
    samples, metrics, settings = folder / "samples", folder / "metrics.jsonl", folder / "config.json"
    rates, warm_up = folder / "evaluation.json", metrics.exists() and '"stage"' in read_text(metrics)
    made = section("", settings, lambda: settings_html({folder.name: folder}))
    body = [section("", metrics, lambda: headline(folder)), fold("how this run was made", made),
            section("The same prompts before and after", samples, lambda: answers_html(samples))]
    if not warm_up:
        body += [section("Rates before and after", rates, lambda: rates_html(
                    {name: read_json(rates)[name] for name in ("before", "after")})),
                 section("One group in numbers: Eq. (4) to (6)", samples, lambda: worked_html(samples))]
    body += [section("Curves", metrics, lambda: curves_html({"": read_run(folder)})),
             section("Rollouts", samples, lambda: rollouts_html(samples))]
    return write_page(folder / "report.html", f"Report: {folder}", body)


def write_comparison(runs: dict[str, Path], folder: Path) -> Path:
    """Write compare.html: rates of several runs side by side, their curves overlaid, settings that differ."""
    body, rates, lines = [], {}, {}
    for name, run in runs.items():
        def read(name=name, run=run) -> str:
            lines[name] = read_run(run)
            rates[name] = read_json(run / "evaluation.json")["after"]
            return headline(run)
        body.append(section(name, run, read))
    runs = {name: run for name, run in runs.items() if (run / "config.json").exists()}
    body += [section("Settings that differ", folder, lambda: settings_html(runs)),
             section("Rates after training", folder, lambda: rates_html(rates)),
             section("Curves", folder, lambda: curves_html(lines))]
    return write_page(folder / "compare.html", "Runs compared", body)
