"""Makes the helpers in this folder importable; skips tests whose mark names something that is not here; puts the files
that take longest first."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

LONGEST = (
    *("distributed/test_processes.py", "kernels/test_triton.py", "training/test_faults.py"),
    *("distributed/test_launch.py", "evaluation/test_in_a_run.py", "integrations/test_trl.py"),
    *("training/test_resume.py", "rollout/test_generators.py", "kernels/test_vocab_group.py"),
)
"""Files that start first: several processes share the files, and a long one that came last would keep one of them busy
alone."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked vllm without vLLM, and those marked gpu without an NVIDIA GPU. LONGEST comes first, then
    the files that have slow tests, then those whose tests are all quick."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    longest = {HERE / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (longest.get(item.path, len(longest)), item.path not in slow))
    for mark, here, reason in (
        ("vllm", lambda: find_spec("vllm") is not None, "vLLM is not installed"),
        ("gpu", has_gpu, "there is no NVIDIA GPU"),
    ):
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and not here():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_collection_finish(session: pytest.Session) -> None:
    """Tells the server that processes are forked from (several_processes.py) whether several of them will need vLLM;
    leaves what has been imported out of every later search for garbage."""
    import gc

    several = any(item.get_closest_marker("vllm") and item.get_closest_marker("long") for item in session.items)
    if several and find_spec("vllm") is not None and not has_gpu():
        from several_processes import CONTEXT

        CONTEXT.set_forkserver_preload(["warm", "warm_vllm"])
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    import gc

    gc.unfreeze()  # or Triton's bindings complain of what is left at the end


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and torch.version.cuda is not None
