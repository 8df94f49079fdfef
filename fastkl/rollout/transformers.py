"""Rollout with transformers: the policy itself decodes, with a key-value cache; for models that vLLM cannot run."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastkl.kernels.support import keep_mask
from fastkl.kernels.types import Support
from fastkl.rollout.requests import EngineOptions, Request, completion
from fastkl.sampling.params import Sampling
from fastkl.sampling.replay import support_of
from fastkl.scoring.head import head_of
from fastkl.types import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TransformersGenerator:
    """Decodes with the policy itself: one prefill per prompt, its cache repeated K times, finished rows dropped.

    dtype: of the matrix products, the trainer's own, so that what is sampled from is what is scored.

    Each token is drawn by inverting the distribution function at a uniform number of the sample's own: with p the
    float64 softmax of the processed logits, the first v with p_0 + ... + p_v > u.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        sampling: Sampling,
        *,
        dtype: torch.dtype = torch.float32,
        max_rows: int = 512,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.dtype = dtype
        self.max_rows = max_rows
        takes = inspect.signature(model.base_model.forward).parameters
        # depending on the model, transformers calls it one or the other
        self.cache_argument = "cache" if "cache" in takes else "past_key_values"

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See Generator. About `max_rows` sequences are decoded at a time; a prompt's samples stay together."""
        completions: list[Completion] = []
        for chunk in _chunks(requests, self.max_rows):
            completions += self._decode(chunk, self._uniforms([request.seed for request in chunk]))
        return completions

    def _uniforms(self, seeds: Sequence[int]) -> torch.Tensor:
        """One uniform number per row and step: f64 [rows, T], on the model's device."""
        steps = self.sampling.max_new_tokens
        rows = [torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(rows).to(self.model.device)

    def _decode(self, requests: Sequence[Request], uniforms: torch.Tensor) -> list[Completion]:
        """The completions of some requests, all at once."""
        cache, logits, mask = self._prefill(requests)
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
        return self._collect(drawn, requests)

    def _prefill(self, requests: Sequence[Request]) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
        """(cache, logits [rows, V], mask [rows, width] or None), a row per request; a prompt is forwarded once."""
        from transformers import DynamicCache

        device = self.model.device
        runs = [list(run) for _, run in groupby(requests, key=lambda request: request.prompt_index)]
        prompts = [run[0].prompt for run in runs]
        width = max(len(p.token_ids) for p in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64, device=device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded on the left, so that all end together
            ids[row, width - len(prompt.token_ids) :] = torch.tensor(prompt.token_ids, device=device)
            mask[row, width - len(prompt.token_ids) :] = 1
        needed = None if bool(mask.all()) else mask
        cache = DynamicCache(config=self.model.config)
        logits = self._forward(ids, needed, cache)
        row_of = torch.arange(len(runs)).repeat_interleave(torch.tensor([len(run) for run in runs])).to(device)
        cache.batch_select_indices(row_of)
        return cache, logits[row_of], None if needed is None else needed[row_of]

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> torch.Tensor:
        """Logits of the last position, f32 [rows, V]."""
        arguments = {self.cache_argument: cache}
        if mask is not None:
            arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            out = self.model.base_model(input_ids=ids, attention_mask=mask, use_cache=True, **arguments)
        head = head_of(self.model)  # outside autocast, as in scoring
        return head.logits(out.last_hidden_state[:, -1].to(head.weight.dtype)).float()

    def _collect(self, drawn: Sequence[tuple[torch.Tensor, ...]], requests: Sequence[Request]) -> list[Completion]:
        token_ids: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        for rows, tokens, values in drawn:
            for row, token, value in zip(rows.tolist(), tokens.tolist(), values.tolist(), strict=True):
                token_ids[row].append(token)
                logprobs[row].append(value)
        return [
            completion(request, ids, values, self.sampling, self.tokenizer)
            for request, ids, values in zip(requests, token_ids, logprobs, strict=True)
        ]

    def sync(self, policy: nn.Module) -> None:
        """See Generator. Nothing to do, since it decodes with the policy itself."""

    def close(self) -> None:
        """See Generator. Nothing to do, since it holds no memory of its own."""


def obstacle(model_config: Any, device: torch.device) -> str | None:
    """None: no model is known that it cannot run."""
    return None


def start(options: EngineOptions) -> TransformersGenerator:
    """A generator that decodes with the policy that is trained."""
    return TransformersGenerator(options.policy, options.tokenizer, options.sampling, dtype=options.dtype)


def _chunks(requests: Sequence[Request], max_rows: int) -> Iterator[list[Request]]:
    """Requests of consecutive prompts, as many whole prompts as make at most `max_rows` rows, but at least one."""
    chunk: list[Request] = []
    for _, run in groupby(requests, key=lambda request: request.prompt_index):
        samples = list(run)
        if chunk and len(chunk) + len(samples) > max_rows:
            yield chunk
            chunk = []
        chunk += samples
    if chunk:
        yield chunk


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
