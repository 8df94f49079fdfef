"""--no-reference: no second model, no KL, and the same training as with a coefficient of 0."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastkl.audit.doctor import diagnose_run
from fastkl.config.settings import TrainConfig, check_config
from fastkl.errors import UserError
from fastkl.report.page.write import write_report
from fastkl.training.loop import train

SMALL = TrainConfig(
    generator="transformers",
    steps=3,
    prompts_per_step=2,
    num_samples=4,
    max_new_tokens=12,
    report_to=(),
    dtype="float32",
    kl_coef=0.0,
    lr=3e-3,
)


def run(tmp_path: Path, name: str, **options) -> tuple[Path, dict[str, torch.Tensor]]:
    """The run's folder and the weights it ends with."""
    result = train(replace(SMALL, output=str(tmp_path / name), **options))
    return result.folder, {name: p.detach().clone() for name, p in result.policy.named_parameters()}


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [pytest.param({}, marks=pytest.mark.long), {"top_k": 20}, {"lora_rank": 4}],
    ids=["all weights", "top_k", "adapters"],
)
def test_the_weights_are_those_of_a_run_that_measures_the_kl_and_charges_nothing(tmp_path, options):
    measured, wanted = run(tmp_path, "measured", **options)
    without, found = run(tmp_path, "without", no_reference=True, **options)
    assert_same(found, wanted)
    of_reference = {key for key in lines(measured, "metrics")[0] if key.startswith("kl/") or "original" in key}
    assert len(of_reference) > 5
    for with_kl, line in zip(lines(measured, "metrics"), lines(without, "metrics"), strict=True):
        assert set(with_kl) - set(line) == of_reference
        assert all(line[k] == with_kl[k] for k in line if k.startswith(("reward/", "loss", "grad_norm", "entropy")))
    for sample in lines(without, "samples"):
        assert "kl" not in sample
        assert sample["penalized_reward"] == sample["reward"]


@pytest.mark.slow
def test_it_resumes_bit_for_bit_is_evaluated_and_has_a_page(tmp_path):
    options = {"no_reference": True, "prompts": str(tmp_path / "p.jsonl"), "eval_prompts": "0.3", "eval_every": 1}
    texts = [json.dumps({"prompt": f"Once upon a time there were {n} frogs"}) for n in range(12)]
    (tmp_path / "p.jsonl").write_text("\n".join(texts))
    _, wanted = run(tmp_path, "whole", **options)
    run(tmp_path, "parts", **options, save_every=2, keep_checkpoints=0)
    (tmp_path / "parts" / "checkpoints" / "step-3").rename(tmp_path / "step-3")
    folder, found = run(tmp_path, "parts", **options, save_every=2, keep_checkpoints=0, resume=True)
    assert_same(found, wanted)
    evaluated = lines(folder, "metrics")[-1]
    assert "eval/reward" in evaluated
    assert "eval/kl" not in evaluated
    page = write_report([folder]).read_text()
    assert "Entropy" in page
    assert "KL from the original" not in page
    assert "Entropy" in write_report([folder, tmp_path / "whole"], tmp_path / "both.html").read_text()
    with pytest.raises(UserError, match="no KL to audit"):
        diagnose_run(folder)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"kl_coef": 0.1}, "kl_coef: 0.1 needs the reference"),
        ({"reference_every": 2}, "reference_every: 2 needs the reference"),
        ({"best": "eval/kl", "eval_prompts": "0.1"}, "best: 'eval/kl' is not measured"),
    ],
)
def test_what_needs_a_reference_is_refused_without_one(options, says):
    with pytest.raises(UserError, match=says):
        check_config(replace(SMALL, no_reference=True, **options))
