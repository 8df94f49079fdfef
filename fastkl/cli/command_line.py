"""The command line: `fastkl COMMAND ...`.

The commands themselves are in commands.py. A user's mistake (UserError) ends in one line on standard error and exit
code 2, a run that had to stop in 1, an interruption in 130.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import fastkl
from fastkl.cli.commands import COMMANDS
from fastkl.config.files import why_not
from fastkl.errors import UserError, nearest

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
        sys.stdout = None  # or the interpreter would try to flush it
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
