"""`fastkl eval`: the numbers of the run that made the checkpoint, paired differences, and mistakes of one line each."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from statistics import fmean, stdev

import pytest

from fastkl.cli import main
from fastkl.comparison.command import check_not_a_run
from fastkl.comparison.table import as_table, differences, short_names
from fastkl.config.settings import TrainConfig
from fastkl.errors import UserError
from fastkl.evaluation.evaluate import Evaluation
from fastkl.scoring import models
from fastkl.training import loop

PROMPTS = ["Once upon a time", "The king", "A little girl", "One day"]


def told(output: Path) -> dict[str, dict]:
    return {row["model"]: row for row in json.loads(output.read_text())["models"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "generator", ["transformers", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.long])]
)
def test_checkpoints_have_the_measures_of_the_run_that_made_them(tmp_path, capsys, generator):
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    (tmp_path / "text.txt").write_text("Once upon a time there was a kind king. He had a cat.\n" * 5)
    config = TrainConfig(
        output=str(tmp_path / "run"), generator=generator, steps=2, prompts_per_step=1, num_samples=4, save_every=1,
        max_new_tokens=12, report_to=(), dtype="float32", eval_prompts=str(held), eval_every=1, eval_samples=3,
        eval_text=str(tmp_path / "text.txt"), eval_pass=1.0, lr=3e-3, seed=5,
    )  # fmt: skip
    loop.train(config)
    logged = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    named = ["storyteller", *(f"{tmp_path}/run/checkpoints/step-{step}" for step in (1, 2))]
    options = ["--prompts", str(held), "--reward", "alliteration", "--samples", "3", "--pass", "1", "--seed", "5"]
    options += ["--max-new-tokens", "12", "--generator", generator, "--dtype", "float32", "--reference", "storyteller"]
    options += ["--text", str(tmp_path / "text.txt"), "--output", str(tmp_path / "eval.json")]
    capsys.readouterr()
    assert main(["eval", "--model", *named, *options]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) < 250 and "paired by prompt" in shown
    found = told(tmp_path / "eval.json")
    for name, line in zip(named, logged, strict=True):
        expected = {key: value for key, value in line.items() if key.startswith("eval")}
        assert found[name]["metrics"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    samples = [json.loads(line) for line in (tmp_path / "eval.samples.jsonl").read_text().splitlines()]
    of_run = [json.loads(line) for line in (tmp_path / "run" / "eval_samples.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in samples] == [row["completion"] for row in of_run]
    change = logged[2]["eval/reward"] - logged[0]["eval/reward"]
    assert found[named[2]]["difference_from_first"]["eval/reward"][0] == pytest.approx(change, abs=1e-9)
    assert found[named[0]]["difference_from_first"] == {}


@pytest.mark.slow
def test_paired_differences_have_the_error_of_repeated_comparisons():
    """Prompts differ a lot, models a little: the paired error is that of the difference, the unpaired far above."""
    rng = random.Random(3)
    means, variances, unpaired = [], [], []
    for _ in range(2000):
        hard = [rng.gauss(0, 1) for _ in range(10)]
        a = Evaluation({}, [], {"reward": [x + rng.gauss(0, 0.2) for x in hard]})
        b = Evaluation({}, [], {"reward": [x + 0.5 + rng.gauss(0, 0.2) for x in hard]})
        mean, error = differences({"a": a, "b": b}, "a")["b"]["eval/reward"]
        means.append(mean)
        variances.append(error**2)
        unpaired.append(sum(stdev(e.per_prompt["reward"]) ** 2 / 10 for e in (a, b)))
    variance = stdev(means) ** 2
    assert fmean(means) == pytest.approx(0.5, abs=4 * math.sqrt(variance / 2000))
    assert fmean(variances) == pytest.approx(variance, abs=4 * variance * math.sqrt(2 / 2000))
    assert fmean(unpaired) > 5 * variance


def test_the_table_fits_two_models_in_80_columns_and_leaves_out_what_is_not_there():
    metrics = {"eval/reward": 0.5, "eval/pass@1": 0.5, "eval/pass@8": 0.75, "eval/length": 120.0}
    errors = {key.replace("eval/", "eval_error/"): 0.02 for key in metrics}
    first = Evaluation(metrics | errors | {"eval/loss": 3.2}, [], {"reward": [0.0, 1.0], "pass@1": [0.0, 1.0]})
    second = Evaluation(metrics | errors, [], {"reward": [1.0, 1.0], "pass@1": [1.0, 1.0]})
    lines = as_table(
        {"runs/a/checkpoints/step-10": first, "runs/a/checkpoints/best": second}, "runs/a/checkpoints/step-10"
    ).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].split() == ["step-10", "best"]
    assert lines[2].split() == ["pass@1", "50.0", "%", "±", "2.0", "%", "50.0", "%", "±", "2.0", "%"]
    assert next(line for line in lines if line.startswith("loss")).split() == ["loss", "3.20", "–"]
    after = lines[lines.index("Difference from step-10, paired by prompt:") :]
    assert after[2].split() == ["reward", "+0.50", "±", "0.50"]


def test_names_lose_the_folder_that_they_share():
    assert short_names(["runs/a/best", "runs/b/best"]) == ["a/best", "b/best"]
    assert short_names(["storyteller", "runs/a/best"]) == ["storyteller", "runs/a/best"]
    assert short_names(["/x/a", "y/a"]) == ["/x/a", "y/a"]
    assert short_names(["runs/a/best"]) == ["runs/a/best"]


def test_a_run_folder_is_answered_with_its_checkpoints(tmp_path):
    for name in ("best", "step-3"):
        (tmp_path / "run" / "checkpoints" / name).mkdir(parents=True)
        (tmp_path / "run" / "checkpoints" / name / "config.json").touch()
    with pytest.raises(UserError, match="is a run folder; name one of its checkpoints: .*best, .*step-3"):
        check_not_a_run(str(tmp_path / "run"))
    check_not_a_run(str(tmp_path / "run" / "checkpoints" / "best"))


TASK = "--prompts text:Once --reward alliteration "


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TASK, "eval: name a model, or several (--model)."),
        ("--model storyteller", "eval: name what to evaluate on: --prompts with --reward, or --text."),
        ("--model storyteller --prompts text:Once", "reward: names no function"),
        (TASK + "--model storyteller storyteller", "model: 'storyteller' is named twice"),
        (TASK + "--model storyteller ./nowhere", "model: there is no model folder './nowhere'"),
        (TASK + "--model storyteller --samples 0", "samples: 0 is out of range; it must be 1 or more."),
        (TASK + "--model storyteller --temperature -1", "temperature: -1.0 is out of range; it must be 0 or more."),
        (TASK + "--model storyteller --top-p 2", "top_p: 2.0 is out of range"),
        (TASK + "--model storyteller --text missing.txt", "text: 'missing.txt' cannot be read"),
        (TASK + "--model storyteller --output nowhere/x.json", "output: 'nowhere/x.json' is no file in a folder"),
        (TASK + "--model storyteller --max-new-tokens 512", "max_new_tokens: 512 does not fit the model's context"),
        (TASK + "--model storyteller --kl-coef 1", "fastkl eval has no option --kl-coef."),
        ("--model storyteller --prompts missing.jsonl --reward alliteration", "prompts: there is no file 'missing."),
        ("--model storyteller --prompts text:Once --reward nonsense", "reward: unknown 'nonsense'"),
    ],
)
def test_a_mistake_is_one_line_and_no_model_is_loaded(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "load_model", lambda *_: pytest.fail("a model was loaded"))
    assert main(["eval", "--generator", "transformers", *options.split()]) == 2
    output, error = capsys.readouterr()
    assert output == "" and error.count("\n") == 1
    assert error.startswith(f"fastkl: {message}"), error
