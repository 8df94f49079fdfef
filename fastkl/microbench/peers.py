"""Other projects' operators in the jobs of bench_jobs.py, called as their documentation says; each is optional.

What a peer does not return it is not asked for: a row named "logp only" does less than the job, and is checked for what
it returns. Checked import paths and signatures: TRL 1.16, Liger 0.8.5, cut-cross-entropy 25.1.1, QuACK 0.6.5,
flash-attn 2.8. Their kernels need a GPU; TRL's chunked operators run anywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor

from fastkl.kernels import reference
from fastkl.microbench.jobs import CHECK_ROWS, Problem, Row

FIRST = slice(0, CHECK_ROWS)


GRPO_TOKENS = 64
"""Length of a sequence in job G."""


@dataclass(frozen=True)
class Peer:
    """A project, the module to import, what to install, and whether it runs without a GPU."""

    name: str
    module: str
    package: str
    needs_gpu: bool = True

    def why_not(self, device: str) -> str | None:
        """The reason why it has no rows here, if it has none."""
        if self.needs_gpu and device != "cuda":
            return "needs a GPU"
        try:
            import_module(self.module)
        except Exception as error:  # some fail in their own ways on machines they do not know
            return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''} ({self.package})"
        return None


TRL = Peer("TRL", "trl.kernels.chunked_divergence", "pip install trl==1.16.*", needs_gpu=False)


TRL_LOGITS = Peer("TRL's kernel for logits", "trl.kernels.logprob_entropy", "pip install trl==1.16.*")


LIGER = Peer("Liger", "liger_kernel.ops", "pip install liger-kernel==0.8.*")


LIGER_GRPO = Peer("Liger's GRPO loss", "liger_kernel.chunked_loss", "pip install liger-kernel==0.8.*")


CCE = Peer("cut-cross-entropy", "cut_cross_entropy", "pip install cut-cross-entropy")


QUACK = Peer("QuACK", "quack.cross_entropy", "pip install quack-kernels")


FLASH = Peer("flash-attn", "flash_attn.ops.triton.cross_entropy", "pip install flash-attn")


PEERS = (TRL, TRL_LOGITS, LIGER, LIGER_GRPO, CCE, QUACK, FLASH)


def missing_peers(device: str) -> list[str]:
    """One line for each peer without rows, with the reason."""
    reasons = {peer.name: peer.why_not(device) for peer in PEERS}
    return [f"{name}: {reason}" for name, reason in reasons.items() if reason is not None]


def peer_rows(p: Problem) -> Iterator[Row]:
    """The rows of every peer that can be had here. Softcaps are left to our own rows: few peers have them."""
    device = p.hidden.device.type
    if p.shape.softcap is not None:
        return
    for peer, rows in (
        (TRL, _trl), (TRL_LOGITS, _trl_logits), (LIGER, _liger), (LIGER_GRPO, _liger_grpo), (CCE, _cce),
        (QUACK, _quack), (FLASH, _flash),
    ):  # fmt: skip
        if peer.why_not(device) is None:
            yield from rows(p)


def exact(p: Problem, *names: str, grad: bool = True, shared: bool = False) -> list[Tensor]:
    """The named scores of the first rows in float64, and the hidden gradient of a * logp + c * (the last of them)."""
    hidden, weight, ref_hidden, ref_weight, targets = (x.detach() for x in p.heads(FIRST))
    leaf = hidden.double().requires_grad_()
    ref_weight = weight if shared else ref_weight
    out = reference.linear_token_scores(leaf, weight.double(), ref_hidden.double(), ref_weight.double(), targets)
    scores = [getattr(out, name) for name in names]
    loss = (p.a[FIRST] * scores[0]).sum()
    if len(scores) > 1:
        loss = loss + (p.c[FIRST] * scores[-1]).sum()
    return [*(x.detach() for x in scores), *(torch.autograd.grad(loss, leaf) if grad else ())]


def _trl(p: Problem) -> Iterator[Row]:
    """The chunked operators, composed for the same outputs."""
    logprob = import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    divergence = import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction

    def logprobs(hidden: Tensor, weight: Tensor, outputs: tuple[str, ...]) -> tuple[Tensor, Tensor | None]:
        return logprob.apply(hidden, weight, None, p.targets, 1.0, 32768, None, 1.0, outputs)[:2]

    def policy_step() -> list[Tensor]:
        logp, entropy = logprobs(p.hidden, p.weight, ("entropy",))
        return p.gradients((p.a * logp).sum() + (p.c * entropy).sum(), logp, entropy)

    def pair(grad: bool, shared: bool = False) -> list[Tensor]:
        weight, ref_weight = (p.weight.detach(),) * 2 if shared else (p.weight, p.ref_weight)
        with torch.set_grad_enabled(grad):
            logp, _ = logprobs(p.hidden, weight, ())
            kl, _ = divergence.apply(p.hidden, weight, None, p.ref_hidden, ref_weight, None, 1.0)
        with torch.no_grad():
            logprobs(p.ref_hidden, ref_weight, ())
        if not grad:
            return [logp, kl]
        return p.gradients((p.a * logp).sum() + (p.c * kl).sum(), logp, kl, frozen=shared)

    def grpo() -> list[Tensor]:
        logp, _ = logprobs(p.hidden, p.weight, ())
        with torch.no_grad():
            ref_logp, _ = logprobs(p.ref_hidden, p.ref_weight, ())
        gap = ref_logp - logp
        return p.gradients((-p.a * logp + p.c * (gap.exp() - 1 - gap)).sum(), logp)

    names = ("policy_logprobs", "kl")
    yield Row("D", "TRL operators", p.shape, lambda: pair(False), lambda: exact(p, *names, grad=False), 2, 0)
    yield Row("E", "TRL operators", p.shape, policy_step, lambda: exact(p, "policy_logprobs", "entropy"), 4, 0)
    yield Row("F", "TRL operators", p.shape, lambda: pair(True), lambda: exact(p, *names), 4, 0)
    yield Row("G", "TRL operators", p.shape, grpo, lambda: _exact_k3(p, p.a, p.c), 4, 0)
    yield Row("H", "TRL operators", p.shape, lambda: pair(True, True), lambda: exact(p, *names, shared=True), 3, 0)


def _exact_k3(p: Problem, a: Tensor, c: Tensor, with_logp: bool = True) -> list[Tensor]:
    """Log-probs of the first rows and the hidden gradient of -a logp + c k3, in float64."""
    hidden, *others = (x.detach().double() if x.is_floating_point() else x for x in p.heads(FIRST))
    leaf = hidden.requires_grad_()
    out = reference.linear_token_scores(leaf, *others)
    gap = out.ref_logprobs - out.policy_logprobs
    loss = (-a[FIRST] * out.policy_logprobs + c[FIRST] * (gap.exp() - 1 - gap)).sum()
    return [*([out.policy_logprobs.detach()] if with_logp else []), torch.autograd.grad(loss, leaf)[0]]


def _liger(p: Problem) -> Iterator[Row]:
    """Fused linear scaled cross entropy (per-token, with entropy), and the kernel for given logits."""
    fused = import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
    select = import_module("liger_kernel.ops.grpo_loss").fused_selective_log_softmax

    def score() -> list[Tensor]:
        with torch.no_grad():
            nll, entropy = fused.apply(p.hidden, p.weight, p.targets, 1.0, -100, 1, True)
        return [-nll, entropy]

    def step() -> list[Tensor]:
        nll, entropy = fused.apply(p.hidden, p.weight, p.targets, 1.0, -100, 1, True)
        return p.gradients((p.c * entropy).sum() - (p.a * nll).sum(), -nll, entropy)

    names = ("policy_logprobs", "entropy")
    yield Row("D", "Liger scaled CE, policy only", p.shape, score, lambda: exact(p, *names, grad=False), 1, 0)
    yield Row("E", "Liger scaled CE", p.shape, step, lambda: exact(p, *names), 4, 0)
    z = torch.cat([p.logits()[0], p.weight.new_zeros(1, p.shape.vocab)])[None]  # it leaves the last position out
    yield _row_a(p, "Liger, logp only", lambda: [select(z, p.targets[None], 1.0)[0]], "policy_logprobs")


def _liger_grpo(p: Problem) -> Iterator[Row]:
    """k3 in the loss, sequences of GRPO_TOKENS with one advantage each; several chunk sizes, since it matters."""
    loss_class = import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    num_sequences = p.shape.rows // GRPO_TOKENS
    if num_sequences * GRPO_TOKENS != p.shape.rows:
        return
    advantages, beta = p.a[::GRPO_TOKENS].contiguous(), 0.1

    def sequences(x: Tensor) -> Tensor:
        return x.view(num_sequences, GRPO_TOKENS, *x.shape[1:])

    mask = torch.ones(num_sequences, GRPO_TOKENS, device=p.hidden.device)
    spread = advantages.repeat_interleave(GRPO_TOKENS)
    for chunk_size in (1, 16, 64):
        loss = loss_class(beta=beta, compiled=True, chunk_size=chunk_size, loss_type="bnpo")

        def step(loss: Callable = loss) -> list[Tensor]:
            value = loss(
                sequences(p.hidden), p.weight, sequences(p.targets), mask, advantages,
                ref_input=sequences(p.ref_hidden), ref_weight=p.ref_weight,
            )[0]  # fmt: skip
            return p.gradients(value * p.shape.rows)

        yield Row(
            "G", f"Liger GRPO, chunk_size {chunk_size}", p.shape, step,
            lambda: _exact_k3(p, spread, torch.full_like(spread, beta), with_logp=False), 4, 0,
        )  # fmt: skip


def _cce(p: Problem) -> Iterator[Row]:
    """Exact (no gradient filter) and as shipped; log-probs only."""
    cross_entropy = import_module("cut_cross_entropy").linear_cross_entropy

    def score() -> list[Tensor]:
        with torch.no_grad():
            return [-cross_entropy(p.hidden, p.weight, p.targets, reduction="none")]

    def step(filter_eps: str | None) -> list[Tensor]:
        nll = cross_entropy(p.hidden, p.weight, p.targets, reduction="none", filter_eps=filter_eps)
        return p.gradients(-(p.a * nll).sum(), -nll)

    def expected(grad: bool = True) -> list[Tensor]:
        return exact(p, "policy_logprobs", grad=grad)

    yield Row("D", "cce, policy logp only", p.shape, score, lambda: expected(False), 1, 0)
    for label, eps in (("exact", None), ("filtered", "auto")):
        yield Row("E", f"cce {label}, logp only", p.shape, lambda e=eps: step(e), expected, 4, 0)


def _row_a(p: Problem, name: str, call: Callable[[], list[Tensor]], *scores: str) -> Row:
    """A row of job A, which is compared with the float64 scores of the very logits that it is given."""

    def expected() -> list[Tensor]:
        out = reference.token_scores(p.logits()[0][FIRST].double(), None, p.targets[FIRST])
        return [getattr(out, score) for score in scores]

    return Row("A", name, p.shape, call, expected, 0, 1)


def _trl_logits(p: Problem) -> Iterator[Row]:
    """Log-prob and entropy of given logits."""
    kernel = import_module("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy
    z, _ = p.logits()
    yield _row_a(p, "TRL kernel", lambda: [*kernel(z, p.targets)], "policy_logprobs", "entropy")


def _quack(p: Problem) -> Iterator[Row]:
    """Cross entropy of given logits."""
    forward = import_module("quack.cross_entropy").cross_entropy_fwd
    z, _ = p.logits()
    yield _row_a(p, "QuACK, logp only", lambda: [-forward(z, p.targets)], "policy_logprobs")


def _flash(p: Problem) -> Iterator[Row]:
    """Cross entropy of given logits; with its gradient written over them."""
    cross_entropy = import_module("flash_attn.ops.triton.cross_entropy").cross_entropy_loss
    z, _ = p.logits()

    def step() -> list[Tensor]:
        leaf = z.clone().requires_grad_()
        nll, _ = cross_entropy(leaf, p.targets, inplace_backward=True)
        return [-nll.detach(), torch.autograd.grad(-(p.a * nll).sum(), leaf)[0]]

    def expected() -> list[Tensor]:
        leaf = z[FIRST].double().requires_grad_()
        logp = reference.token_scores(leaf, None, p.targets[FIRST]).policy_logprobs
        return [logp.detach(), torch.autograd.grad((p.a[FIRST] * logp).sum(), leaf)[0]]

    yield _row_a(p, "flash-attn, logp only", lambda: [-cross_entropy(z, p.targets)[0]], "policy_logprobs")
    yield Row("C", "flash-attn in place, logp only", p.shape, step, expected, 0, 5)
