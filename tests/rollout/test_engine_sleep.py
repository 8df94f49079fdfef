"""An engine that sleeps between phases: the order of its calls, recorded by a stand-in; no GPU is needed."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from fastkl.config.settings import TrainConfig
from fastkl.errors import UserError
from fastkl.rollout.engine_memory import EngineMemory
from fastkl.rollout.vllm import VllmGenerator
from fastkl.training.places import check_sleep


class RecordingEngine:
    """Writes down what is asked of it, and refuses what a sleeping engine cannot do."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.there = {"weights", "kv_cache"}

    def sleep(self, level: int) -> None:
        self.calls.append(f"sleep {level}")
        self.there.clear()

    def wake_up(self, tags: list[str]) -> None:
        self.calls.append(f"wake {' '.join(tags)}")
        self.there.update(tags)

    def push(self, policy: object, step: int) -> None:
        assert "weights" in self.there, "pushed into memory that is not there"
        self.calls.append(f"push {step}")
        self.reset_prefix_cache()

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset cache")
        return True

    def generate(self, prompts: list, params: list, use_tqdm: bool) -> list:
        assert self.there == {"weights", "kv_cache"}, "drawn without weights or cache"
        self.calls.append("generate")
        return []


def generator_of(engine: RecordingEngine, sleep: bool) -> VllmGenerator:
    made = VllmGenerator.__new__(VllmGenerator)
    made.llm, made.weights = engine, SimpleNamespace(push=engine.push)
    made.memory = EngineMemory(engine, sleep)
    made._params = lambda seeds: []
    return made


class Some(list):
    """Requests that are there, whatever they are: without any, the engine is not asked."""

    def __bool__(self) -> bool:
        return True


def two_steps(generator: VllmGenerator) -> None:
    """As the loop does: a push, a held-out evaluation, then drawing, resting, pushing."""
    generator.sync(None, 0)
    generator.generate(Some())
    for step in (1, 2):
        generator.generate(Some())
        generator.generate(Some())  # groups that are drawn anew
        generator.rest()
        generator.rest()
        generator.sync(None, step)


def test_the_engine_sleeps_while_the_trainer_works_and_wakes_weights_first():
    engine = RecordingEngine()
    two_steps(generator_of(engine, sleep=True))
    drawn = ["reset cache", "generate"]
    awake = ["wake weights", "push {}", "reset cache", "wake kv_cache"]
    step = [*drawn, *drawn, "sleep 2", *awake]
    wanted = ["push 0", "reset cache", *drawn, *step, *step]
    pushes = iter((1, 2))
    assert engine.calls == [call.format(next(pushes)) if "{}" in call else call for call in wanted]


def test_what_the_trainer_has_freed_is_given_back_before_the_engine_wakes(monkeypatch):
    engine = RecordingEngine()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: engine.calls.append("empty_cache"))
    memory = EngineMemory(engine, sleep=True)
    memory.rest()
    with memory.awake():
        engine.push(None, 1)
    assert engine.calls[:3] == ["sleep 2", "empty_cache", "wake weights"]


def test_a_failed_push_leaves_the_engine_asleep():
    engine = RecordingEngine()
    memory = EngineMemory(engine, sleep=True)
    memory.rest()
    with pytest.raises(ZeroDivisionError), memory.awake():
        raise ZeroDivisionError
    assert memory.asleep and "wake kv_cache" not in engine.calls


def test_without_the_setting_it_is_never_put_to_sleep():
    engine = RecordingEngine()
    two_steps(generator_of(engine, sleep=False))
    assert not any(call.startswith(("sleep", "wake")) for call in engine.calls)


def test_it_is_refused_where_no_engine_has_gpu_memory():
    config = TrainConfig(engine_sleep=True)
    with pytest.raises(UserError, match="engine_sleep: vLLM gives up a GPU's memory, and this run is on the cpu"):
        check_sleep(config, "vllm", torch.device("cpu"))
    with pytest.raises(UserError, match="engine_sleep: only vLLM .* the generator is transformers"):
        check_sleep(config, "transformers", torch.device("cuda"))
    check_sleep(config, "vllm", torch.device("cuda"))
