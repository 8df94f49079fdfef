"""The command line: `fastkl COMMAND ...`.

Every command is a function that adds its options and one that runs it; `COMMANDS` lists them. What a command needs is
imported when it runs, so that `fastkl --help` and every error in the settings come at once. A user's mistake
(UserError) ends in one line on standard error and exit code 2, a run that had to stop in 1, an interruption in 130.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import fastkl
from fastkl.config import CHOICES, TrainConfig, check_config, check_run_folder, nearest
from fastkl.configfile import field_help, field_types, load_config, why_not, with_settings
from fastkl.errors import UserError

EXTRAS = {  # which extra brings the packages that the commands import
    **dict.fromkeys(("datasets", "jinja2", "markupsafe", "numpy", "rich", "safetensors"), "train"),
    **dict.fromkeys(("tensorboard", "tokenizers", "transformers", "yaml"), "train"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    try:
        tokens = dashed(sys.argv[1:] if argv is None else argv)
        check_command(tokens)
        arguments, unknown = build_parser().parse_known_args(tokens)
        if unknown:
            raise UserError(unknown_argument(unknown, arguments.parser))
        return arguments.run(arguments) or 0
    except UserError as mistake:
        print(f"fastkl: {mistake}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as missing:
        extra = EXTRAS.get((missing.name or "").partition(".")[0])
        if extra is None:
            raise
        print(f"fastkl: {missing.name} is not installed; pip install 'fastkl[{extra}]' brings it.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, say `head`, has seen enough
        sys.stdout = None  # type: ignore[assignment]  # or the interpreter would try to flush it
        return 0


class Parser(argparse.ArgumentParser):
    """argparse with errors as UserError and a help screen as wide as is good to read."""

    def __init__(self, **options: Any) -> None:
        width = min(shutil.get_terminal_size().columns - 2, 118)
        options.setdefault("formatter_class", lambda prog: HelpFormatter(prog, max_help_position=36, width=width))
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see `{self.prog} --help`)")


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the line breaks of descriptions, and all help texts in one column."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, **options)
        self._action_max_length = 16  # argparse's own count forgets that commands are indented


def build_parser() -> Parser:
    """The parser of `fastkl`, with one sub-parser for each command."""
    parser = Parser(prog="fastkl", description=(fastkl.__doc__ or "").partition("\n")[0])
    parser.add_argument("--version", action="version", version=f"fastkl {fastkl.__version__}")
    parser.set_defaults(parser=parser, run=lambda arguments: parser.print_help())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=Parser)
    for name, add, run, summary in COMMANDS:
        command = commands.add_parser(name, help=summary, description=f"{summary}.")
        command.set_defaults(parser=command, run=run)
        add(command)
    return parser


def dashed(argv: Sequence[str]) -> list[str]:
    """--kl_coef is --kl-coef."""
    names = [token.partition("=") for token in argv]
    return [
        name.replace("_", "-") + equals + value if name.startswith("--") else name + equals + value
        for name, equals, value in names
    ]


def check_command(tokens: Sequence[str]) -> None:
    """UserError if the first token is neither an option nor a command."""
    known = [name for name, *_ in COMMANDS]
    if tokens and not tokens[0].startswith("-") and tokens[0] not in known:
        raise UserError(f"there is no command {tokens[0]!r}.{nearest(tokens[0], known)} Commands: {', '.join(known)}.")


def unknown_argument(unknown: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """The message for arguments that no option claims."""
    option = next((token for token in unknown if token.startswith("-")), None)
    if option is None:
        return f"unexpected argument {unknown[0]!r} (see `{parser.prog} --help`)"
    name = option.partition("=")[0]
    known = [known for action in parser._actions for known in action.option_strings]
    reason = why_not(name.removeprefix("--").replace("-", "_")) or nearest(name, known)
    return f"{parser.prog} has no option {name}.{reason} `{parser.prog} --help` lists them."


def add_settings(parser: argparse.ArgumentParser, defaults: TrainConfig, *, without: Sequence[str] = ()) -> None:
    """One option for each field of TrainConfig, under the headings of config.py, and --config."""
    parser.usage = f"{parser.prog} [OPTION ...]"
    parser.add_argument("--config", metavar="FILE", type=Path, help="YAML file with any of these settings; options win")
    groups: dict[str, Any] = {}
    for name, help_ in field_help().items():
        if name in without:
            continue
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


# train ----------------------------------------------------------------------------------------------------------------


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
    from fastkl.sync import StaleEngineError
    from fastkl.train import Diverged, train

    try:
        train(config)
    except (Diverged, StaleEngineError) as stop:
        print(f"fastkl: {stop}", file=sys.stderr)
        return 1
    return 0


# sweep ----------------------------------------------------------------------------------------------------------------

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
    from fastkl.sweep import sweep

    given = {name: value for name, value in vars(arguments).items() if name in field_types()}
    config = load_config(arguments.config, SWEEP_DEFAULTS) if arguments.config else SWEEP_DEFAULTS
    config = with_settings(config, given)
    return sweep(config, [with_settings(config, {"kl_coef": value}).kl_coef for value in arguments.values])


# report, storyteller --------------------------------------------------------------------------------------------------


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
    from fastkl.report import write_report

    print(write_report(arguments.folders, arguments.output))
    return 0


def add_doctor(parser: argparse.ArgumentParser) -> None:
    """Options of `fastkl doctor`."""
    from fastkl import doctor

    parser.description = "\n".join((doctor.__doc__ or "").splitlines())
    parser.add_argument("path", metavar="RUN|FILE.jsonl", nargs="?", type=Path, help="run folder, or rollouts")
    parser.add_argument("--table", action="store_true", help="compute the table of docs/negative-kl.md instead")


def run_doctor(arguments: argparse.Namespace) -> int:
    """`fastkl doctor`: exit code 1 where the estimate is significantly negative."""
    if arguments.table:
        from fastkl.negative_kl import table

        print(table())
        return 0
    if arguments.path is None:
        raise UserError("doctor: name a run folder or a JSONL file of rollouts (or --table).")
    from fastkl.doctor import diagnose

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
    from fastkl.storyteller.make import make_storyteller

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
    from fastkl import bench

    bench.run_bench(arguments.output, budget_s=arguments.budget)
    return 0


Command = tuple[str, Callable[[argparse.ArgumentParser], None], Callable[[argparse.Namespace], int], str]
COMMANDS: tuple[Command, ...] = (
    ("train", add_train, run_train, "Train a model"),
    ("sweep", add_sweep, run_sweep, "Train once for each of several KL coefficients, and compare"),
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
