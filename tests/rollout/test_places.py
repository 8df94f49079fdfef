"""Places are learnt from a loader's own copies; products tell a matrix from the one of a step before."""

from __future__ import annotations

import re
from functools import partial

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


# ------------------------------------------------------------------------------------------------- packed, as on a CPU


class UnquantizedLinearMethod:
    """Packs as vLLM's of this name does."""

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        packed = layer.weight.detach().clone()
        layer.cpu_linear = lambda x, weight, bias: x @ packed.T
        self.remove(layer)

    def remove(self, layer: nn.Module) -> None:
        if not layer.looks_up:
            layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)


class Forgetful(UnquantizedLinearMethod):
    """Leaves the packed form as it is."""

    process_weights_after_loading = UnquantizedLinearMethod.remove


class Matrix(nn.Module):
    """Multiplies with a packed form; one that looks rows up keeps the plain one, too."""

    def __init__(self, *shape: int, looks_up: bool = False) -> None:
        super().__init__()
        self.looks_up, self.quant_method = looks_up, UnquantizedLinearMethod()
        self.weight = nn.Parameter(torch.zeros(shape), requires_grad=False)


class VocabParallelEmbedding(Matrix):
    """Looks rows up, and keeps a packed form all the same."""


class PackingEngine(nn.Module):
    """A fused matrix, a vector, and embeddings that the head is tied to."""

    def __init__(self) -> None:
        super().__init__()
        self.fused, self.norm = Matrix(6, 4), nn.Parameter(torch.zeros(4), requires_grad=False)
        self.embedding, self.lm_head = VocabParallelEmbedding(5, 4, looks_up=True), Matrix(5, 4, looks_up=True)
        self.lm_head.weight = self.embedding.weight

    def load(self, weights, pack) -> None:
        self.fused.weight = nn.Parameter(torch.zeros(6, 4), requires_grad=False)
        parts = {"q": self.fused.weight[:2], "v": self.fused.weight[2:], "embedding": self.embedding.weight}
        for name, weight in weights:
            parts.get(name, self.norm).data.copy_(weight)
        for path, layer in self.named_modules():
            if isinstance(layer, Matrix):
                pack(path, layer, partial(layer.quant_method.process_weights_after_loading, layer))


def parts(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    shapes = {"v": (4, 4), "embedding": (5, 4), "norm": (4,), "q": (2, 4)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def packing_engine(engine: PackingEngine | None = None) -> tuple[PackingEngine, PushCheck]:
    """After the first push."""
    engine, check, weights = engine or PackingEngine(), PushCheck(torch.float32), parts(0)
    with check.watching(engine) as seen:
        engine.load(seen.through(weights.items()), seen.pack)
    check.verify(engine, weights.items, seen, 0)
    return engine, check


def test_after_the_first_push_matrices_are_put_together_and_packed_anew():
    engine, check = packing_engine()
    assert check.packs == {"fused.weight"} and check.knows_all(engine)
    weights, x, empty = parts(1), torch.eye(4), engine.fused.weight
    check.verify(engine, weights.items, check.place_all(engine, weights.items()), 1)
    assert torch.equal(engine.fused.cpu_linear(x, None, None).T, torch.cat((weights["q"], weights["v"])))
    for layer in (engine.embedding, engine.lm_head):
        assert torch.equal(layer.cpu_linear(x, None, None).T, weights["embedding"])
        assert torch.equal(layer.weight, weights["embedding"])
    assert torch.equal(engine.norm, weights["norm"])
    assert engine.fused.weight is empty, "as the engine left it"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {"q": w["q"].flip(0)}, "q (unlike the policy's), v (packed from other weights)"),
        (lambda w: {"q": w["v"][:2]}, "q (unlike the policy's), v (packed from other weights)"),
        (lambda w: {"norm": parts(0)["norm"]}, "norm (of an earlier push)"),
        (lambda w: {"embedding": 1.01 * w["embedding"]}, "embedding (unlike the policy's)"),
        (lambda w: {"q": None}, "v (not loaded), q (not loaded)"),
        (lambda w: {"embedding": None}, "embedding (of an earlier push)"),
    ],
)
def test_parts_that_are_wrong_or_missing_are_named(change, words):
    engine, check = packing_engine()
    weights = parts(1)
    sent = {name: weight for name, weight in (weights | change(weights)).items() if weight is not None}
    with pytest.raises(StaleEngineError, match=re.escape(f"arrive: {words}; no")):
        check.verify(engine, weights.items, check.place_all(engine, sent.items()), 1)
    check.verify(engine, weights.items, check.place_all(engine, weights.items()), 2)


@pytest.mark.parametrize("has_head", [True, False])
def test_a_layer_that_is_not_packed_anew_is_named(has_head):
    """Where there is no other head, the embedding is it."""
    engine = PackingEngine()
    if not has_head:
        del engine.lm_head
    _, check = packing_engine(engine)
    for seed, (layer, named) in enumerate(((engine.fused, ["v", "q"]), (engine.embedding, ["embedding"])), start=1):
        layer.quant_method, weights = Forgetful(), parts(seed)
        words = ", ".join(rf"{name} \(packed from other weights\)" for name in named)
        with pytest.raises(StaleEngineError, match=f"arrive: {words}; no"):
            check.verify(engine, weights.items, check.place_all(engine, weights.items()), 1)
        layer.quant_method = UnquantizedLinearMethod()
    check.verify(engine, weights.items, check.place_all(engine, weights.items()), 2)


def test_an_engine_that_packs_in_another_way_is_left_to_its_own_loader():
    engine, check = packing_engine()
    engine.fused._cpu_skip_gemm_dispatch = True
    assert not check.knows_all(engine), "others have copies of it"
    del engine.fused._cpu_skip_gemm_dispatch
    assert check.knows_all(engine)
    engine.fused.quant_method = Forgetful()
    assert not check.knows_all(engine), "its class is not known"
    engine, check = packing_engine()
    engine.lm_head.weight = nn.Parameter(engine.lm_head.weight.data, requires_grad=False)
    assert not check.knows_all(engine), "tied by its storage alone"
    engine, check = packing_engine()
    engine.matrix = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    assert not check.knows_all(engine), "nothing was copied to it"
    engine, check = packing_engine()
    del engine.fused.cpu_linear
    assert not check.knows_all(engine), "it cannot be read, and nobody multiplies with it"
