"""Weights in pieces: a ScoredModel whose parameters lie on several processes, by FSDP2.

Every decoder layer is a unit: it is gathered for its forward, and again for its backward. An embedding that is not also
the head is a unit, too; norm, head and a tied embedding belong to the root, which is the ScoredModel itself, because
the operator reads the head inside of its forward: there it is a plain tensor. A head outside would be a copy that
nobody updates. Gradients are summed, not averaged, since the loss is divided by the samples of the whole step.

FSDP2's calls are collective: every process must come to each of them, with an empty micro-batch if it has no other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from fastkl.errors import UserError
from fastkl.scoring.models import UpToHead, backbone_of


def shard(scored: Any, device: torch.device, sizes: Sequence[int]) -> None:
    """Leaves a piece of every parameter of a ScoredModel in each process, on `device`. What is on the meta device stays
    there, in pieces (unread.py fills them in).

    sizes: (processes,), or (replicas, pieces of each): the processes of a run of ranks hold one replica.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    names = ("replica", "piece")[-len(sizes) :]
    mesh = init_device_mesh(device.type, tuple(sizes), mesh_dim_names=names)
    for unit in units_of(scored.model):
        in_bfloat16 = torch.bfloat16 in trained_dtypes(unit)
        sums = MixedPrecisionPolicy(reduce_dtype=torch.float32 if in_bfloat16 else None)
        fully_shard(unit, mesh=mesh, reshard_after_forward=True, mp_policy=sums)
    fully_shard(scored, mesh=mesh, reshard_after_forward=False)
    for unit in pieces_of(scored):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
    for method in ("hidden", "inside"):
        register_fsdp_forward_method(scored, method)
    for buffer_of in scored.modules():  # FSDP2 moves parameters and their modules' buffers only
        for name, buffer in buffer_of.named_buffers(recurse=False):
            setattr(buffer_of, name, buffer.to(device))


def units_of(model: Any) -> list[nn.Module]:
    """What is gathered together, besides the root: the layers, what has other dtypes in them, and the embedding unless
    it is the head. UserError for a model whose layers are not found."""
    layers = next((m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)), None)
    if layers is None or isinstance(backbone_of(model), UpToHead):
        raise UserError(f"shard: {type(model).__name__} has no list of layers to divide; use --shard none.")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head is None or embedding.weight is head.weight
    return [unit for layer in layers for unit in (*odd_ones(layer), layer)] + ([] if tied else [embedding])


def odd_ones(layer: nn.Module) -> list[nn.Module]:
    """The modules in a layer whose own trained parameters do not have the dtype that most of the layer's have."""
    dtypes = trained_dtypes(layer)
    if len(dtypes) < 2:
        return []
    ((usual, _),) = dtypes.most_common(1)
    return [m for m in layer.modules() if any(d != usual for d in trained_dtypes(m, recurse=False))]


def trained_dtypes(module: nn.Module, *, recurse: bool = True) -> Counter[torch.dtype]:
    """How many trained numbers a module has of each dtype."""
    found: Counter[torch.dtype] = Counter()
    for parameter in module.parameters(recurse):
        if parameter.requires_grad:
            found[parameter.dtype] += parameter.numel()
    return found


def pieces_of(scored: Any) -> list[Any]:
    """The modules that are gathered each by itself, the root first; none where weights are not sharded."""
    return [module for module in scored.root.modules() if hasattr(module, "set_reshard_after_forward")]


def rest(scored: Any) -> None:
    """Gives back what a forward has gathered: every process holds its pieces alone, which optimizer and files see."""
    for unit in pieces_of(scored):
        unit.reshard()


@contextmanager
def gathered(scored: Any) -> Iterator[None]:
    """Every process has all weights for as long as this lasts, and runs what it likes without the others."""
    units = pieces_of(scored)
    if units:
        scored.inside(lambda: None)  # the first to run is taken for the root
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.set_reshard_after_forward(unit is not scored.root, recurse=False)
        rest(scored)
