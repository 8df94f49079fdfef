"""One of two gloo processes that test_compose.py starts: runs every case of DDP and FSDP2, compares the gradients with
those of one process on the whole batch, and writes the largest differences as JSON.

    python two_processes.py RANK STORE OUTPUT.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from fastkl import TokenCoefficients, TokenScores, linear_token_loss, linear_token_scores, token_scores
from fastkl.errors import UserError

V, H, NUM_ROWS = 37, 6, (7, 4)  # an odd vocabulary, and unequal shares of the batch
TOTAL = sum(NUM_ROWS)


class Model(nn.Module):
    """Embedding, one layer, head with bias. The operator runs in its forward if one is given."""

    def __init__(self, tied: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(V, H)
        self.layer = nn.Linear(H, H)
        self.head = nn.Linear(H, V)
        self.double()
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, operator: Callable | None = None) -> Tensor | TokenScores:
        hidden = self.layer(self.embedding(ids)).tanh()
        return hidden if operator is None else operator(hidden, self.head)


class Rows:
    """The rows of one process, or of all, and a loss of each operator that adds up over processes."""

    def __init__(self, rows: slice) -> None:
        g = torch.Generator().manual_seed(1)
        self.ids, self.targets = (torch.randint(0, V, (TOTAL,), generator=g)[rows] for _ in range(2))
        self.factors = TokenCoefficients(
            **{name: torch.randn(TOTAL, generator=g).double()[rows] for name in ("policy_logprobs", "entropy", "kl")}
        )
        with torch.no_grad():
            self.reference = Model(seed=5)
            self.ref_hidden = self.reference(self.ids)
        self.head_was_sharded = False

    def ref_head(self) -> tuple[Tensor, Tensor]:
        return self.ref_hidden, self.reference.head.weight

    def scores(self, hidden: Tensor, head: nn.Linear) -> TokenScores:
        self.head_was_sharded = isinstance(head.weight, DTensor)
        ref_bias = self.reference.head.bias
        return linear_token_scores(
            hidden, head.weight, *self.ref_head(), self.targets, policy_bias=head.bias, ref_bias=ref_bias
        )

    def of_logits(self, hidden: Tensor, head: nn.Linear) -> TokenScores:
        return token_scores(head(hidden), self.reference.head(self.ref_hidden).detach(), self.targets)

    def fused(self, hidden: Tensor, head: nn.Linear) -> Tensor:
        self.head_was_sharded = isinstance(head.weight, DTensor)
        ref_bias = self.reference.head.bias
        return linear_token_loss(
            hidden, head.weight, *self.ref_head(), self.targets, self.factors, policy_bias=head.bias, ref_bias=ref_bias
        )[0]

    def loss(self, scores: TokenScores | Tensor) -> Tensor:
        if isinstance(scores, Tensor):
            return scores
        names = ("policy_logprobs", "entropy", "kl")
        return sum((getattr(self.factors, name) * getattr(scores, name)).sum() for name in names)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Whole gradients by name."""
    return {
        name.removeprefix("module."): (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad)
        for name, p in model.named_parameters()
    }


def alone(operator: str, tied: bool = False) -> dict[str, Tensor]:
    """One process, the whole batch."""
    model, rows = Model(tied), Rows(slice(None))
    rows.loss(model(rows.ids, getattr(rows, operator))).backward()
    return gradients(model)


def together(wrap: Callable, operator: str, inside: bool, tied: bool) -> tuple[dict[str, Tensor], bool]:
    """Gradients from this process's rows, and whether the operator got a sharded head. Both wrappers average gradients
    over processes, so the loss is multiplied by their number."""
    model = Model(tied)
    wrapped = wrap(model)
    start = sum(NUM_ROWS[: dist.get_rank()])
    rows = Rows(slice(start, start + NUM_ROWS[dist.get_rank()]))
    operate = getattr(rows, operator)
    result = wrapped(rows.ids, operate) if inside else operate(wrapped(rows.ids), model.head)
    (rows.loss(result) * dist.get_world_size()).backward()
    return gradients(wrapped), rows.head_was_sharded


def shard_root(model: Model) -> nn.Module:
    return fully_shard(model)


def shard_root_and_free(model: Model) -> nn.Module:
    return fully_shard(model, reshard_after_forward=True)


def shard_layer_and_head(model: Model) -> nn.Module:
    for module in (model.layer, model.head):
        fully_shard(module)
    return fully_shard(model)


def shard_layer(model: Model) -> nn.Module:
    fully_shard(model.layer)
    return fully_shard(model)


CASES: dict[str, tuple] = {
    f"{wrap.__name__}-{operator}-{'inside' if inside else 'outside'}{'-tied' if tied else ''}": (
        wrap, operator, inside, tied,
    )
    for wrap, operator, inside, tied in (
        (DistributedDataParallel, "scores", True, False),
        (DistributedDataParallel, "fused", True, True),
        (DistributedDataParallel, "of_logits", True, False),
        (DistributedDataParallel, "scores", False, False),
        (DistributedDataParallel, "fused", False, True),
        (shard_root, "scores", True, False),
        (shard_root, "fused", True, True),
        (shard_root, "of_logits", True, False),
        (shard_root, "scores", False, False),
        (shard_layer, "fused", False, True),
        (shard_layer_and_head, "scores", True, False),
        (shard_layer_and_head, "fused", True, False),
        (shard_layer_and_head, "of_logits", True, False),
        (shard_layer_and_head, "scores", False, False),
        (shard_root_and_free, "scores", True, False),
        (shard_root_and_free, "scores", False, True),
        (shard_root_and_free, "fused", False, False),
    )
}  # fmt: skip


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest absolute difference; infinite where a gradient is missing."""
    assert found.keys() == expected.keys()
    missing = [name for name in found if found[name] is None]
    return float("inf") if missing else max(float((found[n] - expected[n]).abs().max()) for n in found)


def shared_frozen_head() -> float:
    """One sharded, frozen head for policy and reference: the gradient of the hidden states, against plain tensors."""
    head = fully_shard(Model().requires_grad_(False)).head.weight
    rows = Rows(slice(None))
    found, expected = [], []
    for weight, out in ((head, found), (Model().head.weight.detach(), expected)):
        hidden = rows.ref_hidden.clone().requires_grad_()
        rows.loss(linear_token_scores(hidden, weight, rows.ref_hidden, weight, rows.targets)).backward()
        out.append(hidden.grad)
    return float((found[0] - expected[0]).abs().max())


def no_rows() -> float:
    """A process without rows takes part with none: the gradient is that of the other process's rows, halved."""
    head = fully_shard(Model()).head.weight
    rows = Rows(slice(None) if dist.get_rank() == 0 else slice(0, 0))
    scores = linear_token_scores(rows.ref_hidden, head, None, None, rows.targets)
    scores.policy_logprobs.sum().backward()
    model, rows = Model(), Rows(slice(None))
    linear_token_scores(rows.ref_hidden, model.head.weight, None, None, rows.targets).policy_logprobs.sum().backward()
    return float((2 * head.grad.full_tensor() - model.head.weight.grad).abs().max())


def sharded_rows_are_refused() -> str:
    """The message for hidden states that are a DTensor."""
    model = fully_shard(Model())
    hidden = DTensor.from_local(torch.zeros(2, H).double(), model.head.weight.device_mesh)
    try:
        linear_token_scores(hidden, model.head.weight, None, None, torch.zeros(2, dtype=torch.int64))
    except UserError as error:
        return str(error)
    return "not refused"


def main(rank: int, store: str, output: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60)
    )
    results: dict[str, object] = {}
    for name, (wrap, operator, inside, tied) in CASES.items():
        found, sharded = together(wrap, operator, inside, tied)
        results[name] = {"difference": difference(found, alone(operator, tied)), "head_was_sharded": sharded}
    results["shared-frozen-head"] = shared_frozen_head()
    results["no-rows"] = no_rows()
    results["refusal"] = sharded_rows_are_refused()
    if rank == 0:
        Path(output).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
