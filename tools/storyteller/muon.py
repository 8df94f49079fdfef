"""Muon: momentum, made orthogonal. One update per matrix, float32 throughout (torch.optim.Muon multiplies in bfloat16,
which processors without bfloat16 units do about twenty times slower).

    M <- mu M + (1 - mu) G
    U  = (1 - mu) G + mu M                                              (Nesterov)
    W <- W - lr * 0.2 sqrt(max(rows, columns)) * orthogonal(U)

with orthogonal(U) by five Newton-Schulz steps (Jordan et al. 2024, "Muon"), and the factor that gives Adam's update
size (Liu et al. 2025, "Muon is scalable for LLM training"), so that Adam's learning rates carry over.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Muon(torch.optim.Optimizer):
    """For matrices (parameters of two dimensions) only; embeddings, norms and biases belong to another optimizer."""

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is not None:
                    self._update(matrix, group["lr"], group["momentum"])

    def _update(self, matrix: torch.Tensor, lr: float, momentum: float) -> None:
        average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
        average.lerp_(matrix.grad, 1 - momentum)
        direction = orthogonal(matrix.grad.lerp(average, momentum))
        matrix.add_(direction, alpha=-lr * 0.2 * max(matrix.shape) ** 0.5)


def orthogonal(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Roughly U V^T of the singular value decomposition U S V^T, f32 [rows, columns]: S ends within about 0.7..1.2."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide is matrix else x.T
