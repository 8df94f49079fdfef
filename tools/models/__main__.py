"""`python -m tools.models`: the sweep over all causal architectures, and docs/models.md.

Every architecture is tried in a process of its own, which ends at the time limit; one that crashes is a row, too. The
page is rewritten when all have been tried and none does worse than its row in the page that is there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import sys
import time
from collections.abc import Iterable, Iterator
from multiprocessing.connection import Connection, wait

from tools.models.page import PAGE, page, rows_of, worse
from tools.models.tiny import kinds
from tools.models.trial import Row, attempt


def main() -> int:
    """0: no architecture does worse than before; 1: one does."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    from fastkl.scoring.models import quiet_transformers

    options = arguments()
    quiet_transformers()
    torch.set_num_threads(1)  # a fork has no other threads
    before = {row.kind: row for row in rows_of(PAGE.read_text())} if PAGE.exists() else {}
    tried = {}
    for row in sweep(options.kinds or kinds(), options.workers, options.limit):
        tried[row.kind] = row
        print(f"{len(tried):3} {row.line()}", flush=True)
    lost = [row.kind for row in tried.values() if worse(row, before.get(row.kind))]
    lost += [] if options.kinds else sorted(set(before) - set(tried))
    if lost and not options.accept:
        print(f"Worse than in {PAGE}: {', '.join(lost)}. --accept writes it down.", file=sys.stderr)
        return 1
    if not options.kinds:
        PAGE.write_text(page(tried.values()))
        print(f"{PAGE} is written.")
    return 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m tools.models", description=__doc__)
    parser.add_argument("kinds", nargs="*", help="model types of transformers; without any, all, and the page")
    parser.add_argument("--workers", type=int, default=2, help="processes at a time (2)")
    parser.add_argument("--limit", type=float, default=120.0, help="seconds for an architecture (120)")
    parser.add_argument("--accept", action="store_true", help="write the page even if something is worse")
    return parser.parse_args()


def sweep(wanted: Iterable[str], workers: int, limit: float) -> Iterator[Row]:
    """A row for each model type, as they come.

    The processes are forks of this one, which has tried one model already: what they need is imported by then.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        attempt("llama")
    waiting, running = list(wanted), {}
    while waiting or running:
        while waiting and len(running) < workers:
            kind = waiting.pop(0)
            running[kind] = Trial(kind, limit)
        wait([trial.results for trial in running.values()], timeout=0.2)
        for kind, trial in list(running.items()):
            if (row := trial.row()) is not None:
                del running[kind]
                yield row


class Trial:
    """One model type in a process of its own."""

    def __init__(self, kind: str, limit: float) -> None:
        forks = multiprocessing.get_context("fork")
        self.kind, self.limit, self.start = kind, limit, time.monotonic()
        self.results, answer = forks.Pipe(duplex=False)
        self.process = forks.Process(target=_attempt, args=(kind, answer))
        self.process.start()
        answer.close()  # so that reading ends with the process

    def row(self) -> Row | None:
        """What has come out; None while it runs."""
        if self.results.poll():
            return self._end(self._received())
        if time.monotonic() - self.start > self.limit:
            return self._end(f"took longer than {self.limit:g} s")
        return None

    def _received(self) -> Row | str:
        try:
            return self.results.recv()
        except EOFError:
            self.process.join()
            return f"the process ended with {self.process.exitcode}"

    def _end(self, found: Row | str) -> Row:
        self.process.kill()
        self.process.join()
        if isinstance(found, Row):
            return found
        return Row(self.kind, kinds()[self.kind], "fails", sentence=found, seconds=time.monotonic() - self.start)


def _attempt(kind: str, answer: Connection) -> None:
    with open(os.devnull, "w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        os.dup2(nowhere.fileno(), 1)
        answer.send(attempt(kind))


if __name__ == "__main__":
    sys.exit(main())
