"""The commands of `fastkl`: for each, a function that adds its options and one that runs it; COMMANDS lists them.

What a command needs is imported when it runs, so that `fastkl --help` and every error in the settings come at once.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastkl.config.files import field_help, field_types, load_config, with_settings
from fastkl.config.settings import CHOICES, TrainConfig, check_config
from fastkl.errors import UserError
from fastkl.training.run_folder import check_run_folder


def add_settings(parser: argparse.ArgumentParser, defaults: TrainConfig, *, without: Sequence[str] = ()) -> None:
    """One option for each field of TrainConfig, under the headings of config.py, and --config."""
    parser.usage = f"{parser.prog} [OPTION ...]"
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML file with any of these settings; options win")
    add_fields(parser, [name for name in field_help() if name not in without], defaults)


def add_fields(parser: argparse.ArgumentParser, names: Iterable[str], defaults: TrainConfig) -> None:
    """One option for each of these fields of TrainConfig, under the headings of config.py."""
    groups: dict[str, Any] = {}
    for name in names:
        help_ = field_help()[name]
        if help_.group not in groups:
            groups[help_.group] = parser.add_argument_group(help_.group)
        groups[help_.group].add_argument(
            f"--{name.replace('_', '-')}",
            dest=name,
            default=argparse.SUPPRESS,
            help=help_.text.replace("%", "%%") + default_note(getattr(defaults, name)),
            **value_options(name),
        )


def value_options(name: str) -> dict[str, Any]:
    """What argparse is told about a setting's value. It stays text here; configfile.py gives it its type."""
    kind = field_types()[name]
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if kind is str:
        return {"metavar": "|".join(CHOICES[name]) if name in CHOICES else "TEXT"}
    if kind in (int, float):
        return {"metavar": "N" if kind is int else "X"}
    return {"metavar": "NAME" if kind == tuple[str, ...] else "X", "nargs": "+", "action": "extend"}


def default_note(value: Any) -> str:
    """ " [0.5]" for the help screen; nothing for switches and for None."""
    if value is None or isinstance(value, bool):
        return ""
    return f" [{' '.join(map(str, value)) if isinstance(value, tuple) else value}]"


def settings_of(arguments: argparse.Namespace, defaults: TrainConfig) -> TrainConfig:
    """The defaults, then with --resume the run's own config.yaml, then --config, then the options."""
    given = {name: value for name, value in vars(arguments).items() if name in field_types()}
    config = defaults
    if given.get("resume"):
        folder = Path(given.get("output") or _output_of(arguments.config, defaults)).expanduser()
        if (folder / "config.yaml").is_file():
            config = load_config(folder / "config.yaml", config)
            config = replace(config, output=str(folder))
    if arguments.config:
        config = load_config(arguments.config, config)
    return with_settings(config, given)


def _output_of(config_file: Path | None, defaults: TrainConfig) -> str:
    return load_config(config_file, defaults).output if config_file else defaults.output


def add_train(parser: argparse.ArgumentParser) -> None:
    """Options of `fastkl train`."""
    parser.description = (
        f"{parser.description} Without options: the embedded main job, a story model that learns to alliterate.\n"
        "Settings come from the defaults [in brackets], then from --config, then from options; with --resume, the\n"
        "run's own config.yaml takes the place of the defaults."
    )
    add_settings(parser, TrainConfig())


def run_train(arguments: argparse.Namespace) -> int:
    """`fastkl train`."""
    config = settings_of(arguments, TrainConfig())
    check_config(config)
    check_run_folder(config)
    from fastkl.rollout.agreement import StaleEngineError
    from fastkl.training.loop import Diverged, train

    try:
        train(config)
    except (Diverged, StaleEngineError) as stop:
        print(f"fastkl: {stop}", file=sys.stderr)
        return 1
    return 0


SWEEP_DEFAULTS = TrainConfig(output="runs/sweep")


def add_sweep(parser: argparse.ArgumentParser) -> None:
    """Options of `fastkl sweep`."""
    parser.description = (
        f"{parser.description} Each run has its folder, OUTPUT/kl_coef-VALUE, and OUTPUT/report.html compares them.\n"
        "Options are those of `fastkl train`. A sweep that was stopped goes on with the same command and --resume."
    )
    parser.add_argument("--kl-coef", dest="values", metavar="X", nargs="+", required=True, help="the values of beta")
    add_settings(parser, SWEEP_DEFAULTS, without=("kl_coef",))


def run_sweep(arguments: argparse.Namespace) -> int:
    """`fastkl sweep`."""
    from fastkl.training.sweep import sweep

    given = {name: value for name, value in vars(arguments).items() if name in field_types()}
    config = load_config(arguments.config, SWEEP_DEFAULTS) if arguments.config else SWEEP_DEFAULTS
    config = with_settings(config, given)
    return sweep(config, [with_settings(config, {"kl_coef": value}).kl_coef for value in arguments.values])


SCORE_FIELDS = (
    *("temperature", "top_k", "top_p", "min_p", "min_tokens", "banned_token_ids", "allowed_token_ids"),
    *("dtype", "device"),
)
"""The settings that scoring shares with training."""


def add_score(parser: argparse.ArgumentParser) -> None:
    """Options of `fastkl score`."""
    source = Path(__file__).parents[1].joinpath("score_files", "command.py").read_text(encoding="utf-8")
    parser.description = ast.get_docstring(ast.parse(source))  # importing it would import torch
    parser.add_argument("input", metavar="FILE.jsonl", help='completions, one per line; "-" reads standard input')
    parser.add_argument("--model", metavar="NAME", required=True, help="the policy: a local folder or a hub id")
    parser.add_argument("--reference", metavar="NAME", help="the reference; without it, no KL is computed")
    parser.add_argument(
        "--output", metavar="FILE", help='the scores; "-" for standard output [FILE.scores.jsonl beside the input]'
    )
    parser.add_argument("--resume", action="store_true", help="continue the output where it ends")
    parser.add_argument(
        "--skip-malformed", action="store_true", help="report lines that cannot be scored and go on, instead of ending"
    )
    parser.add_argument(
        "--batch-tokens", metavar="N", type=int, default=4096, help="tokens per forward, prompts included [4096]"
    )
    add_fields(parser, SCORE_FIELDS, TrainConfig())


def run_score(arguments: argparse.Namespace) -> int:
    """`fastkl score`."""
    given = {name: value for name, value in vars(arguments).items() if name in SCORE_FIELDS}
    shared = with_settings(TrainConfig(), given)
    from fastkl.score_files.command import ScoreConfig, score_file

    names = ("input", "model", "reference", "output", "batch_tokens", "skip_malformed", "resume")
    score_file(ScoreConfig(**{name: getattr(arguments, name) for name in names}, shared=shared))
    return 0


def add_report(parser: argparse.ArgumentParser) -> None:
    """Options of `fastkl report`."""
    parser.add_argument("folders", metavar="DIR", nargs="+", type=Path, help="run folder; several are compared")
    parser.add_argument(
        "--output", metavar="FILE", type=Path, help="the page [report.html in the run's folder, or beside the runs]"
    )


def run_report(arguments: argparse.Namespace) -> int:
    """`fastkl report`."""
    for folder in arguments.folders:
        if not folder.is_dir():
            raise UserError(f"report: there is no run folder {str(folder)!r}.")
    from fastkl.report.page import write_report

    print(write_report(arguments.folders, arguments.output))
    return 0


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Options of `fastkl doctor`."""
    from fastkl.audit import doctor

    parser.description = "\n".join((doctor.__doc__ or "").splitlines())
    parser.add_argument("path", metavar="RUN|FILE.jsonl", nargs="?", type=Path, help="run folder, or rollouts")
    parser.add_argument("--table", action="store_true", help="compute the table of docs/negative-kl.md instead")


def run_doctor(arguments: argparse.Namespace) -> int:
    """`fastkl doctor`: exit code 1 where the estimate is significantly negative."""
    if arguments.table:
        from fastkl.audit.negative_kl import table

        print(table())
        return 0
    if arguments.path is None:
        raise UserError("doctor: name a run folder or a JSONL file of rollouts (or --table).")
    from fastkl.audit.doctor import diagnose

    diagnosis = diagnose(arguments.path)
    print(diagnosis.text())
    return int(diagnosis.negative)


def add_storyteller(parser: argparse.ArgumentParser) -> None:
    """Options of `fastkl storyteller`."""
    parser.add_argument("--output", metavar="DIR", type=Path, required=True, help="where model and tokenizer go")
    parser.add_argument("--seed", metavar="N", type=int, default=0, help="another seed, another model [0]")


def run_storyteller(arguments: argparse.Namespace) -> int:
    """`fastkl storyteller`."""
    if arguments.output.exists() and not arguments.output.is_dir():
        raise UserError(f"output: {str(arguments.output)!r} is a file, not a folder; choose another --output.")
    try:
        from tools.storyteller.make import make_storyteller
    except ModuleNotFoundError as missing:
        if str(missing.name).partition(".")[0] != "tools":
            raise
        raise UserError("storyteller: needs a checkout of the repository; a wheel holds the finished model.") from None

    make_storyteller(arguments.output, seed=arguments.seed)
    return 0


def add_bench(parser: argparse.ArgumentParser) -> None:
    """Options of `fastkl bench`."""
    parser.add_argument(
        "--output", metavar="DIR", type=Path, default=Path("runs/bench"), help="bench.json and pictures [runs/bench]"
    )
    parser.add_argument(
        "--budget", metavar="S", type=float, default=150.0, help="seconds after which no row starts [150]"
    )


def run_bench(arguments: argparse.Namespace) -> int:
    """`fastkl bench`."""
    from fastkl.microbench import run

    run.run_bench(arguments.output, budget_s=arguments.budget)
    return 0


Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int], str]


COMMANDS: tuple[Command, ...] = (
    ("train", add_train, run_train, "Train a model"),
    ("sweep", add_sweep, run_sweep, "Train once for each of several KL coefficients, and compare"),
    ("score", add_score, run_score, "Score completions under a policy and a reference, from JSONL to JSONL"),
    ("report", add_report, run_report, "Write one self-contained HTML page about one run or several"),
    ("doctor", add_doctor, run_doctor, "Audit the KL of a run or of another trainer's rollouts"),
    (
        "bench",
        add_bench,
        run_bench,
        "Time the scoring operators against their floors and peers, as this machine allows",
    ),
    ("storyteller", add_storyteller, run_storyteller, "Remake the embedded model"),
)
