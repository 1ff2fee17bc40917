"""Unified GRPO on interleaved answers, Eq. (2)-(7): one trajectory, two kinds of tokens.

  1 prompts      draw P of them                                                                      `next_prompts`
  2 rollout      sample G answers each, text and codes, keeping the log-probs                        `rollout`
  3 rewards      r = r_t + r_v + r_f, and every step's own reward                   Eq. (5)          `rewards.judge`
  4 advantages   against the group: whole answer, or step by step                   Eq. (4), Eq. (6) `advantages`
  5 loss         clipped ratio, KL to the warm-up model                             Eq. (2), (3), (7) `grpo_loss`
  6 update       one optimizer update over all answers, in micro-batches                             `update`
  7 log          one line of metrics, now and then a sheet of answers

    python grpo.py                                      # two CPU cores: 1 minute, and 3 before for the warm-up model
    torchrun --nproc_per_node=2 grpo.py                 # the same on two processes, each with prompts of its own
    python grpo.py --preset paper                       # the paper's settings, QLoRA on VILA-U 7B (a GPU)
"""
import itertools
import math
import random
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import shapes
import warmup
from common import (Count, LearningRate, Natural, NonNegative, Positive, Range, Run, Share, TopP, UserError,
                    Weights, averaged, check_config, check_settings, optimizer_tensors, parse_config,
                    peak_gib, restore_optimizer, run_main, start_processes)
from data import (PROMPT_READERS, CodeCache, LeftOut, Sample, keep_usable, read_prompts, read_sources,
                  toy_prompt)
from evaluate import before_and_after
from model import (Sampling, Trajectory, UnifiedModel, by_modality, check_budget, load, load_training,
                   prepare_training, restore, save, trainable_state, with_trainable)
from rewards import Scores, check_judges, group_record, hybrid_rewards, judge, judge_names, make_judges
from tokenizer import Answer, pad

SPREAD = 1e-3         # a group whose rewards have a smaller standard deviation says nothing: exact zeros
EPSILON = 1e-4        # added to the standard deviation in Eq. (4) and Eq. (6)


@dataclass
class Config:
    # -- data
    model: str = "out/warmup"                # warm-up model: run directory, checkpoint folder or hub id; the KL's reference
    prompts: str = ""                        # JSONL file, or NAME=DIR,.. as warmup.py --data; empty: the toy world's
    edits: Count = 3                         # edits that a toy prompt asks for
    # -- algorithm
    updates: Count = 40                      # optimizer updates of the run
    prompts_per_update: Count = 16           # P: prompts a rollout
    group_size: Annotated[int, Range(2)] = 4 # G in Eq. (2): answers a prompt; one alone has nothing to be compared with
    epochs_per_rollout: Count = 1            # updates on the same answers; from the second on ratio and clip act
    micro_batch: Count = 64                  # answers a forward pass; changes memory, never the gradient
    lr: LearningRate = 2e-4                  # of Adam; reached after RAMP updates
    clip: Share = 0.2                        # eps in Eq. (2)
    kl: NonNegative = 0.2                    # beta in Eq. (2)
    credit: Literal["process", "outcome"] = "process"    # process: Eq. (6), each step by its rewards; outcome: Eq. (4)
    step_discount: Share = 0.5               # gamma of Eq. (6): 1 is the sum as printed, 0 each step's own reward
    normalise: Literal["kind", "all"] = "kind"    # step rewards of Eq. (6): per kind (text, image), or one pool (all)
    per_modality: bool = False               # loss: text mean + image mean instead of 1/|Y| over all decisions
    # -- rewards
    text_reward: str = "rules"               # judge of r_t, NAME or NAME=FOLDER
    visual_reward: str = "rules"             # judge of r_v, NAME or NAME=FOLDER
    reward_weights: Weights = (1.0, 1.0, 1.0)    # of r_t, r_v and r_f in Eq. (5); 0 leaves one out
    reward_device: str = ""                  # where learned judges run; empty: with the policy
    critic_quantize: Literal["none", "nf4"] = "none"    # nf4: the critic's decoder in 4 bits
    # -- sampling
    temperature: Positive = 1.0              # of the rollouts, text and codes alike
    top_k: Natural = 0                       # 0: off
    top_p: TopP = 1.0                        # 1: off
    guidance: NonNegative = 1.0              # 1: the model itself; else rollouts and scoring run the guided distribution
    budget: Count = 160                      # positions that an answer may have
    # -- adapters
    lora_rank: Natural = 0                   # rank of adapters on the decoder's linear layers; 0: train the whole policy
    lora_alpha: Positive = 16.0              # adapters are scaled by alpha / rank
    quantize: Literal["none", "nf4"] = "none"    # nf4: the frozen base in 4 bits (QLoRA)
    checkpointing: bool = False              # recompute layers in the backward pass: less memory, a third more time
    # -- run
    out: str = "out/grpo"                    # run directory
    seed: int = 0                            # of prompts and sampling
    device: str = "auto"                     # cpu, cuda, mps; auto takes the best there is
    save_every: Count = 10                   # updates between checkpoints
    resume: bool = True                      # go on where a run of the same settings stopped; --no-resume starts over
    eval_prompts: Natural = 96               # held-out prompts of the evaluation before and after; 0: none
    eval_guidance: NonNegative = 0.0         # guidance of that evaluation; 0: that of the rollouts
    preset: str = ""                         # paper: the paper's settings on VILA-U 7B, see PAPER; flags beside it win


RAMP = 5                                     # updates until the learning rate is reached
FREE = ("device", "reward_device", "save_every", "updates", "resume", "eval_prompts", "eval_guidance", "out",
        "micro_batch", "checkpointing", "preset")      # settings that may change when a run goes on

# --preset paper: what the paper states is marked so; the rest is ours and fits one GPU (the paper's QLoRA variant).
PAPER = dict(
    model="out/warmup-7b",                                        # what warmup.py --preset paper --out wrote
    group_size=4, updates=3000, eval_guidance=3.0,                # paper; 256 x 256 pictures come with the model
    step_discount=1.0, normalise="all", credit="process",         # paper, Eq. (6) as printed
    text_reward="llava-critic", visual_reward="image-reward",     # paper, Eq. (5)
    reward_weights=(1.0, 1.0, 1.0),                               # paper, Eq. (5)
    critic_quantize="nf4",                                        # ours
    lora_rank=64, lora_alpha=16.0, quantize="nf4", checkpointing=True,             # ours
    prompts_per_update=8, micro_batch=2, lr=2e-5, kl=0.04, budget=1024,            # ours
    save_every=50, eval_prompts=32,                                                # ours
)


# ------------------------------------------------------------------------------------------------------------
# Advantages


def normalise(rewards: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-4) over the last dimension, NaN = no reward: it takes no part and gets 0.

    Choice: torch's unbiased std, and exact zeros where it is below SPREAD: rounding noise must not train.
    """
    known = ~rewards.isnan()
    count = known.sum(-1, keepdim=True)
    mean = rewards.nansum(-1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(known, rewards - mean, 0.0)
    std = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(std < SPREAD, 0.0, centred / (std + EPSILON))


def outcome_advantages(rewards: Tensor) -> Tensor:
    """Eq. (4): rewards [P, G] -> advantages [P, G], the same for every decision of an answer."""
    return normalise(rewards)


def process_advantages(step_rewards: list[list[float]], kinds: list[list[str]] | None = None,
                       discount: float = 1.0, weights: list[list[float]] | None = None) -> list[Tensor]:
    """Eq. (6) for one group: the rewards of each answer's steps (K_i of them, NaN = none) -> advantage of every step.

    All step rewards of the group are normalised together to r~, and the decisions of step j receive
    sum_{k >= j} discount^(k - j) r~_k. discount 1 is the equation as printed; 0 is each step's own reward. With `kinds`
    the pool is one per kind of step, so that a kind that scores lower on average is not worth less. `weights` (those of
    r_t and r_v) multiply r~.

        rewards of two answers [[1, 0], [1, 1]] -> r~ [[.5, -1.5], [.5, .5]] -> [[-1, -1.5], [1, .5]]
    """
    flat = torch.tensor([r for answer in step_rewards for r in answer], dtype=torch.float32)
    names = [k for answer in kinds for k in answer] if kinds else ["step"] * len(flat)
    fair = torch.zeros_like(flat)
    for name in set(names):
        pool = torch.tensor([n == name for n in names])
        fair[pool] = normalise(flat[pool])
    if weights:
        fair = fair * torch.tensor([w for answer in weights for w in answer])
    result = []
    for own in fair.split([len(answer) for answer in step_rewards]):
        to_go, total = torch.zeros_like(own), torch.tensor(0.0)
        for j in range(len(own) - 1, -1, -1):
            total = to_go[j] = own[j] + discount * total                                   # Eq. (6)
        result.append(to_go)
    return result


# ------------------------------------------------------------------------------------------------------------
# The loss


def k3_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Eq. (7): pi_ref/pi - log(pi_ref/pi) - 1, a decision's unbiased, non-negative estimate of KL(pi || pi_ref)."""
    log_ratio = ref_logp - logp
    return log_ratio.exp() - log_ratio - 1


def decision_weights(mask: Tensor, is_image: Tensor, image_weight: float = 1.0, per_modality: bool = False) -> Tensor:
    """What every decision of an answer counts, [B, T, D]. 1/|Y_i| each is Eq. (2) as printed.

    image_weight scales codes against text before the division; per_modality gives the text mean plus image_weight
    times the image mean instead, so that 1,024 codes do not drown 20 words.
    """
    text, image = by_modality(mask, is_image)
    if per_modality:
        return text / text.sum((1, 2), keepdim=True).clamp(min=1) + \
            image_weight * image / image.sum((1, 2), keepdim=True).clamp(min=1)
    weights = text + image_weight * image
    return weights / weights.sum((1, 2), keepdim=True)                                     # 1/|Y_i|


def grpo_loss(logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor, weights: Tensor, eps: float,
              beta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (2), to be minimised: all arguments [B, T, D] -> loss of each answer [B], ratio and KL [B, T, D].

    With one update per rollout the ratio is 1 everywhere and the clip never acts; from the second on both do. A code
    that truncated sampling has cut since has logp -inf, ratio 0 and no gradient; its KL term is dropped.
    """
    ratio = (logp - old_logp).exp()                                                        # Eq. (3), text and codes
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages)
    both = logp.isfinite() & ref_logp.isfinite()
    kl = k3_kl(torch.where(both, logp, 0.0), torch.where(both, ref_logp, 0.0))             # Eq. (7)
    objective = torch.where(weights > 0, surrogate - beta * kl, 0.0)                       # Eq. (2)
    return -(objective * weights).sum((1, 2)), ratio, kl


# ------------------------------------------------------------------------------------------------------------
# Steps 1-4: prompts, rollout, rewards, advantages


def prompt_pool(config: Config) -> tuple[list[Sample], LeftOut]:
    """--prompts: a file of one's own, or the prompt side of published data; none for the toy world's. Raises UserError
    for prompts that the rule judges cannot judge."""
    left_out = LeftOut(strict="=" not in config.prompts or Path(config.prompts).is_file())
    if left_out.strict:
        pool = read_prompts(Path(config.prompts)) if config.prompts else []
    else:
        samples = read_sources(config.prompts, "--prompts", PROMPT_READERS, left_out)
        pool = [Sample(s.prompt, s.prompt_pictures, origin=s.origin) for of in samples.values() for s in of]
    weights = config.reward_weights
    ruled = [w and name == "rules" for w, name in zip(weights, (config.text_reward, config.visual_reward))]
    for sample in pool:
        if any(ruled) and shapes.wanted_steps(sample.prompt) is None:
            raise UserError(f"--prompts {config.prompts}: the rule judges know only the toy world's edits, not "
                            f"{sample.prompt[:60]!r}; choose --text-reward and --visual-reward, or give them weight 0")
    return pool, left_out


def ready_pool(pool: list[Sample], left_out: LeftOut, policy: UnifiedModel, codes: CodeCache, config: Config,
               world: int) -> list[Sample]:
    """The prompts in a shuffled order, as many as the run can draw, their pictures encoded. What cannot be used is left
    out (or refused, if the file is one's own) before training."""
    draws = config.updates // config.epochs_per_rollout * config.prompts_per_update * world
    order = random.Random(config.seed).sample(pool, len(pool))
    ready = list(itertools.islice(keep_usable(order, policy, codes, left_out, config.budget), draws))
    if pool and not ready:
        raise UserError(f"--prompts {config.prompts}: no usable prompt is left")
    return ready


def next_prompts(config: Config, update: int, rank: int, pool: list[Sample], world: int = 1) -> list[Sample]:
    """The prompts of one rollout: the next of the pool, from its start again when it is through, or the toy world's. A
    function of seed, update and rank alone, so that a resumed run draws the same."""
    if pool:
        first = (update // config.epochs_per_rollout * world + rank) * config.prompts_per_update
        return [pool[(first + i) % len(pool)] for i in range(config.prompts_per_update)]
    rng = random.Random(f"{config.seed}/{update}/{rank}")
    return [toy_prompt(rng, config.edits, "train") for _ in range(config.prompts_per_update)]


@dataclass
class Rollout:
    """P * G answers to one draw of prompts, group after group, padded to one batch."""
    samples: list[Sample]            # the prompts, [P]
    trajectories: list[Trajectory]   # [P * G]
    answers: list[Answer]
    scores: list[Scores]
    tokens: Tensor                   # [B, T, D], prompts included
    is_image: Tensor                 # [B, T]
    mask: Tensor                     # [B, T, D], True on the policy's decisions
    old_logp: Tensor                 # [B, T, D], kept while sampling
    advantages: Tensor               # [B, T, D]
    by_answer: list[Tensor]          # the advantages without prompts and padding, [T, 1] an answer
    zero_spread: float               # share of groups that say nothing
    judging: float                   # seconds that the judges took


def rollout(policy: UnifiedModel, samples: list[Sample], config: Config, judges: tuple, codes: CodeCache,
            generator: torch.Generator) -> Rollout:
    """Sample G answers for each prompt, judge them, and compare each with its group."""
    prompts = [policy.prompt(s.prompt, codes(s.prompt_pictures)) for s in samples]
    trajectories = policy.generate(prompts, config.group_size, config.budget, sampling_of(config), generator)
    answers = policy.read_answers(trajectories)
    began = time.perf_counter()
    scores = judge([s.prompt for s in samples for _ in range(config.group_size)], answers, *judges)
    judging = time.perf_counter() - began
    per_answer, zero_spread = advantages(answers, scores, config)

    def whole(field: str) -> Tensor:                        # the answers' arrays behind their prompts', as one batch
        rows = [getattr(t, field) for t in trajectories]
        before = [getattr(t.prompt, field) if hasattr(t.prompt, field) else r.new_zeros(len(t.prompt), *r.shape[1:])
                  for t, r in zip(trajectories, rows)]
        return pad([torch.cat(pair) for pair in zip(before, rows)]).to(policy.device)

    lengths = [len(t.prompt) for t in trajectories]
    padded = pad([F.pad(a, (0, 0, n, 0)) for n, a in zip(lengths, per_answer)]).to(policy.device)
    return Rollout(samples, trajectories, answers, scores, whole("tokens"), whole("is_image"), whole("mask"),
                   whole("logp"), padded, per_answer, zero_spread, judging)


def advantages(answers: list[Answer], scores: list[Scores], config: Config) -> tuple[list[Tensor], float]:
    """Scores of P groups -> the advantage of every decision, [T, D] or [T, 1] an answer, and the share of groups whose
    advantages are all zero.

    credit "outcome": Eq. (4) of the hybrid reward, one number an answer. credit "process": Eq. (6) of the step rewards;
    the format reward comes with the last token and belongs to the text decisions (no code can mend a tag).
    """
    G, weights = config.group_size, config.reward_weights
    worth = dict(zip("tvf", weights))
    result = []
    for g in range(0, len(answers), G):
        group, said = answers[g:g + G], scores[g:g + G]
        if config.credit == "outcome":
            values = outcome_advantages(torch.tensor(hybrid_rewards(said, weights)))
            result += [values[i].expand(len(a.step_of), 1) for i, a in enumerate(group)]
            continue
        kinds = [["v" if s.text is None else "t" for s in a.segments] for a in group]
        rewards = [[math.nan if r is None or not worth[k] else r for r, k in zip(s.steps, names)]
                   for s, names in zip(said, kinds)]
        steps = process_advantages(rewards, kinds if config.normalise == "kind" else None, config.step_discount,
                                   [[worth[k] for k in names] for names in kinds])
        form = outcome_advantages(torch.tensor([s.format for s in said])) * worth["f"]
        for i, (answer, values) in enumerate(zip(group, steps)):
            own = F.pad(values, (0, 1))[answer.step_of]                  # what follows the last step belongs to none
            result.append(torch.where(answer.is_image, own, own + form[i])[:, None])
    silent = [all(not a.any() for a in result[g:g + G]) for g in range(0, len(result), G)]
    return result, sum(silent) / len(silent)


# ------------------------------------------------------------------------------------------------------------
# Step 6: update


class Scorer(torch.nn.Module):
    """The scoring function as a module's forward, the form that DistributedDataParallel wraps."""

    def __init__(self, model: UnifiedModel):
        super().__init__()
        self.model = model

    def forward(self, *arguments) -> Tensor:
        return self.model.log_probs(*arguments)


def update(scorer: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: Rollout, ref_logp: Tensor,
           config: Config) -> dict:
    """One optimizer update on all answers of a rollout -> metrics, each a mean over what it averages.

    The loss is the mean over all answers of the update, counted before micro-batches are cut: their size cannot change
    the gradient. Raises UserError on a loss that is not finite, before any weight moves.
    """
    B, sampling = len(batch.tokens), sampling_of(config)
    weights = decision_weights(batch.mask, batch.is_image, per_modality=config.per_modality)
    text, image = by_modality(batch.mask, batch.is_image)
    counts = {"text": max(1, int(text.sum())), "image": max(1, int(image.sum()))}
    total, sums = 0.0, {}
    optimizer.zero_grad()
    for start in range(0, B, config.micro_batch):
        part = slice(start, start + config.micro_batch)
        last = start + config.micro_batch >= B
        with scorer.no_sync() if hasattr(scorer, "no_sync") and not last else nullcontext():
            logp = scorer(batch.tokens[part], batch.is_image[part], batch.mask[part], sampling)
            loss, ratio, kl = grpo_loss(logp, batch.old_logp[part], ref_logp[part],
                                        batch.advantages[part].expand_as(logp), weights[part], config.clip, config.kl)
            loss = loss.sum() / B                           # 1/G of Eq. (2), over all groups of the update
            if not loss.isfinite():
                raise UserError(f"the loss became {loss.item()}: stopped before the update; the last good checkpoint "
                                f"is intact (lower --lr, or raise --kl)")
            loss.backward()
        total += loss.item()
        with torch.no_grad():
            clipped = ((ratio - 1).abs() > config.clip).float()
            for name, of in (("text", text[part]), ("image", image[part])):
                for key, value in ((f"kl/{name}", kl), (f"clip_frac/{name}", clipped)):
                    sums[key] = sums.get(key, 0.0) + value[of].sum().item() / counts[name]
            sums["ratio_max"] = max(sums.get("ratio_max", 0.0), ratio[batch.mask[part]].max().item())
    norm = torch.nn.utils.clip_grad_norm_(scorer.parameters(), 1.0)
    optimizer.step()
    return {"loss": total, "grad_norm": norm.item(), **sums}


# ------------------------------------------------------------------------------------------------------------
# The loop


def sampling_of(config: Config) -> Sampling:
    """The distribution that rollouts draw from and every log-probability is taken under."""
    return Sampling(config.temperature, config.top_k, config.top_p, config.guidance)


def check(config: Config) -> None:
    """Settings that cannot work, found before anything is loaded."""
    check_config(config)
    if config.updates % config.epochs_per_rollout:
        raise UserError(f"--updates {config.updates}: expected a multiple of --epochs-per-rollout "
                        f"{config.epochs_per_rollout}")
    check_judges(config)



def rollout_metrics(batch: Rollout, weights: tuple[float, float, float]) -> dict:
    """What one rollout looks like: reward parts, form and balance."""
    def mean(values) -> float:
        values = [v for v in values if v is not None]
        return sum(values) / max(1, len(values))
    text, _ = by_modality(batch.mask, batch.is_image)
    return {"reward": mean(hybrid_rewards(batch.scores, weights)), "reward/text": mean(s.text for s in batch.scores),
            "reward/visual": mean(s.visual for s in batch.scores),
            "reward/format": mean(s.format for s in batch.scores),
            "zero_spread": batch.zero_spread, "steps_per_answer": mean(len(a.segments) for a in batch.answers),
            "truncated": mean(t.truncated for t in batch.trajectories),
            "text_share": text.sum().item() / batch.mask.sum().item(),
            "no_score": mean(float(r is None) for s in batch.scores for r in s.steps)}


def train(config: Config, rank: int, world: int, device: torch.device) -> list[Sample]:
    """Steps 1 to 7, from the last checkpoint on -> the pool of prompts, empty for the toy world's."""
    folder = Path(config.out)
    state, tensors = load_training(folder / "policy") if config.resume else (None, {})
    check_settings(folder, (state or {}).get("settings", {}), asdict(config), FREE)
    weights = config.reward_weights
    pool, left_out = prompt_pool(config)
    policy = load(config.model, device, config.quantize)
    prepare_training(policy, config.lora_rank, config.lora_alpha, config.seed)
    # Choice: the KL's reference is the policy with its first values (see `with_trainable`): of an adapter, no second base.
    reference = trainable_state(policy)
    if state:
        restore(policy, folder / "policy")
    policy.decoder.checkpointing = config.checkpointing
    check_budget(policy, config.budget, config.model)
    optimizer = torch.optim.Adam(policy.policy_parameters(), lr=config.lr, betas=(0.9, 0.95))
    restore_optimizer(optimizer, tensors)
    scorer = Scorer(policy)
    if world > 1:
        # a rollout without a single picture leaves the image head out
        scorer = torch.nn.parallel.DistributedDataParallel(scorer, find_unused_parameters=True)
    judges = make_judges(config, device)
    codes, sampling = CodeCache(policy), sampling_of(config)
    pool = ready_pool(pool, left_out, policy, codes, config, world)
    if pool and rank == 0:
        print("\n".join([f"{len(pool):,} prompts are ready", *(f"{k}: {n:,}" for k, n in left_out.reasons().items())]))
    run = Run(config, state["lines"] if state else 0) if rank == 0 else None
    first, dead = state["step"] if state else 0, 0
    if rank == 0 and first >= config.updates:
        print(f"{folder} is finished: {first} updates (more with --updates, afresh with --no-resume)")
    if rank == 0 and first == 0 and config.eval_prompts:
        show(policy, run, config, pool, judges, "000000_before", "Before GRPO: the warm-up model")
    bar = tqdm(range(first, config.updates, config.epochs_per_rollout), desc="grpo", disable=rank > 0,
               initial=first // config.epochs_per_rollout, total=config.updates // config.epochs_per_rollout)
    for step in bar:
        began = time.perf_counter()
        generator = torch.Generator().manual_seed((config.seed * 1_000_003 + step) * 1_009 + rank)
        batch = rollout(policy, next_prompts(config, step, rank, pool, world), config, judges, codes, generator)   # 1-4
        sampled = time.perf_counter()
        with torch.no_grad(), with_trainable(policy, reference):
            parts = zip(*(x.split(config.micro_batch) for x in (batch.tokens, batch.is_image, batch.mask)))
            ref_logp = torch.cat([policy.log_probs(*part, sampling) for part in parts])
        compared = time.perf_counter()
        for epoch in range(config.epochs_per_rollout):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, (step + epoch + 1) / RAMP)
            metrics = update(scorer, optimizer, batch, ref_logp, config)                                     # 5, 6
        now = time.perf_counter()
        metrics = averaged({**rollout_metrics(batch, weights), **metrics, "seconds": now - began,
                            "seconds/rollout": sampled - began - batch.judging, "seconds/reward": batch.judging,
                            "seconds/reference": compared - sampled, "seconds/update": now - compared,
                            "peak_gib": peak_gib(device)}, world, device)
        done = step + config.epochs_per_rollout
        dead = dead + 1 if metrics["zero_spread"] == 1 else 0
        if rank:
            continue
        if dead == 3:
            tqdm.write("warning: three rollouts in a row had no spread in any group: every advantage is zero and "
                       "nothing is learned (other prompts, a higher --temperature or other --reward-weights may help)")
        run.log(step=done, **metrics)                                                                        # 7
        bar.set_postfix({k: f"{metrics[v]:.3f}" for k, v in
                         {"reward": "reward", "text": "reward/text", "visual": "reward/visual",
                          "format": "reward/format", "kl/image": "kl/image"}.items()})
        if done // config.save_every > step // config.save_every or done == config.updates:
            G = config.group_size
            groups = [group_record(s, batch.answers[i * G:i * G + G], batch.scores[i * G:i * G + G],
                                  batch.by_answer[i * G:i * G + G]) for i, s in enumerate(batch.samples[:3])]
            run.sample(f"{done:06d}", f"Rollout of update {done}", groups, said_by(judges))
            save(policy, folder / "policy", {"step": done, "lines": run.lines, "settings": asdict(config)},
                 optimizer_tensors(optimizer))
    if rank == 0 and first < config.updates and config.eval_prompts:
        show(policy, run, config, pool, judges, "999999_after", "After GRPO: the same prompts")
    return pool


def show(policy: UnifiedModel, run: Run, config: Config, pool: list[Sample], judges: tuple, name: str,
         title: str) -> None:
    """Groups of answers to fixed prompts with a fixed seed, the same before and after: held-out ones of the toy world,
    or the first of --prompts."""
    rng = random.Random("show")
    samples = pool[:4] or [toy_prompt(rng, config.edits, "heldout") for _ in range(4)]
    batch = rollout(policy, samples, replace(config, group_size=3), judges, CodeCache(policy),
                    torch.Generator().manual_seed(0))
    groups = [group_record(s, batch.answers[3 * i:3 * i + 3], batch.scores[3 * i:3 * i + 3],
                          batch.by_answer[3 * i:3 * i + 3]) for i, s in enumerate(samples)]
    run.sample(name, title, groups, said_by(judges))


def said_by(judges: tuple, most: int = 24) -> list[dict]:
    """What a learned text judge was asked last, what it replied and how that was read, for the report."""
    latest = list(getattr(judges[0], "seen", ()))[-most:]
    return [{"question": question, "reply": reply, "score": score} for question, reply, score in latest]


def main() -> None:
    """Warm-up model if there is none, training, evaluation before and after."""
    config = parse_config(Config, presets={"paper": PAPER},
                          names={"text_reward": judge_names("text"), "visual_reward": judge_names("visual")})
    check(config)
    rank, world, device = start_processes(config.device)
    if rank == 0 and config.model == Config.model and not warmup.is_done(Path(config.model)):
        print(f"no warm-up model in {config.model} yet: training it first, once (about 3 minutes on two CPU cores)")
        warmup.warm_up(warmup.Config(device=config.device))
    if world > 1:
        dist.barrier()
    pool = train(config, rank, world, device)
    if world > 1:
        dist.destroy_process_group()
    if rank == 0:
        before_and_after(config, toy=all(shapes.wanted_steps(sample.prompt) for sample in pool))
if __name__ == "__main__":
    run_main(main)
