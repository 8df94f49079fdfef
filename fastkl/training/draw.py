"""Drawing a step's batch: prompts -> completions -> rewards; with --dynamic-sampling again where a group has no signal.

In: a run, whose prompts it takes further. Out: the B groups that the update is made of, and what was drawn besides.
With --rollout-ahead the completions are there already, and those of the next step are begun.

A group whose rewards are all equal has no advantage: RLOO learns nothing from it but the KL. With dynamic sampling (Yu
et al. 2025, DAPO, section 3.2) such a group is replaced by the next prompt's, at most M times in a place of the batch,
after which it stays. This changes what is estimated. With g the update of a group, s the event that it has a signal, P
its probability, a place of the batch contributes in expectation

    E[g | s] (1 - (1 - P)^(M + 1)) + E[g | not s] (1 - P)^(M + 1)

Without a KL in the reward g is 0 where there is no signal, and this is E[g] (1 - (1 - P)^(M + 1)) / P: the same
direction, a longer step. With one, the penalty is charged on groups with a signal (nearly) alone: what the policy does
to prompts that it always or never solves is hardly held back. tests/training/test_draw.py has both by brute force.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import fmean

from fastkl.rewards.call import Rewards, compute_rewards, with_groups
from fastkl.rollout.ahead import Rollout
from fastkl.rollout.dealt import generate
from fastkl.rollout.requests import Request, grouped, requests_of
from fastkl.scoring.pack import scorable
from fastkl.training.state import Run
from fastkl.training.stopwatch import Stopwatch
from fastkl.types import Redraws, RolloutBatch


@dataclass(frozen=True, slots=True)
class Drawn:
    """A step's batch, and what it took."""

    batch: RolloutBatch
    rewards: Rewards  # of the batch; times and counts are those of everything that was drawn
    num_tokens: int  # of all completions that were drawn
    redraws: Redraws | None = None  # None without dynamic sampling


def draw_batch(run: Run, step: int, watch: Stopwatch) -> Drawn:
    """The step's groups; those without a signal are drawn anew, if that is asked for."""
    config = run.config
    drawn = draw(run, config.prompts_per_step, step, watch)
    if not config.dynamic_sampling:
        return drawn
    all_rewards, num_replaced = rewards_of(drawn.batch), 0
    for _ in range(config.dynamic_sampling):
        places = without_signal(drawn.batch)
        if not places:
            break
        fresh = draw(run, len(places), step, watch, first=config.prompts_per_step + num_replaced)
        drawn = replaced(drawn, places, fresh)
        all_rewards += rewards_of(fresh.batch)
        num_replaced += len(places)
    return replace(drawn, redraws=Redraws(num_replaced, fmean(all_rewards) if all_rewards else None))


def draw(run: Run, num_prompts: int, step: int, watch: Stopwatch, *, first: int = 0) -> Drawn:
    """The next prompts with their completions and rewards. first: how many the step has drawn before, for the seeds."""
    config = run.config
    with watch("generate"):
        rollout = (run.ahead.take(step) if run.ahead else None) or drawn_now(run, num_prompts, step, first)
        if run.ahead and step < config.steps:
            run.ahead.begin(*asked(run, num_prompts, step + 1))
    prompts, completions = rollout.prompts, rollout.completions
    with watch("reward"):
        rewards = compute_rewards(
            run.rewards,
            prompts,
            completions,
            step=step,
            max_steps=config.steps,
            timeout=config.reward_timeout,
            world=run.world,
        )
    valid = scorable(completions, rewards.valid, config.truncated)
    total = rewards.total.clamp(*config.reward_clip) if config.reward_clip else rewards.total
    total = total.masked_fill(~valid, 0.0)
    batch = RolloutBatch(prompts, completions, total, valid, rollout.version)
    return Drawn(batch, rewards, sum(len(c.token_ids) for group in completions for c in group))


def asked(run: Run, num_prompts: int, step: int, first: int = 0) -> tuple[Rollout, list[Request]]:
    """The next prompts as a rollout of `step` by the weights of now, not drawn yet, and the requests that draw it."""
    position, config = run.prompts.state(), run.config
    prompts = run.prompts.take(num_prompts)
    requests = requests_of(prompts, config.num_samples, seed=config.seed, step=step, first=first)
    return Rollout(step, run.completed.step, prompts, position), requests


def drawn_now(run: Run, num_prompts: int, step: int, first: int = 0) -> Rollout:
    """The same, drawn."""
    rollout, requests = asked(run, num_prompts, step, first)
    return replace(rollout, completions=grouped(generate(run.generator, requests, run.world), run.config.num_samples))


def without_signal(batch: RolloutBatch) -> list[int]:
    """The places of the groups whose samples that take part do not differ in their rewards."""
    groups = zip(batch.rewards, batch.valid, strict=True)
    return [b for b, (rewards, valid) in enumerate(groups) if len(set(rewards[valid].tolist())) < 2]


def replaced(drawn: Drawn, places: list[int], fresh: Drawn) -> Drawn:
    """`drawn` with fresh groups at these places of its batch."""
    old, new = drawn.batch, fresh.batch
    prompts, completions = list(old.prompts), list(old.completions)
    rewards, valid = old.rewards.clone(), old.valid.clone()
    rewards[places], valid[places] = new.rewards, new.valid
    for place, prompt, group in zip(places, new.prompts, new.completions, strict=True):
        prompts[place], completions[place] = prompt, group
    batch = RolloutBatch(tuple(prompts), tuple(completions), rewards, valid, old.policy_version)
    together = with_groups(drawn.rewards, places, fresh.rewards)
    return Drawn(batch, together, drawn.num_tokens + fresh.num_tokens)


def rewards_of(batch: RolloutBatch) -> list[float]:
    """The rewards of the samples that take part."""
    return batch.rewards[batch.valid].tolist()
