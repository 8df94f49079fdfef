"""The alarm: a KL is never negative, so an estimate that is significantly below zero means that the scoring is wrong.

A single completion's k1 may well be negative. The mean over completions that were drawn from the scored distribution
may not, except by chance. The alarm rings where a mean is below zero by more than SIGMAS standard errors. Standard
library only.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from fastkl.audit.thresholds import SIGMAS, WINDOW_STEPS


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error; the error is infinite for fewer than two values, so that nothing is significant."""
    count = len(values)
    mean = math.fsum(values) / count if count else 0.0
    if count < 2:
        return mean, math.inf
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return mean, math.sqrt(variance / count)


def is_negative(values: Sequence[float]) -> bool:
    """Whether the mean is below zero by more than SIGMAS standard errors (and by more than rounding)."""
    return below_zero(*mean_and_error(values))


def below_zero(mean: float, error: float) -> bool:
    """The same of a mean and its standard error."""
    return mean < -max(SIGMAS * error, 1e-6)


@dataclass(slots=True)
class Moments:
    """Mean and spread of numbers that need not be kept (Welford 1962; sums of two as in Chan et al. 1979)."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # summed squared distances from the mean

    def add(self, value: float) -> None:
        """Takes in one number."""
        self.count += 1
        distance = value - self.mean
        self.mean += distance / self.count
        self.squares += distance * (value - self.mean)

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        distance = other.mean - self.mean
        mean = self.mean + distance * other.count / max(1, count)
        return Moments(
            count, mean, self.squares + other.squares + distance * distance * self.count * other.count / max(1, count)
        )

    def mean_and_error(self) -> tuple[float, float]:
        """As the function of this name."""
        return self.mean, math.sqrt(self.squares / (self.count - 1) / self.count) if self.count > 1 else math.inf


def ever_negative(by_step: Mapping[int, Moments]) -> bool:
    """Whether the mean is significantly below zero, overall or over some WINDOW_STEPS steps in a row."""
    ordered = [by_step[step] for step in sorted(by_step)]
    windows = [ordered[i : i + WINDOW_STEPS] for i in range(max(1, len(ordered) - WINDOW_STEPS + 1))]
    return any(below_zero(*sum(window, Moments()).mean_and_error()) for window in (ordered, *windows))


class KlAlarm:
    """Watches the k1 of every completion over the last WINDOW_STEPS steps."""

    def __init__(self) -> None:
        self.window: deque[list[float]] = deque(maxlen=WINDOW_STEPS)

    def add(self, values: Iterable[float]) -> str | None:
        """Takes in one step's completions (nats; NaN: not scored); returns the warning if the alarm rings."""
        self.window.append([value for value in values if math.isfinite(value)])
        pooled = [value for step in self.window for value in step]
        if not is_negative(pooled):
            return None
        mean, error = mean_and_error(pooled)
        return (
            f"The KL estimate is below zero: {mean:.3g} nats per completion, {-mean / max(error, 1e-12):.1f} standard "
            f"errors, over the last {len(self.window)} steps. That cannot be: the scores are not of the distribution "
            "that was sampled. `fastkl doctor` on this run looks for the cause."
        )
