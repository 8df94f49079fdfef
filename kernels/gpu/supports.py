"""A support as one byte per logit, which the kernels read beside the logits; found by support.keep_mask itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..passes import LogitOptions
from ..support import keep_mask
from ..types import Support


def keep_bytes(
    support: Support, z: Tensor, bias: Tensor | None, options: LogitOptions, lo: int, hi: int, target_ids: Tensor
) -> Tensor:
    """The support of rows lo..hi as u8 [n, V]; recomputing it takes a processed copy of the policy's raw logits z."""
    if support.is_recomputed:
        z = z.float().clone() if bias is None else z.float() + bias
        options.apply_(z)
        options.scale_(z, lo, hi)
    else:
        z = z[:1].expand(hi - lo, z.shape[1])  # only its shape and device are used
    return keep_mask(support, z, target_ids).view(torch.uint8)
