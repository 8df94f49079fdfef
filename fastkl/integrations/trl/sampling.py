"""How a TRL trainer's sampler draws, as fastkl's `Sampling`; what cannot be replayed raises UserError.

In: a trainer. Its settings reach the sampler either as a transformers GenerationConfig, with the model's own generation
config where the trainer leaves a field unset, or as vLLM sampling parameters; each is classified by a table, by the
rules of fastkl/sampling/rules.py.
"""

from __future__ import annotations

from typing import Any

from fastkl.errors import UserError
from fastkl.sampling.params import NEUTRAL, NOT_DRAWN, REJECTED, SUPPORT, Rule, Sampling
from fastkl.sampling.rules import DEPENDS_ON_TEXT, VLLM
from fastkl.sampling.rules import check_parameters as check

BEAMS = "beam search does not draw from a distribution"
FORCED = "it forces tokens that the policy did not choose"
CUT_OFF = "its cut-off is not one that fastkl replays; use top_k, top_p or min_p"
NOT_LOOKED_AT = "another way of decoding, which fastkl does not replay"
ENCODER = "for models with an encoder"


def _neutral(why: str, *names: str) -> dict[str, Rule]:
    return dict.fromkeys(names, Rule(NEUTRAL, why))


def _rejected(why: str, *names: str, off: tuple[Any, ...] = (None,)) -> dict[str, Rule]:
    return dict.fromkeys(names, Rule(REJECTED, why, off=off))


GENERATION_CONFIG: dict[str, Rule] = {
    **_neutral("ends a completion by a rule on its text", "max_length", "max_new_tokens", "max_time", "stop_strings"),
    **_neutral("the id that ends or pads a text", "eos_token_id", "pad_token_id", "bos_token_id"),
    **_neutral("how the model computes", "use_cache", "cache_implementation", "cache_config", "max_cache_len"),
    **_neutral("how the model computes", "compile_config", "disable_compile", "continuous_batching_config"),
    **_neutral("how the model computes", "prefill_chunk_size", "low_memory"),
    **_neutral("chooses what is reported", "output_attentions", "output_hidden_states", "output_scores"),
    **_neutral("chooses what is reported", "output_logits", "return_dict_in_generate"),
    **_neutral("bookkeeping", "_from_model_config", "_commit_hash", "transformers_version", "is_assistant"),
    **_neutral("a constant per row, which the normalisation removes", "renormalize_logits"),
    **_neutral("for beam search and assistants only", "early_stopping", "length_penalty", "num_assistant_tokens"),
    **_neutral("for assistants only", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
    **_neutral("for assistants only", "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight"),
    **_neutral("for assistants only", "max_matching_ngram_size"),
    **_neutral(ENCODER, "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "decoder_start_token_id"),
    "temperature": VLLM["temperature"],
    **{name: VLLM[name] for name in ("top_k", "top_p", "min_p")},
    "min_new_tokens": VLLM["min_tokens"],
    "suppress_tokens": Rule(SUPPORT, NOT_DRAWN),
    "do_sample": Rule(REJECTED, "a greedy completion has no distribution", off=(True,)),
    "min_length": Rule(REJECTED, "it counts the prompt and its padding; use min_new_tokens", off=(0, None)),
    **_rejected(BEAMS, "num_beams", "num_beam_groups", "num_return_sequences", off=(1, None)),
    **_rejected(BEAMS, "diversity_penalty", off=(0, None)),
    **_rejected(BEAMS, "constraints", "force_words_ids"),
    **_rejected(DEPENDS_ON_TEXT, "repetition_penalty", off=(1, None)),
    **_rejected(DEPENDS_ON_TEXT, "no_repeat_ngram_size", off=(0, None)),
    **_rejected(DEPENDS_ON_TEXT + "; ban single ids with suppress_tokens", "bad_words_ids"),
    **_rejected("it bans ids at the first token only; use suppress_tokens", "begin_suppress_tokens"),
    **_rejected("it shifts the policy's logits and not the reference's", "sequence_bias", off=(None, {})),
    **_rejected(
        "it shifts the policy's logits and not the reference's", "guidance_scale", "exponential_decay_length_penalty"
    ),
    **_rejected(FORCED, "forced_bos_token_id", "forced_eos_token_id"),
    **_rejected(CUT_OFF, "typical_p", off=(1, None)),
    **_rejected(CUT_OFF, "epsilon_cutoff", "eta_cutoff", off=(0, None)),
    **_rejected(CUT_OFF, "top_h"),
    **_rejected("it hides NaN in the logits", "remove_invalid_values", off=(False, None)),
    **_rejected("it changes the prompt", "token_healing", off=(False, None)),
    **_rejected("it draws from a changed distribution", "watermarking_config"),
    **_rejected(NOT_LOOKED_AT, "use_mtp", off=(False, None)),
    **_rejected(NOT_LOOKED_AT, "penalty_alpha", "dola_layers", "prompt_lookup_num_tokens", "speculation_type"),
    **_rejected(NOT_LOOKED_AT, "assistant_early_exit"),
}
"""Every field of transformers.GenerationConfig. A test walks them, so that every new field gets looked at."""


def sampling_of(trainer: Any) -> Sampling:
    """The trainer's sampler. UserError for a parameter that is set and cannot be replayed, by its name."""
    return _vllm_sampling(trainer) if trainer.use_vllm else _transformers_sampling(trainer)


def _transformers_sampling(trainer: Any) -> Sampling:
    model = trainer.accelerator.unwrap_model(trainer.model)
    config, _ = model._prepare_generation_config(trainer.generation_config)  # what `generate` will make of it
    parameters = vars(config)
    check(parameters, GENERATION_CONFIG)
    top_p, min_p = _value(config.top_p, 1.0), _value(config.min_p, 0.0)
    if top_p < 1 and min_p > 0:
        raise UserError(
            f"top_p {top_p} with min_p {min_p}: transformers applies them in another order than vLLM and fastkl, so "
            "the sampled set would not be the scored one; set one of the two."
        )
    return Sampling(
        temperature=_temperature(config.temperature),
        max_new_tokens=trainer.max_completion_length,
        stop_token_ids=_ids(config.eos_token_id),
        top_k=_top_k(config.top_k),
        top_p=top_p,
        min_p=min_p,
        min_tokens=_value(config.min_new_tokens, 0),
        banned_token_ids=_ids(config.suppress_tokens),
    )


def _vllm_sampling(trainer: Any) -> Sampling:
    names = ("repetition_penalty", "temperature", "top_p", "top_k", "min_p")
    parameters = {name: getattr(trainer, name) for name in names} | (trainer.args.generation_kwargs or {})
    if trainer.args.vllm_structured_outputs_regex is not None:
        parameters["structured_outputs"] = trainer.args.vllm_structured_outputs_regex
    check(parameters, VLLM)
    return Sampling(
        temperature=_temperature(parameters["temperature"]),
        max_new_tokens=parameters.get("max_tokens", trainer.max_completion_length),
        stop_token_ids=tuple(sorted({*trainer.eos_token_ids, *_ids(parameters.get("stop_token_ids"))})),
        top_k=_top_k(parameters["top_k"]),
        top_p=_value(parameters["top_p"], 1.0),
        min_p=_value(parameters["min_p"], 0.0),
        min_tokens=_value(parameters.get("min_tokens"), 0),
        allowed_token_ids=_ids(parameters.get("allowed_token_ids")),
    )


def _value(value: float | None, default: float) -> Any:
    return default if value is None else value


def _ids(ids: int | list[int] | None) -> tuple[int, ...]:
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(int(i) for i in ids)


def _top_k(top_k: int | None) -> int:
    return max(0, _value(top_k, 0))  # vLLM also writes -1 for "all"


def _temperature(temperature: float | None) -> float:
    temperature = float(_value(temperature, 1.0))
    if not temperature > 0:
        raise UserError(f"temperature: {temperature} has no distribution to score; use a temperature above 0.")
    return temperature
