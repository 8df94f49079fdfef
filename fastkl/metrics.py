"""Metrics: what a step reports about itself. Standard library and torch only."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


def distinct_2(texts: Sequence[str]) -> float:
    """Distinct word bigrams over all word bigrams of the texts together (Li et al. 2016); 0 without any bigram."""
    bigrams = [pair for text in texts for pair in _pairs(text.split())]
    return len(set(bigrams)) / len(bigrams) if bigrams else 0.0


def _pairs(words: list[str]) -> Iterator[tuple[str, str]]:
    return zip(words, words[1:], strict=False)


class Stopwatch:
    """Adds up seconds per stage; on a GPU it waits for the work that a stage has queued."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = self._now()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + self._now() - start

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
