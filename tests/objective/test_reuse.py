"""Several updates per rollout: every row of the table in objective/reuse.py, by brute force over a toy's completions.

pi_0 is the world's policy, which draws; pi is another table of logits, which is updated on what pi_0 has drawn.
"""

from __future__ import annotations

import itertools
from dataclasses import fields, replace

import pytest
import torch
from cases import slow
from group_case import LONGEST, G, K, group_case
from test_advantages import trl_loss
from test_objective import ALLOWED, BETA, DIRECTED, World, exact_gradient, make_world, picked, scores_of, values_of

from fastkl.config.settings import TrainConfig, check_config
from fastkl.errors import UserError
from fastkl.kernels.types import TokenScores
from fastkl.objective.advantages import ADVANTAGES
from fastkl.objective.kl_estimators import Penalty, sampled_logprobs
from fastkl.objective.reuse import Reuse
from fastkl.objective.rloo import BatchObjective, Objective, penalize
from fastkl.types import PackedBatch

ONCE = Reuse()
FREE = Penalty(0.0)
CLIPPING = Reuse(updates=2, clip=(0.2, 0.2))


def two_policies(name: str, drift: float = 0.4, seed: int = 0) -> tuple[World, World]:
    """pi_0, and pi with logits that differ by `drift`; rewards and completions are those of pi_0."""
    first = make_world(name, seed)
    noise = torch.randn(first.table.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    table = (first.table.detach() + drift * noise).requires_grad_()
    return first, replace(first, table=table, kept={})


def constants(scores: TokenScores) -> TokenScores:
    return TokenScores(*(None if x is None else x.detach() for x in values_of(scores)))


def update_gradient(
    first: World, now: World, penalty: Penalty, *, importance="none", reuse=ONCE, cap=1e9, fixed=False
) -> torch.Tensor:
    """E over all pairs (K = 2) that pi_0 draws of the gradient that an update of pi applies, by the code under test.

    fixed: advantages and KL are those of pi_0.
    """
    scores, owners = scores_of(now, penalty.outputs)
    old = constants(scores_of(first, penalty.outputs)[0])
    chance = first.logprobs().exp().detach()
    pairs = list(itertools.product(range(len(owners)), repeat=2))
    samples = [i for pair in pairs for i in pair]
    rows = torch.cat([owners[i] for i in samples])
    cu = torch.tensor([0, *(len(owners[i]) for i in samples)]).cumsum(0).int()
    rewards = first.reward[samples].view(-1, 2)
    valid = torch.ones_like(rewards, dtype=torch.bool)
    objective = Objective(penalty, ADVANTAGES["rloo"], first.sampling, importance, cap, reuse=reuse)
    old_logprobs = sampled_logprobs(old)[rows]
    advantages = None
    if fixed:
        penalized = penalize(picked(old, rows), rewards, cu, penalty)
        advantages = ADVANTAGES["rloo"].function(penalized.rewards, valid).flatten().repeat_interleave(cu.diff())
    none = torch.empty(0, dtype=torch.int64)
    batch = PackedBatch(
        *(none, none, cu, none, none, cu, none, old_logprobs, rewards, valid, ()),
        advantages=advantages, old_logprobs=old_logprobs if reuse.clip else None,
    )  # fmt: skip
    mine = picked(scores, rows)
    factors = BatchObjective(objective, batch, 2.0)(slice(0, len(rows)), constants(mine))
    weights = chance[torch.tensor(pairs)].prod(1).repeat_interleave(2).repeat_interleave(cu.diff())
    named = [f.name for f in fields(factors) if getattr(factors, f.name) is not None]
    loss = sum((weights * getattr(factors, name) * getattr(mine, name)).sum() for name in named)
    return -torch.autograd.grad(loss, now.table)[0]


@pytest.mark.parametrize(
    "sampling", ["whole", *(pytest.param(x, marks=pytest.mark.slow) for x in ("temperature", "min_tokens", "banned"))]
)
@pytest.mark.parametrize(("estimator", "placement"), ALLOWED)
def test_with_sequence_weights_every_pair_has_the_gradient_of_the_objective_at_the_policy_now(
    estimator, placement, sampling
):
    first, now = two_policies(sampling)
    got = update_gradient(first, now, Penalty(BETA, estimator, placement), importance="sequence")
    torch.testing.assert_close(got, exact_gradient(now, estimator, placement), rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampling", ["whole", "banned"])
@pytest.mark.parametrize(("estimator", "direction"), DIRECTED)
def test_with_sequence_weights_every_direction_has_the_gradient_at_the_policy_now(estimator, direction, sampling):
    first, now = two_policies(sampling)
    penalty = Penalty(BETA, estimator, "loss", direction=direction)
    got = update_gradient(first, now, penalty, importance="sequence")
    expected = exact_gradient(now, estimator, "loss", direction=direction)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("how", "sampling", "options"), [
    ("uncorrected", "whole", {}),
    ("token weights", "whole", {"importance": "token"}),
    ("the KL of the policy before", "whole", {"importance": "sequence", "fixed": True}),
    ("cut weights", "whole", {"importance": "sequence", "cap": 1.05}),
])  # fmt: skip
def test_what_is_refused_or_cut_is_biased(how, sampling, options):
    first, now = two_policies(sampling)
    got = update_gradient(first, now, Penalty(BETA, "k1", "reward"), **options)
    assert (got - exact_gradient(now, "k1", "reward")).abs().max() > 5e-3, how


@pytest.mark.parametrize(
    ("sampling", "unbiased"), [("whole", True), ("banned", True), ("top_k", False), ("top_p", False)]
)
def test_weights_have_the_mean_one_only_where_the_same_ids_can_be_drawn(sampling, unbiased):
    """What the policy now draws and pi_0 could not is missing from every mean that weights can give."""
    first, now = two_policies(sampling, drift=1.5, seed=5)
    old, new = (sampled_logprobs(constants(scores_of(world)[0])) for world in (first, now))
    _, owners = scores_of(first)
    chance = first.logprobs().exp().detach()
    mean = sum(p * (new[rows] - old[rows]).sum().exp() for p, rows in zip(chance, owners, strict=True))
    assert (abs(float(mean) - 1) < 1e-9) == unbiased and (abs(float(mean) - 1) > 1e-2) != unbiased


@pytest.mark.slow
def test_a_second_epoch_is_biased_since_the_policy_was_fitted_to_the_same_completions():
    """For every pair of pi_0: a step by its gradient, then the weighted gradient of the same pair at the new policy.

    The control: fitted to an independent pair, the mean difference to the exact gradient is zero.
    """
    world = make_world("whole")
    used = torch.zeros(len(world.completions), *world.table.shape, dtype=torch.float64)
    for completion, rows in zip(world.completions, used, strict=True):
        for t, y in enumerate(completion):
            rows[world.row_of[completion[:t]], y] = 1.0
    start, reward = world.table.detach(), world.reward

    def logprobs(table: torch.Tensor) -> torch.Tensor:
        """Of all completions; nothing is cut, at temperature 1."""
        return used.flatten(1) @ table.log_softmax(1).flatten()

    def mean_gradient(table: torch.Tensor) -> torch.Tensor:
        table = table.requires_grad_()
        return torch.autograd.grad((logprobs(table).exp() * reward).sum(), table)[0]

    def pair_gradient(table: torch.Tensor, i: int, j: int) -> torch.Tensor:
        """RLOO's gradient at the table of one pair that pi_0 drew, with sequence weights, by hand."""
        table = table.requires_grad_()
        now = logprobs(table)
        weights = (now.detach() - old).exp()
        total = (reward[i] - reward[j]) * (weights[i] * now[i] - weights[j] * now[j]) / 2
        return torch.autograd.grad(total, table)[0]

    old = logprobs(start)
    torch.testing.assert_close(old[5], world.logprob(world.completions[5]).detach())
    draws = torch.multinomial(old.exp(), 4 * 600, replacement=True, generator=torch.Generator().manual_seed(0))
    differences = {"same": [], "other": []}
    for a, b, c, d in draws.view(-1, 4).tolist():
        now = (start + 2.0 * pair_gradient(start.clone(), a, b)).detach()
        exact = mean_gradient(now)
        differences["same"].append(pair_gradient(now, a, b) - exact)
        differences["other"].append(pair_gradient(now, c, d) - exact)
    along = mean_gradient(start.clone())  # one number of each: entries that few completions reach have no normal error
    z = {}
    for name, found in differences.items():
        numbers = (torch.stack(found) * along).flatten(1).sum(1)
        z[name] = float(numbers.mean() / numbers.std() * len(numbers) ** 0.5)
    assert abs(z["same"]) > 5 and abs(z["other"]) < 4, z


@pytest.mark.parametrize(
    "reuse", [CLIPPING, *slow(replace(CLIPPING, level="sequence"), replace(CLIPPING, old="engine"))]
)
@pytest.mark.parametrize(("estimator", "placement"), ALLOWED)
def test_where_the_policy_has_not_moved_the_clipped_surrogate_has_the_exact_gradient(estimator, placement, reuse):
    first, now = two_policies("all", drift=0.0)
    got = update_gradient(first, now, Penalty(BETA, estimator, placement), reuse=reuse, fixed=True)
    torch.testing.assert_close(got, exact_gradient(now, estimator, placement), rtol=0, atol=1e-9)


@pytest.mark.parametrize(("estimator", "direction"), [
    *((name, "reverse") for name in ("k2", "k3", "exact", "exact_full")), *DIRECTED,
])  # fmt: skip
def test_with_clip_a_kl_in_the_loss_has_its_gradient_at_every_text_that_the_first_policy_wrote(estimator, direction):
    """The penalty alone: the rewards are zero. The texts' chances are pi_0's, and the KL at each of them is pi's."""
    first, now = two_policies("whole")
    first.reward.zero_()
    penalty = Penalty(BETA, estimator, "loss", direction=direction)
    got = update_gradient(first, now, penalty, reuse=CLIPPING, fixed=True)
    total = torch.zeros((), dtype=torch.float64)
    for c in first.completions:
        kl = sum(now.kl(c[:t], direction="forward" if estimator == "k3" else direction) for t in range(len(c)))
        total = total - BETA * first.logprob(c).exp().detach() * kl
    torch.testing.assert_close(got, torch.autograd.grad(total, now.table)[0], rtol=0, atol=1e-9)


def surrogate(case, level: str, logprobs: torch.Tensor, advantages: torch.Tensor, low: float, high: float):
    """PPO's and GSPO's per-token objective as their papers write it, [S, LONGEST]."""
    log_ratio = (logprobs - case.old_logprobs) * case.mask
    if level == "sequence":
        log_ratio = (log_ratio.sum(1, keepdim=True) / case.lengths[:, None]).expand_as(log_ratio)
    ratio, a = log_ratio.exp(), advantages[:, None]
    return torch.minimum(ratio * a, ratio.clamp(1 - low, 1 + high) * a) * case.mask


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_factors_under_clip_are_the_derivative_of_the_papers_surrogate(level):
    case = group_case(drift=0.5)
    advantages = case.rewards.flatten()
    logprobs = case.logprobs.clone().requires_grad_()
    loss = -surrogate(case, level, logprobs, advantages, 0.2, 0.3).sum() / (G * K)
    (expected,) = torch.autograd.grad(loss, logprobs)
    objective = clip_objective(level, (0.2, 0.3))
    ours = case.factors(objective, float(G * K), advantages=advantages, old=True)["policy_logprobs"]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-9)
    assert (expected[case.mask] == 0).any() and (expected[case.mask] != 0).any()


def clip_objective(level: str, clip: tuple[float, float], loss_level: str = "sum", penalty=FREE) -> Objective:
    sampling = make_world("whole").sampling
    reuse = Reuse(updates=2, clip=clip, level=level)
    return Objective(penalty, ADVANTAGES["none"], sampling, loss_level=loss_level, reuse=reuse)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_factors_under_clip_are_the_gradient_of_trls_loss(level):
    pytest.importorskip("trl_without_vllm")
    case = group_case(drift=0.5)
    advantages = case.rewards.flatten()
    logprobs = case.logprobs.clone().requires_grad_()
    loss = trl_loss(
        case, logprobs, case.entropy, "grpo", advantages, 0.0,
        epsilon_low=0.2, epsilon_high=0.3, importance_sampling_level=level,
    )  # fmt: skip
    (expected,) = torch.autograd.grad(loss, logprobs)
    ours = case.factors(clip_objective(level, (0.2, 0.3), "mean"), float(G * K), advantages=advantages, old=True)
    torch.testing.assert_close(ours["policy_logprobs"], expected, rtol=0, atol=1e-7)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_factors_under_clip_are_the_gradient_of_verls_loss(level):
    algos = pytest.importorskip("verl.trainer.ppo.core_algos")
    case = group_case(drift=0.5)
    advantages, mask = case.rewards.flatten()[:, None].expand(-1, LONGEST), case.mask.double()
    logprobs = case.logprobs.clone().requires_grad_()
    policy_loss = algos.compute_policy_loss_vanilla if level == "token" else algos.compute_policy_loss_gspo
    config = algos.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio_low=0.2, clip_ratio_high=0.3,
        clip_ratio_c=1e9,
    )  # fmt: skip
    loss, _ = policy_loss(case.old_logprobs, logprobs, advantages, mask, "seq-mean-token-mean", config)
    (expected,) = torch.autograd.grad(loss, logprobs)
    objective = clip_objective(level, (0.2, 0.3), "mean")
    ours = case.factors(objective, float(G * K), advantages=case.rewards.flatten(), old=True)["policy_logprobs"]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("options", "words"), [
    ({"updates_per_rollout": 2}, "updates_per_rollout: after the first of 2 updates the policy is not the one"),
    ({"updates_per_rollout": 2, "importance": "token"}, "updates_per_rollout: after the .* importance token"),
    ({"epochs": 2, "importance": "sequence"}, "epochs: 2 trains again on completions that the policy was fitted to"),
    ({"updates_per_rollout": 2, "importance": "sequence", "top_k": 5}, "top_k: keeps other ids after an update"),
    ({"updates_per_rollout": 2, "importance": "sequence", "min_p": 0.1}, "min_p: keeps other ids after an update"),
    ({"updates_per_rollout": 2, "importance": "sequence", "advantage": "reinforce_pp"}, "kl_placement: an adv"),
    ({"updates_per_rollout": 9, "clip": (0.2, 0.2)}, "updates_per_rollout: 9 minibatches of whole groups need"),
    ({"clip": (0.2, 0.2)}, "clip: with one update per rollout"),
    ({"updates_per_rollout": 2, "clip": (0.2,)}, "clip: 0.2 is no range"),
    ({"updates_per_rollout": 2, "clip": (1.5, 0.2)}, "clip: 1.5 0.2 is no range"),
    ({"old_logprobs": "engine"}, "old_logprobs: engine is what --clip compares with"),
    ({"updates_per_rollout": 2, "clip": (0.2, 0.2), "old_logprobs": "engine", "importance": "token"}, "importance: t"),
], ids=str)  # fmt: skip
def test_what_is_biased_is_refused_by_name(options, words):
    with pytest.raises(UserError, match=words):
        check_config(TrainConfig(**options))


@pytest.mark.parametrize("options", [
    {"updates_per_rollout": 4, "importance": "sequence"},
    {"updates_per_rollout": 4, "importance": "sequence", "min_tokens": 3},
    {"updates_per_rollout": 4, "epochs": 3, "clip": (0.2, 0.28), "top_k": 5},
    {"epochs": 2, "clip": (0.2, 0.2), "importance": "token", "advantage": "reinforce_pp"},
], ids=str)  # fmt: skip
def test_what_the_table_allows_is_allowed(options):
    check_config(TrainConfig(**options))
