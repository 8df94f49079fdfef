"""Settings: the checks refuse what they should and no more, YAML comes back as it went, run folders stay apart."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import random
import time
from pathlib import Path

import commands
import pytest
from odd_yaml import ODD_NAMES, ODD_YAML, READ_BY_ALL

import fastkl
from fastkl.cli import main
from fastkl.config import settings as table
from fastkl.config.defaults import resolved
from fastkl.config.files import as_markdown, load_config, load_own_config, save_config, with_settings
from fastkl.config.settings import TrainConfig, check_config, penalty_of
from fastkl.errors import UserError
from fastkl.objective.advantages import ADVANTAGES
from fastkl.objective.kl_estimators import ESTIMATORS
from fastkl.training.manifest import checksum
from fastkl.training.run_folder import lock_run_folder, prepare_run_folder, started_with


def changed(**settings) -> TrainConfig:
    return dataclasses.replace(TrainConfig(), **settings)


def test_defaults_pass_the_checks():
    check_config(TrainConfig())


@pytest.mark.parametrize(
    "settings",
    [
        {"kl_coef": -0.1},
        {"kl_coef": math.inf},
        {"lr": math.nan},
        {"temperature": 0.0},
        {"temperature": -1.0},
        {"steps": 0},
        {"prompts_per_step": 0},
        {"num_samples": 0, "advantage": "none"},
        {"max_new_tokens": 0},
        {"micro_batch_tokens": -1},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.0},
        {"warmup_steps": -1},
        {"weight_decay": -0.1},
        {"max_grad_norm": -1.0},
        {"save_every": -1},
        {"keep_checkpoints": -1},
        {"sample_every": -1},
        {"seed": -1},
        {"gpu_memory_utilization": 1.5},
        {"kl_reduction": "summ"},
        {"advantage": "leave-one-out"},
        {"generator": "sglang"},
        {"lr_decay": "step"},
        {"dtype": "float16"},
        {"device": "tpu"},
        {"report_to": ("tensorbord",)},
        {"reward": ()},
        {"reward_weights": (1.0, 2.0)},
        {"reward_weights": (math.nan,)},
        {"model": " "},
        {"prompts": ""},
        {"output": ""},
        {"prompt_column": " "},
        {"stop": ("</answer>", "")},
        {"long_prompts": "cut"},
        {"chat_template_kwargs": ("enable_thinking",)},
        {"chat_template_kwargs": ("tokenize=false",)},
        {"num_samples": 1},
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_a_wrong_value_is_refused_by_a_message_that_begins_with_its_name(settings):
    with pytest.raises(UserError) as refused:
        check_config(changed(**settings))
    assert str(refused.value).startswith(f"{next(iter(settings))}: ")
    assert str(refused.value).endswith(".")


@pytest.mark.parametrize(
    "settings",
    [
        {"num_samples": 1, "advantage": "none"},
        {"kl_coef": 0.0},
        {"report_to": ()},
        {"save_every": 0, "keep_checkpoints": 0, "sample_every": 0, "max_grad_norm": 0.0},
        {"reward": ("alliteration", "starts_with_a"), "reward_weights": (1.0, -0.5)},
        {"steps": 1, "warmup_steps": 2},
    ],
)
def test_values_at_the_border_are_accepted(settings):
    check_config(changed(**settings))


def test_more_min_tokens_than_tokens_is_refused_as_such():
    with pytest.raises(UserError, match="^min_tokens: 97 is more than max_new_tokens .96."):
        check_config(changed(min_tokens=97))


def test_unknown_choice_names_the_nearest():
    with pytest.raises(UserError, match="unknown 'vlm'. Did you mean 'vllm'"):
        check_config(changed(generator="vlm"))


@pytest.mark.parametrize("name", ["repetition_penalty", "logit_bias", "structured_outputs"])
def test_sampling_that_cannot_be_scored_is_refused_with_the_reason(name):
    with pytest.raises(UserError, match=f"no setting '{name}'. It cannot be scored: "):
        with_settings(TrainConfig(), {name: 1.2})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"kl_estimator": "k1", "kl_placement": "loss"}, "expected gradient is zero"),
        ({"kl_estimator": "k2"}, "biased"),
        ({"kl_estimator": "k3"}, "pathwise term"),
        ({"kl_credit": "caused", "kl_reduction": "mean"}, "biased"),
        ({"kl_credit": "caused", "kl_estimator": "k3", "kl_placement": "loss"}, "not credited"),
        ({"kl_target": 5.0, "kl_coef": 0.0}, "above 0"),
        ({"allowed_token_ids": (3,), "banned_token_ids": (3,)}, "bans them all"),
        ({"banned_token_ids": (5, -1)}, "^banned_token_ids: -1 is out of range; it must be 0 or more"),
    ],
)
def test_a_penalty_or_a_ban_that_cannot_work_is_refused_with_its_reason(settings, words):
    with pytest.raises(UserError, match=words):
        check_config(changed(**settings))


def test_every_field_has_a_help_text_and_a_heading():
    assert {*table.settings()} == {field.name for field in dataclasses.fields(TrainConfig)}
    assert all(setting.help.endswith(".") and setting.heading for setting in table.settings().values())
    assert table.settings()["kl_coef"].heading == "The objective"
    assert table.settings()["top_k"].help == "Keep only the k likeliest tokens; 0 keeps all."
    assert list(dict.fromkeys(setting.heading for setting in table.settings().values())) == [
        *("What is trained, on what, for what", "The objective", "Sampling", "Adapters", "Optimisation"),
        *("Held-out evaluation", "The run"),
    ]


@pytest.mark.parametrize(
    "prompts", ['a "quoted": text # and \\ a 🦊', "two\nlines", "several\n\nlines: of\n text", " ", "null", "é: [1"]
)
def test_yaml_file_comes_back_as_it_was_saved(tmp_path, prompts):
    config = changed(
        prompts=prompts,
        reward=("one.py:f", "two:g"),
        reward_weights=(1.0, 1e-5),
        lr=1e-5,
        report_to=(),
        gradient_checkpointing=True,
        output="on",
        model="1e3",
    )
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config
    assert [path.name for path in tmp_path.iterdir()] == ["c.yaml"]
    save_config(TrainConfig(), tmp_path / "default.yaml")  # one line for each setting, whatever its value
    assert len({(tmp_path / name).read_text().count("\n") for name in ("c.yaml", "default.yaml")}) == 1


def test_yaml_values_take_their_fields_types(tmp_path):
    (tmp_path / "c.yaml").write_text(
        "lr: 3e-4\nkl-coef: 1\nsteps: 10.0\nreward: starts_with_a\nreport_to: none\nreward_weights: 2\n"
    )
    config = load_config(tmp_path / "c.yaml")
    assert (config.lr, config.steps, config.reward, config.report_to) == (3e-4, 10, ("starts_with_a",), ())
    assert config.kl_coef == 1.0 and isinstance(config.kl_coef, float) and isinstance(config.steps, int)
    assert config.reward_weights == (2.0,)
    (tmp_path / "empty.yaml").write_text("")
    assert load_config(tmp_path / "empty.yaml") == TrainConfig()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("kl_coeff: 1", "there is no setting 'kl_coeff'. Did you mean 'kl_coef'?"),
        ("kl_coef: much", "kl_coef: 'much' is not a number"),
        ("kl_coef: true", "kl_coef: True is not a number"),
        ("steps: 1.5", "steps: 1.5 is not a whole number"),
        ("steps: .inf", "steps: inf is not a whole number"),
        ("resume: 1", "resume: 1 is not true or false"),
        ("model: 3", "model: 3 is not a text"),
        ("reward: [1]", "is not a list of names"),
        ("reward: {a: b}\nkl_coef: [1]", "is not a number"),
        ("- a", "holds no settings"),
        ("a: [", "is not a YAML file"),
        ("a: \x00", "is not a YAML file"),
    ],
)
def test_wrong_yaml_is_refused_on_one_line_with_the_file(tmp_path, text, message):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(UserError) as refused:
        load_config(path)
    assert message in str(refused.value) and str(path) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", ODD_NAMES)
def test_no_yaml_makes_a_command_spin_or_fail_with_a_traceback(tmp_path, capsys, name):
    """train --config, sweep --config, and --resume of a run whose config.yaml it is: a sentence, in less than a second
    of the processor on a quiet machine; what spins takes minutes. Where several are read alike, each by one of them."""
    text, words = ODD_YAML[name]
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    commands = (
        ["train", "--config", str(path), "--output", str(tmp_path / "new")],
        ["sweep", "--kl-coef", "1", "--config", str(path), "--output", str(tmp_path / "new")],
        ["train", "--resume", "--output", str(tmp_path)],
    )
    one = [*ODD_YAML].index(name) % len(commands)
    for arguments in commands if name in READ_BY_ALL else commands[one : one + 1]:
        start = time.process_time()
        assert main(arguments) == 2
        said = capsys.readouterr().err
        assert time.process_time() - start < 20
        assert said.count("\n") == 1 and len(said) < 700 and words in said, said
    assert {p.name for p in tmp_path.iterdir()} == {"config.yaml"}


@pytest.mark.slow
def test_a_file_with_a_byte_order_mark_is_read_and_any_text_comes_back(tmp_path):
    (tmp_path / "c.yaml").write_bytes(b"\xef\xbb\xbfsteps: 3\n")
    assert load_config(tmp_path / "c.yaml").steps == 3
    rng = random.Random(0)
    odd = [*map(chr, (*range(0x20), 0x7F, 0x85, 0xA0, 0x2028, 0x2029, 0xFEFF, 0xFFFE)), *"a :#'\"\\é🦊[{&*!%"]
    for first, last in zip(odd, rng.sample(odd, len(odd)), strict=True):
        config = changed(prompts="".join([first, *rng.choices(odd, k=rng.randrange(24)), last]), model=first)
        save_config(config, tmp_path / "c.yaml")
        assert load_config(tmp_path / "c.yaml") == config
        assert load_own_config(tmp_path / "c.yaml") == config


@pytest.mark.slow
def test_a_run_without_a_checkpoint_is_resumed_only_with_the_settings_that_it_wrote(tmp_path):
    """config.yaml is their only record then: every flipped bit is refused, or changes no setting."""
    config = changed(output=str(tmp_path), kl_coef=0.25)
    prepare_run_folder(config)
    whole, rng, refused = (tmp_path / "config.yaml").read_bytes(), random.Random(0), 0
    for _ in range(100):  # `make faults` flips 3,000
        flipped = bytearray(whole)
        flipped[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (tmp_path / "config.yaml").write_bytes(flipped)
        try:
            assert started_with(tmp_path) == config
        except UserError:
            refused += 1
    assert refused > 10
    for edited in (b"", whole.replace(b"0.25", b"0.5")):
        (tmp_path / "config.yaml").write_bytes(edited)
        with pytest.raises(UserError, match="not as the run wrote it.* delete .* and start without --resume"):
            started_with(tmp_path)
    (tmp_path / "config.yaml").unlink()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="neither a checkpoint nor config.yaml"):
        prepare_run_folder(dataclasses.replace(config, resume=True))


def test_bytes_of_the_command_line_that_are_no_utf_8_are_refused_by_the_settings_name():
    for name in ("output", "model", "prompts"):
        with pytest.raises(UserError, match=f"^{name}: 'a\\\\udcff' is not a text"):
            with_settings(TrainConfig(), {name: "a\udcff"})


def test_config_of_version_0_1_0_is_read_under_todays_names(tmp_path):
    (tmp_path / "c.yaml").write_text("baseline: leave_one_out  # ...\nreward_weights: null\nkl_coef: 0.5\n")
    assert load_config(tmp_path / "c.yaml") == changed(advantage="rloo", kl_coef=0.5)
    (tmp_path / "c.yaml").write_text("baseline: none\n")
    assert load_config(tmp_path / "c.yaml") == changed(advantage="none")
    with pytest.raises(UserError, match="there is no setting 'baseline'"):
        with_settings(TrainConfig(), {"baseline": "none"})  # elsewhere the name is not known any more


def test_choices_of_a_registry_are_its_entries_and_ones_own_function():
    assert table.settings()["advantage"].choices == tuple(ADVANTAGES)
    assert table.settings()["kl_estimator"].choices == ("auto", *ESTIMATORS)
    setting = table.settings()["kl_estimator"]
    setting.check("k1")
    setting.check("mine.py:kl")
    with pytest.raises(UserError, match="unknown 'k9'.* or FILE.py:FUNCTION"):
        setting.check("k9")


@pytest.mark.parametrize(
    ("given", "estimator", "placement"),
    [
        ({}, "k1", "reward"),
        ({"temperature": 0.7, "max_new_tokens": 4}, "k1", "reward"),
        ({"top_k": 50}, "exact_full", "loss"),
        ({"min_p": 0.1}, "exact_full", "loss"),
        ({"min_tokens": 3}, "exact_full", "loss"),
        ({"banned_token_ids": (4,)}, "exact_full", "loss"),
        ({"top_k": 50, "kl_credit": "caused"}, "exact_full", "reward"),
        ({"top_k": 50, "kl_placement": "reward"}, "exact_full", "reward"),
        ({"top_k": 50, "kl_estimator": "k1"}, "k1", "reward"),
        ({"top_k": 50, "kl_estimator": "k3", "kl_placement": "loss"}, "k3", "loss"),
        ({"kl_placement": "loss", "kl_estimator": "exact"}, "exact", "loss"),
        ({"kl_direction": "forward"}, "exact_full", "loss"),
        ({"kl_direction": "jsd", "kl_estimator": "exact", "top_k": 50}, "exact", "loss"),
    ],
)
def test_where_no_draw_shows_what_leaves_the_support_the_exact_kl_over_all_ids_is_charged(given, estimator, placement):
    config = TrainConfig(**given)
    check_config(config)
    chosen = resolved(config)
    assert (chosen.kl_estimator, chosen.kl_placement) == (estimator, placement)
    assert (penalty_of(config).estimator, penalty_of(config).placement) == (estimator, placement)
    assert resolved(chosen) == chosen


@pytest.mark.parametrize(("given", "words"), [
    ({"kl_estimator": "k1"}, "kl_direction: forward .* kl_estimator k1 in the loss; give --kl-estimator exact_full"),
    ({"kl_placement": "reward"}, "kl_direction: forward .* exact_full in the reward; give .* --kl-placement loss"),
    ({"no_reference": True, "kl_coef": 0.0}, "kl_direction: forward is measured from a reference, and there is none"),
    ({"kl_credit": "caused"}, "kl_credit: a KL in the loss is not credited"),
])  # fmt: skip
def test_another_direction_than_the_reverse_kl_is_charged_exactly_and_in_the_loss(given, words):
    with pytest.raises(UserError, match=words):
        check_config(TrainConfig(kl_direction="forward", **given))


def test_page_of_settings_is_current():
    """`python -m fastkl.config.files > docs/settings.md` writes it."""
    page = (Path(fastkl.__file__).parents[1] / "docs" / "settings.md").read_text()
    assert page == as_markdown()
    assert all(page.count(f"| `{setting.option}` |") == 1 for setting in table.settings().values())


def test_settings_win_over_their_base():
    assert with_settings(changed(steps=3, seed=4), {"steps": "5"}) == changed(steps=5, seed=4)


def with_checkpoint(folder):
    (folder / "checkpoints" / "step-10").mkdir(parents=True)
    return folder


def test_new_folder_is_made_and_holds_the_settings(tmp_path):
    config = changed(output=str(tmp_path / "a" / "b"), steps=7)
    assert prepare_run_folder(config) == tmp_path / "a" / "b"
    assert load_config(tmp_path / "a" / "b" / "config.yaml") == config


def test_folder_of_a_run_that_failed_at_the_start_is_used_again(tmp_path):
    prepare_run_folder(changed(output=str(tmp_path), steps=7))
    (tmp_path / "metrics.jsonl").write_text("")
    prepare_run_folder(changed(output=str(tmp_path), steps=8))
    assert load_config(tmp_path / "config.yaml").steps == 8


def test_folder_with_another_run_is_refused_with_both_ways_out(tmp_path):
    for folder in (tmp_path / "has-checkpoint", tmp_path / "has-metrics"):
        folder.mkdir()
    with_checkpoint(tmp_path / "has-checkpoint")
    (tmp_path / "has-metrics" / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "has-metrics-2").mkdir()
    for name, free in (("has-checkpoint", "has-checkpoint-2"), ("has-metrics", "has-metrics-3")):
        with pytest.raises(UserError) as refused:
            prepare_run_folder(changed(output=str(tmp_path / name)))
        assert "--resume`" in str(refused.value) and f"--output {tmp_path / free}`." in str(refused.value)


def test_resume_needs_a_run_and_says_how_to_go_on_without(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in .*; start without --resume"):
        prepare_run_folder(changed(output=str(tmp_path / "new"), resume=True))
    assert not (tmp_path / "new").exists()
    prepare_run_folder(changed(output=str(tmp_path)))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    prepare_run_folder(changed(output=str(tmp_path), resume=True))  # it was killed before: it starts anew


def test_resume_refuses_settings_that_would_make_it_another_run(tmp_path):
    prepare_run_folder(changed(output=str(tmp_path), kl_coef=0.25))
    with_checkpoint(tmp_path)
    with pytest.raises(UserError, match=f"^kl_coef: {TrainConfig().kl_coef}, but the run in .* was started with 0.25"):
        prepare_run_folder(changed(output=str(tmp_path), resume=True))
    prepare_run_folder(changed(output=str(tmp_path), resume=True, kl_coef=0.25, steps=99, save_every=3))
    assert load_config(tmp_path / "config.yaml").steps == 99


def test_output_that_cannot_be_a_folder_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is a file, not a folder"):
            prepare_run_folder(changed(output=str(output)))


def test_output_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(UserError, match="cannot be written .No space left on device"):
        prepare_run_folder(changed(output=str(tmp_path)))


def test_settings_in_a_damaged_manifest_are_not_those_of_the_run(tmp_path):
    """A flipped bit makes 0.25 of 0.35: the checkpoint is refused, and its settings must be, too."""
    config = changed(output=str(tmp_path), kl_coef=0.25)
    prepare_run_folder(config)
    for step, damage in ((3, (b"0.25", b"0.25")), (6, (b"0.25", b"0.35"))):
        folder = tmp_path / "checkpoints" / f"step-{step}"
        folder.mkdir(parents=True)
        manifest = {"format": 2, "step": step, "files": {}, "config": dataclasses.asdict(config)}
        written = json.dumps(manifest | {"checksum": checksum(manifest)}).encode()
        (folder / "checkpoint.json").write_bytes(written.replace(*damage))
    assert started_with(tmp_path) == config


@pytest.mark.parametrize("edit", ["kl_coef: 5.0", "", None], ids=["edited", "emptied", "deleted"])
def test_the_checkpoints_own_settings_decide_whatever_has_become_of_config_yaml(tmp_path, edit):
    config = changed(output=str(tmp_path), kl_coef=0.25)
    prepare_run_folder(config)
    with_checkpoint(tmp_path)
    folder = next((tmp_path / "checkpoints").iterdir())
    manifest = {"format": 2, "step": 10, "files": {}, "config": dataclasses.asdict(config)}
    (folder / "checkpoint.json").write_text(json.dumps(manifest | {"checksum": checksum(manifest)}))
    if edit is None:
        (tmp_path / "config.yaml").unlink()
    else:
        (tmp_path / "config.yaml").write_text(edit)
    assert started_with(tmp_path) == config
    with pytest.raises(UserError, match="^kl_coef: 5.0, but the run in .* was started with 0.25"):
        prepare_run_folder(changed(output=str(tmp_path), resume=True, kl_coef=5.0))
    prepare_run_folder(changed(output=str(tmp_path), resume=True, kl_coef=0.25))


@pytest.mark.slow
def test_a_second_process_in_the_same_folder_is_told_who_has_it(tmp_path):
    config = changed(output=str(tmp_path / "run"))
    lock = lock_run_folder(config)
    other = commands.run("train", "--output", config.output, "--generator", "transformers", timeout=120)
    assert other.returncode == 2
    assert f"output: process {os.getpid()} is training in" in other.stderr and "Traceback" not in other.stderr
    assert not (tmp_path / "run" / "config.yaml").exists()
    lock.close()
    lock_run_folder(config).close()
