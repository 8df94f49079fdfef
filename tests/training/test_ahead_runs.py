"""Runs that draw a step ahead: which weights draw what, what runs beside what, and that they resume to the bit."""

from __future__ import annotations

import copy
import json
import sys
import threading
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file
from test_draw import stop_after, without_times
from test_loop import reward_file, rows, small

from fastkl.errors import UserError
from fastkl.rollout.agreement import StaleEngineError
from fastkl.rollout.generator import GENERATORS, Backend
from fastkl.rollout.requests import requests_of
from fastkl.rollout.transformers import TransformersGenerator
from fastkl.sampling.params import Sampling
from fastkl.scoring import models
from fastkl.training import checkpoint, loop
from fastkl.training.setup import set_up

AHEAD = {"rollout_ahead": 1, "importance": "sequence", "steps": 4, "save_every": 1, "keep_checkpoints": 0, "lr": 2e-3}


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    """Settings with more prompts than a step takes, in an order of their own."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    starts = ("Once", "A cat", "The owl", "One day", "There was")
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in starts))
    return AHEAD | {"prompts": str(prompts)}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, options):
    """A run of four steps that nothing interrupted."""
    config = small(tmp_path_factory.mktemp("ahead"), **options)
    loop.train(config)
    return config


@pytest.fixture
def beside(monkeypatch):
    """A backend with weights of its own: a copy of the policy, which a push overwrites. `before` is called before it
    draws, `drawing` is set while it does."""
    module = ModuleType("generator_with_weights")
    module.before, module.drawing, module.pushed = lambda: None, threading.Event(), []

    class Copy(TransformersGenerator):
        def generate(self, requests):
            module.drawing.set()
            try:
                module.before()
                return super().generate(requests)
            finally:
                module.drawing.clear()

        def sync(self, policy, step=0):
            assert not module.drawing.is_set(), "weights change while completions are drawn with them"
            module.pushed.append(step)
            self.model.load_state_dict(policy.state_dict())

    def start(options):
        own = copy.deepcopy(options.policy).requires_grad_(False)
        return Copy(own, options.tokenizer, options.sampling, dtype=options.dtype)

    module.obstacle, module.start = lambda model_config, device: None, start
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(GENERATORS, "beside", Backend(module.__name__, has_weights=True))
    return module


@pytest.mark.slow
def test_every_step_but_the_first_trains_on_what_the_weights_before_its_last_update_draw(whole):
    """By hand: the saved weights of each step, the seeds of the step after the next, and the library's own decoder."""
    metrics, samples = rows(whole), rows(whole, "samples")
    assert [row["policy_version"] for row in metrics] == [0, 0, 1, 2]
    assert [row["stale/age"] for row in metrics] == [0, 1, 1, 1]
    run = set_up(replace(whole, output=whole.output + "-by-hand"))
    prompts = [run.prompts.take(2) for _ in range(4)]
    sampling = Sampling.of(whole, run.generator.sampling.stop_token_ids)
    for step in (2, 3, 4):
        folder = Path(whole.output) / "checkpoints" / f"step-{step - 2}"
        model = models.load_model(str(folder) if step > 2 else run.policy.model.name_or_path, torch.device("cpu"))
        by_hand = TransformersGenerator(model, run.tokenizer, sampling)
        requests = requests_of(prompts[step - 1], 4, seed=whole.seed, step=step)
        drawn = [completion.text for completion in by_hand.generate(requests)]
        assert drawn == [s["completion"] for s in samples if s["step"] == step], f"step {step}"
    run.close()


@pytest.mark.slow
def test_the_reports_of_stale_steps_are_those_of_weighted_samples(whole):
    """KL and effective share of step 3 once more, from the completions in the checkpoint and the saved weights."""
    root = Path(whole.output) / "checkpoints"
    run = set_up(replace(whole, output=whole.output, resume=True, steps=5))
    saved = checkpoint.open_checkpoint(root / "step-2")
    kept = load_file(root / "step-2" / checkpoint.AHEAD)
    lengths = kept["lengths"].tolist()
    policy = models.load_model(str(saved.folder), torch.device("cpu"))
    reference = run.reference.model
    fresh = set_up(replace(whole, output=whole.output + "-fresh")).prompts
    prompts = [p.token_ids for p in fresh.take(6)[4:] for _ in range(4)]
    weights, kls = [], []
    for prompt, ids, engine in zip(
        prompts, kept["token_ids"].split(lengths), kept["logprobs"].split(lengths), strict=True
    ):
        logps = [logprobs_of(model, prompt, ids) for model in (policy, reference)]
        weights.append(float((logps[0] - engine).sum().exp()))
        kls.append(float(((logps[0] - engine).exp() * (logps[0] - logps[1])).sum()))
    row = rows(whole)[2]
    assert row["kl/mean"] == pytest.approx(sum(kls) / len(kls), abs=1e-4)
    assert row["stale/effective"] == pytest.approx(sum(weights) ** 2 / sum(w * w for w in weights) / 8, abs=1e-4)
    assert row["stale/effective"] < 0.999 and row["stale/drift"] > 1e-5
    assert [s["kl"] for s in rows(whole, "samples") if s["step"] == 3] == pytest.approx(kls, abs=1e-4)
    assert all(r["mismatch/mean_abs_logprob"] < 1e-4 for r in rows(whole)), "the canary's"
    run.close()


@pytest.mark.slow
@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.long), 3])
def test_a_run_that_ended_after_any_step_resumes_to_the_bit(tmp_path, options, whole, step):
    parts = small(tmp_path, **options)
    stop_after(step, parts)
    kept = Path(parts.output) / "checkpoints" / f"step-{step}" / checkpoint.AHEAD
    assert kept.is_file()
    loop.train(replace(parts, resume=True))
    for ours, theirs in zip(rows(parts), rows(whole), strict=True):
        assert without_times(ours) == without_times(theirs)
    assert rows(parts, "samples") == rows(whole, "samples")
    for name in ("model.safetensors", "trainer.safetensors"):
        ours, theirs = (Path(c.output) / "checkpoints" / "step-4" / name for c in (parts, whole))
        assert ours.read_bytes() == theirs.read_bytes(), name


@pytest.mark.slow
def test_a_fork_without_changes_goes_on_with_what_was_drawn_and_another_one_draws_anew(tmp_path, whole):
    same = replace(whole, output=str(tmp_path / "same"), fork=f"{whole.output}:2")
    loop.train(same)
    assert [without_times(row) for row in rows(same)] == [without_times(row) for row in rows(whole)]
    other = replace(same, output=str(tmp_path / "other"), temperature=0.5, steps=3)
    loop.train(other)
    assert rows(other)[2]["policy_version"] == 2, "by the weights that it begins with"


@pytest.mark.slow
def test_a_generator_with_weights_of_its_own_draws_while_the_step_trains_and_draws_the_same(
    tmp_path, options, whole, beside
):
    """The reward function of a step lets the next one be drawn: without a thread, it would wait in vain."""
    beside.rewarded, waited = threading.Event(), []

    def before():
        if threading.current_thread() is not threading.main_thread():
            assert beside.rewarded.wait(60), "the step does not train while the next one is drawn"
            beside.rewarded.clear()
            waited.append(True)

    beside.before = before
    body = (
        "import generator_with_weights as g; from fastkl.rewards.built_in import alliteration; g.rewarded.set(); "
        "return alliteration(prompts, completions)"
    )
    config = small(tmp_path, **options, reward=(reward_file(tmp_path, body),))
    config = replace(config, generator="beside")
    loop.train(config)
    assert beside.pushed == [1, 2, 3, 4] and len(waited) == 3
    ours, theirs = ([(s["step"], s["completion"]) for s in rows(c, "samples")] for c in (config, whole))
    assert ours == theirs
    assert [r["policy_version"] for r in rows(config)] == [0, 0, 1, 2]


@pytest.mark.slow
def test_an_engine_that_dies_while_it_draws_ahead_loses_no_step(tmp_path, beside):
    def before():
        if threading.current_thread() is not threading.main_thread() and beside.pushed == [1]:
            raise UserError("generator: the engine has ended.")

    beside.before = before
    config = replace(small(tmp_path, **(AHEAD | {"save_every": 0})), generator="beside")
    with pytest.raises(UserError, match="the engine has ended"):
        loop.train(config)
    saved = checkpoint.newest_checkpoint(Path(config.output) / "checkpoints")
    assert saved.step == 2 and not (saved.folder / checkpoint.AHEAD).exists()
    beside.before = lambda: None
    loop.train(replace(config, resume=True))
    assert [r["policy_version"] for r in rows(config)] == [0, 0, 2, 2], "step 3 is drawn anew, by the weights of now"
    assert [r["step"] for r in rows(config)] == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_canary_stops_a_run_whose_push_did_not_arrive(tmp_path, beside, monkeypatch):
    config = replace(small(tmp_path, **(AHEAD | {"lr": 1e-2})), generator="beside")
    run = set_up(config)
    monkeypatch.setattr(type(run.generator), "sync", lambda self, policy, step=0: None)
    with pytest.raises(StaleEngineError, match="step 2: the generator's log-probs and the trainer's differ"):
        loop.run_steps(run)
    assert [r["step"] for r in rows(config)] == []
    assert checkpoint.newest_checkpoint(Path(config.output) / "checkpoints").step == 1


@pytest.mark.slow
@pytest.mark.vllm
def test_vllm_draws_in_a_thread_with_the_weights_before_the_update(tmp_path, options):
    """What is kept for step 3 has the log-probs of the weights after step 1, and not of those after step 2."""
    config = replace(small(tmp_path, **(options | {"steps": 3})), generator="vllm")
    loop.train(config)
    assert [r["policy_version"] for r in rows(config)] == [0, 0, 1]
    assert all(r["mismatch/mean_abs_logprob"] < 1e-4 for r in rows(config))
    root = Path(config.output) / "checkpoints"
    kept, saved = load_file(root / "step-2" / checkpoint.AHEAD), checkpoint.open_checkpoint(root / "step-2")
    assert saved.manifest["state"]["ahead"]["version"] == 1
    source = set_up(replace(config, output=config.output + "-fresh", generator="transformers")).prompts
    prompts = [p.token_ids for p in source.take(6)[4:] for _ in range(4)]
    gaps = []
    for step in (1, 2):
        policy = models.load_model(str(root / f"step-{step}"), torch.device("cpu"))
        gaps.append(max(largest_gaps(policy, prompts, kept)))
    assert gaps[0] < 1e-3 < gaps[1], gaps


def logprobs_of(model, prompt, ids) -> torch.Tensor:
    """The model's log-probs of the ids after the prompt, f64 [ids]."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *ids.tolist()]])).logits[0].double()
    return logits.log_softmax(-1)[-len(ids) - 1 : -1].gather(1, ids.long()[:, None])[:, 0]


def largest_gaps(policy, prompts, kept) -> list[float]:
    """Of each completion that was kept, the largest gap between its log-probs and the policy's."""
    lengths = kept["lengths"].tolist()
    pairs = zip(prompts, kept["token_ids"].split(lengths), kept["logprobs"].split(lengths), strict=True)
    return [float((logprobs_of(policy, prompt, ids) - engine).abs().max()) for prompt, ids, engine in pairs]
