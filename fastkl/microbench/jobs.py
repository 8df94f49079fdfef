"""The jobs of `fastkl bench`: inputs, implementations, peers, and what each costs at the very least.

A logits -> logp, entropy.  B the same with reference and exact KL.  C B with the gradient over the logits.  D hidden
states -> B's scores, no gradient.  E hidden -> logp, entropy, with gradients.  F hidden -> B's scores and exact-KL
gradient.  G a GRPO step with k3 in the loss.  H F with a frozen head shared with the reference.  I B on a support.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fastkl.kernels import reference
from fastkl.kernels.operators import Support, TokenCoefficients, linear_token_loss, linear_token_scores, token_scores

CHECK_ROWS = 32
"""How many rows are compared with float64."""


@dataclass(frozen=True)
class Shape:
    """N rows, H features, V ids; the dtype of hidden states, heads and logits."""

    name: str
    rows: int
    hidden: int
    vocab: int
    dtype: torch.dtype
    softcap: float | None = None


CPU_SHAPES = (Shape("cpu-small", 512, 256, 16000, torch.float32),)


GPU_SHAPES = (
    Shape("Qwen2.5-0.5B", 8192, 896, 151936, torch.bfloat16),
    Shape("Llama-3.1-8B", 8192, 4096, 128256, torch.bfloat16),
    Shape("Llama-3.2-1B", 8192, 2048, 128256, torch.bfloat16),
    Shape("Gemma-2-2B", 4096, 2304, 256000, torch.bfloat16, 30.0),
)


@dataclass(frozen=True)
class Row:
    """One implementation of one job: a call that returns its results, and what the job costs at the very least."""

    job: str
    name: str
    shape: Shape
    call: Callable[[], list[Tensor]]  # scores [N] (and the hidden or logits gradient last)
    expected: Callable[[], list[Tensor]]  # the same of the first CHECK_ROWS rows, in float64
    head_products: float  # in units of 2 N H V operations
    logit_passes: float  # N V logits read or written

    @property
    def compiled(self) -> bool:
        """Whether torch.compile has to work first, which takes longer than all the calls that are timed."""
        return self.name.startswith(("compiled", "Liger GRPO"))


class Problem:
    """The inputs of one shape. Random, never zeros: zeros draw less power and run faster."""

    def __init__(self, shape: Shape, device: str) -> None:
        g = torch.Generator(device).manual_seed(0)
        self.shape, n, h, v = shape, shape.rows, shape.hidden, shape.vocab

        def randn(*size: int) -> Tensor:
            return torch.randn(*size, generator=g, device=device)

        weight = randn(v, h) * 2.0 / h**0.5
        self.weight = weight.to(shape.dtype).requires_grad_()
        self.ref_weight = (weight + 0.02 * randn(v, h)).to(shape.dtype)
        hidden = randn(n, h)
        self.hidden = hidden.to(shape.dtype).requires_grad_()
        self.ref_hidden = (hidden + 0.05 * randn(n, h)).to(shape.dtype)
        self.targets = torch.randint(0, v, (n,), generator=g, device=device)
        self.a, self.c = randn(n), 0.1 * randn(n).abs()

    def heads(self, rows: slice = slice(None)) -> tuple[Tensor, ...]:
        """The first five arguments of linear_token_scores."""
        return self.hidden[rows], self.weight, self.ref_hidden[rows], self.ref_weight, self.targets[rows]

    @cache  # noqa: B019 (a problem lives as long as its rows)
    def logits(self) -> tuple[Tensor, Tensor]:
        """Policy and reference logits in the shape's dtype."""
        with torch.no_grad():
            return self.hidden @ self.weight.t(), self.ref_hidden @ self.ref_weight.t()

    def gradients(self, loss: Tensor, *extra: Tensor, frozen: bool = False) -> list[Tensor]:
        """The scores, then the hidden gradient (the head's is computed, and dropped)."""
        leaves = [self.hidden] if frozen else [self.hidden, self.weight]
        return [*(x.detach() for x in extra), torch.autograd.grad(loss, leaves)[0]]


def rows_of(problem: Problem) -> Iterator[Row]:
    """Every job with our operators and with plain PyTorch; the other projects are in bench_peers.py."""
    p, s = problem, problem.shape
    first = slice(0, CHECK_ROWS)
    options = {"softcap": s.softcap}

    def oracle(weighted: bool = False, shared: bool = False) -> list[Tensor]:
        hidden, weight, ref_hidden, ref_weight, targets = (x.detach() for x in p.heads(first))
        leaf = hidden.double().requires_grad_()
        ref_weight = weight if shared else ref_weight
        out = reference.linear_token_scores(
            leaf, weight.double(), ref_hidden.double(), ref_weight.double(), targets, **options
        )
        loss = (p.a[first] * out.policy_logprobs).sum() + (p.c[first] * (out.kl if weighted else out.entropy)).sum()
        kl = [out.kl] if weighted else [out.entropy]
        return [out.policy_logprobs.detach(), *(x.detach() for x in kl), torch.autograd.grad(loss, leaf)[0]]

    def scores(function: Callable, grad: bool, shared: bool = False) -> list[Tensor]:
        hidden, weight, ref_hidden, ref_weight, targets = p.heads()
        if shared:
            weight = ref_weight = p.weight.detach()
        with torch.set_grad_enabled(grad):
            out = function(hidden, weight, ref_hidden, ref_weight, targets, **options)
        if not grad:
            return [out.policy_logprobs, out.kl]
        loss = (p.a * out.policy_logprobs).sum() + (p.c * out.kl).sum()
        return p.gradients(loss, out.policy_logprobs, out.kl, frozen=shared)

    def loss(shared: bool = False) -> list[Tensor]:
        weight, ref_weight = (p.weight.detach(),) * 2 if shared else (p.weight, p.ref_weight)
        factors = TokenCoefficients(policy_logprobs=p.a, kl=p.c)
        value, out = linear_token_loss(p.hidden, weight, p.ref_hidden, ref_weight, p.targets, factors, **options)
        return p.gradients(value, out.policy_logprobs, out.kl, frozen=shared)

    def entropy_step(function: Callable) -> list[Tensor]:
        out = function(p.hidden, p.weight, None, None, p.targets, **options)
        total = (p.a * out.policy_logprobs).sum() + (p.c * out.entropy).sum()
        return p.gradients(total, out.policy_logprobs, out.entropy)

    def with_kl(shared: bool = False) -> list[Tensor]:
        return oracle(weighted=True, shared=shared)

    plain = reference.linear_token_scores
    yield Row("D", "fastkl", s, lambda: scores(linear_token_scores, False), lambda: with_kl()[:2], 2, 0)
    yield Row("D", "plain PyTorch", s, lambda: scores(plain, False), lambda: with_kl()[:2], 2, 0)
    yield Row("E", "fastkl", s, lambda: entropy_step(linear_token_scores), oracle, 4, 0)
    yield Row("E", "plain PyTorch", s, lambda: entropy_step(plain), oracle, 4, 0)
    yield Row("F", "fastkl, autograd", s, lambda: scores(linear_token_scores, True), with_kl, 4, 0)
    yield Row("F", "fastkl, gradient in the forward", s, loss, with_kl, 4, 0)
    yield Row("F", "plain PyTorch", s, lambda: scores(plain, True), with_kl, 4, 0)
    yield Row("H", "fastkl, autograd", s, lambda: scores(linear_token_scores, True, True), lambda: with_kl(True), 3, 0)
    yield Row("H", "fastkl, gradient in the forward", s, lambda: loss(True), lambda: with_kl(True), 3, 0)
    yield Row("H", "plain PyTorch", s, lambda: scores(plain, True, True), lambda: with_kl(True), 3, 0)
    if p.hidden.is_cuda:
        compiled = torch.compile(plain, dynamic=False)
        yield Row("F", "compiled PyTorch", s, lambda: scores(compiled, True), with_kl, 4, 0)
    yield from _grpo_rows(p, options)
    if s.softcap is None:
        yield from _logits_rows(p)


def _grpo_rows(p: Problem, options: dict) -> Iterator[Row]:
    """k3 = exp(-k) - 1 + k in the loss, k = logp - ref logp: its factor on logp is 1 - exp(-k)."""

    def factor(a: Tensor, c: Tensor, logp: Tensor, ref_logp: Tensor) -> Tensor:
        return -a + c * (1 - torch.exp(ref_logp - logp))

    def fused() -> list[Tensor]:
        def coefficients(rows: slice, scores) -> TokenCoefficients:
            return TokenCoefficients(
                policy_logprobs=factor(p.a[rows], p.c[rows], scores.policy_logprobs, scores.ref_logprobs)
            )

        splits = range(0, p.shape.rows + 1, max(1, p.shape.rows // 64))
        splits = [*splits] if p.shape.rows in splits else [*splits, p.shape.rows]
        value, out = linear_token_loss(*p.heads(), coefficients, row_splits=splits, outputs=(), **options)
        return p.gradients(value, out.policy_logprobs)

    def step(function: Callable, rows: slice, *heads: Tensor) -> list[Tensor]:
        out = function(*heads, **options)
        a, c = p.a[rows], p.c[rows]
        gap = out.ref_logprobs - out.policy_logprobs
        loss = (-a * out.policy_logprobs + c * (gap.exp() - 1 - gap)).sum()
        leaves = [heads[0]] if heads[0] is not p.hidden else [p.hidden, p.weight]
        return [out.policy_logprobs.detach(), torch.autograd.grad(loss, leaves)[0]]

    def oracle() -> list[Tensor]:
        rows = slice(0, CHECK_ROWS)
        heads = [x.detach().double() if x.is_floating_point() else x for x in p.heads(rows)]
        return step(reference.linear_token_scores, rows, heads[0].requires_grad_(), *heads[1:])

    everything = slice(None)
    whole = (p.hidden, p.weight, p.ref_hidden, p.ref_weight, p.targets)
    yield Row("G", "fastkl, gradient in the forward", p.shape, fused, oracle, 4, 0)
    yield Row(
        "G", "plain PyTorch", p.shape, lambda: step(reference.linear_token_scores, everything, *whole), oracle, 4, 0
    )


def _logits_rows(p: Problem) -> Iterator[Row]:
    """Logits in: forward alone, with the reference, with the gradient, and on a support."""
    s, first = p.shape, slice(0, CHECK_ROWS)
    z, r = p.logits()

    def forward(function: Callable, ref: Tensor | None, rows: slice, double: bool = False, **options) -> list[Tensor]:
        logits, ref = z[rows], None if ref is None else ref[rows]
        if double:
            logits, ref = logits.double(), None if ref is None else ref.double()
        out = function(logits, ref, p.targets[rows], **options)
        last = out.kl_support if "support" in options else out.entropy if ref is None else out.kl
        return [out.policy_logprobs_support if "support" in options else out.policy_logprobs, last]

    def backward(function: Callable, rows: slice, double: bool = False, **options) -> list[Tensor]:
        leaf = (z[rows].double() if double else z[rows].clone()).requires_grad_()
        out = function(leaf, r[rows].double() if double else r[rows], p.targets[rows], **options)
        loss = (p.a[rows] * out.policy_logprobs).sum() + (p.c[rows] * out.kl).sum()
        return [out.policy_logprobs.detach(), torch.autograd.grad(loss, leaf)[0]]

    every = slice(None)
    plain, ours = reference.token_scores, token_scores
    contenders = [("fastkl", ours, {"inplace_backward": True}), ("plain PyTorch", plain, {})]
    if z.is_cuda:  # elsewhere compiling takes longer than the whole matrix
        contenders.append(("compiled PyTorch", torch.compile(plain, dynamic=False), {}))
    for name, function, inplace in contenders:
        for job, ref, passes in (("A", None, 1), ("B", r, 2)):
            yield Row(
                job, name, s, lambda f=function, ref=ref: forward(f, ref, every),
                lambda ref=ref: forward(plain, ref, first, True), 0, passes,
            )  # fmt: skip
        yield Row(
            "C", name, s, lambda f=function, o=inplace: backward(f, every, **o),
            lambda: backward(plain, first, True), 0, 7,
        )  # fmt: skip
        if name == "compiled PyTorch":
            continue
        for label, support in (
            ("top_k 50", Support(top_k=50)),
            ("top_p 0.95", Support(top_p=0.95)),
            ("min_p 0.05", Support(min_p=0.05)),
        ):
            yield Row(
                "I", f"{name}, {label}", s, lambda f=function, x=support: forward(f, r, every, support=x),
                lambda x=support: forward(plain, r, first, True, support=x), 0, 2,
            )  # fmt: skip
