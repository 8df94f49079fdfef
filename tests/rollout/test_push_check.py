"""Every push is proven: whatever does not arrive in the engine is named at that push, however little it differs.

The faults are real: the weights of the push itself are dropped, exchanged, rounded or old, or the engine is kept from
packing them, and the engine is vLLM's. One AdamW step at a learning rate of 1e-6 lies between two pushes, which in
bfloat16 moves one number in a hundred.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from test_generators import PROMPTS, gaps, tied_model
from toy import STOP, ToyTokenizer, draw

from fastkl.rollout import weight_sync
from fastkl.rollout.agreement import AGREEMENT_NATS, StaleEngineError
from fastkl.rollout.fingerprint import WORDS, fingerprint
from fastkl.rollout.push_check import Push, PushCheck
from fastkl.rollout.vllm import VllmGenerator
from fastkl.sampling.params import Sampling

# --------------------------------------------------------------------------------------------------------- fingerprints


def by_hand(tensor: torch.Tensor) -> list[int]:
    """The definition, in Python's integers."""
    raw = b"".join(number.contiguous().view(torch.uint8).numpy().tobytes() for number in tensor.reshape(-1, 1))
    raw += bytes(-len(raw) % 8)
    words = [int.from_bytes(raw[i : i + 8], "little", signed=True) for i in range(0, len(raw), 8)]
    whole = len(words) // WORDS * WORDS
    columns = [i % WORDS + 1 for i in range(whole)] + [i + 1 for i in range(len(words) - whole)]
    sums = (
        sum(w * c for w, c in zip(words, columns, strict=True)),
        sum(w * (i // WORDS + 1) for i, w in enumerate(words)),
    )
    return [(value + 2**63) % 2**64 - 2**63 for value in sums]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (40, 33), (64, 64), (3, 5, 2)])
def test_a_fingerprint_is_the_sums_of_its_definition(dtype, shape):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert fingerprint(tensor).tolist() == by_hand(tensor)


def test_it_depends_on_the_numbers_in_logical_order_alone():
    whole = torch.randn(30, 31, generator=torch.Generator().manual_seed(0))
    assert fingerprint(whole.T).tolist() == fingerprint(whole.T.contiguous()).tolist()
    assert fingerprint(whole[1:, 3:8]).tolist() == fingerprint(whole[1:, 3:8].clone()).tolist()
    assert fingerprint(whole[1:2, 1:]).tolist() == fingerprint(whole[1:2, 1:].clone()).tolist(), "an odd offset"
    assert fingerprint(whole).tolist() != fingerprint(whole.T).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_changed_bit_and_any_two_exchanged_numbers_change_it(dtype):
    tensor = torch.randn(37, 41, generator=torch.Generator().manual_seed(0)).to(dtype)
    bits = {torch.float32: torch.int32, torch.bfloat16: torch.int16}[dtype]
    flat, before = tensor.view(-1), fingerprint(tensor).tolist()
    seen = {tuple(before)}
    for place in range(0, flat.numel(), 7):
        changed = flat.clone()
        changed.view(bits)[place] ^= 1
        seen.add(tuple(fingerprint(changed).tolist()))
        other = (place * 31 + 11) % flat.numel()
        exchanged = flat.clone()
        exchanged[[place, other]] = exchanged[[other, place]]
        if not torch.equal(exchanged, flat):
            assert fingerprint(exchanged).tolist() != before
    assert len(seen) == 1 + len(range(0, flat.numel(), 7))


# --------------------------------------------------------------------------------------------------------------- faults


class Spoiled:
    """vLLM, but what is pushed goes through `change` first. None: nothing is pushed at all."""

    def __init__(self, llm, change) -> None:
        self.llm, self.change = llm, change

    def __getattr__(self, name: str):
        return getattr(self.llm, name)

    def collective_rpc(self, method: str, kwargs: dict) -> None:
        if self.change is None:
            return
        self.llm.collective_rpc(method, kwargs={"weights_iterator": iter(self.change(kwargs["weights_iterator"]))})


@contextmanager
def spoiled(engine: VllmGenerator, change) -> Iterator[None]:
    """What is pushed goes through `change` first, whichever way it takes. None: nothing is pushed at all."""
    check, llm = engine.weights.check, engine.llm
    place_all = check.place_all
    check.place_all = lambda model, weights: place_all(model, change(weights) if change else ())
    engine.weights.llm = Spoiled(llm, change)
    try:
        yield
    finally:
        check.place_all, engine.weights.llm = place_all, llm


@pytest.fixture(scope="module", params=[pytest.param("float32", marks=pytest.mark.long), "bfloat16"])
def running(request, tmp_path_factory) -> Iterator[VllmGenerator]:
    folder = tmp_path_factory.mktemp(request.param)
    some_model().save_pretrained(folder)
    generator = VllmGenerator(
        str(folder), ToyTokenizer(), Sampling(1.0, 12, stop_token_ids=(STOP,)), dtype=request.param, max_model_len=32,
        gpu_memory_utilization=0.2, log=folder / "engine.log",
    )  # fmt: skip
    yield generator
    generator.close()


@pytest.fixture(params=["loader", "places"])
def engine(running, request, monkeypatch) -> VllmGenerator:
    """On each of the two ways that weights take after the first push."""
    if request.param == "loader":
        monkeypatch.setattr(PushCheck, "knows_all", lambda *_: False)
        return running
    running.sync(some_model())
    (inside,) = running.llm.apply_model(lambda found: found)
    assert running.weights.check.knows_all(inside)
    return running


def some_model() -> torch.nn.Module:
    """With biases, and small numbers in them and in the last norm: neither zeros nor ones show every fault, and ones do
    not move in bfloat16; what does not move cannot be stale."""
    model = tied_model(attention_bias=True)
    small = [p for name, p in model.named_parameters() if name.endswith(".bias")] + [model.model.norm.weight]
    with torch.no_grad():
        for seed, parameter in enumerate(small):
            parameter.copy_(1e-3 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(seed)))
    return model


def small_step(model: torch.nn.Module) -> None:
    """One AdamW step at 1e-6, with some gradient."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.0)
    for i, parameter in enumerate(model.parameters()):
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    optimizer.step()
    optimizer.zero_grad()


def pushed(engine: VllmGenerator, change) -> str:
    """What is said when the second of two pushes goes through change(weights, old weights); empty if nothing is."""
    model = some_model()
    engine.sync(model, step=1)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    small_step(model)
    try:
        with spoiled(engine, change and (lambda weights: change(weights, before))):
            engine.sync(model, step=2)
    except StaleEngineError as complaint:
        return str(complaint)
    finally:
        engine.sync(model, step=3)
    return ""


QKV, NORM, HEAD = "model.layers.1.self_attn.k_proj.weight", "model.norm.weight", "model.embed_tokens.weight"
TENSORS = (
    *(QKV, NORM, HEAD, "model.layers.0.mlp.up_proj.weight", "model.layers.0.self_attn.o_proj.weight"),
    "model.layers.1.self_attn.v_proj.bias",
)


@pytest.mark.vllm
def test_a_push_that_arrives_is_not_complained_of_and_every_tensor_was_compared(engine):
    model = some_model()
    for step in range(4):
        engine.sync(model, step)
        small_step(model)
    places = engine.weights.check.places
    assert set(places.of_sent()) == {name for name, _ in model.named_parameters()}
    assert not engine.weights.check.not_compared
    compared = sum(torch.Size(place.source.shape).numel() for found in places.of_sent().values() for place in found)
    assert compared == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.vllm
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_is_dropped_from_the_push_is_named(engine, name):
    said = pushed(engine, lambda weights, old: ((n, w) for n, w in weights if n != name))
    assert said.startswith("step 2: ") and name in said
    assert "generator transformers" in said and said.count(". ") == 0


@pytest.mark.vllm
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_of_the_last_push_is_named_and_no_other(engine, name):
    said = pushed(engine, lambda weights, old: ((n, old[n] if n == name else w) for n, w in weights))
    assert f"{name} (of an earlier push)" in said
    assert not any(other in said for other in TENSORS if other != name)


@pytest.mark.vllm
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_that_was_rounded_on_its_way_is_named(engine, name):
    def rounded(weights, old):
        return ((n, w.to(torch.float16).float() if n == name else w) for n, w in weights)

    assert f"{name} (rounded to float16)" in pushed(engine, rounded)


@pytest.mark.vllm
def test_two_tensors_of_one_shape_that_are_exchanged_are_both_named(engine):
    k, v = QKV, QKV.replace("k_proj", "v_proj")

    def exchanged(weights, old):
        found = dict(weights)
        found[k], found[v] = found[v], found[k]
        return iter(found.items())

    said = pushed(engine, exchanged)
    assert f"{k} (replaced by {v})" in said and f"{v} (replaced by {k})" in said


@pytest.mark.vllm
def test_one_number_that_differs_is_named(engine):
    def nudged(weights, old):
        for name, weight in weights:
            if name == QKV:
                weight = weight.clone()
                weight[5, 7] *= 1.01
            yield name, weight

    assert f"{QKV} (unlike the policy's)" in pushed(engine, nudged)


@pytest.mark.vllm
def test_an_engine_that_is_never_synced_is_stopped_at_the_first_push_that_it_misses(engine):
    """At 1e-5 in bfloat16 its log-probs passed for rounding over 40 steps."""
    said = pushed(engine, None)
    assert said.startswith("step 2: ") and "more" in said


def needs_packed(layer: torch.nn.Module) -> None:
    """Skips where the engine multiplies with the weights that can be read, as in bfloat16 on processors without such
    products: then no copy of them can be out of date."""
    if layer.weight.ndim < 2:  # only the packed form is left
        return
    x = torch.ones(1, layer.weight.shape[1], dtype=layer.weight.dtype)
    with torch.no_grad():
        before = layer.cpu_linear(x, layer.weight, None)
        layer.weight.neg_()
        after = layer.cpu_linear(x, layer.weight, None)
        layer.weight.neg_()
    if not torch.equal(before, after):
        pytest.skip(f"on this processor the engine packs no {layer.weight.dtype} matrices")


@pytest.mark.vllm
def test_a_tied_head_that_is_not_packed_anew_is_named(engine, monkeypatch):
    (inside,) = engine.llm.apply_model(lambda found: found)
    needs_packed(inside.lm_head)
    pack_anew = Push.pack_anew
    monkeypatch.setattr(weight_sync, "_repack_tied_head", lambda model: None)
    monkeypatch.setattr(Push, "pack_anew", lambda push, name, *of: name == HEAD or pack_anew(push, name, *of))
    model = some_model()
    with pytest.raises(StaleEngineError, match=f"{HEAD} \\(packed from other weights\\)"):
        for step in range(2):
            engine.sync(model, step)
            small_step(model)
    monkeypatch.undo()
    engine.sync(model)


@pytest.mark.vllm
def test_a_matrix_that_is_packed_from_other_weights_after_all_is_named(engine):
    """The engine's own copy is spoiled behind the push."""
    model = some_model()
    engine.sync(model, 1)
    (inside,) = engine.llm.apply_model(lambda found: found)
    needs_packed(inside.model.layers[0].mlp.down_proj)
    old = inside.model.layers[0].mlp.down_proj.cpu_linear
    small_step(model)
    original = engine.llm.reset_prefix_cache
    engine.llm.reset_prefix_cache = lambda: (
        setattr(inside.model.layers[0].mlp.down_proj, "cpu_linear", old) or True  # it was emptied
    )
    try:
        with pytest.raises(StaleEngineError, match=r"layers\.0\.mlp\.down_proj\.weight \(packed from other weights\)"):
            engine.sync(model, 2)
    finally:
        engine.llm.reset_prefix_cache = original
    engine.sync(model, 3)


@pytest.mark.vllm
def test_a_matrix_that_the_engine_does_not_pack_anew_is_named(engine, monkeypatch):
    from vllm.model_executor.layers import utils

    (inside,) = engine.llm.apply_model(lambda found: found)
    left_out, pack = inside.model.layers[1].self_attn.qkv_proj, utils.dispatch_cpu_unquantized_gemm
    needs_packed(left_out)

    def instead(layer, remove_weight):
        if layer is not left_out:
            return pack(layer, remove_weight)
        layer.weight = torch.nn.Parameter(layer.weight.new_empty(0), requires_grad=False)

    model = some_model()
    engine.sync(model, 1)
    small_step(model)
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", instead)
    with pytest.raises(StaleEngineError, match=r"layers\.1\.self_attn\.k_proj\.weight \(packed from other weights\)"):
        engine.sync(model, 2)
    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", pack)
    engine.sync(model, 3)


def drawn(engine: VllmGenerator) -> list:
    """After each of three pushes."""
    model, found = some_model(), []
    for step in range(3):
        engine.sync(model, step)
        found.append(draw(engine, PROMPTS, 8, seed=3, step=step))
        small_step(model)
    return found


@pytest.mark.vllm
def test_neither_looking_nor_the_way_of_the_weights_changes_anything(running, monkeypatch):
    """With and without the check the engine draws the same tokens with the same log-probs."""
    looked = drawn(running)
    monkeypatch.setattr(running.weights.check, "verify", lambda *_: None)
    assert drawn(running) == looked
    monkeypatch.setattr(running.weights.check, "knows_all", lambda _: False)
    assert drawn(running) == looked
    assert gaps(some_model(), PROMPTS, looked[0]).mean() < AGREEMENT_NATS[running.weights.check.dtype]
