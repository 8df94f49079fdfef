"""Other projects' operators in the jobs of jobs.py, called as their documentation says; each is optional.

What a peer does not return it is not asked for: a row named "logp only" does less than the job, and is checked for what
it returns. Checked import paths and signatures: TRL 1.16, Liger 0.8.5, cut-cross-entropy 25.1.1, QuACK 0.6.5,
flash-attn 2.8. Their kernels need a GPU; TRL's chunked operators run anywhere, and Liger's cross entropy falls back to
PyTorch on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from fastkl.kernels.operators import TokenScores
from fastkl.microbench.jobs import Problem, Row, Scorer, make_row

GRPO_TOKENS = 64
"""Length of a sequence in job G."""

TRL_TILE = (4096, 32768)
"""Rows and ids that TRL's operators take at a time."""

LESS = "returns log-probs alone, so it does less than the job"
ROUNDS = "rounds the logits to bfloat16, which cannot resolve a small KL"


def trl_scores(kl: bool = True, tile: tuple[int, int] = TRL_TILE) -> Scorer:
    """TRL's chunked operators, composed: log-probs of both models and the KL; of the policy alone, with its entropy."""
    modules: Iterator[Any] = (import_module(f"trl.kernels.chunked_{name}") for name in ("logprob", "divergence"))
    logprob, divergence = modules

    def logprobs(hidden: Tensor, weight: Tensor, targets: Tensor, *outputs: str) -> tuple[Tensor, Tensor | None]:
        return logprob.ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, tile[1], None, 1.0, outputs)[:2]

    def scores(
        hidden: Tensor, weight: Tensor, ref_hidden: Tensor | None, ref_weight: Tensor | None, targets: Tensor
    ) -> TokenScores:
        logprob.TOKEN_CHUNK_SIZE, divergence.TOKEN_CHUNK_SIZE, divergence.VOCAB_CHUNK_SIZE = tile[0], *tile
        if ref_hidden is None:
            logp, entropy = logprobs(hidden, weight, targets, "entropy")
            return TokenScores(logp, entropy=entropy)
        logp, _ = logprobs(hidden, weight, targets)
        with torch.no_grad():
            ref_logp, _ = logprobs(ref_hidden, ref_weight, targets)
        if not kl:
            return TokenScores(logp, ref_logp)
        apply = divergence.ChunkedDivergenceFunction.apply
        exact_kl, entropy = apply(hidden, weight, None, ref_hidden, ref_weight, None, 1.0)
        return TokenScores(logp, ref_logp, entropy, exact_kl)

    return scores


def _trl(p: Problem) -> Iterator[Row]:
    doubt = "" if p.shape.dtype == torch.float32 else ROUNDS
    for letter in "DEFGH":
        yield make_row(p, letter, "TRL operators", trl_scores(kl=letter != "G"), doubt=doubt)


def _trl_distillation(p: Problem) -> Iterator[Row]:
    """The divergence of TRL's DistillationTrainer, as the trainer calls it."""
    divergence: Any = import_module("trl.kernels.chunked_divergence")

    def scores(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, _: Tensor) -> TokenScores:
        divergence.TOKEN_CHUNK_SIZE, divergence.VOCAB_CHUNK_SIZE = TRL_TILE
        apply = divergence.ChunkedDivergenceFunction.apply
        kl, _ = apply(hidden, weight, None, ref_hidden, ref_weight, None, 1.0)
        return TokenScores(None, kl=kl)

    doubt = "" if p.shape.dtype == torch.float32 else ROUNDS
    yield make_row(p, "J", "TRL chunked divergence", scores, doubt=doubt)


def liger_scores() -> Scorer:
    """Liger's fused linear scaled cross entropy: log-probs and entropy of the policy."""
    function = import_module("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction

    def scores(hidden: Tensor, weight: Tensor, _: Tensor | None, __: Tensor | None, targets: Tensor) -> TokenScores:
        nll, entropy = function.apply(hidden, weight, targets, 1.0, -100, 1, True)
        return TokenScores(-nll, entropy=entropy)

    return scores


def _liger(p: Problem) -> Iterator[Row]:
    """The fused operator, and the kernel for given logits."""
    select = import_module("liger_kernel.ops.grpo_loss").fused_selective_log_softmax
    yield make_row(
        p, "D", "Liger scaled CE, policy only", liger_scores(), gives=("policy_logprobs",), head_products=1,
        doubt="scores one of the two models",
    )  # fmt: skip
    yield make_row(p, "E", "Liger scaled CE", liger_scores())
    z = torch.cat([p.logits[0], p.weight.new_zeros(1, p.shape.vocab)])[None]  # it leaves the last position out
    yield _of_logits(p, "Liger, logp only", lambda *_: select(z, p.targets[None], 1.0)[0])


def _liger_distillation(p: Problem) -> Iterator[Row]:
    """The fused linear JSD at beta 1, the reverse KL; it returns the mean over rows."""
    function = import_module("liger_kernel.ops.fused_linear_jsd").LigerFusedLinearJSDFunction

    def scorer(hidden: Tensor, weight: Tensor, ref_hidden: Tensor, ref_weight: Tensor, _: Tensor) -> Any:
        value = function.apply(hidden, weight, ref_hidden, ref_weight, None, 1.0)
        return value * p.shape.rows, TokenScores(None)

    doubt = "returns the loss alone" + ("" if p.shape.dtype == torch.float32 else f"; {ROUNDS}")
    yield make_row(p, "J", "Liger fused linear JSD", scorer, gives=(), doubt=doubt)


def _liger_grpo(p: Problem) -> Iterator[Row]:
    """k3 in the loss, sequences of GRPO_TOKENS with one advantage each; several chunk sizes, since it matters."""
    loss_class = import_module("liger_kernel.chunked_loss").LigerFusedLinearGRPOLoss
    num_sequences, beta = p.shape.rows // GRPO_TOKENS, 0.1
    if num_sequences * GRPO_TOKENS != p.shape.rows:
        return
    advantages, mask = p.a[::GRPO_TOKENS].contiguous(), torch.ones(num_sequences, GRPO_TOKENS, device=p.device)
    same = copy(p)
    same.a, same.c = advantages.repeat_interleave(GRPO_TOKENS), torch.full_like(p.c, beta)
    for chunk_size in (1, 16, 64):
        loss = loss_class(beta=beta, compiled=True, chunk_size=chunk_size, loss_type="bnpo")

        def scorer(*inputs: Tensor, loss: Callable[..., Any] = loss) -> tuple[Tensor, TokenScores]:
            hidden, weight, ref_hidden, ref_weight, targets = inputs
            hidden, ref_hidden, targets = (
                x.view(num_sequences, GRPO_TOKENS, *x.shape[1:]) for x in (hidden, ref_hidden, targets)
            )
            value = loss(hidden, weight, targets, mask, advantages, ref_input=ref_hidden, ref_weight=ref_weight)[0]
            return value * p.shape.rows, TokenScores(None)

        name = f"Liger GRPO, chunk_size {chunk_size}"
        yield make_row(same, "G", name, scorer, gives=(), doubt="returns the loss alone")


def _cce(p: Problem) -> Iterator[Row]:
    """Exact (no gradient filter) and as shipped; log-probs only."""
    cross_entropy = import_module("cut_cross_entropy").linear_cross_entropy

    def scorer(filter_eps: str | None) -> Scorer:
        def scores(hidden: Tensor, weight: Tensor, _: object, __: object, targets: Tensor) -> TokenScores:
            return TokenScores(-cross_entropy(hidden, weight, targets, reduction="none", filter_eps=filter_eps))

        return scores

    one = ("policy_logprobs",)
    yield make_row(
        p, "D", "cce, policy logp only", scorer("auto"), gives=one, head_products=1,
        doubt=f"scores one of the two models; {LESS}",
    )  # fmt: skip
    yield make_row(p, "E", "cce exact, logp only", scorer(None), gives=one, doubt=LESS)
    yield make_row(p, "E", "cce filtered, logp only", scorer("auto"), gives=one, doubt=f"{LESS}; drops small gradients")


def _of_logits(p: Problem, name: str, logprobs: Callable[[Tensor, Tensor], Tensor]) -> Row:
    """A row of job A whose function returns log-probs alone."""
    one = ("policy_logprobs",)
    return make_row(p, "A", name, lambda z, _, targets: TokenScores(logprobs(z, targets)), gives=one, doubt=LESS)


def _trl_logits(p: Problem) -> Iterator[Row]:
    """Log-prob and entropy of given logits."""
    kernel = import_module("trl.kernels.logprob_entropy").selective_log_softmax_and_entropy

    def scores(z: Tensor, _: Tensor | None, targets: Tensor) -> TokenScores:
        logp, entropy = kernel(z, targets)
        return TokenScores(logp, entropy=entropy)

    yield make_row(p, "A", "TRL kernel", scores)


def _quack(p: Problem) -> Iterator[Row]:
    """Cross entropy of given logits."""
    forward = import_module("quack.cross_entropy").cross_entropy_fwd
    yield _of_logits(p, "QuACK, logp only", lambda z, targets: -forward(z, targets))


def _flash(p: Problem) -> Iterator[Row]:
    """Cross entropy of given logits; with its gradient written over them."""
    function = import_module("flash_attn.ops.triton.cross_entropy").cross_entropy_loss
    yield _of_logits(p, "flash-attn, logp only", lambda z, targets: -function(z, targets)[0])
    yield make_row(
        p, "C", "flash-attn in place, logp only",
        lambda z, _, targets: TokenScores(-function(z, targets, inplace_backward=True)[0]),
        gives=("policy_logprobs",), logit_passes=5, doubt=LESS,
    )  # fmt: skip


@dataclass(frozen=True)
class Peer:
    """A project, the module to import, what to install, its rows, and whether they need a GPU."""

    name: str
    module: str
    package: str
    rows: Callable[[Problem], Iterator[Row]]
    needs_gpu: bool = True
    distils: Callable[[Problem], Iterator[Row]] | None = None  # its rows for a teacher of another width

    def missing(self, device: str) -> str | None:
        """The reason why it has no rows here, if it has none."""
        if self.needs_gpu and device != "cuda":
            return "needs a GPU"
        try:
            import_module(self.module)
        except Exception as error:  # some fail in their own ways on machines they do not know
            return f"{type(error).__name__}: {str(error).splitlines()[0][:80] if str(error) else ''} ({self.package})"
        return None


PEERS = (
    Peer(
        "TRL",
        "trl.kernels.chunked_divergence",
        "pip install trl==1.16.*",
        _trl,
        needs_gpu=False,
        distils=_trl_distillation,
    ),
    Peer("TRL's kernel for logits", "trl.kernels.logprob_entropy", "pip install trl==1.16.*", _trl_logits),
    Peer("Liger", "liger_kernel.ops", "pip install liger-kernel==0.8.*", _liger, distils=_liger_distillation),
    Peer("Liger's GRPO loss", "liger_kernel.chunked_loss", "pip install liger-kernel==0.8.*", _liger_grpo),
    Peer("cut-cross-entropy", "cut_cross_entropy", "pip install cut-cross-entropy", _cce),
    Peer("QuACK", "quack.cross_entropy", "pip install quack-kernels", _quack),
    Peer("flash-attn", "flash_attn.ops.triton.cross_entropy", "pip install flash-attn", _flash),
)


def missing_peers(device: str) -> list[str]:
    """One line for each peer without rows, with the reason."""
    return [f"{peer.name}: {reason}" for peer in PEERS if (reason := peer.missing(device)) is not None]


def peer_rows(p: Problem) -> Iterator[Row]:
    """The rows of every peer that can be had here. Softcaps are left to our own rows: few peers have them."""
    if p.shape.softcap is None:
        for peer in PEERS:
            rows = peer.distils if p.shape.ref_hidden else peer.rows
            if rows is not None and peer.missing(p.device) is None:
                yield from rows(p)
