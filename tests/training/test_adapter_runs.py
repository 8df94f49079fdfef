"""Runs that train adapters: they start at no KL, the engine follows, and they resume bit for bit."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastkl import TrainConfig, UserError, train
from fastkl.training import setup

SMALL = TrainConfig(
    lora_rank=4, lr=1e-2, steps=4, prompts_per_step=2, num_samples=4, max_new_tokens=12, dtype="float32", save_every=1,
    keep_checkpoints=0, sample_every=0, report_to=(),
)  # fmt: skip
CHANGING = ("time/", "throughput/", "memory/")


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(CHANGING)} for row in rows]


def cut_to(folder: Path, step: int) -> None:
    """The run as it stood after `step`."""
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        if int(checkpoint.name[5:]) > step:
            shutil.rmtree(checkpoint)
    for name in ("metrics.jsonl", "samples.jsonl"):
        kept = [line for line in (folder / name).read_text().splitlines() if json.loads(line)["step"] <= step]
        (folder / name).write_text("".join(f"{line}\n" for line in kept))


@pytest.mark.slow
@pytest.mark.parametrize(
    "generator", ["transformers", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.long])]
)
def test_a_run_with_adapters_starts_at_no_kl_the_engine_follows_and_it_resumes_bit_for_bit(tmp_path, generator):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(replace(SMALL, generator=generator, output=str(whole)))
    shutil.copytree(whole, cut)
    cut_to(cut, 2)
    train(replace(SMALL, generator=generator, output=str(cut), resume=True))
    assert lines(whole) == lines(cut) and len(lines(whole)) == 4
    assert lines(whole, "samples.jsonl") == lines(cut, "samples.jsonl")
    last = "checkpoints/step-4/adapter_model.safetensors"
    assert (whole / last).read_bytes() == (cut / last).read_bytes()
    assert lines(whole)[0]["kl/exact"] == 0.0 and lines(whole)[-1]["kl/exact"] > 0.01
    assert max(row["mismatch/mean_abs_logprob"] for row in lines(whole)) < 1e-5
    assert not (whole / "checkpoints/step-4/model.safetensors").exists()


@pytest.mark.vllm
@pytest.mark.slow
def test_vllm_draws_with_the_adapters_after_each_step(tmp_path):
    train(replace(SMALL, generator="vllm", output=str(tmp_path), steps=2, save_every=0, lr=5e-2))
    first, second = lines(tmp_path)
    assert first["kl/exact"] == 0.0 and second["kl/exact"] > 0.01
    assert max(row["mismatch/mean_abs_logprob"] for row in (first, second)) < 1e-5


@pytest.mark.slow
def test_frozen_matrices_are_rounded_before_the_engine_starts(tmp_path, monkeypatch):
    """So the engine's memory comes after theirs has halved, and its first weights are those of all later pushes."""
    seen: dict[str, torch.dtype] = {}

    def starts(inputs, config, policy, dtype, note):
        seen.update({name: p.dtype for name, p in policy.named_parameters()})
        raise UserError("enough")

    monkeypatch.setattr(setup, "start_generator", starts)
    with pytest.raises(UserError, match="enough"):
        train(replace(SMALL, dtype="bfloat16", generator="transformers", output=str(tmp_path / "run")))
    matrices = {name for name in seen if name.endswith("proj.base_layer.weight")}
    assert matrices and all(seen[name] == torch.bfloat16 for name in matrices)
    assert all(seen[name] == torch.float32 for name in seen if ".lora_" in name or "norm" in name or "embed" in name)
