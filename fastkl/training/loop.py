"""The training loop: prompts -> completions -> rewards -> scores -> RLOO update -> weights back into the generator.

`train(config)` is the whole run; `update` is the whole optimisation step. Everything that can go wrong cheaply has gone
wrong in setup.py before the first line of the loop. One policy forward per update: its detached log-probs are the KL in
the reward, its differentiable ones carry the gradient, so a step costs two forwards and one backward per token.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from fastkl.config.settings import TrainConfig
from fastkl.kernels.operators import TokenCoefficients, TokenScores, linear_token_loss
from fastkl.objective.importance import importance_weights
from fastkl.objective.kl_control import adapted_coef, renew_reference
from fastkl.objective.kl_estimators import sampled_logprobs
from fastkl.objective.rloo import token_coefficients
from fastkl.report.step_metrics import StepReport
from fastkl.rewards.call import compute_rewards
from fastkl.rollout import agreement
from fastkl.sampling.replay import support_of
from fastkl.scoring.backbone import hidden_states, scoring
from fastkl.scoring.head import head_of
from fastkl.scoring.pack import pack, scorable_groups
from fastkl.training.schedule import learning_rate, set_learning_rate
from fastkl.training.setup import set_up
from fastkl.training.signals import stop_request
from fastkl.training.state import Run
from fastkl.training.stopwatch import Stopwatch
from fastkl.types import Completion, PackedBatch, RolloutBatch

MAX_SKIPPED_IN_A_ROW = 3


class Diverged(RuntimeError):
    """Loss or gradient was not finite for MAX_SKIPPED_IN_A_ROW steps in a row."""


def train(config: TrainConfig) -> None:
    """Runs the training that `config` describes; raises UserError for a user's mistake before anything expensive."""
    run = set_up(config)
    skipped_in_a_row = 0
    with run.log, run.view, stop_request() as stop, saved_on_failure(run):
        for step in range(run.first_step, config.steps + 1):
            watch = Stopwatch(run.device)
            with watch("sync"):
                run.push_weights()
            prompts = run.prompts.take(config.prompts_per_step)
            with watch("generate"):
                completions = run.generator.generate(prompts, config.num_samples, seed=config.seed, step=step)
            with watch("reward"):
                rewards = compute_rewards(run.rewards, prompts, completions, step=step)
            valid = scorable(completions, rewards.valid, config.truncated)
            total = rewards.total.masked_fill(~valid, 0.0)
            batch = RolloutBatch(prompts, completions, total, valid, policy_version=step - 1)
            report = StepReport(step, batch, rewards.by_function, config, run.kl_coef)
            set_learning_rate(run.optimizer, learning_rate(step, config))
            applied = update(run, batch, report, watch)
            skipped_in_a_row = 0 if applied else skipped_in_a_row + 1
            run.skipped_steps += not applied
            run.record(report, watch)
            steer(run, report)
            if skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
                raise Diverged(diagnosis(config, step))
            if stop.requested:
                break
            if config.save_every and step % config.save_every == 0:
                run.save()
        run.finish()


def update(run: Run, batch: RolloutBatch, report: StepReport, watch: Stopwatch) -> bool:
    """One optimizer step on one batch; False if it was skipped because loss or gradient was not finite.

    Raises StaleEngineError when generator and trainer disagree about the sampled tokens' log-probs.
    """
    config = run.config
    groups = scorable_groups(batch.valid, min_samples=2 if config.baseline == "leave_one_out" else 1)
    normalizer = float(batch.valid[groups].sum())  # of the whole step: micro-batches add up to it
    with scoring(run.policy, run.layout), scoring(run.reference, run.layout):
        for members, micro in pack(batch, groups, run.micro_batch_tokens, run.device):
            with watch("score"), torch.no_grad(), run.autocast():
                ref_hidden = hidden_states(run.reference, micro, run.layout)
            with watch("update"):
                with run.autocast():
                    policy_hidden = hidden_states(run.policy, micro, run.layout)
                loss, scores = rloo_loss(run, micro, policy_hidden, ref_hidden, normalizer)
                loss.backward()
            report.add(members, micro, scores, loss)
    if not report.num_tokens:
        return True  # no group had an advantage: nothing to learn from, nothing wrong
    agreement.check_agreement(report.mean_gap, report.max_gap, run.generator_dtype, report.step)
    with watch("update"):
        report.grad_norm = clip_gradients(run.policy, config.max_grad_norm)
        finite = math.isfinite(report.loss) and math.isfinite(report.grad_norm)
        if finite:
            run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
    return finite


def rloo_loss(
    run: Run, micro: PackedBatch, policy_hidden: torch.Tensor, ref_hidden: torch.Tensor, normalizer: float
) -> tuple[torch.Tensor, TokenScores]:
    """The micro-batch's share of the loss, and the scores of its N tokens; logits are never stored for all of them.

    Where the sampler could not draw every id, the log-probs are those on the ids that it could draw (contract.py). The
    loss is linear in the scores, with factors that need a whole group's scores (KL in the reward, leave-one-out
    mean). So the operator hands back each run of whole groups as soon as it is scored, takes the factors, and has the
    gradient while the logits are still in its buffer: no logit is computed twice.
    """
    config, cu_seqlens = run.config, micro.completion_cu_seqlens
    group_bounds = cu_seqlens[:: micro.rewards.shape[1]].tolist()

    def coefficients(rows: slice, scores: TokenScores) -> TokenCoefficients:
        g = slice(group_bounds.index(rows.start), group_bounds.index(rows.stop))
        own = cu_seqlens[g.start * config.num_samples : g.stop * config.num_samples + 1] - rows.start
        weights = importance_weights(
            micro.engine_logprobs[rows], sampled_logprobs(scores), own, config.importance, config.importance_cap
        )
        return token_coefficients(
            scores,
            micro.rewards[g],
            micro.valid[g],
            own,
            run.penalty,
            baseline=config.baseline,
            normalizer=normalizer,
            weights=weights.values,
        )

    policy_head, ref_head = head_of(run.policy), head_of(run.reference)
    return linear_token_loss(
        policy_hidden,
        policy_head.weight,
        ref_hidden,
        ref_head.weight,
        micro.target_ids,
        coefficients,
        row_splits=group_bounds,
        temperature=run.sampling.temperature,
        support=support_of(run.sampling, micro.completion_positions, len(policy_head.weight)),
        policy_bias=policy_head.bias,
        ref_bias=ref_head.bias,
        softcap=policy_head.softcap,
        logit_scale=policy_head.logit_scale,
    )


def scorable(completions: Sequence[Sequence[Completion]], valid: torch.Tensor, truncated: str) -> torch.Tensor:
    """Which samples take part, bool [B, K]: the `valid` ones, without those cut at max_new_tokens if told to "drop".

    A sample takes part in everything (reward, baseline, KL, loss) or in nothing.
    """
    if truncated == "keep":
        return valid
    return valid & torch.tensor([[c.finish_reason != "length" for c in group] for group in completions])


def steer(run: Run, report: StepReport) -> None:
    """Between two steps: the coefficient follows the KL if it has a target, the reference is renewed if it is time."""
    config = run.config
    if config.kl_target and report.num_tokens:
        run.kl_coef = adapted_coef(run.kl_coef, report.mean_support_kl, config.kl_target)
    if config.reference_every and report.step % config.reference_every == 0:
        renew_reference(run.reference, run.policy, config.reference_share)


def clip_gradients(policy: torch.nn.Module, max_norm: float) -> float:
    """Scales the gradients down to the global norm `max_norm` (0: leaves them); returns the norm before."""
    return float(torch.nn.utils.clip_grad_norm_(policy.parameters(), max_norm or math.inf))


@contextmanager
def saved_on_failure(run: Run) -> Iterator[None]:
    """Whatever ends the loop (a failing reward, a stale engine, divergence), the completed steps are saved."""
    try:
        yield
    except BaseException:
        run.save()
        raise


def diagnosis(config: TrainConfig, step: int) -> str:
    """What to try after divergence."""
    remedies = [f"a smaller --lr (now {config.lr:g})"]
    if not config.max_grad_norm:
        remedies.append("--max-grad-norm 1 (gradients are not clipped now)")
    if config.kl_coef == 0:
        remedies.append("--kl-coef above 0 (without it nothing holds the policy near the reference)")
    if config.dtype != "float32":
        remedies.append("--dtype float32")
    return (
        f"steps {step - MAX_SKIPPED_IN_A_ROW + 1} to {step}: loss or gradient was not finite. Their updates were "
        f"skipped, and the run has stopped with its state saved. Try {', '.join(remedies)}."
    )
