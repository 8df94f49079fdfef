"""vLLM's interface for the transfer of weights, with a receiver behind it, which works on CPUs, too.

`fastkl serve` names TransferWorker as the extension of vLLM's workers, so that each of them looks it up here before it
makes its engine for transfers, by the name BACKEND; no other process does. A plug-in (vllm.general_plugins) would do
the same in every process of every vLLM of the environment, whoever has started it, and only once it is installed.

vLLM's own engine for NCCL hands each tensor to the loader as it comes, so that nothing of what the loader does with it
can be watched or compared, and a push that breaks off leaves half a model behind.
"""

from __future__ import annotations

from typing import Any

from fastkl.rollout.engine_worker import FastklWorker
from fastkl.rollout.receiver import Invitation, Receiver, Update
from fastkl.rollout.serve import BACKEND


def __getattr__(name: str) -> type[FastklWorker]:
    """TransferWorker: FastklWorker, where vLLM knows the engine that it takes weights from."""
    if name != "TransferWorker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, transfer_engine())
    return FastklWorker


def transfer_engine() -> type[Any]:
    """The class that vLLM's routes lead to; engine_worker.py takes what has come."""
    from vllm.distributed.weight_transfer import WeightTransferEngine

    class TransferEngine(WeightTransferEngine):
        """See Receiver."""

        init_info_cls, update_info_cls = Invitation, Update
        supports_draft_weight_update = False

        def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
            super().__init__(config, vllm_config, device, model)
            parallel = vllm_config.parallel_config
            self.receiver = Receiver(device, parallel.data_parallel_index * parallel.world_size + parallel.rank)

        def init_transfer_engine(self, init_info: Invitation) -> None:
            self.receiver.join(init_info)

        def start_weight_update(self) -> None:
            self.receiver.begin()

        def receive_weights(self, update_info: Update) -> None:
            self.receiver.receive(update_info)

        def finish_weight_update(self) -> None:
            """The weights wait for FastklWorker.fastkl_load."""

        def shutdown(self) -> None:
            self.receiver.leave()

    return TransferEngine
