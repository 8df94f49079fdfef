"""`python -m tools.faults`: injects faults into small training runs, for real, and says what came of each.

Ends with 1 if anything came out wrong, and names the trial, its moment and the command that repeats it. The moment of a
kill is the same with the same seed, but what the machine is doing then may not be.
"""

from __future__ import annotations

import os

os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")  # a process with threads should not fork
os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from tools.faults import damage, disks, folders, interruptions, runs, server_kills, servers, table
from tools.faults.fault import Bench, Row

FAULTS: dict[str, Callable[[Bench], Row | Iterable[Row]]] = {
    "kills": interruptions.kills,
    "signals": interruptions.signal_pairs,
    "file-limit": disks.file_limit,
    "small-disk": disks.small_disk,
    "processes": folders.two_processes,
    "flips": damage.flips,
    "files": damage.changed_files,
    "all-damaged": damage.both_damaged,
    "trainer-kills": servers.trainer_kills,
    "server-kills": server_kills.server_kills,
    "wide-server-kills": server_kills.wide_server_kills,
}


def main() -> int:
    """Runs the faults; the exit code."""
    options = parser().parse_args()
    if options.write and (options.quick or options.trial is not None):
        sys.exit("faults: --write is for whole rows; leave out --quick and --trial.")
    folder = Path(tempfile.mkdtemp(prefix="fastkl-faults-", dir=options.folder))
    runs.import_everything()
    bench = Bench.prepared(folder, options.seed, options.quick, options.trial, options.times)
    rows = []
    for name in options.only or FAULTS:
        start = time.monotonic()
        outcome = FAULTS[name](bench)
        for row in [outcome] if isinstance(outcome, Row) else outcome:
            row.name, row.minutes, start = name, (time.monotonic() - start) / 60, time.monotonic()
            rows.append(row.as_dict())
            print(table.line(rows[-1]), flush=True)
            for failure in row.failures[:20]:
                trial = failure.removeprefix("trial ").partition(",")[0]
                print(f"    {failure}")
                print(f"    again: python -m tools.faults --seed {options.seed} --only {name} --trial {trial}")
    failed = any(row["failures"] for row in rows)
    if failed:
        print(f"The runs that came out wrong are in {folder}.", file=sys.stderr)
    else:
        shutil.rmtree(folder)
    if options.write:
        from fastkl.microbench.measure import machine

        table.write(machine(), options.seed, rows, [*FAULTS])
    return int(failed)


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(prog="python -m tools.faults", description=__doc__, allow_abbrev=False)
    made.add_argument("--seed", type=int, default=0, help="all random choices derive from it [0]")
    made.add_argument("--only", nargs="+", choices=FAULTS, metavar="NAME", help=f"some of {', '.join(FAULTS)}")
    made.add_argument("--trial", type=int, help="only the trial of this number")
    made.add_argument("--times", type=int, default=0, help="how often each fault is injected [as the table says]")
    made.add_argument("--quick", action="store_true", help="a miniature: two kills, a pair of signals, 15 flips ...")
    made.add_argument("--write", action="store_true", help="put the rows into docs/reliability.md")
    made.add_argument("--folder", type=Path, help="where the runs go while they last [the system's temporary folder]")
    return made


if __name__ == "__main__":
    sys.exit(main())
