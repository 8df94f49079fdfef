"""Replay: a sampler's settings as the support that the scorer conditions on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastkl.sampling.params import Sampling

if TYPE_CHECKING:  # error messages need the tables, and should not wait for torch
    import torch

    from fastkl.kernels.types import Support


def support_of(sampling: Sampling, positions: torch.Tensor, vocab: int) -> Support | None:
    """The ids that `sampling` allows, as the scorer replays it; None if they are all ids everywhere.

    positions i64 [N]: how many tokens of its completion come before the token. vocab: number of logits. A ban is a
    condition on the ids that are left. Subtracting the banned probability afterwards would give 0 / 0 where the banned
    ids hold all of it.
    """
    if not sampling.truncates:
        return None
    import torch

    from fastkl.kernels.types import Support

    bans_stop = sampling.min_tokens > 0 and bool(sampling.stop_token_ids)
    excluded = sampling.excluded_ids(vocab) if sampling.banned_token_ids or sampling.allowed_token_ids else []

    def ids(values: list[int] | tuple[int, ...]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=positions.device)

    return Support(
        excluded_ids=ids(excluded) if excluded else None,
        banned_ids=ids(sampling.stop_token_ids) if bans_stop else None,
        banned_rows=positions < sampling.min_tokens if bans_stop else None,
        top_k=sampling.top_k if sampling.top_k > 0 else None,
        top_p=sampling.top_p if sampling.top_p < 1 else None,
        min_p=sampling.min_p if sampling.min_p > 0 else None,
    )
