"""The jobs of `fastkl bench`: what is given, what is wanted, and what that costs at the very least; and our own rows.

A job is a set of scores of one problem's rows, with or without the gradient of a loss of them. Every implementation is
a function with the signature of token_scores (logits given) or linear_token_scores (hidden states and heads given), so
that `solve` runs them all alike, and the float64 reference with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from fastkl.kernels import reference
from fastkl.kernels.costs import cost
from fastkl.kernels.operators import (
    Support,
    TokenCoefficients,
    TokenScores,
    linear_token_loss,
    linear_token_scores,
    token_scores,
)

CHECK_ROWS = slice(0, 32)
"""The rows that are compared with float64."""


@dataclass(frozen=True)
class Shape:
    """N rows, H features, V ids; the dtype of hidden states, heads and logits."""

    name: str
    rows: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    softcap: float | None = None
    ref_hidden: int = 0  # features of a reference that is another model, a teacher; 0: H


CPU_SHAPES = (Shape("cpu-small", 512, 256, 16000, torch.float32),)

GPU_SHAPES = (
    Shape("Qwen2.5-0.5B", 8192, 896, 151936, torch.bfloat16),
    Shape("Llama-3.1-8B", 8192, 4096, 128256, torch.bfloat16),
    Shape("Llama-3.2-1B", 8192, 2048, 128256, torch.bfloat16),
    Shape("Gemma-2-2B", 4096, 2304, 256000, torch.bfloat16, 30.0),
    Shape("Qwen2.5-0.5B <- 7B", 8192, 896, 151936, torch.bfloat16, ref_hidden=3584),
    Shape("Qwen3-1.7B <- 8B", 8192, 2048, 151936, torch.bfloat16, ref_hidden=4096),
)


class Problem:
    """The inputs of one shape. Random, never zeros: zeros draw less power and run faster."""

    def __init__(self, shape: Shape, device: str) -> None:
        g = torch.Generator(device).manual_seed(0)
        self.shape, self.device, n, h, v = shape, device, shape.rows, shape.hidden, shape.vocab

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, device=device)

        weight, hidden = randn(v, h) * 2.0 / h**0.5, randn(n, h)
        self.weight = weight.to(shape.dtype)
        self.hidden = hidden.to(shape.dtype)
        if wide := shape.ref_hidden:
            ref_weight, ref_hidden = randn(v, wide) * 2.0 / wide**0.5, randn(n, wide)
        else:
            ref_weight, ref_hidden = weight + 0.02 * randn(v, h), hidden + 0.05 * randn(n, h)
        self.ref_weight, self.ref_hidden = ref_weight.to(shape.dtype), ref_hidden.to(shape.dtype)
        self.targets = torch.randint(0, v, (n,), generator=g, device=device)
        self.a, self.c = randn(n), 0.1 * randn(n).abs()  # the loss's factors

    @cached_property
    def logits(self) -> tuple[Tensor, Tensor]:
        """Policy and reference logits in the shape's dtype."""
        return self.hidden @ self.weight.t(), self.ref_hidden @ self.ref_weight.t()

    def exact(self, of_logits: bool, rows: slice = CHECK_ROWS) -> Problem:
        """Some of the rows in float64; of_logits: with the logits as they were rounded."""
        part = copy(self)
        part.weight, part.ref_weight = self.weight.double(), self.ref_weight.double()
        part.hidden, part.ref_hidden = self.hidden[rows].double(), self.ref_hidden[rows].double()
        part.targets, part.a, part.c = self.targets[rows], self.a[rows], self.c[rows]
        if of_logits:
            policy, ref = self.logits
            part.logits = policy[rows].double(), ref[rows].double()
        return part


@dataclass(frozen=True)
class Job:
    """One job. The loss whose gradient is wanted: the sum of a * the first score + c * the last one, or k3's."""

    given: str
    wanted: str
    scores: tuple[str, ...]  # fields of TokenScores
    head_products: float  # in units of 2 N H V operations: the least that any implementation needs
    logit_passes: float  # N V logits read or written, likewise
    of_logits: bool = False
    with_reference: bool = True
    gradient: bool = True
    frozen_head: bool = False  # one head, the policy's and the reference's, that takes no gradient
    k3: bool = False
    summed: bool = False  # the loss is the sum of the last score

    def least_products(self, shape: Shape) -> float:
        """head_products, where the reference's head is as wide as this shape's."""
        extra = shape.ref_hidden / shape.hidden - 1 if shape.ref_hidden and self.with_reference else 0.0
        return self.head_products + extra

    def inputs(self, p: Problem) -> tuple[tuple[Tensor | None, ...], list[Tensor]]:
        """What a function is called with before the targets, and of that what is differentiated (fresh leaves)."""
        if self.of_logits:
            z, r = p.logits
            z = z.clone().requires_grad_() if self.gradient else z
            return (z, r if self.with_reference else None), [z]
        hidden = p.hidden.detach().requires_grad_()
        weight = p.weight if self.frozen_head else p.weight.detach().requires_grad_()
        ref_weight = weight if self.frozen_head else p.ref_weight
        ref = (p.ref_hidden, ref_weight) if self.with_reference else (None, None)
        return (hidden, weight, *ref), [hidden] if self.frozen_head else [hidden, weight]

    def loss(self, p: Problem, scores: TokenScores, found: Sequence[Tensor]) -> Tensor:
        """found: the scores that the function gave of those wanted."""
        if self.k3:
            gap = scores.ref_logprobs - scores.policy_logprobs
            return (-p.a * scores.policy_logprobs + p.c * (gap.exp() - 1 - gap)).sum()
        if self.summed:
            return found[-1].sum()
        loss = (p.a * found[0]).sum()
        return loss + (p.c * found[-1]).sum() if len(found) > 1 else loss


HEADS, LOGITS = "hidden states and heads of policy and reference", "logits of policy and reference"
POLICY, STEP = "hidden states and head of the policy", "and all gradients"
KL, ENTROPY = ("policy_logprobs", "kl"), ("policy_logprobs", "entropy")

SCORED, TRAINED = cost("score", "score"), cost("head", "head", "hidden gradient", "head gradient")
"""The floor of E has the policy's head twice, since the gradient's factors are known only after its scores."""

JOBS = {
    "A": Job("logits of the policy", "log-probs, entropy", ENTROPY, *cost("score"), True, False, gradient=False),
    "B": Job(LOGITS, "log-probs, exact KL", KL, *SCORED, True, gradient=False),
    "C": Job(LOGITS, "log-probs, exact KL, and the logits' gradient", KL,
             *cost("copy", "score", "score", "gradient", "gradient of the KL"), True),
    "D": Job(HEADS, "log-probs, exact KL", KL, *cost("head", "head"), gradient=False),
    "E": Job(POLICY, f"log-probs, entropy, {STEP}", ENTROPY,
             *cost("head", "head", "hidden gradient", "head gradient"), with_reference=False),
    "F": Job(HEADS, f"log-probs, exact KL, {STEP}", KL, *TRAINED),
    "G": Job(HEADS, f"a GRPO step with k3 in the loss: log-probs {STEP}", KL[:1], *TRAINED, k3=True),
    "H": Job("hidden states of both and one frozen head", "log-probs, exact KL, the hidden gradient", KL,
             *cost("head", "head", "hidden gradient"), frozen_head=True),
    "I": Job(LOGITS, "log-probs, exact KL on the sampler's support", ("policy_logprobs_support", "kl_support"),
             *SCORED, True, gradient=False),
    "J": Job("hidden states and heads of a student and a wider teacher", f"exact KL(student, teacher), {STEP}", ("kl",),
             *TRAINED, summed=True),
}  # fmt: skip

Scorer = Callable[..., TokenScores | tuple[Tensor, TokenScores]]
"""A function with our signature; or one that returns its loss first, as linear_token_loss does."""


def solve(
    job: Job, p: Problem, scorer: Scorer, inputs: tuple[tuple[Tensor | None, ...], list[Tensor]] | None = None
) -> list[Tensor]:
    """The job done once: those of the scores that the scorer gives, then the gradients. inputs: made beforehand."""
    given, leaves = job.inputs(p) if inputs is None else inputs
    with torch.set_grad_enabled(job.gradient):
        out = scorer(*given, p.targets)
        loss, scores = out if isinstance(out, tuple) else (None, out)
        found = [score for name in job.scores if (score := getattr(scores, name)) is not None]
        if not job.gradient:
            return found
        loss = job.loss(p, scores, found) if loss is None else loss
    return [*(score.detach() for score in found), *torch.autograd.grad(loss, leaves)]


def errors(found: Sequence[Tensor], exact: Sequence[Tensor]) -> dict[str, float]:
    """Largest deviations from float64 in the rows that `exact` holds: of a score in nats, of a gradient as a part of
    its largest entry. NaN where a result holds one."""
    off: dict[str, list[float]] = {"score_error": [0.0], "gradient_error": [0.0]}
    for x, truth in zip(found, exact, strict=True):
        error = float((x[: len(truth)].double() - truth).abs().max())
        kind, scale = ("score_error", 1.0) if truth.dim() == 1 else ("gradient_error", float(truth.abs().max()))
        off[kind].append(error / scale)
    return {kind: float(torch.tensor(values).max()) for kind, values in off.items()}  # Python's max would lose a NaN


@dataclass(frozen=True)
class Row:
    """One implementation of one job, ready to be called, checked and timed."""

    job: str
    name: str
    shape: Shape
    call: Callable[[], list[Tensor]]  # scores [N], then the gradient towards hidden states or logits
    expected: Callable[[], list[Tensor]]  # the same of CHECK_ROWS, in float64
    head_products: float
    logit_passes: float
    doubt: str = ""  # why the row is no like-for-like comparison, if it is none

    @property
    def compiled(self) -> bool:
        """Whether torch.compile has to work first, which takes longer than all the calls that are timed."""
        return self.name.startswith(("compiled", "Liger GRPO"))


def make_row(
    p: Problem, letter: str, name: str, scorer: Scorer, *, gives: Sequence[str] | None = None, doubt: str = "",
    support: Support | None = None, head_products: float | None = None, logit_passes: float | None = None,
) -> Row:  # fmt: skip
    """gives: the wanted scores that the scorer returns, if not all; its floor may then be lower, too."""
    job = JOBS[letter]
    gives = job.scores if gives is None else gives
    kept = len(gives) + job.gradient  # a head's gradient is computed, but too large to check
    if job.of_logits:
        oracle: Scorer = partial(reference.token_scores, support=support)
    else:
        oracle = partial(reference.linear_token_scores, softcap=p.shape.softcap)

    def of_those_given(*inputs: Tensor | None) -> TokenScores:
        out = oracle(*inputs)
        return TokenScores(**{n: getattr(out, n) for n in {*gives, "policy_logprobs", "ref_logprobs"}})

    def expected() -> list[Tensor]:
        exact = solve(job, p.exact(job.of_logits), of_those_given)
        return exact[:kept] if gives else exact[len(job.scores) :][:kept]

    return Row(
        letter, name, p.shape, lambda: solve(job, p, scorer)[:kept], expected,
        job.least_products(p.shape) if head_products is None else head_products,
        job.logit_passes if logit_passes is None else logit_passes, doubt,
    )  # fmt: skip


def in_the_forward(p: Problem, k3: bool = False, summed: bool = False, **options: Any) -> Scorer:
    """linear_token_loss with the job's loss: it takes the gradient while the logits are still at hand."""
    if summed:
        return partial(linear_token_loss, coefficients=TokenCoefficients(kl=torch.ones_like(p.c)), **options)
    if not k3:
        return partial(linear_token_loss, coefficients=TokenCoefficients(policy_logprobs=p.a, kl=p.c), **options)

    def coefficients(rows: slice, s: TokenScores) -> TokenCoefficients:
        """With k = log p - log q, k3 = exp(-k) - 1 + k has the slope 1 - exp(-k)."""
        slope = 1 - (s.ref_logprobs - s.policy_logprobs).exp()
        return TokenCoefficients(policy_logprobs=-p.a[rows] + p.c[rows] * slope)

    splits = sorted({*range(0, p.shape.rows, max(1, p.shape.rows // 64)), p.shape.rows})
    return partial(linear_token_loss, coefficients=coefficients, row_splits=splits, outputs=(), **options)


def own_rows(p: Problem) -> Iterator[Row]:
    """Every job with our operators and with plain PyTorch; other projects' are in peers.py."""
    if p.shape.ref_hidden:
        yield from _distillation_rows(p)
        return
    options: dict[str, Any] = {"softcap": p.shape.softcap}
    ours, plain = partial(linear_token_scores, **options), partial(reference.linear_token_scores, **options)
    for letter in "DEFHG":
        if letter in "DE":
            yield make_row(p, letter, "fastkl", ours)
        if letter in "FH":
            yield make_row(p, letter, "fastkl, autograd", ours)
        if letter in "FHG":
            forward = in_the_forward(p, k3=JOBS[letter].k3, **options)
            yield make_row(p, letter, "fastkl, gradient in the forward", forward)
        yield make_row(p, letter, "plain PyTorch", plain)
        if letter == "F" and p.device == "cuda":  # elsewhere compiling takes longer than the whole matrix
            yield make_row(p, "F", "compiled PyTorch", torch.compile(plain, dynamic=False))
    if p.shape.softcap is None:
        yield from _logits_rows(p)


def _distillation_rows(p: Problem) -> Iterator[Row]:
    """A teacher of another width: the KL alone is asked for."""
    kl: dict[str, Any] = {"outputs": ("kl",)}
    plain = reference.linear_token_scores
    yield make_row(p, "J", "fastkl, autograd", partial(linear_token_scores, **kl))
    yield make_row(p, "J", "fastkl, gradient in the forward", in_the_forward(p, summed=True, **kl))
    yield make_row(p, "J", "plain PyTorch", plain)
    if p.device == "cuda":
        yield make_row(p, "J", "compiled PyTorch", torch.compile(plain, dynamic=False))


def _logits_rows(p: Problem) -> Iterator[Row]:
    """Logits in: forward alone, with the reference, with the gradient, and on a support."""
    contenders: dict[str, Callable[..., TokenScores]] = {
        "fastkl": token_scores,
        "plain PyTorch": reference.token_scores,
    }
    if p.device == "cuda":
        contenders["compiled PyTorch"] = torch.compile(reference.token_scores, dynamic=False)
    supports = {
        "top_k 50": Support(top_k=50), "top_p 0.95": Support(top_p=0.95), "min_p 0.05": Support(min_p=0.05),
    }  # fmt: skip
    for name, function in contenders.items():
        in_place = partial(function, inplace_backward=True) if name == "fastkl" else function
        yield make_row(p, "A", name, function)
        yield make_row(p, "B", name, function)
        yield make_row(p, "C", name, in_place)
        for label, support in supports.items() if name != "compiled PyTorch" else ():
            yield make_row(p, "I", f"{name}, {label}", partial(function, support=support), support=support)
