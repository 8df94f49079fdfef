"""Two processes in one run folder."""

from __future__ import annotations

import time

from tools.faults import runs
from tools.faults.fault import Bench, Row


def two_processes(bench: Bench) -> Row:
    """A second start, or a --resume, while a run has the folder: one trains, the other is told who does."""
    row = Row("two processes in one folder", "a second start within 0.3 s, or --resume at any moment of the run")
    for trial in bench.trials(bench.times(12, 2)):
        rng, output = bench.random("processes", trial), bench.output("processes", trial)
        resume = bool(trial % 2)
        moment_s = rng.random() * (bench.duration_s * 0.9 if resume else 0.3)
        first = runs.train(output)
        first.until(moment_s)
        while resume and not (output / "config.yaml").is_file() and first.code is None:
            first.wait(0.01)
        second = runs.train(output, *["--resume"] * resume)
        ended = [child.wait() for child in (first, second)]
        row.runs += 1
        codes = sorted(child.code for child in (first, second) if child.code is not None)
        told = any(
            f"process {winner.pid} is training in" in loser.text for winner, loser in ((first, second), (second, first))
        )
        # the second may come when the first is over: the folder holds a run then, and nothing is left to resume
        late = "holds another run" in second.text or (resume and codes == [0, 0])
        wrong = [] if all(ended) else ["a process does not end"]
        wrong += [] if codes == [0, 2] or (late and resume) else [f"exit codes {codes}"]
        wrong += [] if told or late else ["nobody is told who has the folder"]
        wrong += runs.damaged_beyond_one_line(second, (0, 2)) or runs.differences(output, bench.whole)
        row.failed(trial, f"{'--resume' if resume else 'started again'} after {moment_s:.3f} s", wrong)
        if not wrong:
            bench.clear(output)
        time.sleep(0)
    row.outcome = "one trains, the other ends with 2 and the first one's process number; the run is bit for bit whole"
    return row
