"""What `fastkl serve` adds to vLLM's worker: it says what it is, and takes the policy's weights from a file, or as they
have come over the network (receiver.py).

They go through the same loader, repacking and comparison as in one process (weight_sync.py): a push is over when what
the engine holds is what the file holds, or what has come, tensor by tensor and bit by bit. Of what has come the sums of
bits go back to the trainer, which compares them with what it sent. Of an engine over several GPUs each worker loads and
compares its own part, and together they must hold the whole of every tensor (workers.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from uuid import uuid4

import torch
from torch import nn

from fastkl.rollout.agreement import StaleEngineError
from fastkl.rollout.fingerprint import fingerprint
from fastkl.rollout.meeting import gpu_of
from fastkl.rollout.orphans import end_with_server
from fastkl.rollout.push_check import Weights
from fastkl.rollout.receiver import Receiver
from fastkl.rollout.weight_sync import WeightSync
from fastkl.rollout.wire import Sums, numbers
from fastkl.rollout.workers import Workers, workers_of
from fastkl.version import __version__


class FastklWorker:
    """Mixed into vLLM's worker, whose methods these become; they are called over HTTP, with texts."""

    def fastkl_describe(self) -> dict[str, Any]:
        """What a trainer has to know before it trusts this engine. `instance` is another one after every start."""
        return self._fastkl_engine().describe()

    def fastkl_load(self, path: str, version: str, step: str, tied: str) -> dict[str, Any]:
        """Takes the weights of this file, or "": what has come over the network. They are called `version` from then
        on. tied: "True" or "False"."""
        return self._fastkl_engine().load(path, version, int(step), tied == "True")

    def fastkl_leave(self, sender: str) -> dict[str, Any]:
        """Leaves the group that weights come in over the network, and forgets what has come of a push; does nothing
        where another run than this one has the server, and its trainer lives."""
        return self._fastkl_engine().leave(sender)

    def _fastkl_engine(self) -> Engine:
        if "fastkl_engine" not in self.__dict__:
            end_with_server()
            self.fastkl_engine = Engine(self, workers_of(self))
        return self.fastkl_engine


class Engine:
    """One worker's engine, or its part of one, seen as weight_sync.py sees one in its own process."""

    def __init__(self, worker: Any, workers: Workers = Workers()) -> None:  # noqa: B008  # it is frozen
        self.worker, self.instance, self.version, self.workers = worker, uuid4().hex, "", workers
        self.sync = WeightSync(self, worker.model_config.dtype, workers, workers.size)

    def describe(self) -> dict[str, Any]:
        """See FastklWorker."""
        import vllm

        config = self.worker.model_config
        return {
            "instance": self.instance,
            "version": self.version,
            "fastkl": __version__,
            "vllm": vllm.__version__,
            "vocab": config.get_vocab_size(),
            "dtype": str(config.dtype).removeprefix("torch."),
            "max_model_len": config.max_model_len,
            "workers": self.worker.parallel_config.world_size,
            "logprobs": str(getattr(config.logprobs_mode, "value", config.logprobs_mode)),
            "transport": self.receiver.transport if self.receiver else "",
            "gpu": gpu_of(self.receiver.device) if self.receiver else "",
            "failed": self.receiver.failed if self.receiver else "",
        }

    @property
    def receiver(self) -> Receiver | None:
        """What weights come to over the network; None where this vLLM has no such thing, or not all of it."""
        if not hasattr(self.worker, "shutdown_weight_transfer_engine"):
            return None
        return getattr(getattr(self.worker, "weight_transfer_engine", None), "receiver", None)

    def load(self, path: str, version: str, step: int, tied: bool) -> dict[str, Any]:
        """See FastklWorker. Whatever fails, in vLLM's loader or in the file, the trainer is told, and the server lives
        on."""
        sums: Sums = []

        def in_words(failure: Exception) -> str:
            if isinstance(failure, StaleEngineError):
                return str(failure)
            reason = f"{type(failure).__name__}: {failure}"
            remedy = f"the server has to {f'see {path}, and to ' if path else ''}be started with the same model"
            return f"the weights could not be loaded ({reason}); {remedy}."

        def load() -> None:
            weights: Callable[[], Weights] = partial(tensors_in, path)
            if not path:
                tensors = self.arrived()
                sums.extend(numbers([fingerprint(tensor) for tensor in tensors.values()]))
                weights = tensors.items
            self.sync.load(weights, step, tied=tied)

        self.version = ""  # until all of it is there
        error = self.workers.attempt(load, in_words)
        self.version = "" if error else version
        failed = self.receiver.failed if self.receiver and not path else ""
        return {"version": self.version, "error": error, "sums": sums, "failed": failed}

    def leave(self, sender: str) -> dict[str, Any]:
        """See FastklWorker."""
        if self.receiver is not None and not self.receiver.is_anothers(sender):
            self.receiver.leave()
            if getattr(self.worker, "_weight_update_active", False):  # vLLM's own raises where none is
                self.worker.finish_weight_update()
        return {}

    def arrived(self) -> dict[str, torch.Tensor]:
        """What has come over the network."""
        if self.receiver is None:
            raise RuntimeError("this server takes no weights over the network")
        return self.receiver.take()

    def apply_model(self, function: Callable[[nn.Module], Any]) -> list[Any]:
        """As vllm.LLM has it."""
        return [function(self.worker.model_runner.get_model())]

    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> None:
        """As vllm.LLM has it, for this worker alone."""
        getattr(self.worker, method)(**kwargs)

    def reset_prefix_cache(self) -> bool:
        """As vllm.LLM has it: the server has no such cache."""
        return True


def tensors_in(path: str) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a file, one at a time."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a mapping
            yield name, file.get_tensor(name)
