"""TRL's batches as the scorer sees them: b rows of prompt and completion, padded on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkl.integrations.trl.support import KeptIds
from fastkl.kernels.types import Head

ROW, KEPT = "fastkl_row", "fastkl_kept_ids"
"""Keys added to TRL's batches: the row's place at the rollout; the token ids that could be drawn there."""


@dataclass(frozen=True, slots=True)
class RowScores:
    """Scores of b completions, each f32 [b, T], nats, zero where the attention mask is."""

    policy: Tensor
    ref: Tensor | None
    entropy: Tensor | None
    kl: Tensor | None  # exact, over the whole vocabulary
    mask: Tensor  # bool [b, T]
    kept: Sequence[KeptIds] | None  # of each row, where recorded
    balancing_loss: Tensor | None  # of the b rows, a scalar; for mixtures of experts whose auxiliary loss is on


@dataclass(frozen=True, slots=True)
class Completions:
    """The tokens to be scored in b rows of text: N in all, padding left out."""

    mask: Tensor  # bool [b, T]
    target_ids: Tensor  # i64 [N]
    positions: Tensor  # i64 [N]; how many tokens of its completion come before the token

    @classmethod
    def of(cls, input_ids: Tensor, attention_mask: Tensor, num_tokens: int) -> Completions:
        """The last `num_tokens` columns of input_ids and attention_mask i64 [b, L], where the mask is not zero."""
        mask = attention_mask[:, -num_tokens:].bool()
        positions = torch.arange(num_tokens, device=mask.device).expand_as(mask)
        return cls(mask, input_ids[:, -num_tokens:][mask], positions[mask])

    def predicting(self, hidden: Tensor) -> Tensor:
        """Of hidden states [b, L, H] those [N, H] that predict the tokens."""
        return hidden[:, -self.mask.shape[1] - 1 : -1][self.mask]

    def reference_task(self, outputs: Any, head: Head) -> dict[str, Any]:
        """What a forward of the reference hands over."""
        return {"hidden": self.predicting(outputs.last_hidden_state), "head": head}

    def in_rows(self, values: Tensor) -> Tensor:
        """[N] -> [b, T], zero at padding; connected to the model even where there is no token, so that backward always
        works."""
        return values.new_zeros(self.mask.shape).masked_scatter(self.mask, values)


def in_rollout_order(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """TRL's micro-batches with their rows back in the order of the rollout; equally many rows in each, as before."""
    order = torch.cat([batch[ROW] for batch in batches]).argsort()

    def restore(key: str) -> list[Any]:
        values = [batch[key] for batch in batches]
        if isinstance(values[0], Tensor) and values[0].dim():
            return list(torch.cat(values)[order.to(values[0].device)].chunk(len(batches)))
        if isinstance(values[0], list):
            flat = [value for part in values for value in part]
            size = len(values[0])
            return [[flat[i] for i in order[k * size : (k + 1) * size]] for k in range(len(batches))]
        return values  # one number for the whole batch, or None

    columns = {key: restore(key) for key in batches[0]}
    return [{key: columns[key][k] for key in columns} for k in range(len(batches))]
