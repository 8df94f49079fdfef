"""The best evaluation of a run so far, and checkpoints/best, which holds the model of its step.

The evaluation before the first step counts: it is what a step has to beat to be kept.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkl.config.held_out import BestBy
from fastkl.errors import UserError
from fastkl.training import checkpoint

NAME = "best"
"""Of the folder beside step-N."""


@dataclass(slots=True)
class Best:
    """The best value of one measure, and the step that has it."""

    by: BestBy
    step: int = 0
    value: float = math.nan

    def beaten_by(self, metrics: Mapping[str, float]) -> bool:
        """Whether this evaluation is better. UserError where it lacks the measure."""
        if self.by.key not in metrics:
            there = ", ".join(key for key in metrics if key.startswith("eval/"))
            raise UserError(f"best: the evaluation has no {self.by.key} (it has {there}); choose one of these.")
        return self.by.improves(metrics[self.by.key], self.value)

    def state(self) -> dict[str, Any]:
        """What `load_state` needs; can be written as JSON."""
        value = None if math.isnan(self.value) else self.value
        return {"key": self.by.key, "lower": self.by.lower, "step": self.step, "value": value}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """The best so far, if it is by the same measure."""
        if (state.get("key"), state.get("lower")) == (self.by.key, self.by.lower) and state["value"] is not None:
            self.step, self.value = state["step"], state["value"]

    def keep(self, checkpoints: Path) -> None:
        """Makes checkpoints/best that of the best step, which has just been saved. Raises OSError."""
        checkpoint.keep_as(checkpoints / f"step-{self.step}", NAME)

    def is_kept(self, checkpoints: Path) -> bool:
        """Whether checkpoints/best is there and of the best step."""
        try:
            return checkpoint.open_checkpoint(checkpoints / NAME).step == self.step
        except UserError:
            return False

    def in_words(self, checkpoints: Path) -> str:
        """Where the best model is."""
        if math.isnan(self.value):
            return f"No {self.by.key} was measured, so there is no best checkpoint."
        if not self.step:
            return f"No step had a better {self.by.key} than the model before training ({self.value:.4g})."
        return f"Best {self.by.key}: {self.value:.4g} after step {self.step}, {checkpoints / NAME}"
