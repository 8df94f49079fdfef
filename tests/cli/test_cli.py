"""The command line: help at once, settings in their order, for every mistake one line and exit code 2."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from cases import slow_rows, slow_where
from toy import VOCAB, toy_model

import fastkl
from fastkl.cli import command_line, foreign, main
from fastkl.config.defaults import resolved
from fastkl.config.files import load_config, save_config
from fastkl.config.settings import TrainConfig, settings
from fastkl.training import sweep


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    """(exit code, standard output, standard error) of the command in this process."""
    code = main(arguments)
    return code, *capsys.readouterr()


def refused(capsys, *arguments: str) -> str:
    """The one line with which the command refuses."""
    code, output, error = run(capsys, *arguments)
    assert (code, output) == (2, "") and error.startswith("fastkl: "), (code, output, error)
    assert error.count("\n") == 1 and "Traceback" not in error
    return error


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> Path:
    """A model with a context of 64 tokens, whose words are w0, w1, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    toy_model().float().save_pretrained(folder)
    raw = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="w0", eos_token=f"w{VOCAB - 1}").save_pretrained(folder)
    return folder


# ------------------------------------------------------------------------------------------------ help and exit codes


COMMANDS = ("train", "sweep", "eval", "score", "report", "doctor", "export", "serve", "bench", "storyteller")


def test_help_and_mistakes_come_without_importing_torch_and_at_once():
    watched = (
        "import resource, sys, fastkl.cli\n"
        "def used(): return (used := resource.getrusage(resource.RUSAGE_SELF)).ru_utime + used.ru_stime\n"
        "before = 0\n"
        "for arguments in ['train', '--kl-coef', '-1'], [], ['train', '--help']:\n"
        "    fastkl.cli.main(arguments)\n"
        "    print(sorted({'torch', 'numpy', 'yaml'} & set(sys.modules)), used() - before < 1)\n"
        "    before = used()"
    )
    done = subprocess.run([sys.executable, "-c", watched], capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line[:1] == "["] == ["[] True"] * 3


@pytest.mark.parametrize("watched", [True, False])
def test_a_person_reads_what_is_loaded_before_it_is_and_a_file_only_the_run(capsys, monkeypatch, tmp_path, watched):
    from fastkl.training import early, loop

    monkeypatch.setattr(sys.stdout, "isatty", lambda: watched, raising=False)
    monkeypatch.setattr(early, "task_of", lambda address: print("the task"))
    monkeypatch.setattr(
        loop, "train", lambda config: print("the run") or SimpleNamespace(step=1, saved_step=1, stopped=False)
    )
    code, output, _ = run(capsys, "train", "--prompts", "gym:chain_sum", "--output", str(tmp_path / "run"))
    first, second = "loading reasoning-gym ...", "reading prompts, tokenizer and the model's settings ..."
    assert code == 0
    assert output.splitlines() == ([first, "the task", second, "the run"] if watched else ["the task", "the run"])


def test_version(capsys):
    assert run(capsys, "--version") == run(capsys, "-V") == (0, f"fastkl {fastkl.__version__}\n", "")


@pytest.mark.parametrize("command", slow_where("sweep".__eq__, COMMANDS))  # whose options are those of train
def test_every_commands_help_fits_80_columns_and_ends_with_an_example(capsys, monkeypatch, command):
    monkeypatch.setenv("COLUMNS", "80")
    code, output, error = run(capsys, command, "--help")
    assert (code, error) == (0, "") and run(capsys, "help", command)[1] == output
    assert output.startswith(f"Usage: fastkl {command} ")
    assert max(map(len, output.splitlines())) <= 80
    assert output.splitlines()[-1].startswith(f"Example: fastkl {command} ")


def test_help_lists_the_commands_in_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, output, _ = run(capsys)
    assert code == 0 and output == run(capsys, "--help")[1] == run(capsys, "help")[1]
    assert re.findall(r"^ ([a-z]+)  ", output, re.M) == [*COMMANDS]
    assert max(map(len, output.splitlines())) <= 80 and "\nExample: fastkl train " in output


@pytest.mark.slow
def test_train_help_has_every_setting_with_its_default_under_its_heading(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    output = run(capsys, "train", "--help")[1]
    words = " ".join(output.split())
    entries = {entry.split()[0]: {*entry.split()} for entry in re.split(r"\n (?=--)", output)}
    for setting in settings().values():
        assert {*setting.help.split()} <= entries[setting.option], setting.name
    assert "[auto]" in words and f"[{TrainConfig().kl_coef}]" in words and "[tensorboard]" in words
    blocks = re.split(r"\n *\n", output)
    assert next(block for block in blocks if "--kl-target X" in block).split("\n")[0].strip() == "The objective"
    assert next(block for block in blocks if "--top-k N" in block).split("\n")[0].strip() == "Sampling"
    assert "[runs/sweep]" in run(capsys, "sweep", "--help")[1]


def test_a_mistake_ends_the_process_with_2_and_no_traceback():
    command = [sys.executable, "-m", "fastkl", "train", "--kl-coef", "-1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fastkl: kl_coef: -1.0 is out of range; it must be 0 or more.\n"


def test_other_endings_have_their_exit_codes(capsys, monkeypatch):
    def ended_by(failure) -> tuple[int, str]:
        def raising(tokens):
            raise failure

        monkeypatch.setattr(command_line, "run", raising)
        code, _, error = run(capsys, "report")
        return code, error

    assert ended_by(KeyboardInterrupt()) == (130, "")
    missing = ModuleNotFoundError("No module named 'transformers'", name="transformers.models")
    assert ended_by(missing)[0] == 2
    assert ended_by(missing)[1].endswith("pip install 'fastkl[train]' brings it.\n")
    with pytest.raises(ModuleNotFoundError):
        ended_by(ModuleNotFoundError("No module named 'fastkl.nonsense'", name="fastkl.nonsense"))


def test_without_its_library_the_command_line_says_what_brings_it():
    blocked = "import sys; sys.modules['cyclopts'] = None; import fastkl.cli; sys.exit(fastkl.cli.main(['--help']))"
    done = subprocess.run([sys.executable, "-c", blocked], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "fastkl: cyclopts is not installed; pip install 'fastkl[train]' brings it.\n"


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.fixture
def trained(monkeypatch) -> list[TrainConfig]:
    """The configurations that reach train()."""

    configs: list[TrainConfig] = []

    def train(config: TrainConfig) -> SimpleNamespace:
        configs.append(config)
        return SimpleNamespace(step=config.steps, saved_step=config.steps, stopped=False)

    monkeypatch.setattr("fastkl.training.loop.train", train)
    monkeypatch.setattr("fastkl.training.early.load_rewards", lambda names, weights: ())  # the functions are not there
    return configs


def test_a_last_step_that_could_not_be_saved_is_said_and_ends_in_1(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(
        "fastkl.training.loop.train", lambda config: SimpleNamespace(step=7, saved_step=5, stopped=False)
    )
    code, _, error = run(capsys, "train", "--output", str(tmp_path / "o"))
    assert (code, error) == (1, "fastkl: step 7 is not saved; the newest checkpoint is step 5.\n")


def test_options_win_over_the_file_and_the_file_over_the_defaults(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("kl_coef: 0.25\nsteps: 7\nreward: [a.py:f, b.py:g]\n")
    assert main(["train", "--config", "run.yaml", "--steps=9", "--prompts_per_step", "3", "--output", "o"]) == 0
    expected = TrainConfig(kl_coef=0.25, steps=9, reward=("a.py:f", "b.py:g"), prompts_per_step=3, output="o")
    assert trained == [resolved(expected)]


def test_lists_switches_and_odd_spellings_are_understood(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no former run lies
    options = "--reward a b --reward c --reward-weights 1 -2 3e-1 --report-to none --gradient_checkpointing --lr=1e-5"
    assert main(["train", *options.split(), "--prompts", "text:--kl_coef"]) == 0
    config = trained[0]
    assert main(["train", "--steps", "3", "--no-gradient-checkpointing", "--steps", "4", "--output", "o"]) == 0
    assert trained[1] == resolved(TrainConfig(steps=4, output="o"))  # as in make's ARGS: the last one counts
    assert (config.reward, config.reward_weights) == (("a", "b", "c"), (1.0, -2.0, 0.3))
    assert (config.report_to, config.gradient_checkpointing, config.lr) == ((), True, 1e-5)
    assert config.prompts == "text:--kl_coef"


@pytest.mark.slow
def test_the_opposite_of_a_setting_that_says_no_says_with(trained, tmp_path, capsys):
    output = ["--output", str(tmp_path / "o"), "--kl-coef", "0"]
    assert (
        main(["train", "--no-reference", *output])
        == main(["train", "--no-reference", "--with-reference", *output])
        == 0
    )
    assert [config.no_reference for config in trained] == [True, False]
    assert main(["train", "--help"]) == 0
    assert "--no-no-" not in capsys.readouterr().out


def test_options_are_read_the_same_way_where_pydantic_is_loaded(trained, tmp_path):
    """vLLM loads it, and Cyclopts then has it look at a command's arguments, those that are not given included."""
    pytest.importorskip("pydantic")
    output = ["--output", str(tmp_path / "o")]
    assert main(["train", "--lr", "3e-4", "--reward", "a", "b", "--report-to", "none", "--no-resume", *output]) == 0
    assert trained == [resolved(TrainConfig(lr=3e-4, reward=("a", "b"), report_to=(), output=output[1]))]


def test_resume_takes_the_settings_of_the_run(trained, tmp_path):
    save_config(TrainConfig(kl_coef=0.125, num_samples=4, output="elsewhere"), tmp_path / "config.yaml")
    (tmp_path / "checkpoints" / "step-10").mkdir(parents=True)
    assert main(["train", "--resume", "--output", str(tmp_path), "--steps", "50"]) == 0
    expected = TrainConfig(kl_coef=0.125, num_samples=4, output=str(tmp_path), resume=True, steps=50)
    assert trained == [resolved(expected)]


def test_a_run_folder_that_was_moved_is_resumed_where_it_is(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "alliteration" / "checkpoints" / "step-10").mkdir(parents=True)
    save_config(TrainConfig(seed=3, output="elsewhere"), tmp_path / "runs" / "alliteration" / "config.yaml")
    assert main(["train", "--resume"]) == 0
    assert trained == [resolved(TrainConfig(seed=3, output="runs/alliteration", resume=True))]


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("trian", ["no command 'trian'", "Did you mean 'train'"]),
        ("train --kl-coeff 1", ["no option --kl-coeff", "Did you mean '--kl-coef'"]),
        ("train --kl 1", ["no option --kl"]),
        ("train surplus", ["unexpected argument 'surplus'"]),
        ("train --kl-coef", ["--kl-coef needs a value"]),
        ("train --kl-coef much", ["kl_coef: 'much' is not a number"]),
        ("train --kl_coef -0.5", ["kl_coef: -0.5 is out of range"]),
        ("train --temperature -1", ["temperature: -1.0 is out of range"]),
        ("train --temperature 0", ["temperature: 0.0 is out of range"]),
        ("train --num-samples 1", ["num_samples: 1", "2 or more", "--advantage none"]),
        (
            "train --repetition-penalty 1.2",
            ["no option --repetition-penalty", "cannot be scored", "text already holds"],
        ),
        ("train --beta 0.1", ["no option --beta. Here it is --kl-coef."]),
        ("train --learning_rate=1e-5", ["no option --learning_rate. Here it is --lr."]),
        ("train --learning-rte 1", ["no option --learning-rte. Did you mean 'learning-rate'? Here it is --lr."]),
        ("train algorithm.adv_estimator=rloo", ["'algorithm.adv_estimator=rloo'. Here it is --advantage."]),
        ("sweep --kl-coef 1 --init_kl_coef 1", ["no option --init_kl_coef. Here it is --kl-coef."]),
        ("score x.jsonl --model m --beta 1", ["fastkl score has no option --beta. `fastkl score --help`"]),
        ("train --kl-estimator k3", ["kl_estimator: k3 in the reward is refused", "pathwise term"]),
        ("train --banned-token-ids five", ["banned_token_ids: ['five'] is not a list of whole numbers"]),
        ("train --steps 2.5", ["steps: '2.5' is not a whole number"]),
        ("train --config nowhere.yaml", ["'nowhere.yaml' cannot be read"]),
        ("train --config unknown.yaml", ["unknown.yaml: there is no setting 'kl_coeff'", "Did you mean 'kl_coef'"]),
        ("train --resume --output new", ["no checkpoint in 'new'", "without --resume"]),
        ("train --output used", ["'used' holds another run", "--resume", "--output used-2"]),
        ("train --output unknown.yaml", ["'unknown.yaml' is a file"]),
        ("train --reward aliteration", ["reward: unknown 'aliteration'", "Did you mean 'alliteration'"]),
        ("train --reward rewards.py:g", ["'rewards.py' has no function 'g'", "It has f."]),
        ("train --reward rewards.py", ["'rewards.py' is a file", "It has f; write rewards.py:f."]),
        ("train --advantage rewards.py", ["advantage: 'rewards.py' is a file", "It has f; write rewards.py:f."]),
        ("train --advantage rlo", ["advantage: unknown 'rlo'", "Did you mean 'rloo'", "FILE.py:FUNCTION"]),
        ("train --reward rewards.py:f --reward-weights 1 2", ["reward_weights: 2 weights for 1"]),
        ("train --model ./nowhere", ["model: there is no model folder './nowhere'"]),
        ("train --model used", ["model: the folder 'used'", "no config.json"]),
        ("train --report-to tensorbord", ["report_to: unknown 'tensorbord'", "Did you mean 'tensorboard'"]),
        ("sweep", ["name what to vary", "--vary lr 1e-6"]),
        ("sweep --vary sead 0 1", ["there is no setting 'sead'", "Did you mean 'seed'"]),
        ("sweep --vary seed 0.5", ["seed: '0.5' is not a whole number"]),
        ("sweep --kl-coef 0 -1", ["kl_coef: -1.0 is out of range"]),
        *slow_rows(
            ("sweep --vary", ["name what to vary"]),
            ("sweep --vary 1e-6 lr", ["there is no setting '1e-6'"]),
            ("sweep --vary seed 0 --vary seed 1", ["seed is given twice"]),
            ("sweep --vary seed 0 --vary lr", ["lr has no values"]),
            ("sweep --vary output a b", ["output cannot be varied"]),
            ("sweep --vary gradient_checkpointing maybe", ["gradient_checkpointing: 'maybe' is not true or false"]),
            ("sweep --vary kl_estimator k1 k3", ["kl_estimator: k3 in the reward is refused"]),
            ("sweep --kl-coef 0 x", ["kl_coef: 'x' is not a number"]),
            ("sweep --kl-coef 0 1 0.0", ["0 1 0 names a value twice"]),
        ),
        ("sweep --kl-coef 0 --output sweep", ["'sweep/kl_coef-0' holds another run"]),
        ("report", ["name a run folder"]),
        ("report nowhere", ["no run folder 'nowhere'"]),
        ("storyteller", ["--output needs a value"]),
        ("storyteller --output unknown.yaml", ["'unknown.yaml' is a file"]),
    ],
)
def test_bad_input_is_refused_on_one_line(capsys, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    Path("unknown.yaml").write_text("kl_coeff: 1\n")
    Path("rewards.py").write_text("def f(completions): return [0.0] * len(completions)\n")
    for folder in ("used", "sweep/kl_coef-0"):
        Path(folder).mkdir(parents=True)
        Path(folder, "metrics.jsonl").write_text('{"step": 1}\n')
    before = sorted(path for path in Path().rglob("*") if "__pycache__" not in path.parts)
    message = refused(capsys, *arguments.split())
    assert all(word in message for word in words), message
    assert sorted(path for path in Path().rglob("*") if "__pycache__" not in path.parts) == before


def test_a_run_started_through_make_is_told_what_to_type_there(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTKL_STARTED_BY", "make")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "metrics.jsonl").write_text('{"step": 1}\n')
    message = refused(capsys, "train", "--output", str(tmp_path / "used"))
    assert f'continue it with `make train ARGS="--output {tmp_path / "used"} --resume"`' in message
    assert f'make train ARGS="--output {tmp_path / "used-2"}"' in message
    makefile = (Path(fastkl.__file__).parents[1] / "Makefile").read_text()
    assert 'FASTKL_STARTED_BY=make exec "$(BIN)/fastkl" train $(ARGS)' in makefile


TORCHRUN = {"--nnodes", "--nproc-per-node"}


def test_names_of_other_trainers_are_answered_with_options_that_exist_and_are_no_options_themselves():
    options = {setting.option for setting in settings().values()} | {"--nproc"}
    theirs = [name for names in (*foreign.OURS.values(), *foreign.NOT_HERE) for name in names.split()]
    assert len(theirs) > 100 and len(set(theirs)) == len(theirs)
    assert {ours.split()[0] for ours in foreign.OURS} <= options
    assert not options & {f"--{name.replace('_', '-')}" for name in theirs}
    assert all(set(re.findall(r"--[a-z-]+", why)) <= options | TORCHRUN for why in foreign.NOT_HERE.values())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("--lora-r", "Here it is --lora-rank."),
        ("--load-in-4bit", "Here it is --qlora."),
        ("--load-in-8bit", "Not here: frozen matrices are in 4 bits"),
        ("--zero-stage", "Here it is --shard."),
        ("trainer.n_gpus_per_node", "Here it is --nproc."),
        ("--baseline", "Here it is --advantage."),
        ("actor_rollout_ref.actor.strategy", "Here it is --shard."),
        ("actor_rollout_ref.nccl_timeout", "Not here: it is a setting of verl"),
    ],
)
def test_a_name_of_another_trainer_is_answered(name, words):
    options = [setting.option for setting in settings().values()] + ["--nproc"]
    assert foreign.answer(name, options).startswith(f" {words}")


@pytest.mark.slow
def test_names_that_trl_has_are_answered():
    trl = pytest.importorskip("trl")
    classes = (trl.GRPOConfig, trl.RLOOConfig, trl.ModelConfig, trl.ScriptArguments)
    fields = {field.name for cls in classes for field in dataclasses.fields(cls)}
    answered = {*" ".join((*foreign.OURS.values(), *foreign.NOT_HERE)).split(), *settings()}
    assert len(fields & answered) >= 60
    options = [setting.option for setting in settings().values()]
    for name in fields & {
        *["beta", "learning_rate", "num_generations", "dataset_name", "use_peft", "save_steps", "lora_r", "bf16"]
    }:
        assert foreign.answer(f"--{name.replace('_', '-')}", options).endswith("."), name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"--max-new-tokens": "64"}, ["max_new_tokens: 64", "context of 64 tokens"]),
        ({"--prompts": "long.jsonl"}, ["line 2 of 'long.jsonl' has 40 tokens", "room for 32"]),
        ({"--prompts": "broken.jsonl"}, ["line 3 of 'broken.jsonl' is not JSON"]),
        ({"--prompts": "empty.jsonl"}, ["'empty.jsonl' holds no prompts"]),
        ({"--prompts": "nowhere.jsonl"}, ["there is no file 'nowhere.jsonl'"]),
        ({"--model": "no-tokenizer"}, ["no tokenizer", "no-tokenizer"]),
    ],
)
def test_input_that_does_not_suit_the_model_is_refused(capsys, tmp_path, monkeypatch, model_folder, options, words):
    monkeypatch.chdir(tmp_path)
    Path("long.jsonl").write_text(f'{{"prompt": "w1"}}\n{{"prompt": "{"w2 " * 40}"}}\n')
    Path("broken.jsonl").write_text('{"prompt": "w1"}\n\n{"prompt": \n')
    Path("empty.jsonl").write_text("\n")
    Path("no-tokenizer").mkdir()
    for path in model_folder.iterdir():
        if "tokenizer" not in path.name and "special_tokens" not in path.name:
            Path("no-tokenizer", path.name).symlink_to(path)
    settings = {
        "--model": str(model_folder),
        "--prompts": "w1 w2",
        "--max-new-tokens": "32",
        "--output": "new",
    } | options
    message = refused(capsys, "train", *(token for setting in settings.items() for token in setting))
    assert all(word in message for word in words), message
    assert not Path("new").exists()


# --------------------------------------------------------------------------------------------------------------- sweep

CHILD = """
import json, pathlib, signal, sys, time
from fastkl.config.files import load_config
config = load_config(pathlib.Path(sys.argv[sys.argv.index("--config") + 1]))
folder = pathlib.Path(config.output)
def save(*_):
    (folder / "checkpoints" / f"step-{config.steps}").mkdir(parents=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
with open(folder.parent / "calls", "a") as calls:
    calls.write(json.dumps([config.kl_coef, config.steps, sys.argv[1:]]) + chr(10))
if config.kl_coef == 2: sys.exit(1)
if config.kl_coef == 3: time.sleep(60); sys.exit(5)
save()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch) -> Path:
    """A folder in which `python -m fastkl train` is the program above."""
    python = tmp_path / "python"
    (tmp_path / "child.py").write_text(CHILD)
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{tmp_path / "child.py"}" "$@"\n')
    python.chmod(0o755)
    monkeypatch.setattr(sweep.sys, "executable", str(python))
    monkeypatch.setenv("PYTHONPATH", str(Path(fastkl.__file__).parents[1]))
    name = "fastkl.report.page.write.write_report"
    monkeypatch.setattr(name, lambda folders, output: (output, [str(f) for f in folders]))
    return tmp_path


def calls(folder: Path) -> list:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


@pytest.mark.slow
def test_sweep_runs_every_value_and_compares(stand_in, capsys):
    code, output, _ = run(capsys, "sweep", "--kl-coef", "0", "0.05", "--steps", "7", "--output", str(stand_in / "s"))
    folders = [stand_in / "s" / name for name in ("kl_coef-0", "kl_coef-0.05")]
    assert code == 0
    assert [call[:2] for call in calls(stand_in / "s")] == [[0.0, 7], [0.05, 7]]
    assert [load_config(folder / "config.yaml").output for folder in folders] == list(map(str, folders))
    assert output.splitlines()[-1] == f"sweep: {(stand_in / 's' / 'report.html', list(map(str, folders)))}"


@pytest.mark.slow
def test_sweep_runs_the_product_of_any_settings_in_folders_of_their_own(stand_in, capsys):
    words = ["--vary", "kl-coef", "0", "1", "--vary", "reward", "alliteration", "alliteration,starts_with_a"]
    words += ["--vary", "gradient_checkpointing", "true", "--seed", "7", "--steps", "3"]
    code, output, _ = run(capsys, "sweep", *words, "--output", str(stand_in / "s"))
    assert code == 0
    found = [load_config(path) for path in sorted((stand_in / "s").glob("*/config.yaml"))]
    both = ("alliteration", "starts_with_a")
    assert {(c.kl_coef, c.reward) for c in found} == {(k, r) for k in (0.0, 1.0) for r in (both[:1], both)}
    assert len(found) == 4 and all((c.seed, c.steps, c.gradient_checkpointing) == (7, 3, True) for c in found)
    assert [Path(c.output).name for c in found][:2] == [
        "kl_coef-0-reward-alliteration,starts_with_a-gradient_checkpointing-true",
        "kl_coef-0-reward-alliteration-gradient_checkpointing-true",
    ]
    assert "run 4 of 4, --kl-coef 1 --reward alliteration,starts_with_a --gradient-checkpointing true ->" in output


@pytest.mark.slow
def test_sweep_stops_at_a_failed_run_and_resumes_there(stand_in, capsys):
    config = TrainConfig(output=str(stand_in / "s"), steps=7)
    assert sweep.sweep(config, {"kl_coef": [1.0, 2.0, 4.0]}) == 1
    assert "stopped at run 2 of 3, --kl-coef 2. Go on with the same command and --resume." in capsys.readouterr().err
    (stand_in / "child.py").write_text(CHILD.replace("== 2", "== 99"))
    same_command = f"sweep --kl-coef 1 2 4 --steps 7 --resume --output {stand_in / 's'}"
    code, output, _ = run(capsys, *same_command.split())
    assert code == 0 and "run 1 of 3, --kl-coef 1: finished before" in output
    assert [call[0] for call in calls(stand_in / "s")] == [1.0, 2.0, 2.0, 4.0]
    assert not any("--resume" in call[2] for call in calls(stand_in / "s"))  # neither had a checkpoint


@pytest.mark.slow
def test_sweep_hands_a_run_without_checkpoint_to_resume_which_starts_it_anew(stand_in, capsys):
    (stand_in / "s" / "kl_coef-1").mkdir(parents=True)
    save_config(TrainConfig(kl_coef=1.0), stand_in / "s" / "kl_coef-1" / "config.yaml")
    (stand_in / "s" / "kl_coef-1" / "metrics.jsonl").write_text('{"step": 1}\n')
    code, _, _ = run(capsys, "sweep", "--kl-coef", "1", "--resume", "--output", str(stand_in / "s"))
    assert code == 0 and "--resume" in calls(stand_in / "s")[0][2]


@pytest.mark.slow
def test_sweep_hands_a_signal_on_and_stops(stand_in, capsys):
    def terminate_once_it_runs():
        while not (stand_in / "s" / "calls").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate_once_it_runs, daemon=True).start()
    assert sweep.sweep(TrainConfig(output=str(stand_in / "s"), steps=7), {"kl_coef": [3.0, 1.0]}) == 130
    assert [call[0] for call in calls(stand_in / "s")] == [3.0]
    assert (stand_in / "s" / "kl_coef-3" / "checkpoints" / "step-7").is_dir()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
