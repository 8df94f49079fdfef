"""Real steps of a small policy that wants to end where min_tokens bans the end, scored by the trainer and naively.

The naive scorer, kept here as the control, is the trainer's own step told that every id could be drawn. Its KL estimate
goes below zero and stays there, while the policy is 10 nats and more away from the reference.
bench/training/naive_control.py does the same with the storyteller.
"""

from __future__ import annotations

import functools
import json
import math

import pytest
import torch
from toy import STOP, ToyTokenizer, draw, prompt, toy_config, toy_model
from toy_step import toy_update

from fastkl.audit.alarm import KlAlarm, mean_and_error
from fastkl.config.settings import TrainConfig
from fastkl.report.step_metrics import StepReport
from fastkl.rollout.agreement import StaleEngineError
from fastkl.rollout.transformers import TransformersGenerator
from fastkl.sampling.params import Sampling
from fastkl.training import loop
from fastkl.types import SAMPLE_SUMS, RolloutBatch

PROMPTS = (prompt(1, 2, 3), prompt(4), prompt(5, 6, 7, 8, 9))
STEPS, PRICE = 25, 0.3


@functools.cache
def course(naive: bool, tolerant: bool = True) -> list[dict[str, list[float]]]:
    """Per step, the completions' KL estimates and exact KLs, in nats. The reward is minus PRICE per token."""
    policy, reference = (toy_model(0, torch.float32) for _ in range(2))
    config = toy_config(num_samples=32, kl_coef=0.2, min_tokens=6, max_new_tokens=16)
    reference.requires_grad_(False)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    scored = toy_config(num_samples=32, kl_coef=0.2, max_new_tokens=16) if naive else config  # as if all could be drawn
    limits = {"agreement_nats": math.inf} if tolerant else {}
    generator = TransformersGenerator(policy, ToyTokenizer(), Sampling.of(config, (STOP,)))
    steps = []
    for step in range(1, STEPS + 1):
        completions = draw(generator, PROMPTS, config.num_samples, seed=0, step=step)
        rewards = torch.tensor([[-PRICE * len(c.token_ids) for c in group] for group in completions])
        batch = RolloutBatch(PROMPTS, completions, rewards, torch.ones_like(rewards, dtype=torch.bool), step - 1)
        total = toy_update(policy, reference, optimizer, batch, scored, step=step, **limits).total
        column = {name: total.column(name).flatten() for name in SAMPLE_SUMS}
        steps.append(
            {
                "estimate": (column["logprob"] - column["ref_logprob"]).tolist(),
                "exact": column["kl_exact"].tolist(),
                "support": column["kl_support"].tolist(),
            }
        )
    return steps


@pytest.mark.slow
def test_the_trainers_estimate_is_never_below_zero_and_is_the_exact_kl_on_the_support():
    steps, alarm = course(False), KlAlarm()
    for step in steps:
        mean, error = mean_and_error(step["estimate"])
        assert mean >= -4 * error
        assert alarm.add(step["estimate"]) is None
    differences = [a - b for step in steps for a, b in zip(step["estimate"], step["support"], strict=True)]
    mean, error = mean_and_error(differences)
    assert abs(mean) < 4 * error
    assert mean_and_error(steps[-1]["estimate"])[0] > 1.0, "and there is a KL to be seen"


@pytest.mark.slow
def test_the_naive_estimate_goes_below_zero_and_the_alarm_rings_while_the_policy_is_far_away():
    """The control: without it the test above could not fail."""
    steps, alarm = course(True), KlAlarm()
    rang = [alarm.add(step["estimate"]) is not None for step in steps]
    mean, error = mean_and_error(steps[-1]["estimate"])
    assert mean < -4 * error
    assert rang[-1] and not rang[0]
    assert mean_and_error(steps[-1]["exact"])[0] > 10.0


def test_the_trainer_refuses_to_learn_from_naive_scores():
    """What stops a run at its first step, were the support forgotten: generator and trainer disagree."""
    with pytest.raises(StaleEngineError, match="step 1"):
        course(True, tolerant=False)


@pytest.mark.slow
def test_a_run_whose_estimate_is_negative_says_so_once_and_logs_it_at_every_step(tmp_path, monkeypatch, capsys):
    samples = StepReport.samples
    negative = functools.partialmethod(lambda self: [s | {"kl": -1 - 0.1 * i} for i, s in enumerate(samples(self))])
    monkeypatch.setattr(StepReport, "samples", negative)
    config = TrainConfig(
        output=str(tmp_path), generator="transformers", steps=2, prompts_per_step=2, num_samples=4, max_new_tokens=8,
        report_to=(),
    )  # fmt: skip
    loop.train(config)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["kl/alarm"] for row in rows] == [1, 1]
    assert capsys.readouterr().out.count("below zero") == 1
