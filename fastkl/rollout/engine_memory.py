"""The GPU memory of a vLLM engine that sleeps while the trainer works (vLLM's sleep mode).

    draw -> sleep(2) -> score, update, zero_grad -> empty_cache -> wake "weights"
         -> push, reset the prefix cache, compare -> wake "kv_cache" -> draw

Level 2 forgets weights and cache, which the push replaces anyway; level 1 would copy the weights to the host first. The
cache wakes last, so that it never lies beside what the push needs. An engine whose weights were not pushed after it
woke would sample from whatever is in that memory: only a push wakes it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class EngineMemory:
    """Of one engine. sleep: False leaves it awake all the time."""

    def __init__(self, llm: Any, sleep: bool) -> None:
        self.llm = llm
        self.sleep = sleep
        self.asleep = False

    def rest(self) -> None:
        """Gives the memory to the trainer until the next push."""
        if self.sleep and not self.asleep:
            self.llm.sleep(level=2)
            self.asleep = True

    @contextmanager
    def awake(self) -> Iterator[None]:
        """Around a push: the weights' memory is there from its beginning, the cache's from its end."""
        if not self.asleep:
            yield
            return
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what the trainer has freed, for the engine to take
        self.llm.wake_up(["weights"])
        yield
        self.llm.wake_up(["kv_cache"])
        self.asleep = False
