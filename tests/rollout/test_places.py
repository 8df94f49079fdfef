"""Places are learnt from a loader's own copies; products tell a matrix from the one of a step before."""

from __future__ import annotations

import pytest
import torch
from cases import slow_rows
from torch import nn

from fastkl.rollout import push_check
from fastkl.rollout.agreement import StaleEngineError
from fastkl.rollout.packed import alike, probes
from fastkl.rollout.places import Places, Watch
from fastkl.rollout.push_check import PushCheck


class Engine(nn.Module):
    """Fuses, turns round, computes and pads as engines do."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = nn.Parameter(torch.zeros(6, 4), requires_grad=False)
        self.turned = nn.Parameter(torch.zeros(4, 3), requires_grad=False)
        self.computed = nn.Parameter(torch.zeros(5), requires_grad=False)
        self.padded = nn.Parameter(torch.zeros(64, 4), requires_grad=False)
        self.single = nn.Parameter(torch.zeros(1), requires_grad=False)

    def load(self, weights) -> None:
        for name, weight in weights:
            if name in ("q", "v"):
                self.fused.data.narrow(0, 0 if name == "q" else 2, len(weight)).copy_(weight)
                self.fused.data.copy_(self.fused)
            elif name == "turned":
                self.turned.data.copy_(weight.t())
            elif name == "computed":
                self.computed.data.copy_(weight)
                self.computed.data.copy_(-self.computed.exp())
            elif name == "padded":
                self.padded.data[:5].copy_(weight)
            elif name == "single":
                self.single.data.fill_(weight.item())


def policy(seed: int = 0) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shapes = {"q": (2, 4), "v": (4, 4), "turned": (3, 4), "computed": (5,), "padded": (5, 4), "single": (1,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | {"vision": torch.randn(3, 3)}


def push(check: PushCheck, engine: Engine, weights: dict[str, torch.Tensor], spoiled=None, step: int = 0) -> None:
    with check.watching(engine) as seen:
        engine.load(seen.through((weights | (spoiled or {})).items()))
    check.verify(engine, lambda: weights.items(), seen, step)


def test_places_are_those_that_the_loader_copies_to():
    engine, places, weights = Engine(), Places(), policy()
    with Watch(engine, places) as watch:

        def sent():
            for name, weight in weights.items():
                watch.sending(name, weight)
                yield name, weight

        engine.load(sent())
    for found in places.of_parameter.values():
        for place in found:
            if place.parameter != "computed":
                held = place.target(getattr(engine, place.parameter))
                assert torch.equal(held, place.source(weights[place.sent]))
    assert {name: {place.sent for place in found} for name, found in places.of_parameter.items()} == {
        "fused": {"q", "v"}, "turned": {"turned"}, "computed": {"computed"}, "padded": {"padded"},
    }  # fmt: skip
    assert places.altered == {"computed"}
    assert all(places.filled(name) for name in ("fused", "turned", "padded"))
    places.of_parameter["fused"].pop()
    assert not places.filled("fused")


def test_what_arrives_passes_and_what_cannot_be_compared_is_known():
    engine, check = Engine(), PushCheck(torch.float32)
    for seed in range(3):
        push(check, engine, policy(seed), step=seed)
    assert sorted(check.not_compared) == ["computed", "single", "vision"]


@pytest.mark.parametrize("name", ["q", "v", "turned", "padded"])
def test_a_single_bit_that_differs_is_named_wherever_the_tensor_lies(name):
    engine, check, weights = Engine(), PushCheck(torch.float32), policy()
    push(check, engine, weights)
    other = weights[name].clone()
    other.view(torch.int32)[-1, -1] ^= 1
    with pytest.raises(StaleEngineError, match=rf"step 7: .* {name} \(unlike the policy's\); no completion"):
        push(check, engine, weights, {name: other}, step=7)
    push(check, engine, weights)


def test_a_tensor_that_the_engine_has_a_place_for_and_never_gets_is_named_at_the_first_push():
    engine = Engine()
    load = engine.load
    engine.load = lambda weights: load((name, weight) for name, weight in weights if name != "v")
    with pytest.raises(StaleEngineError, match=r"step 0: .*v \(not loaded\)"):
        push(PushCheck(torch.float32), engine, policy())


# ---------------------------------------------------------------------------------------------------------- products


F32, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize(
    ("dtype", "rows", "columns"),
    [(F32, 23, 16), (F32, 64, 64), (BF16, 64, 64), *slow_rows((F32, 512, 2048), (BF16, 512, 2048))],
)
def test_products_in_another_order_are_alike_and_those_of_the_step_before_are_not(dtype, rows, columns):
    """Sums backwards; and a step of AdamW at 1e-6, which moves every number by that."""
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        weight = 0.5 / columns**0.5 * torch.randn(rows, columns, generator=generator)
        moved = weight + 1e-6 * torch.randn(rows, columns, generator=generator).sign()
        x = probes(rows, columns)
        want = x @ weight.to(dtype).float().T
        backwards = (x.flip(1) @ weight.to(dtype).float().flip(1).T).to(dtype)
        assert alike(backwards, want, columns)
        assert not alike((x @ moved.to(dtype).float().T).to(dtype), want, columns)


class PlainEngine(Engine):
    """Only fuses, turns round and pads, and uses one parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        del self.computed, self.single
        self.head = self.padded


def plain_policy(seed: int = 0) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in policy(seed).items() if name not in ("computed", "single")}


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(push_check, "PACKING_DEVICES", ())


def test_after_the_first_push_weights_are_copied_to_their_places_as_the_loader_does(as_on_a_gpu):
    engine, loaded, check = PlainEngine(), PlainEngine(), PushCheck(torch.float32)
    assert not check.knows_all(engine), "nothing has been pushed"
    push(check, engine, plain_policy())
    assert check.knows_all(engine)
    weights = plain_policy(1)
    seen = check.place_all(engine, weights.items())
    loaded.load(weights.items())
    assert all(torch.equal(a, b) for a, b in zip(engine.parameters(), loaded.parameters(), strict=True))
    check.verify(engine, lambda: weights.items(), seen, 1)


def test_a_copy_that_does_not_reach_its_place_is_named(as_on_a_gpu):
    engine, check = PlainEngine(), PushCheck(torch.float32)
    push(check, engine, plain_policy())
    weights = plain_policy(1)
    seen = check.place_all(engine, (pair for pair in weights.items() if pair[0] != "v"))
    with pytest.raises(StaleEngineError, match=r"v \(of an earlier push\)"):
        check.verify(engine, lambda: weights.items(), seen, 1)


def test_an_engine_that_does_more_than_copy_is_left_to_its_own_loader(as_on_a_gpu, monkeypatch):
    engine, check = Engine(), PushCheck(torch.float32)
    push(check, engine, policy())
    assert not check.knows_all(engine), "it computes"
    plain, check = PlainEngine(), PushCheck(torch.float32)
    push(check, plain, plain_policy())
    check.places.of_parameter["fused"].pop()
    assert not check.knows_all(plain), "half of a parameter has no place"
    check = PushCheck(torch.float32)
    push(check, plain, plain_policy())
    monkeypatch.setattr(push_check, "PACKING_DEVICES", ("cpu",))
    assert not check.knows_all(plain), "it may pack what it multiplies with"
