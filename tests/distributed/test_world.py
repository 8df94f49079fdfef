"""What the stages make of several processes, with threads in their place."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from threaded_world import in_threads
from toy import toy_batch, toy_config, toy_model
from toy_step import toy_objective

from fastkl.distributed.gradients import add_up_gradients
from fastkl.distributed.start import processes
from fastkl.distributed.world import ALONE, World
from fastkl.errors import UserError
from fastkl.evaluation.evaluate import Evaluator, exact_kl
from fastkl.evaluation.text_loss import text_loss
from fastkl.rewards.call import compute_rewards
from fastkl.rewards.load import RewardFunction
from fastkl.rollout.agreement import StaleEngineError
from fastkl.rollout.dealt import Columns, Engines, generate
from fastkl.rollout.requests import requests_of
from fastkl.sampling.params import Sampling
from fastkl.scoring import backbone
from fastkl.scoring.pack import dealt_groups, pack, split_groups
from fastkl.scoring.scored_model import ScoredModel
from fastkl.training.loop import update
from fastkl.training.setup import limits_of
from fastkl.training.stopwatch import Stopwatch
from fastkl.types import Completion, Prompt

CPU = torch.device("cpu")
SIZES = st.integers(1, 9)


@given(st.lists(st.integers()), SIZES)
def test_shares_and_deals_hold_every_item_once_and_come_back_in_order(items, size):
    worlds = [World(rank, size) for rank in range(size)]
    assert [item for world in worlds for item in world.share(items)] == items
    lengths = [len(world.share(items)) for world in worlds]
    assert max(lengths) - min(lengths) <= 1


@given(st.lists(st.integers()), st.integers(1, 4), st.integers(1, 4))
def test_neighbours_get_the_same_items_and_hand_on_each_result_once_in_order(items, num_engines, shared_by):
    of = [Engines(World(rank, num_engines * shared_by), shared_by) for rank in range(num_engines * shared_by)]
    for rank, engines in enumerate(of):
        assert engines.dealt(items) == of[rank // shared_by * shared_by].dealt(items)
    assert sorted(x for e in of[::shared_by] for x in e.dealt(items)) == sorted(items)
    parts = [engines.own(engines.dealt(items)) for engines in of]
    assert sum(map(len, parts)) == len(items) and of[0].collected(parts) == items


@given(st.lists(st.integers()), st.booleans())
def test_a_process_alone_gets_back_what_it_gives(items, flag):
    assert ALONE.is_first and ALONE.remaining() is ALONE
    assert ALONE.share(items) == ALONE.gathered(items) == items
    assert ALONE.everybodys(items) == [items] and ALONE.any(flag) is flag
    assert ALONE.once(lambda: items) is items
    tensor = torch.ones(3)
    ALONE.add_up([tensor])
    assert tensor.tolist() == [1, 1, 1]
    with pytest.raises(KeyError), ALONE.together(), ALONE.undisturbed():
        raise KeyError


@given(st.lists(st.integers(1, 500), max_size=40), SIZES)
def test_every_group_goes_to_one_process_and_none_has_much_more_to_do(tokens, size):
    shares = dealt_groups(tokens, size)
    assert len(shares) == size and sorted(g for share in shares for g in share) == list(range(len(tokens)))
    assert all(share == sorted(share) for share in shares)
    loads = [sum(tokens[g] for g in share) for share in shares]
    assert max(loads) - min(loads) <= max(tokens, default=0)  # the longest first: at most one group apart
    if size == 1:
        assert shares == [list(range(len(tokens)))]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_the_micro_batches_of_all_processes_are_the_groups_of_one(size):
    batch = toy_batch(toy_model())
    packed = [pack(batch, [0, 1, 2], 40, CPU, world=World(rank, size)) for rank in range(size)]
    members = [g for part in packed for run, _ in part for g in run]
    assert sorted(members) == [0, 1, 2]
    if size == 1:
        tokens = [
            sum(p.lengths) for _, p in pack(batch, [0], 1, CPU) + pack(batch, [1], 1, CPU) + pack(batch, [2], 1, CPU)
        ]
        assert [run for run, _ in packed[0]] == split_groups(tokens, 40)


def updated(world: World, config, batch, models):
    """The policy's gradients as the optimizer gets them, and the outcome."""

    class Recorder(torch.optim.SGD):
        def step(self, closure=None):
            self.gradients = [p.grad.clone() for p in self.param_groups[0]["params"]]

    policy, reference = (copy.deepcopy(model) for model in models)
    recorder = Recorder(policy.parameters(), lr=1.0)
    scored = ScoredModel(policy), ScoredModel(reference)
    outcome = update(
        *scored,
        recorder,
        batch,
        toy_objective(config),
        limits_of(config, scored[0]),
        Stopwatch(CPU),
        step=1,
        world=world,
    )
    return recorder.gradients, outcome


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_grad_norm": 0.1},
        {"kl_placement": "loss", "kl_estimator": "exact_full"},
        {"kl_direction": "jsd"},
        {"advantage": "reinforce_pp"},
    ],
)
def test_several_processes_make_the_update_of_one(options):
    """In float64: sums instead of means, one normaliser; of 3 groups two processes have unequal shares, and of four
    processes one has none."""
    backbone.register_packed_attention()
    models, config = (toy_model(0), toy_model(1)), toy_config(micro_batch_tokens=30, **options)
    batch = toy_batch(models[0])
    gradients, outcome = updated(ALONE, config, batch, models)
    several = [run for size in (2, 4) for run in in_threads(size, lambda world: updated(world, config, batch, models))]
    for found, theirs in several:
        assert theirs.grad_norm == pytest.approx(outcome.grad_norm, rel=1e-12)
        assert theirs.total.loss == pytest.approx(outcome.total.loss, rel=1e-12)
        torch.testing.assert_close(theirs.total.sums, outcome.total.sums, rtol=1e-12, atol=0, equal_nan=True)
        for mine, one in zip(found, gradients, strict=True):
            torch.testing.assert_close(mine, one, rtol=1e-10, atol=1e-14)


def test_a_parameter_without_a_gradient_anywhere_keeps_none_and_one_with_a_gradient_elsewhere_gets_it():
    def summed(world):
        a, b, c = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
        a.grad = torch.full((2,), float(world.rank + 1))
        b.grad = torch.ones(2) if world.rank == 1 else None
        add_up_gradients([a, b, c], world)
        return a.grad.tolist(), b.grad.tolist(), c.grad

    assert in_threads(2, summed) == [([3.0, 3.0], [1.0, 1.0], None)] * 2


def words(prompts, completions, log_metric, log_extra, trainer_state, **columns):
    log_metric("calls", len(completions))
    log_extra("length", [len(text) for text in completions])
    return [None if "x" in text else float(len(text)) for text in completions]


def ranks(completions, **columns):
    """Sees all completions: the place of each among them."""
    return [float(sorted(completions).index(text)) for text in completions]


ranks.whole_step = True


@pytest.mark.parametrize("size", [2, 3, 5])
def test_rewards_on_shares_are_those_of_one_call(size):
    rewards = (RewardFunction("words", words), RewardFunction("ranks", ranks, 0.5))
    prompts = [Prompt((1,), f"p{b}", f"p{b}", b) for b in range(4)]
    texts = [["aa", "b"], ["x", "cccc"], ["dd", "e"], ["f", "gggg"]]
    completions = [[Completion((1,), (0.0,), "stop", text) for text in group] for group in texts]
    one = compute_rewards(rewards, prompts, completions, step=1)
    for found in in_threads(size, lambda world: compute_rewards(rewards, prompts, completions, step=1, world=world)):
        assert torch.equal(found.total, one.total) and torch.equal(found.valid, one.valid)
        assert found.notes.values == one.notes.values and found.notes.columns == one.notes.columns
        assert found.notes.seconds.keys() == one.notes.seconds.keys()
        assert sum(found.logged["calls"]) == 8 and len(found.logged["calls"]) == min(size, 4)


def test_columns_that_a_function_logs_in_some_shares_only_have_gaps_elsewhere():
    def sometimes(completions, log_extra, **columns):
        if completions[0] == "a":
            log_extra("first", list(completions))
        return [0.0] * len(completions)

    prompts = [Prompt((1,), "p", "p", b) for b in range(2)]
    completions = [[Completion((1,), (0.0,), "stop", text)] * 2 for text in "ab"]
    rewards = (RewardFunction("sometimes", sometimes),)
    found = in_threads(2, lambda world: compute_rewards(rewards, prompts, completions, step=1, world=world))
    assert found[0].notes.columns == {"first": ["a", "a", None, None]}


class Echo:
    """A generator whose completion is its request's place and seed."""

    sampling = Sampling(1.0, 4)

    def __init__(self, asked, shared_by=1):
        self.asked, self.shared_by = asked, shared_by

    def generate(self, requests):
        self.asked += requests
        return [Completion((r.prompt_index, r.sample_index), (-0.5, -1 / 3), "stop", str(r.seed)) for r in requests]


@pytest.mark.parametrize("size", [2, 3, 7])
def test_every_request_is_drawn_once_with_its_own_seed_and_all_processes_get_all(size):
    prompts = [Prompt((1,), "p", "p", b) for b in range(3)]
    requests, asked = requests_of(prompts, 2, seed=3, step=5), []
    one = Echo([]).generate(requests)
    assert in_threads(size, lambda world: generate(Echo(asked), requests, world)) == [one] * size
    assert len(asked) == 6 and {r.seed for r in asked} == {r.seed for r in requests}
    assert len({c.text for c in one}) == 6  # no two samples share a seed


@pytest.mark.parametrize(("size", "shared_by"), [(2, 2), (4, 2), (6, 3), (4, 4)])
def test_processes_that_share_an_engine_get_its_requests_and_all_processes_get_all(size, shared_by):
    prompts = [Prompt((1,), "p", "p", b) for b in range(3)]
    requests, asked = requests_of(prompts, 2, seed=3, step=5), []
    one = Echo([]).generate(requests)
    assert in_threads(size, lambda world: generate(Echo(asked, shared_by), requests, world)) == [one] * size
    assert sorted(r.seed for r in asked) == sorted(r.seed for r in requests for _ in range(shared_by))


REQUESTS = requests_of([Prompt((1,), "p", "p", b) for b in range(4)], 2, seed=3, step=5)
IN_ANOTHER_ORDER = [*REQUESTS[4:], *REQUESTS[:4]]
OTHER_SEEDS = requests_of([Prompt((1,), "p", "p", b) for b in range(4)], 2, seed=4, step=5)
OTHER_PROMPT = requests_of([Prompt((2,), "p", "p", b) for b in range(4)], 2, seed=3, step=5)


def refusals(generators, requests) -> list[str]:
    """What each of four processes says, of which two share an engine; empty where it draws."""

    def said(world):
        try:
            generate(generators[world.rank], requests[world.rank], world)
        except StaleEngineError as complaint:
            return str(complaint)
        return ""

    return in_threads(4, said)


@pytest.mark.parametrize("others", [IN_ANOTHER_ORDER, OTHER_SEEDS, OTHER_PROMPT, REQUESTS[:4]])
def test_other_requests_in_a_process_of_an_engine_are_refused_by_all_before_any_is_drawn(others):
    asked = []
    said = refusals([Echo(asked, 2)] * 4, [REQUESTS, REQUESTS, REQUESTS, others])
    assert len(set(said)) == 1 and said[0].startswith(
        "processes 2 to 3, which share an engine, were to draw different completions; nothing was trained"
    )
    assert asked == []


def test_other_sampling_in_a_process_of_an_engine_is_refused_by_all():
    cold = Echo([], 2)
    cold.sampling = Sampling(0.5, 4)
    assert refusals([Echo([], 2), cold, Echo([], 2), Echo([], 2)], [REQUESTS] * 4)[3].startswith("processes 0 to 1, ")


def test_completions_that_processes_of_an_engine_have_drawn_differently_are_refused_by_all():
    class Other(Echo):
        def generate(self, requests):
            return [replace(c, token_ids=(7, *c.token_ids[1:])) for c in super().generate(requests)]

    said = refusals([Echo([], 2), Echo([], 2), Other([], 2), Echo([], 2)], [REQUESTS] * 4)
    assert len(set(said)) == 1 and "processes 2 to 3, which share an engine, drew different completions;" in said[0]


def test_completions_come_out_of_their_columns_as_they_went_in():
    drawn = [Completion((1, 2**31 - 1), (-1e-7, -3.25), "length", "ä \0"), Completion((), (), "stop", "")]
    assert Columns.of(drawn).completions() == drawn and Columns.of([]).completions() == []


@pytest.mark.parametrize("size", [2, 4])
def test_evaluations_on_shares_measure_what_one_process_does(size):
    backbone.register_packed_attention()
    models = toy_model(0), toy_model(1)
    batch = toy_batch(models[0])
    sampling = Sampling(temperature=1.0, max_new_tokens=6, stop_token_ids=(22,))
    evaluator = Evaluator(batch.prompts, (), 4, sampling, sampling, 0.5, 0)
    windows = [(1, 2, 3, 4), (5, 6), (7, 8, 9)]

    def measured(world):
        policy, reference = (ScoredModel(copy.deepcopy(model)) for model in models)
        return (
            exact_kl(evaluator, batch.completions, policy, reference, 30, world),
            text_loss(policy, windows, 5, world),
        )

    kl, loss = measured(ALONE)
    for found, theirs in in_threads(size, measured):
        torch.testing.assert_close(found, kl, rtol=1e-6, atol=0)
        assert theirs == pytest.approx(loss, rel=1e-12)


def test_the_environment_says_which_process_this_is(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    assert processes() is ALONE
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("RANK", "0")
    assert processes() is ALONE  # torchrun --nproc-per-node 1
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UserError, match="WORLD_SIZE: 'many' is no number; start the processes with torchrun"):
        processes()
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(UserError, match="WORLD_SIZE: 16 processes, but MASTER_ADDR, MASTER_PORT is not set; start"):
        processes()
    here = {"RANK": "11", "LOCAL_RANK": "3", "LOCAL_WORLD_SIZE": "8", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    for name, value in here.items():
        monkeypatch.setenv(name, value)
    assert processes() == World(11, 16, 3, one_machine=False, local_size=8)
