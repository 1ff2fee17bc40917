"""What every script shares: its flags, its errors, its files, its run directory, a page to look at.

    flags       a dataclass is the command line: `parse_config`; annotations give ranges and choices
    errors      `UserError`: one sentence and exit code 2, never a traceback for a user's mistake
    files       read with one-sentence errors, written whole or not at all
    runs        `Run`: config.json (how it was made), metrics.jsonl, samples/; training state that resumes
    pages       `draw_sheet` (PNG) and `write_report` (one HTML file that opens offline)

Nothing here is from the paper, and nothing here knows a model or a task. Read it last.
"""
import argparse
import base64
import difflib
import errno
import hashlib
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
from dataclasses import Field, asdict, fields
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Annotated, Iterable, Literal, NamedTuple, get_args, get_origin

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


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
        return above and value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        low = f"more than {self.low:g}" if self.open else f"at least {self.low:g}"
        limits = low if self.high == math.inf else f"{low} and at most {self.high:g}"
        return limits + ", or two of them as TEXT,IMAGE" * self.pair


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Positive = Annotated[float, Range(0, open=True)]
NonNegative = Annotated[float, Range(0)]
Share = Annotated[float, Range(0, 1)]
LearningRate = Annotated[float, Range(0, 1, open=True)]
Weights = tuple[float, float, float]
Naturals = Annotated[int, Range(0, pair=True)]
Positives = Annotated[float, Range(0, open=True, pair=True)]
NonNegatives = Annotated[float, Range(0, pair=True)]
TopPs = Annotated[float, Range(0, 1, open=True, pair=True)]


def parse_weights(text: str) -> Weights:
    """'1,1,0.5' -> (1.0, 1.0, 0.5). Raises ValueError for anything but three numbers."""
    first, second, third = map(float, text.split(","))
    return first, second, third


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
        options = {"type": f.type, "metavar": "TEXT"}
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
        elif f.type in (int, float):
            options["metavar"] = "N" if f.type is int else "X"
        if f.name in names:
            text += f"; {', '.join(names[f.name])}"
        if f.default not in ("", None):
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


def run_main(main) -> None:
    """Run a script: a user's mistake ends in one sentence and exit code 2, Ctrl-C in 130."""
    try:
        main()
    except UserError as error:
        leave(f"error: {error}", 2)
    except torch.OutOfMemoryError as error:
        leave(f"error: out of memory ({str(error).split('. ')[0]}): lower --rows, --micro-batch, --batch or "
              f"--budget; what was saved before is intact", 2)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS, errno.ENOTDIR,
                               errno.EEXIST):
            raise
        file = error.filename or "a file"
        leave(f"error: cannot write {file}: {error.strerror}; what was saved before is intact", 2)
    except KeyboardInterrupt:
        leave("interrupted: the same command goes on from the last checkpoint, if there is one", 130)
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        leave(f"error: another process has ended or cannot be reached ({str(error).splitlines()[0][:120]}); "
              f"the same command goes on from the last checkpoint, if there is one", 1)


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
        torch.empty(1, device=name)
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"{flag} {name}: not usable here ({str(error).splitlines()[0]})") from None


# The longest that a process waits for another, which may still be asking a judge or sampling an evaluation.
# torchrun ends all processes as soon as one of them fails, whatever this is.
PATIENCE = timedelta(hours=6)


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
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
        except (RuntimeError, ValueError) as error:
            where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            raise UserError(f"the {world} processes cannot meet at {where}: is the port in use? "
                            f"({str(error).splitlines()[0]})") from None
        if dist.get_rank() > 0:
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


def end_processes() -> None:
    """Leave torch's process group; rank 0 goes on alone."""
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


def averaged(metrics: dict, device: torch.device) -> dict:
    """Metrics of one process -> those over all processes: means, but the maxima of *_max and peak_gib."""
    if not dist.is_initialized():
        return metrics
    values = torch.tensor(list(metrics.values()), dtype=torch.float32, device=device)
    everyone = [torch.zeros_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, values)
    merged = torch.stack(everyone)                                                         # (world, metrics)
    return {name: (merged[:, i].max() if name.endswith(("_max", "peak_gib")) else merged[:, i].mean()).item()
            for i, name in enumerate(metrics)}


def average_gradients(optimizer: torch.optim.Optimizer) -> None:
    """Replace the gradients of an optimizer's parameters by their means over all processes.

    A parameter without a gradient here may have one elsewhere: perhaps no picture was sampled here.
    Its gradient here counts as 0. Gradients of sharded parameters are averaged already.
    """
    if not dist.is_initialized():
        return
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not isinstance(p, DTensor):
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                dist.all_reduce(p.grad)
                p.grad /= dist.get_world_size()


def whole(value: Tensor) -> Tensor:
    """Gather a sharded tensor; all processes call this together. Any other tensor is returned as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def sharded_like(value: Tensor, p: Tensor) -> Tensor:
    """A whole tensor -> this process's shard of it where `p`, of the same shape, is sharded."""
    if not isinstance(p, DTensor) or value.shape != p.shape:
        return value
    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements, src_data_rank=None)


def peak_gib(device: torch.device) -> float:
    """The most memory in use so far, in GiB: allocated on the GPU, or resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2 ** 30
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
        raise UserError(f"{path}: missing") from None
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
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"{path}: {what} lacks {error}") from None


def read_lines(path: Path) -> list[dict]:
    """The JSON lines of a log of our own. Half a line, left by a kill, is cut off the file."""
    data = path.read_bytes() if path.exists() else b""
    whole = data[:data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.splitlines()]


def add_line(path: Path, line: dict) -> None:
    """Append one JSON line."""
    with open(path, "a", encoding="utf-8") as lines:
        lines.write(json.dumps(line) + "\n")


@contextmanager
def write_whole(path: Path):
    """Write a file or a folder whole or not at all.

    Yields a free path beside it, which takes its place at the end. The block writes a file there or makes a
    folder. A kill at any moment leaves the old one or the new one. A folder may be left under the name
    NAME.old (see `settle_folder`).
    """
    path = Path(path)
    new, old = path.with_name(path.name + ".new"), path.with_name(path.name + ".old")
    settle_folder(path)
    remove(new)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield new
    except BaseException:
        remove(new)
        raise
    if path.is_dir():
        path.rename(old)
        new.rename(path)
        remove(old)
    else:
        new.replace(path)


def remove(path: Path) -> None:
    """Delete a file or folder that may not exist."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def settle_folder(folder: Path) -> None:
    """Undo a replacement that was killed between its two renames."""
    old = Path(folder).with_name(Path(folder).name + ".old")
    if old.exists() and not Path(folder).exists():
        old.rename(folder)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all."""
    with write_whole(path) as new:
        new.write_text(text, encoding="utf-8")


def open_tensors(path: Path):
    """A safetensors file, opened. Raises UserError where it is missing or damaged."""
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"{path}: missing") from None
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
    """A picture file -> uint8 [H, W, 3]. Raises UserError where it cannot be read."""
    try:
        return np.asarray(Image.open(path).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{where}: {path} is not a picture that can be read ({error})") from None


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
                            f"choose another --out, or delete the folder")


class Run:
    """A run directory: config.json (settings, versions), metrics.jsonl, policy/, samples/."""

    def __init__(self, config, lines: int = 0):
        """Make the folder, write config.json and open metrics.jsonl. Of several processes only rank 0 writes.

        config: a settings dataclass with a field `out`.
        lines: how many lines of an earlier metrics.jsonl the checkpoint had seen; the rest is dropped.
        """
        self.folder, self.lines, self.writes = Path(config.out), lines, process_rank() == 0
        if not self.writes:
            return
        (self.folder / "samples").mkdir(parents=True, exist_ok=True)
        write_text(self.folder / "config.json", json.dumps(
            {"settings": asdict(config), "command": " ".join(sys.argv), "python": platform.python_version(),
             "torch": torch.__version__, "threads": torch.get_num_threads(), "processes": process_count()},
            indent=1))
        self.metrics = self.folder / "metrics.jsonl"
        earlier = read_metrics(self.metrics)[:lines]
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

        groups: `rewards.group_record` of each prompt.
        judged: questions to a learned judge and its replies.
        """
        if not self.writes:
            return
        file = self.folder / "samples" / f"{name}.json"
        write_text(file, json.dumps({"title": title, "groups": groups, "judged": list(judged)}))
        draw_sheet(groups, file.with_suffix(".png"))


def read_metrics(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, none where there is no such file."""
    return read_lines(path)


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
    for file in sorted((folder / "samples").glob("*.json"), key=lambda f: (f.stat().st_mtime_ns, f.name)):
        body += sheet_html(read_json(file))
    return write_page(folder / "report.html", folder.name, body)
