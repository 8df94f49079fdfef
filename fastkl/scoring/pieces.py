"""Tensors in pieces: DTensors whose rows FSDP2 has dealt to several processes. What is here is the whole of one that is
not in pieces, so that nobody has to ask."""

from __future__ import annotations

from typing import Any

import torch

from fastkl.kernels.compose import is_sharded


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or all of one that lies in pieces: a collective call then."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def piece_for(parameter: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """What of a whole tensor, which every process has, belongs to this parameter's piece, in memory of its own."""
    if not is_sharded(parameter) or not tensor.ndim:
        return tensor.to(parameter.device)
    return as_pieces(parameter, tensor[rows_of(parameter)].to(parameter.device, copy=True))


def own_part(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor, in the same memory: all of one that is not in pieces."""
    return tensor.detach().to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def as_pieces(parameter: Any, own: torch.Tensor) -> torch.Tensor:
    """This process's rows, and the others' in their processes, as one tensor in pieces, as the parameter's are."""
    from torch.distributed.tensor import DTensor

    place = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
    return DTensor.from_local(own, parameter.device_mesh, parameter.placements, **place)


def rows_of(parameter: Any) -> slice:
    """Which rows of a parameter this process holds; FSDP2 cuts the first dimension."""
    if not is_sharded(parameter):
        return slice(0, parameter.shape[0] if parameter.ndim else 0)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    place = parameter.shape, parameter.device_mesh, parameter.placements
    shape, offset = compute_local_shape_and_global_offset(*place)
    return slice(offset[0], offset[0] + shape[0])


def num_pieces(parameter: Any) -> int:
    """Into how many pieces a parameter is cut; each is there once in every replica."""
    return int(parameter.device_mesh.size(parameter.device_mesh.ndim - 1)) if is_sharded(parameter) else 1
