"""Loss levels: what the sum over a step's tokens is divided by. Another one is an entry of LOSS_LEVELS.

With n samples of T_1 ... T_n tokens, l_it what token t of sample i adds, and L = max_new_tokens:

    sum         1/n sum_i sum_t l_it              the gradient of the mean over completions: unbiased
    mean        1/n sum_i 1/T_i sum_t l_it        GRPO (Shao et al. 2024); a long completion's tokens count less
    token       sum_i sum_t l_it / sum_i T_i      DAPO (Yu et al. 2025), also called bnpo
    max_length  1/(n L) sum_i sum_t l_it          Dr. GRPO (Liu et al. 2025): "sum" with a smaller learning rate

With "mean" and "token" the weight of a token depends on tokens that are drawn after it, so that the expected gradient
is that of no mean reward. Standard library only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LossLevel:
    """One way of averaging."""

    normalizer: Callable[[float, float, int], float]  # (samples, tokens, max_new_tokens) -> what the sum is divided by
    by_length: bool = False  # whether each token is divided by the length of its completion before
    is_unbiased: bool = True


LOSS_LEVELS: dict[str, LossLevel] = {
    "sum": LossLevel(lambda samples, tokens, max_new_tokens: samples),
    "mean": LossLevel(lambda samples, tokens, max_new_tokens: samples, by_length=True, is_unbiased=False),
    "token": LossLevel(lambda samples, tokens, max_new_tokens: tokens, is_unbiased=False),
    "max_length": LossLevel(lambda samples, tokens, max_new_tokens: samples * max_new_tokens),
}
