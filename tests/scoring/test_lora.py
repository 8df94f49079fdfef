"""Adapters: the policy starts as the reference, the reference stays the base model, and an engine gets their sum."""

from __future__ import annotations

import copy

import pytest
import torch
from toy import toy_batch, toy_model
from toy_step import toy_objective
from transformers import LlamaForCausalLM

from fastkl.config.settings import TrainConfig
from fastkl.errors import UserError
from fastkl.scoring import adapters, backbone
from fastkl.scoring.pack import pack
from fastkl.scoring.scored_model import ScoredModel
from fastkl.training.loop import update
from fastkl.training.state import StepLimits
from fastkl.training.stopwatch import Stopwatch

CPU = torch.device("cpu")
CONFIG = TrainConfig(kl_coef=0.1)


@pytest.fixture(autouse=True)
def packed_attention():
    backbone.register_packed_attention()


def with_adapters(seed: int = 0) -> LlamaForCausalLM:
    model = toy_model(dtype=torch.float32)
    adapters.add_adapters(model, 3, 6.0, ("all-linear",), seed)
    return model


def trained(model, steps: int = 3, lr: float = 0.05, reference=None):
    """The model after some updates; the outcomes."""
    policy = ScoredModel(model, "shared")
    reference = reference or ScoredModel(model, "shared", adapters=False)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    batch = toy_batch(toy_model())
    limits = StepLimits(1 << 20, 1.0, 1e9)
    return [
        update(policy, reference, optimizer, batch, toy_objective(CONFIG), limits, Stopwatch(CPU), step=step)
        for step in range(1, steps + 1)
    ]


def states(scored: ScoredModel) -> torch.Tensor:
    ((_, micro),) = pack(toy_batch(toy_model()), [0, 1, 2], 1 << 30, CPU)
    with scored.scoring(), torch.no_grad():
        return scored.hidden(micro).states


def test_the_kl_is_exactly_zero_at_the_start_and_not_later():
    first, *_, last = trained(with_adapters())
    assert first.total.mean("kl_exact") == 0.0
    assert last.total.mean("kl_exact") > 1e-3


def test_only_adapters_are_trained_and_the_reference_stays_the_base_model_to_the_last_bit():
    model, base = with_adapters(), toy_model(dtype=torch.float32)
    trained(model)
    assert torch.equal(states(ScoredModel(model, "shared", adapters=False)), states(ScoredModel(base, "shared")))
    assert not torch.equal(states(ScoredModel(model, "shared")), states(ScoredModel(base, "shared")))
    names = dict(base.named_parameters())
    for name, parameter in model.named_parameters():
        if not adapters.is_adapter(name):
            assert torch.equal(parameter, names[name.replace(".base_layer", "")])


@pytest.mark.slow
def test_merged_weights_are_those_of_a_model_that_scores_like_the_adapters():
    model = with_adapters()
    trained(model)
    plain = toy_model(dtype=torch.float32)
    weights = dict(adapters.merged(model))
    assert weights.keys() == dict(plain.named_parameters()).keys()
    plain.load_state_dict(weights, strict=False)
    torch.testing.assert_close(
        states(ScoredModel(plain, "shared")), states(ScoredModel(model, "shared")), rtol=0, atol=1e-5
    )


def test_merging_adds_alpha_over_r_times_b_a_in_float64():
    model = with_adapters()
    trained(model)
    layer = model.model.layers[0].mlp.down_proj
    a, b = (getattr(layer, name)["default"].weight.double() for name in ("lora_A", "lora_B"))
    expected = layer.base_layer.weight.double() + 6.0 / 3 * b @ a
    found = dict(adapters.merged(model))["model.layers.0.mlp.down_proj.weight"]
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)


def test_a_models_parameters_without_adapters_are_handed_over_as_they_are():
    model = toy_model()
    handed = dict(adapters.merged(model))
    assert all(handed[name].data_ptr() == parameter.data_ptr() for name, parameter in model.named_parameters())


def test_the_gradient_of_an_adapter_is_that_of_the_weight_it_adds_to():
    """d loss / d B = alpha / r * dW A^T, with dW from a run that trains every weight."""
    model = with_adapters()
    full = toy_model(dtype=torch.float32)
    reference = ScoredModel(copy.deepcopy(full).requires_grad_(False), "shared")
    gradients = {}
    for name, m in (("adapters", model), ("full", full)):
        hooks = [
            p.register_post_accumulate_grad_hook(lambda p, key=(name, n): gradients.__setitem__(key, p.grad.clone()))
            for n, p in m.named_parameters()
            if p.requires_grad
        ]
        trained(m, steps=1, reference=reference)
        for hook in hooks:
            hook.remove()
    layer = "model.layers.1.self_attn.q_proj"
    a = model.get_submodule(layer).lora_A["default"].weight
    expected = 2.0 * gradients["full", f"{layer}.weight"] @ a.T  # A has not moved: B was zero
    torch.testing.assert_close(gradients["adapters", f"{layer}.lora_B.default.weight"], expected, rtol=1e-3, atol=1e-6)


def test_adapters_start_at_numbers_that_depend_on_the_seed_alone():
    def first_matrix(seed: int) -> torch.Tensor:
        model = toy_model()
        torch.manual_seed(5)
        before = torch.get_rng_state()
        adapters.add_adapters(model, 3, 6.0, ("all-linear",), seed)
        assert torch.equal(torch.get_rng_state(), before)
        return model.model.layers[0].self_attn.q_proj.lora_A["default"].weight

    assert torch.equal(first_matrix(1), first_matrix(1))
    assert not torch.equal(first_matrix(1), first_matrix(2))


@pytest.mark.slow
def test_gradient_checkpointing_changes_no_gradient_of_an_adapter():
    plain, frugal = with_adapters(), with_adapters()
    frugal.gradient_checkpointing_enable()
    outcomes = [trained(m)[-1].grad_norm for m in (plain, frugal)]
    assert outcomes[0] == pytest.approx(outcomes[1], rel=1e-5) and outcomes[0] > 0


@pytest.mark.parametrize(
    ("targets", "message"),
    [(("lm_head",), "output head"), (("embed_tokens",), "embedding")],
)
def test_head_and_embeddings_carry_no_adapters(targets, message):
    with pytest.raises(UserError, match=message):
        adapters.check_adapters(4, targets)


def test_a_peft_that_is_too_old_for_transformers_is_named_before_a_model_is_read(monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.1")
    with pytest.raises(UserError, match=r"^lora_rank: transformers [\d.]+ asks for PEFT 99.1 or newer, and [\d.]+ is"):
        adapters.check_adapters(4, ("all-linear",))


def test_a_layer_that_does_not_exist_is_named():
    with pytest.raises(UserError, match=r"^lora_targets: no_such_proj cannot carry adapters"):
        adapters.add_adapters(toy_model(), 3, 6.0, ("no_such_proj",), 0)
