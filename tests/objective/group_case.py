"""Groups of completions of different lengths with random scores, and the factors that the objective gives them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fastkl.kernels.types import TokenScores
from fastkl.objective.rloo import BatchObjective, Objective
from fastkl.types import PackedBatch

G, K, LONGEST = 3, 4, 6


@dataclass
class GroupCase:
    """S = G * K completions as padded rows [S, LONGEST], float64; `mask` says where there is a token."""

    lengths: torch.Tensor  # i64 [S]
    mask: torch.Tensor  # bool [S, LONGEST]
    logprobs: torch.Tensor
    ref_logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    entropy: torch.Tensor
    rewards: torch.Tensor  # f64 [G, K]

    def packed(self, values: torch.Tensor) -> torch.Tensor:
        """The tokens' values end to end, [N]."""
        return values[self.mask]

    def rows(self, values: torch.Tensor) -> torch.Tensor:
        """The inverse: [N] -> [S, LONGEST], 0 where there is no token."""
        return torch.zeros(self.mask.shape, dtype=values.dtype).masked_scatter(self.mask, values)

    def batch(self, advantages: torch.Tensor | None = None, old: bool = False) -> PackedBatch:
        """What the objective reads of a packed batch; advantages f64 [S], where they are known beforehand."""
        cu = torch.tensor([0, *self.lengths.tolist()]).cumsum(0).int()
        empty = torch.empty(0, dtype=torch.int64)
        return PackedBatch(
            *(empty, empty, cu, empty, empty, cu, empty, self.packed(self.old_logprobs), self.rewards),
            torch.ones(G, K, dtype=torch.bool),
            (),
            advantages=None if advantages is None else advantages.repeat_interleave(self.lengths),
            old_logprobs=self.packed(self.old_logprobs) if old else None,
        )

    def scores(self) -> TokenScores:
        """What the operator would hand over."""
        columns = (self.logprobs, self.ref_logprobs, self.entropy)
        return TokenScores(*(self.packed(c) for c in columns), kl=self.packed(self.logprobs - self.ref_logprobs))

    def factors(self, objective: Objective, normalizer: float, **batch) -> dict[str, torch.Tensor]:
        """d loss / d score by name, [S, LONGEST]."""
        part = BatchObjective(objective, self.batch(**batch), normalizer)
        found = part(slice(0, int(self.lengths.sum())), self.scores())
        return {name: self.rows(getattr(found, name)) for name in found.__slots__ if getattr(found, name) is not None}


def group_case(seed: int = 0, drift: float = 0.3) -> GroupCase:
    """drift: how far the policy is from the one that sampled, nats per token."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    lengths = torch.randint(1, LONGEST + 1, (G * K,), generator=g)
    mask = torch.arange(LONGEST) < lengths[:, None]
    logprobs = -normal(G * K, LONGEST).abs() - 0.1
    return GroupCase(
        lengths, mask, logprobs, logprobs + 0.4 * normal(G * K, LONGEST), logprobs + drift * normal(G * K, LONGEST),
        normal(G * K, LONGEST).abs(), normal(G, K),
    )  # fmt: skip
