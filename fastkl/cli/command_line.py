"""The command line: `fastkl COMMAND ...`.

The commands themselves are in commands.py; Cyclopts reads their options. A user's mistake ends in one line on standard
error and exit code 2, a run that had to stop in 1, an interruption in 130.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from fastkl.distributed.world import AGREED
from fastkl.errors import UserError, nearest, printable

EXTRAS = {  # which extra brings the packages that the commands import
    **dict.fromkeys(
        ("cyclopts", "datasets", "docstring_parser", "httpx", "jinja2", "markupsafe", "numpy", "rich"), "train"
    ),
    **dict.fromkeys(("safetensors", "tensorboard", "tokenizers", "transformers", "yaml"), "train"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    try:
        return run(list(sys.argv[1:] if argv is None else argv))
    except UserError as mistake:
        if getattr(mistake, AGREED, False) and os.environ.get("RANK", "0") != "0":
            return 2  # the first process says it
        print(f"fastkl: {printable(str(mistake))}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as missing:
        extra = EXTRAS.get((missing.name or "").partition(".")[0])
        if extra is None:
            raise
        print(f"fastkl: {missing.name} is not installed; pip install 'fastkl[{extra}]' brings it.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output, for example `head`, has closed it
        sys.stdout = None  # otherwise the interpreter would try to flush it
        return 0


def run(tokens: list[str]) -> int:
    """Runs one command. UserError for arguments that it does not understand."""
    from cyclopts import CycloptsError

    from fastkl.cli.commands import app

    if tokens[:1] == ["help"]:  # fastkl help COMMAND
        tokens = [*tokens[1:2], "--help"]
    known = [name for name in app if not name.startswith("-")]
    if tokens and not tokens[0].startswith("-") and tokens[0] not in known:
        raise UserError(f"there is no command {tokens[0]!r}.{nearest(tokens[0], known)} Commands: {', '.join(known)}.")
    try:
        return app(tokens) or 0
    except CycloptsError as mistake:
        raise UserError(in_one_line(mistake, f"fastkl {tokens[0]}" if tokens[0] in known else "fastkl")) from mistake


def in_one_line(mistake: Exception, command: str) -> str:
    """What is wrong with the arguments, and what to do."""
    from cyclopts import exceptions as e

    from fastkl.cli.commands import app
    from fastkl.cli.foreign import answer, nearest_answer
    from fastkl.sampling.rules import why_rejected

    def known() -> list[str]:
        return [name for argument in app[command.split()[-1]].assemble_argument_collection() for name in argument.names]

    if isinstance(mistake, e.UnknownOptionError):
        option = (mistake.token.keyword or mistake.token.value).partition("=")[0]
        names = known()
        why = why_rejected(option.lstrip("-").replace("-", "_")) or answer(option, names)
        why = why or nearest(option, names) or nearest_answer(option, names)
        return f"{command} has no option {option}.{why} `{command} --help` lists them."
    if isinstance(mistake, e.UnusedCliTokensError):
        surplus = (mistake.unused_tokens or ["?"])[0]
        why = answer(surplus.partition("=")[0], known())  # verl's key=value
        return f"unexpected argument {surplus!r}.{why} `{command} --help` lists what there is."
    if isinstance(mistake, e.MissingArgumentError) and mistake.argument:
        return f"{mistake.argument.name} needs a value (see `{command} --help`)."
    assert isinstance(mistake, e.CycloptsError)
    mistake.verbose = False
    return f"{' '.join(str(mistake).split())} (see `{command} --help`)"
