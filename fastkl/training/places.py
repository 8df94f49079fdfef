"""Where a run computes and in which numbers: devices, dtypes, and what the memory there can be asked to do."""

from __future__ import annotations

import ctypes
import importlib.util

import torch

from fastkl.config.settings import TrainConfig
from fastkl.distributed.world import ALONE, World
from fastkl.errors import UserError
from fastkl.scoring import models


def choose_device(name: str, world: World = ALONE) -> torch.device:
    """The device for policy and reference. UserError where there is none for this process."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda was asked for, but PyTorch sees no GPU; use --device cpu or auto.")
    if name == "cuda" and world.local_rank >= torch.cuda.device_count():
        raise UserError(
            f"device: process {world.rank} has no GPU of its own, since this machine has {torch.cuda.device_count()}; "
            "start one process for each GPU, or use --device cpu."
        )
    return torch.device(name, world.local_rank) if name == "cuda" and world.size > 1 else torch.device(name)


def compute_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products; "auto" is bfloat16 where the processor is fast at it."""
    if name == "auto":
        return torch.bfloat16 if models.bfloat16_is_fast(device) else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def reference_place(config: TrainConfig, device: torch.device, world: World = ALONE) -> torch.device:
    """Where the reference is; device: the policy's. UserError where there is no such device for this process."""
    place = torch.device(config.reference_device) if config.reference_device != "policy" else device
    if config.reference_device in ("policy", "cpu"):
        return place
    if world.size > 1:
        raise UserError(
            f"reference_device: {place} is one GPU, and there are {world.size} processes, each with a reference; use "
            "policy or cpu."
        )
    if place.index >= torch.cuda.device_count():
        raise UserError(
            f"reference_device: {place} is not here, since PyTorch sees {torch.cuda.device_count()} GPUs, which count "
            "from cuda:0; use policy or cpu."
        )
    return place


def is_apart(config: TrainConfig, device: torch.device) -> bool:
    """Whether the reference is on another device than the policy's, `device`."""
    place = reference_place(config, device)
    return place.type != device.type or (place.index or 0) != (device.index or 0)


def check_storage(config: TrainConfig, device: torch.device, dtype: torch.dtype) -> None:
    """UserError where weights or moments cannot be kept as the settings ask."""
    if config.param_dtype == "bfloat16" and dtype != torch.bfloat16:
        raise UserError(
            "param_dtype: bfloat16 weights take part in products of bfloat16, and those of this run are float32; add "
            "--dtype bfloat16, or leave param_dtype at float32."
        )
    if config.qlora and device.type != "cuda":
        raise UserError(f"qlora: 4 bits need a GPU, and this run is on the {device.type}; leave it out.")
    if config.qlora and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("qlora: bitsandbytes, which stores the 4 bits, is not installed; pip install bitsandbytes.")
    if config.offload and device.type != "cuda":
        raise UserError(
            f"offload: {' '.join(config.offload)} frees a GPU's memory, and this run is on the {device.type}; leave it "
            "at none."
        )


def check_sleep(config: TrainConfig, generator: str, device: torch.device) -> None:
    """UserError where no engine has memory of a GPU to give."""
    if not config.engine_sleep:
        return
    if device.type != "cuda":
        raise UserError(
            f"engine_sleep: vLLM gives up a GPU's memory, and this run is on the {device.type}; leave it out."
        )
    if generator != "vllm":
        raise UserError(
            f"engine_sleep: only vLLM has an engine that can sleep, and the generator is {generator}; leave it out."
        )


def give_back_gpu_memory(device: torch.device) -> None:
    """What PyTorch keeps for later goes back to the GPU: an engine measures what is free."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def keep_freed_memory() -> None:
    """Lets glibc keep freed tensor memory; otherwise every step takes 50,000 page faults, 2 to 5 % of its time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3
        mallopt(trim_threshold, (1 << 31) - 1)
        mallopt(mmap_threshold, 32 << 20)  # the largest value that glibc accepts
