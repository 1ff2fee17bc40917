"""The scripts as a user runs them: end to end, killed and resumed, on two processes, and with bad input."""
import json
import math
import re
from pathlib import Path

import pytest
import torch
from conftest import FIXTURES, RUN, flags, killed_after, metrics, run, same, talkative

import data
import grpo
import shapes
from common import UserError
from model import as_batch, load, load_training, save


def weights(folder: Path) -> dict:
    return {**load(folder).state_dict(), **load_training(folder / "policy")[1]}


@pytest.mark.parametrize("settings", [dict(), dict(epochs_per_rollout=2, credit="outcome", guidance=2.0)])
def test_a_killed_grpo_goes_on_bit_equal(warm, tmp_path, monkeypatch, settings):
    torch.set_num_threads(1)
    whole, cut = (grpo.Config(model=str(warm), out=str(tmp_path / name), **RUN, **settings)
                  for name in ("whole", "cut"))
    cpu = torch.device("cpu")
    grpo.train(whole, 0, 1, cpu)
    killed_after(3 // settings.get("epochs_per_rollout", 1), lambda: grpo.train(cut, 0, 1, cpu), monkeypatch)
    grpo.train(cut, 0, 1, cpu)
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "cut")
    assert not same(weights(tmp_path / "whole"), weights(warm))


def test_a_run_killed_after_its_last_checkpoint_still_gets_its_last_sheet(warm, tmp_path, monkeypatch):
    config = grpo.Config(model=str(warm), out=str(tmp_path), **{**RUN, "updates": 1, "eval_prompts": 1})
    shown, show = [], grpo.show

    def dying(*arguments):
        shown.append(arguments[5])
        if len(shown) == 2:
            raise KeyboardInterrupt
        show(*arguments)
    monkeypatch.setattr(grpo, "show", dying)
    with pytest.raises(KeyboardInterrupt):
        grpo.train(config, 0, 1, torch.device("cpu"))
    assert load_training(tmp_path / "policy")[0]["update"] == 1
    for _ in range(2):                                                 # the second has nothing left to do
        grpo.train(config, 0, 1, torch.device("cpu"))
    assert shown == ["000000_before", "999999_after", "999999_after"]
    assert (tmp_path / "samples" / "999999_after.png").exists()


def test_a_rollout_starts_without_gradients_and_logs_its_first_ratio(warm, tmp_path, monkeypatch):
    config = grpo.Config(model=str(warm), out=str(tmp_path), lr=0.01, **{**RUN, "epochs_per_rollout": 2})
    rollout, left = grpo.rollout, []

    def watched(policy, *rest):
        left.append([p.grad for p in policy.policy_parameters() if p.grad is not None])
        batch = rollout(policy, *rest)
        batch.advantages = torch.randn_like(batch.advantages)              # the answers may all earn 0
        return batch
    monkeypatch.setattr(grpo, "rollout", watched)
    grpo.train(config, 0, 1, torch.device("cpu"))
    assert left == [[], []]
    lines = metrics(tmp_path)
    assert [line["ratio_max"] for line in lines] == pytest.approx([1, 1], abs=1e-3)
    assert max(line["clip_frac/text"] + line["clip_frac/image"] for line in lines) > 0, "of the second update"


SEEDS = [(0, p) for p in range(4)]


def one_rollout(warm, settings: dict):
    settings = {**RUN, "prompts_per_update": 4, "group_size": 4, "kl": 0.1, **settings}
    config = grpo.Config(model=str(warm), **settings)
    policy, reference = load(warm), load(warm)
    judges = (lambda prompts, pictures, texts: [0.3 * len(so_far[-1]) % 1 for so_far in texts],
              lambda texts, pictures: [p.mean() / 255 for p in pictures])
    prompts = grpo.next_prompts(config, 0, [])
    batch = grpo.rollout(policy, prompts, config, judges, data.CodeCache(policy), SEEDS)
    with torch.no_grad():
        ref_logp = reference.log_probs(batch.tokens, batch.is_image, batch.mask, grpo.sampling_of(config))
    return config, policy, batch, ref_logp


def test_micro_batch_size_does_not_change_the_gradient(warm):
    from dataclasses import replace
    config, policy, batch, ref_logp = one_rollout(warm, {})
    batch.advantages = torch.randn_like(batch.advantages) * (batch.mask.any(-1, keepdim=True))
    gradients = []
    for size in (1, 3, 16):
        optimizer = torch.optim.SGD(policy.policy_parameters(), lr=0.0)
        grpo.update(policy, optimizer, batch, ref_logp, replace(config, micro_batch=size))
        parts = [p.grad.flatten() for p in policy.policy_parameters() if p.grad is not None]
        gradients.append(torch.cat(parts))
    assert gradients[0].norm() > 0
    for other in gradients[1:]:
        assert torch.allclose(gradients[0], other, atol=1e-5 * gradients[0].abs().max())


def test_the_first_updates_ratio_is_one_and_later_ones_move(warm):
    config, policy, batch, ref_logp = one_rollout(warm, {"epochs_per_rollout": 2, "updates": 2})
    batch.advantages = torch.randn_like(batch.advantages)
    optimizer = torch.optim.Adam(policy.policy_parameters(), lr=3e-3)
    first = grpo.update(policy, optimizer, batch, ref_logp, config)
    second = grpo.update(policy, optimizer, batch, ref_logp, config)
    assert first["ratio_max"] == pytest.approx(1, abs=1e-4) and first["kl/text"] == pytest.approx(0, abs=1e-6)
    assert second["ratio_max"] > 1.01 and second["kl/text"] > 0 and second["kl/image"] > 0
    assert second["clip_frac/text"] > 0 or second["clip_frac/image"] > 0


def test_image_codes_alone_can_be_taught_redness(warm):
    """The reward is the redness of one picture, and text takes no part.

    If it does not rise, the image branch is broken.
    """
    policy = load(warm)
    optimizer = torch.optim.Adam(policy.policy_parameters(), lr=3e-4)
    prompt, redness = policy.prompt("a red circle at top", draw=True), []
    for step in range(60):
        rows = policy.generate([prompt], 32, policy.vision_config.positions + 1, seeds=[(step,)])
        pictures = policy.decode_pictures(torch.stack([r.tokens[r.is_image] for r in rows])).astype(float)
        reward = torch.tensor((pictures[..., 0] - pictures[..., 1:].mean(-1)).mean((1, 2)) / 255,
                              dtype=torch.float32)
        redness.append(reward)
        tokens, is_image, mask, old_logp = as_batch(rows, policy.device)
        mask = mask & is_image[..., None]
        logp = policy.log_probs(tokens, is_image, mask)
        values = grpo.outcome_advantages(1000 * reward)[:, None, None].expand_as(logp)
        per_decision = grpo.decision_weights(mask, is_image)
        loss, *_ = grpo.grpo_loss(logp, old_logp, logp.detach(), values, per_decision, 0.2, 0.0)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    first, last = torch.cat(redness[:3]), torch.cat(redness[-3:])
    error = (first.var() / len(first) + last.var() / len(last)).sqrt()
    assert last.mean() > first.mean() + 4 * error, [round(r.mean().item(), 4) for r in redness]


def test_grpo_from_prompts_on_disk_and_evaluation_leave_something_to_look_at(warm, tmp_path):
    run("shapes.py", "--dump", tmp_path / "data", "--count", 3, "--edits", 2)
    command = ["grpo.py", "--model", warm, "--out", tmp_path / "grpo",
               "--prompts", tmp_path / "data" / "prompts.jsonl"]
    out = run(*command, *flags({**RUN, "eval_prompts": 2}))
    assert "before greedy" in out and "after greedy" in out
    page = (tmp_path / "grpo" / "report.html").read_text()
    assert page.count("<svg") > 10 and page.count("data:image/png;base64,") > 8 and "http" not in page
    names = {p.name for p in (tmp_path / "grpo").iterdir()}
    assert {"config.json", "metrics.jsonl", "report.html", "policy", "samples", "evaluation.json"} <= names
    assert list((tmp_path / "grpo" / "samples").glob("*.png"))
    run("evaluate.py", "--model", tmp_path / "grpo", "--prompts", 3, "--seed", 7, "--out", tmp_path / "e")
    rates = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert rates["prompts"] == 3 and rates["seed"] == 7 and set(rates["kept"]) == {"t2i", "i2t"}
    for arm in ("sampled", "low", "greedy"):
        for name in ("format", "text", "visual", "visual_true", "story"):
            rate, low, high = rates[arm][name]
            assert 0 <= low <= rate <= high <= 1
    assert "finished" in run(*command, *flags({**RUN, "eval_prompts": 0}))


def test_prompts_that_the_rules_cannot_judge_are_refused(warm, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "How do I boil an egg?"}\n')
    config = grpo.Config(model=str(warm), out=str(tmp_path / "g"), prompts=str(tmp_path / "prompts.jsonl"),
                         **RUN)
    with pytest.raises(UserError, match="boil an egg"):
        grpo.train(config, 0, 1, torch.device("cpu"))


def test_learned_judges_train_and_the_report_shows_what_was_asked(warm, tmp_path, monkeypatch):
    from common import write_report
    from judges import LlavaCritic
    replies = LlavaCritic.replies

    def scored(self, prompts, pictures, **options):
        """The real model, then a score in every second reply."""
        texts = replies(self, prompts, pictures, 2, **options)
        for i in range(1, len(texts), 2):
            texts[i] = f"Score: {len(prompts[i]) % 100}"
        return texts
    monkeypatch.setattr(LlavaCritic, "replies", scored)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "How do I boil an egg?"}\n')
    config = grpo.Config(model=str(warm), out=str(tmp_path / "g"), prompts=str(tmp_path / "prompts.jsonl"),
                         text_reward=f"llava-critic={FIXTURES / 'llava_critic_tiny'}",
                         visual_reward=f"image-reward={FIXTURES / 'image_reward_tiny'}",
                         **{**RUN, "group_size": 4})
    grpo.train(config, 0, 1, torch.device("cpu"))
    logged = metrics(tmp_path / "g")
    assert len(logged) == RUN["updates"] and any(line["reward/text"] > 0 for line in logged)
    assert any(line["no_score"] > 0 for line in logged), "replies without a score are counted"
    page = write_report(tmp_path / "g").read_text()
    for text in ("what the text judge was asked", "How do I boil an egg?]", "[score: -]"):
        assert text in page


def test_learned_judges_and_adapters_train_on_prompts_with_photographs(tmp_path):
    """Nothing of the toy world: prompts with pictures, LLaVA-Critic, ImageReward, adapters on a VILA-U."""
    vila_u = talkative(load(FIXTURES / "vila_u_tiny"), "How do I pack this for a journey?")
    save(vila_u, tmp_path / "base" / "policy")
    out = run("grpo.py", "--model", tmp_path / "base", "--prompts", "tests/photographs.jsonl",
              "--text-reward", f"llava-critic={FIXTURES / 'llava_critic_tiny'}",
              "--visual-reward", f"image-reward={FIXTURES / 'image_reward_tiny'}", "--critic-tiles", 2,
              "--lora-rank", 2, "--out", tmp_path / "g", "--credit", "process",
              *flags({**RUN, "updates": 2, "prompts_per_update": 3, "budget": 80}))
    assert "3 prompts are ready" in out
    lines = metrics(tmp_path / "g")
    assert len(lines) == 2 and any(line["reward/visual"] > 0 for line in lines)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert any(line["grad_norm"] > 0 for line in lines), "something is learned"
    page = (tmp_path / "g" / "report.html").read_text()
    judged = page.split("what the text judge was asked", 1)[1].split("</details>")[0]
    assert "Question: [How do I pack this for a journey?  ]" in judged
    assert "[score: " in judged and "--&gt;" in judged and "Given a question, please serve" in judged
    pictures = judged.count("Given an image and") + 2 * judged.count("Given images and")
    assert judged.count("picture of the question") == pictures > 0


def test_one_answer_from_the_command_line(warm, tmp_path):
    from PIL import Image
    Image.fromarray(shapes.render(shapes.SCENES[0])).save(tmp_path / "start.png")
    prompt = "paint it blue. <BEGIN> a red circle at top left <image>"
    run("model.py", "--model", warm, "--prompt", prompt, "--image", tmp_path / "start.png",
        "--out", tmp_path / "answer", "--budget", 60)
    assert (tmp_path / "answer" / "answer.html").exists()
    assert (tmp_path / "answer" / "prompt_0.png").exists()


@pytest.mark.parametrize("arguments, said", [
    (["grpo.py", "--group-sise", "4"], "--group-size"),
    (["grpo.py", "--group-size", "1"], "--group-size 1"),
    (["grpo.py", "--model", "no/such/folder"], "no/such/folder"),
    (["evaluate.py", "--model", "README.md"], "README.md"),
    (["warmup.py", "--batch", "many"], "--batch"),
    (["grpo.py", "--device", "gpu"], "--device gpu"),
    (["model.py", "--image", "README.md"], "--image"),
])
def test_a_mistake_is_one_sentence_and_exit_code_2(arguments, said):
    out = run(*arguments, check=2, HF_HUB_OFFLINE="1")
    assert said in out and "Traceback" not in out and len(out.strip().splitlines()) == 1, out


@pytest.mark.parametrize("lines, said", [
    ('{"prompt": "x"\n', "line 1"), ('{"images": []}\n', "line 1"), ("", "no prompt"), ("\n\n", "no prompt"),
    ('{"prompt": "a"}\n{"prompt": "b <image>"}\n', "line 2"), ('{"prompt": ""}', "empty"),
    ('{"prompt": "<image>", "images": ["missing.png"]}', "missing.png"),
    ('{"prompt": "<image>", "images": ["prompts.jsonl"]}', "not a picture"), ('[1]', "line 1")])
def test_broken_prompt_files_are_named_with_their_line(tmp_path, lines, said):
    (tmp_path / "prompts.jsonl").write_text(lines)
    with pytest.raises(UserError, match=re.escape(said)):
        data.read_prompts(tmp_path / "prompts.jsonl")


def test_damaged_checkpoints_are_refused(warm, tmp_path):
    import shutil
    shutil.copytree(warm / "policy", tmp_path / "policy")
    file = tmp_path / "policy" / "llm" / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:len(whole) // 2])
    with pytest.raises(UserError, match="model.safetensors"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path)
    file.write_bytes(whole)
    config = json.loads((tmp_path / "policy" / "llm" / "config.json").read_text())
    (tmp_path / "policy" / "llm" / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    with pytest.raises(UserError, match="shape"):
        load(tmp_path)


def test_a_dead_group_trains_nothing_and_says_so(warm, tmp_path, capsys):
    """With a constant reward every advantage is exactly zero: without a KL the policy does not move."""
    config = grpo.Config(model=str(warm), out=str(tmp_path / "dead"), reward_weights=(0.0, 0.0, 1.0), kl=0.0,
                         **RUN)
    grpo.train(config, 0, 1, torch.device("cpu"))
    assert same(load(tmp_path / "dead").state_dict(), load(warm).state_dict())
    assert all(line["zero_spread"] == 1 for line in metrics(tmp_path / "dead"))
    assert "no spread" in capsys.readouterr().out


def test_a_loss_that_is_not_finite_stops_before_the_update(warm, tmp_path, monkeypatch):
    config = grpo.Config(model=str(warm), out=str(tmp_path / "nan"), **RUN)
    real = grpo.grpo_loss

    def broken(*arguments):
        loss, ratio, kl = real(*arguments)
        calls.append(1)
        return (loss * float("nan") if len(calls) == 3 else loss), ratio, kl
    calls = []
    monkeypatch.setattr(grpo, "grpo_loss", broken)
    with pytest.raises(UserError, match="nan"):
        grpo.train(config, 0, 1, torch.device("cpu"))
    assert load_training(tmp_path / "nan" / "policy")[0]["update"] == 2
    assert all(p.isfinite().all() for p in load(tmp_path / "nan").parameters())
