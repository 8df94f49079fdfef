"""The scores of distinct tokens as those of all, and a loss of all tokens as one of the distinct ones.

A token that several samples of a prompt have after equal tokens is one row for the heads (prefixes.py). Its score is
that of all of its copies. A loss that is linear in the scores stays so: the factors of the copies are added up.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fastkl.kernels.types import CoefficientsFunction, TokenCoefficients, TokenScores
from fastkl.types import Distinct


def spread(scores: TokenScores, copies: torch.Tensor) -> TokenScores:
    """Scores [U] as those of the N tokens that `copies` i64 [N] names. Differentiable."""
    return TokenScores(*(None if x is None else x.index_select(0, copies) for x in scores.values()))


def of_copies(
    coefficients: CoefficientsFunction, row_splits: Sequence[int], distinct: Distinct
) -> CoefficientsFunction:
    """A function of runs of distinct rows from one of the N tokens, which is called with runs of these that begin and
    end at row_splits, the bounds of the groups in N."""
    bounds = dict(zip(distinct.splits, row_splits, strict=True))

    def summed(rows: slice, scores: TokenScores) -> TokenCoefficients:
        tokens = slice(bounds[rows.start], bounds[rows.stop])
        copies = distinct.copies[tokens] - rows.start
        factors = coefficients(tokens, spread(scores, copies))
        sums = (
            None if x is None else x.new_zeros(rows.stop - rows.start).index_add(0, copies, x) for x in factors.values()
        )
        return TokenCoefficients(*sums)

    return summed
