"""Sharded weights (--shard full) in several processes over gloo, against one process with whole weights."""

from __future__ import annotations

import math
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from several_processes import run_in
from test_processes import assert_alike, interrupted_by, lines, saved_steps, story, trained, weights
from toy import toy_batch, toy_config, toy_model
from toy_step import toy_objective

from fastkl.config.settings import check_config
from fastkl.errors import UserError
from fastkl.scoring import backbone
from fastkl.scoring.scored_model import ScoredModel
from fastkl.scoring.shard import units_of

CPU = torch.device("cpu")


def test_an_untied_embedding_is_a_unit_of_its_own_and_a_tied_one_belongs_to_the_root():
    tied, untied = toy_model(), toy_model(tie_word_embeddings=False)
    assert units_of(tied) == [*tied.model.layers]
    assert units_of(untied) == [*untied.model.layers, untied.model.embed_tokens]


def test_a_model_without_a_list_of_layers_is_refused():
    with pytest.raises(UserError, match="shard: Linear has no list of layers to divide; use --shard none"):
        units_of(torch.nn.Linear(2, 2))


def test_matrices_of_4_bits_are_not_sharded():
    with pytest.raises(UserError, match="shard: qlora keeps matrices in blocks of 4 bits, which are not cut"):
        check_config(story(Path("x"), shard="full", lora_rank=4, qlora=True, reference_every=0))


def updates(
    options: dict, is_short: bool, advantage: str, sizes: tuple[int, ...] = ()
) -> tuple[list[float], list[float], dict, bool, list[bool]]:
    """Three AdamW steps of a toy model in float64, sharded where there are several processes: gradient norms, losses,
    whole weights, whether embedding and head are one, and whether the operator saw a head in pieces.

    is_short: all but one group are left out, so that all processes but one have none. sizes: of the mesh; one piece
    for each process if none are given.
    """
    from fastkl.distributed.start import launched
    from fastkl.kernels.compose import is_sharded
    from fastkl.scoring.pieces import whole
    from fastkl.scoring.shard import shard
    from fastkl.training.loop import update
    from fastkl.training.setup import limits_of
    from fastkl.training.stopwatch import Stopwatch

    world, heads = launched(), []

    class Watched(ScoredModel):
        def _hidden(self, batch):
            found = super()._hidden(batch)
            heads.append(is_sharded(found.head.weight))
            return found

    backbone.register_packed_attention()
    models = toy_model(0, **options), toy_model(1, **options).requires_grad_(False)
    batch = toy_batch(models[0])
    if is_short:
        batch.valid[1:] = False
        batch.rewards[1:] = 0
    config = toy_config(micro_batch_tokens=30, advantage=advantage)
    scored = [Watched(model) for model in models]
    limits = replace(limits_of(config, scored[0]), agreement_nats=math.inf)  # the samples are not of these steps
    if world.size > 1:
        for model in scored:
            shard(model, CPU, sizes or (world.size,))
    optimizer = torch.optim.AdamW(models[0].parameters(), lr=1e-3)
    norms, losses = [], []
    for step in (1, 2, 3):
        outcome = update(
            *scored, optimizer, batch, toy_objective(config), limits, Stopwatch(CPU), step=step, world=world
        )
        norms.append(outcome.grad_norm)
        losses.append(outcome.total.loss)
    found = {name: whole(p.detach()).clone() for name, p in models[0].named_parameters()}
    head, embedding = models[0].get_output_embeddings().weight, models[0].get_input_embeddings().weight
    return norms, losses, found, head is embedding, heads


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "tied", "is_short", "advantage"),
    [
        (2, False, True, "rloo"),
        (3, True, True, "reinforce_pp"),
        pytest.param(2, True, False, "rloo", marks=pytest.mark.long),
        pytest.param(3, False, False, "rloo", marks=pytest.mark.long),
    ],
)
def test_sharded_updates_are_those_of_one_process(size, tied, is_short, advantage, tmp_path):
    """23 ids are no multiple of 2 or 3: the pieces of the vocabulary are uneven. In float64."""
    arguments = ({"tie_word_embeddings": tied}, is_short, advantage)
    ((norms, losses, one, _, _),) = run_in(1, tmp_path, updates, *arguments)
    for found in run_in(size, tmp_path, updates, *arguments):
        assert found[0] == pytest.approx(norms, rel=1e-10) and found[1] == pytest.approx(losses, rel=1e-10)
        assert found[2].keys() == one.keys()
        for name, value in one.items():
            torch.testing.assert_close(found[2][name], value, rtol=0, atol=1e-9)
        assert found[3] == tied and not any(found[4])


@pytest.mark.slow
@pytest.mark.long
def test_two_machines_with_a_copy_each_in_pieces_of_two_processes_make_the_updates_of_one_process(tmp_path):
    arguments = ({}, False, "rloo")
    ((norms, losses, one, _, _),) = run_in(1, tmp_path, updates, *arguments)
    for found in run_in(4, tmp_path, updates, *arguments, (2, 2)):
        assert found[0] == pytest.approx(norms, rel=1e-10) and found[1] == pytest.approx(losses, rel=1e-10)
        for name, value in one.items():
            torch.testing.assert_close(found[2][name], value, rtol=0, atol=1e-9)
        assert found[3] and not any(found[4])


@pytest.mark.slow
@pytest.mark.long
def test_sharded_runs_are_those_of_one_process_and_their_checkpoints_are_anybodys(tmp_path):
    from transformers import AutoModelForCausalLM

    processes, run = tmp_path / "processes", tmp_path / "run"
    held = {"eval_prompts": "0.5", "prompts": str(tmp_path / "prompts.jsonl"), "eval_every": 1}
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "The {w}"}}\n' for w in ("cat", "dog", "fox", "owl")))
    run_in(1, processes, trained, story(tmp_path / "one", **held))
    run_in(2, processes, trained, story(run, shard="full", steps=2, **held))
    assert AutoModelForCausalLM.from_pretrained(run / "checkpoints" / "step-2").config.vocab_size == 2048
    run_in(1, processes, trained, story(run, steps=3, resume=True, **held))
    run_in(3, processes, trained, story(run, shard="full", resume=True, **held))
    assert_alike(tmp_path / "one", run)


@pytest.mark.slow
@pytest.mark.long
def test_the_same_number_of_sharding_processes_is_the_same_run_bit_for_bit(tmp_path):
    for name, parts in (("a", (4,)), ("b", (2, 4))):
        for steps in parts:
            config = story(tmp_path / name, shard="full", steps=steps, resume=steps != parts[0])
            run_in(2, tmp_path / "processes", trained, config)
    assert lines(tmp_path / "a") == lines(tmp_path / "b")
    ours, theirs = weights(tmp_path / "a", 4), weights(tmp_path / "b", 4)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


@pytest.mark.slow
@pytest.mark.long
def test_when_a_process_with_its_pieces_is_killed_the_last_checkpoint_stays_and_nothing_hangs(tmp_path):
    ended = interrupted_by("killed", tmp_path, shard="full")
    assert [process.code for process in ended] == [1, -signal.SIGKILL]
    assert ended[0].error == "LostProcess: process 1 of 2 has ended, and so this run ends."
    assert ended[0].seconds - ended[1].seconds < 15 and saved_steps(tmp_path) == [1, 2]
