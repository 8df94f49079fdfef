"""Which rows have a gradient at all: those with a coefficient that is not zero. The others cost no backward."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .types import TokenCoefficients

GAP_ROWS = {"cpu": 64, "cuda": 384}
"""Two runs of rows with a gradient are processed as one if fewer rows than this lie between them. On a GPU a run reads
and writes the head's whole gradient, which takes as long as the products of about so many rows, whatever H and V."""


def active_rows(coefficients: TokenCoefficients, num_rows: int) -> Tensor:
    """Indices of the rows with any coefficient that is not zero (NaN counts as not zero)."""
    mask = _mask(coefficients, num_rows)
    return torch.empty(0, dtype=torch.int64) if mask is None else mask.nonzero()[:, 0]


class ActiveRuns:
    """Ranges of rows that together hold all rows with a coefficient, without the long stretches that have none.

    On a GPU they are asked for when this is made and waited for when they are iterated over, so what is launched in
    between keeps the GPU busy meanwhile.
    """

    def __init__(self, coefficients: TokenCoefficients, num_rows: int) -> None:
        mask = _mask(coefficients, num_rows)
        self.gap_rows, self.copied = GAP_ROWS["cpu"], None
        if mask is not None and mask.is_cuda:
            self.gap_rows, on_device = GAP_ROWS["cuda"], mask
            mask = torch.empty(num_rows, dtype=torch.bool, pin_memory=True)
            mask.copy_(on_device, non_blocking=True)
            self.copied = torch.cuda.current_stream(on_device.device).record_event()
        self.mask = mask

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if self.mask is None:
            return
        if self.copied is not None:
            self.copied.synchronize()
        active = self.mask.nonzero()[:, 0]
        if not len(active):
            return
        breaks = (active.diff() > self.gap_rows).nonzero()[:, 0]
        starts = torch.cat([active[:1], active[breaks + 1]]).tolist()
        ends = torch.cat([active[breaks], active[-1:]]).tolist()
        yield from ((start, end + 1) for start, end in zip(starts, ends, strict=True))


def _mask(coefficients: TokenCoefficients, num_rows: int) -> Tensor | None:
    """bool [num_rows]; None where there are no coefficients at all."""
    given = [c for c in coefficients.values() if c is not None]
    if not given:
        return None
    mask = torch.zeros(num_rows, dtype=torch.bool, device=given[0].device)
    for c in given:
        mask |= c != 0
    return mask
