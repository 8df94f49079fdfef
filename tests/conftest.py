"""Makes the helpers in this folder importable; skips tests whose mark names something that is not here; divides the
tests among workers where pytest-xdist runs them."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.hookimpl(tryfirst=True)  # pytest-xdist reads the groups when its own turn comes
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips the tests marked vllm without vLLM, and those marked gpu without an NVIDIA GPU; groups all for workers."""
    if config.pluginmanager.hasplugin("xdist"):
        group_for_workers(items)
    for mark, here, reason in (
        ("vllm", lambda: find_spec("vllm") is not None, "vLLM is not installed"),
        ("gpu", has_gpu, "there is no NVIDIA GPU"),
    ):
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and not here():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def group_for_workers(items: list[pytest.Item]) -> None:
    """A file's tests stay together, since they share fixtures; so do all files with tests of vLLM, which come first:
    two engines at a time would take each other's cores."""
    with_vllm = {item.path for item in items if item.get_closest_marker("vllm")}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("vllm" if item.path in with_vllm else str(item.path)))
    items.sort(key=lambda item: item.path not in with_vllm)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and torch.version.cuda is not None
