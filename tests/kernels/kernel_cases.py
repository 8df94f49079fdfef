"""Inputs for the kernel tests, and the rule that tolerances come from: at most twice (gradients: three times) the error
that the plain PyTorch line makes in the same dtype, both measured against float64."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fastkl.kernels.types import Support, TokenScores

POLICY_SCORES = ("policy_logprobs", "entropy", "kl", "policy_logprobs_support", "kl_support")


@dataclass(frozen=True)
class Case:
    """One call of linear_token_scores, in float64; `to` gives the same in another dtype."""

    policy_hidden: Tensor
    policy_weight: Tensor
    ref_hidden: Tensor | None
    ref_weight: Tensor | None
    target_ids: Tensor
    options: dict = field(default_factory=dict)
    upstream_seed: int = 0

    def to(self, dtype: torch.dtype) -> Case:
        def cast(x):
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        heads = {
            name: cast(getattr(self, name)) for name in ("policy_hidden", "policy_weight", "ref_hidden", "ref_weight")
        }
        return replace(self, **heads, options={k: cast(v) for k, v in self.options.items()})

    def args(self) -> tuple:
        return self.policy_hidden, self.policy_weight, self.ref_hidden, self.ref_weight, self.target_ids


def make_case(
    num_rows: int = 9,
    hidden: int = 8,
    vocab: int = 37,
    seed: int = 0,
    scale: float = 3.0,
    shift: float = 0.0,
    reference: bool = True,
    bias: bool = False,
    mask: str = "none",
    per_row_temperature: bool = False,
    support: Support | None = None,
    hot: bool = False,
    **options,
) -> Case:
    """Random heads; logits of standard deviation about `scale`. hot: targets are the argmax. mask: none, some, all"""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):  # values that bfloat16 holds exactly, so that every dtype sees the same problem
        return torch.randn(*shape, generator=g, dtype=torch.float64).bfloat16().double()

    weight = (randn(vocab, hidden) * scale / hidden**0.5).bfloat16().double()
    ref_weight = (weight + 0.1 * randn(vocab, hidden)).bfloat16().double() if reference else None
    hidden_states = randn(num_rows, hidden)
    ref_states = (hidden_states + 0.1 * randn(num_rows, hidden)).bfloat16().double() if reference else None
    targets = torch.randint(0, vocab, (num_rows,), generator=g)
    targets[: num_rows // 4] = vocab - 1  # the last id must be scored too
    if hot:
        targets = (hidden_states @ weight.t()).argmax(1)
    if bias:
        options["policy_bias"] = (randn(vocab) + shift).bfloat16().double()
        options["ref_bias"] = (randn(vocab) + shift).bfloat16().double() if reference else None
    if mask != "none":
        options["mask"] = torch.rand(num_rows, generator=g) > 0.4 if mask == "some" else torch.zeros(num_rows).bool()
    if per_row_temperature:
        options["temperature"] = (torch.rand(num_rows, generator=g, dtype=torch.float64) + 0.5).bfloat16().double()
    if support is not None:
        options["support"] = support
    return Case(hidden_states, weight, ref_states, ref_weight, targets, options, seed)


def run(function, case: Case, scores: tuple[str, ...] = POLICY_SCORES) -> tuple[TokenScores, dict[str, Tensor]]:
    """Scores, and the gradients of sum(random factor * score) over the scores named and present."""
    leaves = {"hidden": case.policy_hidden, "weight": case.policy_weight, "bias": case.options.get("policy_bias")}
    leaves = {k: v.detach().clone().requires_grad_() for k, v in leaves.items() if v is not None}
    options = dict(case.options)
    if "bias" in leaves:
        options["policy_bias"] = leaves["bias"]
    out = function(leaves["hidden"], leaves["weight"], *case.args()[2:], **options)
    g = torch.Generator().manual_seed(case.upstream_seed + 1)
    loss = out.policy_logprobs.new_zeros((), dtype=torch.float64)
    for name in POLICY_SCORES:
        factor = torch.randn(len(case.target_ids), generator=g, dtype=torch.float64)
        if name in scores and getattr(out, name) is not None:
            loss = loss + (factor * getattr(out, name).double()).sum()
    loss.backward()
    return out, {k: v.grad for k, v in leaves.items()}


def error(x: Tensor, truth: Tensor) -> float:
    """Largest absolute difference; of gradients and scores alike."""
    assert x.shape == truth.shape
    assert x.isfinite().all()
    return float((x.detach().double() - truth.detach()).abs().max()) if x.numel() else 0.0


def scale_of(x: Tensor) -> float:
    return float(x.detach().abs().max()) if x.numel() else 0.0


def assert_as_good_as_the_line(scores, grads, line, line_grads, truth, true_grads, unit: float = 2.0**-23) -> None:
    """error <= 2x (gradients 3x) the line's error + eps, where eps is a few units in the last place of the values."""
    for name in TokenScores.__slots__:
        exact = getattr(truth, name)
        got = getattr(scores, name)
        assert (got is None) == (exact is None), name
        if exact is not None:
            bound = 2 * error(getattr(line, name), exact) + 8 * unit * (1 + scale_of(exact))
            assert error(got.detach(), exact) <= bound, (name, error(got.detach(), exact), bound)
    for name, exact in true_grads.items():
        bound = 3 * error(line_grads[name], exact) + 8 * unit * (1e-3 + scale_of(exact))
        assert error(grads[name], exact) <= bound, (name, error(grads[name], exact), bound)
