"""Sums over completions that lie end to end, and back: cu_seqlens says where each of them begins and ends."""

from __future__ import annotations

import torch


def sequence_sums(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Sums of consecutive runs: values [N], cu_seqlens i32 [s + 1] -> [s]. An empty run sums to 0. Differentiable."""
    num_sequences = cu_seqlens.numel() - 1
    run_of_value = torch.repeat_interleave(
        torch.arange(num_sequences, device=values.device), cu_seqlens.diff().long(), output_size=values.numel()
    )
    return values.new_zeros(num_sequences).index_add(0, run_of_value, values)


def per_token(values: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Each sequence's value at each of its tokens: values [s], cu_seqlens i32 [s + 1] -> [N]."""
    return values.repeat_interleave(cu_seqlens.diff().long())
