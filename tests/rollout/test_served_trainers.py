"""Several trainer processes with servers: the first one alone speaks with them, and a run is the run of one process."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from several_processes import Processes, run_in
from test_servers import PROMPTS, SAMPLING, VOCAB, ToyTokenizer, models_and_expected
from test_servers import fakes as fakes  # a fixture
from test_transfer import Networked, differing
from threaded_world import Agreeing, in_threads

from fastkl.config.settings import TrainConfig
from fastkl.distributed.world import World
from fastkl.errors import UserError
from fastkl.rollout import weight_sync
from fastkl.rollout.agreement import StaleEngineError
from fastkl.rollout.ahead import Ahead, Rollout
from fastkl.rollout.dealt import generate
from fastkl.rollout.server import ServerGenerator
from fastkl.sampling.params import Sampling
from fastkl.scoring import models
from fastkl.storyteller import model_path

CPU = torch.device("cpu")


def asking(folder: Path, world: World, *servers, weights: str = "folder") -> ServerGenerator:
    return ServerGenerator(
        [fake.url for fake in servers], ToyTokenizer(), SAMPLING, vocab=VOCAB, dtype="float32", max_model_len=32,
        folder=folder, weights=weights, note=lambda message: None, world=world,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("ahead", [False, True])
def test_the_first_of_several_processes_asks_and_pushes_and_all_have_the_completions_of_one(tmp_path, fakes, ahead):
    base, policy, requests, expected = models_and_expected()
    one, two = fakes(base), fakes(base)

    def run(world: World):
        with world.together():
            generator = asking(tmp_path, world, one, two)
            generator.sync(policy, 5)
            if not ahead:
                return generate(generator, requests, world)
            drawing = Ahead(generator, 4, world, beside=True, device=CPU)
            drawing.begin(Rollout(6, 5, PROMPTS, {}), requests)
            rollout = drawing.take(6)
            drawing.close()
            return [completion for group in rollout.completions for completion in group]

    for found in in_threads(3, run, Agreeing):
        assert [c.token_ids for c in found] == [c.token_ids for c in expected]
        assert [c.text for c in found] == [c.text for c in expected]
    assert len(one.loads) == len(two.loads) == 1, "one process pushes"
    assert sorted([*one.asked, *two.asked]) == sorted(r.seed for r in requests), "each is asked for once"
    assert len(list(tmp_path.iterdir())) == 1


def said_by(size: int, function) -> list[str]:
    """The error of each process."""

    def run(world: World) -> str:
        try:
            with world.together():
                function(world)
        except (UserError, StaleEngineError) as failure:
            return str(failure)
        return ""

    return in_threads(size, run, Agreeing)


@pytest.mark.slow
def test_what_fails_between_the_first_process_and_a_server_is_raised_in_all(tmp_path, fakes):
    """A server that does not fit, a push that does not arrive, a request that is refused."""
    base, policy, requests, _ = models_and_expected()
    cases = (
        ({"vocab": 99}, lambda world, *servers: asking(tmp_path, world, *servers), "has vocab 99, and this run needs"),
        ({"error": "a is lost"}, lambda world, *servers: asking(tmp_path, world, *servers).sync(policy), "a is lost"),
        ({"status": 400}, lambda world, *servers: drawn(world, *servers), "refuses a request with status 400"),
    )

    def drawn(world, *servers):
        generator = asking(tmp_path, world, *servers)
        generator.sync(policy)
        generate(generator, requests, world)

    for about, function, words in cases:
        server = fakes(base, **about)
        said = said_by(3, lambda world, function=function, server=server: function(world, server))
        assert len(set(said)) == 1 and words in said[0]


def test_a_push_that_fails_in_the_middle_leaves_no_process_gathering(monkeypatch):
    """Weights in pieces: every tensor is a collective call, which all have to come to."""
    gathered = []

    def pieces(world):
        for number in range(4):
            yield str(number), torch.tensor(world.everybodys(number))
            gathered.append(number)

    def push(weights):
        next(iter(weights))
        raise UserError("the disk is full")

    monkeypatch.setattr(weight_sync, "is_sharded", lambda tensor: True)
    monkeypatch.setattr(weight_sync, "checkpoint_weights", lambda world: pieces(world.world))

    class Policy:
        def __init__(self, world):
            self.world = world

        def parameters(self):
            return [1]

    assert said_by(3, lambda world: weight_sync.by_first(Policy(world), world, push)) == ["the disk is full"] * 3
    assert sorted(gathered) == sorted([*range(4)] * 3)


@pytest.mark.slow
def test_pieces_of_several_processes_reach_every_worker_of_every_server_over_the_network(tmp_path, monkeypatch):
    """Each process has half of each tensor; the first of the servers has two workers, and one bit is lost on the way to
    the second of them, after all is well."""
    base, policy, requests, expected = models_and_expected()
    halves = [{n: t.flatten().chunk(2)[rank] for n, t in policy.state_dict().items()} for rank in (0, 1)]

    def gathered(world):
        for name, tensor in policy.named_parameters():
            parts = world.everybodys(halves[world.rank][name])
            yield name, torch.cat(parts).view(tensor.shape)

    class Held:
        """A policy, as one process of two has it."""

        def __init__(self, world):
            self.world, self.config, self.parameters = world, policy.config, policy.parameters

    monkeypatch.setattr(weight_sync, "is_sharded", lambda tensor: True)
    monkeypatch.setattr(weight_sync, "checkpoint_weights", lambda held: gathered(held.world))
    wide, other = Networked(base, workers=2), Networked(base)
    taken = [receiver.take for receiver in wide.receivers]
    came: list[dict] = []

    def run(world: World):
        generator = asking(tmp_path, world, wide, other, weights="network")
        generator.sync(Held(world), 3)
        drawn = generate(generator, requests, world)
        if world.is_first:
            wide.receivers[1].take = flipped
        world.everybodys(None)
        try:
            with world.together():
                generator.sync(Held(world), 4)
        except StaleEngineError as failure:
            return drawn, str(failure)
        finally:
            generator.close()

    def kept(number):
        came.append(taken[number]())
        return came[-1]

    def flipped():
        tensors = dict(taken[1]())
        tensors["model.norm.weight"].view(torch.int32)[3] ^= 1
        return tensors

    wide.receivers[0].take, wide.receivers[1].take = (lambda: kept(0)), (lambda: kept(1))
    try:
        found = in_threads(2, run, Agreeing)
    finally:
        wide.stop(), other.stop()
    names = dict(policy.named_parameters())
    assert len(came) >= 2 and all(torch.equal(tensors[name], names[name]) for tensors in came for name in names)
    assert not differing(other.model, policy)
    for drawn, said in found:
        assert [c.token_ids for c in drawn] == [c.token_ids for c in expected]
        assert f"{wide.url}: step 4: other weights came over the network than were sent: model.norm.weight; no" in said


# ---------------------------------------------------------------------------------------------------------- whole runs


def trained(config: TrainConfig) -> int:
    from fastkl.training.loop import train

    return train(config).saved_step


def killed(completions, trainer_state, **columns):
    """The process that speaks with the servers is killed in step 2, while they draw step 3."""
    if trainer_state.global_step == 2 and os.environ["RANK"] == "0" and not os.environ.get("TEST_GOES_ON"):
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(text)) for text in completions]


def gone_on(config: TrainConfig) -> int:
    os.environ["TEST_GOES_ON"] = "1"
    return trained(config)


def lines(folder: Path, name: str) -> list[dict]:
    """The run's lines, without what may differ between equal runs."""
    rows = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
    own = ("time/", "throughput/", "memory/")
    return [{key: value for key, value in row.items() if not key.startswith(own)} for row in rows]


def assert_alike(one: Path, other: Path) -> None:
    """The same samples, and the same metrics to rounding."""
    drawn = [[(s["step"], s["row"], s["completion"]) for s in lines(folder, "samples")] for folder in (one, other)]
    assert drawn[0] == drawn[1]
    for mine, yours in zip(lines(one, "metrics"), lines(other, "metrics"), strict=True):
        assert yours == pytest.approx(mine, rel=1e-3, abs=1e-4, nan_ok=True), mine["step"]


@pytest.mark.slow
@pytest.mark.parametrize("is_resumed", [False, pytest.param(True, marks=pytest.mark.long)])
def test_two_processes_with_servers_train_as_one_and_go_on_as_two_bit_for_bit_and_as_one(tmp_path, fakes, is_resumed):
    """With rollouts ahead, and weights in pieces. A server dies in the first run, and is there again in the second; in
    the third a trainer is killed."""
    model = models.load_model(str(model_path()), CPU).requires_grad_(False)
    tokenizer = models.load_tokenizer(str(model_path()))
    settings = {
        "steps": 3, "prompts_per_step": 2, "num_samples": 3, "max_new_tokens": 5, "report_to": (), "dtype": "float32",
        "rollout_ahead": 1, "importance": "sequence", "lr": 1e-3, "save_every": 1, "keep_checkpoints": 0,
        "reward": (f"{__file__}:killed",),
    }  # fmt: skip
    sampling = Sampling.of(TrainConfig(**settings), models.stop_token_ids(model.config, str(model_path()), tokenizer))
    about = {"vocab": model.config.vocab_size, "max_model_len": 128}
    one, dying = (fakes(model, sampling, tokenizer, at, **about) for at in (None, 9))

    def run(name: str, size: int, **more) -> Path:
        config = TrainConfig(output=str(tmp_path / name), engines=(one.url, dying.url), **(settings | more))
        assert run_in(size, tmp_path / "processes", gone_on, config) == [3] * size
        assert not list((tmp_path / name / "engines").iterdir())
        return tmp_path / name

    alone = run("alone", 1)
    dying.start()
    two = run("two", 2, shard="full")
    assert_alike(alone, two)
    assert [line["policy_version"] for line in lines(two, "metrics")] == [0, 0, 1]
    if not is_resumed:
        return
    output = {"output": str(tmp_path / "again"), "engines": (one.url, dying.url)}
    interrupted = TrainConfig(**output, shard="full", **settings)
    ended = Processes(2, tmp_path / "processes", trained, interrupted).ended()
    assert [process.code for process in ended] == [-signal.SIGKILL, 1]
    again = run("again", 2, resume=True, shard="full")
    for name in ("metrics", "samples"):
        assert lines(again, name) == lines(two, name)
    for name in ("model", "trainer"):
        path = Path("checkpoints") / "step-3" / f"{name}.safetensors"
        assert (again / path).read_bytes() == (two / path).read_bytes()
    shutil.rmtree(again / "checkpoints" / "step-3")
    shutil.rmtree(again / "checkpoints" / "step-2")
    assert_alike(alone, run("again", 1, resume=True))
