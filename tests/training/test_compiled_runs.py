"""Whole runs whose layers are compiled: what they compute, and that they go on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from commands import run

from fastkl.config.settings import TrainConfig
from fastkl.training.loop import train

SMALL = TrainConfig(
    generator="transformers", steps=2, prompts_per_step=2, num_samples=4, max_new_tokens=12, report_to=(), lr=3e-3,
    dtype="float32", save_every=1, keep_checkpoints=0,
)  # fmt: skip


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "throughput/", "memory/"))} for line in lines]


@pytest.mark.long
def test_a_run_resumes_bit_for_bit_and_learns_what_an_uncompiled_one_does(tmp_path, capsys):
    config = replace(SMALL, compile=True)
    whole = train(replace(config, output=str(tmp_path / "whole")))
    said = capsys.readouterr().out
    assert "compiled: the policy's 3 layers, " in said and "compiled: the reference's 3 layers, " in said
    train(replace(config, output=str(tmp_path / "parts")))
    (tmp_path / "parts" / "checkpoints" / "step-2").rename(tmp_path / "step-2")
    resumed = train(replace(config, output=str(tmp_path / "parts"), resume=True))
    plain = train(replace(SMALL, output=str(tmp_path / "plain")))
    for a, b, c in zip(*(list(result.policy.parameters()) for result in (whole, resumed, plain)), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, c, rtol=0, atol=1e-3)
    assert metrics(whole.folder)[1] == metrics(resumed.folder)[-1]
    ours, theirs = metrics(whole.folder)[0], metrics(plain.folder)[0]
    assert ours["reward/raw"] == theirs["reward/raw"]
    assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)


@pytest.mark.long
def test_two_processes_compile_each_their_own(tmp_path):
    done = run(
        *("train", "--compile", "--nproc", "2", "--steps", "1", "--prompts-per-step", "2", "--num-samples", "4"),
        *("--max-new-tokens", "12", "--generator", "transformers", "--output", str(tmp_path / "run")),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "2 processes, each with all weights" in done.stdout and "compiled: the policy's 3 layers, " in done.stdout
