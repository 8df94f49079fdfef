"""Rollout with transformers: the policy itself decodes, with a cache; for models that vLLM cannot run.

How depends on the model, and is tried on a few tokens when the generator starts, in this order:
"shared": prompts padded on the left to one length, a prefill for each, its cache repeated K times, finished rows
dropped from it;
"alike": the same with prompts of one length at a time, for models that do not keep padding out of their states;
"anew": the same, and all tokens are forwarded again at each step, for models whose cache cannot be repeated or
selected from. It is slow, and right for every model.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastkl.kernels.support import keep_mask
from fastkl.kernels.types import Support
from fastkl.rollout.requests import EngineOptions, Request, completes_stop, completion
from fastkl.sampling.params import Sampling
from fastkl.sampling.replay import support_of
from fastkl.scoring.head import head_of
from fastkl.scoring.models import backbone_of, text_config
from fastkl.types import Completion

if TYPE_CHECKING:
    from transformers import PreTrainedModel


WAYS = ("shared", "alike", "anew")
"""Of decoding, the fastest first."""

TOLERANCE, TOLERANCE_OF_STATES = 1e-3, 2e-5
"""How far a way's logits may differ from those of separate forwards, relative to the largest logit: with keys and
values, where a mistake is gross, and with states that are carried from token to token, where a small one adds up."""


class TransformersGenerator:
    """Decodes with the policy itself, in the first of WAYS whose logits are those of separate forwards.

    dtype: of the matrix products, the trainer's own, so that what is sampled from is what is scored. whole: gathers a
    policy whose weights lie on several processes.

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
        whole: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling
        self.max_rows = max_rows
        self.whole = whole
        self.backbone = backbone_of(model)
        takes = inspect.signature(self.backbone.forward).parameters
        # depending on the model, transformers calls it one or the other
        names = (name for name in ("cache", "cache_params") if name in takes)
        self.cache_argument = next(names, "past_key_values")
        self.dtype = torch.float32  # in which rounding hides no mistake
        with whole():
            self.way = self._right_way()
        self.dtype = dtype

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """See Generator. About `max_rows` sequences are decoded at a time; a prompt's samples stay together."""
        completions: dict[int, Completion] = {}
        with self.whole():
            for places in self._batches(requests):
                chunks = _chunks([requests[place] for place in places], self.max_rows)
                drawn = [c for chunk in chunks for c in self._decode(chunk, self._uniforms([r.seed for r in chunk]))]
                completions.update(zip(places, drawn, strict=True))
        return [completions[place] for place in range(len(requests))]

    def _batches(self, requests: Sequence[Request]) -> list[list[int]]:
        """The places of the requests that may be decoded together, in order."""
        if self.way == "shared":
            return [list(range(len(requests)))]
        of_length: dict[int, list[int]] = {}
        for place, request in enumerate(requests):
            of_length.setdefault(len(request.prompt.token_ids), []).append(place)
        return list(of_length.values())

    @torch.no_grad()
    def _right_way(self) -> str:
        """The first of WAYS that agrees with separate forwards."""
        for way in WAYS[:-1]:
            self.way = way
            try:
                if self._error() <= (TOLERANCE_OF_STATES if self._carries_states() else TOLERANCE):
                    return way
            except Exception:  # a model's own code, on a cache that it may not know, raises whatever it likes
                continue
        return WAYS[-1]

    def _carries_states(self) -> bool:
        """Whether its cache holds anything besides keys and values."""
        from transformers import DynamicCache

        return any(hasattr(layer, "recurrent_states") for layer in DynamicCache(config=self.model.config).layers)

    def _error(self) -> float:
        """Largest difference from separate forwards, relative to the largest logit: without padding tokens, and with
        them, since they can be sampled, and some models (RoBERTa) do not count them as a place."""
        vocab = self.model.get_input_embeddings().weight.shape[0]
        pad = getattr(text_config(self.model.config), "pad_token_id", None)
        return max(self._error_with(token, vocab) for token in {1, pad if pad is not None and 0 <= pad < vocab else 1})

    def _error_with(self, token: int, vocab: int) -> float:
        """The difference in a prefill of two prompts, and in two steps after it, before each of which rows are
        repeated, exchanged or dropped. token: in the prompts and after them."""
        lengths = (7, 3) if self.way == "shared" else (5, 5)
        prompts = [[(7919 * (place + 11 * row) + 1) % vocab for place in range(n)] for row, n in enumerate(lengths)]
        prompts = [[ids[0], token, *ids[2:]] for ids in prompts]
        cache, logits, mask = self._prefill(prompts, [0, 0, 1])
        rows = [prompts[0], prompts[0], prompts[1]]
        worst = self._distance(logits, rows)
        for next_token, kept in ((token, [2, 0]), (2, [1])):
            rows = [rows[row] + [(next_token + 5 * place) % vocab] for place, row in enumerate(kept)]
            cache.reorder_cache(torch.tensor(kept, device=logits.device))
            mask = None if mask is None else mask[kept]
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            ids = torch.tensor([row[-1:] for row in rows], device=logits.device)
            worst = max(worst, self._distance(self._forward(ids, mask, cache), rows))
        return worst

    def _distance(self, logits: torch.Tensor, rows: list[list[int]]) -> float:
        """Of logits f32 [rows, V] from those that follow each row of token ids alone; inf where they are NaN."""
        ids = (torch.tensor([row], device=logits.device) for row in rows)
        alone = torch.cat([self._forward(row, None, AllTokens()) for row in ids])
        error = float((logits - alone).abs().max() / alone.abs().max().clamp(min=1e-30))
        return math.inf if math.isnan(error) else error

    def _uniforms(self, seeds: Sequence[int]) -> torch.Tensor:
        """One uniform number per row and step: f64 [rows, T], on the model's device."""
        steps = self.sampling.max_new_tokens
        rows = [torch.rand(steps, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(rows).to(self.model.device)

    def _decode(self, requests: Sequence[Request], uniforms: torch.Tensor) -> list[Completion]:
        """The completions of some requests, all at once."""
        runs = [list(run) for _, run in groupby(requests, key=lambda request: request.prompt_index)]
        row_of = [row for row, run in enumerate(runs) for _ in run]
        cache, logits, mask = self._prefill([run[0].prompt.token_ids for run in runs], row_of)
        rows = torch.arange(len(logits), device=logits.device)  # which sample each remaining row belongs to
        stop_ids = torch.tensor(self.sampling.stop_token_ids, device=logits.device, dtype=torch.int64)
        drawn: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
        so_far: list[list[int]] = [[] for _ in requests]
        for step in range(self.sampling.max_new_tokens):
            support = support_of(self.sampling, torch.full_like(rows, step), logits.shape[-1])
            tokens, logprobs = sample(logits, self.sampling.temperature, uniforms[rows, step], support)
            drawn.append((rows, tokens, logprobs))
            going_on = ~torch.isin(tokens, stop_ids)
            if self.sampling.stop:
                going_on &= ~self._completes_stop(requests, so_far, rows, tokens)
            if not bool(going_on.all()):
                kept = going_on.nonzero()[:, 0]
                rows, tokens = rows[kept], tokens[kept]
                mask = None if mask is None else mask[kept]
                if len(rows):
                    cache.reorder_cache(kept)
            if not len(rows) or step + 1 == self.sampling.max_new_tokens:
                break
            mask = None if mask is None else torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            logits = self._forward(tokens[:, None], mask, cache)
        return self._collect(drawn, requests)

    def _completes_stop(
        self, requests: Sequence[Request], so_far: list[list[int]], rows: torch.Tensor, tokens: torch.Tensor
    ) -> torch.Tensor:
        """Which of the rows i64 [rows] complete a stop text with their new tokens i64 [rows], which join the token ids
        of each sample `so_far`: bool [rows]."""
        for row, token in zip(rows.tolist(), tokens.tolist(), strict=True):
            so_far[row].append(token)
        return torch.tensor(
            [
                completes_stop(requests[row].prompt.token_ids, so_far[row], self.sampling, self.tokenizer)
                for row in rows.tolist()
            ],
            device=rows.device,
        )

    def _prefill(
        self, prompts: Sequence[Sequence[int]], prompt_of_row: Sequence[int]
    ) -> tuple[Any, torch.Tensor, torch.Tensor | None]:
        """(cache, logits [rows, V], mask [rows, width] or None), a row per completion; a prompt is forwarded once."""
        from transformers import DynamicCache

        device = self.model.device
        width = max(len(token_ids) for token_ids in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.int64, device=device)
        mask = torch.zeros_like(ids)
        for row, token_ids in enumerate(prompts):  # padded on the left, so that all end together
            ids[row, width - len(token_ids) :] = torch.tensor(token_ids, device=device)
            mask[row, width - len(token_ids) :] = 1
        needed = None if bool(mask.all()) else mask
        cache = AllTokens() if self.way == "anew" else DynamicCache(config=self.model.config)
        logits = self._forward(ids, needed, cache)
        row_of = torch.tensor(prompt_of_row, device=device)
        cache.reorder_cache(row_of)
        return cache, logits[row_of], None if needed is None else needed[row_of]

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor | None, cache: Any) -> torch.Tensor:
        """Logits of the last position, f32 [rows, V]."""
        if isinstance(cache, AllTokens):
            ids = cache.extended_by(ids)
            arguments: dict[str, Any] = {"use_cache": False}
        else:
            arguments = {"use_cache": True, "attention_mask": mask, self.cache_argument: cache}
            if mask is not None:
                arguments["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.autocast(self.model.device.type, dtype=torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            out = self.backbone(input_ids=ids, **arguments)
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

    def sync(self, policy: nn.Module, step: int = 0) -> None:
        """See Generator. Nothing to do and nothing to compare: it decodes with the policy itself, not with a copy."""

    def rest(self) -> None:
        """See Generator: it has no memory of its own between two calls."""

    def close(self) -> None:
        """See Generator. Nothing to do, since it holds no memory of its own."""


class AllTokens:
    """Stands where a cache would: the tokens themselves, i64 [rows, length]."""

    def __init__(self) -> None:
        self.ids = torch.empty(0, 0, dtype=torch.int64)

    def extended_by(self, ids: torch.Tensor) -> torch.Tensor:
        """All tokens, with these at the end."""
        self.ids = torch.cat([self.ids, ids], dim=1) if self.ids.numel() else ids
        return self.ids

    def reorder_cache(self, rows: torch.Tensor) -> None:
        """Keeps these rows, in this order; a row may come several times."""
        self.ids = self.ids.index_select(0, rows)


def obstacle(model_config: Any, device: torch.device) -> str | None:
    """None: no model is known that it cannot run."""
    return None


def start(options: EngineOptions) -> TransformersGenerator:
    """A generator that decodes with the policy that is trained."""
    return TransformersGenerator(
        options.policy, options.tokenizer, options.sampling, dtype=options.dtype, whole=options.whole
    )


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
    Temperature 0 is the limit: the likeliest token, the first of equals, with log-prob 0.
    """
    if temperature == 0:
        allowed = logits if support is None else logits.masked_fill(~keep_mask(support, logits), -torch.inf)
        return allowed.argmax(dim=-1), torch.zeros(len(logits), device=logits.device)
    logits = logits / temperature
    if support is not None:
        logits = logits.masked_fill(~keep_mask(support, logits), -torch.inf)
    logprobs = torch.log_softmax(logits, dim=-1)
    cumulative = logprobs.double().exp().cumsum(dim=-1)
    targets = (uniforms * cumulative[:, -1])[:, None]
    tokens = torch.searchsorted(cumulative, targets, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
    return tokens, logprobs.gather(1, tokens[:, None])[:, 0]
