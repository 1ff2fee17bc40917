"""Several processes against one: the same prompts, answers and updates, checkpoints that go on, one sentence
for what fails.

The two-process side of all comparisons is one call of torchrun on this file, see `main`. Its second process
is killed at the end.
"""
import json
import os
import shutil
import signal
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import RUN, SMALL, killed_after, metrics, run, same
from safetensors.torch import load_file, save_file

import common
import grpo
import warmup
from common import UserError, first_to_fail, run_main, start_processes, wait_for_all, write_tensors
from data import CodeCache
from model import load, load_training, prepare_training, restore, save, trainable_state

JUDGES = (lambda samples, pictures, texts: [0.3 * len(so_far[-1]) % 1 for so_far in texts],
          lambda texts, pictures: [p.mean() / 255 for p in pictures])
FOUR = {**RUN, "prompts_per_update": 4, "budget": 32}
RUNS = {                                     # name -> the settings of a GRPO run
    "full": FOUR,
    "guided": {**FOUR, "updates": 1, "guidance": 2.0, "checkpointing": True, "micro_batch": 3},
    "qlora": {**FOUR, "updates": 2, "lora_rank": 2, "quantize": "nf4"},
    "bf16": {**FOUR, "updates": 1, "precision": "bf16"},
}
STAGE_3 = {**SMALL, "warmup_steps": 4, "save_every": 2, "edits": 1}
PICTURES = [np.full((24, 24, 3), 9 * i, np.uint8) for i in range(5)]


def train(folder: Path, warm: Path, name: str, **settings) -> None:
    """A GRPO run of RUNS in `folder`/`name`, on all processes that there are."""
    rank, world, device = start_processes("cpu")
    config = grpo.Config(model=str(warm), out=str(folder / name), **{**RUNS[name.split("-")[0]], **settings})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grpo, "make_judges", lambda *_: JUDGES)
        grpo.train(config, rank, world, device)


def warm_up(folder: Path, name: str, **settings) -> None:
    """A warm-up run in `folder`/`name`, on all processes that there are."""
    settings = {**(SMALL if name == "nothing" else STAGE_3), **settings}
    warmup.warm_up(warmup.Config(out=str(folder / name), device="cpu", **settings))


def main() -> None:
    """What two processes do: all runs, one after the other, in FOLDER."""
    warm, folder = map(Path, sys.argv[1:])
    rank, *_ = start_processes("cpu")
    for name in RUNS:
        train(folder, warm, name)
    with pytest.MonkeyPatch.context() as patch:
        killed_after(3, lambda: train(folder, warm, "full-resumed"), patch)
        if rank == 0:
            shutil.copytree(folder / "full-resumed", folder / "full-less")       # one process will go on
        wait_for_all()
        train(folder, warm, "full-resumed")
        train(folder, warm, "full-more")                            # one process made its first two updates
        warm_up(folder, "nothing")
        warm_up(folder, "adapted", model=str(warm), lora_rank=2)
        warm_up(folder, "stage3", model=str(warm))
        killed_after(3, lambda: warm_up(folder, "stage3-resumed", model=str(warm)), patch)
    warm_up(folder, "stage3-resumed", model=str(warm))
    look(folder, warm, rank)
    wait_for_all()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    train(folder, warm, "full-alone")


def look(folder: Path, warm: Path, rank: int) -> None:
    """Encode pictures together, save and load shards, and write what there was to see to RANK.json."""
    model = load(warm)
    asked, encode = [], model.encode_pictures
    model.encode_pictures = lambda pictures, crop: asked.extend(pictures) or encode(pictures, crop)
    codes = CodeCache(model, folder / "codes", together=True)
    found = codes(PICTURES)
    codes.flush()
    prepare_training(model, 0, 16.0)
    shares = [p.to_local().numel() / p.numel() for p in model.policy_parameters() if len(p) % 2 == 0]
    restore(model, warm / "policy")
    save(model, folder / "again" / "policy")
    report = {"asked": [int(p[0, 0, 0]) // 9 for p in asked], "codes": torch.stack(found).tolist(),
              "shares": shares, "files": len(list((folder / "codes").rglob("*.safetensors")))}
    (folder / f"{rank}.json").write_text(json.dumps(report))


@pytest.fixture(scope="module")
def two(warm, tmp_path_factory):
    """The folder of the runs of two processes, and all that they printed."""
    folder = tmp_path_factory.mktemp("two")
    train(folder, warm, "full-more", updates=2)
    printed = run("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                  "tests/test_processes.py", warm, folder, check=1)
    return folder, printed


@pytest.fixture(scope="module")
def one(warm, tmp_path_factory):
    """The same runs of one process. From nothing, that is `warm` itself."""
    folder = tmp_path_factory.mktemp("one")
    for name in ("full", "guided", "qlora"):
        train(folder, warm, name)
    warm_up(folder, "stage3", model=str(warm))
    warm_up(folder, "adapted", model=str(warm), lora_rank=2)
    shutil.copytree(warm, folder / "nothing")
    return folder


def trained(folder: Path) -> dict:
    return trainable_state(load(folder))


def state(folder: Path) -> dict:
    """What training has changed, and the optimizer's state."""
    return {**trained(folder), **load_training(folder / "policy")[1]}


def distance(a: dict, b: dict) -> float:
    """The norm of the difference."""
    assert a.keys() == b.keys()
    return sum((a[k].double() - b[k].double()).square().sum() for k in a).sqrt().item()


# ------------------------------------------------------------------------------------------------------------
# The same run

@pytest.mark.parametrize("name, tolerance", [
    ("full", 1e-3), ("guided", 1e-3), ("qlora", 1e-3), ("stage3", 1e-3), ("adapted", 1e-3),
    ("nothing", 0.1)])
def test_two_processes_end_where_one_does(warm, one, two, tmp_path, name, tolerance):
    """As a share of the way. From nothing Muon orthogonalises in bf16: the order of sums shows more."""
    if name == "nothing":
        start = warmup.miniature(0, tmp_path)
    else:
        start = load(warm, quantize="nf4" if name == "qlora" else "none")
        prepare_training(start, 2 if name in ("qlora", "adapted") else 0, 16.0)
    moved = distance(trained(one / name), trainable_state(start))
    assert moved > 1e-3
    assert distance(trained(one / name), trained(two[0] / name)) < tolerance * moved


def test_two_processes_log_what_one_logs(one, two):
    for name in ("full", "stage3"):
        for a, b in zip(metrics(one / name), metrics(two[0] / name), strict=True):
            for key in ("loss", "reward", "reward/text", "kl/image", "loss/text", "grad_norm", "zero_spread",
                        "text_share"):
                assert a.get(key) == pytest.approx(b.get(key), rel=2e-3, abs=1e-5), key


def test_two_processes_resume_bit_equal(two):
    for name in ("full", "stage3"):
        assert same(state(two[0] / name), state(two[0] / f"{name}-resumed"))
        assert metrics(two[0] / name) == metrics(two[0] / f"{name}-resumed")


def test_a_run_goes_on_with_another_number_of_processes(warm, one, two, capsys):
    train(two[0], warm, "full-less")
    assert "written by 2 processes, 1 go on" in capsys.readouterr().out
    moved = distance(trained(one / "full"), trained(warm))
    for name in ("full-less", "full-more"):
        assert distance(state(one / "full"), state(two[0] / name)) < 1e-3 * moved
    counts = [load_training(two[0] / name / "policy")[0]["processes"] for name in ("full-less", "full-more")]
    assert counts == [1, 2]


# ------------------------------------------------------------------------------------------------------------
# Shards

def test_each_process_holds_half_and_saves_the_published_layout(warm, two):
    for rank in (0, 1):
        assert set(json.loads((two[0] / f"{rank}.json").read_text())["shares"]) == {0.5}
    assert same(load(two[0] / "again").state_dict(), load(warm).state_dict())


def test_pictures_are_encoded_once_and_all_processes_have_the_codes(warm, two):
    reports = [json.loads((two[0] / f"{rank}.json").read_text()) for rank in (0, 1)]
    assert sorted(reports[0]["asked"] + reports[1]["asked"]) == [0, 1, 2, 3, 4]
    expected = load(warm).encode_pictures(PICTURES).tolist()
    assert all(report["codes"] == expected and report["files"] == 1 for report in reports)


def test_streamed_files_are_those_of_safetensors(tmp_path):
    tensors = {"b": torch.randn(3, 2).bfloat16(), "a": torch.arange(5), "c": torch.randn(2, 4).T,
               "d": torch.tensor(7.0), "e": torch.zeros(0, 3), "f": torch.ones(3, dtype=torch.uint8)}
    write_tensors(tensors, tmp_path / "ours")
    save_file({name: value.contiguous() for name, value in tensors.items()}, tmp_path / "theirs",
              metadata={"format": "pt"})
    assert same(load_file(tmp_path / "ours"), load_file(tmp_path / "theirs"))


# ------------------------------------------------------------------------------------------------------------
# Precision

def test_bf16_passes_train_float32_weights(warm, one, two, tmp_path):
    train(tmp_path, warm, "bf16")
    start = trained(warm)
    for folder in (tmp_path, two[0]):                         # torch's autocast, FSDP's mixed precision
        values = trained(folder / "bf16")
        assert all(value.dtype == torch.float32 for value in values.values())
        assert 0 < distance(values, start) < 1
        assert all(line["logp_gap"] > 1e-4 for line in metrics(folder / "bf16")), "the passes were in bf16"
    assert all(line["logp_gap"] < 1e-4 for line in metrics(one / "full"))


def test_the_frozen_image_tokenizer_keeps_its_type(tiny, tmp_path):
    save(tiny.bfloat16(), tmp_path)
    tiny.float()
    model = load(tmp_path)
    prepare_training(model, 0, 16.0)
    assert all(p.dtype == torch.float32 for p in model.policy_parameters())
    assert all(p.dtype == torch.bfloat16 for p in model.vision.parameters())
    codes = model.encode_pictures(PICTURES)
    row = model.prompt("a red circle <image>", codes[:1])
    mask = row.is_image[:, None].expand(row.tokens.shape)
    assert model.log_probs(row.tokens[None], row.is_image[None], mask[None]).isfinite().all()
    assert model.generate([row], 1, 12) and model.decode_pictures(codes).shape[0] == len(codes)
    save(model, tmp_path / "trained")
    again = load(tmp_path / "trained")                                # what a run goes on with
    restore(model, tmp_path / "trained")
    for policy in (again, model):
        assert all(p.dtype == torch.float32 for p in policy.policy_parameters())
        assert all(p.dtype == torch.bfloat16 for p in policy.vision.parameters())
        assert policy.encode_pictures(PICTURES).equal(codes)


# ------------------------------------------------------------------------------------------------------------
# What fails

def test_a_process_that_dies_ends_all_in_one_sentence_and_the_checkpoint_is_intact(two):
    folder, printed = two
    assert printed.count("error: ") == 1 and "another process has ended" in printed
    assert "test_processes.py\", line" not in printed, "no traceback of ours"
    assert load_training(folder / "full" / "policy")[0]["update"] == RUN["updates"]


def test_only_the_first_process_that_fails_prints(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=10))
    for name, value in (("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(store.port))):
        monkeypatch.setenv(name, value)
    assert [first_to_fail() for _ in range(3)] == [True, False, False]


def test_processes_that_do_not_meet_are_one_sentence_after_a_bounded_wait(monkeypatch):
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)                    # only to find a free port
    port = store.port
    del store
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("MASTER_ADDR", "127.0.0.1"),
                        ("MASTER_PORT", str(port))):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(common, "MEETING", timedelta(seconds=2))
    with pytest.raises(UserError, match=f"2 processes cannot meet at 127.0.0.1:{port}"):
        start_processes("cpu")


def test_a_process_touches_no_gpu_but_its_own(monkeypatch):
    touched = []

    def pick(name, flag):
        touched.append(name)
        return torch.device(name)
    for name, value in (("WORLD_SIZE", "8"), ("LOCAL_RANK", "5")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(common, "pick_device", pick)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: touched.append(str(device)))
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_rank", lambda: 5)
    monkeypatch.setattr(common.signal, "signal", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    for name in ("auto", "cuda", "cuda:0"):
        assert start_processes(name) == (5, 8, torch.device("cuda:5"))
    assert set(touched) == {"cuda:5"}
    assert start_processes("cpu")[2] == torch.device("cpu")
    monkeypatch.undo()                                       # a model that the same process opens later
    monkeypatch.setattr(common, "process_count", lambda: 8)
    monkeypatch.setattr(torch, "empty", lambda n, device: torch.tensor([float(touched.append(device) or 0)]))
    assert common.pick_device("cuda:0") == torch.device("cuda") and touched[-1] == "cuda"


@pytest.mark.parametrize("settings, world, message", [
    (dict(prompts_per_update=2), 4, "--prompts-per-update 2: expected a multiple of the 4 processes"),
    (dict(reward_device="cuda:1"), 2, "--reward-device cuda:1")])
def test_settings_that_processes_cannot_share_are_refused(settings, world, message):
    with pytest.raises(UserError, match=message):
        grpo.check(grpo.Config(**settings), world)


if __name__ == "__main__":
    run_main(main)
