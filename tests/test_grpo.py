"""Advantages and loss: every equation has one case worked out by hand, and the traps have a test each."""
import copy
import math

import pytest
import torch

import evaluate
import grpo
from common import UserError, parse_config
from grpo import Config, check, decision_weights, grpo_loss, k3_kl, outcome_advantages, process_advantages
from data import CodeCache
from model import IMAGE, TEXT, decision_logp, prepare_training


def test_eq4_by_hand():
    """Rewards 1, 0, 0, 0: mean .25, unbiased std .5, so 1.5 and three times -.5, but for the added 1e-4."""
    got = outcome_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))
    assert got[0].tolist() == pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3])


def test_constant_group_gets_exact_zeros():
    assert outcome_advantages(torch.full((2, 12), 0.7)).eq(0).all()
    assert outcome_advantages(torch.full((1, 4), 0.01) + 1e-6 * torch.randn(1, 4)).eq(0).all()


def test_eq6_by_hand_with_ragged_answers():
    """Step rewards [1, 0], [1], [1, 1, 0]: mean 2/3, std sqrt(4/15) = .5164, so r~ is +.6455 or -1.291."""
    up, down = (1 / 3) / (math.sqrt(4 / 15) + 1e-4), -(2 / 3) / (math.sqrt(4 / 15) + 1e-4)
    got = process_advantages([[1, 0], [1], [1, 1, 0]])
    expected = [[up + down, down], [up], [2 * up + down, up + down, down]]
    for a, b in zip(got, expected):
        assert a.tolist() == pytest.approx(b, abs=1e-5)
    half = process_advantages([[1, 0], [1], [1, 1, 0]], discount=0.5)
    assert half[2].tolist() == pytest.approx([up + 0.5 * (up + 0.5 * down), up + 0.5 * down, down], abs=1e-5)
    none = process_advantages([[1, 0], [1], [1, 1, 0]], discount=0.0)
    assert none[2].tolist() == pytest.approx([up, up, down], abs=1e-5)


def test_weights_of_the_reward_parts_scale_normalised_step_rewards():
    plain = process_advantages([[1, 0], [0, 1]], [["t", "v"], ["t", "v"]], 0.0)
    scaled = process_advantages([[1, 0], [0, 1]], [["t", "v"], ["t", "v"]], 0.0, [[2, 0.5], [2, 0.5]])
    for a, b in zip(plain, scaled):
        assert a.ne(0).all() and torch.equal(a * torch.tensor([2, 0.5]), b)


def test_eq6_with_one_step_equals_eq4():
    rewards = torch.rand(5)
    got = process_advantages([[r.item()] for r in rewards])
    assert torch.cat(got).tolist() == pytest.approx(outcome_advantages(rewards[None])[0].tolist(), rel=1e-5)


def test_pool_per_kind_centres_every_kind_by_itself():
    """Pictures that score lower than texts are not worth less for it."""
    rewards, kinds = [[1.0, 0.1], [0.8, 0.3]], [["t", "v"], ["t", "v"]]
    own = process_advantages(rewards, kinds, 0.0)
    assert own[0][0] > 0 > own[0][1] and own[1][1] > 0 > own[1][0]
    pooled = process_advantages(rewards, None, 0.0)
    assert pooled[0][1] < 0 and pooled[1][1] < 0


def test_a_step_without_a_score_takes_no_part():
    got = process_advantages([[1.0, math.nan], [0.0]], discount=0.0)
    alone = process_advantages([[1.0], [0.0]], discount=0.0)
    assert got[0][1] == 0 and got[0][0] == alone[0][0] and got[1][0] == alone[1][0]


def test_k3_is_zero_when_equal_never_negative_and_unbiased():
    logits, ref_logits = torch.randn(2, 50, dtype=torch.float64)
    p, q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    assert k3_kl(p, p).abs().max() == 0
    assert k3_kl(p, q).min() >= 0
    exact = (p.exp() * (p - q)).sum()
    assert (p.exp() * k3_kl(p, q)).sum().item() == pytest.approx(exact.item())


def one(ratio: float, advantage: float, eps: float = 0.2, beta: float = 0.0, ref: float | None = None):
    """Loss and gradient of a single decision with the given ratio."""
    logp = torch.tensor(math.log(ratio), requires_grad=True)
    shape = (1, 1, 1)
    ref_logp = torch.full(shape, math.log(ratio) if ref is None else ref)
    loss, *_ = grpo_loss(logp.expand(shape), torch.zeros(shape), ref_logp, torch.full(shape, advantage),
                         torch.ones(shape), eps, beta)
    loss.sum().backward()
    return loss.item(), logp.grad.item()


@pytest.mark.parametrize("ratio, advantage, value, moves", [
    (1.1, 1.0, 1.1, True), (1.3, 1.0, 1.2, False),         # good and already 20% likelier: no further
    (0.7, 1.0, 0.7, True),                                 # good but less likely: pulled back without limit
    (0.9, -1.0, -0.9, True), (0.7, -1.0, -0.8, False),     # bad and already 20% rarer: no further
    (1.3, -1.0, -1.3, True)])                              # bad but likelier: pushed back without limit
def test_eq2_clip_at_both_sides(ratio, advantage, value, moves):
    loss, gradient = one(ratio, advantage)
    assert loss == pytest.approx(-value, rel=1e-5)
    assert gradient == pytest.approx(-ratio * advantage if moves else 0.0, rel=1e-5)


def test_kl_term_by_hand():
    """logp 0, ref log 2: k3 = 2 - log 2 - 1."""
    loss, gradient = one(1.0, 0.0, beta=0.5, ref=math.log(2))
    assert loss == pytest.approx(0.5 * (1 - math.log(2)), rel=1e-5)
    assert gradient == pytest.approx(0.5 * (1 - 2), rel=1e-5)


SENTENCE = "text .75 and pictures .54 throughout give every code an advantage of -.98"


@pytest.mark.parametrize("kinds, discount, text, code", [
    (None, 1.0, [0, 0, 0], [-.98, -.98, -.98]),             # as printed
    (None, 0.5, [.64, .61, .49], [-.67, -.73, -.98]),       # .98 - .98 / 2, then -.98 + .49 / 2, and so on
    (None, 0.0, [.98, .98, .98], [-.98, -.98, -.98]),
    ("kind", 1.0, [0, 0, 0], [0, 0, 0])])
def test_one_pool_gives_advantages_where_nothing_differs(kinds, discount, text, code):
    """Four equal answers of three steps: mean .645, std .105 sqrt(24 / 23), so r~ is .98 and -.98."""
    rewards, names = [[.75, .54] * 3] * 4, [["text", "image"] * 3] * 4
    for values in process_advantages(rewards, names if kinds else None, discount):
        assert values[0::2].tolist() == pytest.approx(text, abs=0.006)
        assert values[1::2].tolist() == pytest.approx(code, abs=0.006)


def test_the_preset_says_so_and_the_default_does_not():
    for preset, expected in (([], False), (["--preset", "paper"], True),
                             (["--preset", "paper", "--normalise", "kind"], False),
                             (["--preset", "paper", "--credit", "outcome"], False)):
        config = parse_config(Config, preset, {"paper": grpo.PAPER})
        assert any(SENTENCE in line for line in grpo.caveats(config, [])) == expected


def in_bf16(tiny, what: str):
    """A copy with its weights in bf16, or with float32 weights and passes in bf16."""
    policy = copy.deepcopy(tiny)
    if what == "weights":
        return policy.bfloat16()
    prepare_training(policy, 0, 16.0, precision="bf16")
    return policy


def one_rollout(policy, **settings) -> tuple[Config, grpo.Rollout]:
    """Four prompts, judged by constants: texts .75 and pictures .54, whatever they are."""
    config = Config(**{"prompts_per_update": 4, "budget": 48, "text_reward": "llava-critic", **settings})
    judges = (lambda *asked: [0.75] * len(asked[0]), lambda *asked: [0.54] * len(asked[0]))
    judges = [judge if weight else None for judge, weight in zip(judges, config.reward_weights)]
    prompts = grpo.next_prompts(config, 0, [])
    seeds = [(0, p) for p in range(4)]
    return config, grpo.rollout(policy, prompts, config, judges, CodeCache(policy), seeds)


def update(policy, config: Config, batch, ref_logp, epoch: int = 0, lr: float = 0.0) -> dict:
    optimizer = torch.optim.SGD(policy.policy_parameters(), lr=lr)
    return grpo.update(policy, optimizer, batch, ref_logp, config, epoch)


def test_answers_that_are_all_the_same_train_nothing_and_are_counted(tiny):
    """At a temperature near 0 all answers of a group are one answer. Eq. (6) alone would train it."""
    settings = dict(normalise="all", step_discount=1.0)
    config, batch = one_rollout(tiny, temperature=1e-4, **settings)
    assert batch.metrics["zero_spread"] == 1 and batch.advantages.eq(0).all()
    steps = process_advantages([scores.steps for scores in batch.scores[:4]], discount=1.0)
    assert any(values.abs().max() > 0.5 for values in steps), "what the equation gives"
    config, batch = one_rollout(tiny, **settings)
    assert batch.metrics["zero_spread"] < 1 and batch.advantages.abs().max() > 0.5


def test_the_spread_of_each_part_is_its_std_within_groups():
    """Groups of [1, 0, 0, 0] and of four equal values: (.5 + 0) / 2. A part without scores has no spread."""
    assert grpo.spread([1, 0, 0, 0]) == pytest.approx(0.5) and grpo.spread([0.7] * 4) == 0
    assert grpo.spread([0.2, None, 0.4]) == pytest.approx(0.02 ** 0.5)
    assert grpo.spread([None, 0.5]) is None and grpo.spread([None] * 4) is None


def test_the_spread_is_logged(tiny):
    """The judges are constant: pictures differ where an answer has none, the form differs by chance."""
    _, batch = one_rollout(tiny)
    forms = torch.tensor([s.format for s in batch.scores]).view(4, 4)
    assert batch.metrics["spread/format"] == pytest.approx(forms.std(1).mean().item())
    visual = torch.tensor([s.visual for s in batch.scores]).view(4, 4)
    assert batch.metrics["spread/visual"] == pytest.approx(visual.std(1).mean().item())
    assert batch.metrics["spread/visual"] > 0 and "spread/text" in batch.metrics


def test_a_part_of_weight_0_is_absent_from_the_log(tiny):
    """It is not judged. A reward of 0 would say that all answers are wrong."""
    _, whole = one_rollout(tiny)
    for part, weights in (("visual", (1.0, 0.0, 1.0)), ("text", (0.0, 1.0, 1.0))):
        _, batch = one_rollout(tiny, reward_weights=weights)
        assert whole.metrics.keys() - batch.metrics.keys() == {f"reward/{part}", f"spread/{part}"}
        record, *_ = batch.records(1, Config(reward_weights=weights))
        assert {answer[part] for answer in record["answers"]} == {None}


@pytest.mark.parametrize("settings, text, image", [
    (dict(kl=0.5), 0.5, 0.5), (dict(kl=0.5, kl_text=0.0), 0.0, 0.5), (dict(kl=0.5, kl_image=2.0), 0.5, 2.0),
    (dict(kl_text=0.1, kl_image=0.3), 0.1, 0.3)])
def test_each_modality_has_its_own_kl(tiny, settings, text, image):
    """Advantages 0 and a reference that gives every text token half and every code a third of its chance."""
    config, batch = one_rollout(tiny, per_modality=True, **settings)
    batch.advantages.zero_()
    factor = torch.where(batch.is_image, 1 / 3, 1 / 2)[..., None]
    with torch.no_grad():
        now = tiny.log_probs(batch.tokens, batch.is_image, batch.mask)
    k3 = {"text": 1 / 2 - math.log(1 / 2) - 1, "image": 1 / 3 - math.log(1 / 3) - 1}
    drawing = (batch.mask & batch.is_image[..., None]).any(2).any(1).float().mean().item()
    got = update(tiny, config, batch, now + factor.log())
    assert got["loss"] == pytest.approx(text * k3["text"] + image * k3["image"] * drawing, rel=1e-3)
    assert got["kl/text"] == pytest.approx(k3["text"], rel=1e-3)
    assert got["kl/image"] == pytest.approx(k3["image"], rel=1e-3), "logged without its weight"


def test_the_kl_flags_are_those_of_both_until_they_are_given():
    config = parse_config(Config, ["--kl", "0.3", "--kl-image", "0"])
    assert (config.kl, config.kl_text, config.kl_image) == (0.3, None, 0.0)
    for flag in ("--kl-text", "--kl-image"):
        with pytest.raises(UserError, match=flag):
            parse_config(Config, [flag, "-0.1"])


TRUNCATED = dict(temperature=(0.9, 1.0), top_k=5, top_p=(0.6, 0.8))


@pytest.mark.parametrize("what, epochs", [("weights", 1), ("weights", 2), ("passes", 2)])
def test_a_bf16_policy_starts_at_ratio_one_under_truncation(tiny, monkeypatch, what, epochs):
    """Its scorer disagrees with its sampler, and would cut some of the decisions; none has ratio 0."""
    policy = in_bf16(tiny, what)
    config, batch = one_rollout(policy, group_size=8, **TRUNCATED, epochs_per_rollout=epochs, updates=epochs)
    batch.advantages = torch.randn(batch.advantages.shape, generator=torch.Generator().manual_seed(0))
    sampled, seen, real = batch.old_logp.clone(), [], grpo.grpo_loss

    def watched(logp, old_logp, *rest):
        loss, ratio, kl = real(logp, old_logp, *rest)
        seen.append((logp.detach(), ratio.detach()))
        return loss, ratio, kl
    monkeypatch.setattr(grpo, "grpo_loss", watched)
    ref_logp = grpo.reference_logp(policy, grpo.trainable_state(policy), batch, config)
    first = update(policy, config, batch, ref_logp, 0, lr=0.3)
    (logp, ratio), = seen
    assert logp.isfinite().all() and ref_logp.isfinite().all() and ratio.eq(1).all()
    assert not (sampled - logp)[batch.mask].abs().max() < 1e-3, "bf16 must differ, or nothing is tested"
    assert first["logp_gap"] == pytest.approx((sampled - logp)[batch.mask].abs().mean().item())
    gradients = [p.grad for p in policy.policy_parameters() if p.grad is not None]
    assert all(g.isfinite().all() for g in gradients) and any(g.any() for g in gradients)
    if epochs == 2:
        second = update(policy, config, batch, ref_logp, 1)
        assert second.keys().isdisjoint(["logp_gap", "ratio_max"]), "of the first update alone"
        assert seen[1][1].isfinite().all() and seen[1][1].max() > 1.01


def test_in_float32_the_old_log_probs_are_those_of_the_sampler(tiny):
    config, batch = one_rollout(tiny, **TRUNCATED)
    sampled = batch.old_logp.clone()
    metrics = update(tiny, config, batch, batch.old_logp)
    assert torch.equal(batch.old_logp, sampled)
    assert metrics["logp_gap"] < 1e-5 and metrics["ratio_max"] == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("guided", [True, False])
def test_guided_rollouts_are_scored_guided_unless_the_flag_says_otherwise(tiny, guided):
    """Unguided, both policies of the ratio are the plain model, not the one that was sampled from."""
    config, batch = one_rollout(tiny, guidance=3.0, score_guided=guided)
    sampled, drawn = batch.old_logp.clone(), batch.mask & batch.is_image[..., None]
    with torch.no_grad():
        plain = tiny.log_probs(batch.tokens, batch.is_image, batch.mask)
    assert (plain - sampled)[drawn].abs().max() > 0.1, "guidance must matter, or nothing is tested"
    ref_logp = grpo.reference_logp(tiny, grpo.trainable_state(tiny), batch, config)
    metrics = update(tiny, config, batch, ref_logp)
    scored = sampled if guided else plain
    assert torch.allclose(batch.old_logp, scored, atol=1e-4) and torch.allclose(ref_logp, scored, atol=1e-4)
    assert metrics["ratio_max"] == pytest.approx(1, abs=1e-3)
    assert (metrics["logp_gap"] < 1e-4) == guided


def test_float32_cuts_what_left_the_set_and_bf16_keeps_what_was_sampled():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    kept = decision_logp(logits, grpo.Sampling(top_k=1), TEXT, torch.tensor([[1]]))
    assert kept.exp()[0].tolist() == pytest.approx([math.e / (1 + math.e), 1 / (1 + math.e), 0])
    assert decision_logp(logits, grpo.Sampling(top_k=1), TEXT)[0, 1] == -torch.inf


def test_weights_are_one_over_the_answers_own_length():
    mask = torch.zeros(2, 6, 2, dtype=torch.bool)
    is_image = torch.zeros(2, 6, dtype=torch.bool)
    mask[0, 2:4, 0] = True                                  # two tokens
    mask[1, 2:5, 0], mask[1, 5], is_image[1, 5] = True, True, True          # three tokens and two codes
    weights = decision_weights(mask, is_image)
    assert torch.allclose(weights.sum((1, 2)), torch.ones(2))
    assert weights[0, 2, 0] == 0.5 and weights[1, 5, 1] == pytest.approx(0.2)
    assert weights[~mask].eq(0).all()
    both = decision_weights(mask, is_image, per_modality=True)
    assert both[1, 2:5, 0].sum() == pytest.approx(1.0) and both[1, 5].sum() == pytest.approx(1.0)
    assert both[0].sum() == pytest.approx(1.0), "an answer without a picture has the text mean alone"


def test_a_code_that_was_cut_since_has_ratio_zero_and_no_nan():
    logits = torch.randn(1, 1, 8, requires_grad=True)
    kept = logits.masked_fill(torch.arange(8) == 3, -torch.inf).log_softmax(-1)
    logp = kept[..., [3]]
    loss, ratio, kl = grpo_loss(logp, torch.zeros(1, 1, 1), torch.full((1, 1, 1), -1.0), torch.ones(1, 1, 1),
                                torch.ones(1, 1, 1), 0.2, 0.1)
    loss.sum().backward()
    assert ratio.item() == 0
    assert all(values.isfinite().all() for values in (loss, kl, logits.grad))


def test_one_number_sets_both_modalities_and_two_set_each():
    one = grpo.sampling_of(parse_config(Config, ["--temperature", "0.7", "--top-k", "5"]))
    assert one.of(TEXT) == one.of(IMAGE) == (0.7, 5, 1.0)
    config = parse_config(Config, ["--temperature", "0.9,1", "--top-k", "0,900", "--top-p", "0.6,0.96"])
    two = grpo.sampling_of(config)
    assert two.of(TEXT) == (0.9, 0, 0.6) and two.of(IMAGE) == (1.0, 900, 0.96)


def test_the_paper_presets_sample_as_published_at_evaluation_and_rl_stays_at_one(tmp_path, monkeypatch):
    """VILA-U's own settings; guidance 3 is the paper's."""
    asked = []
    monkeypatch.setattr(evaluate, "open_model", lambda *_: None)
    monkeypatch.setattr(evaluate, "evaluate", lambda _, config: asked.append(config) or {})
    monkeypatch.setattr(evaluate, "rates_table", lambda _: "")
    monkeypatch.setattr(evaluate, "write_report", lambda *_: "")
    paper = parse_config(Config, ["--preset", "paper", "--out", str(tmp_path)], {"paper": grpo.PAPER})
    benchmarks = parse_config(evaluate.Config, ["--preset", "paper"], {"paper": evaluate.PAPER})
    evaluate.before_and_after(paper, [])
    for config in (*asked, benchmarks):
        sampling = grpo.sampling_of(config)
        assert (sampling.of(TEXT), sampling.of(IMAGE)) == ((0.9, 0, 0.6), (1.0, 900, 0.96))
        assert sampling.guidance == 3
    assert len(asked) == 2 and grpo.sampling_of(paper) == grpo.Sampling()
    evaluate.before_and_after(Config(out=str(tmp_path), temperature=0.8, top_k=5), [])
    assert grpo.sampling_of(asked[-1]) == grpo.Sampling(0.8, 5)


@pytest.mark.parametrize("flag, value", [
    ("--temperature", "0.9,1,1"), ("--temperature", "0.9,x"), ("--temperature", "0.9,0"), ("--top-k", "1.5"),
    ("--top-k", "900,-1"), ("--top-p", "0.6,1.2"), ("--top-p", ","), ("--clip", "0.1,0.2")])
def test_numbers_that_fit_no_modality_are_refused_by_name(flag, value):
    with pytest.raises(UserError, match=flag) as error:
        parse_config(Config, [flag, value])
    assert "TEXT,IMAGE" in str(error.value) or flag == "--clip"


@pytest.mark.parametrize("wrong", [
    dict(group_size=1),
    dict(reward_weights="1,x,1"),
    dict(reward_weights=(1.0, 1.0)),
    dict(text_reward="oracle"),
    dict(visual_reward="llava-critic"),
    dict(credit="step"),
    dict(step_discount=2.0),
    dict(temperature=0.0),
    dict(score_guided=False, guidance=3.0, top_k=(0, 2)),
    dict(score_guided=False, guidance=3.0, top_p=(1.0, 0.5)),
    dict(updates=5, epochs_per_rollout=2)])
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(UserError) as error:
        check(Config(**wrong))
    assert "--" + next(iter(wrong)).replace("_", "-") in str(error.value)
