"""What people really have: their files, disks, terminals and checkpoints. One test for each kind of fault."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, RUN, killed_after, metrics, run
from PIL import Image
from safetensors.torch import load_file, save_file

import common
import data
import evaluate
import grpo
import model as model_file
import warmup
from common import (UserError, check_content, check_settings, claim, expand_home, hash_files, read_lines,
                    read_picture, split_paths, start_over, write_folder)
from judges import empty_llava
from model import Sampling, check_memory, load, load_training, prepare_training, save

CPU = torch.device("cpu")


def start(*arguments, **environment) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **environment})


def copy(warm: Path, folder: Path) -> Path:
    """The weights of a warm-up model as an ordinary checkpoint, without the state of its training."""
    shutil.copytree(warm / "policy", folder)
    for file in folder.glob("training.*"):
        file.unlink()
    return folder


def change(folder: Path, part: str, edit) -> None:
    file = folder / part / "model.safetensors"
    tensors = {name: value.contiguous() for name, value in edit(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def set_keys(folder: Path, **keys) -> None:
    file = folder / "llm" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


# ------------------------------------------------------------------------------------------------------------
# 1, 8: nothing of the user's is deleted

def test_only_folders_that_were_written_here_are_replaced(tmp_path):
    for taken in ("photos", "photos.new", "photos.old"):
        (tmp_path / taken).mkdir()
        (tmp_path / taken / "cat.jpg").write_text("mine")
        with pytest.raises(UserError, match="holds cat.jpg"), write_folder(tmp_path / "photos"):
            pass
        assert (tmp_path / taken / "cat.jpg").read_text() == "mine"
        shutil.rmtree(tmp_path / taken)
    (tmp_path / "photos").mkdir()                                          # an empty one may be replaced
    for text in ("first", "second"):
        with write_folder(tmp_path / "photos") as new:
            (new / "weights").write_text(text)
        (tmp_path / "photos" / "sub").mkdir(exist_ok=True)
        (tmp_path / "photos" / "sub" / "notes.txt").write_text("mine")
    assert (tmp_path / "photos" / "weights").read_text() == "second"
    with write_folder(tmp_path / "photos") as new:
        (new / "weights").write_text("third")
    assert (tmp_path / "photos" / "sub" / "notes.txt").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]


def test_merge_refuses_its_own_run_its_base_and_folders_with_more_in_them(warm, tmp_path):
    base = copy(warm, tmp_path / "base")
    policy = load(base)
    prepare_training(policy, 2, 4.0)
    save(policy, tmp_path / "lora" / "policy", {"step": 1})
    (tmp_path / "lora" / "metrics.jsonl").write_text("")

    def merge(target: Path) -> None:
        config = model_file.Config(model=str(tmp_path / "lora"), merge=str(target), device="cpu")
        model_file.write_merged(config)
    for target in (tmp_path / "lora", tmp_path / "lora" / "policy", base, tmp_path):
        before = sorted(target.rglob("*"))
        with pytest.raises(UserError, match="--merge|holds"):
            merge(target)
        assert sorted(target.rglob("*")) == before
    for _ in range(2):                                                     # its own result is replaced
        merge(tmp_path / "merged")
    (tmp_path / "merged" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="notes.txt"):
        merge(tmp_path / "merged")
    assert (tmp_path / "merged" / "notes.txt").exists()


def test_an_out_folder_that_no_run_wrote_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(UserError, match="thesis.tex"), claim(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
    with pytest.raises(UserError, match="x"), claim(tmp_path / "new"):
        raise UserError("x")
    assert not (tmp_path / "new").exists(), "a run that came to nothing leaves nothing"


def test_no_resume_deletes_the_earlier_runs_files_and_no_others(tmp_path):
    folder = tmp_path / "run"
    with write_folder(folder / "policy") as new:
        (new / "training.json").write_text("{}")
    for name in ("000004.json", "000004.png", "000000_before.json", "my.png"):
        common.write_text(folder / "samples" / name, "{}")
    for name in ("report.html", "evaluation.json", "metrics.jsonl", "diary.txt", "policy/notes.txt"):
        common.write_text(folder / name, "")
    start_over(folder)
    left = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert left == {"samples/my.png", "diary.txt", "policy/notes.txt", "policy/written.json"}
    with write_folder(folder / "policy") as new:
        (new / "training.json").write_text("{}")
    assert (folder / "policy" / "notes.txt").exists()


# ------------------------------------------------------------------------------------------------------------
# 2: identity by content

def test_a_hash_follows_the_content_and_not_the_path(tmp_path, monkeypatch):
    big = np.random.default_rng(0).bytes(5_000_000)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_bytes(big)
    first, second = (hash_files([tmp_path / name / "x"]) for name in "ab")
    assert first == second
    (tmp_path / "b" / "x").write_bytes(big[:-1] + b"?")
    assert hash_files([tmp_path / "b" / "x"]) != first
    monkeypatch.setattr(common, "HASHED", 1_000_000)                       # every fifth block of a large file
    assert hash_files([tmp_path / "a" / "x"]) != hash_files([tmp_path / "a" / "x"], ["text"])


def test_a_run_refuses_other_weights_and_prompts_but_not_other_spellings(warm, tmp_path, monkeypatch):
    base, small = copy(warm, tmp_path / "base"), {**RUN, "updates": 1, "save_every": 1}
    run("shapes.py", "--dump", tmp_path / "data", "--count", 2, "--edits", 2)
    prompts = tmp_path / "data" / "prompts.jsonl"
    settings = {**small, "out": str(tmp_path / "run"), "prompts": str(prompts)}

    def train(model: str, updates: int, **other) -> None:
        grpo.train(grpo.Config(model=model, **{**settings, "updates": updates, **other}), 0, 1, CPU)
    train(str(base), 1)
    (tmp_path / "link").symlink_to(base)
    monkeypatch.chdir(tmp_path)
    train("./link", 2, prompts="data/../data/prompts.jsonl")
    assert load_training(tmp_path / "run" / "policy")[0]["update"] == 2
    text = prompts.read_text()
    prompts.write_text(text.replace('"prompt": "', '"prompt": " ', 1))
    with pytest.raises(UserError, match="content of --prompts"):
        train(str(base), 3)
    prompts.write_text(text)
    first = tmp_path / "data" / json.loads(text.splitlines()[0])["images"][0]
    picture = first.read_bytes()
    Image.new("RGB", (24, 24), "red").save(first)
    with pytest.raises(UserError, match="content of --prompts"):
        train(str(base), 3)
    first.write_bytes(picture)
    change(base, "llm", lambda t: {k: v + 1 if "norm" in k else v for k, v in t.items()})
    with pytest.raises(UserError, match=r"content of --model .* --out .*run-2"):
        train(str(base), 3)


def test_adapters_know_their_base_wherever_it_lies(warm, tmp_path):
    base = copy(warm, tmp_path / "base")
    policy = load(base)
    prepare_training(policy, 2, 4.0)
    save(policy, tmp_path / "lora")
    other = copy(warm, tmp_path / "other")
    change(other, "llm", lambda t: {k: 2 * v if "down_proj" in k else v for k, v in t.items()})
    base.rename(tmp_path / "moved")
    for opened in (load, lambda folder: check_memory(str(folder), 10, 0, CPU),
                   lambda folder: grpo.check_source(grpo.Config(model=str(folder)))):
        with pytest.raises(UserError, match="lora: the base of these adapters .* --base FOLDER"):
            opened(tmp_path / "lora")
    assert load(tmp_path / "lora", base=str(tmp_path / "moved")).adapter
    with pytest.raises(UserError, match="other weights"):
        load(tmp_path / "lora", base=str(other))
    other.rename(base)
    with pytest.raises(UserError, match="other weights"):
        load(tmp_path / "lora")


def test_flags_that_adapters_have_settled_are_refused(warm, tmp_path):
    policy = load(copy(warm, tmp_path / "base"))
    prepare_training(policy, 2, 4.0)
    save(policy, tmp_path / "lora")
    for opened in (lambda: load(tmp_path / "lora", quantize="nf4"),
                   lambda: check_memory(str(tmp_path / "lora"), 10, 0, CPU, "nf4")):
        with pytest.raises(UserError, match="--quantize nf4: the base of the adapters in .*lora"):
            opened()
    with pytest.raises(UserError, match="--precision bf16: with adapters"):
        prepare_training(load(tmp_path / "lora"), 0, 16.0, precision="bf16")
    (tmp_path / "lora" / "base.json").unlink()                       # PEFT's own do not say
    assert load(tmp_path / "lora", quantize="nf4").quantize == "nf4"


def test_no_resume_never_deletes_the_model_that_a_run_starts_from(warm, tmp_path):
    shutil.copytree(warm, tmp_path / "mine")
    policy = load(tmp_path / "mine")
    prepare_training(policy, 2, 4.0)
    save(policy, tmp_path / "lora")
    before = (tmp_path / "mine" / "policy" / "llm" / "model.safetensors").read_bytes()
    for model in ("mine", "mine/policy", "lora"):
        config = grpo.Config(model=str(tmp_path / model), out=str(tmp_path / "mine"), resume=False, **RUN)
        with pytest.raises(UserError, match="--no-resume .*mine: this would delete the model"):
            grpo.train(config, 0, 1, CPU)
    assert (tmp_path / "mine" / "policy" / "llm" / "model.safetensors").read_bytes() == before


def test_a_question_that_changed_under_its_id_is_refused(warm, tmp_path):
    (tmp_path / "questions.jsonl").write_text('{"id": 7, "question": "what?", "answer": "a fox"}\n')
    config = evaluate.Config(model=str(warm), benchmark="understanding", data=str(tmp_path), budget=5,
                             device="cpu")
    evaluate.run_benchmark(config, tmp_path / "out")
    (tmp_path / "questions.jsonl").write_text('{"id": 7, "question": "who?", "answer": "a fox"}\n')
    with pytest.raises(UserError, match="question 7 .*out-2"):
        evaluate.run_benchmark(config, tmp_path / "out")


def test_other_settings_name_a_free_folder(tmp_path):
    (tmp_path / "run-2").mkdir()
    with pytest.raises(UserError, match="--lr 0.1, not 0.2: .*run-3"):
        check_settings(tmp_path / "run", {"lr": 0.1}, {"lr": 0.2})
    check_content(tmp_path, {}, {"model": "a"})


# ------------------------------------------------------------------------------------------------------------
# 3, 4: checkpoints

@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_mixed_stored_types_become_the_decoders(warm, tmp_path, quantize):
    folder = copy(warm, tmp_path / "mixed")
    change(folder, "llm", lambda t: {k: v.half() if ".layers.1." in k else v.bfloat16()
                                     for k, v in t.items()})
    policy = load(folder, quantize=quantize)
    kinds = {p.dtype for p in policy.parameters() if p.requires_grad and p.is_floating_point()}
    assert kinds == {torch.bfloat16}
    assert {p.dtype for p in policy.vision.parameters()} == {torch.float32}, "as it is stored"
    prepare_training(policy, 2, 4.0)
    rows = policy.generate([policy.prompt("a red circle at top left", draw=True)], 1, 20)
    assert rows[0].is_image.any()


def test_padded_tables_give_new_tokens_their_own_rows_and_sample_no_padding(warm, tmp_path):
    folder = copy(warm, tmp_path / "padded")
    file = folder / "llm" / "added_tokens.json"
    added = json.loads(file.read_text())
    tokens = len(json.loads(file.read_text())) and max(added.values()) - 1             # without the last two
    file.write_text(json.dumps({k: v for k, v in added.items() if "think" not in k}))
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    change(folder, "llm", lambda t: {**t, **{name: torch.cat((t[name][:tokens], torch.ones(40, 128)))
                                             for name in tables}})
    set_keys(folder, vocab_size=tokens + 40)
    policy = load(folder)
    mean = policy.decoder.embed.weight[:tokens].mean(0)
    for name in ("<think>", "</think>"):
        assert tokens <= policy.text.id(name) < tokens + 2
        assert torch.allclose(policy.decoder.embed.weight[policy.text.id(name)], mean, atol=1e-6)
    assert len(policy.decoder.embed.weight) == tokens + 40
    logits = policy.text_logits(torch.randn(3, 128))
    assert logits[:, tokens + 2:].eq(-torch.inf).all() and logits[:, :tokens + 2].isfinite().all()
    save(policy, tmp_path / "again")
    assert torch.equal(load(tmp_path / "again").unnamed, policy.unnamed)


def test_a_token_without_a_row_is_named(warm, tmp_path):
    folder = copy(warm, tmp_path / "short")
    file = folder / "llm" / "added_tokens.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "<extra>": 4000}))
    with pytest.raises(UserError, match="<extra>"):
        load(folder)


def test_tied_embeddings_and_old_buffers(warm, tmp_path):
    folder = copy(warm, tmp_path / "tied")
    buffer = {"model.layers.2.self_attn.rotary_emb.inv_freq": torch.ones(16)}
    change(folder, "llm", lambda t: {k: v for k, v in t.items() if "lm_head" not in k} | buffer)
    with pytest.raises(UserError, match="lm_head.weight is missing"):
        load(folder)
    set_keys(folder, tie_word_embeddings=True)
    policy = load(folder)
    assert torch.equal(policy.decoder.lm_head.weight, policy.decoder.embed.weight)
    assert policy.decoder.lm_head.weight is not policy.decoder.embed.weight
    with torch.no_grad():
        policy.decoder.lm_head.weight.mul_(2)
    save(policy, tmp_path / "again")
    assert torch.equal(load(tmp_path / "again").decoder.lm_head.weight, policy.decoder.lm_head.weight)


def test_rotary_scaling_that_is_not_implemented_is_named_in_policy_and_critic(warm, tmp_path):
    folder = copy(warm, tmp_path / "yarn")
    set_keys(folder, rope_scaling={"type": "yarn", "factor": 4.0})
    with pytest.raises(UserError, match="'yarn'"):
        load(folder)
    config = json.loads((folder / "llm" / "config.json").read_text())
    with pytest.raises(UserError, match="'yarn'"):
        empty_llava(config, {}, folder)


@pytest.mark.parametrize("name", ["llm/config.json", "llm/tokenizer.model",
                                  "llm/added_tokens.json", "vision_tower/model.safetensors"])
def test_a_folder_a_dead_link_or_another_file_in_a_files_place_is_one_sentence(warm, tmp_path, name):
    for n, spoil in enumerate((Path.mkdir, lambda file: file.symlink_to("/no/where"),
                               lambda file: shutil.copy(warm / "policy" / "training.json", file))):
        folder = copy(warm, tmp_path / str(n))
        (folder / name).unlink()
        spoil(folder / name)
        with pytest.raises(UserError) as error:
            load(folder)
        assert len(str(error.value).splitlines()) == 1


def test_sampling_that_meets_no_number_is_one_sentence(tiny):
    with torch.no_grad(), pytest.raises(UserError, match="not finite"):
        tiny.generate([tiny.prompt("a")], 2, 5, Sampling(temperature=1e-42))


# ------------------------------------------------------------------------------------------------------------
# 5, 6, 11, 12: terminals, Ctrl-C, words

def test_a_closed_pipe_and_an_ascii_terminal_lose_nothing(warm, tmp_path):
    command = [sys.executable, "model.py", "--model", warm, "--prompt", "é → ü", "--budget", "4", "--out"]
    line = " ".join(f"'{part}'" for part in command)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
    done = subprocess.run(f"({line} '{tmp_path}/closed' 2>&1; echo $? > '{tmp_path}/code') | true",
                          shell=True, cwd=ROOT, env=environment)
    assert done.returncode == 0 and (tmp_path / "code").read_text() == "0\n"
    assert (tmp_path / "closed" / "answer.html").exists()
    assert "é" in (tmp_path / "closed" / "answer.html").read_text(encoding="utf-8")


STOP = """import os, runpy, signal, sys, threading, time
def stop():
    while "numpy" not in sys.modules:
        time.sleep(0.001)
    os.kill(os.getpid(), signal.SIGINT)
threading.Thread(target=stop, daemon=True).start()
sys.path.insert(0, os.getcwd())
runpy.run_path(sys.argv.pop(1), run_name="__main__")
"""


@pytest.mark.parametrize("script", ["grpo.py", "shapes.py"])
def test_ctrl_c_during_imports_leaves_no_traceback(script):
    process = start("-c", STOP, script, "--help")
    _, errors = process.communicate()
    assert (process.returncode, errors) == (-signal.SIGINT, "")


def test_ctrl_c_names_what_the_run_goes_on_from(tmp_path):
    for name, words in (("", ()), ("policy/training.json", ("the same command goes on from the last "
                                                            "checkpoint",))):
        with pytest.raises(KeyboardInterrupt) as stop, claim(tmp_path / "run") as folder:
            if name:
                common.write_text(folder / name, "{}")
            raise KeyboardInterrupt
        assert stop.value.args == words


def test_without_resource_scripts_run(tmp_path):
    code = "import sys; sys.modules['resource'] = sys.modules['fcntl'] = None; import common, torch; " \
           "print(common.peak_gib(torch.device('cpu')));\nwith common.claim(sys.argv[1]): print('in')"
    peak, inside = run("-c", code, tmp_path / "run").split()
    assert float(peak) >= 0 and inside == "in"


def test_missing_things_say_so_and_how_to_make_them():
    out = run("tokenizer.py", "--model", "no/model/here", check=2, HF_HUB_OFFLINE="1")
    assert "Traceback" not in out and "python warmup.py" in out
    with pytest.raises(UserError, match="python warmup.py"):
        load("no/model/here")
    with pytest.raises(UserError, match="none.png: no such file"):
        read_picture(Path("none.png"), "--image")


def test_a_second_answer_leaves_no_picture_of_the_first(warm, tmp_path):
    for name in ("step_0.png", "step_7.png", "holiday.png", "run.lock"):
        (tmp_path / name).write_bytes(b"")
    config = model_file.Config(model=str(warm), draw=True, prompt="a", budget=12, device="cpu")
    model_file.answer_prompt(config, tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} == {"step_0.png", "holiday.png"}
    assert (tmp_path / "step_0.png").stat().st_size


# ------------------------------------------------------------------------------------------------------------
# 7: pictures

def shown(image: Image.Image, file: Path, **options) -> np.ndarray:
    image.save(file, **options)
    return read_picture(file, "a picture")


def test_pictures_are_read_as_a_viewer_shows_them(tmp_path):
    half = np.zeros((4, 6, 3), np.uint8)
    half[:, 3:] = 255                                                      # black | white
    exif = Image.Exif()
    exif[0x0112] = 3                                                       # upside down
    turned = shown(Image.fromarray(half), tmp_path / "a.png", exif=exif)
    assert turned[0, 0, 0] == 255 and turned[0, 5, 0] == 0
    ramp = np.linspace(0, 65535, 100).astype(np.uint16).reshape(10, 10)
    assert len(np.unique(shown(Image.fromarray(ramp), tmp_path / "b.png"))) == 100
    floats = Image.fromarray(np.linspace(-3, 40, 100, dtype=np.float32).reshape(10, 10))
    levels = shown(floats, tmp_path / "c.tiff")[..., 0].flatten().tolist()
    assert levels == sorted(levels) and len(set(levels)) > 15 and levels[0] == 0
    unit = Image.fromarray(np.linspace(0, 1, 100, dtype=np.float32).reshape(10, 10))
    assert shown(unit, tmp_path / "d.tiff")[-1, -1].tolist() == [255, 255, 255]
    clear = Image.new("LA", (3, 3), (0, 0))
    assert (shown(clear, tmp_path / "e.png") == 255).all()
    palette = Image.new("P", (3, 3), 1)
    palette.putpalette([0, 0, 0, 200, 10, 10])
    assert shown(palette, tmp_path / "f.png")[0, 0].tolist() == [200, 10, 10]
    assert (shown(palette, tmp_path / "g.png", transparency=1) == 255).all()
    ink = Image.new("CMYK", (3, 3), (0, 255, 255, 0))
    assert shown(ink, tmp_path / "h.tiff")[0, 0].tolist() == [255, 0, 0]
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("blue", "red")]
    film = shown(frames[0], tmp_path / "i.gif", save_all=True, append_images=frames[1:])
    assert film[0, 0].tolist() == [0, 0, 255]


def test_any_error_of_a_decoder_is_counted_and_left_out(tiny, tmp_path, monkeypatch):
    Image.new("RGB", (3, 3)).save(tmp_path / "x.png")

    def broken(*_, **__):
        raise RuntimeError("decoder says no")
    monkeypatch.setattr(common.Image, "open", broken)
    left_out, sample = data.LeftOut(), data.Sample("<image>", [tmp_path / "x.png"], origin=("file", 1, ""))
    assert list(data.keep_usable([sample], tiny, data.CodeCache(tiny), left_out)) == []
    assert left_out.total() == 1


# ------------------------------------------------------------------------------------------------------------
# 8, 9: logs and locks

def test_broken_lines_of_a_log_are_dropped_with_one_warning(tmp_path, capsys):
    file = tmp_path / "log.jsonl"
    file.write_bytes(b'{"a": 1}\n\x00\x00\x00\n{"b": 2}\n[1]\n{"a": 3}\n{"a": 4')
    assert read_lines(file, lambda line: line["a"]) == [{"a": 1}, {"a": 3}]
    assert capsys.readouterr().err.count("warning") == 1
    assert read_lines(file) == [{"a": 1}, {"a": 3}] and "warning" not in capsys.readouterr().err


def test_a_run_whose_log_was_cut_goes_on(warm, tmp_path, monkeypatch):
    config = grpo.Config(model=str(warm), out=str(tmp_path / "run"), **RUN)
    killed_after(3, lambda: grpo.train(config, 0, 1, CPU), monkeypatch)
    os.truncate(tmp_path / "run" / "metrics.jsonl", 30)
    grpo.train(config, 0, 1, CPU)
    assert [line["update"] for line in metrics(tmp_path / "run")] == [3, 4]


def test_a_second_run_is_refused_and_a_dead_ones_lock_is_taken_over(tmp_path):
    code = ("import sys, time, common\nwith common.claim(sys.argv[1]):\n    print('in', flush=True)\n"
            "    time.sleep(60)")
    first = start("-c", code, tmp_path / "run")
    assert first.stdout.readline() == "in\n"
    with pytest.raises(UserError, match=f"another run .*process {first.pid} on "), claim(tmp_path / "run"):
        pass
    first.kill()
    first.wait()
    with claim(tmp_path / "run"):
        pass
    with claim(tmp_path / "run") as folder:
        (folder / "metrics.jsonl").write_text("")
    lock = tmp_path / "run" / common.LOCK
    lock.write_text("process 1 on another-machine")                        # a disk that knows no locks
    with pytest.raises(UserError, match="process 1 on another-machine"), claim(tmp_path / "run"):
        pass
    os.utime(lock, (0, time.time() - 2 * common.DEAD))
    with claim(tmp_path / "run"):
        pass


# ------------------------------------------------------------------------------------------------------------
# 10: flags

def test_paths_with_home_commas_and_spaces(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert expand_home("~/a b,c") == "/home/me/a b,c"
    assert expand_home("jsonl=~/x,emova=~/y") == "jsonl=/home/me/x,emova=/home/me/y"
    assert expand_home("file:~/r.json") == "file:/home/me/r.json"
    assert expand_home("a ~ b~/c") == "a ~ b~/c"
    for name in ("a,b é.png", "c.png"):
        (tmp_path / name).write_text("")
    paths = [str(tmp_path / "a,b é.png"), str(tmp_path / "c.png"), "none"]
    assert split_paths(",".join(paths)) == paths and split_paths("") == []
    folder = tmp_path / "x,y z"
    folder.mkdir()
    assert data.parse_sources(f"jsonl={folder},emova={folder}", "--data") == [("jsonl", folder),
                                                                              ("emova", folder)]


@pytest.mark.parametrize("script, flag, value", [
    ("grpo.py", "edits", 0), ("grpo.py", "temperature", "nan"), ("grpo.py", "clip", -0.5),
    ("grpo.py", "kl", -1), ("grpo.py", "lr", 1e9), ("grpo.py", "eval_prompts", -1), ("grpo.py", "ramp", -1),
    ("grpo.py", "updates", 10 ** 30), ("grpo.py", "seed", -1), ("evaluate.py", "seeds", "a"),
    ("evaluate.py", "seed", -7), ("warmup.py", "lr", "inf"), ("model.py", "guidance", "nan")])
def test_every_number_has_its_range(script, flag, value, monkeypatch):
    module = {"grpo.py": grpo, "evaluate.py": evaluate, "model.py": model_file, "warmup.py": warmup}[script]
    monkeypatch.setattr(sys, "argv", [script, f"--{flag.replace('_', '-')}={value}"])
    with pytest.raises(UserError, match=f"--{flag.replace('_', '-')} .*expected"):
        module.main()


def test_without_a_ramp_the_first_update_has_the_full_rate(warm, tmp_path, monkeypatch):
    rates, update = [], grpo.update

    def record(policy, optimizer, *others):
        rates.append(optimizer.param_groups[0]["lr"])
        return update(policy, optimizer, *others)
    monkeypatch.setattr(grpo, "update", record)
    for ramp in (0, 4):
        config = grpo.Config(model=str(warm), out=str(tmp_path / str(ramp)), lr=0.1, ramp=ramp,
                             **{**RUN, "updates": 1})
        grpo.train(config, 0, 1, CPU)
    assert rates == pytest.approx([0.1, 0.025])


def test_an_unknown_key_in_a_prompt_file_is_named(tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "imgaes": []}\n')
    with pytest.raises(UserError, match="line 1: unknown key 'imgaes'"):
        data.read_prompts(tmp_path / "p.jsonl")


def test_stories_that_are_too_long_are_refused_before_training(warm, tmp_path):
    config = warmup.Config(model=str(warm), edits=15, out=str(tmp_path / "w"), device="cpu")
    with pytest.raises(UserError, match="--edits 15"):
        warmup.warm_up(config)
    assert not (tmp_path / "w").exists()


def test_every_script_imports_the_shared_file_first():
    for file in ROOT.glob("*.py"):
        text = file.read_text(encoding="utf-8")
        if file.name not in ("common.py", "shapes.py"):
            imports = [line for line in text.splitlines() if line.startswith(("import ", "from "))]
            assert imports[0].startswith("from common import"), file.name
