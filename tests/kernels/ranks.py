"""Three gloo processes that hold a vocabulary in slices; test_vocab_group.py starts this. Every case is compared with
the definition over the whole vocabulary, and the largest errors are written as JSON.

    python ranks.py FOLDER [KIND]        KIND: cpu, or interpreter (with TRITON_INTERPRET=1)

One process imports what is needed and forks the three.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from matrix import EVERY_OUTPUT, EVERY_SCORE, Case, assert_as_good_as_the_line, make_case, run, shrink_blocks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from fastkl.errors import UserError
from fastkl.kernels import call, loss, operators, reference
from fastkl.kernels.types import OUTPUTS, Support, TokenCoefficients, TokenScores

SLICES = {2: (0, 11, 37), 3: (0, 20, 25, 37)}
MIXED = {"softcap": 4.0, "bias": True, "per_row_temperature": True}
NO_IDS = torch.tensor([0, 36, -100, 12, -100, 5, 99, -3, 20])


class Ranks:
    """A group of two or three of the processes, and this one's slice."""

    def __init__(self, group: dist.ProcessGroup, bounds: tuple[int, ...]) -> None:
        self.group, self.bounds, self.rank = group, bounds, dist.get_rank(group)
        self.ids = slice(*bounds[self.rank : self.rank + 2])

    def cut(self, x: Tensor | None) -> Tensor | None:
        return None if x is None else x[self.ids]

    def options(self, options: dict) -> dict:
        own = {name: self.cut(x) if name.endswith("_bias") else x for name, x in options.items()}
        return {"chunk_tokens": 4, "vocab_group": self.group, **own}

    def scores(self, hidden, weight, ref_hidden, ref_weight, target_ids, **options) -> TokenScores:
        """linear_token_scores of the own slice of whole heads."""
        heads = hidden, self.cut(weight), ref_hidden, self.cut(ref_weight)
        return operators.linear_token_scores(*heads, target_ids, **self.options(options))

    def of_logits(self, hidden, weight, ref_hidden, ref_weight, target_ids, **options) -> TokenScores:
        """token_scores of the own columns."""
        z = hidden @ weight.t()
        r = None if ref_hidden is None else self.cut((ref_hidden @ ref_weight.t()).t()).t()
        return operators.token_scores(self.cut(z.t()).t(), r, target_ids, **self.options(options))

    def loss(self, case: Case, coefficients, **options) -> tuple[Tensor, TokenScores, list[Tensor]]:
        """linear_token_loss with the gradients of hidden states, whole head and whole bias."""
        leaves = [case.policy_hidden, case.policy_weight, case.options.get("policy_bias")]
        leaves = [None if x is None else x.clone().requires_grad_() for x in leaves]
        options = {**case.options, **options, "policy_bias": leaves[2]}
        heads = leaves[0], self.cut(leaves[1]), case.ref_hidden, self.cut(case.ref_weight)
        total, scores = operators.linear_token_loss(*heads, case.target_ids, coefficients, **self.options(options))
        return total, scores, list(torch.autograd.grad(3 * total, [x for x in leaves if x is not None]))

    def every(self, x: Tensor) -> Tensor:
        """x of all ranks, [ranks, *]."""
        parts = [torch.empty_like(x) for _ in self.bounds[1:]]
        dist.all_gather(parts, x.detach().contiguous(), group=self.group)
        return torch.stack(parts)

    def difference(self, found: list[Tensor], truth: list[Tensor]) -> float:
        """Of what every rank has whole: the largest; infinite where the ranks' bits differ."""
        for x, exact in zip(found, truth, strict=True):
            assert x.shape == exact.shape
        if not self.agree(found):
            return float("inf")
        return max(distance(x, exact) for x, exact in zip(found, truth, strict=True))

    def agree(self, found: list[Tensor]) -> bool:
        """Whether every rank has the same bits."""
        ours = torch.cat([x.detach().flatten() for x in found])
        return all(torch.equal(bits(part), bits(ours)) for part in self.every(ours))

    def difference_of_slices(self, found: Tensor, truth: Tensor) -> float:
        """Of what every rank has for its slice, and zero elsewhere."""
        elsewhere = found.clone()
        elsewhere[self.ids] = 0
        assert not elsewhere.any()
        return distance(self.every(found).sum(0), truth)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int64 if x.dtype == torch.float64 else torch.int32)


def distance(x: Tensor, truth: Tensor) -> float:
    """The largest absolute difference; equal infinities and NaN in the same places count as none."""
    x, truth = x.double(), truth.detach().double()
    same = (x == truth) | (x.isnan() & truth.isnan())
    return float(torch.where(same, 0, (x - truth).abs()).nan_to_num(torch.inf).max()) if x.numel() else 0.0


def compare(ranks: Ranks, function: Callable, case: Case, of_logits: bool = False) -> float:
    """Scores and gradients against float64 over the whole vocabulary. of_logits: the hidden states' own gradient is
    that of the slice, since the product with the head is the caller's."""
    definition = {name: value for name, value in case.options.items() if name != "chunk_tokens"}
    truth, true_gradients = run(reference.linear_token_scores, replace(case, options=definition))
    scores, gradients = run(function, case)
    of_hidden = ranks.every(gradients["hidden"]).sum(0) if of_logits else gradients["hidden"]
    names = [name for name in TokenScores.__slots__ if getattr(truth, name) is not None]
    assert names == [name for name in TokenScores.__slots__ if getattr(scores, name) is not None]
    found, exact = ([getattr(x, name) for name in names] for x in (scores, truth))
    whole = ranks.difference([*found, of_hidden], [*exact, true_gradients["hidden"]])
    slices = sorted(gradients.keys() - {"hidden"})
    return max(whole, *(ranks.difference_of_slices(gradients[name], true_gradients[name]) for name in slices))


def excluded(whole_slice: bool, sides: tuple[str, ...]) -> Case:
    """A case whose biases exclude ids: some, or all of rank 1's slice of three; but no target."""
    case = make_case(bias=True, outputs=EVERY_OUTPUT, seed=4)
    ids = torch.arange(20, 25) if whole_slice else torch.tensor([0, 7, 22, 36])
    allowed = torch.tensor([i for i in range(37) if i not in ids])
    case.target_ids.copy_(allowed[case.target_ids % len(allowed)])
    for side in sides:
        case.options[f"{side}_bias"][ids] = -torch.inf
    return case


def finite_scores(case: Case, names: tuple[str, ...]) -> Callable[[Ranks], float]:
    """Only these scores have factors: the others are infinite."""

    def check(ranks: Ranks) -> float:
        truth, true_gradients = run(reference.linear_token_scores, case, names)
        scores, gradients = run(ranks.scores, case, names)
        found, exact = ([getattr(x, n) for n in ("kl", "forward_kl", "jsd", *names)] for x in (scores, truth))
        whole = ranks.difference([*found, gradients["hidden"]], [*exact, true_gradients["hidden"]])
        return max(whole, ranks.difference_of_slices(gradients["weight"], true_gradients["weight"]))

    return check


def check_loss(
    case: Case, coefficients: str, dtype: torch.dtype = torch.float64, **options
) -> Callable[[Ranks], float]:
    """linear_token_loss with constants or a function of the scores, against autograd of the definition."""

    def check(ranks: Ranks) -> float:
        g = torch.Generator().manual_seed(5)
        outputs = case.options.get("outputs", OUTPUTS)
        names = [name for name in EVERY_SCORE if name in ("policy_logprobs", *outputs)]
        num_rows = len(case.target_ids)
        constants = {name: torch.randn(num_rows, generator=g, dtype=torch.float64) for name in names}
        for values in constants.values():
            values[2:5] = 0

        def function(rows: slice, scores: TokenScores) -> TokenCoefficients:
            baseline = scores.kl.mean() if scores.kl.numel() else 0.0
            return TokenCoefficients(**{name: values[rows] + baseline for name, values in constants.items()})

        splits = options.get("row_splits", [0, num_rows])
        given = function if coefficients == "function" else TokenCoefficients(**constants)
        total, scores, gradients = ranks.loss(case.to(dtype), given, **options)
        leaves = [case.policy_hidden.clone().requires_grad_(), case.policy_weight.clone().requires_grad_()]
        truth = reference.linear_token_scores(*leaves, *case.args()[2:], **case.options)
        exact = torch.zeros((), dtype=torch.float64)
        for lo, hi in zip(splits, splits[1:], strict=False):
            of_rows = TokenScores(**{n: getattr(truth, n)[lo:hi].detach() for n in names})
            factors = function(slice(lo, hi), of_rows) if coefficients == "function" else given.select(slice(lo, hi))
            exact = exact + sum((getattr(factors, n) * getattr(truth, n)[lo:hi]).sum() for n in names)
        expected = torch.autograd.grad(3 * exact, leaves)
        whole = [total.to(dtype), *(getattr(scores, n) for n in names), gradients[0]]
        difference = ranks.difference(whole, [exact, *(getattr(truth, n) for n in names), expected[0]])
        return max(difference, ranks.difference_of_slices(gradients[1], expected[1]))

    return check


def twice(ranks: Ranks) -> float:
    """A second backward over the same scores, whose last chunk is gone, gives the same gradient."""
    case = make_case(softcap=4.0)
    hidden = case.policy_hidden.clone().requires_grad_()
    scores = ranks.scores(hidden, *case.args()[1:], chunk_tokens=16, **case.options)
    first, second = (torch.autograd.grad(scores.kl.sum(), hidden, retain_graph=True)[0] for _ in range(2))
    return float((first - second).abs().max())


def one_head(ranks: Ranks) -> float:
    """The same slice of one head for policy and reference, which one product serves."""
    case = make_case()
    weight = case.policy_weight
    truth = reference.linear_token_scores(case.policy_hidden, weight, case.ref_hidden, weight, case.target_ids)
    own = ranks.cut(weight)
    scores = operators.linear_token_scores(
        case.policy_hidden, own, case.ref_hidden, own, case.target_ids, vocab_group=ranks.group
    )
    return ranks.difference([scores.kl], [truth.kl])


def of_shape(**options) -> Callable[[Ranks], float]:
    def check(ranks: Ranks) -> float:
        case = make_case(**options)
        case.target_ids.remainder_(options.get("valid_vocab", 37))
        return compare(ranks, ranks.scores, case)

    return check


def of_logits(**options) -> Callable[[Ranks], float]:
    return lambda ranks: compare(ranks, ranks.of_logits, make_case(**options), of_logits=True)


def no_ids(ranks: Ranks) -> float:
    """Targets that are no ids of the vocabulary, when nobody looks at them."""
    case = make_case()
    case.target_ids.copy_(NO_IDS)
    truth = reference.linear_token_scores(*case.args())
    scores = ranks.scores(*case.args(), check_values=False)
    found, exact = ([x.policy_logprobs, x.kl] for x in (scores, truth))
    return ranks.difference(found, exact)


def teacher(ranks: Ranks) -> float:
    """A reference whose vocabulary is padded further, on the last rank."""
    case = make_case(valid_vocab=33, outputs=EVERY_OUTPUT)
    padded = torch.cat([case.ref_weight, torch.full((6, 8), 99.0, dtype=torch.float64)])
    last = ranks.rank == len(ranks.bounds) - 2
    own = padded[ranks.ids.start :] if last else padded[ranks.ids]

    def scores(hidden, weight, ref_hidden, ref_weight, target_ids, **options):
        heads = hidden, ranks.cut(weight), ref_hidden, own
        return operators.linear_token_scores(*heads, target_ids, **ranks.options(options))

    case.target_ids.remainder_(33)
    return compare(ranks, scores, case)


def default_chunks(check: Callable[[Ranks], float]) -> Callable[[Ranks], float]:
    """The same with chunks of rows that are chosen by bytes, of which a small slice would need fewer."""

    def with_little_memory(ranks: Ranks) -> float:
        bytes_of_32_rows = 32 * 2 * 8 * 20
        with (
            patch.dict(call.CHUNK_BYTES, cpu=bytes_of_32_rows), patch.dict(loss.HELD_BYTES, cpu=2 * bytes_of_32_rows),
            patch.object(call, "LONG_CHUNK_BYTES", bytes_of_32_rows),
        ):  # fmt: skip
            return check(ranks)

    return with_little_memory


CASES: dict[str, Callable[[Ranks], float]] = {
    "default chunks": default_chunks(of_shape(num_rows=90, chunk_tokens=None)),
    "loss with default chunks": default_chunks(
        check_loss(make_case(num_rows=90), "function", row_splits=[0, 3, 90], chunk_tokens=None)
    ),
    "plain": of_shape(),
    "every output": of_shape(outputs=EVERY_OUTPUT),
    "softcap, bias, temperatures": of_shape(outputs=EVERY_OUTPUT, **MIXED),
    "softcap, bias, temperatures, no divergences": of_shape(**MIXED),
    "no reference": of_shape(reference=False, bias=True),
    "masked": of_shape(mask="some"),
    "nothing scored": of_shape(mask="all"),
    "no rows": of_shape(num_rows=0),
    "scale of 300": of_shape(scale=300.0, outputs=EVERY_OUTPUT),
    "shifted by 1e4": of_shape(bias=True, shift=1e4),
    "likely targets": of_shape(hot=True, scale=20.0),
    "log-probs alone": of_shape(outputs=()),
    "valid_vocab": of_shape(valid_vocab=31),
    "excluded ids": lambda ranks: compare(ranks, ranks.scores, excluded(False, ("policy", "ref"))),
    "an excluded slice": lambda ranks: compare(ranks, ranks.scores, excluded(True, ("policy", "ref"))),
    "a slice that the reference excludes": finite_scores(excluded(True, ("ref",)), ("policy_logprobs", "forward_kl")),
    "a slice that the policy excludes": finite_scores(excluded(True, ("policy",)), ("policy_logprobs", "kl", "jsd")),
    "logits": of_logits(outputs=EVERY_OUTPUT, mask="some", per_row_temperature=True),
    "logits, no divergences": of_logits(temperature=0.7),
    "loss with constants": check_loss(make_case(outputs=EVERY_OUTPUT), "constants", chunk_tokens=4),
    "loss with a function": check_loss(
        make_case(outputs=EVERY_OUTPUT), "function", row_splits=[0, 3, 9], chunk_tokens=6
    ),
    "loss with a group that is gone over twice": check_loss(
        make_case(outputs=EVERY_OUTPUT), "function", row_splits=[0, 3, 9], chunk_tokens=2
    ),
    "two backwards": twice,
    "one head": one_head,
    "no ids": no_ids,
    "teacher": teacher,
}  # fmt: skip


def in_float32(function: str = "scores", **options) -> Callable[[Ranks], float]:
    """As good as the plain PyTorch line in float32, by the rule of matrix.py."""

    def check(ranks: Ranks) -> float:
        case = make_case(**options)
        truth, true_gradients = run(reference.linear_token_scores, case)
        line, line_gradients = run(reference.linear_token_scores, case.to(torch.float32))
        scores, gradients = run(getattr(ranks, function), case.to(torch.float32))
        assert ranks.agree([x for x in scores.values() if x is not None])
        sums = {name: ranks.every(x).sum(0) for name, x in gradients.items()}
        if function == "scores":
            sums["hidden"] = gradients["hidden"]
        assert_as_good_as_the_line(scores, sums, line, line_gradients, truth, true_gradients)
        return 0.0

    return check


def one_head_that_does_not_fit(ranks: Ranks) -> float:
    """The rows of one rank's head begin where the kernels that multiply heads cannot read them: it takes another path
    than the others, and all the same they meet."""

    def scores(hidden, weight, *others, **options) -> TokenScores:
        if ranks.rank == 1:
            weight = torch.cat([weight.new_zeros(1), weight.flatten()])[1:].view(weight.shape)
        return ranks.scores(hidden, weight, *others, **options)

    case = make_case(num_rows=35)
    truth = reference.linear_token_scores(*case.args(), **case.options)
    found = scores(*case.to(torch.float32).args(), **case.options)
    return ranks.difference([found.policy_logprobs, found.kl], [truth.policy_logprobs, truth.kl])


SINGLE = {
    "every output in float32": in_float32(outputs=EVERY_OUTPUT),
    "softcap, bias, temperatures in float32": in_float32(**MIXED),
}
INTERPRETED = SINGLE | {
    "masked in float32": in_float32(mask="some"),
    "no reference in float32": in_float32(reference=False),
    "likely targets in float32": in_float32(hot=True, scale=20.0),
    "logits in float32": in_float32("of_logits", temperature=0.7),
    "loss with constants": check_loss(make_case(), "constants", torch.float32),
    "loss with a function": check_loss(make_case(), "function", torch.float32, row_splits=[0, 3, 9], chunk_tokens=6),
    "one head that does not fit": one_head_that_does_not_fit,
}

OF_TWO = {
    "every output", "softcap, bias, temperatures", "logits", "loss with constants", "loss with a function",
    "every output in float32",
}  # fmt: skip
"""The cases that a group of two of the processes runs as well."""


def said(ranks: Ranks, attempt: Callable[[Case], object]) -> list[str]:
    """What each rank of a call that should be refused says."""
    try:
        attempt(make_case())
        message = "not refused"
    except UserError as error:
        message = str(error)
    messages: list = [None] * (len(ranks.bounds) - 1)
    dist.all_gather_object(messages, message, group=ranks.group)
    return messages


def refusals(ranks: Ranks) -> dict[str, list[str]]:
    on_rank_1 = ranks.rank == 1

    def scores(case: Case, weight=None, ref_weight=None, target_ids=None, group=ranks.group, **options):
        own, of_ref = ranks.cut(case.policy_weight), ranks.cut(case.ref_weight)
        return operators.linear_token_scores(
            case.policy_hidden, own if weight is None else weight, case.ref_hidden,
            of_ref if ref_weight is None else ref_weight, case.target_ids if target_ids is None else target_ids,
            **{"vocab_group": group, **options},
        )  # fmt: skip

    def sharded(case: Case):
        mesh = init_device_mesh("cpu", (3,))
        return scores(case, weight=DTensor.from_local(ranks.cut(case.policy_weight), mesh, [Shard(0)]))

    attempts = {
        "support": lambda case: scores(case, support=Support(top_k=3)),
        "one rank alone": lambda case: scores(case, weight=case.policy_weight[:5, :3] if on_rank_1 else None),
        "targets": lambda case: scores(case, target_ids=case.target_ids.flip(0) + int(on_rank_1)),
        "temperature": lambda case: scores(case, temperature=0.5 if on_rank_1 else 1.0),
        "temperatures": lambda case: scores(case, temperature=torch.full((9,), 0.5 if on_rank_1 else 1.0)),
        "no ids left": lambda case: scores(case, valid_vocab=22),
        "too many ids": lambda case: scores(case, valid_vocab=38),
        "cut apart": lambda case: scores(case, ref_weight=case.ref_weight[:7]),
        "no group": lambda case: scores(case, group="tp"),
        "DTensor": sharded,
        "target beyond all": lambda case: scores(case, target_ids=case.target_ids + 37),
    }  # fmt: skip
    return {name: said(ranks, attempt) for name, attempt in attempts.items()}


def main(rank: int, folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=3, timeout=timedelta(seconds=60)
    )
    two = dist.new_group([0, 1])
    results: dict[str, object] = {}
    if kind == "interpreter":
        from interpreter import call_without_patching_anew
        from triton.runtime.interpreter import InterpretedFunction

        shrink_blocks()
        InterpretedFunction.__call__ = call_without_patching_anew
    cases = CASES | SINGLE if kind == "cpu" else INTERPRETED
    for size in (3, 2) if rank < 2 else (3,):
        ranks = Ranks(dist.group.WORLD if size == 3 else two, SLICES[size])
        for name, case in cases.items():
            if size == 3 or name in OF_TWO:
                results[f"{name}, {size} ranks"] = case(ranks)
    if kind == "cpu":
        results["refusals"] = refusals(Ranks(dist.group.WORLD, SLICES[3]))
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


def fork(rank: int, folder: Path, kind: str) -> int:
    """The process id of a copy of this process that runs one rank."""
    if child := os.fork():
        return child
    code = 1
    try:
        main(rank, folder, kind)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    children = [fork(rank, Path(sys.argv[1]), sys.argv[2]) for rank in range(3)]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    sys.exit(max(abs(code) for code in codes))
