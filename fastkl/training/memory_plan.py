"""The memory that a run will take, in one line before anything is loaded.

In: the headers of the weights' files and the model's configuration. Out: bytes by part, and whether this machine has
them. Weights, gradients, AdamW's moments and reference are exact; the engine, the buffers and the process itself are
estimates. Together they were within 25 % of the measured peak (tests/training/test_memory_plan.py).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastkl.config.settings import TrainConfig
from fastkl.distributed.world import ALONE, World
from fastkl.rollout.vllm import head_dims
from fastkl.scoring.memory import CPU_BYTES, GPU_SHARE
from fastkl.scoring.models import text_config, vocabulary
from fastkl.training.small_adamw import BLOCK

PROCESS_BYTES = {"transformers": 0.5e9, "vllm": 1.3e9}
"""What Python and the libraries take before a model is there, by generator: 0.46 and 1.2 GB were measured."""

GPU_CONTEXT_BYTES = 0.7e9
"""What CUDA takes for itself on the GPU."""

LOGITS_BYTES = {"cpu": 3 * 128 << 20, "cuda": 3 * 2 << 30}
"""The operators' buffers: the logits of a chunk for both models, and what is made of them."""

MOMENTS_8_BIT = 2 * (1 + 4 / BLOCK)
"""Bytes per parameter of moments of 8 bits: two codes, and their blocks' scales."""

NF4 = 0.5 + 0.016
"""Bytes of a number in 4 bits: its code, and its share in the scales, which are themselves stored in 8 bits."""

MAX_ROWS = 512
"""Sequences that the generator on transformers decodes at a time."""


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Bytes by part, in the order in which they are told, and what the device has."""

    parts: Mapping[str, float]
    available: float  # bytes free for this process
    where: str  # "memory" or "GPU memory"
    remedies: tuple[str, ...]

    @property
    def total(self) -> float:
        """All parts together, bytes."""
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        """Whether that is there."""
        return self.total <= self.available

    def line(self) -> str:
        """The plan in one line."""
        parts = " + ".join(f"{name} {_gb(size)}" for name, size in self.parts.items())
        verdict = "fits" if self.fits else f"does not fit; try {' or '.join(self.remedies)}"
        return f"{self.where}: {parts} = {_gb(self.total)} GB of {_gb(self.available)} GB free: {verdict}"


def plan_of(
    config: TrainConfig, model_config: Any, parameters: int, *, generator: str, device: torch.device,
    dtype: torch.dtype, max_tokens: int, adapters: int = 0, matrices: int = 0, world: World = ALONE, teacher: int = 0,
    ref_head: int = 0,
) -> MemoryPlan:  # fmt: skip
    """The plan of a run. max_tokens: of the longest prompt with its completion. adapters: numbers in them, 0 without;
    the reference is then the same module. matrices: how many of the parameters bfloat16 can store in 2 bytes.
    world: the processes, which divide the samples, sharded weights, and a machine's memory. teacher: parameters of one
    that is the reference. ref_head: numbers in the head of a reference that is on another device, and has a copy of its
    head here."""
    on_gpu = device.type == "cuda"
    sequences = math.ceil(config.prompts_per_step * config.num_samples / world.size)
    pieces = {"full": world.size, "hybrid": world.local_size}.get(config.shard, 1)
    halved = 4.0 * parameters - (2.0 * matrices if dtype == torch.bfloat16 else 0.0)
    trained = 4.0 * adapters or (halved if config.param_dtype == "bfloat16" else 4.0 * parameters)
    moments = (adapters or parameters) * (MOMENTS_8_BIT if config.optimizer == "adamw8bit" else 8.0)
    copies = 0.0 if adapters or config.param_dtype == "bfloat16" else 4.0 * parameters - halved  # autocast's, whole
    reference = 0.0 if adapters or config.no_reference else 4.0 * parameters if config.reference_every else halved
    if teacher:
        reference = (2.0 if dtype == torch.bfloat16 else 4.0) * teacher
    trained, moments, halved, reference = (part / pieces for part in (trained, moments, halved, reference))
    most = torch.cuda.get_device_properties(device).total_memory if on_gpu else memory_total()
    engine = 0.0  # a server's is its own
    if generator == "vllm":
        engine = _engine_bytes(config, parameters, dtype, most if on_gpu else None)
    elif generator != "server":
        engine = _decoding_bytes(model_config, min(sequences, MAX_ROWS), max_tokens, dtype)
    kept = _activation_bytes(model_config) * sequences * max_tokens
    about_reference = "reference while it scores" if "reference" in config.offload else "reference"
    if ref_head:
        about_reference, reference = "reference's head", 4.0 * ref_head
    parts = {
        "policy": (halved - (2.0 - NF4) * matrices if config.qlora else halved) + trained if adapters else trained,
        "gradients": trained,
        "AdamW": 0.0 if "optimizer" in config.offload else moments,
        about_reference: reference,
        "vLLM" if generator == "vllm" else "decoding": engine,
        "buffers": min(kept, GPU_SHARE * most if on_gpu else CPU_BYTES) + LOGITS_BYTES[device.type] + copies,
        "process": GPU_CONTEXT_BYTES if on_gpu else PROCESS_BYTES.get(generator, PROCESS_BYTES["transformers"]),
    }
    remedies = ["--generator transformers"] if generator == "vllm" else ["fewer --prompts-per-step or --num-samples"]
    if config.micro_batch_tokens:
        remedies.append("a smaller --micro-batch-tokens")
    available = float(torch.cuda.mem_get_info(device)[0]) if on_gpu else memory_available() / world.local_size
    return MemoryPlan(parts, available, "GPU memory" if on_gpu else "memory", (*remedies, "a smaller model"))


def _engine_bytes(config: TrainConfig, parameters: int, dtype: torch.dtype, gpu_bytes: float | None) -> float:
    """vLLM's weights and cache: its share of a GPU, or on a CPU a copy of the weights, or this process's part of one,
    and the cache's own space."""
    if gpu_bytes is not None:
        return config.gpu_memory_utilization * gpu_bytes
    return parameters * dtype.itemsize / config.engine_tp + float(os.environ.get("VLLM_CPU_KVCACHE_SPACE") or 1) * 2**30


def _decoding_bytes(model_config: Any, rows: int, tokens: int, dtype: torch.dtype) -> float:
    """Keys and values of `rows` sequences, twice (a longer one is made before the old one goes), and the logits of a
    step with what sampling makes of them: float32, tempered, log-probs, and two in float64."""
    config, vocab = text_config(model_config), vocabulary(model_config) or 0
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
    numbers = 2 * (getattr(config, "num_hidden_layers", 0) or 0) * (heads or 0) * max(head_dims(config), default=0)
    return rows * (2.0 * tokens * numbers * dtype.itemsize + (3 * 4 + 2 * 8) * vocab)


def _activation_bytes(model_config: Any) -> float:
    """About what autograd keeps per token, float32: in each layer the inputs of two norms, of four projections of the
    attention and its output (8 H), and of the gated MLP (4 I)."""
    config = text_config(model_config)
    hidden = getattr(config, "hidden_size", 0)
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    if isinstance(inner, list | tuple):  # a width for each layer, as in Gemma 3n
        inner = max(inner)
    return 4.0 * getattr(config, "num_hidden_layers", 0) * (8 * hidden + 4 * inner)


def num_parameters(source: str) -> int | None:
    """How many numbers the model's safetensors files hold, from their headers; None where they are not on this machine
    yet and the hub does not say."""
    folder = Path(source)
    if folder.is_dir():
        return sum(map(_numbers_in, folder.glob("*.safetensors")))
    try:
        from huggingface_hub import get_safetensors_metadata

        return sum(get_safetensors_metadata(source).parameter_count.values())
    except Exception:  # no network, an old repository: the line is left out, nothing else depends on it
        return None


def num_adapter_parameters(source: str, rank: int) -> int:
    """About how many numbers adapters of this rank hold on every matrix but embeddings and head: r (rows + columns);
    r for every 500 of the model's where its files are not here."""
    matrices = [
        shape
        for file in Path(source).glob("*.safetensors")
        for name, shape in _shapes_in(file).items()
        if _is_matrix(name, shape)
    ]
    return rank * sum(map(sum, matrices)) if matrices else rank * (num_parameters(source) or 0) // 500


def num_in_matrices(source: str) -> int:
    """How many numbers are in matrices but embeddings and head, which runs in bfloat16 can store in 2 bytes; all of
    them where the files are not here."""
    shapes = [item for file in Path(source).glob("*.safetensors") for item in _shapes_in(file).items()]
    return sum(math.prod(shape) for name, shape in shapes if _is_matrix(name, shape)) or num_parameters(source) or 0


def num_in_head(source: str) -> int:
    """How many numbers are in the output head, or in the embedding that is the head; 0 where the files are not here."""
    shapes = [item for file in Path(source).glob("*.safetensors") for item in _shapes_in(file).items()]
    for word in ("head", "embed", "wte"):
        if sizes := [math.prod(shape) for name, shape in shapes if word in name and len(shape) == 2]:
            return max(sizes)
    return 0


def _is_matrix(name: str, shape: list[int]) -> bool:
    """Whether it is the weight of a layer, and no embedding or head."""
    return len(shape) == 2 and not any(word in name for word in ("embed", "wte", "wpe", "head"))


def _numbers_in(file: Path) -> int:
    """The numbers in a safetensors file."""
    return sum(map(math.prod, _shapes_in(file).values()))


def _shapes_in(file: Path) -> dict[str, list[int]]:
    """The shapes in a safetensors file: eight bytes with the header's length, and the header, which is JSON."""
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    return {name: entry["shape"] for name, entry in header.items() if name != "__metadata__"}


def memory_total() -> float:
    """Bytes that this process may have: the machine's memory or the limit of its control group, whichever is less."""
    limits = [_meminfo("MemTotal")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(file)
        limits += [float(text)] if text.isdigit() else []
    return min(limits)


def memory_available() -> float:
    """Bytes that are free for this process, within its control group's limit, too."""
    free = [_meminfo("MemAvailable")]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if _read(limit).isdigit() and _read(used).isdigit():
            free.append(float(_read(limit)) - float(_read(used)))
    return min(free)


def _meminfo(name: str) -> float:
    """A line of /proc/meminfo, bytes; infinite where there is none."""
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith(f"{name}:"):
            return float(line.split()[1]) * 1024
    return math.inf


def _read(file: str) -> str:
    """The text of a small file of the system; empty where there is none."""
    try:
        return Path(file).read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _gb(size: float) -> str:
    """Bytes in GB, with two digits that say something."""
    return f"{size / 1e9:.2f}" if size < 1e9 else f"{size / 1e9:.1f}"
