"""What the operators need inside torch.compile, DistributedDataParallel and FSDP2.

torch.compile: a call is one break between two graphs (`one_graph_break`). Modules that return TokenScores: FSDP2 and
DDP look for the tensors of a module's output to know when its backward begins, so TokenScores is made known to
torch's pytrees. Heads that lie in pieces on several processes: `whole_heads`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .types import Head, TokenScores

P = ParamSpec("P")
R = TypeVar("R")

pytree.register_pytree_node(
    TokenScores,
    lambda scores: (list(scores.values()), None),
    lambda values, _: TokenScores(*values),
)


def one_graph_break(function: Callable[P, R]) -> Callable[P, R]:
    """Decorator: torch.compile does not look into the function, so nothing in it is compiled again for other shapes.

    It does what torch.compiler.disable does, without the import of torch._dynamo, which takes four seconds and is of
    use only when compiling. The marks make a frame under compilation end before the call, with the reason.
    """
    reason = "fastkl's scoring operators loop over chunks of rows; they run as they are, between two graphs"
    disabled: list[Callable[P, R]] = []

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        if "torch._dynamo" not in sys.modules:  # nothing is being compiled
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function, reason=reason))
        return disabled[0](*args, **kwargs)

    run.__dict__.update(_torchdynamo_disable=True, _torchdynamo_disable_msg=reason)
    return run


def is_sharded(x: object) -> bool:
    """Whether x is a DTensor, which lies in pieces on several processes; found out without importing
    torch.distributed."""
    return hasattr(x, "full_tensor")


def whole_heads(policy: Head, ref: Head | None) -> tuple[Head, Head | None]:
    """The heads with their weights [V, H] and biases [V] gathered if they are DTensors.

    Differentiable. The gradient that reaches a gathered tensor is averaged over the processes and scattered, as
    FSDP2 does with the gradients of the parameters it gathers itself. On a tensor-parallel mesh, where all processes
    score the same rows, the average is the gradient of each. A tensor given twice is gathered once. Gathering is a
    collective operation, in the forward and in the backward: every process of the mesh must take part, with no rows
    if it has none.
    """
    heads = [policy] if ref is None else [policy, ref]
    tensors = [*(head.weight for head in heads), *(head.bias for head in heads)]
    gathered = {id(x): _gather(x) if is_sharded(x) else x for x in tensors}
    whole = [replace(head, weight=gathered[id(head.weight)], bias=gathered[id(head.bias)]) for head in heads]
    return whole[0], None if ref is None else whole[1]


def _gather(sharded: Any) -> Tensor:
    from torch.distributed.tensor import Partial

    mesh = sharded.device_mesh
    full: Tensor = sharded.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if full.requires_grad:  # full_tensor's backward then sums over processes (gloo has no average)
        full.register_hook(lambda gradient: gradient / mesh.size())
    return full
