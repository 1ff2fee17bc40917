"""The decoder's three verbs agree with each other and with slow, obvious versions of themselves."""
import random

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import model as model_module
from common import UserError, seeded
from data import CodeCache, toy_prompt
from model import (IMAGE, TEXT, Sampling, as_batch, by_modality, check_memory, decision_logp, guide, load,
                   sample_index, save)
from rewards import format_reward
from tokenizer import IMAGE_START, Sequence, parse_answer

SETTINGS = [Sampling(), Sampling(temperature=0.7), Sampling(top_k=5), Sampling(top_p=0.8),
            Sampling(guidance=3.0), Sampling(0.9, 20, 0.95, 2.0), Sampling((0.7, 1.3), (20, 5)),
            Sampling((0.9, 1.0), (0, 30), (0.6, 0.96), 3.0), Sampling((0.0, 1.0), 0, (1.0, 0.5))]


def prompts(model, count=3):
    rng, codes = random.Random(0), CodeCache(model)
    samples = [toy_prompt(rng, 1 + i, "train") for i in range(count)]
    return [model.prompt(s.prompt, codes(s.prompt_pictures)) for s in samples]


def slow_index(logp, uniform):
    """The index at which the cumulative distribution passes a uniform number, in float64 and one by one."""
    chances, total = logp.exp().double().tolist(), 0.0
    for index, chance in enumerate(chances):
        total += chance
        if total > uniform * sum(chances):
            return index
    return max(range(len(chances)), key=chances.__getitem__)


def slow_generate(model, prompt, budget, sampling, uniform):
    """`generate` as plainly as possible: one row, no cache, no batch.

    uniform [budget, D]: the random numbers of the row.
    """
    N, D = model.vision_config.positions, model.vision_config.depth
    row, logps, since = prompt, [], []
    left = N if prompt.tokens[-1, 0] == model.text.id(IMAGE_START) else 0
    for t in range(budget):
        state = model(row.tokens[None], row.is_image[None])[:, -1]
        column, logp = torch.zeros(D, dtype=torch.long), torch.zeros(D)
        if left:
            blank = None
            if sampling.guidance != 1:
                empty = model.unconditional_prompt()
                codes = torch.stack(since) if since else torch.zeros(0, D, dtype=torch.long)
                other = empty + Sequence(codes, torch.ones(len(codes), dtype=torch.bool))
                blank = model(other.tokens[None], other.is_image[None])[:, -1]
            for d in range(D):
                vectors = model.vision.vectors(column[None])
                logits = model.depth(state, vectors)[:, d]
                other = None if blank is None else model.depth(blank, vectors)[:, d]
                chances = decision_logp(guide(logits, other, sampling.guidance), sampling, IMAGE)
                column[d] = slow_index(chances[0], uniform[t, d].item())
                logp[d] = chances[0, column[d]]
            since.append(column)
        else:
            chances = decision_logp(model.decoder.lm_head(state), sampling, TEXT)
            column[0] = slow_index(chances[0], uniform[t, 0].item())
            logp[0] = chances[0, column[0]]
        row = row + Sequence(column[None], torch.tensor([left > 0]))
        logps.append(logp)
        if not left and column[0] == model.text.id("</s>"):
            break
        if not left and column[0] == model.text.id(IMAGE_START):
            if t + 1 + N > budget:
                break
            left, since = N, []
        elif left:
            left -= 1
    return row.tokens[len(prompt):], row.is_image[len(prompt):], torch.stack(logps)


def uniforms(seed: tuple, budget: int, depth: int):
    return torch.rand(budget, depth, generator=seeded(*seed))


@torch.no_grad()
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_cached_sampling_equals_the_slow_oracle(tiny, sampling):
    """A ragged batch in mixed modes, which ended rows leave, against one row at a time without a cache."""
    questions = [*prompts(tiny, 4), tiny.prompt("a red circle", draw=True)]
    budget, D = 40, tiny.vision_config.depth
    rows = tiny.generate(questions, 3, budget, sampling, [("seed", p) for p in range(len(questions))])
    assert len({len(row.tokens) for row in rows}) > 1, "the answers must differ in length"
    for n, fast in enumerate(rows):
        p, g = divmod(n, 3)
        uniform = uniforms(("seed", p, g), budget, D)
        tokens, is_image, logp = slow_generate(tiny, questions[p], budget, sampling, uniform)
        assert torch.equal(fast.tokens, tokens) and torch.equal(fast.is_image, is_image)
        assert torch.allclose(fast.logp, logp, atol=1e-4)
    assert sum(bool(row.is_image.any()) for row in rows) > 4, "some answers must hold pictures"


@torch.no_grad()
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(guidance=3.0)], ids=str)
def test_answers_do_not_depend_on_the_batch_or_on_rows(tiny, sampling):
    """Sums in another order may move a number that lies within rounding of a boundary.

    With these seeds none does.
    """
    questions = prompts(tiny, 3)
    seeds = [("s", p) for p in range(3)]
    whole = tiny.generate(questions, 4, 40, sampling, seeds)
    others = [[row for p in range(3)
               for row in tiny.generate(questions[p:p + 1], 4, 40, sampling, seeds[p:p + 1])]]
    others += [tiny.generate(questions, 4, 40, sampling, seeds, rows) for rows in (1, 3, 5, 100)]
    for other in others:
        assert len(other) == len(whole)
        for a, b in zip(whole, other):
            assert torch.equal(a.tokens, b.tokens) and a.truncated == b.truncated
            assert torch.allclose(a.logp, b.logp, atol=1e-4)


def test_rows_follow_from_the_free_memory(tiny, monkeypatch, capsys):
    """By default as many rows are in the cache as fit, fewer where guidance needs a second branch."""
    longest, c = max(map(len, prompts(tiny))), tiny.decoder.config
    kv = [torch.zeros(1, c.num_key_value_heads or c.num_attention_heads, longest + 40,
                      c.hidden_size // c.num_attention_heads) for _ in range(2 * c.num_hidden_layers)]
    row = sum(tensor.numel() * tensor.element_size() for tensor in kv)
    everything = tiny.generate(prompts(tiny), 3, 40)
    used, sample = [], type(tiny).sample_rows

    def watched(self, part, index, uniform, sampling):
        used.append(len(index))
        return sample(self, part, index, uniform, sampling)
    monkeypatch.setattr(type(tiny), "sample_rows", watched)
    monkeypatch.setattr(model_module, "free_bytes", lambda device: int(4.5 * row / model_module.ROOM))
    cut = tiny.generate(prompts(tiny), 3, 40)
    assert used == [4, 4, 1], "four and a half rows fit"
    assert "4 of 9 answers at a time" in capsys.readouterr().out
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(everything, cut, strict=True))
    used.clear()
    tiny.generate(prompts(tiny), 3, 40, Sampling(guidance=2.0))
    assert 1 <= used[0] < 4, "the unconditional branch takes its share"


def test_what_no_memory_holds_is_refused_before_it_is_loaded(warm, monkeypatch):
    monkeypatch.setattr(model_module, "read_tensor", lambda *_: pytest.fail("more than headers was read"))
    cpu = torch.device("cpu")
    check_memory(str(warm), 100, 0, cpu)
    check_memory(str(warm), 100, 64, cpu)
    with pytest.raises(UserError, match=r"--rows 9999999 --budget 100: .* at least [\d.]+ GiB .* cpu has"):
        check_memory(str(warm), 100, 9999999, cpu)
    with pytest.raises(UserError, match="--budget 100000: the decoder .* context of 256"):
        check_memory(str(warm), 100000, 0, cpu)
    decoder = sum(file.stat().st_size for file in (warm / "policy" / "llm").glob("*.safetensors"))
    monkeypatch.setattr(model_module, "total_bytes", lambda device: decoder)
    check_memory(str(warm), 100, 1, cpu, "nf4")
    monkeypatch.setattr(model_module, "total_bytes", lambda device: decoder / 4)
    check_memory(str(warm), 1, 1, cpu, "nf4")                          # 4.5 bits of 32
    monkeypatch.setattr(model_module, "total_bytes", lambda device: decoder)
    with pytest.raises(UserError, match="--rows 1 --budget 100: .* cpu has"):        # both at once
        check_memory(str(warm), 100, 1, cpu, "nf4", unpack=True)


@torch.no_grad()
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(guidance=3.0)], ids=str)
def test_a_position_costs_one_decoder_pass_and_one_wait(tiny, sampling, monkeypatch):
    """The guided branch is part of the decoder's pass, and rows that have ended are in none.

    The device is waited for once a position: methods that read a tensor on the CPU are counted, and so are
    operations whose result's shape only the data tells, such as boolean indexing.
    """
    passes, waits = [], []
    forward = tiny.decoder.forward

    def counted(x, *arguments, **options):
        passes.append(len(x))
        return forward(x, *arguments, **options)
    monkeypatch.setattr(tiny.decoder, "forward", counted)
    sample = type(tiny).sample_rows

    def recorded(name, method):
        def record(x, *arguments, **options):
            waits.append(name)
            return method(x, *arguments, **options)
        return record

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, operation, types, arguments=(), options=None):
            name = operation.name().removeprefix("aten::").partition(".")[0]
            indices = arguments[1] if name in ("index", "index_put", "index_put_") else ()
            masks = any(index is not None and index.dtype == torch.bool for index in indices)
            if masks or name in ("nonzero", "masked_select", "equal", "_unique2"):
                waits.append(name)
            return operation(*arguments, **(options or {}))

    def watched(self, *arguments):
        with monkeypatch.context() as patch, Watch():
            for name in ("tolist", "item", "__bool__", "__int__", "cpu", "nonzero", "numpy", "__float__"):
                patch.setattr(torch.Tensor, name, recorded(name, getattr(torch.Tensor, name)))
            return sample(self, *arguments)
    monkeypatch.setattr(type(tiny), "sample_rows", watched)
    rows = tiny.generate(prompts(tiny, 3), 8, 40, sampling)
    positions = max(len(row.tokens) for row in rows)
    setup = 1 + (sampling.guidance != 1)                               # prompts, and the empty prompt
    assert len(passes) == setup + positions - 1
    decoded = passes[setup:]
    alive = [sum(len(row.tokens) > t for row in rows) for t in range(1, positions)]
    images = [sum(bool(row.is_image[t]) for row in rows if t < len(row.tokens)) for t in range(positions - 1)]
    assert any(a < 24 for a in alive) and any(images), "some rows must end early and some must draw"
    for count, a, n in zip(decoded, alive, images):
        assert a <= count - n * (sampling.guidance != 1) <= max(a / 0.75, a + 1), (count, a, n)
    per_position = waits.count("tolist") - 1                           # the first modes
    assert per_position == positions
    assert set(waits[waits.index("tolist"):]) == {"tolist"}, "prompts are embedded before the first position"


@torch.no_grad()
@pytest.mark.parametrize("sampling", SETTINGS, ids=str)
def test_first_update_ratio_is_one_for_text_and_codes(tiny, sampling):
    """The log-probs kept while sampling a ragged batch in mixed modes are those that scoring gives."""
    rows = tiny.generate(prompts(tiny), 6, 48, sampling)
    tokens, is_image, mask, old = as_batch(rows, tiny.device)
    ratio = (tiny.log_probs(tokens, is_image, mask, sampling) - old).exp()
    text, image = by_modality(mask, is_image)
    assert image.sum() > 100 and text.sum() > 100, "the batch must hold both kinds of decisions"
    assert (ratio - 1).abs().max() < 1e-3


def test_the_index_is_where_the_distribution_passes_the_number():
    logp = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25]).log().expand(6, -1)
    index, value = sample_index(logp, torch.tensor([0.0, 0.24, 0.26, 0.74, 0.76, 1 - 2 ** -24]))
    assert index.tolist() == [1, 1, 3, 3, 4, 4]
    assert value.exp().tolist() == pytest.approx([.25, .25, .5, .5, .25, .25])
    cut = torch.tensor([0.5, 0.5, 0.0, 0.0]).log()[None]
    assert sample_index(cut, torch.tensor([1 - 2 ** -24]))[0].item() == 1, "what is cut is never sampled"
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0))
    many, _ = sample_index(logp[:1].expand(20_000, -1), uniform)
    shares = torch.bincount(many, minlength=5) / 20_000
    assert shares.tolist() == pytest.approx([0, .25, 0, .5, .25], abs=0.015)


def test_what_is_cut_is_never_sampled_where_sums_are_rounded_in_any_order(monkeypatch):
    """A GPU sums in blocks. Here every sum is off by up to 1e-3, so that many numbers land on what is cut."""
    sums = torch.Tensor.cumsum
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda x, dim: sums(x, dim) + 1e-3 * torch.rand(x.shape))
    torch.manual_seed(0)
    logp = decision_logp(torch.randn(5_000, 50), Sampling(top_k=5), IMAGE)
    index, value = sample_index(logp, torch.rand(5_000))
    assert value.isfinite().all() and value.equal(logp.gather(-1, index[:, None])[:, 0])


def test_an_image_is_never_cut_and_the_budget_holds(tiny):
    N = tiny.vision_config.positions
    with torch.no_grad():
        rows = tiny.generate(prompts(tiny), 16, 30)
    assert any(r.truncated for r in rows) and any(r.is_image.any() for r in rows)
    for r in rows:
        assert len(r.tokens) <= 30
        runs = "".join("p" if i else "t" for i in r.is_image).split("t")
        assert all(len(run) in (0, N) for run in runs)
        ended = not r.is_image[-1] and int(r.tokens[-1, 0]) == tiny.text.id("</s>")
        assert ended != r.truncated
        if r.truncated:
            answer = parse_answer(r.tokens, r.is_image, tiny.text)
            assert format_reward(answer.layout, answer.texts) == 0


def test_sampled_end_and_tags_are_decisions_and_the_prompt_is_not(tiny):
    with torch.no_grad():
        rows = tiny.generate(prompts(tiny), 8, 40)
    for r in rows:
        assert r.mask[:, 0].all(), "every position of the answer was chosen"
        assert r.mask[r.is_image].all() and not r.mask[~r.is_image][:, 1:].any()


def test_gradient_flows_from_decisions_only(tiny):
    """Masked positions give no gradient; </s> does."""
    prompt = prompts(tiny)[0]
    end = torch.zeros(1, tiny.vision_config.depth, dtype=torch.long)
    end[0, 0] = tiny.text.id("</s>")
    row = prompt + Sequence(end, torch.tensor([False]))
    mask = torch.zeros(1, *row.tokens.shape, dtype=torch.bool)
    assert not tiny.log_probs(row.tokens[None], row.is_image[None], mask).requires_grad
    mask[0, -1, 0] = True
    logp = tiny.log_probs(row.tokens[None], row.is_image[None], mask)
    gradient, = torch.autograd.grad(logp.sum(), tiny.decoder.lm_head.weight)
    assert gradient[tiny.text.id("</s>")].abs().sum() > 0
    assert logp[0, :-1].eq(0).all()


@torch.no_grad()
def test_future_positions_do_not_change_earlier_states(tiny):
    row = prompts(tiny)[1]
    whole = tiny(row.tokens[None], row.is_image[None])
    part = tiny(row.tokens[None, :20], row.is_image[None, :20])
    assert torch.allclose(whole[:, :20], part, atol=1e-5)


def test_choose_from_by_hand():
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    halved = [.25 / .345, .0625 / .345, .0225 / .345, .01 / .345]
    for sampling, expected in [(Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0]), (Sampling(0.5), halved),
                               (Sampling(top_p=0.6), [2 / 3, 1 / 3, 0, 0]), (Sampling(0.0), [1, 0, 0, 0])]:
        for mode in (TEXT, IMAGE):
            assert decision_logp(logits, sampling, mode).exp().tolist() == pytest.approx(expected)
    assert guide(torch.tensor([1.0]), torch.tensor([0.5]), 3.0).item() == 2.0


def test_text_and_codes_each_follow_their_own_settings():
    """Settings as pairs, against the same settings of one modality alone."""
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    both = Sampling((0.9, 1.2), (0, 7), (0.6, 0.9))
    text, image = decision_logp(logits, both, TEXT), decision_logp(logits, both, IMAGE)
    assert torch.equal(text, decision_logp(logits, Sampling(0.9, 0, 0.6), TEXT))
    assert torch.equal(image, decision_logp(logits, Sampling(1.2, 7, 0.9), IMAGE))
    assert not torch.equal(text, image)


@torch.no_grad()
def test_greedy_words_and_sampled_codes(tiny):
    """Temperature 0 of text alone: the same words at every seed, before pictures that differ."""
    rows = [tiny.generate([tiny.prompt("a red circle", draw=True)], 1, 12, Sampling((0.0, 1.0)), [(seed,)])[0]
            for seed in range(4)]
    assert len({str(row.tokens[row.is_image].tolist()) for row in rows}) == 4
    words = [prompts(tiny)[0]] * 3
    rows = tiny.generate(words, 1, 8, Sampling((0.0, 1.0)), [(seed,) for seed in range(3)])
    first = [row.tokens[:int(row.is_image.int().argmax()) or None, 0].tolist() for row in rows]
    assert first[0] == first[1] == first[2]


@torch.no_grad()
def test_save_and_load_are_exact(tiny, tmp_path):
    save(tiny, tmp_path / "policy", {"step": 3}, {"x": torch.ones(2)})
    again = load(tmp_path)
    for name, value in tiny.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    row = prompts(tiny)[0]
    arrays = row.tokens[None], row.is_image[None]
    assert torch.equal(tiny(*arrays), again(*arrays))
    assert again.text.encode("<think>a red circle</think>") == tiny.text.encode("<think>a red circle</think>")


def test_a_kill_during_a_save_leaves_the_old_checkpoint_usable(tiny, tmp_path, monkeypatch):
    import model
    save(tiny, tmp_path / "policy", {"step": 1})

    def dies(*_, **__):
        raise KeyboardInterrupt
    monkeypatch.setattr(model, "write_tensors", dies)
    with pytest.raises(KeyboardInterrupt):
        save(tiny, tmp_path / "policy", {"step": 2})
    assert model.load_training(tmp_path / "policy")[0] == {"step": 1}
    load(tmp_path)
    (tmp_path / "policy").rename(tmp_path / "policy.old")          # killed between the two renames
    load(tmp_path)


def test_too_long_a_prompt_is_refused(tiny):
    with pytest.raises(UserError, match="context"):
        tiny.generate(prompts(tiny), 1, 10_000)
    with pytest.raises(UserError, match="context"):
        tiny.generate([tiny.prompt("red " * 400)], 1, 1)
    with pytest.raises(UserError, match="budget"):
        tiny.generate([tiny.prompt("a red circle", draw=True)], 1, 5)
    with pytest.raises(UserError, match="<image>"):
        tiny.prompt("no mark", [torch.zeros(9, 4, dtype=torch.long)])
