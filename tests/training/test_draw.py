"""Dynamic sampling: what it draws, what it does to the expected update (by brute force), and that it resumes."""

from __future__ import annotations

import itertools
import json
import math
import random
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_loop import reward_file, rows, small

import fastkl
from fastkl.config.settings import TrainConfig, check_config
from fastkl.data.prompts import PromptSource
from fastkl.distributed.world import World
from fastkl.errors import UserError
from fastkl.objective.advantages import leave_one_out
from fastkl.rewards.load import RewardFunction
from fastkl.training import loop
from fastkl.training.draw import draw_batch
from fastkl.training.state import Snapshot
from fastkl.training.stopwatch import Stopwatch
from fastkl.types import Completion, Prompt

POLICY = {"easy": (0.8, 0.15, 0.05), "even": (0.4, 0.4, 0.2), "hard": (0.1, 0.3, 0.6)}
"""By prompt, the probabilities of the completions 0, 1 and 2; the first has the reward 1, the others 0."""
K = 3


class Dice:
    """A generator that draws from POLICY by the request's own seed."""

    def __init__(self):
        self.seeds = []

    def generate(self, requests):
        self.seeds += [request.seed for request in requests]
        drawn = [random.Random(r.seed).choices(range(3), POLICY[r.prompt.text])[0] for r in requests]
        return [Completion((y,) * 2, (0.0,) * 2, "stop", str(y)) for y in drawn]


def is_zero(completions) -> list[float]:
    return [float(text == "0") for text in completions]


def toy_run(tries: int, reward=is_zero) -> SimpleNamespace:
    prompts = [Prompt((1,), name, name, row) for row, name in enumerate([*POLICY] * 400)]
    config = TrainConfig(prompts_per_step=4, num_samples=K, dynamic_sampling=tries, reward_timeout=0.0)
    rewards = (RewardFunction("toy", reward),)
    source = PromptSource(prompts, seed=1)
    kept = {"world": World(), "ahead": None, "completed": Snapshot()}
    return SimpleNamespace(config=config, prompts=source, generator=Dice(), rewards=rewards, **kept)


def drawn(run, step: int):
    return draw_batch(run, step, Stopwatch(torch.device("cpu")))


def signal_probability(name: str) -> float:
    p = POLICY[name][0]
    return 1 - p**K - (1 - p) ** K


def test_without_it_a_step_takes_its_prompts_and_says_nothing():
    run = toy_run(0)
    one = drawn(run, 1)
    assert one.redraws is None and one.num_tokens == 4 * K * 2 and run.prompts.state()["position"] == 4
    assert [p.text for p in one.batch.prompts] == [p.text for p in toy_run(0).prompts.take(4)]


def test_groups_without_a_signal_are_replaced_in_their_place_and_counted():
    seen = []

    def noted(completions, log_extra):
        seen.extend(is_zero(completions))
        log_extra("said", completions)
        return is_zero(completions)

    run, plain = toy_run(20, noted), toy_run(0)
    for step in range(1, 30):
        seen.clear()
        before = run.prompts.state()["position"]
        plain.prompts.load_state(run.prompts.state())
        result, first = drawn(run, step), drawn(plain, step)
        batch, redraws = result.batch, result.redraws
        assert all(len(set(group.tolist())) == 2 for group in batch.rewards)
        num_drawn = 4 + redraws.num_replaced
        assert run.prompts.state()["position"] - before == num_drawn or before + num_drawn >= 1200
        assert result.num_tokens == num_drawn * K * 2
        assert redraws.mean_reward == pytest.approx(sum(seen) / len(seen)) and len(seen) == num_drawn * K
        for b in range(4):  # what had a signal has stayed, and everything beside it is that of its own group
            texts = [c.text for c in batch.completions[b]]
            if len(set(first.batch.rewards[b].tolist())) == 2:
                assert batch.prompts[b] == first.batch.prompts[b] and batch.completions[b] == first.batch.completions[b]
            assert batch.rewards[b].tolist() == is_zero(texts)
            assert result.rewards.notes.values["toy"][b * K : (b + 1) * K] == is_zero(texts)
            assert result.rewards.notes.columns["said"][b * K : (b + 1) * K] == texts
        assert result.rewards.total.equal(batch.rewards)
        assert result.rewards.by_function["toy"] == pytest.approx(float(batch.rewards.mean()))
    assert len(set(run.generator.seeds)) == len(run.generator.seeds), "no two samples of the run share a seed"


def test_prompts_are_replaced_no_more_often_than_asked_and_stay_then():
    run = toy_run(3, lambda completions: [1.0] * len(completions))
    result = drawn(run, 1)
    assert result.redraws.num_replaced == 3 * 4 and result.batch.rewards.tolist() == [[1.0] * K] * 4
    nothing = toy_run(2, lambda completions: [None] * len(completions))
    assert drawn(nothing, 1).redraws.mean_reward is None


@pytest.mark.slow
def test_prompts_are_kept_in_proportion_to_their_chance_of_a_signal():
    run, steps = toy_run(200), 500
    kept = [p.text for step in range(1, steps + 1) for p in drawn(run, step).batch.prompts]
    weights = {name: signal_probability(name) for name in POLICY}
    for name, weight in weights.items():
        share = weight / sum(weights.values())
        error = math.sqrt(share * (1 - share) / len(kept))
        assert abs(kept.count(name) / len(kept) - share) < 4 * error, name


@cache
def update_of(name: str, group: tuple[int, ...], beta: float) -> torch.Tensor:
    """RLOO's ascent direction for the prompt's three logits, from one group of completions, f64 [3].

    The KL is k1 in the reward, against a reference that is uniform.
    """
    p = torch.tensor(POLICY[name], dtype=torch.float64)
    drawn = torch.tensor(group)
    penalised = (drawn == 0).double() - beta * (p[drawn].log() - math.log(1 / 3))
    advantages = leave_one_out(penalised[None], torch.ones(1, K, dtype=torch.bool))[0]
    slopes = torch.eye(3, dtype=torch.float64)[drawn] - p  # of log pi(y) in the logits
    return advantages @ slopes / K


def expectation(beta: float, name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
    """By enumerating all 3^K groups of a prompt: E[g], E[g; signal], P(signal)."""
    whole, signal, probability = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64), 0.0
    for group in itertools.product(range(3), repeat=K):
        chance = math.prod(POLICY[name][y] for y in group)
        g = chance * update_of(name, group, beta)
        whole += g
        if 0 < group.count(0) < K:
            signal += g
            probability += chance
    assert probability == pytest.approx(signal_probability(name))
    return whole, signal, probability


@pytest.mark.slow
@pytest.mark.parametrize("tries", [1, 3, 200])
@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_the_expected_update_is_the_documented_one(tries, beta):
    """Each coordinate of the update (three logits of three prompts), enumerated, beside the mean of what is drawn."""
    expected = {name: expectation(beta, name) for name in POLICY}
    chance = sum(probability for _, _, probability in expected.values()) / len(POLICY)  # P, of a prompt drawn at random
    repeats = (1 - (1 - chance) ** (tries + 1)) / chance  # draws of a place, on average
    places = drawn_places(tries)
    for name, (whole, signal, _) in expected.items():
        rest = whole - signal
        documented = (signal * repeats + rest * (1 - chance) ** tries) / len(POLICY)
        if beta == 0:
            assert rest.abs().max() < 1e-15, "no advantage where there is no signal"
            assert torch.allclose(documented, whole * repeats / len(POLICY)), "the same direction, a longer step"
        else:
            assert rest.abs().max() > 5e-4, "the penalty of a group without a signal"
        nothing = torch.zeros(3, dtype=torch.float64)
        values = torch.stack([update_of(name, group, beta) if prompt == name else nothing for prompt, group in places])
        error = values.std(dim=0) / math.sqrt(len(values))
        assert ((values.mean(dim=0) - documented).abs() < 4.5 * error).all(), (name, values.mean(dim=0), documented)


@cache
def drawn_places(tries: int) -> list[tuple[str, tuple[int, ...]]]:
    """Prompt and group of every place of 699 steps, which beta has no part in."""
    run = toy_run(tries)
    return [group for step in range(1, 700) for group in groups_of(drawn(run, step))]


def groups_of(result) -> list[tuple[str, tuple[int, ...]]]:
    pairs = zip(result.batch.prompts, result.batch.completions, strict=True)
    return [(prompt.text, tuple(int(c.text) for c in group)) for prompt, group in pairs]


@pytest.mark.parametrize("beta", [0.0, 0.5])
def test_only_a_kl_penalty_makes_the_expected_update_point_elsewhere(beta):
    whole, signal = (torch.cat([expectation(beta, name)[i] for name in POLICY]) for i in (0, 1))
    cosine = float(whole @ signal / whole.norm() / signal.norm())
    assert cosine == pytest.approx(1.0) if beta == 0 else cosine < 0.98


HALF_CONSTANT = """import random
    draws = random.Random(f"{trainer_state.global_step} {completions}")
    return [0.0] * len(completions) if draws.random() < 0.3 else [draws.random() > 0.7 for _ in completions]"""


@pytest.mark.slow
def test_a_resumed_run_with_redraws_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    reward = reward_file(tmp_path, HALF_CONSTANT)
    options = {"reward": (reward,), "dynamic_sampling": 2, "steps": 4, "num_samples": 3, "save_every": 2}
    prompts = tmp_path / "prompts.jsonl"
    starts = ("Once", "A cat", "The owl", "One day", "There was")
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in starts))
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole = small(tmp_path / "whole", prompts=str(prompts), **options)
    loop.train(whole)
    parts = small(tmp_path / "parts", prompts=str(prompts), **options)
    stop_after(2, parts)
    loop.train(small(tmp_path / "parts", prompts=str(prompts), resume=True, **options))
    steps = [without_times(row) for row in rows(whole)]
    for ours, theirs in zip(rows(parts), steps, strict=True):
        assert without_times(ours) == theirs, {k: (v, ours[k]) for k, v in theirs.items() if v != ours[k]}
    assert sum(row["groups/replaced"] for row in steps) > 0
    assert rows(parts, "samples") == rows(whole, "samples")
    tokens = [row["tokens/generated"] for row in steps]
    in_batches = list(itertools.accumulate(s["completion/mean_length"] * 6 for s in steps))
    assert tokens[-1] > in_batches[-1] + 1, "those left out are counted"
    models = [Path(c.output) / "checkpoints" / "step-4" / "model.safetensors" for c in (whole, parts)]
    assert models[0].read_bytes() == models[1].read_bytes()


def stop_after(step: int, config: TrainConfig) -> None:
    """Runs until this step is saved, and ends there as by a kill."""

    class Stop:
        def on_checkpoint(self, saved, folder):
            if saved == step:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.train(config, callbacks=[Stop()])


def without_times(row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.startswith(("time/", "throughput/", "memory/"))}


def test_it_is_refused_where_equal_rewards_are_a_signal():
    with pytest.raises(UserError, match="dynamic_sampling: equal rewards are a signal, too, to the advantage none"):
        check_config(TrainConfig(advantage="none", dynamic_sampling=2))
    with pytest.raises(UserError, match="dynamic_sampling: -1 is out of range"):
        check_config(TrainConfig(dynamic_sampling=-1))


@pytest.mark.slow
def test_rewards_are_cut_to_their_range_before_anything_is_computed_from_them(tmp_path):
    config = small(tmp_path, steps=1, reward=("length?target=1",), reward_clip=(-8.0, -2.0), kl_coef=0.0)
    fastkl.train(config)
    samples = rows(config, "samples")
    drawn = [sample["rewards"]["length"] for sample in samples]
    assert min(drawn) < -8 and [s["reward"] for s in samples] == [min(max(r, -8.0), -2.0) for r in drawn]
