"""What keeps the policy near the reference over a run: the coefficient's controller, and the reference's renewal."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

GAIN = 0.2
"""Relative change of the coefficient per step at full error: at most 10 % a step."""


@dataclass(slots=True)
class KlController:
    """Keeps beta, which is stored nowhere else. It stays as it is, or follows the KL where there is a target.

    beta <- beta * (1 + GAIN * e), e = KL / target - 1 clipped to +-0.5 (the controller of Ziegler et al. 2019,
    "Fine-tuning language models from human preferences", made faster for short runs).
    """

    coef: float  # beta: reward per nat
    target: float = 0.0  # nats per completion; 0: coef stays

    def follow(self, kl: float) -> None:
        """Takes in a step's mean KL per completion, nats. Leaves beta where that is not finite."""
        if self.target and math.isfinite(kl):
            error = min(max(kl / self.target - 1.0, -0.5), 0.5)
            self.coef *= 1.0 + GAIN * error


@torch.no_grad()
def renew_reference(reference: nn.Module, policy: nn.Module, share: float) -> None:
    """reference <- (1 - share) * reference + share * policy, parameter by parameter; share 1 copies."""
    for old, new in zip(reference.parameters(), policy.parameters(), strict=True):
        old.lerp_(new.detach().to(old), share)
