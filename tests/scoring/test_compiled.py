"""Compiled layers compute what they did, are compiled once whatever the lengths, and leave the model as it was.

How often torch compiles is counted with its backend "eager", which runs the graphs that it is given; what the kernels
compute is tested with the one that runs have, inductor.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._inductor.config as inductor
from toy import prompt, toy_model
from transformers import AttentionInterface

from fastkl.config.settings import TrainConfig, check_config, uncut
from fastkl.errors import UserError
from fastkl.scoring import adapters, attention, backbone, compiled
from fastkl.scoring.models import store_as_computed
from fastkl.scoring.pack import pack
from fastkl.scoring.scored_model import ScoredModel, WithoutAdapters
from fastkl.types import Completion, PackedBatch, RolloutBatch

CPU = torch.device("cpu")
LENGTHS = (((3, (5, 5)),), ((3, (4, 5)), (5, (6, 2))), ((9, (4, 5)), (5, (6, 2)), (2, (3, 9))))
"""(prompt, completions) of the groups of three micro-batches. The first, by which layers are compiled, packs as many
tokens as the toy is wide, and fills its rows."""


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No graphs of other tests."""
    monkeypatch.setattr(compiled, "KINDS", set())
    backbone.register_packed_attention()
    torch._dynamo.reset()
    monkeypatch.setattr(compiled, "BACKEND", "eager")


def micro_batch(groups) -> PackedBatch:
    prompts = tuple(prompt(*range(1, tokens + 1)) for tokens, _ in groups)
    completions = tuple(
        tuple(Completion(tuple(range(1, n + 1)), (0.0,) * n, "length", "") for n in lengths) for _, lengths in groups
    )
    shape = len(groups), len(completions[0])
    rollout = RolloutBatch(prompts, completions, torch.zeros(shape), torch.ones(shape, dtype=torch.bool), 0)
    ((_, micro),) = pack(rollout, range(len(groups)), 1 << 30, CPU)
    return micro


def num_graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def pass_over(scored: ScoredModel, groups, *, learns: bool = True) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states, and the gradient of each parameter. The backward has a thread of its own, as on a GPU: what torch
    was told in the forward's thread, it does not know there."""
    with scored.scoring(), torch.set_grad_enabled(learns), ThreadPoolExecutor(1) as other:
        states = scored.hidden(micro_batch(groups)).states
        if learns:
            other.submit(states.sin().sum().backward).result()
    gradients = {name: p.grad.clone() for name, p in scored.named_parameters() if p.grad is not None}
    scored.zero_grad()
    return states.detach(), gradients


def assert_alike(scored: ScoredModel, layers, groups, rtol: float = 1e-5, *, learns: bool = True) -> None:
    """Compiled equals uncompiled, relative to the largest number of each tensor."""
    scored.compiled = {}
    states, gradients = pass_over(scored, groups, learns=learns)
    scored.compiled = layers
    found, theirs = pass_over(scored, groups, learns=learns)
    assert theirs.keys() == gradients.keys() and bool(gradients) == learns
    for a, b in ((found, states), *((theirs[name], gradients[name]) for name in gradients)):
        torch.testing.assert_close(a, b, rtol=0, atol=rtol * float(b.abs().max()))


@pytest.mark.parametrize(
    ("layout", "options"),
    [
        pytest.param("shared", "", marks=pytest.mark.slow),
        pytest.param("packed", "checkpointing", marks=pytest.mark.slow),
        pytest.param("packed", "bfloat16", marks=pytest.mark.long),
        pytest.param("padded", "", marks=pytest.mark.long),
    ],
)
def test_layers_share_their_graphs_and_no_length_makes_a_new_one(layout, options):
    model = toy_model(dtype=torch.float32, num_hidden_layers=2)
    if options == "checkpointing":
        model.gradient_checkpointing_enable()
    half = options == "bfloat16"
    scored = ScoredModel(model, layout, torch.bfloat16 if half else torch.float32)
    layers, before = compiled.compiled_layers(model), num_graphs()
    counts = []
    for groups in LENGTHS:
        assert_alike(scored, layers, groups, 0.05 if half else 1e-5)
        counts.append(num_graphs() - before)
    assert len(set(counts)) == 1 and 1 <= counts[0] <= 5, counts


@pytest.mark.long
def test_adapters_on_and_off_and_a_rounded_second_model_have_graphs_of_their_own_and_no_more():
    model = toy_model(dtype=torch.float32, num_hidden_layers=3)
    adapters.add_adapters(model, 3, 6.0, ("all-linear",), 0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    policy, teacher = ScoredModel(model, "shared"), toy_model(1, dtype=torch.float32).requires_grad_(False)
    store_as_computed(teacher, torch.bfloat16)
    second = ScoredModel(teacher, "packed", torch.bfloat16)
    reference, layers = WithoutAdapters(policy), compiled.compiled_layers(model)
    theirs = compiled.compiled_layers(teacher)
    counts = []
    for groups in LENGTHS:
        assert_alike(policy, layers, groups)
        assert_alike(policy, layers, groups, learns=False)
        assert_alike(reference, layers, groups, learns=False)
        assert_alike(second, theirs, groups, 0.05, learns=False)
        counts.append(num_graphs())
    assert len(set(counts)) == 1, counts
    assert (pass_over(policy, LENGTHS[0])[0] - pass_over(reference, LENGTHS[0], learns=False)[0]).abs().max() > 0.01


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductors_layers_are_as_near_to_float64_as_uncompiled_ones(dtype, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", "inductor")
    exact = ScoredModel(toy_model(num_hidden_layers=1), "shared", torch.float32)  # computes in its weights' float64
    model = toy_model(dtype=torch.float32, num_hidden_layers=1)
    scored, layers = ScoredModel(model, "shared", dtype), compiled.compiled_layers(model)
    for groups in LENGTHS[::2]:
        wanted, plain = pass_over(exact, groups), pass_over(scored, groups)
        scored.compiled = layers
        with inductor.patch(compile_threads=1):
            found = pass_over(scored, groups)
        scored.compiled = {}
        assert error(found[0], wanted[0]) <= 2 * error(plain[0], wanted[0]) + 1e-7
        for name in wanted[1]:
            assert error(found[1][name], wanted[1][name]) <= 3 * error(plain[1][name], wanted[1][name]) + 1e-7, name


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative to the size of the whole tensor."""
    return float((found.double() - wanted).norm() / wanted.norm())


@pytest.mark.slow
def test_a_model_is_uncompiled_outside_of_scoring_and_nothing_in_it_has_another_name():
    model = toy_model(dtype=torch.float32, num_hidden_layers=1)
    names, scored, other = list(model.state_dict()), ScoredModel(model, "shared"), ScoredModel(model, "shared")
    said = compiled.use(scored, compiled.compiled_layers(model), micro_batch(LENGTHS[0]), learns=True)
    assert said.startswith("1 layers, ") and said.endswith("in gradients to 0.0e+00")
    again = compiled.use(other, compiled.compiled_layers(model), micro_batch(LENGTHS[0]), learns=True)
    assert again.startswith("1 layers, 0 new graphs; ")  # a second run in the process has those of the first
    other.compiled, graphs = scored.compiled, num_graphs()
    with scored.scoring():
        with other.scoring():  # a reference that is the policy without its adapters
            pass
        assert all("forward" in vars(layer) for layer in model.model.layers)
        assert list(model.state_dict()) == names
    assert not any("forward" in vars(module) for module in model.modules())
    assert AttentionInterface()[attention.ATTENTION] is attention.packed_attention
    torch._dynamo.reset()
    model(input_ids=torch.arange(9)[None], use_cache=True)
    scored.compiled = {}
    pass_over(scored, LENGTHS[0])
    assert num_graphs() == graphs


def test_lists_of_layers_are_found_and_not_the_lists_inside_of_layers():
    from transformers import MixtralConfig, MixtralForCausalLM

    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=2, num_local_experts=2,
        )
    )  # fmt: skip
    assert compiled.layers_of(model) == list(model.model.layers)
    with pytest.raises(UserError, match="compile: True finds no list of layers in Linear; leave it out"):
        compiled.compiled_layers(torch.nn.Linear(2, 2))


def broken(graph, inputs):
    raise RuntimeError("not this machine\nand a second line")


def with_outputs(change):
    """A backend that runs its graphs, and changes what they give."""

    def backend(graph, inputs):
        return lambda *given: tuple(change(x) if isinstance(x, torch.Tensor) else x for x in graph(*given))

    return backend


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient.flip(-1)  # of the same norm


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        (broken, "compile: True fails for this model on this machine (not this machine); leave it out."),
        ("inducto", "compile: True fails for this model on this machine (Invalid backend: 'inducto'"),
        pytest.param(
            *(with_outputs(lambda x: 1.01 * x), "compile: True changes the hidden states of LlamaForCausalLM by "),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *(with_outputs(WrongBackward.apply), "compile: True changes the gradients of LlamaForCausalLM by "),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["broken", "unknown", "wrong", "wrong backward"],
)
def test_what_does_not_compile_or_computes_something_else_is_refused_in_a_line(backend, words, monkeypatch):
    monkeypatch.setattr(compiled, "BACKEND", backend)
    model = toy_model(dtype=torch.float32, num_hidden_layers=1)
    with pytest.raises(UserError) as refused:
        compiled.use(
            ScoredModel(model, "shared"), compiled.compiled_layers(model), micro_batch(LENGTHS[0]), learns=True
        )
    said = str(refused.value)
    assert said.startswith(words) and "leave it out" in said and "\n" not in said, said


def test_layers_in_which_there_is_nothing_to_compile_are_refused():
    model = toy_model(dtype=torch.float32, num_hidden_layers=1)
    layers = {layer: torch.compiler.disable(layer.forward) for layer in model.model.layers}
    with pytest.raises(UserError, match="compile: True finds nothing to compile in the layers of LlamaForCausalLM; "):
        compiled.use(ScoredModel(model, "shared"), layers, micro_batch(LENGTHS[0]), learns=False)


@pytest.mark.slow
def test_more_graphs_than_the_limit_end_the_run_which_does_not_go_on_uncompiled(monkeypatch):
    monkeypatch.setattr(compiled, "MOST_GRAPHS", 1)
    model = toy_model(dtype=torch.float32, num_hidden_layers=1)
    scored = ScoredModel(model, "shared")
    scored.compiled = compiled.compiled_layers(model)
    pass_over(scored, LENGTHS[0])
    with pytest.raises(UserError, match="compile: True fails .*recompile_limit.* without it by --resume"):
        pass_over(scored, LENGTHS[0], learns=False)


def test_a_missing_compiler_and_what_does_not_go_with_it_are_refused_before_anything_is_loaded():
    compiled.check_compiler(CPU)
    with (
        inductor.patch({"cpp.cxx": ("no-such-compiler",)}),
        pytest.raises(UserError, match=r"compile: True needs a C\+\+ compiler on a CPU, .* install g\+\+"),
    ):
        compiled.check_compiler(CPU)
    with pytest.raises(UserError, match="shard: compile has layers whose weights are whole; use --shard none"):
        check_config(TrainConfig(compile=True, shard="full"))
    with pytest.raises(UserError, match="compile: True is not known to work with the 4 bits of qlora"):
        check_config(TrainConfig(compile=True, qlora=True, lora_rank=4))
    assert uncut(TrainConfig(compile=True)) and not uncut(TrainConfig())
