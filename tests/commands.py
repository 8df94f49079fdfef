"""Runs `fastkl ...` in a process of its own that is forked from one which has imported everything and computed nothing:
it begins in a tenth of a second, where `python -m fastkl` spends ten seconds of the processor on imports."""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from several_processes import CONTEXT, begin

FASTKL = "import sys; from fastkl.cli import main; sys.exit(main(sys.argv[1:]))"


@dataclass
class Done:
    """What a command came to; minus a signal's number is the code of one that was killed."""

    returncode: int
    stdout: str
    stderr: str


def _work(script: str, arguments: list[str], environment: dict[str, str], outputs: list[str]) -> None:
    assert "warm" in sys.modules
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 (as long as the process lasts)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = ["fastkl", *arguments]
    exec(compile(script, "<command>", "exec"), {"__name__": "__main__"})


class Running:
    """A command under way: `fastkl` with these arguments, or another script. Its standard output goes to `stdout`, a
    file of its own where none is given."""

    def __init__(self, *arguments: str, script: str = FASTKL, stdout: str | None = None) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.outputs = [stdout or f"{self.folder.name}/out", f"{self.folder.name}/err"]
        self.process: Any = CONTEXT.Process(
            target=_work, args=(script, list(arguments), dict(os.environ), self.outputs)
        )
        begin(self.process)

    def poll(self) -> int | None:
        return self.process.exitcode

    def said(self) -> str:
        """Its standard output and error so far."""
        return "".join(Path(path).read_text() for path in self.outputs if Path(path).is_file())

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def done(self, timeout: float = 300) -> Done:
        """Waits for the end."""
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            self.kill()
        said = [Path(path).read_text() if path.startswith(self.folder.name) else "" for path in self.outputs]
        assert code is not None, f"the command had not ended after {timeout} s:\n{said[1][-2000:]}"
        return Done(code, *said)


def run(*arguments: str, timeout: float = 300, **options: Any) -> Done:
    """What `fastkl` with these arguments comes to."""
    return Running(*arguments, **options).done(timeout)
