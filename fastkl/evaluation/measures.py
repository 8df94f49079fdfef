"""What an evaluation measures: pass@k of a prompt, and means over prompts with their standard errors.

The samples of one prompt are not independent draws of a prompt and a sample, so the unit is the prompt: a measure is
the mean over P prompts of one number each, x_1 ... x_P, and its standard error is sqrt(var(x) / P) with the variance
that divides by P - 1. It covers which prompts were asked and what was sampled for them, both at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of k samples passes, unbiased, from n >= k samples of which c have passed.

    1 - C(n - c, k) / C(n, k): of all sets of k of the n samples, the share with a pass in it (Chen et al. 2021,
    "Evaluating large language models trained on code", equation 1).
    """
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """(mean, its standard error) of one number per prompt; no error where there are fewer than two."""
    if len(values) < 2:
        return fmean(values), None
    return fmean(values), stdev(values) / math.sqrt(len(values))
