"""The loop on the embedded model: whole runs in this process, with the transformers generator."""

from __future__ import annotations

import json
import math
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import commands
import pytest
import torch

import fastkl
from fastkl.config.settings import TrainConfig
from fastkl.errors import UserError
from fastkl.storyteller import model_path
from fastkl.training import checkpoint, loop
from fastkl.training.loop import Diverged, run_steps
from fastkl.training.schedule import learning_rate
from fastkl.training.setup import set_up


def small(tmp_path: Path, **options) -> TrainConfig:
    settings = {
        "output": str(tmp_path / "run"),
        "generator": "transformers",
        "steps": 3,
        "prompts_per_step": 2,
        "num_samples": 4,
        "max_new_tokens": 12,
        "report_to": (),
        "dtype": "float32",  # "auto" is bfloat16 on processors that are fast at it
    }
    return TrainConfig(**(settings | options))


def rows(config: TrainConfig, name: str = "metrics") -> list[dict]:
    return [json.loads(line) for line in (Path(config.output) / f"{name}.jsonl").read_text().splitlines()]


def reward_file(tmp_path: Path, body: str) -> str:
    path = tmp_path / "rewards.py"
    path.write_text(f"import os\n\ndef reward(prompts, completions, trainer_state, **columns):\n    {body}\n")
    return f"{path}:reward"


@pytest.mark.slow
def test_a_run_leaves_metrics_samples_a_report_and_a_model_that_loads(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config = small(tmp_path)
    loop.train(config)
    metrics = rows(config)
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert metrics[0]["kl/mean"] == pytest.approx(0.0, abs=1e-4)
    assert metrics[0]["policy_version"] == 0
    assert metrics[-1]["kl/exact"] > 0
    assert all(row["mismatch/mean_abs_logprob"] < 1e-4 for row in metrics)
    assert len(rows(config, "samples")) == 3 * 8
    folder = Path(config.output)
    assert (folder / "report.html").is_file()
    model = AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "step-3")
    tokenizer = AutoTokenizer.from_pretrained(folder / "checkpoints" / "step-3")
    assert model.config.vocab_size >= len(tokenizer)


@pytest.mark.slow
def test_penalised_reward_is_reward_minus_beta_times_the_cross_entropy_gap(tmp_path):
    config = small(tmp_path, kl_coef=0.7, lr=3e-3)
    loop.train(config)
    moved = [s for s in rows(config, "samples") if s["step"] == 3]
    assert any(abs(s["kl"]) > 0.1 for s in moved)
    for s in moved:
        gap = s["num_tokens"] * (s["lm_cross_entropy"] - s["original_lm_cross_entropy"])
        assert s["kl"] == pytest.approx(-gap, abs=1e-3)
        assert s["penalized_reward"] == pytest.approx(s["reward"] + 0.7 * gap, abs=1e-3)


@pytest.mark.slow
def test_samples_without_a_reward_leave_their_group(tmp_path):
    reward = reward_file(tmp_path, "return [None if i % 4 == 0 else float(i) for i in range(len(completions))]")
    config = small(tmp_path, reward=(reward,), steps=1)
    loop.train(config)
    samples = rows(config, "samples")
    assert [s["reward"] is None for s in samples] == [True, False, False, False] * 2
    assert rows(config)[0]["reward/raw"] == pytest.approx((1 + 2 + 3 + 5 + 6 + 7) / 6)


@pytest.mark.slow
def test_a_step_in_which_no_group_can_be_scored_is_counted_and_survived(tmp_path):
    reward = reward_file(tmp_path, "return [None] * (len(completions) - 1) + [1.0]")
    config = small(tmp_path, reward=(reward,), steps=2)
    loop.train(config)
    assert [row["groups/skipped"] for row in rows(config)] == [2, 2]


@pytest.mark.slow
def test_three_non_finite_steps_stop_the_run_with_a_diagnosis_and_a_saved_state(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "clip_gradients", lambda policy, max_norm: math.nan)
    config = small(tmp_path, steps=9)
    with pytest.raises(Diverged, match="steps 1 to 3: .*smaller --lr"):
        loop.train(config)
    assert [row["steps/skipped"] for row in rows(config)] == [1, 2, 3]
    saved = checkpoint.newest_checkpoint(Path(config.output) / "checkpoints")
    assert saved.step == 3


@pytest.mark.slow
def test_a_failing_reward_keeps_the_completed_steps(tmp_path):
    counter = tmp_path / "calls"
    body = (
        f"calls = {str(counter)!r}\n"
        "    open(calls, 'a').write('x')\n"
        "    return [1.0 / (3 - os.path.getsize(calls))] * len(completions)"
    )
    config = small(tmp_path, reward=(reward_file(tmp_path, body),), save_every=0)
    with pytest.raises(UserError, match=r"reward.*step 3.*"):
        loop.train(config)
    assert checkpoint.newest_checkpoint(Path(config.output) / "checkpoints").step == 2


@pytest.mark.slow
def test_training_goes_on_when_a_checkpoint_cannot_be_written(tmp_path, monkeypatch, capsys):
    real, calls = checkpoint.save_checkpoint, []

    def full_disk_once(*args, **kwargs):
        calls.append(args[1])
        if len(calls) == 2:
            raise OSError(28, "No space left on device")
        return real(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "save_checkpoint", full_disk_once)
    config = small(tmp_path, save_every=1)
    loop.train(config)
    assert calls == [1, 2, 3]
    assert [row["step"] for row in rows(config)] == [1, 2, 3]
    assert "checkpoint of step 2 could not be written" in capsys.readouterr().out
    names = sorted(path.name for path in (Path(config.output) / "checkpoints").iterdir())
    assert names == ["step-1", "step-3"]


def test_learning_rate_warms_up_and_decays_to_zero_after_the_last_step():
    config = TrainConfig(steps=10, warmup_steps=2, lr=1.0)
    assert [learning_rate(s, config) for s in (1, 2, 3)] == [0.5, 1.0, 1.0]
    assert learning_rate(10, config) == pytest.approx(1 / 8)
    assert learning_rate(11, config) == pytest.approx(0.0)
    cosine = TrainConfig(steps=10, warmup_steps=0, lr=1.0, lr_decay="cosine")
    assert learning_rate(6, cosine) == pytest.approx(0.5)
    assert learning_rate(7, TrainConfig(steps=10, lr=2.0, lr_decay="constant")) == 2.0


@pytest.mark.slow
def test_gradient_checkpointing_trains_to_the_same_weights(tmp_path):
    final = []
    for flag in (False, True):
        config = small(tmp_path, gradient_checkpointing=flag, output=str(tmp_path / str(flag)), steps=2)
        loop.train(config)
        saved = Path(config.output) / "checkpoints" / "step-2" / "model.safetensors"
        from safetensors.torch import load_file

        final.append(load_file(saved))
    for name, value in final[0].items():
        torch.testing.assert_close(final[1][name], value, rtol=0, atol=1e-6)


class Witness:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.steps: list[dict] = []
        self.checkpoints: list[tuple[int, Path]] = []

    def on_step_end(self, metrics, samples) -> None:
        self.steps.append(dict(metrics) | {"num_samples": len(samples)})

    def on_checkpoint(self, step, folder) -> None:
        assert (folder / "checkpoint.json").is_file()
        self.checkpoints.append((step, folder))


def test_callbacks_are_told_of_steps_and_checkpoints_and_the_result_holds_the_trained_policy(tmp_path):
    from safetensors.torch import load_file

    config, witness = small(tmp_path, save_every=2), Witness()
    result = fastkl.train(config, callbacks=[witness, SimpleNamespace(on_checkpoint=lambda step, folder: None)])
    assert result.folder == Path(config.output)
    assert [step["step"] for step in witness.steps] == [1, 2, 3]
    logged, keys = rows(config), ("reward/raw", "kl/mean", "loss")
    for told, line in zip(witness.steps, logged, strict=True):
        assert [told[key] for key in keys] == [line[key] for key in keys]
        assert told["num_samples"] == 8
    assert result.metrics["step"] == 3 and result.metrics["loss"] == logged[-1]["loss"]
    checkpoints = result.folder / "checkpoints"
    assert witness.checkpoints == [(2, checkpoints / "step-2"), (3, checkpoints / "step-3")]
    saved = load_file(checkpoints / "step-3" / "model.safetensors")
    ours = result.policy.state_dict()
    assert all(torch.equal(ours[name], value) for name, value in saved.items())


def test_an_object_that_no_hook_would_ever_call_is_refused_before_anything_is_loaded(tmp_path):
    with pytest.raises(UserError, match="callbacks: .* has none of on_step_end, on_checkpoint, on_eval"):
        fastkl.train(small(tmp_path), callbacks=[object()])
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_in_a_thread_trains_as_in_the_main_thread(tmp_path):
    """Where Python allows no signal handlers."""
    here, there = small(tmp_path, output=str(tmp_path / "here")), small(tmp_path, output=str(tmp_path / "there"))
    loop.train(here)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loop.train, there).result()
    same = ("loss", "reward/raw", "kl/exact")
    assert [[row[key] for key in same] for row in rows(there)] == [[row[key] for key in same] for row in rows(here)]


class Recording:
    """A generator that says what it is asked, around the real one."""

    def __init__(self, generator, policy) -> None:
        self.generator, self.policy, self.sampling = generator, policy, generator.sampling
        self.calls: list[str] = []
        self.at_sync: list[torch.Tensor] = []

    def generate(self, requests):
        self.calls.append("generate")
        assert [(r.prompt_index, r.sample_index) for r in requests] == [(b, k) for b in range(2) for k in range(4)]
        assert len({r.seed for r in requests}) == 8
        return self.generator.generate(requests)

    def sync(self, policy, step) -> None:
        assert policy is self.policy
        self.calls.append("sync")
        self.at_sync.append(next(policy.parameters()).detach().clone())

    def rest(self) -> None:
        self.calls.append("rest")

    def close(self) -> None:
        self.calls.append("close")


@pytest.mark.slow
def test_weights_go_to_the_generator_after_every_update_and_the_last_one_too(tmp_path):
    run = set_up(small(tmp_path))
    recording = run.generator = Recording(run.generator, run.policy.model)
    result = run_steps(run)
    assert recording.calls == ["generate", "rest", "sync"] * 3 + ["close"]
    assert not torch.equal(recording.at_sync[0], recording.at_sync[1])
    assert torch.equal(recording.at_sync[-1], next(result.policy.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize(("estimator", "warned"), [("k1", True), ("exact_full", False)])
def test_a_run_says_once_that_mass_moves_where_a_sampled_penalty_charges_nothing(tmp_path, capsys, estimator, warned):
    """A policy whose weights are those of another model: it is far from its reference, on the support and off it."""
    config = small(tmp_path, steps=2, kl_estimator=estimator, top_k=2, lr=0.0)
    run = set_up(config)
    with torch.no_grad():
        for parameter in run.policy.parameters():
            parameter.mul_(0.5)
    run_steps(run)
    assert capsys.readouterr().out.count("lie on ids that cannot be drawn") == int(warned)
    assert all(row["kl/off_support"] > 2.0 for row in rows(config))
    assert all(row["kl/off_support"] <= row["kl/exact"] + 1e-3 for row in rows(config))


@pytest.mark.slow
def test_a_run_says_once_that_its_reference_excludes_what_the_policy_can_draw(tmp_path, capsys):
    """With a coefficient of zero the loss is finite, and the KL is not."""
    config = small(tmp_path, steps=2, kl_coef=0.0)
    run = set_up(config)
    plain = run.reference.hidden

    def excluding(batch):
        found = plain(batch)
        bias = torch.zeros(len(found.head.weight))
        bias[run.tokenizer.eos_token_id + 7] = -torch.inf
        return replace(found, head=replace(found.head, bias=bias))

    run.reference.hidden = excluding
    run_steps(run)
    assert capsys.readouterr().out.count("kl/exact: inf in this step. The reference excludes ids") == 1
    assert [row["steps/skipped"] for row in rows(config)] == [0, 0]
    assert [row["kl/exact"] for row in rows(config)] == [None, None]


@pytest.mark.slow
@pytest.mark.parametrize("top_k", [0, 2])
def test_a_run_counts_the_sampled_tokens_that_its_settings_do_not_allow(tmp_path, capsys, top_k):
    """The generator keeps all ids, the scorer replays top_k 2."""
    config = small(tmp_path, steps=2, lr=0.0)
    run = set_up(config)
    run.objective = replace(run.objective, sampling=replace(run.objective.sampling, top_k=top_k))
    run.limits = replace(run.limits, agreement_nats=math.inf)
    run_steps(run)
    assert capsys.readouterr().out.count("not among the ids that the sampling settings allow") == int(top_k > 0)
    shares = [row["support/outside"] for row in rows(config)]
    assert all(0.02 < share < 1 for share in shares) if top_k else shares == [0, 0]


def test_a_run_that_does_not_come_about_leaves_its_folder_to_the_next_in_the_same_process(tmp_path):
    """As in a notebook, which keeps the failed call's frames, and with them whatever they hold."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(model_path(), tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if "layers.1." not in name}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    failures = []
    for _ in range(2):
        with pytest.raises(UserError, match="lacks model.layers.1") as refused:
            loop.train(small(tmp_path, model=str(folder)))
        failures.append(refused)
    assert failures[0].tb, "the control: the first call's frames are still there"


HANGS_AT_STEP_2 = (
    "import time\n    if trainer_state.global_step == 2: time.sleep(100)\n    return [0.0, 1.0, 2.0, 3.0] * 2"
)


@pytest.mark.slow
def test_a_reward_that_hangs_ends_the_run_in_one_sentence_with_its_state_saved(tmp_path):
    reward = reward_file(tmp_path, HANGS_AT_STEP_2)
    config = small(tmp_path, reward=(reward,), reward_timeout=0.5, save_every=0)
    with pytest.raises(UserError, match=r"reward: reward had not returned after 0.5 s at step 2; .*--reward-timeout"):
        loop.train(config)
    assert checkpoint.newest_checkpoint(Path(config.output) / "checkpoints").step == 1


@pytest.mark.slow
def test_ctrl_c_is_heard_while_a_reward_hangs_and_the_second_one_ends_the_run(tmp_path):
    reward = reward_file(tmp_path, HANGS_AT_STEP_2)
    config = small(tmp_path, save_every=0)
    options = ["--generator", "transformers", "--steps", "3", "--prompts-per-step", "2", "--num-samples", "4"]
    options += ["--max-new-tokens", "8", "--report-to", "none", "--save-every", "0", "--reward-timeout", "0"]
    run = commands.Running("train", "--output", config.output, "--reward", reward, *options)
    try:
        while not (Path(config.output) / "metrics.jsonl").is_file() or not rows(config):
            assert run.poll() is None, run.said()
            time.sleep(0.2)
        time.sleep(1.0)  # step 2 has begun to hang
        run.send_signal(signal.SIGINT)
        while "SIGINT" not in run.said():
            time.sleep(0.2)
        assert "a second signal ends it at once" in run.said()
        run.send_signal(signal.SIGINT)
        assert run.done(60).returncode == 130
    finally:
        run.kill()
    assert checkpoint.newest_checkpoint(Path(config.output) / "checkpoints").step == 1
