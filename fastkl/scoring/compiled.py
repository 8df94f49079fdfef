"""Decoder layers through torch.compile, which makes few kernels of their norms, rotary embeddings and gates.

In: a ScoredModel. Out: the same one. Its layers run compiled inside of `ScoredModel.scoring`, and as they are outside
of it, where a generator may decode with them. No module is wrapped, so that parameters keep their names. Packed
attention (attention.py) is not compiled, since its lengths change from batch to batch: it runs between two graphs.

Layers that are built alike share their graphs. There is a set of these with gradients and one without, one with
adapters and one without. Lengths make no new ones, except where a number of rows or tokens is 1, which is a constant to
torch, or happens to be a width. From the 9th graph of a piece of code on, torch would run it uncompiled and not say so;
here the limit is MOST_GRAPHS, and beyond it the run ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn

from fastkl.errors import UserError
from fastkl.scoring.attention import ATTENTION, packed_attention
from fastkl.scoring.backbone import HALF_TOLERANCE, TOLERANCE
from fastkl.scoring.source import first_line
from fastkl.types import PackedBatch

BACKEND = "inductor"
MOST_GRAPHS = 64  # of one piece of code, such as the feed-forward part of all layers

GRADIENT_FACTOR = 10
"""How much further gradients may differ than hidden states. In SmolLM2-135M under bfloat16, rounding alone changes
states by 0.4 %, and gradients by 15 %; compiling changes gradients by 16 % there, and by 0.002 % in float32."""

KINDS: set[type[nn.Module]] = set()
"""Layers of these kinds have been compiled in this process: another model, or another run, may use their graphs."""

Compiled = Mapping[nn.Module, Callable[..., Any]]
"""The compiled forward of each layer. It compiles when it is first called."""


def check_compiler(device: torch.device) -> None:
    """UserError where there is no C++ compiler, without which nothing is compiled for a CPU. Kernels for a GPU are
    Triton's, which the operators need anyway."""
    if device.type != "cpu":
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler as missing:
        raise UserError(
            "compile: True needs a C++ compiler on a CPU, and torch finds none; install g++, name another one in the "
            "variable CXX, or leave compile out."
        ) from missing


def compiled_layers(model: nn.Module) -> Compiled:
    """The layers of a model, to be given to `use`. UserError for one that has no list of them."""
    if not (layers := layers_of(model)):
        raise UserError(f"compile: True finds no list of layers in {type(model).__name__}; leave it out.")
    with _in_one_sentence(Exception):
        return {layer: torch.compile(layer.forward, backend=BACKEND, dynamic=True) for layer in layers}


def layers_of(module: nn.Module) -> list[nn.Module]:
    """The members of its lists of modules, but not of lists inside of a member (experts)."""
    if isinstance(module, nn.ModuleList):
        return list(module)
    return [layer for child in module.children() for layer in layers_of(child)]


def use(scored: Any, compiled: Compiled, probe: PackedBatch, *, learns: bool) -> str:
    """Has a ScoredModel run these layers, and says how well they agree with uncompiled ones on the probe: in hidden
    states and, where it learns, in gradients. UserError where they do not."""
    from torch._dynamo.utils import counters

    before = counters["stats"]["unique_graphs"]
    states, gradients = _changes(scored, compiled, probe, learns=learns)
    name, graphs = type(scored.model).__name__, counters["stats"]["unique_graphs"] - before
    bound = TOLERANCE if scored.dtype == torch.float32 else HALF_TOLERANCE
    for what, error, most in (("hidden states", states, bound), ("gradients", gradients, GRADIENT_FACTOR * bound)):
        if not error <= most:
            raise UserError(
                f"compile: True changes the {what} of {name} by {error:.1e}, and rounding by at most {most:g}; leave "
                "it out."
            )
    kinds = {type(layer) for layer in compiled}
    if not graphs and not kinds <= KINDS:
        raise UserError(f"compile: True finds nothing to compile in the layers of {name}; leave it out.")
    KINDS.update(kinds)
    learnt = f", in gradients to {gradients:.1e}" if learns else ""
    return f"{len(compiled)} layers, {graphs} new graphs; agree with uncompiled ones to {states:.1e}{learnt}"


def _changes(scored: Any, compiled: Compiled, probe: PackedBatch, *, learns: bool) -> tuple[float, float]:
    """Has the layers run compiled from here on, and returns what that changes: the hidden states, relative to the
    largest; and the gradients g of the parameters, by the largest |g - g'| / |g|, where |g| counts as a tenth of the
    largest one at least, since the rounding of others ends up in small ones. Of all g only g - g' is stored."""
    expected = _states(scored, probe, 1.0, learns=learns)
    norms = _gradient_norms(scored)
    scored.compiled = compiled
    with _in_one_sentence(Exception):  # of the compiler: uncompiled, the same has just worked
        found = _states(scored, probe, -1.0, learns=learns)
    differences = _gradient_norms(scored)
    scored.zero_grad(set_to_none=True)
    states = float((found - expected).abs().max() / expected.abs().max())
    return states, float((differences / norms.clamp(min=norms.max() / 10)).max()) if learns else 0.0


def _states(scored: Any, probe: PackedBatch, sign: float, *, learns: bool) -> torch.Tensor:
    """Hidden states f32 [N, H]; where it learns, the gradients of sign * (a weighted sum of them) are added to those
    that are there."""
    with scored.scoring(), torch.set_grad_enabled(learns):
        states: torch.Tensor = scored.hidden(probe).states.float()
        if learns:
            weights = torch.arange(states.numel(), device=states.device).sin().view_as(states)
            (sign * weights * states).sum().backward()
    return states.detach()


def _gradient_norms(scored: Any) -> torch.Tensor:
    """f32, one for each parameter; 0 where it has no gradient."""
    return torch.tensor([0.0 if p.grad is None else float(p.grad.float().norm()) for p in scored.parameters()])


@contextmanager
def running(compiled: Compiled) -> Iterator[None]:
    """The layers run compiled for as long as this lasts. UserError where the compiler fails."""
    if not compiled:
        yield
        return
    from torch._dynamo import config, exc
    from torch.fx.experimental import _config as shapes

    limit = config.patch(recompile_limit=MOST_GRAPHS, fail_on_recompile_limit_hit=True)
    # Duck shapes: sizes that are equal in the first batch are taken for one, so that a batch of as many tokens as a
    # layer is wide would be compiled for that number of tokens alone.
    distinct = shapes.patch(use_duck_shape=False)  # type: ignore[attr-defined]
    failures = exc.TorchDynamoException, exc.FailOnRecompileLimitHit
    with _in_one_sentence(*failures), limit, distinct, _attention_between_graphs(), _forwards(compiled):
        yield


@contextmanager
def _forwards(compiled: Compiled) -> Iterator[None]:
    """These stand in the place of the layers' own; not of their calls, so that hooks and checkpoints stay around."""
    before = [(layer, vars(layer).get("forward")) for layer in compiled]
    for layer, forward in compiled.items():
        vars(layer)["forward"] = forward
    try:
        yield
    finally:
        for layer, own in before:
            del vars(layer)["forward"]
            if own is not None:
                vars(layer)["forward"] = own


@contextmanager
def _attention_between_graphs() -> Iterator[None]:
    """Packed attention is one that the compiler does not look into."""
    from transformers import AttentionInterface

    before = AttentionInterface().get(ATTENTION, packed_attention)
    AttentionInterface.register(ATTENTION, uncompiled_attention())
    try:
        yield
    finally:
        AttentionInterface.register(ATTENTION, before)


@cache
def uncompiled_attention() -> Callable[..., Any]:
    """Packed attention, for layers that are compiled."""

    def attend(*inputs: Any, **options: Any) -> tuple[torch.Tensor, None]:
        out, _ = packed_attention(*inputs, **options)
        return (out.clone() if _is_view_of_more(out) else out), None

    return torch.compiler.disable(attend, reason="lengths change from batch to batch")


def _is_view_of_more(out: torch.Tensor) -> bool:
    """Whether attention's result [1, M, heads, d] is a view of rows laid side by side: the graph that takes it would be
    compiled for their number and width, since torch looks at what a view is of."""
    return out._base is not None and out._base.shape != out.shape[1:]


@contextmanager
def _in_one_sentence(*failures: type[Exception]) -> Iterator[None]:
    """A UserError in the place of these."""
    try:
        yield
    except UserError:
        raise
    except failures as failure:
        cause = first_line(getattr(failure, "inner_exception", failure))
        raise UserError(
            f"compile: True fails for this model on this machine ({cause}); leave it out. A run that has begun goes on "
            "without it by --resume."
        ) from failure
