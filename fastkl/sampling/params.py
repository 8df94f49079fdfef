"""Sampling: how completions are drawn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the tables serve error messages, which should not wait for torch
    pass


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn; the defaults leave the policy's distribution whole.

    The order is vLLM's: banned and allowed ids, min_tokens, temperature, min_p, top_k, top_p.
    """

    temperature: float
    max_new_tokens: int
    stop_token_ids: tuple[int, ...]
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0
    min_tokens: int = 0  # no stop id among the first min_tokens tokens
    banned_token_ids: tuple[int, ...] = ()
    allowed_token_ids: tuple[int, ...] = ()  # empty: all

    def excluded_ids(self, vocab: int) -> list[int]:
        """The ids that can never be drawn, in order."""
        allowed = set(self.allowed_token_ids or range(vocab)) - set(self.banned_token_ids)
        return [v for v in range(vocab) if v not in allowed]

    @property
    def truncates(self) -> bool:
        """Whether some ids cannot be drawn at some positions."""
        filters = self.top_k > 0 or self.top_p < 1 or self.min_p > 0
        return filters or self.min_tokens > 0 or bool(self.banned_token_ids or self.allowed_token_ids)
