"""Sharded weights together with adapters, 8-bit moments and bfloat16 matrices, against one process."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from several_processes import run_in
from test_processes import assert_alike, lines, story, trained
from toy import toy_batch, toy_config, toy_model
from toy_step import toy_objective

from fastkl.errors import UserError
from fastkl.scoring import backbone
from fastkl.scoring.adapters import add_adapters
from fastkl.scoring.scored_model import ScoredModel, WithoutAdapters
from fastkl.scoring.shard import odd_ones, units_of
from fastkl.training import small_adamw
from fastkl.training.small_adamw import BLOCK, SmallAdamW, check_pieces

CPU = torch.device("cpu")


def test_norms_beside_matrices_in_bfloat16_are_units_of_their_own():
    model = toy_model(dtype=torch.float32)
    layer = model.model.layers[0]
    assert odd_ones(layer) == []
    for linear in (m for m in layer.modules() if isinstance(m, torch.nn.Linear)):
        linear.weight.data = linear.weight.data.bfloat16()
    assert odd_ones(layer) == [layer.input_layernorm, layer.post_attention_layernorm]
    assert units_of(model)[:3] == [layer.input_layernorm, layer.post_attention_layernorm, layer]
    assert odd_ones(model.requires_grad_(False).model.layers[0]) == []  # nothing is summed


def adapted_updates() -> tuple[list[float], dict[str, torch.Tensor]]:
    """Two AdamW steps of adapters of rank 1, of which all processes but the first hold no row of A, in float64: the
    gradients' norms, and what the engine would get."""
    from fastkl.distributed.start import launched
    from fastkl.rollout.weight_sync import checkpoint_weights
    from fastkl.scoring.shard import gathered, shard
    from fastkl.training.loop import update
    from fastkl.training.setup import limits_of
    from fastkl.training.stopwatch import Stopwatch

    world = launched()
    backbone.register_packed_attention()
    model = toy_model(0)
    batch = toy_batch(model)
    add_adapters(model, 1, 2.0, ("all-linear",), seed=3)
    config = toy_config(micro_batch_tokens=30)
    policy = ScoredModel(model)
    reference = WithoutAdapters(policy) if world.size > 1 else ScoredModel(model, adapters=False)
    limits = replace(limits_of(config, policy), agreement_nats=math.inf)  # the samples are not of these steps
    if world.size > 1:
        shard(policy, CPU, (world.size,))
    with gathered(policy):  # FSDP2 looks at what is trained when it gathers first: with the adapters on
        pass
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    norms = []
    for step in (1, 2):
        objective, watch = toy_objective(config), Stopwatch(CPU)
        outcome = update(policy, reference, optimizer, batch, objective, limits, watch, step=step, world=world)
        norms.append(outcome.grad_norm)
    with torch.no_grad():
        return norms, {name: value.clone() for name, value in checkpoint_weights(model)}


@pytest.mark.slow
def test_sharded_adapters_learn_what_those_of_one_process_do(tmp_path):
    pytest.importorskip("peft")
    ((norms, one),) = run_in(1, tmp_path, adapted_updates)
    for found, weights in run_in(2, tmp_path, adapted_updates):
        assert found == pytest.approx(norms, rel=1e-10) and weights.keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=1e-9)


def small_steps(eight_bit: bool) -> dict[str, torch.Tensor]:
    """Weights and state after two steps of SmallAdamW on given gradients, saved and taken up in between: whole
    tensors, of 23 and 17 rows in 2 pieces."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from fastkl.distributed.start import launched
    from fastkl.scoring.pieces import whole

    small_adamw.CHUNK = 10 * BLOCK  # several of them, whose bounds are not those of the pieces
    world, draw = launched(), torch.Generator().manual_seed(0)
    mesh = init_device_mesh("cpu", (world.size,)) if world.size > 1 else None

    def placed(tensor):
        return tensor if mesh is None else distribute_tensor(tensor, mesh, [Shard(0)], src_data_rank=None)

    shapes = {"matrix": (23, BLOCK), "little": (10, 16), "half": (17, 2 * BLOCK), "row": (1, 20 * BLOCK)}
    parameters = {}
    for name, shape in shapes.items():
        start = torch.randn(shape, generator=draw).to(torch.bfloat16 if name == "half" else torch.float32)
        parameters[name] = torch.nn.Parameter(placed(start))
    check_pieces(parameters.items())

    def optimizer():
        return SmallAdamW(parameters.values(), lr=0.1, weight_decay=0.1, eight_bit=eight_bit, home=CPU, seed=5)

    found: dict[str, torch.Tensor] = {}
    for _ in (1, 2):
        ours = optimizer()
        for key, value in found.items():
            name, _, kind = key.partition("/")
            ours.state[parameters[name]][kind] = ours.own_state(parameters[name], value)
        for parameter in parameters.values():
            parameter.grad = placed(torch.randn(parameter.shape, generator=draw).to(parameter.dtype))
        ours.step()
        found = {
            f"{name}/{kind}": ours.whole_state(parameter, value, world).clone()
            for name, parameter in parameters.items()
            for kind, value in ours.state[parameter].items()
        }
    return found | {name: whole(parameter.detach()).clone() for name, parameter in parameters.items()}


@pytest.mark.slow
@pytest.mark.parametrize("eight_bit", [True, False])
def test_pieces_are_rounded_and_kept_in_8_bits_as_in_one_process(eight_bit, tmp_path):
    """Bit for bit: the random numbers and the blocks are those of the whole tensor."""
    (one,) = run_in(1, tmp_path, small_steps, eight_bit)
    assert one["matrix/exp_avg"].dtype == (torch.int8 if eight_bit else torch.float32)
    for found in run_in(2, tmp_path, small_steps, eight_bit):
        assert found.keys() == one.keys()
        for name, value in one.items():
            assert torch.equal(found[name], value), name


def cut_blocks() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    from fastkl.distributed.start import launched

    mesh = init_device_mesh("cpu", (launched().size,))
    matrix = distribute_tensor(torch.zeros(50, 100), mesh, [Shard(0)], src_data_rank=None)
    with launched().together():
        check_pieces([("layers.0.weight", torch.nn.Parameter(matrix))])
        launched().everybodys(None)


@pytest.mark.slow
def test_a_piece_that_would_cut_a_block_of_8_bits_is_refused(tmp_path):
    """Only the second piece begins within a block, and all processes say so."""
    from several_processes import Processes

    for ended in Processes(2, tmp_path, cut_blocks).ended():
        assert ended.error.startswith(UserError.__name__)
        assert (
            "optimizer: adamw8bit keeps moments in blocks of 256 numbers, and layers.0.weight (50 x 100) in 2 pieces "
            "would cut one; use another number of processes, --optimizer adamw, or --shard none." in ended.error
        )


@pytest.mark.slow
@pytest.mark.long
def test_sharded_runs_with_adapters_are_those_of_one_process_and_anybody_resumes_them(tmp_path):
    pytest.importorskip("peft")
    options = {"lora_rank": 4, "reference_every": 0, "lr": 1e-3}
    run_in(1, tmp_path / "processes", trained, story(tmp_path / "one", steps=3, **options))
    run_in(2, tmp_path / "processes", trained, story(tmp_path / "run", steps=1, shard="full", **options))
    run_in(1, tmp_path / "processes", trained, story(tmp_path / "run", steps=2, resume=True, **options))
    run_in(2, tmp_path / "processes", trained, story(tmp_path / "run", steps=3, shard="full", resume=True, **options))
    assert_alike(tmp_path / "one", tmp_path / "run")


@pytest.mark.slow
@pytest.mark.long
def test_sharded_runs_in_little_memory_draw_the_samples_of_one_process_and_anybody_resumes_them(tmp_path):
    """Matrices, gradients and the reference in bfloat16, 8-bit moments."""
    options = {"dtype": "bfloat16", "param_dtype": "bfloat16", "optimizer": "adamw8bit", "reference_every": 0}
    run_in(1, tmp_path / "processes", trained, story(tmp_path / "one", steps=2, **options))
    run_in(2, tmp_path / "processes", trained, story(tmp_path / "run", steps=1, shard="full", **options))
    run_in(1, tmp_path / "processes", trained, story(tmp_path / "run", steps=2, resume=True, **options))
    ours, theirs = (lines(tmp_path / name, "samples")[:16] for name in ("one", "run"))
    assert [sample["completion"] for sample in ours] == [sample["completion"] for sample in theirs]
    first, found = lines(tmp_path / "one")[0], lines(tmp_path / "run")
    assert [line["step"] for line in found] == [1, 2]
    for key, value in first.items():
        assert found[0][key] == pytest.approx(value, rel=1e-2, abs=1e-3), key
