"""Seconds of a push of weights to a server, over the network and through the folder, one after the other:

    python -m bench.pushes                          the embedded model
    python -m bench.pushes --model FOLDER_OR_ID

Starts `fastkl serve` on this machine, in float32, pushes the model's weights and slightly changed ones in turn, each in
both ways, and compares what vLLM then says its parameters' checksums are. The first push in each way does not count.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import torch

from bench.common import parser, write
from fastkl.rollout.server import ServerGenerator
from fastkl.sampling.params import Sampling
from fastkl.scoring import models
from fastkl.scoring.source import resolve_model

WAYS = ("network", "folder")


@contextmanager
def served(model: str, log: Path) -> Iterator[str]:
    """The address of a server of this model."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    words = [sys.executable, "-m", "fastkl", "serve", model, "--port", str(port), "--dtype", "float32"]
    with open(log, "wb") as out:
        child = subprocess.Popen([*words, "--max-model-len", "128"], stdout=out, stderr=out, start_new_session=True)
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if child.poll() is not None:
                raise SystemExit(f"the server did not start: {log.read_text()[-2000:]}")
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def checksums(url: str) -> dict[str, str]:
    """vLLM's own, of all parameters that the server holds."""
    answer = httpx.post(f"{url}/weight_checker", json={"action": "checksum"}, timeout=60, trust_env=False)
    return dict(answer.raise_for_status().json()["checksums"])


def measure(url: str, policy: Any, folder: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of each push, in the order in which they were made."""
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    step = 0
    for _ in range(1 + repeats):
        with torch.no_grad():
            next(policy.parameters()).mul_(1.0009765625)
        found = []
        for way in WAYS:
            generator = ServerGenerator(
                [url], None, Sampling(), vocab=policy.config.vocab_size, dtype="float32", max_model_len=128,
                folder=folder, weights=way,
            )  # fmt: skip
            step += 1
            generator.sync(policy, step)  # makes the group
            begin = time.perf_counter()
            generator.sync(policy, step)
            seconds[way].append(time.perf_counter() - begin)
            found.append(checksums(url))
            generator.close()
        assert found[0] == found[1], "the two ways left different parameters"
    return {way: times[1:] for way, times in seconds.items()}


def main() -> None:
    options = parser(__doc__, "cpu/pushes.json")
    options.add_argument("--model", default="storyteller")
    options.add_argument("--repeats", type=int, default=8)
    given = options.parse_args()
    source = resolve_model(given.model, "")
    policy = models.load_model(source, torch.device("cpu")).requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder, served(given.model, Path(folder) / "server.log") as url:
        seconds = measure(url, policy, Path(folder), given.repeats)
    size = sum(p.numel() * p.element_size() for p in policy.parameters())
    row = {"model": given.model, "megabytes": round(size / 1e6, 1)}
    row |= {f"{way}_s": round(median(times), 4) for way, times in seconds.items()}
    print(row)
    write(given.output, {"pushes": row | {"all": seconds}})


if __name__ == "__main__":
    main()
