"""The contenders of drop_in.py: the same jobs, done by fastkl, by PyTorch as one would write it down, and by the
functions of other projects, with the same inputs, outputs and gradients."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fastkl import TokenCoefficients, linear_token_loss, linear_token_scores, token_scores
from fastkl.kernels import reference

sys.path.append(str(Path(__file__).resolve().parents[1] / "tests" / "integrations"))
from others import function_module

JOBS = {
    "A": ("logits [N, V]", "log-prob", "dlogits"),
    "B": ("logits [N, V]", "log-prob, entropy", "dlogits"),
    "C": ("hidden [N, H], head [V, H]", "log-prob, entropy", "dhidden, dhead"),
    "D": ("hidden and head, twice", "policy and reference log-prob, exact KL", "dhidden, dhead"),
}


@dataclass(frozen=True)
class Size:
    """N rows, H features, V ids."""

    rows: int
    hidden: int
    vocab: int
    dtype: torch.dtype


class Problem:
    """The inputs of every job, and the factors of the loss: sum of a * log-prob + b * (entropy or KL)."""

    def __init__(self, size: Size) -> None:
        g = torch.Generator().manual_seed(0)
        weight = torch.randn(size.vocab, size.hidden, generator=g) * 2 / size.hidden**0.5
        hidden = torch.randn(size.rows, size.hidden, generator=g)
        self.size = size
        self.weight = weight.to(size.dtype)
        self.hidden = hidden.to(size.dtype)
        self.ref_weight = (weight + 0.02 * torch.randn(weight.shape, generator=g)).to(size.dtype)
        self.ref_hidden = (hidden + 0.05 * torch.randn(hidden.shape, generator=g)).to(size.dtype)
        self.targets = torch.randint(0, size.vocab, (size.rows,), generator=g)
        self.a, self.b = torch.randn(size.rows, generator=g), torch.randn(size.rows, generator=g)
        self.logits = (self.hidden.float() @ self.weight.float().t()).to(size.dtype)

    def leaves(self, job: str) -> list[Tensor]:
        """Fresh copies of what is differentiated: a contender may overwrite its logits."""
        given = [self.logits] if job in "AB" else [self.hidden, self.weight]
        return [x.clone().requires_grad_() for x in given]

    def exact(self, job: str) -> list[Tensor]:
        """What every contender should give, in float64."""
        leaves = [x.detach().double().requires_grad_() for x in self.leaves(job)]
        if job in "AB":
            scores = reference.token_scores(leaves[0], None, self.targets)
        else:
            ref = (self.ref_hidden.double(), self.ref_weight.double()) if job == "D" else (None, None)
            scores = reference.linear_token_scores(*leaves, *ref, self.targets)
        kept = {"A": (), "B": (scores.entropy,), "C": (scores.entropy,), "D": (scores.ref_logprobs, scores.kl)}[job]
        return self.with_gradients(leaves, scores.policy_logprobs, *kept)

    def with_gradients(self, leaves: list[Tensor], logprobs: Tensor, *others: Tensor | None) -> list[Tensor]:
        """The scores, and the gradients of the loss: of a * log-prob + b * the last score."""
        loss = (self.a * logprobs).sum()
        if others:
            loss = loss + (self.b * others[-1]).sum()
        return [logprobs.detach(), *(x.detach() for x in others), *torch.autograd.grad(loss, leaves)]


@dataclass(frozen=True)
class Contender:
    """One function of one project, doing one job. The call gets fresh leaves."""

    job: str
    project: str
    function: str
    call: Callable[[Problem, list[Tensor]], list[Tensor]]


def ours_and_plain() -> Iterator[Contender]:
    """fastkl, and PyTorch as one would write it down."""

    def of_logits(function: Callable, outputs: dict) -> Callable:
        def call(p: Problem, leaves: list[Tensor]) -> list[Tensor]:
            scores = function(leaves[0], None, p.targets, **outputs)
            last = () if outputs.get("outputs") == () else (scores.entropy,)
            return p.with_gradients(leaves, scores.policy_logprobs, *last)

        return call

    def of_heads(function: Callable, ref: bool) -> Callable:
        def call(p: Problem, leaves: list[Tensor]) -> list[Tensor]:
            scores = function(*leaves, *((p.ref_hidden, p.ref_weight) if ref else (None, None)), p.targets)
            others = (scores.ref_logprobs, scores.kl) if ref else (scores.entropy,)
            return p.with_gradients(leaves, scores.policy_logprobs, *others)

        return call

    def log_softmax(p: Problem, leaves: list[Tensor]) -> list[Tensor]:
        logp = leaves[0].float().log_softmax(-1)
        return p.with_gradients(leaves, logp.gather(1, p.targets[:, None])[:, 0])

    def fused(p: Problem, leaves: list[Tensor]) -> list[Tensor]:
        factors = TokenCoefficients(policy_logprobs=p.a, kl=p.b)
        loss, s = linear_token_loss(*leaves, p.ref_hidden, p.ref_weight, p.targets, factors, outputs=("kl",))
        return [s.policy_logprobs, s.ref_logprobs, s.kl, *torch.autograd.grad(loss, leaves)]

    yield Contender("A", "fastkl", "token_scores(outputs=())", of_logits(token_scores, {"outputs": ()}))
    in_place = {"outputs": (), "inplace_backward": True}
    yield Contender("A", "fastkl", "token_scores(outputs=(), inplace_backward=True)", of_logits(token_scores, in_place))
    yield Contender("A", "PyTorch", "log_softmax, gather", log_softmax)
    yield Contender("B", "fastkl", "token_scores", of_logits(token_scores, {}))
    yield Contender("B", "PyTorch", "log_softmax; gather, entropy", of_logits(reference.token_scores, {}))
    yield Contender("C", "fastkl", "linear_token_scores", of_heads(linear_token_scores, False))
    yield Contender("C", "PyTorch", "head, log_softmax", of_heads(reference.linear_token_scores, False))
    kl_only = partial(linear_token_scores, outputs=("kl",))
    yield Contender("D", "fastkl", 'linear_token_scores(outputs=("kl",))', of_heads(kl_only, True))
    yield Contender("D", "fastkl", 'linear_token_loss(outputs=("kl",))', fused)
    yield Contender("D", "PyTorch", "both heads, log_softmax", of_heads(reference.linear_token_scores, True))


def of_two_functions(logprobs: Callable, entropy: Callable | None) -> Callable:
    """A job on logits by one function or two."""

    def call(p: Problem, leaves: list[Tensor]) -> list[Tensor]:
        others = () if entropy is None else (entropy(leaves[0]),)
        return p.with_gradients(leaves, logprobs(leaves[0], p.targets), *others)

    return call


def trl() -> Iterator[Contender]:
    """TRL's functions; on a CPU their Triton kernels are replaced by PyTorch, by TRL itself."""
    utils = importlib.import_module("trl.trainer.utils")
    head = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    divergence = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *outputs: str) -> tuple[Tensor, Tensor | None]:
        return head.apply(hidden, weight, None, targets, 1.0, 32768, None, 1.0, outputs)[:2]

    def policy(p: Problem, leaves: list[Tensor]) -> list[Tensor]:
        return p.with_gradients(leaves, *logprobs(*leaves, p.targets, "entropy"))

    def both(p: Problem, leaves: list[Tensor]) -> list[Tensor]:
        logp, _ = logprobs(*leaves, p.targets)
        kl, _ = divergence.apply(*leaves, None, p.ref_hidden, p.ref_weight, None, 1.0)
        with torch.no_grad():
            ref, _ = logprobs(p.ref_hidden, p.ref_weight, p.targets)
        return p.with_gradients(leaves, logp, ref, kl)

    one, two = utils.selective_log_softmax, utils.entropy_from_logits
    yield Contender("A", "TRL", "selective_log_softmax", of_two_functions(one, None))
    yield Contender("B", "TRL", "selective_log_softmax, entropy_from_logits", of_two_functions(one, two))
    yield Contender("C", "TRL", "ChunkedLogProbFunction", policy)
    yield Contender("D", "TRL", "ChunkedLogProbFunction twice, ChunkedDivergenceFunction", both)


def verl() -> Iterator[Contender]:
    """verl's PyTorch functions; its Triton head needs a GPU."""
    functions = function_module("verl.utils.torch_functional")
    fused = function_module("verl.utils.experimental.torch_functional").FusedLinearForPPO()

    def head(p: Problem, leaves: list[Tensor]) -> list[Tensor]:
        return p.with_gradients(leaves, *fused(*leaves, p.targets))

    one, two = functions.logprobs_from_logits, functions.entropy_from_logits
    yield Contender("A", "verl", "logprobs_from_logits", of_two_functions(one, None))
    yield Contender("B", "verl", "logprobs_from_logits, entropy_from_logits", of_two_functions(one, two))
    yield Contender("C", "verl", "FusedLinearForPPO", head)


def openrlhf() -> Iterator[Contender]:
    """OpenRLHF's functions, compute_entropy without torch.compile."""
    functions = function_module("openrlhf.models.utils", ("deepspeed",))
    one, two = functions.log_probs_from_logits, functions.compute_entropy._torchdynamo_orig_callable
    yield Contender("A", "OpenRLHF", "log_probs_from_logits", of_two_functions(one, None))
    yield Contender("B", "OpenRLHF", "log_probs_from_logits, compute_entropy", of_two_functions(one, two))


def liger() -> Iterator[Contender]:
    """Liger's scaled cross entropy, which falls back to PyTorch on a CPU."""
    function = importlib.import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction

    def head(p: Problem, leaves: list[Tensor]) -> list[Tensor]:
        nll, entropy = function.apply(*leaves, p.targets, 1.0, -100, 1, True)
        return p.with_gradients(leaves, -nll, entropy)

    yield Contender("C", "Liger", "LigerFusedLinearScaledCrossEntropyFunction", head)


def contenders() -> tuple[list[Contender], dict[str, str]]:
    """Everything that can be had here, job by job; and what cannot, with the reason."""
    found, left_out = list(ours_and_plain()), {"prime-rl": "not on PyPI"}
    for project in (trl, verl, openrlhf, liger):
        try:
            found += project()
        except ImportError as error:
            left_out[project.__name__] = str(error)
    return sorted(found, key=lambda c: c.job), left_out
