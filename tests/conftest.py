"""Makes the helpers in this folder importable; skips tests whose mark names something that is not here."""

import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips the tests marked vllm without vLLM, and those marked gpu without an NVIDIA GPU."""
    for mark, here, reason in (
        ("vllm", lambda: find_spec("vllm") is not None, "vLLM is not installed"),
        ("gpu", has_gpu, "there is no NVIDIA GPU"),
    ):
        marked = [item for item in items if item.get_closest_marker(mark)]
        if marked and not here():
            for item in marked:
                item.add_marker(pytest.mark.skip(reason=reason))


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available() and torch.version.cuda is not None
