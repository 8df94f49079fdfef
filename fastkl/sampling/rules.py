"""The sampling rules: which ways of drawing tokens can be scored exactly, which cannot, and why.

The KL penalty is taken under the distribution that the sampler really drew from. A sampling parameter is therefore one
of four things:

    NEUTRAL     changes no draw's distribution (seeds, output formats, rules that end a completion)
    TRANSFORM   replayed on the logits of policy and reference (temperature)
    SUPPORT     keeps some ids from being drawn: replayed as a condition on the ids, the same for policy and reference
    REJECTED    changes the distribution in a way that is not replayed: refused before a token is drawn

Were a SUPPORT parameter ignored by the scorer, the mean of log pi(y) - log q(y) would be KL(pi_S, q) + log pi(S): a
policy that moves its mass off S would be paid for it. A parameter that the tables do not know is rejected.

The rules of our own parameters stand in params.py; here are those of everything else that vLLM takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastkl.errors import UserError
from fastkl.sampling.params import ENDS_BY_TEXT, NEUTRAL, REJECTED, SUPPORT, Rule, rules

VALUES_ONLY = "chooses what is reported, not what is drawn"
DEPENDS_ON_TEXT = "it changes the logits by what the text already holds"
SEED = Rule(NEUTRAL, "how many draws, and from which random numbers")

TRANSFORMERS: dict[str, Rule] = {"seed": SEED, **rules()}
"""What fastkl's own generator takes: the fields of Sampling, and the seed."""

VLLM: dict[str, Rule] = {
    **{rule.vllm or name: rule for name, rule in rules().items() if rule.vllm is not None},
    "allowed_token_ids": Rule(SUPPORT, rules()["allowed_token_ids"].why),
    **dict.fromkeys(("n", "seed"), SEED),
    "repetition_detection": ENDS_BY_TEXT,
    **dict.fromkeys(
        (
            *("logprobs", "prompt_logprobs", "prompt_logprob_token_ids", "prompt_logprob_start", "logprob_token_ids"),
            *("flat_logprobs", "detokenize", "skip_special_tokens", "spaces_between_special_tokens", "output_kind"),
            *("include_stop_str_in_output", "stream_interval", "output_text_buffer_length"),
            "routed_experts_prompt_start",
        ),
        Rule(NEUTRAL, VALUES_ONLY),
    ),
    **dict.fromkeys(
        ("skip_clone", "skip_reading_prefix_cache", "_eos_token_id", "_all_stop_token_ids", "_watermarking_skipped"),
        Rule(NEUTRAL, "the engine's own bookkeeping"),
    ),
    "presence_penalty": Rule(REJECTED, DEPENDS_ON_TEXT, off=(0,)),
    "frequency_penalty": Rule(REJECTED, DEPENDS_ON_TEXT, off=(0,)),
    "repetition_penalty": Rule(REJECTED, DEPENDS_ON_TEXT, off=(1,)),
    "logit_bias": Rule(REJECTED, "it shifts the policy's logits and not the reference's", off=(None, {})),
    **dict.fromkeys(
        ("bad_words", "_bad_words_token_ids"),
        Rule(REJECTED, "it bans ids by the text before them; ban single ids with banned_token_ids", off=(None, [])),
    ),
    "structured_outputs": Rule(REJECTED, "a grammar allows other ids at every token, and they are not recorded"),
    "thinking_token_budget": Rule(REJECTED, "it forces tokens that the policy did not choose"),
    "trace_decode_token_ids": Rule(REJECTED, "it forces tokens that the policy did not choose"),
    "watermarking": Rule(REJECTED, "it draws from a changed distribution", off=(None, False)),
    "ignore_eos": Rule(REJECTED, "it goes on after the end of the text, where there is nothing to score", off=(False,)),
    "extra_args": Rule(REJECTED, "plugins may do anything to the logits", off=(None, {})),
}
"""Every field of vllm.SamplingParams. A test walks them, so that every new field of a new engine gets looked at."""

FILES: dict[str, Rule] = {**VLLM, **TRANSFORMERS, "eos_token_ids": ENDS_BY_TEXT}
"""What a line of a file may say about how a completion was drawn: the engine's names, ours, and the doctor's."""


def check_parameters(parameters: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Raises UserError for the first parameter that is rejected and not off, or that the rules do not know."""
    for name, value in parameters.items():
        rule = rules.get(name, Rule(REJECTED, "nobody has looked at what it does to the distribution"))
        if rule.kind == REJECTED and not any(value is off or value == off for off in rule.off):
            raise UserError(
                f"{name}: {value!r} cannot be scored ({rule.why}), so the KL estimate would be wrong and could go "
                f"negative; use {name} {rule.off[0]!r}."
            )


def why_rejected(name: str) -> str:
    """Why the parameter `name` cannot be scored (begins with a space); nothing for one that can, or is unknown."""
    rule = VLLM.get(name)
    return f" It cannot be scored: {rule.why}." if rule and rule.kind == REJECTED else ""


def vllm_parameters(params: Any) -> dict[str, Any]:
    """The fields of a vllm.SamplingParams and their values, private ones included."""
    return {name: getattr(params, name) for name in type(params).__struct_fields__}
