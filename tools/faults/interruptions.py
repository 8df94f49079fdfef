"""Kills and signals at random moments of a run, which is then ended with --resume."""

from __future__ import annotations

import signal
from collections import Counter
from pathlib import Path

from tools.faults import runs
from tools.faults.fault import Bench, Row

POLITE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
KILLED_AGAIN = 0.3  # share of the resumed runs


def kills(bench: Bench) -> Row:
    """SIGKILL at a random moment from the first import to the last line, now and then once more after --resume."""
    row = Row("SIGKILL at a random moment", "kill -9 at a uniform moment of the run, 3 in 10 again after --resume")
    when: Counter[str] = Counter()
    for trial in bench.trials():
        if row.runs >= (wanted := bench.times(100, 2)):
            break
        rng, output = bench.random("kills", trial), bench.output("kill", trial)
        save_every = ("--save-every", str(rng.choice((1, 2, 3))))
        moments, more = [], save_every
        while not moments or (row.runs < wanted and rng.random() < KILLED_AGAIN):
            moment_s = rng.random() * bench.duration_s
            child = runs.train(output, *more)
            if child.until(moment_s):
                break  # it was over already
            when[_phase(output)] += 1
            child.send(signal.SIGKILL)
            child.wait()
            row.runs += 1
            moments.append(f"{moment_s:.3f} s")
            more = (*save_every, *(["--resume"] * (output / "config.yaml").is_file()))
        if not moments:
            bench.clear(output)
            continue
        child = runs.gone_on(output, *save_every)
        wrong = runs.damaged_beyond_one_line(child, (0,)) or runs.differences(output, bench.whole)
        row.failed(trial, f"killed after {', '.join(moments)}", wrong)
        if not wrong:
            bench.clear(output)
    row.outcome = "ends bit for bit like an uninterrupted run; killed " + ", ".join(
        f"{count} × {phase}" for phase, count in sorted(when.items())
    )
    return row


def _phase(output: Path) -> str:
    """What a run is doing."""
    if list((output / "checkpoints").glob(".*.partial")):
        return "in a save"
    return "in a step" if runs.steps_logged(output) else "before step 1 was complete"


def signal_pairs(bench: Bench) -> Row:
    """Two of SIGINT, SIGTERM and SIGHUP, 0 to 40 ms apart: the second one interrupts."""
    row = Row("two signals at a random moment", "two of SIGINT, SIGTERM, SIGHUP, 0 to 40 ms apart, then --resume")
    codes: Counter[str] = Counter()
    for trial in bench.trials():
        if row.runs >= bench.times(45, 1):
            break
        rng, output = bench.random("signals", trial), bench.output("signals", trial)
        save_every = ("--save-every", str(rng.choice((0, 1, 3))))
        first, second = rng.choice(POLITE), rng.choice(POLITE)
        moment_s, gap_s = rng.random() * bench.duration_s, rng.random() * 0.04
        child = runs.train(output, *save_every)
        if child.until(moment_s):
            bench.clear(output)
            continue  # it was over already
        child.send(first)
        child.until(moment_s + gap_s)
        child.send(second)
        row.runs += 1
        wrong = [] if child.wait() else ["it does not end"]
        logged = runs.steps_logged(output)
        # before the first step, and after the last, a signal ends any process as the system does
        outside = (-first, -second) if not logged or logged == runs.STEPS else ()
        wrong += runs.damaged_beyond_one_line(child, (0, 130, *outside))
        codes["stopped (130)" if child.code == 130 else "over already (0)" if child.code == 0 else "set-up"] += 1
        child = runs.gone_on(output, *save_every)
        wrong += runs.damaged_beyond_one_line(child, (0,)) or runs.differences(output, bench.whole)
        moment = f"{first.name} after {moment_s:.3f} s, {second.name} {gap_s * 1e3:.1f} ms later"
        row.failed(trial, moment, wrong)
        if not wrong:
            bench.clear(output)
    row.outcome = "ends bit for bit like an uninterrupted run, no line of the logs lost; " + ", ".join(
        f"{count} × {what}" for what, count in sorted(codes.items())
    )
    return row
