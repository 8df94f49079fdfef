"""Evaluations of a run: what they measure, that the training does not notice them, and the best checkpoint."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import commands
import pytest
import torch
from safetensors.torch import load_file

from fastkl.audit.doctor import diagnose
from fastkl.config.settings import TrainConfig
from fastkl.errors import UserError
from fastkl.evaluation.evaluate import EVAL_STREAM
from fastkl.report.page.write import write_report
from fastkl.rollout.requests import requests_of
from fastkl.training import loop
from fastkl.training.checkpoint import open_checkpoint

PROMPTS = ["Once upon a time", "Once there was", "The king", "A little girl", "One day", "In the forest", "The old man"]
TEXT = "Once upon a time there was a kind king. He had a cat. One day the cat saw a bird in the garden.\n" * 40
NOT_REPRODUCIBLE = ("time/", "throughput/", "memory/")


def prompt_file(folder: Path, prompts: list[str]) -> str:
    path = folder / f"prompts-{len(prompts)}.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt, "length": len(prompt)}) + "\n" for prompt in prompts))
    return str(path)


def small(folder: Path, **options) -> TrainConfig:
    settings = {
        "prompts": prompt_file(folder, PROMPTS),
        "output": str(folder / "run"),
        "generator": "transformers",
        "steps": 5,
        "prompts_per_step": 2,
        "num_samples": 4,
        "max_new_tokens": 12,
        "report_to": (),
        "dtype": "float32",
    }
    return TrainConfig(**(settings | options))


def rows(folder: Path | str, name: str = "metrics") -> list[dict]:
    lines = [json.loads(line) for line in (Path(folder) / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(NOT_REPRODUCIBLE)} for row in lines]


def without_evaluation(found: list[dict]) -> list[dict]:
    trained = [row for row in found if row["step"] > 0]
    return [{key: value for key, value in row.items() if not key.startswith("eval")} for row in trained]


class Witness:
    def __init__(self) -> None:
        self.told: list[dict] = []

    def on_eval(self, metrics) -> None:
        self.told.append(dict(metrics))


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(the result of a run with a held-out share and a text, its configuration, what on_eval was told)."""
    folder = tmp_path_factory.mktemp("evaluated")
    (folder / "text.txt").write_text(TEXT)
    config = small(
        folder, eval_prompts="0.5", eval_every=2, eval_samples=3, eval_pass=1.0, eval_text=str(folder / "text.txt"),
        lr=3e-3, eval_temperature=0.8,
    )  # fmt: skip
    witness = Witness()
    return loop.train(config, callbacks=[witness]), config, witness.told


@pytest.mark.slow
def test_it_is_measured_before_the_first_step_every_second_step_and_after_the_last(evaluated):
    result, _, told = evaluated
    logged = rows(result.folder)
    assert [row["step"] for row in logged] == [0, 1, 2, 3, 4, 5]
    measured = [row for row in logged if "eval/reward" in row]
    assert [row["step"] for row in measured] == [0, 2, 4, 5]
    assert "reward/raw" not in logged[0] and "reward/raw" in logged[2]
    keys = [key for key in measured[0] if key.startswith("eval")]
    assert [{key: row[key] for key in ("step", *keys)} for row in measured] == told
    assert result.metrics["eval/loss"] == told[-1]["eval/loss"]


@pytest.mark.slow
def test_held_out_prompts_are_not_trained_on_and_all_others_are(evaluated):
    result, config, _ = evaluated
    held = {row["prompt"] for row in rows(result.folder, "eval_samples")}
    trained = {row["prompt"] for row in rows(result.folder, "samples")}
    assert held and trained and not held & trained
    assert held | trained == set(PROMPTS)  # ten prompts were drawn from the fewer than seven that are left
    assert len(rows(result.folder, "eval_samples")) == 4 * len(held) * config.eval_samples


@pytest.mark.slow
def test_the_measures_are_those_of_eval_samples(evaluated):
    result, config, _ = evaluated
    for line in (row for row in rows(result.folder) if "eval/reward" in row):
        groups: dict[str, list[dict]] = {}
        for sample in rows(result.folder, "eval_samples"):
            if sample["step"] == line["step"]:
                groups.setdefault(sample["prompt"], []).append(sample)
        for key, value in {
            "reward": lambda s: s["reward"],
            "pass@1": lambda s: float(s["reward"] >= 1.0),
            "length": lambda s: s["num_tokens"],
            "truncated_share": lambda s: float(s["finish_reason"] == "length"),
            "kl": lambda s: s["kl"],
        }.items():
            means = torch.tensor([[value(s) for s in group] for group in groups.values()], dtype=torch.float64).mean(1)
            assert line[f"eval/{key}"] == pytest.approx(float(means.mean()), rel=1e-6, abs=1e-9), key
            error = float(means.std()) / len(means) ** 0.5
            assert line[f"eval_error/{key}"] == pytest.approx(error, rel=1e-5, abs=1e-9), key
        solved = [any(s["reward"] >= 1.0 for s in group) for group in groups.values()]
        assert line[f"eval/pass@{config.eval_samples}"] == pytest.approx(sum(solved) / len(solved))


@pytest.mark.slow
def test_kl_and_loss_are_those_of_the_models_own_logits(evaluated):
    """In float64, one sequence at a time, from transformers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from fastkl.storyteller import model_path

    result, config, _ = evaluated
    trained = result.folder / "checkpoints" / "step-5"
    policy, reference = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval() for path in (trained, model_path())
    )
    tokenizer = AutoTokenizer.from_pretrained(model_path())

    def logprobs(model, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0] / temperature, dim=-1)

    compared = 0
    for sample in rows(result.folder, "eval_samples"):
        if sample["step"] != 5:
            continue
        prompt = tokenizer(sample["prompt"])["input_ids"]
        ids = tokenizer(sample["prompt"] + sample["completion"])["input_ids"]
        if len(ids) != len(prompt) + sample["num_tokens"] or ids[: len(prompt)] != prompt:
            continue  # it is not tokenised as it was sampled
        ours, theirs = (logprobs(model, ids[:-1])[len(prompt) - 1 :] for model in (policy, reference))
        assert sample["kl"] == pytest.approx(float((ours.exp() * (ours - theirs)).sum()), rel=1e-4)
        compared += 1
    assert compared >= 3 and sample["kl"] > 0.1

    ids, length = tokenizer(TEXT, add_special_tokens=False)["input_ids"], 512
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    nats, count = 0.0, 0
    for start in range(0, len(ids), length - len(begin)):
        window = begin + ids[start : start + length - len(begin)]
        steps = logprobs(policy, window[:-1])
        nats -= float(steps[range(len(window) - 1), window[1:]].sum())
        count += len(window) - 1
    assert count > 600, "more than one window"
    assert result.metrics["eval/loss"] == pytest.approx(nats / count, rel=1e-5)


@pytest.mark.slow
def test_page_and_doctor_take_the_evaluation_before_the_first_step_for_what_it_is(evaluated):
    result, _, _ = evaluated
    page = write_report([result.folder], result.folder.parent / "page.html").read_text()
    assert "Held-out against training reward" in page and "Held-out pass rate" in page
    assert "5 steps of" in page, "the line of step 0 is no step"
    assert diagnose(result.folder).num_completions == 5 * 8


def test_the_seeds_of_an_evaluation_are_no_steps_and_the_same_every_time():
    class Text:
        token_ids = (1,)

    def seeds(step: int) -> set[int]:
        return {request.seed for request in requests_of([Text(), Text()], 4, seed=3, step=step)}

    held = seeds(EVAL_STREAM)
    assert len(held) == 8
    assert not any(held & seeds(step) for step in range(300))


@pytest.mark.slow
def test_the_same_model_gives_the_same_evaluation_at_every_step(tmp_path):
    config = small(tmp_path, steps=2, eval_prompts=prompt_file(tmp_path, PROMPTS[:3]), eval_every=1, lr=0.0)
    loop.train(config)
    measured = [{key: value for key, value in row.items() if key.startswith("eval")} for row in rows(config.output)]
    assert measured[0] == measured[1] == measured[2]
    samples = rows(config.output, "eval_samples")
    assert len({sample["completion"] for sample in samples}) > 3


NOISY = """
import os, random, signal
import numpy as np
import torch

def reward(prompts, completions, trainer_state, length):
    step = trainer_state.global_step
    if os.path.exists({flag!r}) and step == 3 and len(set(prompts)) == {held}:
        os.remove({flag!r})
        os.kill(os.getpid(), signal.SIGKILL)
    noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
    return [noise + len(completion) / 10 for completion in completions]
"""


def command(output: Path, generator: str, reward: str, prompts: str, *more: str) -> list[str]:
    small = ["--steps", "4", "--save-every", "1", "--prompts-per-step", "2", "--num-samples", "2"]
    small += ["--max-new-tokens", "8", "--generator", generator, "--prompts", prompts, "--reward", reward]
    return ["train", *small, "--output", str(output), *more]


@pytest.mark.slow
@pytest.mark.parametrize(
    "generator", ["transformers", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.long])]
)
def test_a_run_with_evaluation_is_the_run_without_and_resumes_from_the_middle_of_one_bit_for_bit(tmp_path, generator):
    flag = tmp_path / "kill"
    (tmp_path / "rewards.py").write_text(NOISY.format(flag=str(flag), held=5))
    reward, prompts = f"{tmp_path / 'rewards.py'}:reward", prompt_file(tmp_path, PROMPTS)
    (tmp_path / "text.txt").write_text(TEXT[:400])
    evaluation = ["--eval-prompts", prompt_file(tmp_path, [f"{p} and" for p in PROMPTS[:5]]), "--eval-every", "1"]
    evaluation += ["--eval-samples", "2", "--best", "eval/reward"]
    evaluation += ["--eval-text", str(tmp_path / "text.txt"), "--eval-temperature", "0.7"]

    def run(name: str, *more: str) -> commands.Done:
        return commands.run(*command(tmp_path / name, generator, reward, prompts, *more), timeout=290)

    for name, more in (("without", []), ("with", evaluation)):
        done = run(name, *more)
        assert done.returncode == 0, done.stderr[-2000:]
    flag.touch()
    assert run("killed", *evaluation).returncode == -signal.SIGKILL
    assert not flag.exists() and [row["step"] for row in rows(tmp_path / "killed")] == [0, 1, 2]
    resumed = run("killed", *evaluation, "--resume")
    assert resumed.returncode == 0 and "continuing after step 2" in resumed.stdout, resumed.stderr[-2000:]

    plain, whole, killed = (tmp_path / name for name in ("without", "with", "killed"))
    assert without_evaluation(rows(whole)) == rows(plain)
    assert rows(killed) == rows(whole)
    assert sum("eval/reward" in row for row in rows(whole)) == 5
    for name in ("samples", "eval_samples"):
        assert rows(killed, name) == rows(whole, name)
    assert rows(plain, "samples") == rows(whole, "samples")
    for name in ("model.safetensors", "trainer.safetensors"):
        first, *others = (load_file(run / "checkpoints" / "step-4" / name) for run in (plain, whole, killed))
        for other in others:
            assert all(torch.equal(first[key], other[key]) for key in first), name


SCRIPTED = """
def reward(completions, trainer_state):
    return [{values!r}[trainer_state.global_step]] * len(completions)
"""


def best_of(tmp_path: Path, values: list[float], steps: tuple[int, ...], **options) -> tuple[int, str]:
    """(the step of checkpoints/best, the run's folder) of a run whose evaluations have these values, in pieces."""
    (tmp_path / "scripted.py").write_text(SCRIPTED.format(values=values))
    settings = {"eval_prompts": "text:Once", "eval_every": 1, "best": "eval/reward", "eval_samples": 1}
    settings |= {"eval_reward": (f"{tmp_path / 'scripted.py'}:reward",), "save_every": 1, "keep_checkpoints": 1}
    settings |= {"lr_decay": "constant", "prompts_per_step": 1, "max_new_tokens": 4} | options
    for number, last in enumerate(steps):
        config = small(tmp_path, **settings, steps=last, resume=number > 0)
        loop.train(config)
    folder = Path(config.output) / "checkpoints"
    return open_checkpoint(folder / "best").step if (folder / "best").is_dir() else 0, config.output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("values", "steps", "options", "expected"),
    [
        ([0.1, 0.5, 0.3, 0.7, 0.7], (4,), {}, 3),  # the first of equals
        ([0.1, 0.5, 0.3, 0.4, 0.2], (2, 4), {}, 1),  # better than all that the resumed part has
        pytest.param([0.1, 0.5, 0.3, 0.9, 0.2], (2, 4), {}, 3, marks=pytest.mark.long),
        ([0.1, 0.5, 0.3, 0.4, 0.2], (4,), {"best": "min:eval/reward"}, 0),  # the model before training
        ([0.9, 0.5, 0.3, 0.4, 0.2], (4,), {"best": "min:eval/reward", "save_every": 0}, 4),
    ],
)
def test_the_best_checkpoint_is_kept_across_a_resume(tmp_path, values, steps, options, expected, capsys):
    step, output = best_of(tmp_path, values, steps, **options)
    assert step == expected
    said = capsys.readouterr().out
    if not expected:
        assert "No step had a better eval/reward than the model before training (0.1)" in said
        return
    assert f"Best eval/reward: {values[expected]:.4g} after step {expected}" in said
    left = [path.name for path in sorted((Path(output) / "checkpoints").iterdir())]
    assert left == ["best", "step-4"]
    if expected != 4:
        best, last = (load_file(Path(output) / "checkpoints" / name / "model.safetensors") for name in left)
        assert any(not torch.equal(best[key], last[key]) for key in best)


@pytest.mark.slow
def test_a_best_checkpoint_that_was_lost_when_the_run_was_killed_comes_back(tmp_path):
    import shutil

    _, output = best_of(tmp_path, [0.1, 0.2, 0.3, 0.0], (2,))
    shutil.rmtree(Path(output) / "checkpoints" / "best")
    config = small(
        tmp_path, eval_prompts="text:Once", eval_every=1, best="eval/reward", eval_samples=1, save_every=1, steps=3,
        eval_reward=(f"{tmp_path / 'scripted.py'}:reward",), keep_checkpoints=1, lr_decay="constant",
        prompts_per_step=1, max_new_tokens=4, resume=True,
    )  # fmt: skip
    loop.train(config)
    assert open_checkpoint(Path(output) / "checkpoints" / "best").step == 2


@pytest.mark.slow
def test_a_measure_that_no_evaluation_has_ends_the_run_before_its_first_step(tmp_path):
    config = small(tmp_path, eval_prompts="text:Once", best="eval/reward/brevity", max_new_tokens=4, eval_samples=1)
    with pytest.raises(UserError, match=r"best: the evaluation has no eval/reward/brevity \(it has eval/reward, "):
        loop.train(config)
    assert [row["step"] for row in rows(config.output)] == [0]
