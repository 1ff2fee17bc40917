"""The warm-up: Eq. (1), its batches, the image tokenizer's parts, three stages that resume bit-equal."""
import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, killed_after, metrics, same
from PIL import Image

import data
import shapes
import warmup
from common import UserError
from model import load, load_training, prepare_training


def weights(folder: Path) -> dict:
    """All that a checkpoint holds: the model's tensors and those of the training state."""
    return {**load(folder).state_dict(), **load_training(folder / "policy")[1]}


# ------------------------------------------------------------------------------------------------------------
# Eq. (1) and its gradient

def test_eq1_by_hand_is_the_mean_over_decisions_and_official_the_sum_of_two_means():
    logp = -torch.tensor([[[1., 9.], [2., 9.], [3., 5.]]])      # a prompt's token, a text token, a picture
    mask = torch.tensor([[[False, False], [True, False], [True, True]]])
    is_image = torch.tensor([[False, False, True]])
    loss, parts = warmup.warmup_loss(logp, mask, is_image)
    assert loss.item() == pytest.approx((2 + 3 + 5) / 3) == parts["loss"]
    assert (parts["loss/text"], parts["loss/image"]) == (2, 4)
    loss, _ = warmup.warmup_loss(logp, mask, is_image, "official")
    assert loss.item() == pytest.approx(2 + 4)
    counts = torch.tensor(4), torch.tensor(8)                   # of a larger batch that this is a part of
    loss, _ = warmup.warmup_loss(logp, mask, is_image, "eq1", counts)
    assert loss.item() == pytest.approx(10 / 12)
    loss, _ = warmup.warmup_loss(logp, mask, is_image, "official", counts)
    assert loss.item() == pytest.approx(2 / 4 + 8 / 8)


@pytest.mark.parametrize("kind", ["eq1", "official"])
def test_micro_batches_change_neither_gradient_nor_logged_loss(warm, kind):
    model = load(warm)
    codes = data.CodeCache(model)
    samples = [data.toy_story(random.Random(i), 2) for i in range(4)] + [data.toy_i2t(random.Random(0))]
    gradients, losses = [], []
    for size in (5, 2, 1):
        model.zero_grad()
        config = warmup.Config(loss=kind, micro_batch=size)
        losses.append(warmup.add_gradients(model, samples, codes, config))
        gradients.append(torch.cat([p.grad.flatten() for p in model.policy_parameters()]))
    for other, logged in zip(gradients[1:], losses[1:], strict=True):           # against all rows in one
        assert torch.allclose(gradients[0], other, atol=1e-5 * gradients[0].abs().max())
        for name in ("loss", "loss/text", "loss/image"):
            assert logged[name] == pytest.approx(losses[0][name], rel=1e-4)
    assert gradients[0].norm() > 0 and losses[-1]["padding"] == 0


def test_a_row_that_would_pad_too_much_opens_the_next_micro_batch(monkeypatch):
    def row(length, model, codes):
        tokens = torch.full((length, 2), length)
        return tokens, torch.zeros(length, dtype=torch.bool), torch.ones(length, 2, dtype=torch.bool)
    monkeypatch.setattr(warmup, "row_of", row)
    model = SimpleNamespace(device="cpu")
    batches, waste = warmup.micro_batches([3, 10, 9, 3, 10], model, None, 48)
    assert [[r[0, 0].item() for r in tokens] for tokens, _, _ in batches] == [[10, 10, 9], [3, 3]]
    assert waste == pytest.approx(1 / 36)
    assert batches[0][2].sum() == 2 * 29, "the padded position is no decision"
    batches, waste = warmup.micro_batches([3, 10, 9, 3, 10], model, None, 2)
    assert [len(tokens) for tokens, _, _ in batches] == [2, 1, 2] and waste == 0


def test_toy_batches_follow_from_seed_stage_and_step_and_keep_the_ratio():
    config = warmup.Config(batch=200)
    shares = {data.toy_story: 2.0, data.toy_i2t: 1.0, data.toy_t2i: 1.0}

    def prompts(config, stage, step):
        return [sample.prompt for sample in warmup.toy_batches(shares, config, stage)(step)]
    assert prompts(config, "warmup", 3) == prompts(config, "warmup", 3)
    other_seed = replace(config, seed=1)
    for other in ((config, "warmup", 4), (config, "pretrain", 3), (other_seed, "warmup", 3)):
        assert prompts(config, "warmup", 3) != prompts(*other)
    batch = warmup.toy_batches(shares, config, "warmup")
    kinds = [sample.kind for step in range(5) for sample in batch(step)]
    for kind, share in (("interleaved", 0.5), ("understanding", 0.25), ("t2i", 0.25)):
        assert kinds.count(kind) / len(kinds) == pytest.approx(share, abs=0.05)


# ------------------------------------------------------------------------------------------------------------
# Parts of stage 1

def test_kmeans_finds_separate_clusters():
    centres = torch.tensor([[0., 0.], [10., 0.], [0., 10.]])
    noise = 0.1 * torch.randn(3, 20, 2, generator=torch.Generator().manual_seed(0))
    points = (centres[:, None] + noise).flatten(0, 1)
    found, nearest = warmup.kmeans(points, 3, torch.Generator().manual_seed(1))
    assert torch.cdist(centres, found).min(1).values.max() < 0.1
    assert all(len(set(nearest[start:start + 20].tolist())) == 1 for start in (0, 20, 40))


def test_a_code_is_the_mean_of_the_residuals_that_chose_it_and_a_dead_one_is_restarted(tiny):
    books = warmup.EMACodebooks(replace(tiny.vision_config, depth=1, codebook_size=2, width=3))
    quantizer = SimpleNamespace(depth=1, codebooks=[torch.nn.Embedding(3, 3)])
    codes = torch.zeros(1, 2, 1, dtype=torch.long)                          # everything chooses code 0
    residuals = torch.tensor([[1., 2., 3.], [3., 4., 5.]]).view(1, 2, 1, 3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        books.update(quantizer, residuals, codes, False, generator)
    table = quantizer.codebooks[0].weight
    assert torch.allclose(table[0], torch.tensor([2., 3., 4.]), atol=1e-4)
    assert books.sizes[0, 0] == pytest.approx(2) and table[1].abs().max() < 1e-2, "nothing chose code 1"
    books.update(quantizer, residuals, codes, True, generator)
    assert any(torch.allclose(table[1], residual) for residual in residuals.view(2, 3))
    assert books.sizes[0, 1] == 1


def test_locality_loss_is_zero_for_a_tower_without_mixing_and_positive_for_one_that_mixes_cells(tiny):
    pixels = warmup.sample_boards(torch.Generator().manual_seed(0))

    def loss(tower):
        tokenizer, generator = SimpleNamespace(config=tiny.vision_config, tower=tower), torch.Generator()
        return warmup.locality_loss(tokenizer, pixels, tower(pixels), generator.manual_seed(1)).item()

    def alone(pixels):                                                  # a cell's feature is its own pixels
        return torch.nn.functional.unfold(pixels, 8, stride=8).transpose(1, 2)
    assert loss(alone) == 0
    assert loss(lambda pixels: alone(pixels) + alone(pixels).mean(1, keepdim=True)) > 1e-3


def test_schedules_ramp_up_and_fall_to_a_tenth():
    rates = [warmup.tokenizer_rate(step, 500) for step in range(500)]
    assert rates[0] == pytest.approx(2e-3 / 20) and rates[19] == rates[240] == 2e-3
    assert rates[399] == pytest.approx(2e-4, rel=0.1) and rates[400] == 2e-3
    assert rates[-1] == pytest.approx(2e-4, rel=0.1)
    shares = [warmup.schedule(step, 200) for step in range(200)]
    assert shares[0] == 0.1 and max(shares) == pytest.approx(1, abs=0.01)
    assert shares[-1] == pytest.approx(0.1, abs=0.001)


# ------------------------------------------------------------------------------------------------------------
# The optimizers of stages 2 and 3

def test_muon_takes_the_matrices_of_a_policy_from_nothing_and_adamw_all_else(warm):
    model = load(warm)
    prepare_training(model, 0, 16.0, 0)
    adamw, muon = warmup.make_optimizers(model, warmup.Config(), 1e-3)
    names = {id(p): name for name, p in model.named_parameters()}
    matrices = {names[id(p)] for p in muon.param_groups[0]["params"]}
    others = {names[id(p)] for p in adamw.param_groups[0]["params"]}
    assert not matrices & others and matrices | others == {names[id(p)] for p in model.policy_parameters()}
    assert all(name.startswith(("decoder.layers.", "depth.blocks.")) for name in matrices)
    assert "decoder.layers.3.mlp.down_proj.weight" in matrices and "decoder.lm_head.weight" in others
    assert all("norm" not in name and "bias" not in name for name in matrices)
    only, = warmup.make_optimizers(model, warmup.Config(model="published"), 1e-3)
    assert isinstance(only, torch.optim.AdamW)
    assert len(only.param_groups[0]["params"]) == len(matrices | others)


# ------------------------------------------------------------------------------------------------------------
# The three stages

@pytest.mark.parametrize("lines", [5, 13, 21])               # in each of the three stages
def test_a_killed_warmup_goes_on_bit_equal(warm, tmp_path, monkeypatch, lines):
    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)
    config = warmup.Config(out=str(tmp_path / "warmup"), device="cpu", **SMALL)
    killed_after(lines, lambda: warmup.warm_up(config), monkeypatch)
    folder = tmp_path / "warmup"
    assert not warmup.is_done(folder)
    warmup.warm_up(config)
    assert warmup.is_done(folder) and same(weights(folder), weights(warm))
    assert metrics(folder) == metrics(warm)
    for sheet in ("samples/000000_before.json", "samples/999999_after.json"):
        assert (folder / sheet).read_text() == (warm / sheet).read_text()


def test_sheets_show_heldout_prompts_of_the_length_that_is_trained(warm):
    for name in ("000000_before", "999999_after"):
        groups = json.loads((warm / "samples" / f"{name}.json").read_text())["groups"]
        assert len(groups) == 6
        for group in groups:
            assert shapes.wanted_steps(group["prompt"]) == warmup.Config.edits
            assert shapes.split_of(group["prompt"]) == "heldout"
        assert (warm / "samples" / f"{name}.png").exists()


def test_stage_1_leaves_a_sheet_with_the_pictures_and_one_column_a_depth(warm):
    config = load(warm).vision_config
    sheet = Image.open(warm / "samples" / "tokenizer.png")
    scenes = math.ceil(len(shapes.SCENES) / 25)
    assert sheet.size == (4 * config.image_size * (1 + config.depth), 4 * config.image_size * scenes)


def test_other_settings_do_not_go_on_with_a_checkpoint(warm):
    with pytest.raises(UserError, match="--lr"):
        warmup.warm_up(warmup.Config(out=str(warm), lr=1.0, **SMALL))


@pytest.mark.parametrize("stage, flag", [("pretrain", "--lr"), ("warmup", "--warmup-lr")])
def test_a_loss_that_is_not_finite_stops_before_the_step(warm, tmp_path, monkeypatch, stage, flag):
    model = load(warm)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    real = warmup.warmup_loss

    def broken(*arguments):
        loss, parts = real(*arguments)
        return loss * math.nan, {**parts, "loss": math.nan}
    monkeypatch.setattr(warmup, "warmup_loss", broken)
    config = warmup.Config(out=str(tmp_path / "nan"), **SMALL)
    batch = warmup.toy_batches({data.toy_t2i: 1.0}, config, stage)
    with pytest.raises(UserError, match=f"{stage}, step 0: the loss became nan: lower {flag};"):
        warmup.train_decoder(model, warmup.Run(config), config, stage, batch, data.CodeCache(model), 0, {})
    assert same(model.state_dict(), before)
