"""`fastkl train --nproc N`: torchrun on this machine, by its own functions, with exit codes and words of fastkl.

torchrun itself, for several machines, is `torchrun ... -m fastkl train ...`. Both start processes that find each other
by the environment (start.py). What torchrun says of a process that has failed is left out here, since the first process
has said it, and the exit code is that process's own instead of 1.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

SHUTDOWN_SECONDS = 600
"""What the processes have to finish a step and save it after a signal, before they are killed."""


def launch(num_processes: int, arguments: Sequence[str]) -> int:
    """Runs `python -m fastkl ARGUMENTS` in processes that form a world; returns the exit code of the first that failed,
    of a signal's 130."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    threads = max(1, len(os.sched_getaffinity(0)) // num_processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    options = ["--standalone", "--nproc-per-node", str(num_processes)]
    if "--shutdown-timeout" in run.get_args_parser()._option_string_actions:  # torch 2.13; 30 s before
        options += ["--shutdown-timeout", str(SHUTDOWN_SECONDS)]
    try:
        run.run(run.parse_args([*options, "-m", "fastkl", *arguments]))
    except ChildFailedError as failure:
        _, first = failure.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    except SignalException:
        return 130
    finally:
        sys.stdout.flush()
    return 0
