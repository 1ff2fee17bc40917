"""Unified GRPO on interleaved answers, Eq. (2)-(7): one trajectory, two kinds of tokens.

  1 prompts      the next P of them                                                 `next_prompts`
  2 rollout      sample G answers each, text and codes, keeping the log-probs       `rollout`
  3 rewards      r = r_t + r_v + r_f, and each step's own    Eq. (5)                `rewards.judge`
  4 advantages   against the group: whole answer, or steps   Eq. (4), Eq. (6)       `advantages`
  5 loss         clipped ratio, KL to the warm-up model      Eq. (2), (3), (7)      `grpo_loss`
  6 update       one optimizer update over all answers, in micro-batches            `update`
  7 log          one line of metrics, now and then a sheet of answers               `train`

    python grpo.py                          # two CPU cores: train a warm-up model if there is none, then GRPO
    python grpo.py --explain                # one prompt through one update, with all its numbers
    torchrun --nproc_per_node=2 grpo.py     # two processes share the prompts of each update
    python grpo.py --preset paper --prompts FILE        # the paper's settings, QLoRA on VILA-U 7B (a GPU)
    torchrun --nproc_per_node=8 --nnodes=4 grpo.py --preset paper-full --prompts FILE   # all of it (32 GPUs)
"""
from common import (LEGEND, Count, LearningRate, Natural, Naturals, NonNegative, Part, Positive, Positives,
                    Range, Run, Seed, Share, TopPs, UserError, Weights, average_gradients, averaged,
                    check_config, check_content, check_finite, check_settings, claim, end_processes,
                    group_html, note_processes, optimizer_tensors, parse_config, part_html, part_text,
                    parts_of, peak_gib, require, restore_optimizer, rounded, run_main, settled, shown,
                    start_over, start_processes, thumbnail, whole, write_page)

import itertools
import math
import random
import statistics
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import warmup
from data import (PROMPT_READERS, CodeCache, LeftOut, Sample, hash_samples, keep_usable, read_prompts,
                  read_sources, toy_prompt)
from evaluate import before_and_after
from model import (IMAGE, Sampling, UnifiedModel, adapter_settings, as_batch, base_of, by_modality,
                   check_budget, check_memory, checkpoint_folder, checkpoint_hash, gathered, load,
                   load_training, prepare_training, restore, save, trainable_state, unpacked, with_trainable)
from rewards import (Scores, check_judges, check_prompts, check_rules, group_record, hybrid_rewards, judge,
                     judge_content, judge_names, make_judges)

SPREAD = 1e-3         # a group whose rewards have a smaller standard deviation says nothing: exact zeros
EPSILON = 1e-4        # added to the standard deviation in Eq. (4) and Eq. (6)


@dataclass
class Config:
    # -- data
    model: str = "out/warmup"                # warm-up model, KL reference: run directory, folder or hub id
    base: str = ""                           # where the base of adapters in --model is now, if it was moved
    prompts: str = ""                        # JSONL file, or NAME=DIR,..; empty: the toy world's
    edits: Count = 3                         # edits that a toy prompt asks for
    # -- algorithm
    updates: Count = 40                      # optimizer updates of the run
    prompts_per_update: Count = 16           # P: prompts a rollout
    group_size: Annotated[int, Range(2)] = 4  # G in Eq. (2): answers a prompt, compared with each other
    epochs_per_rollout: Count = 1            # updates on the same answers; the clip acts from the second on
    micro_batch: Count = 64                  # answers a forward pass; changes memory, never the gradient
    lr: LearningRate = 2e-4                  # of Adam
    ramp: Natural = 5                        # updates until --lr is reached; 0: at once
    clip: Share = 0.2                        # eps in Eq. (2)
    kl: NonNegative = 0.2                    # beta in Eq. (2)
    kl_text: NonNegative | None = None       # beta of text tokens; by default that of --kl
    kl_image: NonNegative | None = None      # beta of image codes; by default that of --kl
    credit: Literal["process", "outcome"] = "process"    # process: Eq. (6); outcome: Eq. (4)
    step_discount: Share = 0.5               # gamma of Eq. (6): 1 is the sum as printed, 0 the step alone
    normalise: Literal["kind", "all"] = "kind"    # pools of Eq. (6): text and image apart, or all as one
    per_modality: bool = False               # loss: text mean + image mean instead of 1/|Y|
    # -- rewards
    text_reward: str = "rules"               # judge of r_t, NAME or NAME=FOLDER
    visual_reward: str = "rules"             # judge of r_v, NAME or NAME=FOLDER
    reward_weights: Weights = (1.0, 1.0, 1.0)    # of r_t, r_v and r_f in Eq. (5); 0 leaves one out
    reward_device: str = ""                  # where learned judges run; empty: with the policy
    critic_quantize: Literal["none", "nf4"] = "none"    # nf4: the critic's decoder in 4 bits
    critic_tiles: Natural = 0                # the critic: tiles of a picture at most; 0: as published
    # -- sampling
    temperature: Positives = 1.0             # of the rollouts; two numbers: of text tokens, of image codes
    top_k: Naturals = 0                      # 0: off; two: of text tokens, of image codes
    top_p: TopPs = 1.0                       # 1: off; two: of text tokens, of image codes
    guidance: NonNegative = 1.0              # 1: off; else rollouts and scoring both are guided
    score_guided: bool = True                # --no-score-guided: rollouts alone, as public codes do (biased)
    budget: Count = 160                      # positions that an answer may have
    rows: Natural = 0                        # answers in the KV cache at a time; 0: as many as fit the device
    # -- adapters
    lora_rank: Natural = 0                   # rank of the decoder's adapters; 0: train the whole policy
    lora_alpha: Positive = 16.0              # adapters are scaled by alpha / rank
    quantize: Literal["none", "nf4"] = "none"    # nf4: the frozen base in 4 bits (QLoRA)
    unpack: bool = False                     # nf4: a full copy of the base in rollouts: faster, more memory
    checkpointing: bool = False              # recompute layers in the backward pass: less memory, more time
    # -- run
    out: str = "out/grpo"                    # run directory
    seed: Seed = 0                           # of prompts and sampling
    precision: Literal["auto", "float32", "bf16"] = "auto"    # of the passes; auto: bf16 on a GPU
    device: str = "auto"                     # cpu, cuda, mps; auto takes the best there is
    save_every: Count = 10                   # updates between checkpoints
    resume: bool = True                      # go on from the last checkpoint; --no-resume starts over
    eval_prompts: Natural = 96               # held-out prompts of the evaluation before and after; 0: none
    eval_sampling: Literal["rollouts", "published"] = "rollouts"    # published: as VILA-U and the paper do
    explain: bool = False                    # print one prompt's way through one update, and stop
    preset: str = ""                         # paper: QLoRA on VILA-U 7B; paper-full: all of it, on 32 GPUs


FREE = ("model", "base", "prompts", "text_reward", "visual_reward",            # compared by their content
        "device", "reward_device", "save_every", "updates", "resume", "eval_prompts", "eval_sampling", "out",
        "rows", "micro_batch", "unpack", "checkpointing", "precision", "preset")    # may change on resuming

# --preset paper: what the paper states is marked so. The rest is ours and fits one GPU (the QLoRA variant).
PAPER = dict(
    model="out/warmup-7b",                                        # what warmup.py --preset paper --out wrote
    group_size=4, updates=3000, eval_sampling="published",        # paper; the model brings 256 x 256 pictures
    step_discount=1.0, normalise="all", credit="process",         # paper, Eq. (6) as printed
    text_reward="llava-critic", visual_reward="image-reward",     # paper, Eq. (5)
    reward_weights=(1.0, 1.0, 1.0),                               # paper, Eq. (5)
    critic_quantize="nf4",                                        # ours
    lora_rank=64, lora_alpha=16.0, quantize="nf4", checkpointing=True,             # ours
    prompts_per_update=8, micro_batch=2, lr=2e-5, kl=0.04, budget=1024,            # ours
    save_every=50, eval_prompts=32,                                                # ours
)
# --preset paper-full: the paper's own full fine-tune, without adapters and 4-bit weights.
PAPER_FULL = PAPER | dict(
    model="out/warmup-7b-full",                                   # of warmup.py --preset paper-full
    lora_rank=0, quantize="none",                                 # paper
    prompts_per_update=32, micro_batch=2, lr=1e-6,                # ours; the paper has 32 GPUs
)
PRESETS = {"paper": PAPER, "paper-full": PAPER_FULL}


# ------------------------------------------------------------------------------------------------------------
# Advantages

def normalise(rewards: Tensor) -> Tensor:
    """(r - mean) / (std + 1e-4) over the last dimension. NaN is no reward: it takes no part and gets 0.

    Choice: torch's unbiased std, and exact zeros where it is below SPREAD: rounding noise must not train.
    """
    known = ~rewards.isnan()
    count = known.sum(-1, keepdim=True)
    mean = rewards.nansum(-1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(known, rewards - mean, 0.0)
    std = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return torch.where(std < SPREAD, 0.0, centred / (std + EPSILON))


def outcome_advantages(rewards: Tensor) -> Tensor:
    """Eq. (4): rewards [..., G] -> advantages [..., G], the same for every decision of an answer."""
    return normalise(rewards)


def process_advantages(step_rewards: list[list[float]], kinds: list[list[str]] | None = None,
                       discount: float = 1.0, weights: list[list[float]] | None = None) -> list[Tensor]:
    """Eq. (6) for one group: the rewards of each answer's steps (NaN: none) -> the advantage of every step.

    All step rewards of the group are normalised together to r~. The decisions of step j receive
    sum_{k >= j} discount^(k - j) r~_k. `weights` (those of r_t and r_v) multiply r~.

    Choice: discount 1 is the equation as printed. An early token then receives the summed rewards of all
    later steps, of which one is about it. 0 is each step's own reward. The default lies between.
    Choice: with `kinds` each kind of step is normalised by itself. One pool, as printed, pays a policy for
    more or fewer pictures where the two kinds' means differ.

        rewards [[1, 0], [1, 1]] -> r~ [[.5, -1.5], [.5, .5]] -> advantages [[-1, -1.5], [1, .5]]
    """
    flat = torch.tensor([r for answer in step_rewards for r in answer], dtype=torch.float32)
    names = [k for answer in kinds for k in answer] if kinds else ["step"] * len(flat)
    normalised = torch.zeros_like(flat)
    for name in set(names):
        pool = torch.tensor([n == name for n in names])
        normalised[pool] = normalise(flat[pool])
    if weights:
        normalised = normalised * torch.tensor([w for answer in weights for w in answer])
    result = []
    for own in normalised.split([len(answer) for answer in step_rewards]):
        to_go, total = torch.zeros_like(own), torch.tensor(0.0)
        for j in range(len(own) - 1, -1, -1):
            total = own[j] + discount * total                                              # Eq. (6)
            to_go[j] = total
        result.append(to_go)
    return result


def advantages(answers: list, scores: list[Scores], config: Config) -> list[Tensor]:
    """One group's answers (tokenizer.Answer) and scores -> the advantage of every position, [T, 1] an answer.

    credit "outcome": Eq. (4) of the hybrid reward, one number an answer.
    credit "process": Eq. (6) of the step rewards.
    Choice: the format reward is given with the last token and belongs to text decisions alone, because no
    code can mend a tag.
    Choice: exact zeros where all answers are the same, because there is nothing to compare. Eq. (6) alone
    would train them on the fixed differences between their steps.
    """
    contents = [(answer.layout, [(s.text, None if s.picture is None else s.picture.tobytes())
                                 for s in answer.segments]) for answer in answers]
    if all(content == contents[0] for content in contents):
        return [torch.zeros(len(answer.step_of), 1) for answer in answers]
    r_t, r_v, r_f = config.reward_weights
    if config.credit == "outcome":
        values = outcome_advantages(torch.tensor(hybrid_rewards(scores, config.reward_weights)))
        return [value.expand(len(answer.step_of), 1) for value, answer in zip(values, answers)]
    weight = {"text": r_t, "image": r_v}
    kinds = [["image" if s.text is None else "text" for s in answer.segments] for answer in answers]
    rewards = [[math.nan if r is None or not weight[kind] else r for r, kind in zip(of.steps, names)]
               for of, names in zip(scores, kinds)]
    steps = process_advantages(rewards, kinds if config.normalise == "kind" else None, config.step_discount,
                               [[weight[kind] for kind in names] for names in kinds])
    form = r_f * outcome_advantages(torch.tensor([of.format for of in scores]))
    result = []
    for answer, values, shape in zip(answers, steps, form):
        own = F.pad(values, (0, 1))[answer.step_of]            # what follows the last step belongs to none
        result.append(torch.where(answer.is_image, own, own + shape)[:, None])
    return result


# ------------------------------------------------------------------------------------------------------------
# The loss

def k3_kl(logp: Tensor, ref_logp: Tensor) -> Tensor:
    """Eq. (7): pi_ref/pi - log(pi_ref/pi) - 1, an unbiased estimate of KL(pi || pi_ref) for each decision."""
    log_ratio = ref_logp - logp
    return log_ratio.exp() - log_ratio - 1


def decision_weights(mask: Tensor, is_image: Tensor, per_modality: bool = False) -> Tensor:
    """The weight of each decision in the loss, [B, T, D]; 0 where mask is False.

    Choice: 1/|Y_i| each, Eq. (2) as printed. per_modality is the documented alternative: the mean over text
    plus the mean over codes, so that 1,024 codes do not drown 20 words.
    """
    text, image = by_modality(mask, is_image)
    if per_modality:
        n_text, n_image = (part.sum((1, 2), keepdim=True).clamp(min=1) for part in (text, image))
        return text / n_text + image / n_image
    return mask / mask.sum((1, 2), keepdim=True)                                           # 1/|Y_i|


def grpo_loss(logp: Tensor, old_logp: Tensor, ref_logp: Tensor, advantages: Tensor, weights: Tensor,
              eps: float, beta: float | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Eq. (2), to be minimised: all arguments [B, T, D] -> loss of each answer [B], ratio and KL [B, T, D].

    beta: one for all decisions, or [B, T, 1]: text tokens and image codes may have their own.

    With one update a rollout the ratio is 1 everywhere and the clip never acts; from the second on both do.
    A code that truncation has cut since has logp -inf, ratio 0 and no gradient; its KL term is dropped.
    """
    ratio = (logp - old_logp).exp()                                                        # Eq. (3)
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages)
    both = logp.isfinite() & ref_logp.isfinite()
    kl = k3_kl(torch.where(both, logp, 0.0), torch.where(both, ref_logp, 0.0))             # Eq. (7)
    objective = torch.where(weights > 0, surrogate - beta * kl, 0.0)                       # Eq. (2)
    return -(objective * weights).sum((1, 2)), ratio, kl


# ------------------------------------------------------------------------------------------------------------
# Steps 1-4: prompts, rollout, rewards, advantages

def read_pool(config: Config) -> tuple[list[Sample], LeftOut]:
    """--prompts: a file of one's own, or the prompt side of published data; no samples for the toy world's.

    Raises UserError for prompts that the rule judges cannot judge."""
    left_out = LeftOut(strict="=" not in config.prompts or Path(config.prompts).is_file())
    if not config.prompts:
        return [], left_out
    if left_out.strict:
        pool = read_prompts(Path(config.prompts))
    else:
        samples = read_sources(config.prompts, "--prompts", PROMPT_READERS, left_out)
        pool = [replace(s, answer="", answer_pictures=[]) for of_kind in samples.values() for s in of_kind]
    check_rules(config, pool)
    return pool, left_out


def ready_prompts(pool: list[Sample], left_out: LeftOut, policy: UnifiedModel, codes: CodeCache,
                  config: Config) -> list[Sample]:
    """Shuffle the prompts, keep as many as the run can use, and encode their pictures.

    Unusable prompts are dropped before training; in a user's own file they are an error."""
    needed = config.updates // config.epochs_per_rollout * config.prompts_per_update
    order = random.Random(config.seed).sample(pool, len(pool))
    ready = list(itertools.islice(keep_usable(order, policy, codes, left_out, config.budget), needed))
    if pool and not ready:
        raise UserError(f"--prompts {config.prompts}: no usable prompt is left")
    return ready


def next_prompts(config: Config, done: int, pool: list[Sample]) -> list[Sample]:
    """Choose the prompts of the rollout after `done` updates: the next of the pool, which starts over when
    it is through, or the toy world's.

    They follow from the seed and `done` alone, so a resumed run has the same."""
    P = config.prompts_per_update
    if pool:
        first = done // config.epochs_per_rollout * P
        return [pool[(first + i) % len(pool)] for i in range(P)]
    rng = random.Random(f"{config.seed}/{done}")
    return [toy_prompt(rng, config.edits, "train") for _ in range(P)]


@dataclass
class Rollout:
    """P prompts with G answers each, group after group, padded to one batch of B = P * G rows."""
    samples: list[Sample]            # the prompts, [P]
    answers: list                    # [B] of tokenizer.Answer
    scores: list[Scores]             # [B]
    tokens: Tensor                   # [B, T, D], prompts included
    is_image: Tensor                 # [B, T]
    mask: Tensor                     # [B, T, D], True on the policy's decisions
    old_logp: Tensor                 # [B, T, D], kept while sampling; in bf16 or unguided see `update`
    advantages: Tensor               # [B, T, 1]
    metrics: dict[str, float]        # means over the rollout

    def records(self, count: int, config: Config) -> list[dict]:
        """The first `count` prompts with their answers, rewards and advantages, for sheets and reports."""
        G, records = len(self.answers) // len(self.samples), []
        decided = self.mask.any(-1)                                                        # (B, T)
        for p, sample in enumerate(self.samples[:count]):
            rows = range(p * G, (p + 1) * G)
            answers, scores = [self.answers[b] for b in rows], [self.scores[b] for b in rows]
            own = [self.advantages[b, decided[b]] for b in rows]
            records.append(group_record(sample, answers, scores, own))
            records[-1]["worked"] = worked(answers, scores, config)
        return records


def rollout(policy: UnifiedModel, samples: list[Sample], config: Config, judges: tuple, codes: CodeCache,
            seeds: list[tuple]) -> Rollout:
    """Sample G answers to each prompt, judge them, and compare each with its group."""
    G, began = config.group_size, time.perf_counter()
    prompts = [policy.prompt(s.prompt, codes(s.prompt_pictures), s.kind == "t2i") for s in samples]
    with gathered(policy), unpacked(policy) if config.unpack else nullcontext():
        trajectories = policy.generate(prompts, G, config.budget, sampling_of(config), seeds, config.rows)
    answers = policy.read_answers(trajectories)
    sampled = time.perf_counter()
    scores = judge([s for s in samples for _ in range(G)], answers, *judges, config.credit)
    judged = time.perf_counter()
    groups = [slice(b, b + G) for b in range(0, len(answers), G)]
    values = [advantages(answers[g], scores[g], config) for g in groups]
    rewards = [r for g in groups for r in hybrid_rewards(scores[g], config.reward_weights)]
    tokens, is_image, mask, logp = as_batch(trajectories, policy.device)
    padded = torch.zeros(*tokens.shape[:2], 1)                                             # [B, T, 1]
    for row, t, value in zip(padded, trajectories, sum(values, [])):
        row[len(t.prompt):len(t.prompt) + len(value)] = value
    parts = ("text", "visual", "format")
    metrics = {
        "reward": mean(rewards),
        **{f"reward/{part}": mean(getattr(s, part) for s in scores) for part in parts},
        "zero_spread": mean(float(not any(a.any() for a in group)) for group in values),
        **{f"spread/{part}": mean(spread([getattr(s, part) for s in scores[g]]) for g in groups)
           for part in parts},
        "steps_per_answer": mean(len(a.segments) for a in answers),
        "truncated": mean(t.truncated for t in trajectories),
        "no_score": mean(float(missing) for s in scores for missing in s.unscored) or 0.0,
        "cut_texts": mean(float(cut) for s in scores for cut in s.cut) or 0.0,
        "seconds/rollout": sampled - began, "seconds/reward": judged - sampled}
    metrics = {name: value for name, value in metrics.items() if value is not None}        # nobody judged it
    return Rollout(samples, answers, scores, tokens, is_image, mask, logp, padded.to(policy.device), metrics)


def spread(values: list[float | None]) -> float | None:
    """The standard deviation of the values that are not None; None where there are less than two."""
    values = [v for v in values if v is not None]
    return statistics.stdev(values) if len(values) > 1 else None


def mean(values) -> float | None:
    """The mean of all processes' values that are not None; None where there is none."""
    values = [v for v in values if v is not None]
    over_all = averaged({"sum": sum(values), "count": len(values)})
    return over_all["sum"] / over_all["count"] if over_all["count"] else None


# ------------------------------------------------------------------------------------------------------------
# Steps 5 and 6: loss and update

def reference_logp(policy: UnifiedModel, reference: dict[str, Tensor], batch: Rollout,
                   config: Config) -> Tensor:
    """Log-probs [B, T, D] of the rollout under the KL's reference: the policy with its first parameters."""
    columns = (batch.tokens, batch.is_image, batch.mask)
    with torch.no_grad(), with_trainable(policy, reference):
        return torch.cat([policy.log_probs(*part, scoring_of(config))
                          for part in zip(*(column.split(config.micro_batch) for column in columns))])


def kl_weights(config: Config, is_image: Tensor) -> Tensor:
    """beta of Eq. (2) for every position, [B, T, 1]: that of text tokens or that of image codes."""
    text, image = (config.kl if own is None else own for own in (config.kl_text, config.kl_image))
    return torch.where(is_image, image, text)[..., None]


def update(policy: UnifiedModel, optimizer: torch.optim.Optimizer, batch: Rollout, ref_logp: Tensor,
           config: Config, epoch: int = 0) -> dict:
    """One optimizer update on all answers of a rollout -> metrics, each a mean over what it averages.

    epoch: how many updates this rollout has had before.

    Choice: the loss is the mean over all answers of the update, counted before micro-batches are cut, so
    their size cannot change the gradient.
    Choice: passes in bf16 give the sampler and the scorer different log-probs, and their ratio is not 1
    before any weight has moved. There, and with --no-score-guided, the first update's own pass gives the
    old ones, in batch.old_logp.
    Raises UserError on a loss that is not finite, before any weight moves.
    """
    B, sampling = len(batch.tokens), scoring_of(config)
    weights = decision_weights(batch.mask, batch.is_image, config.per_modality)
    beta, total, sums = kl_weights(config, batch.is_image), 0.0, Counter()
    optimizer.zero_grad()
    for start in range(0, B, config.micro_batch):
        part = slice(start, start + config.micro_batch)
        mask, is_image = batch.mask[part], batch.is_image[part]
        logp = policy.log_probs(batch.tokens[part], is_image, mask, sampling)
        if epoch == 0:
            gap = (logp.detach() - batch.old_logp[part])[mask].abs()
            sums["logp_gap"] += gap[gap.isfinite()].sum().item()
            if policy.pass_dtype != torch.float32 or not config.score_guided:
                batch.old_logp[part] = logp.detach()
        values = batch.advantages[part].expand_as(logp)
        loss, ratio, kl = grpo_loss(logp, batch.old_logp[part], ref_logp[part], values, weights[part],
                                    config.clip, beta[part])
        loss = loss.sum() / B                               # 1/G of Eq. (2), over all groups of the update
        check_finite("the loss", loss.item())
        loss.backward()
        total += loss.item()
        with torch.no_grad():
            sums["ratio_max"] = max(sums["ratio_max"], ratio[mask].max().item())
            clipped = ((ratio - 1).abs() > config.clip).float()
            for name, of_kind in zip(("text", "image"), by_modality(mask, is_image)):
                sums[f"count/{name}"] += of_kind.sum().item()
                sums[f"kl/{name}"] += kl[of_kind].sum().item()
                sums[f"clip_frac/{name}"] += clipped[of_kind].sum().item()
    average_gradients(optimizer)
    norm = whole(torch.nn.utils.clip_grad_norm_(policy.policy_parameters(), 1.0))
    check_finite("the gradient", norm.item())
    optimizer.step()
    sums = averaged(sums)
    means = {f"{key}/{name}": sums[f"{key}/{name}"] / (sums[f"count/{name}"] or 1)
             for key in ("kl", "clip_frac") for name in ("text", "image")}
    decisions = sums["count/text"] + sums["count/image"]
    means["text_share"] = sums["count/text"] / decisions
    if epoch == 0:
        means |= {"logp_gap": sums["logp_gap"] / decisions, "ratio_max": sums["ratio_max"]}
    return {"loss": total, "grad_norm": norm.item(), **means}


# ------------------------------------------------------------------------------------------------------------
# The loop

def sampling_of(config: Config) -> Sampling:
    """The distribution that rollouts sample from and every log-probability is taken under."""
    return Sampling(config.temperature, config.top_k, config.top_p, config.guidance)


def scoring_of(config: Config) -> Sampling:
    """The same distribution, but with --no-score-guided that without guidance.

    Two public codes for image GRPO (T2I-R1, ULM-R1) sample guided codes and score them unguided, new and old
    policy alike. Their update is about another distribution than the one that was sampled. The flag is there
    to measure what that costs.
    """
    return sampling_of(config) if config.score_guided else replace(sampling_of(config), guidance=1.0)


def check(config: Config, world: int = 1) -> None:
    """Refuse settings that cannot work before anything is loaded. Raises UserError."""
    check_config(config)
    require(config, "updates", config.updates % config.epochs_per_rollout == 0,
            f"a multiple of --epochs-per-rollout {config.epochs_per_rollout}")
    require(config, "prompts_per_update", config.prompts_per_update % world == 0,
            f"a multiple of the {world} processes, which share them")
    require(config, "reward_device", world == 1 or ":" not in config.reward_device,
            "no number: under torchrun each process has its judges on its own device")
    _, top_k, top_p = sampling_of(config).of(IMAGE)
    require(config, "score_guided", config.score_guided or (top_k == 0 and top_p == 1),
            "--score-guided where --top-k or --top-p cuts codes: without guidance they cut other ones")
    require(config, "explain", world == 1 or not config.explain, "one process, no torchrun")
    check_judges(config)
    if config.preset and not config.prompts:
        raise UserError(f"--preset {config.preset}: expected --prompts as well, a JSONL file or NAME=DIR,.. "
                        f"of published data; without it the prompts would be the toy world's")


def check_source(config: Config) -> None:
    """Refuse --no-resume where it would delete the weights that the run starts from. Raises UserError."""
    source = checkpoint_folder(config.model)
    adapter = adapter_settings(source, config.base)
    with base_of(source):
        sources = [source, checkpoint_folder(adapter["base"])] if adapter else [source]
    if settled(Path(config.out) / "policy").resolve() in [folder.resolve() for folder in sources]:
        raise UserError(f"--no-resume --out {config.out}: this would delete the model that --model "
                        f"{config.model} starts from: give the run another --out")


def start_policy(config: Config, state: dict, device: torch.device) -> tuple[UnifiedModel, dict[str, Tensor]]:
    """Load the policy, where its last checkpoint left it, and the reference, its first parameters.

    Raises UserError, before anything is loaded, where the answers do not fit the device beside it.
    """
    check_memory(config.model, config.budget, config.rows, device, config.quantize, config.base,
                 config.unpack)
    policy = load(config.model, device, config.quantize, config.base)
    require(config, "unpack", policy.quantize == "nf4" or not config.unpack,
            f"a policy in 4 bits (--quantize nf4), but that of {config.model} is not")
    prepare_training(policy, config.lora_rank, config.lora_alpha, config.seed, config.precision)
    reference = trainable_state(policy)
    if state:
        restore(policy, Path(config.out) / "policy")
    policy.decoder.checkpointing = config.checkpointing
    check_budget(policy, config.budget, config.model)
    return policy, reference


def content_of(config: Config, pool: list[Sample]) -> dict[str, str]:
    """Hashes of the weights and data that a run depends on, by flag; of a judge of weight 0 its name."""
    r_t, r_v, _ = config.reward_weights
    return {"model": checkpoint_hash(config.model), "prompts": hash_samples(pool),
            "text_reward": judge_content("text", config.text_reward) if r_t else config.text_reward,
            "visual_reward": judge_content("visual", config.visual_reward) if r_v else config.visual_reward}


def train(config: Config, rank: int, world: int, device: torch.device) -> list[Sample]:
    """Steps 1 to 7, from the last checkpoint on -> the pool of prompts, empty for the toy world's."""
    folder = Path(config.out)
    if not config.resume:
        check_source(config)
    state, tensors = load_training(folder / "policy") if config.resume else ({}, {})
    check_settings(folder, state.get("settings", {}), asdict(config), FREE)
    pool, left_out = read_pool(config)
    content = content_of(config, pool)
    check_content(folder, state.get("content", {}), content)
    policy, reference = start_policy(config, state, device)
    # Choice: Adam moves every number by itself, so under torchrun each process updates its own shards.
    optimizer = torch.optim.Adam(policy.policy_parameters(), lr=config.lr, betas=(0.9, 0.95))
    restore_optimizer(optimizer, tensors)
    judges, codes = make_judges(config, device), CodeCache(policy, together=bool(pool))
    pool = ready_prompts(pool, left_out, policy, codes, config)
    check_prompts(judges[0], pool, config.budget)
    if rank == 0 and not config.resume:
        start_over(folder)
    run = Run(config, state.get("lines", 0), content)                                      # rank 0 writes
    first, silent = state.get("update", 0), 0
    announce(config, state, pool, left_out)
    if first == 0 and config.eval_prompts:
        show(policy, run, config, pool, judges, "000000_before", "Before GRPO: the warm-up model")
    bar = tqdm(range(first, config.updates, config.epochs_per_rollout), desc="grpo", disable=rank > 0,
               initial=first // config.epochs_per_rollout, total=config.updates // config.epochs_per_rollout)
    for done in bar:
        began = time.perf_counter()
        share = config.prompts_per_update // world                                         # of each process
        numbered = list(enumerate(next_prompts(config, done, pool)))[rank * share:(rank + 1) * share]
        batch = rollout(policy, [sample for _, sample in numbered], config, judges, codes,
                        [(config.seed, done, number) for number, _ in numbered])           # steps 1 to 4
        sampled = time.perf_counter()
        ref_logp = reference_logp(policy, reference, batch, config)
        scored = time.perf_counter()
        metrics = {}
        for epoch in range(config.epochs_per_rollout):
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, (done + epoch + 1) / max(1, config.ramp))
            metrics |= update(policy, optimizer, batch, ref_logp, config, epoch)           # steps 5 and 6
        optimizer.zero_grad()                          # gradients take no memory beside the next rollout
        now, before, done = time.perf_counter(), done, done + config.epochs_per_rollout
        metrics = averaged({**batch.metrics, **metrics, "seconds": now - began,
                            "seconds/reference": scored - sampled, "seconds/update": now - scored,
                            "peak_gib": peak_gib(device)})
        silent = silent + 1 if metrics["zero_spread"] == 1 else 0
        log(run, bar, done, metrics, silent)                                               # step 7
        if done // config.save_every > before // config.save_every or done == config.updates:
            title = f"Rollout of update {done}"
            run.sample(f"{done:06d}", title, batch.records(3, config), judge_records(judges))
            state = {"update": done, "lines": run.lines, "processes": world, "settings": asdict(config),
                     "content": content}
            save(policy, folder / "policy", state, optimizer_tensors(optimizer))
    seen = (folder / "samples" / "999999_after.json").exists()
    if config.eval_prompts and (first < config.updates or not seen):
        show(policy, run, config, pool, judges, "999999_after", "After GRPO: the same prompts")
    return pool


def announce(config: Config, state: dict, pool: list[Sample], left_out: LeftOut) -> None:
    """Print how many prompts are ready, what was left out, and where a run that goes on stands."""
    first = state.get("update", 0)
    if pool:
        print(f"{len(pool):,} prompts are ready")
        for reason, count in left_out.reasons().items():
            print(f"{reason}: {count:,}")
    for line in caveats(config, pool):
        print(line)
    if first >= config.updates:
        print(f"{config.out} is finished: {first} updates (more with --updates, afresh with --no-resume)")
    note_processes(state)


def caveats(config: Config, pool: list[Sample]) -> list[str]:
    """What one has to know of this run's rewards, a line each."""
    lines = []
    unknown = sum(sample.kind == "interleaved" and sample.steps is None for sample in pool)
    if unknown:
        lines.append(f"{unknown:,} of them do not say how many \"steps\" they want: any number is "
                     f"well-formed then, and r_t and r_v are means over the steps that are there")
    if config.credit == "process" and config.normalise == "all":
        lines.append("--normalise all, Eq. (6) as printed: texts and pictures share one pool. Four answers "
                     "of three steps with text .75 and pictures .54 throughout give every code an advantage "
                     "of -.98, although nothing differs. --normalise kind compares each kind with itself.")
    return lines


def log(run: Run, bar: tqdm, done: int, metrics: dict, silent: int) -> None:
    """Write a line of metrics, show the most important ones in the bar, and warn when nothing is learned."""
    run.log(update=done, **metrics)
    names = {"reward": "reward", "text": "reward/text", "visual": "reward/visual", "format": "reward/format",
             "kl/image": "kl/image"}
    bar.set_postfix({short: f"{metrics[name]:.3f}" for short, name in names.items() if name in metrics})
    if silent == 3:
        tqdm.write("warning: three rollouts in a row had no spread in any group: every advantage is zero and "
                   "nothing is learned (try other prompts, a higher --temperature or other --reward-weights)")


# ------------------------------------------------------------------------------------------------------------
# Something to look at: sheets before and after, one group in numbers, one prompt through one update

def show(policy: UnifiedModel, run: Run, config: Config, pool: list[Sample], judges: tuple, name: str,
         title: str) -> None:
    """Write a sheet of G answers each to fixed prompts with fixed seeds, the same before and after:
    held-out prompts of the toy world, or the first of --prompts."""
    rng = random.Random("show")
    samples = pool[:4] or [toy_prompt(rng, config.edits, "heldout") for _ in range(4)]
    seeds = [("show", p) for p in range(len(samples))]
    batch = rollout(policy, samples, config, judges, CodeCache(policy), seeds)
    run.sample(name, title, batch.records(len(samples), config), judge_records(judges))


def worked(answers: list, scores: list[Scores], config: Config) -> list[Part]:
    """Eq. (4) to (6) on one group as tables, computed by the functions that train."""
    gamma, weights = config.step_discount, config.reward_weights

    def credit(discount: float, r_f: float = 0.0) -> list[list[float]]:
        """Eq. (6) with another discount and weight of r_f -> each answer's mean advantage of each step."""
        settings = replace(config, credit="process", step_discount=discount,
                           reward_weights=(*weights[:2], r_f))
        return [[values[s.start:s.stop].mean().item() for s in answer.segments]
                for answer, values in zip(answers, advantages(answers, scores, settings))]
    rewards = torch.tensor(hybrid_rewards(scores, weights))
    whole = [["", "r_t", "r_v", "r_f", "r", "A"]]
    for n, (of, r, a) in enumerate(zip(scores, rewards, outcome_advantages(rewards)), 1):
        whole.append([f"answer {n}", *map(rounded, (of.text, of.visual, of.format, r)), f"{a:+.2f}"])
    columns = credit(0.0), credit(0.5), credit(1.0), credit(gamma, weights[2])
    steps = [["answer, step", "r", "r~: discount 0", "0.5", "1", f"A: {gamma:g}, with r_f"]]
    for n, (answer, of, *values) in enumerate(zip(answers, scores, *columns), 1):
        for j, (segment, r, *row) in enumerate(zip(answer.segments, of.steps, *values), 1):
            kind = "picture" if segment.text is None else "text"
            steps.append([f"answer {n}, {j} {kind}", rounded(r), *(f"{value:+.2f}" for value in row)])
    own = columns[0][0]                                                                    # r~ of answer 1
    terms = " + ".join(f"{gamma ** k:g} x ({r:+.2f})" for k, r in enumerate(own))
    total = sum(gamma ** k * r for k, r in enumerate(own))
    pools = "texts and pictures apart" if config.normalise == "kind" else "all steps together"
    return [
        Part("Eq. (5) and (4): whole answers",
             f"r = r_t + r_v + r_f, weighted {shown(weights)}. A = (r - mean) / (std + {EPSILON:g}), here "
             f"with mean {rewards.mean():.2f} and std {rewards.std():.2f}.", whole),
        Part("Eq. (6): the steps, and how the reward of one reaches back",
             f"r is r_t of a text, r_v of a picture. r~ = (r - mean) / (std + {EPSILON:g}) over the group, "
             f"{pools}. A of step j = sum of discount^(k - j) r~ of step k over all k >= j; discount 0 is "
             f"the step alone, 1 is Eq. (6) as printed. For answer 1, step 1: {terms} = {total:+.2f}. In "
             f"the last column words also get the normalised format reward of their answer.", steps)]


def loss_table(policy: UnifiedModel, batch: Rollout, ref_logp: Tensor, config: Config) -> list[list[str]]:
    """What `grpo_loss` makes of a rollout under the policy as it is now, text and image apart."""
    with torch.no_grad():
        logp = policy.log_probs(batch.tokens, batch.is_image, batch.mask, scoring_of(config))
    weights = decision_weights(batch.mask, batch.is_image, config.per_modality)
    beta = kl_weights(config, batch.is_image)
    rows = [["", "decisions", "loss", "least ratio", "largest", "clipped", "KL"]]
    for name, part in zip(("text", "image"), by_modality(batch.mask, batch.is_image)):
        loss, ratio, kl = grpo_loss(logp, batch.old_logp, ref_logp, batch.advantages.expand_as(logp),
                                    weights * part, config.clip, beta)
        if part.any():
            ratio, kl = ratio[part], kl[part]
            clipped = ((ratio - 1).abs() > config.clip).float().mean()
            rows.append([name, f"{len(ratio)}", f"{loss.mean():.4f}", f"{ratio.min():.4f}",
                         f"{ratio.max():.4f}", f"{clipped:.1%}", f"{kl.mean():.5f}"])
    return rows


def explain(config: Config, device: torch.device) -> Path:
    """--explain: take the first prompt of a run through one update, in the paper's order.

    Prints it with its numbers and writes OUT/explain.html, the same with pictures. Nothing else in OUT is
    touched. All numbers come from the functions that train.
    Choice: the update has the full --lr, without the ramp of a run, so that its effect shows.
    """
    pool, left_out = read_pool(config)
    policy, reference = start_policy(config, {}, device)
    judges, codes, body = make_judges(config, device), CodeCache(policy), []
    sample = next_prompts(config, 0, ready_prompts(pool, left_out, policy, codes, config))[0]

    def tell(part: Part, group: str = "") -> None:
        """Print a part, and put it on the page, where a group with its pictures stands for its rows."""
        part = part._replace(title=f"{len(body) + 1}. {part.title}")
        print(part_text(part))
        body.append(part_html(part._replace(rows=()) if group else part) + group)

    def answer(title: str, words: str, **before: dict) -> tuple[Rollout, dict]:
        """Sample the group, with the same random numbers every time, and tell it -> rollout and record."""
        batch = rollout(policy, [sample], config, judges, codes, [(config.seed, 0, 0)])
        record, = batch.records(1, config)
        rows = [[f"answer {n}:", *(step["text"] or "picture" for step in of["steps"]), parts_of(of)]
                for n, of in enumerate(record["answers"], 1)]
        tell(Part(title, words, rows), group_html({**before, "after" if before else "": record}, len(rows)))
        return batch, record
    batch, first = answer(f"The prompt, and G = {config.group_size} answers", f"{sample.prompt}\n{LEGEND}")
    for part in first["worked"]:
        tell(part)
    ref_logp = reference_logp(policy, reference, batch, config)
    tell(Part("Eq. (2), (3), (7): the loss before the update",
              f"ratio = pi / pi_old. The policy still is the one that sampled: what is not 1 is "
              f"{'rounding' if config.score_guided else 'the guidance of the rollout, or rounding'}. "
              f"The loss: -min(ratio A, clip(ratio, {1 - config.clip:g}, {1 + config.clip:g}) A) + beta KL.",
              loss_table(policy, batch, ref_logp, config)))
    optimizer = torch.optim.Adam(policy.policy_parameters(), lr=config.lr, betas=(0.9, 0.95))
    metrics = update(policy, optimizer, batch, ref_logp, config)
    tell(Part("The update",
              f"One step of Adam at learning rate {config.lr:g}; loss {metrics['loss']:.4f}, norm of the "
              f"gradient {metrics['grad_norm']:.3f}. Before it the log-probs of the sampler and of the "
              f"policy differed by {metrics['logp_gap']:.6f} in the mean. On the same answers there are now:",
              loss_table(policy, batch, ref_logp, config)))
    answer("The same prompt again, with the same random numbers", "", before=first)
    return write_page(Path(config.out) / "explain.html", "One prompt through one update", body)


def judge_records(judges: tuple, most: int = 8) -> list[dict]:
    """The latest questions to a learned text judge with their pictures, its replies and their scores."""
    latest = list(getattr(judges[0], "record", ()))[-most:]
    return [{"question": question, "pictures": list(map(thumbnail, pictures)), "reply": reply, "score": score}
            for question, pictures, reply, score in latest]


def main() -> None:
    """Warm-up model if there is none, training, evaluation before and after."""
    config = parse_config(Config, presets=PRESETS, names={
        "prompts": PROMPT_READERS, "text_reward": judge_names("text"),
        "visual_reward": judge_names("visual")})
    rank, world, device = start_processes(config.device)
    check(config, world)
    with claim(config.out, config.resume):
        if config.model == Config.model and not warmup.is_done(Path(config.model)):
            print(f"no warm-up model in {config.model} yet: training it first, once (90 seconds on two CPU "
                  f"cores)")
            warmup.warm_up(warmup.Config(device=config.device))
        if config.explain:
            print(f"the same with pictures: {explain(config, device)}")
            return
        pool = train(config, rank, world, device)
        before_and_after(config, [sample.prompt for sample in pool])
        end_processes()


if __name__ == "__main__":
    run_main(main)
