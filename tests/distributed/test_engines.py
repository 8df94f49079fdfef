"""vLLM engines in the processes' own group: one in each process, and one that two processes share."""

from __future__ import annotations

from pathlib import Path

import pytest
from several_processes import run_in
from test_processes import assert_alike, lines, story, trained

from fastkl.config.settings import TrainConfig

pytestmark = [pytest.mark.slow, pytest.mark.vllm, pytest.mark.long]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """The run of one process."""
    folder = tmp_path_factory.mktemp("one")
    run_in(1, folder / "processes", trained, story(folder / "run", generator="vllm", steps=2))
    return folder / "run"


def assert_agreed(run: Path) -> None:
    """Every log-prob of the engines was compared with the trainer's, in each process."""
    gaps = [step["mismatch/mean_abs_logprob"] for step in lines(run)]
    assert len(gaps) == 2 and max(gaps) < 1e-4
    assert (run / "engine-1.log").is_file()


def test_two_engines_draw_the_samples_of_one_and_hold_the_policys_weights(one, tmp_path):
    """Every push, whose tensors are put together from the processes' pieces, is compared tensor by tensor."""
    config = story(tmp_path / "run", shard="full", generator="vllm", steps=2)
    run_in(2, tmp_path / "processes", trained, config)
    assert_alike(one, tmp_path / "run")
    assert_agreed(tmp_path / "run")


def sharing(config: TrainConfig, spoiled: str) -> tuple[float, list[str], str, str]:
    """A run whose two processes share an engine, and what becomes of it after the last step.

    Returns the share of the policy's numbers that are in this process's part of the engine; tensors that were not
    compared, and what its processes exchange by if not by gloo, such as shared memory, which outlives the run and is in
    the way of the next; what is said when the second process's next push is spoiled; and when it gets other requests.
    """
    from vllm.distributed.parallel_state import get_tp_group

    from fastkl.rollout.agreement import StaleEngineError
    from fastkl.rollout.dealt import generate
    from fastkl.rollout.requests import requests_of
    from fastkl.training.loop import run_steps
    from fastkl.training.setup import set_up

    run = set_up(config)
    generator = run.generator
    generator.close, close = lambda: None, generator.close
    run_steps(run)

    def said(function) -> str:
        try:
            function()
        except StaleEngineError as complaint:
            return str(complaint)
        return ""

    held = sum(shape.numel() for shape in generator.weights.check.places.shapes.values())
    share = held / sum(parameter.numel() for parameter in run.policy.model.parameters())
    over = type(get_tp_group().device_communicator.dist_module).__name__  # a module: torch.distributed, so gloo
    in_the_way = [] if over == "module" else [over]
    check, is_second = generator.weights.check, run.world.rank == 1
    place_all, factor = check.place_all, 1.01 if is_second else 1.0
    check.place_all = lambda model, weights: place_all(
        model, ((name, factor * w if name == spoiled else w) for name, w in weights)
    )
    pushed = said(lambda: generator.sync(run.policy.model, 3))
    check.place_all = place_all
    generator.sync(run.policy.model, 4)
    requests = requests_of(run.prompts.take(1), 4, seed=0, step=9)
    drawn = said(lambda: generate(generator, requests[::-1] if is_second else requests, run.world))
    close()
    return share, [*generator.weights.check.not_compared, *in_the_way], pushed, drawn


def test_an_engine_that_two_processes_share_draws_the_samples_of_one_and_what_is_wrong_in_one_is_said_by_both(
    one, tmp_path
):
    """With weights in pieces, so that the push is a collective call, and so is naming what did not arrive."""
    config = story(tmp_path / "run", shard="full", generator="vllm", steps=2, engine_tp=2)
    spoiled = "model.layers.1.self_attn.k_proj.weight"
    found = run_in(2, tmp_path / "processes", sharing, config, spoiled)
    assert_alike(one, tmp_path / "run")
    assert_agreed(tmp_path / "run")
    for share, nothing, pushed, drawn in found:
        assert 0.5 < share < 0.51 and nothing == []
        assert pushed.startswith("step 3: the weights that were pushed to the engine of process 1 did not all arrive: ")
        assert f"{spoiled} (unlike the policy's)" in pushed
        assert drawn.startswith("processes 0 to 1, which share an engine, were to draw different completions; ")
    assert "Warning" not in "".join(path.read_text() for path in (tmp_path / "processes").glob("output-*.txt"))
