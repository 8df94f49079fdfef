"""ScoredModel: a causal language model as a module that scores.

In: a PackedBatch, and what the reference made of it. Out: the scores of its N tokens, and the loss where coefficients
are given. Backbone, head and fused operator all run inside the module's forward, so a wrapper that gathers parameters
for the time of a forward only (FSDP2) can be put around it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from fastkl.kernels.compose import is_sharded
from fastkl.kernels.operators import head_token_loss, head_token_scores
from fastkl.kernels.types import OUTPUTS, CoefficientsFunction, Head, TokenScores
from fastkl.sampling.params import Sampling
from fastkl.sampling.replay import support_of
from fastkl.scoring import backbone
from fastkl.scoring.adapters import switched_off
from fastkl.scoring.compiled import Compiled, running
from fastkl.scoring.distinct import of_copies, spread
from fastkl.scoring.head import head_of
from fastkl.scoring.placement import HeadCopy, fetched, moved
from fastkl.scoring.shard import rest
from fastkl.types import PackedBatch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Hidden:
    """What the operator needs of one model."""

    states: torch.Tensor  # [U, H]; row u predicts the u-th distinct token (PackedBatch.state_positions)
    head: Head


class Scored(NamedTuple):
    """What a forward gives back."""

    loss: torch.Tensor | None  # a scalar; None where no coefficients were given
    scores: TokenScores  # of the N tokens


class ScoredModel(nn.Module):
    """model: a causal language model of transformers; layout: what `choose_layout` found for it.

    adapters: off for a reference that is the policy's module without them (adapters.py).
    dtype: of the backbone's matrix products, under autocast unless it is float32; scores are float32. On a GPU the head
    is multiplied in `dtype`, too, as an engine does it, with float32 sums: float32 products take ten times as long
    there. On a CPU it is multiplied in float32, and its gradients' products in `dtype`.
    """

    def __init__(
        self, model: nn.Module, layout: str = "packed", dtype: torch.dtype = torch.float32, *, adapters: bool = True
    ) -> None:
        super().__init__()
        self.adapters = adapters
        self.model: Any = model
        self.layout = layout
        self.dtype = dtype
        self.head_copy: HeadCopy | None = None  # where the operator runs, if the model is elsewhere
        self.scores_on: torch.device | None = None  # where it forwards, if it waits elsewhere
        self.compiled: Compiled = {}  # its layers, where they are to run compiled (compiled.py)

    @property
    def device(self) -> torch.device:
        """Where its parameters are."""
        return next(self.model.parameters()).device

    @contextmanager
    def scoring(self) -> Iterator[None]:
        """Around every forward and the backward through it: the model's attention is the layout's, dropout is off."""
        with fetched(self.model, self.scores_on), backbone.scoring(self.model, self.layout), running(self.compiled):
            try:
                yield
            finally:
                rest(self)

    def hidden(self, batch: PackedBatch) -> Hidden:
        """The backbone's part: how the reference takes part in the policy's forward. Differentiable."""
        found = self._hidden(moved(batch, self.device))
        if self.head_copy is None:
            return found
        return Hidden(self._as_multiplied(found.states.to(self.head_copy.device)), self.head_copy.of(found.head))

    def inside(self, function: Callable[[], T]) -> T:
        """What the function returns; a wrapper that gathers parameters for forwards does so for this, too."""
        return function()

    @property
    def root(self) -> ScoredModel:
        """What gathers its parameters, where they lie in pieces."""
        return self

    @property
    def is_sharded(self) -> bool:
        """Whether its weights lie on several processes (shard.py)."""
        return any(map(is_sharded, self.model.parameters()))

    def _hidden(self, batch: PackedBatch) -> Hidden:
        with self._autocast(), nullcontext() if self.adapters else switched_off(self.model):
            states = backbone.hidden_states(self.model, batch, self.layout)
            return Hidden(self._as_multiplied(states), head_of(self.model))

    def _as_multiplied(self, states: torch.Tensor) -> torch.Tensor:
        """In the dtype in which a head on their device multiplies them."""
        return states.to(self.dtype) if states.is_cuda else states

    def forward(
        self,
        batch: PackedBatch,
        reference: Hidden | None = None,
        *,
        sampling: Sampling,
        coefficients: CoefficientsFunction | None = None,
        row_splits: Sequence[int] | None = None,
        outputs: Collection[str] = OUTPUTS,
    ) -> Scored:
        """Scores of the batch's tokens; on the ids that `sampling` allowed, too, where it kept some from being drawn.

        coefficients: called with runs of rows that begin and end at row_splits (the bounds of the prompt groups) as
        soon as they are scored; the loss is linear in the scores with these factors, and its gradient is taken while
        the logits are at hand. Without it, the scores are differentiable. outputs: as the operators take them.
        """
        policy = self._hidden(batch)  # a hook around `hidden` would take it for another forward
        models = policy.states, policy.head, *((reference.states, reference.head) if reference else (None, None))
        distinct, target_ids = batch.distinct, batch.state_target_ids
        positions = batch.completion_positions[distinct.rows] if distinct else batch.completion_positions
        options: dict[str, Any] = {
            "temperature": sampling.temperature,
            "support": support_of(sampling, positions, len(policy.head.weight)),
            "outputs": outputs,
            "gradient_dtype": "bfloat16" if self.dtype == torch.bfloat16 else "float32",
        }
        if reference and len(reference.head.weight) != len(policy.head.weight):
            options["valid_vocab"] = len(policy.head.weight)  # a teacher's head may be padded further
        if coefficients is None:
            loss, scores = None, head_token_scores(*models, target_ids, **options)
        else:
            if distinct:
                assert row_splits is not None, "the bounds of the groups, within which tokens may be the same"
                coefficients = of_copies(coefficients, row_splits, distinct)
                row_splits = distinct.splits
            loss, scores = head_token_loss(*models, target_ids, coefficients, row_splits=row_splits, **options)
        return Scored(loss, spread(scores, distinct.copies) if distinct else scores)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)


class WithoutAdapters(ScoredModel):
    """The reference of a policy with adapters whose weights lie in pieces: its own module, which the policy gathers,
    since a module in pieces has one root."""

    def __init__(self, policy: ScoredModel) -> None:
        super().__init__(policy.model, policy.layout, policy.dtype, adapters=False)
        self._policy = (policy,)  # not a part of this module

    @property
    def root(self) -> ScoredModel:
        """See ScoredModel."""
        return self._policy[0]

    def hidden(self, batch: PackedBatch) -> Hidden:
        """See ScoredModel."""
        with switched_off(self.model):
            return self.root.hidden(batch)

    def inside(self, function: Callable[[], T]) -> T:
        """See ScoredModel."""
        return self.root.inside(function)
