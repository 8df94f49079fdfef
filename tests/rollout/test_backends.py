"""Another generator is one file with `obstacle` and `start`, and one line in the registry."""

from __future__ import annotations

import subprocess
import sys
from types import ModuleType

import pytest
import torch

from fastkl.config.settings import TrainConfig, settings
from fastkl.errors import UserError
from fastkl.rollout.generator import GENERATORS, Backend, choose_generator
from fastkl.rollout.requests import grouped, requests_of, sample_seed
from fastkl.rollout.transformers import TransformersGenerator
from fastkl.training.loop import run_steps
from fastkl.training.setup import set_up
from fastkl.types import Completion, Prompt

CPU = torch.device("cpu")


@pytest.fixture
def mine(monkeypatch):
    """A backend that decodes as the built-in one does and counts its calls."""
    settings()
    module = ModuleType("generator_of_a_test")
    module.calls = []

    class Mine(TransformersGenerator):
        def generate(self, requests):
            module.calls.append(len(requests))
            return super().generate(requests)

    module.obstacle = lambda model_config, device: "it dislikes GPUs" if device.type == "cuda" else None
    module.start = lambda options: Mine(options.policy, options.tokenizer, options.sampling, dtype=options.dtype)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(GENERATORS, "mine", Backend(module.__name__))
    return module


@pytest.mark.slow
def test_a_generator_in_the_registry_is_chosen_by_name_and_makes_a_runs_completions(mine, tmp_path):
    assert "mine" in settings()["generator"].choices, "though the table of settings is older than the entry"
    assert choose_generator("mine", None, CPU) == ("mine", "asked for")
    with pytest.raises(UserError, match="generator: mine was asked for, but it dislikes GPUs"):
        choose_generator("mine", None, torch.device("cuda"))
    config = TrainConfig(
        output=str(tmp_path / "run"), generator="mine", steps=2, prompts_per_step=2, num_samples=3, max_new_tokens=6,
        report_to=(), dtype="float32",
    )  # fmt: skip
    result = run_steps(set_up(config))
    assert mine.calls == [6, 6]
    assert result.metrics["step"] == 2


def test_requests_carry_their_place_and_a_seed_of_their_own():
    prompts = [Prompt((1,), "a", "a", 1), Prompt((2, 3), "b", "b", 2)]
    requests = requests_of(prompts, 3, seed=5, step=7)
    assert [(r.prompt.text, r.prompt_index, r.sample_index) for r in requests] == [
        ("a", 0, 0), ("a", 0, 1), ("a", 0, 2), ("b", 1, 0), ("b", 1, 1), ("b", 1, 2),
    ]  # fmt: skip
    assert [r.seed for r in requests] == [sample_seed(5, 7, b, k) for b in range(2) for k in range(3)]
    completions = [Completion((i,), (0.0,), "stop", str(i)) for i in range(6)]
    assert [[c.text for c in group] for group in grouped(completions, 3)] == [["0", "1", "2"], ["3", "4", "5"]]


def test_the_registry_is_known_without_torch():
    code = "import sys; from fastkl.rollout.generator import GENERATORS; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
