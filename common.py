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
from contextlib import contextmanager, suppress
from dataclasses import Field, asdict, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Callable, Iterable, Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageFont, ImageOps
from safetensors import SafetensorError, safe_open
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

    Of several processes each has the GPU that `start_processes` chose for it, whatever number stands here.
    Raises UserError where it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name.startswith("cuda:") and process_count() > 1:
        name = "cuda"
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
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1:
        return 0, 1, pick_device(name)
    if name.startswith("cuda") or (name == "auto" and torch.cuda.is_available()):
        name = f"cuda:{os.environ['LOCAL_RANK']}"      # no other: touching one takes memory there
    device = pick_device(name, "a process of torchrun has --device")
    if device.type == "cuda":
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
            if not is_sharded(p):
                p.grad = summed(p.grad) / process_count()


def is_sharded(value: Tensor) -> bool:
    """Whether a tensor is a DTensor of FSDP2, of which each process holds a share."""
    return hasattr(value, "full_tensor")


def whole(value: Tensor) -> Tensor:
    """Gather a sharded tensor; all processes call this together. Any other tensor is returned as it is."""
    return value.full_tensor() if is_sharded(value) else value


def sharded_like(value: Tensor, p: Tensor) -> Tensor:
    """A whole tensor -> this process's shard of it where `p`, of the same shape, is sharded."""
    if not is_sharded(p) or value.shape != p.shape:
        return value
    from torch.distributed.tensor import distribute_tensor             # 0.7 s, for several processes alone
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


UNREAD = ["*.h5", "*.msgpack", "*.ot", "*.onnx", "*.mlpackage/*", "*.mlmodel"]      # other libraries' weights


def snapshot(source: str, where: str, only: str | None = None) -> Path:
    """The folder with a hub id's files (`only`: one of them), fetched or from the cache.

    Raises UserError where there are none.
    """
    from huggingface_hub import snapshot_download
    try:
        return Path(snapshot_download(source, allow_patterns=only, ignore_patterns=UNREAD))
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


def thumbnail(picture: np.ndarray, side: int = 128) -> str:
    """uint8 [H, W, 3] -> a base64 file for JSON and HTML.

    Choice: a photograph becomes a JPEG of `side` pixels on its shorter side, so that pages stay below 1 MB.
    """
    data, image, kind = io.BytesIO(), Image.fromarray(picture), "PNG"
    if min(image.size) >= SIDE:
        image, kind = ImageOps.scale(image, min(1, side / min(image.size))), "JPEG"
    image.save(data, kind)
    return base64.b64encode(data.getvalue()).decode()


def enlarged(code: str) -> Image.Image:
    """A base64 file as an image, enlarged by a whole number until its shorter side has SIDE pixels."""
    image = Image.open(io.BytesIO(base64.b64decode(code)))
    return ImageOps.scale(image, math.ceil(SIDE / min(image.size)), Image.NEAREST)


def pairs(steps: list[dict]) -> list[list[dict]]:
    """Steps -> each text together with the picture that follows it."""
    found = []
    for step in steps:
        if not (found and step["picture"] and not found[-1][-1]["picture"]):
            found.append([])
        found[-1].append(step)
    return found


def parts_of(answer: dict) -> str:
    """The parts of an answer's reward, and its form: in words where it is not as the prompt asks."""
    parts = {"r_t": answer["text"], "r_v": answer["visual"], "r_f": answer["format"]}
    words = ", ".join(f"{name} {value:.2f}" for name, value in parts.items() if value is not None)
    form = " ".join(LETTERS[letter] for letter in answer["layout"])
    return f"{words}; form {'as asked' if answer['format'] else f'wrong: {form}'}"


def draw_sheet(groups: list[dict], path: Path, earlier: list[dict] = ()) -> None:
    """A PNG: each prompt and below it an answer a row. `earlier` answers to the same prompts stand left."""
    sides, rows = [earlier, groups] if len(earlier) == len(groups) else [groups], []
    columns = 1 + max(len(pairs(of["steps"])) for side in sides for group in side for of in group["answers"])
    for of in zip(*sides):                                 # a row: cells of a text and a picture below it
        rows.append([(of[0]["prompt"], None), *(("", picture) for picture in of[0]["pictures"])])
        for beside in zip(*(group["answers"] for group in of)):
            rows.append([])
            for answer in beside:
                cells = [(pair[0]["text"] or "", pair[-1]["picture"]) for pair in pairs(answer["steps"])]
                rows[-1] += [(parts_of(answer), None), *cells, *[("", None)] * (columns - 1 - len(cells))]
    rows = [[(text, picture and enlarged(picture)) for text, picture in row] for row in rows]
    wide = 24 + max([SIDE + 40, *(picture.width for row in rows for _, picture in row if picture)])
    strips, font = [], ImageFont.load_default(14)
    for row in rows:
        row = [(textwrap.wrap(text, wide // 8), picture) for text, picture in row]
        down = max([18 * len(lines) for lines, picture in row if picture], default=0)
        height = max([18 * len(lines) + 8 for lines, _ in row] + [down + 8 + p.height for _, p in row if p])
        strips.append(Image.new("RGB", (wide * max(map(len, rows)), height), "white"))
        for x, (lines, picture) in zip(itertools.count(8, wide), row):
            ImageDraw.Draw(strips[-1]).text((x, 0), "\n".join(lines), fill="#1c1c1c", font=font)
            if picture:
                strips[-1].paste(picture, (x, down))
    Image.fromarray(np.concatenate([np.asarray(strip) for strip in strips])).save(path)


# ------------------------------------------------------------------------------------------------------------
# Pages (HTML): pieces from small to large

STYLE = """
:root{color-scheme:light dark;--line:light-dark(#bbb,#555);--card:light-dark(#f5f5f3,#22262a);
--good:light-dark(#176b2c,#7bd88f);--bad:light-dark(#b3261e,#ff9d94);--c0:light-dark(#1f5fa8,#8ab8f5);
--c1:light-dark(#b3470a,#f5a66b);--c2:light-dark(#1c7a3d,#7bd88f);--c3:light-dark(#8a3d9e,#d9a3ea);
--c4:light-dark(#7a5b00,#e3c562)}
body{font:16px/1.4 system-ui,sans-serif;max-width:1120px;margin:auto;padding:12px;overflow-wrap:break-word}
h1{font-size:1.5em}h2{font-size:1.3em}h3{font-size:1.05em;margin:.6em 0 .2em}p{margin:.4em 0;max-width:75ch}
.row,.sides{display:flex;flex-wrap:wrap;align-items:start;gap:10px 20px}.sides>*{flex:1 1 min(100%,440px)}
figure{margin:0;max-width:336px}figcaption,table,pre,.note{font-size:13px}.headline{font-size:1.3em}
pre{white-space:pre-wrap}.wide{overflow-x:auto}pre.wide{white-space:pre}table{border-collapse:collapse}
td{padding:2px 8px 2px 0;vertical-align:top;border-top:1px solid var(--line)}tr:first-child{font-weight:700}
pre,.group{background:var(--card);padding:4px 12px 12px;margin:14px 0;border-radius:6px}
.part{max-width:100%}.pair{width:min-content;min-width:150px}.pair .note{white-space:nowrap}
img{display:block;image-rendering:pixelated;margin:3px 0;border:1px solid var(--line)}
svg{display:block;font-size:12px}svg text{fill:currentColor}.pair svg{float:left;margin:3px 5px 0 0}
polyline{fill:none;stroke:currentColor;vector-effect:non-scaling-stroke}.thin{opacity:.5}
.thick{stroke-width:2.5}.area{fill:currentColor;stroke:none}
.right{color:var(--good)}.wrong,.missing{color:var(--bad)}summary{cursor:pointer}
@media print{.group,.pair,figure,tr{break-inside:avoid}}"""
COLUMNS = {          # of an evaluation -> what it counts
    "format": "well-formed, with as many steps as asked", "text": "the text names the true state",
    "visual": "the picture shows what its own text says", "visual_true": "the picture shows the true state",
    "story": "all texts and pictures right, well-formed", "reward": "Eq. (5), the sum of three parts"}
ARMS = {"sampled": "Sampled as in training", "greedy": "Greedy", "low": "Sampled at a low temperature"}
CHARTS = {           # metrics that share a chart -> its title with the unit, the top of a fixed scale
    "reward": ("Reward and its parts, 0..1", 1.0), "kl/": ("KL to the reference, Eq. (7), nats", None),
    "ratio_|clip_|logp_": ("Ratio, Eq. (3), and share clipped", 2.0), "seconds/": ("Seconds, stacked", None),
    "spread/": ("Standard deviation in a group", None), "loss": ("Loss, nats a decision", None),
    "truncated|no_score|cut_texts|zero_spread|text_share|padding": ("Shares, 0..1", 1.0)}
METRICS = {          # metric whose name does not say it -> what it is
    "truncated": "answers cut by the budget", "no_score": "steps that a judge gave no score",
    "cut_texts": "texts that a judge read in part", "zero_spread": "groups without any advantage",
    "text_share": "text among all decisions", "ratio_max": "of a rollout's first update",
    "logp_gap": "sampler against scorer", "padding": "of a batch", "grad_norm": "norm of the gradient",
    "steps_per_answer": "texts and pictures", "peak_gib": "memory, GiB", "seconds": "in all"}
LEGEND = (
    "r_t, r_v and r_f are the text, visual and format rewards of Eq. (5), each 0..1; one that is missing was "
    "not judged. The form that is asked for: think, words, /think, vis, picture, /vis for every step, then "
    "end. Right and wrong compare with the true answer; a picture's reward compares it with its own text. An "
    "advantage is a step's mean.")


class Interval(NamedTuple):
    """A cell of a table: a mean with its 95% interval, drawn on a scale from least to most."""
    mean: float
    low: float
    high: float
    least: float = 0.0
    most: float = 1.0

    def __str__(self) -> str:
        return "{:.3f} [{:.3f} {:.3f}]".format(*self)


class Part(NamedTuple):
    """A piece of a page or a print-out: a title, sentences, rows of texts or intervals, the header first."""
    title: str
    words: str = ""
    rows: list[list[str | Interval]] = ()


def rounded(value: float | None) -> str:
    """A number in a table, two decimals."""
    return "-" if value is None else f"{value:.2f}"


def write_page(path: Path, title: str, body: list[str]) -> Path:
    """Write one HTML file that opens offline; `body` holds HTML, the title is escaped here."""
    title = html.escape(title)
    write_text(path, "\n".join([
        '<!doctype html><html lang="en"><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{title}</title><style>{STYLE}</style><h1>{title}</h1>", *body]))
    return path


def fold(title: str, *body: str) -> str:
    """HTML that is shown when its title is clicked, "" without a body."""
    return f"<details><summary>{html.escape(title)}</summary>{''.join(body)}</details>" if any(body) else ""


def picture_html(code: str, alt: str) -> str:
    """An <img> of a base64 PNG or JPEG."""
    kind, width = "jpeg" if code.startswith("/9j/") else "png", enlarged(code).width
    return f'<img alt="{html.escape(alt)}" width="{width}" src="data:image/{kind};base64,{code}">'


def bar(mean: float, low: float, high: float, least: float, most: float, wide: int = 120) -> str:
    """A line from low to high and a dot at the mean, on a scale from least to most with a tick at 0."""
    at, a, b, zero = (4 + (wide - 8) * (min(max(value, least), most) - least) / (most - least)
                      for value in (mean, low, high, 0))
    return (f'<svg width="{wide}" height="12" aria-hidden="true" style="color:var(--c{int(mean < 0)})">'
            f'<path d="M4 6H{wide - 4}M{zero:.1f} 0V12" style="stroke:var(--line)"/>'
            f'<path d="M{a:.1f} 6H{b:.1f}" stroke="currentColor" stroke-width="4"/>'
            f'<circle cx="{at:.1f}" cy="6" r="4" fill="currentColor"/></svg>')


def steps_html(steps: list[dict]) -> str:
    """Texts and pictures in turn, each text with its picture; below each its mark, reward and advantage."""
    cells = ""
    for pair in pairs(steps):
        cells += '<div class="pair">'
        for step in pair:
            cells += html.escape(step["text"] or "")
            if step["picture"]:
                cells += picture_html(step["picture"], f"picture: {pair[0]['text'] or 'no text'}")
            if step.get("right") is not None:
                mark, words = ("right", "✓ right") if step["right"] else ("wrong", "✗ wrong")
                cells += f'<div class="note {mark}">{words}</div>'
            for name, top in (("reward", 1.0), ("advantage", 2.0)):
                if (value := step.get(name)) is not None:
                    drawn = bar(value, 0, value, -top, top, 40)
                    cells += f'<div class="note">{drawn}{name} {value:.2f}</div>'
        cells += "</div>"
    return f'<div class="row">{cells}</div>'


def group_html(sides: dict[str, dict], most: int = 1) -> str:
    """One prompt, its true answer, and below them the first answers of each side (name -> group)."""
    group = next(iter(sides.values()))
    body = "".join(picture_html(p, "picture of the prompt") for p in group["pictures"])
    if group.get("truth"):
        body += f'<div>The true answer:{steps_html(group["truth"])}</div>'
    body = f'<h3>{html.escape(group["prompt"])}</h3><div class="row">{body}</div><div class="sides">'
    for n, beside in enumerate(list(zip(*(of["answers"] for of in sides.values())))[:most], 1):
        for name, answer in zip(sides, beside):
            words = html.escape(f" answer {n}: {parts_of(answer)}")
            body += f'<div><div class="note"><b>{name}</b>{words}</div>{steps_html(answer["steps"])}</div>'
    return f'<div class="group">{body}</div></div>'


def part_html(part: Part) -> str:
    """A part as HTML, its intervals drawn."""
    rows = [[html.escape(str(cell)) + (bar(*cell) if isinstance(cell, Interval) else "") for cell in row]
            for row in part.rows]
    words = "".join(f"<p>{html.escape(line)}</p>" for line in part.words.splitlines())
    table = "".join(f"<tr><td>{'<td>'.join(row)}" for row in rows)
    return (f'<div class="part"><h3>{html.escape(part.title)}</h3>{words}'
            f'<div class="wide"><table>{table}</table></div></div>')


def part_text(part: Part) -> str:
    """A part as plain text, its columns aligned."""
    widths = [max(map(len, column)) for column in itertools.zip_longest(*part.rows, fillvalue="")]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in part.rows]
    return "\n".join(["", part.title, *textwrap.wrap(part.words, 100), *rows])


def chart(title: str, top: float | None, across: str, lines: dict[str, list[tuple[float, float]]]) -> str:
    """Named lines of points (x, y) as inline SVG: thin the values, thick their mean over an eighth of them.

    top: where the scale ends if no value is above it. "stacked" in the title: areas, each on the sum of those
    before it.
    """
    stacked, curves, axes, keys = "stacked" in title, "", "", ""
    drawn = [np.array(points, float).T for points in lines.values()]                       # x and y, [2, n]
    for below, above in itertools.pairwise(drawn) if stacked else ():
        above[1] += np.interp(above[0], *below)
    xs, ys = np.concatenate(drawn, axis=1)
    last, low, high = max(1, xs.max()), min(0.0, ys.min()), max(top or 0.0, ys.max())
    unit = 10 ** math.floor(math.log10(max(high, -low, 1e-9)))
    low, high = unit * math.floor(low / unit), unit * math.ceil(high / unit - 1e-6)        # round numbers
    for share in (0, 0.25, 0.5, 0.75, 1):
        x, y = 50 + 274 * share, 150 - 140 * share
        axes += (f'<path d="M50 {y}H324" style="stroke:var(--line)"/><text x="46" y="{y + 4}" '
                 f'text-anchor="end">{low + share * (high - low):.3g}</text>'
                 f'<text x="{x}" y="166" text-anchor="middle">{share * last:.3g}</text>')
    for i, (name, points), (x, y) in reversed(list(zip(itertools.count(), lines.items(), drawn))):
        colour, half = f"color:var(--c{i % 5})", max(1, len(y) // 16)
        keys = (f'<br><b style="{colour}">▬</b> {html.escape(name)}: {points[0][1]:.3g} → '
                f'{points[-1][1]:.3g}{keys}')
        mean = [y[max(0, n - half):n + half + 1].mean() for n in range(len(y))]
        for kind, values in (("area", y),) if stacked else (("thin", y), ("thick", mean)):
            places = [f"{a:g},{-b:.5g}" for a, b in zip(x, values)][::math.ceil(len(x) / 200)]
            places += [f"{x[-1]:g},0", f"{x[0]:g},0"] if stacked else []
            curves += f'<polyline class="{kind}" points="{" ".join(places)}" style="{colour}"/>'
    title, words = html.escape(title), html.escape(f"by {across}: {', '.join(lines)}")
    return (f'<figure><b>{title}</b><svg width="336" height="184" role="img" aria-label="{title} {words}">'
            f'{axes}<text x="185" y="182" text-anchor="middle">{across}</text>'
            f'<svg x="50" y="10" width="274" height="140" preserveAspectRatio="none" aria-hidden="true" '
            f'viewBox="0 {-high:g} {last:g} {high - low:g}">{curves}</svg></svg>'
            f'<figcaption>first → last{keys}</figcaption></figure>')


def curves_html(runs: dict[str, list[dict]]) -> str:
    """Charts of one run's metrics in groups; of several runs (name -> lines) one a metric, overlaid."""
    metrics, zeros = {}, []                                # metrics: (x axis, metric) -> run -> points
    charts = {(*of, "update"): {} for of in CHARTS.values()}                  # (title, top, x axis) -> lines
    for run, lines in runs.items():
        for line in lines:
            across = f"{line['stage']} step" if "stage" in line else "update"
            x = line.pop(across.split()[-1])
            for name, y in line.items():
                if isinstance(y, (int, float)) and math.isfinite(y):
                    metrics.setdefault((across, name), {}).setdefault(run, []).append((x, y))
    for (across, name), of in metrics.items():
        words = f"{name} ({METRICS[name]})" if name in METRICS else name
        title = next((of for metrics, of in CHARTS.items() if re.match(metrics, name)), (words, None))
        if not any(y for points in of.values() for _, y in points):
            zeros.append(words)
        elif len(runs) > 1:
            charts[words, None, across] = of
        else:
            charts.setdefault((*title, across), {})[words] = of[run]
    drawn = "".join(chart(*of, lines) for of, lines in charts.items() if lines)
    words = f"<p>Zero all the time: {html.escape(', '.join(zeros))}.</p>" if zeros else ""
    return f'<div class="row">{drawn}</div>{words}'


def rates_html(results: dict[str, dict]) -> str:
    """Evaluations by name -> a table for each arm: the means with 95% intervals, as numbers and drawn."""
    tables = ""
    for arm, title in ARMS.items():
        rows = [["rate", "", "mean [95% interval]"]]
        for rate, meaning in COLUMNS.items():
            for i, (name, result) in enumerate(results.items()):
                cell = Interval(*result[arm][rate], most=3.0 if rate == "reward" else 1.0)
                rows.append(["" if i else f"{rate}: {meaning}", name, cell])
        tables += part_html(Part(title, "", rows))
    return f'<p>The grey lines run from 0 to 1 (reward: to 3).</p><div class="row">{tables}</div>'


def read_run(folder: Path) -> list[dict]:
    """The metrics of a run's folder, the reward as the mean of its parts by weight, in 0..1."""
    text, _, _ = read_text(folder / "metrics.jsonl").rpartition("\n")          # half a line may follow
    lines, settings = list(map(json.loads, text.splitlines())), read_json(folder / "config.json")["settings"]
    if not lines:
        raise UserError(f"{folder / 'metrics.jsonl'}: no line of metrics")
    for line in lines:
        if "reward" in line:
            line["reward, mean of its parts"] = line.pop("reward") / sum(settings.get("reward_weights", [1]))
    return lines


def headline(folder: Path) -> str:
    """What came out of a run, in words and numbers."""
    lines, rates, words = read_run(folder), folder / "evaluation.json", []
    if rates.exists():
        before, after = (read_json(rates)[side] for side in ("before", "after"))
        first, last = (of["greedy"]["story"][0] for of in (before, after))
        words = [f"greedy stories right: {first:.0%} → {last:.0%} on {after['prompts']} held-out prompts",
                 "kept tasks: text to image {t2i:.2f}, image to text {i2t:.2f}".format(**after["kept"]),
                 f"evaluation {before['seconds'] + after['seconds']:.0f} s"]
    words.append(f"{lines[-1].get('update', len(lines))} updates {sum(of['seconds'] for of in lines):.0f} s")
    return f'<p class="headline">{html.escape("; ".join(words))}</p>'


def settings_html(runs: dict[str, Path]) -> str:
    """How a run was made: settings, machine, versions. Of several runs only what differs."""
    files = [read_json(folder / "config.json") for folder in runs.values()]
    columns = [{**file.pop("settings"), **file} for file in files]
    rows = [[key, *(str(column.get(key, "-")) for column in columns)]
            for key in dict.fromkeys(itertools.chain(*columns))]
    rows = [row for row in rows if len(runs) == 1 or len(set(row[1:])) > 1]
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
    """The same prompts before and after, side by side; without these the last rollout."""
    files = [file for side in ("before", "after") for file in samples.glob(f"*{side}.json")]
    files = files or sorted(samples.glob("*.json"))[-1:]
    sheets = {file.stem.split("_")[-1]: read_json(file) for file in files}
    if not sheets:
        raise UserError(f"{samples}: no answers, *before.json and *after.json")
    groups = zip(*(sheet["groups"] for sheet in sheets.values()), strict=True)
    body = "".join(group_html(dict(zip(sheets, of))) for of in groups)
    return f"<p>{LEGEND} More answers to these prompts: samples/*.png.</p>{body}"


def worked_html(samples: Path) -> str:
    """The first group of the first sheet, and how its advantages came about."""
    group = read_json(min(samples.glob("*.json"), default=samples / "000000_before.json"))["groups"][0]
    parts = "".join(part_html(Part(*part)) for part in group["worked"])
    return f'{group_html({"": group}, 4)}<div class="row">{parts}</div>'


def judged_html(samples: Path) -> str:
    """What a learned text judge was asked last, and its replies."""
    body = ""
    for of in read_json(max(samples.glob("*.json"), default=samples / "999999_after.json"))["judged"]:
        body += "".join(picture_html(picture, "picture of the question") for picture in of["pictures"])
        words = f"[score: {rounded(of['score'])}]\n{of['question']}\n--> {of['reply']}"
        body += f"<pre>{html.escape(words)}</pre>"
    return fold("what the text judge was asked last, and its replies", body)


def write_report(folder: Path) -> Path:
    """Write a run directory's report.html. What the directory lacks is named on the page."""
    samples, metrics, rates = folder / "samples", folder / "metrics.jsonl", folder / "evaluation.json"
    made = section("", folder / "config.json", lambda: settings_html({folder.name: folder}))
    body = [section("", metrics, lambda: headline(folder)), fold("how this run was made", made),
            section("The same prompts before and after", samples, lambda: answers_html(samples))]
    if not (metrics.exists() and '"stage"' in read_text(metrics)):                         # no warm-up
        body += [section("Rates before and after", rates, lambda: rates_html(
                    {side: read_json(rates)[side] for side in ("before", "after")})),
                 section("One group in numbers: Eq. (4) to (6)", samples, lambda: worked_html(samples)),
                 section("", samples, lambda: judged_html(samples))]
    body.append(section("Curves", metrics, lambda: curves_html({"": read_run(folder)})))
    return write_page(folder / "report.html", f"Report: {folder}", body)


def write_comparison(runs: dict[str, Path], folder: Path) -> Path:
    """Write compare.html: rates of several runs side by side, their curves overlaid, settings that differ."""
    def having(file: str) -> dict[str, Path]:
        return {name: run for name, run in runs.items() if (run / file).exists()}
    body = [section(name, run, partial(headline, run)) for name, run in runs.items()]
    body += [section("Settings that differ", folder, lambda: settings_html(having("config.json"))),
             section("Rates after training", folder, lambda: rates_html(
                 {name: read_json(run / "evaluation.json")["after"]
                  for name, run in having("evaluation.json").items()})),
             section("Curves", folder, lambda: curves_html(
                 {name: read_run(run) for name, run in having("metrics.jsonl").items()}))]
    return write_page(folder / "compare.html", "Runs compared", body)
