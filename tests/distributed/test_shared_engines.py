"""What can be said of a shared engine before one is started; and what stands in for a shared one's push."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file
from threaded_world import in_threads
from torch import nn

from fastkl.cli import main
from fastkl.config.settings import TrainConfig
from fastkl.errors import UserError
from fastkl.rollout.agreement import StaleEngineError
from fastkl.rollout.engine_worker import Engine
from fastkl.rollout.places import Part, covered
from fastkl.rollout.push_check import PushCheck
from fastkl.rollout.workers import Workers
from fastkl.training.engines import check_engine_groups, check_engine_tp
from fastkl.training.run_folder import MAY_CHANGE_ON_RESUME

# ------------------------------------------------------------------------------------------------------------ settings


class Heads:
    """Of a configuration, the numbers of heads."""

    def __init__(self, heads: int, pairs: int | None = None) -> None:
        self.num_attention_heads, self.num_key_value_heads = heads, pairs


@pytest.mark.parametrize(
    ("options", "processes", "words"),
    [
        ({"generator": "transformers"}, 2, "2 processes can share an engine of vLLM only, and the generator is transf"),
        ({}, 1, "2 processes cannot share an engine, since this run is one process; start it with --nproc 2"),
        ({}, 3, "3 processes cannot be put into groups of 2; use a divisor of 3"),
    ],
)
def test_processes_that_cannot_share_an_engine_are_refused_by_name(options, processes, words):
    with pytest.raises(UserError, match=f"^engine_tp: {words}"):
        check_engine_groups(TrainConfig(engine_tp=2, **options), processes)


@pytest.mark.parametrize(
    ("engine_tp", "generator", "config", "words"),
    [
        (2, "transformers", Heads(4), "2 processes can share an engine of vLLM only"),
        (4, "vllm", Heads(6, 6), "the model's 6 attention heads cannot be dealt to 4 processes; use a divisor of 6"),
        (12, "vllm", Heads(6, 6), "the model's 6 attention heads cannot be dealt to 12 processes"),
        (4, "vllm", Heads(24, 6), "the model's 6 heads of keys and values cannot be dealt to 4 processes"),
    ],
)
def test_an_engine_that_cannot_be_cut_is_refused_by_name(engine_tp, generator, config, words):
    with pytest.raises(UserError, match=f"^engine_tp: {words}"):
        check_engine_tp(engine_tp, generator, config)


def test_what_can_be_shared_is_not_refused():
    check_engine_groups(TrainConfig(generator="transformers"), 1)
    check_engine_groups(TrainConfig(engine_tp=2), 6)
    check_engine_groups(TrainConfig(engines=("http://127.0.0.1:8001",)), 3)
    check_engine_tp(1, "transformers", Heads(5))
    check_engine_tp(8, "vllm", Heads(32, 4))  # keys and values are held twice
    check_engine_tp(2, "vllm", Heads(6))
    assert "engine_tp" in MAY_CHANGE_ON_RESUME


@pytest.mark.slow
def test_the_command_line_says_so_before_any_process_is_started(capsys, tmp_path):
    output = ("--output", str(tmp_path / "run"))
    assert main(["train", "--nproc", "3", "--engine-tp", "2", *output]) == 2
    assert capsys.readouterr().err.startswith("fastkl: engine_tp: 3 processes cannot be put into groups of 2; ")
    assert main(["train", "--engine-tp", "2", *output]) == 2
    assert capsys.readouterr().err.startswith("fastkl: engine_tp: 2 processes cannot share an engine, ")
    assert main(["train", "--engine-tp", "0", *output]) == 2
    assert capsys.readouterr().err.startswith("fastkl: engine_tp: 0 ")
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------------------- pushes

WHOLE = torch.arange(24 * 10).view(24, 10)
BY_ROWS = [WHOLE[:9], WHOLE[9:16], WHOLE[16:]]
BY_COLUMNS = [WHOLE[:, :4], WHOLE[:, 4:]]
TURNED = [WHOLE.t()[:5], WHOLE.t()[5:]]
BLOCKS = [*(WHOLE[:12, cut] for cut in (slice(5), slice(5, 10))), WHOLE[12:]]
STRIPES = [WHOLE[::2], WHOLE[1::2]]


@pytest.mark.parametrize("views", [[WHOLE], BY_ROWS, BY_COLUMNS, TURNED, BLOCKS, STRIPES, [WHOLE[:0], WHOLE]])
@pytest.mark.parametrize("left_out", [None, 0, -1])
def test_parts_cover_a_tensor_where_their_elements_are_all_of_it(views, left_out):
    """Against the sets of the elements themselves."""
    if left_out is not None:
        views = [view for view in views if view is not views[left_out]]
    elements = {number for view in views for number in view.flatten().tolist()}
    parts = [Part.of(view, WHOLE) for view in views]
    assert covered(Part.of(WHOLE, WHOLE), parts) == (elements == set(range(240)))
    assert covered(Part.of(WHOLE, WHOLE), [*parts, *parts]) == (elements == set(range(240)))


def test_of_a_tensor_with_gaps_its_own_elements_have_to_be_covered():
    gappy = WHOLE[:, ::2]
    whole = Part.of(gappy, gappy)
    assert covered(whole, [Part.of(gappy[:20], gappy), Part.of(gappy[20:], gappy)])
    assert not covered(whole, [Part.of(gappy[:20], gappy), Part.of(gappy[21:], gappy)])
    fives = WHOLE.flatten()[:20].view(4, 5)  # runs of four, in rows that are no multiple of it
    assert not covered(Part.of(fives, fives), [Part.of(fives[:, :4], fives), Part.of(fives[3:, 1:], fives)])
    assert covered(Part.of(WHOLE[:0], WHOLE), [])
    assert covered(Part.of(torch.tensor(1.0), torch.tensor(1.0)), [Part.of(torch.tensor(1.0), torch.tensor(1.0))])


class HalfEngine(nn.Module):
    """One process's part: rows of one matrix (in a fused one), columns of another, all of a norm."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place
        self.fused = nn.Parameter(torch.zeros(6, 5), requires_grad=False)
        self.down = nn.Parameter(torch.zeros(5, 3), requires_grad=False)
        self.norm = nn.Parameter(torch.zeros(5), requires_grad=False)

    def load(self, weights) -> None:
        for name, weight in weights:
            if name == "down":
                self.down.data.copy_(weight.narrow(1, 3 * self.place, 3))
            elif name == "norm":
                self.norm.data.copy_(weight)
            else:
                rows = self.fused.data.narrow(0, 0 if name == "gate" else 3, 3)
                rows.copy_(weight.narrow(0, 3 * self.place, 3))


def some_weights(seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return {"gate": torch.randn(6, 5), "up": torch.randn(6, 5), "down": torch.randn(5, 6), "norm": torch.randn(5)}


def pushes(places: dict[int, int], spoiled: dict[int, str]) -> list[str]:
    """What each of four processes says after two pushes, two of them sharing an engine; empty if all is well.

    places: the part that a process takes, where it is not its own. spoiled: a tensor that does not reach a process.
    """

    def run(world) -> str:
        engine = HalfEngine(places.get(world.rank, world.rank % 2))
        check = PushCheck(torch.float32, world, shared_by=2)
        for step in range(2):
            weights = some_weights(step)
            sent = weights | ({spoiled[world.rank]: 2 * weights[spoiled[world.rank]]} if world.rank in spoiled else {})
            with check.watching(engine) as seen:
                engine.load(seen.through((sent if step else weights).items()))
            try:
                check.verify(engine, lambda weights=weights: weights.items(), seen, step)
            except StaleEngineError as complaint:
                return str(complaint)
        return ""

    return in_threads(4, run)


def test_the_parts_of_two_engines_are_compared_in_each_process():
    assert pushes({}, {}) == [""] * 4
    for rank, name in ((0, "gate"), (1, "down"), (3, "norm")):
        said = pushes({}, {rank: name})
        assert len(set(said)) == 1 and said[0].startswith(
            f"step 1: the weights that were pushed to the engine of process {rank} "
        )
        assert f"did not all arrive: {name} (unlike the policy's); no completion" in said[0]


def test_two_processes_that_hold_the_same_part_are_found_out_although_each_has_what_it_took():
    said = pushes({3: 0}, {})
    assert len(set(said)) == 1 and said[0].startswith("step 0: ")
    named = "in part in no process of its engine"
    assert f"gate ({named}), up ({named}), down ({named}); no completion" in said[0]


# ------------------------------------------------------------------------------------------------- workers of a server


class Worker:
    """What a server's worker is to its engine, with `HalfEngine` for a model."""

    def __init__(self, place: int) -> None:
        self.model, self.model_config = HalfEngine(place), SimpleNamespace(dtype=torch.float32)
        self.model_runner = SimpleNamespace(get_model=lambda: self.model)
        self.fault = ""

    def reload_weights(self, weights_iterator) -> None:
        if self.fault == "no file":
            raise FileNotFoundError("no such file")
        self.model.load((name, 2 * tensor if name == self.fault else tensor) for name, tensor in weights_iterator)


def loaded(folder, places: tuple[int, ...], fault: str = "") -> list[tuple[str, str]]:
    """(version, error) of three loads, as the workers of one server say; the last of them has the fault in the
    second one. places: the half that each holds."""

    def run(world) -> list[dict[str, str]]:
        worker, said = Worker(places[world.rank]), []
        engine = Engine(worker, Workers(world.rank, world.size, gather=world.everybodys))
        for step in range(3):
            worker.fault = fault if step == 1 and world.rank == world.size - 1 else ""
            path = folder / f"{world.rank}.safetensors"
            save_file(some_weights(step), path)
            said.append(engine.load(str(path), f"a-{step}", step, False))
        return said

    found = in_threads(len(places), run)
    assert all(said == found[0] for said in found), "the workers say the same"
    return [(said["version"], said["error"]) for said in found[0]]


WELL = [(f"a-{step}", "") for step in range(3)]


@pytest.mark.parametrize("fault", ["down", "no file"])
def test_what_fails_in_one_worker_of_a_server_is_said_by_all_and_the_next_load_is_in_order_again(tmp_path, fault):
    words = {
        "down": "step 1: the weights that were pushed to the engine of process 1 did not all arrive: down (unlike the ",
        "no file": "the weights could not be loaded (FileNotFoundError: no such file); the server has to see ",
    }
    first, second, third = loaded(tmp_path, (0, 1), fault)
    assert (first, third) == (WELL[0], WELL[2]) and second[0] == ""
    assert second[1].startswith(words[fault])


def test_the_workers_of_a_server_hold_the_whole_of_every_tensor_between_them(tmp_path):
    assert loaded(tmp_path, (0, 1)) == WELL
    assert "gate (in part in no process of its engine)" in loaded(tmp_path, (0, 0))[0][1]
