"""What is more than a function among the rewards: something to reach or to load, once the cheap checks have passed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class PreparedReward(ABC):
    """A reward function with a beginning."""

    __name__: str  # of its metrics
    retried: int | None = None  # attempts of the last call that failed and were made again; None where there are none

    @abstractmethod
    def prepare(self, device: torch.device) -> None:
        """Called once, before any model is loaded. Raises UserError where it cannot work. device: the trainer's."""
