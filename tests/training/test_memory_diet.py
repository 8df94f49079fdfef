"""Whole runs with weights in bfloat16 and moments of 8 bits: what they compute, and that they resume bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from fastkl.config.settings import TrainConfig, check_config
from fastkl.distributed.world import World
from fastkl.errors import UserError
from fastkl.training.loop import train
from fastkl.training.places import check_storage, reference_place

SMALL = TrainConfig(
    generator="transformers", steps=3, prompts_per_step=2, num_samples=4, max_new_tokens=12, report_to=(),
    dtype="bfloat16", lr=3e-3, save_every=2, keep_checkpoints=0,
)  # fmt: skip
DIET = {"optimizer": "adamw8bit", "param_dtype": "bfloat16"}


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(("time/", "throughput/", "memory/"))} for line in lines]


def first_samples(folder: Path) -> list[dict]:
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return [sample for sample in samples if sample["step"] == 1]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [DIET, pytest.param({"optimizer": "adamw8bit", "dtype": "float32"}, marks=pytest.mark.long)],
    ids=["both", "8 bits"],
)
def test_a_run_resumes_bit_for_bit_and_starts_from_the_same_scores(tmp_path, options):
    config = replace(SMALL, **options)
    whole = train(replace(config, output=str(tmp_path / "whole")))
    train(replace(config, output=str(tmp_path / "parts")))
    (tmp_path / "parts" / "checkpoints" / "step-3").rename(tmp_path / "step-3")
    resumed = train(replace(config, output=str(tmp_path / "parts"), resume=True))
    for a, b in zip(whole.policy.parameters(), resumed.policy.parameters(), strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)
    assert metrics(whole.folder)[2] == metrics(resumed.folder)[-1]
    full = train(replace(SMALL, dtype=config.dtype, output=str(tmp_path / "full"), steps=1))
    assert metrics(whole.folder)[0]["kl/exact"] == 0
    alike = [
        (found["lm_cross_entropy"], wanted["lm_cross_entropy"])
        for found, wanted in zip(first_samples(whole.folder), first_samples(full.folder), strict=True)
        if found["completion"] == wanted["completion"]  # the generator's own products may round differently
    ]
    assert len(alike) >= 4 and all(found == wanted for found, wanted in alike)  # rounded as autocast rounds
    if options is DIET:
        linear = [m.weight for m in whole.policy.modules() if isinstance(m, nn.Linear)]
        assert {w.dtype for w in linear[:-1]} == {torch.bfloat16}
        with pytest.raises(UserError, match="optimizer: the moments in .* are those of adamw8bit"):
            train(replace(SMALL, output=str(tmp_path / "fork"), fork=str(tmp_path / "whole"), steps=5))


def test_what_the_machine_or_the_run_cannot_do_is_refused():
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="param_dtype: bfloat16 .* --dtype bfloat16"):
        check_storage(replace(SMALL, param_dtype="bfloat16"), cpu, torch.float32)
    with pytest.raises(
        UserError, match="offload: optimizer reference frees a GPU's memory, and this run is on the cpu"
    ):
        check_storage(replace(SMALL, offload=("optimizer", "reference")), cpu, torch.bfloat16)
    with pytest.raises(UserError, match="param_dtype: adapters are small"):
        check_config(replace(SMALL, param_dtype="bfloat16", lora_rank=4))


@pytest.mark.parametrize(("options", "words"), [
    ({"reference_device": "gpu"}, "reference_device: 'gpu' is no device; use policy, cpu, or a GPU's number"),
    ({"reference_device": "cpu", "no_reference": True, "kl_coef": 0.0}, "reference_device: cpu moves a reference, and"),
    ({"offload": ("reference",), "no_reference": True, "kl_coef": 0.0}, "offload: reference moves a reference, and"),
    ({"offload": ("reference",), "lora_rank": 4}, "offload: reference moves a second model, .* name a teacher"),
    ({"reference_device": "cuda:1", "lora_rank": 4}, "reference_device: cuda:1 moves a second model"),
    ({"reference_device": "cuda:1", "offload": ("reference",)}, "offload: a reference on the cuda:1"),
    ({"reference_device": "cpu", "shard": "full"}, "shard: reference_device cpu moves a reference that is whole"),
    ({"offload": ("optimizer", "reference"), "shard": "full"}, "shard: offload reference moves a reference"),
    ({"offload": ("moments",)}, "offload: unknown 'moments'.* Choose from optimizer, reference"),
], ids=str)  # fmt: skip
def test_a_reference_that_cannot_be_elsewhere_is_refused_by_name(options, words):
    with pytest.raises(UserError, match=words):
        check_config(replace(SMALL, **options))


def test_what_may_be_elsewhere_is_accepted():
    teacher = {"lora_rank": 4, "reference": "storyteller"}
    for options in ({"reference_device": "cpu"} | teacher, {"offload": ("reference",)} | teacher, {"offload": ()}):
        check_config(replace(SMALL, **options))


def test_a_gpu_that_is_not_here_or_not_this_processs_own_is_refused_by_its_number():
    config, cpu = replace(SMALL, reference_device="cuda:99"), torch.device("cpu")
    with pytest.raises(UserError, match="reference_device: cuda:99 is not here, since PyTorch sees [0-9]+ GPUs"):
        reference_place(config, cpu)
    with pytest.raises(UserError, match="reference_device: cuda:99 is one GPU, and there are 2 processes"):
        reference_place(config, cpu, World(0, 2))
    assert reference_place(replace(SMALL, reference_device="cpu"), torch.device("cuda", 0)) == cpu


@pytest.mark.slow
def test_a_reference_on_the_cpu_beside_a_policy_there_is_the_same_run_to_the_bit(tmp_path):
    runs = [replace(SMALL, dtype="float32", output=str(tmp_path / place), reference_device=place)
            for place in ("policy", "cpu")]  # fmt: skip
    one, other = (train(config) for config in runs)
    assert metrics(one.folder) == metrics(other.folder)


@pytest.mark.slow
@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"reference_device": "cpu"}, {"offload": ("reference",)}], ids=str)
def test_a_run_whose_reference_is_not_on_the_gpu_has_the_metrics_of_one_whose_is(tmp_path, options):
    """A reference on the CPU rounds otherwise than one on the GPU; a fetched one is the same to the bit."""
    runs = [replace(SMALL, dtype="float32", steps=1, output=str(tmp_path / name), **chosen)
            for name, chosen in (("beside", {}), ("elsewhere", options))]  # fmt: skip
    (one,), (other,) = (metrics(train(config).folder) for config in runs)
    for key, value in one.items():
        exact = "offload" in options
        assert other[key] == (value if exact else pytest.approx(value, rel=1e-3, abs=1e-3)), key
