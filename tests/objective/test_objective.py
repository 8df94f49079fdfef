"""The penalty against brute force: every completion and every pair of a toy policy, in float64, to 1e-9.

The closed form is written out here without the code under test: its own softmax over its own set of allowed ids, and
autograd of the expectation over all completions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, fields

import pytest
import torch
from cases import slow

from fastkl.errors import UserError
from fastkl.kernels.operators import token_scores
from fastkl.kernels.types import OUTPUTS, TokenScores
from fastkl.objective.advantages import find_advantage
from fastkl.objective.kl_estimators import ESTIMATORS, PLACEMENTS, Penalty, check_penalty, off_support_kl
from fastkl.objective.rloo import penalize, token_advantages, token_coefficients
from fastkl.sampling.params import Sampling
from fastkl.sampling.replay import support_of

VOCAB, LENGTH, STOP, BETA = 4, 3, 3, 0.7
SAMPLINGS = {
    "whole": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 2},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.3},
    "min_tokens": {"min_tokens": 2},
    "banned": {"banned_token_ids": (1,)},
    "all": {"temperature": 1.3, "top_k": 3, "top_p": 0.95, "min_p": 0.05, "min_tokens": 1},
}


EACH_SAMPLING = [pytest.param(name, marks=[] if name in ("whole", "all") else pytest.mark.slow) for name in SAMPLINGS]
"""For the tests that have many other cases, too: two of them are quick."""


def sampling_of(name: str) -> Sampling:
    return Sampling(**({"temperature": 1.0, "max_new_tokens": LENGTH, "stop_token_ids": (STOP,)} | SAMPLINGS[name]))


def allowed(row: torch.Tensor, position: int, s: Sampling) -> torch.Tensor:
    """The ids that may be drawn, bool [V], by a loop: bans, then min_p, top_k and top_p after the temperature."""
    alive = [v for v in range(VOCAB) if v not in s.banned_token_ids and not (v == STOP and position < s.min_tokens)]
    weight = {v: float((row[v] / s.temperature).exp()) for v in alive}
    alive = [v for v in alive if weight[v] >= s.min_p * max(weight.values())]
    alive = sorted(alive, key=weight.get, reverse=True)[: s.top_k or VOCAB]
    total, kept, before = sum(weight[v] for v in alive), [], 0.0
    for v in alive:
        if s.top_p >= 1 or before < s.top_p * total:
            kept.append(v)
        before += weight[v]
    return torch.tensor([v in kept for v in range(VOCAB)])


@dataclass
class World:
    """A policy and a reference with one row of logits per text so far, and every completion the sampler can draw."""

    sampling: Sampling
    table: torch.Tensor
    ref_table: torch.Tensor
    row_of: dict[tuple[int, ...], int]
    completions: list[tuple[int, ...]]
    reward: torch.Tensor
    kept: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def logp(self, table: torch.Tensor, text: tuple[int, ...], whole: bool = False) -> torch.Tensor:
        """log-probs of the next token, [V]; of both models on the policy's allowed ids, or on all."""
        row = self.row_of[text]
        z = table[row] / self.sampling.temperature
        if text not in self.kept:
            self.kept[text] = allowed(self.table.detach()[row], len(text), self.sampling)
        keep = self.kept[text]
        return (z if whole else z.masked_fill(~keep, -torch.inf)).log_softmax(0)

    def kl(self, text: tuple[int, ...], whole: bool = False, direction: str = "reverse") -> torch.Tensor:
        """Exact divergence of the next token: KL(policy, reference), KL(reference, policy), or Jensen-Shannon."""
        a, b = self.logp(self.table, text, whole), self.logp(self.ref_table, text, whole)
        finite = a > -torch.inf
        a, b = a[finite], b[finite]
        m = ((a.exp() + b.exp()) / 2).log()
        return {
            "reverse": (a.exp() * (a - b)).sum(),
            "forward": (b.exp() * (b - a)).sum(),
            "jsd": (a.exp() * (a - m) + b.exp() * (b - m)).sum() / 2,
        }[direction]

    def logprob(self, completion: tuple[int, ...]) -> torch.Tensor:
        return sum(self.logp(self.table, completion[:t])[y] for t, y in enumerate(completion))

    def logprobs(self) -> torch.Tensor:
        """Of all completions, each text's row computed once."""
        rows = {text: self.logp(self.table, text) for text in self.row_of}
        return torch.stack([sum(rows[c[:t]][y] for t, y in enumerate(c)) for c in self.completions])


def make_world(name: str, seed: int = 0) -> World:
    g = torch.Generator().manual_seed(seed)
    texts = [t for n in range(LENGTH) for t in itertools.product(range(VOCAB), repeat=n) if STOP not in t]
    table = (1.2 * torch.randn(len(texts), VOCAB, dtype=torch.float64, generator=g)).requires_grad_()
    ref_table = torch.randn(len(texts), VOCAB, dtype=torch.float64, generator=g)
    world = World(sampling_of(name), table, ref_table, {t: i for i, t in enumerate(texts)}, [], torch.empty(0))

    def extend(text: tuple[int, ...]) -> None:
        if len(text) == LENGTH or STOP in text:
            world.completions.append(text)
            return
        for v in allowed(table.detach()[world.row_of[text]], len(text), world.sampling).nonzero()[:, 0].tolist():
            extend((*text, v))

    extend(())
    world.reward = torch.randn(len(world.completions), dtype=torch.float64, generator=g)
    return world


def scores_of(world: World, outputs: tuple[str, ...] = OUTPUTS) -> tuple[TokenScores, list[torch.Tensor]]:
    """The trainer's scores of every completion's tokens, and each completion's rows of them."""
    rows, targets, positions, owners = [], [], [], []
    for c in world.completions:
        owners.append(torch.arange(len(targets), len(targets) + len(c)))
        rows += [world.row_of[c[:t]] for t in range(len(c))]
        targets += c
        positions += range(len(c))
    support = support_of(world.sampling, torch.tensor(positions), VOCAB)
    scores = token_scores(
        world.table[rows], world.ref_table[rows], torch.tensor(targets), support=support,
        temperature=world.sampling.temperature, outputs=outputs,
    )  # fmt: skip
    return scores, owners


def picked(scores: TokenScores, rows: torch.Tensor) -> TokenScores:
    return TokenScores(*(None if x is None else x[rows] for x in values_of(scores)))


def values_of(scores: TokenScores) -> list[torch.Tensor | None]:
    return [getattr(scores, f.name) for f in fields(scores)]


def expected_gradient(world: World, penalty: Penalty, advantage: str) -> torch.Tensor:
    """E over all pairs (K = 2) of the gradient that the trainer would apply, by enumeration.

    One call scores every pair as a group; the weight of a group's tokens is the chance of drawing that pair.
    """
    scores, owners = scores_of(world, penalty.outputs)
    chance = world.logprobs().exp().detach()
    assert float(chance.sum()) == pytest.approx(1.0, abs=1e-12)
    pairs = list(itertools.product(range(len(owners)), repeat=2))
    samples = [i for pair in pairs for i in pair]
    rows = torch.cat([owners[i] for i in samples])
    cu = torch.tensor([0, *(len(owners[i]) for i in samples)]).cumsum(0).int()
    rewards = world.reward[samples].view(-1, 2)
    weights = chance[torch.tensor(pairs)].prod(1).repeat_interleave(2).repeat_interleave(cu.diff())
    loss = applied_loss(picked(scores, rows), rewards, cu, penalty, advantage, normalizer=2.0, weights=weights)
    return -torch.autograd.grad(loss, world.table)[0]


def applied_loss(scores: TokenScores, rewards, cu, penalty, advantage, **options) -> torch.Tensor:
    """The loss whose gradient the trainer applies: its coefficients (constants) times the scores."""
    constants = TokenScores(*(None if x is None else x.detach() for x in values_of(scores)))
    valid = torch.ones_like(rewards, dtype=torch.bool)
    penalized = penalize(constants, rewards, cu, penalty)
    of_samples = find_advantage(advantage).function(penalized.rewards, valid)
    factors = token_coefficients(
        constants, token_advantages(penalized, of_samples, cu, penalty), cu, penalty, **options
    )
    named = [f.name for f in fields(factors) if getattr(factors, f.name) is not None]
    return sum((getattr(factors, name) * getattr(scores, name)).sum() for name in named)


def exact_gradient(
    world: World, estimator: str, placement: str, reduction: str = "sum", direction: str = "reverse"
) -> torch.Tensor:
    """The gradient of E[reward] - beta * KL in the sense of the documentation, from the closed form."""
    whole, direction = ESTIMATORS[estimator].over_all, "forward" if estimator == "k3" else direction
    total = torch.zeros((), dtype=torch.float64)
    kl_after = {text: world.kl(text, whole, direction) for text in world.row_of}
    for c, r, chance in zip(world.completions, world.reward, world.logprobs().exp(), strict=True):
        kl = sum(kl_after[c[:t]] for t in range(len(c)))
        kl = kl / len(c) if reduction == "mean" else kl
        held = chance.detach() if placement == "loss" else chance  # token-level: the texts before a token are held
        total = total + chance * r - BETA * held * kl
    return torch.autograd.grad(total, world.table)[0]


REFUSED = [(name, place) for name, estimator in ESTIMATORS.items() for place in estimator.refused]
ALLOWED = [("k1", "reward"), ("k1_full", "reward"), ("exact", "reward"), ("exact_full", "reward"),
           ("k2", "loss"), ("k3", "loss"), ("exact", "loss"), ("exact_full", "loss")]  # fmt: skip


def test_every_pair_is_either_proven_here_or_refused():
    pairs = set(itertools.product(ESTIMATORS, PLACEMENTS))
    assert set(ALLOWED) | set(REFUSED) == pairs
    assert set(REFUSED) == {("k1", "loss"), ("k1_full", "loss"), ("k2", "reward"), ("k3", "reward")}


@pytest.mark.parametrize("sampling", EACH_SAMPLING)
@pytest.mark.parametrize(("estimator", "placement"), ALLOWED)
def test_expected_gradient_of_every_allowed_pair_is_that_of_the_objective(estimator, placement, sampling):
    world, penalty = make_world(sampling), Penalty(BETA, estimator, placement)
    check_penalty(penalty)
    got = expected_gradient(world, penalty, "rloo")
    torch.testing.assert_close(got, exact_gradient(world, estimator, placement), rtol=0, atol=1e-9)


DIRECTED = list(itertools.product(["exact", "exact_full"], ["forward", "jsd"]))


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("sampling", EACH_SAMPLING)
@pytest.mark.parametrize(("estimator", "direction"), DIRECTED)
def test_expected_gradient_of_another_direction_is_that_of_its_divergence(estimator, direction, sampling, reduction):
    world = make_world(sampling)
    penalty = Penalty(BETA, estimator, "loss", reduction, direction=direction)
    check_penalty(penalty)
    got = expected_gradient(world, penalty, "rloo")
    expected = exact_gradient(world, estimator, "loss", reduction, direction)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
    if sampling == "whole":
        assert float((expected - exact_gradient(world, estimator, "loss", reduction)).abs().max()) > 1e-3


@pytest.mark.parametrize("direction", ["forward", "jsd"])
@pytest.mark.parametrize(("estimator", "placement"), [
    ("k1", "reward"), ("k3", "loss"), ("exact", "reward"), ("exact_full", "reward"), ("none", "loss"),
])  # fmt: skip
def test_another_direction_is_charged_exactly_and_in_the_loss(estimator, placement, direction):
    words = f"kl_direction: {direction} .*(exactly and in the loss.*--kl-placement loss|keep the reference)"
    with pytest.raises(UserError, match=words):
        check_penalty(Penalty(BETA, estimator, placement, direction=direction))


@pytest.mark.parametrize("sampling", ["whole", "all"])
@pytest.mark.parametrize("advantage", ["rloo", "none"])
@pytest.mark.parametrize("estimator", ["k1", "k1_full", "exact", "exact_full"])
def test_crediting_only_what_a_token_caused_leaves_the_expected_gradient(estimator, advantage, sampling):
    world = make_world(sampling)
    got = expected_gradient(world, Penalty(BETA, estimator, credit="caused"), advantage)
    torch.testing.assert_close(got, exact_gradient(world, estimator, "reward"), rtol=0, atol=1e-9)


def test_crediting_only_what_a_token_caused_has_less_noise():
    """Variance of the gradient over pairs, summed over the table's entries."""
    world = make_world("whole")
    noise = {}
    for credit in ("completion", "caused"):
        scores, owners = scores_of(world)
        chance = world.logprobs().exp().detach()
        square = torch.zeros_like(world.table)
        for i, rows in enumerate(owners):
            cu = torch.tensor([0, len(rows)], dtype=torch.int32)
            penalty = Penalty(BETA, "k1", credit=credit)
            loss = applied_loss(picked(scores, rows), torch.zeros(1, 1).double(), cu, penalty, "none", normalizer=1.0)
            (gradient,) = torch.autograd.grad(loss, world.table, retain_graph=True)
            square += chance[i] * gradient**2
        noise[credit] = float(square.sum())
    assert noise["caused"] < 0.9 * noise["completion"]


def test_the_mean_over_tokens_in_the_reward_has_the_gradient_of_the_mean_kl():
    world = make_world("top_p")
    got = expected_gradient(world, Penalty(BETA, "exact", "reward", "mean"), "rloo")
    torch.testing.assert_close(got, exact_gradient(world, "exact", "reward", "mean"), rtol=0, atol=1e-9)


@pytest.mark.parametrize("sampling", ["top_k", *slow("whole", "min_tokens")])
@pytest.mark.parametrize(("estimator", "placement"), REFUSED)
def test_every_refused_pair_is_biased(estimator, placement, sampling):
    world, penalty = make_world(sampling), Penalty(BETA, estimator, placement)
    with pytest.raises(UserError, match=f"{estimator} in the {placement} is refused"):
        check_penalty(penalty)
    got = expected_gradient(world, penalty, "rloo")
    for candidate in ("exact", "k3"):  # neither direction's KL
        for place in ("reward", "loss"):
            assert (got - exact_gradient(world, candidate, place)).abs().max() > 1e-2
    if estimator == "k1":
        no_penalty = expected_gradient(world, Penalty(0.0), "rloo")
        torch.testing.assert_close(got, no_penalty, rtol=0, atol=1e-9)


def test_crediting_the_mean_to_later_tokens_only_is_biased():
    """Why kl_credit caused refuses kl_reduction mean."""
    world, penalty = make_world("whole"), Penalty(BETA, "exact", reduction="mean", credit="caused")
    with pytest.raises(UserError, match="caused is biased with kl_reduction mean"):
        check_penalty(penalty)
    got = expected_gradient(world, penalty, "rloo")
    assert (got - exact_gradient(world, "exact", "reward", "mean")).abs().max() > 1e-3


def test_a_kl_in_the_loss_has_no_credit_to_give():
    with pytest.raises(UserError, match="kl_credit"):
        check_penalty(Penalty(BETA, "exact", "loss", credit="caused"))


@pytest.mark.parametrize("sampling", ["top_k", "min_tokens"])
def test_scoring_over_the_whole_vocabulary_what_was_drawn_from_a_part_is_biased(sampling):
    """The control: the naive scorer's penalty has the mean KL(pi_S, q) + log pi(S), and another gradient."""
    world = make_world(sampling)
    scores, owners = scores_of(world)
    chance = world.logprobs().exp().detach()
    k1 = (scores.policy_logprobs - scores.ref_logprobs).detach()
    naive = sum(p * k1[rows].sum() for p, rows in zip(chance, owners, strict=True))
    k1_support = (scores.policy_logprobs_support - scores.ref_logprobs_support).detach()
    ours = sum(p * k1_support[rows].sum() for p, rows in zip(chance, owners, strict=True))
    exact = sum(
        p * sum(world.kl(c[:t]).detach() for t in range(len(c))) for p, c in zip(chance, world.completions, strict=True)
    )
    assert float(ours) == pytest.approx(float(exact), abs=1e-9)
    assert abs(float(naive) - float(exact)) > 0.05


@pytest.mark.parametrize("estimator", ["k1", "k3", "exact", "k1_full", "exact_full"])
@pytest.mark.parametrize("sampling", EACH_SAMPLING)
def test_expected_value_of_the_estimator_is_the_exact_kl_on_the_support_or_over_all_ids(estimator, sampling):
    world, whole = make_world(sampling, seed=3), ESTIMATORS[estimator].over_all
    scores, owners = scores_of(world)
    chance = world.logprobs().exp().detach()
    values = ESTIMATORS[estimator].value(scores).detach()
    mean = sum(p * values[rows].sum() for p, rows in zip(chance, owners, strict=True))
    exact = sum(
        p * sum(world.kl(c[:t], whole).detach() for t in range(len(c)))
        for p, c in zip(chance, world.completions, strict=True)
    )
    assert float(mean) == pytest.approx(float(exact), abs=1e-9)


def test_without_a_support_the_estimator_over_all_ids_is_k1_to_the_bit():
    scores, owners = scores_of(make_world("temperature"))
    cu = torch.tensor([0, *(len(rows) for rows in owners)]).cumsum(0).int()
    rewards, valid = torch.randn(1, len(owners)).double(), torch.ones(1, len(owners), dtype=torch.bool)
    found = []
    for estimator in ("k1", "k1_full"):
        penalty = Penalty(BETA, estimator)
        penalized = penalize(scores, rewards, cu, penalty)
        of_samples = find_advantage("rloo").function(penalized.rewards, valid)
        factors = token_coefficients(
            scores, token_advantages(penalized, of_samples, cu, penalty), cu, penalty, normalizer=2.0
        )
        found.append([penalized.kl, factors.policy_logprobs])
        assert factors.kl is None and factors.kl_support is None
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_kl_that_costs_nothing_may_be_infinite():
    scores = TokenScores(torch.zeros(2), torch.tensor([-torch.inf, 0.0]), kl=torch.full((2,), torch.inf))
    rewards, cu = torch.tensor([[1.0, 2.0]]), torch.tensor([0, 1, 2], dtype=torch.int32)
    assert torch.equal(penalize(scores, rewards, cu, Penalty(0.0)).rewards, rewards)
    assert penalize(scores, rewards, cu, Penalty(0.1)).rewards.tolist() == [[-torch.inf, 2.0]]


@pytest.mark.parametrize("sampling", EACH_SAMPLING)
def test_the_kl_off_the_support_is_the_rest_of_the_chain_rule(sampling):
    """By sums over the ids inside and outside: KL of pi(S) and q(S), and of the two distributions outside of S."""
    world = make_world(sampling, seed=5)
    scores, owners = scores_of(world)
    got, row = off_support_kl(scores).detach(), 0
    for c in world.completions:
        for t in range(len(c)):
            z, r = (
                m.detach()[world.row_of[c[:t]]] / world.sampling.temperature for m in (world.table, world.ref_table)
            )
            p, q = z.softmax(0), r.softmax(0)
            keep = allowed(world.table.detach()[world.row_of[c[:t]]], t, world.sampling)
            inside, ref_inside = p[keep].sum(), q[keep].sum()
            rest = (p[~keep] * (p[~keep] / q[~keep]).log()).sum() + inside * (inside / ref_inside).log()
            assert float(got[row]) == pytest.approx(float(rest), abs=1e-9)
            assert float(got[row]) >= -1e-12
            row += 1
    assert row == len(got) and len(owners) == len(world.completions)
