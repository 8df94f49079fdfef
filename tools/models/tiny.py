"""Tiny random models of every causal architecture: some thousand parameters, every kind of layer that the real one has.

In: a model type of transformers. Out: a configuration, a model, or a folder with both and a tokenizer of words.
`shrunk` knows what the fields of a configuration mean by their names; OTHERWISE holds what a single architecture needs
besides.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

VOCAB, CONTEXT, WINDOW = 128, 96, 8
BOS, EOS, PAD = 1, 2, 0

FIELDS = {
    VOCAB: "vocab_size decoder_vocab_size vocab_size_per_layer_input encoder_hash_byte_group_vocab audio_vocab_size",
    CONTEXT: "max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length seq_length "
    "max_target_positions original_max_position_embeddings",
    WINDOW: "sliding_window sliding_window_size attention_window_size attention_chunk_size window_size "
    "keep_window_size local_attention index_topk chunk_size mamba_chunk_size local_attn_chunk_length "
    "lsh_attn_chunk_length block_size index_block_size",
    32: "hidden_size d_model n_embd emb_dim embedding_dim word_embed_proj_dim attention_hidden_size lru_width "
    "hidden_dim output_embedding_size out_hidden_size",
    16: "embedding_size input_embedding_size moe_intermediate_size shared_expert_intermediate_size ple_embed_dim "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank kv_lora_rank o_lora_rank adapter_rank "
    "hidden_size_per_layer_input hc_lowrank router_hidden_size shape_embed_dim pronunciation_embed_dim head_dim_swa "
    "prompt_mid_dim rel_extent position_bias_max_distance relative_max_distance position_bias_num_buckets num_buckets",
    48: "intermediate_size ffn_dim n_inner dff d_inner dim_ff decoder_ffn_dim encoder_ffn_dim feed_forward_size "
    "ffn_hidden_size intermediate_size_mlp dense_intermediate_size shared_intermediate_size",
    8: "head_dim dim_head d_head attention_head_dim attention_head_size kv_channels linear_head_dim "
    "linear_key_head_dim linear_value_head_dim v_head_dim index_head_dim qk_nope_head_dim mamba_d_head mamba_head_dim "
    "mamba_headdim state_size ssm_state_size mamba_d_state laurel_rank gated_norm_rank d_rel swa_head_dim "
    "mamba_n_heads mamba_num_heads n_mamba_heads",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads "
    "num_decoder_attention_heads num_encoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts linear_num_heads linear_num_value_heads qk_rope_head_dim rotary_dim index_n_heads "
    "swa_num_attention_heads time_step_rank mamba_dt_rank sliding_window_pattern block_multiple_of image_size",
    2: "num_key_value_heads num_kv_heads num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_decoder_layers num_encoder_layers num_blocks num_layers_per_stack num_experts_per_tok num_experts_per_token "
    "moe_topk moe_k top_k_experts linear_num_key_heads swa_num_key_value_heads num_mem_blocks zero_expert_num hc_mult "
    "hc_count conv_kernel mamba_d_conv linear_conv_kernel_dim conv_L_cache heads_per_ngram split_ngram_parts "
    "index_topk_blocks num_codebooks o_groups depth patch_size",
    1: "n_group topk_group n_groups mamba_n_groups mamba_ngroups n_shared_experts num_shared_experts "
    "moe_num_shared_experts num_expert_group first_k_dense_replace num_dense_layers moe_layer_start_index",
}
SIZES = {name: size for size, names in FIELDS.items() for name in names.split()}
SPECIAL = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "decoder_start_token_id": EOS}
SCALES = {
    "initializer_range": 0.2, "init_std": 0.2, "logits_scaling": 1.5, "logit_scale": 0.7, "lm_head_multiplier": 0.7,
    "logits_mup_width_multiplier": 1.5, "final_logit_softcapping": 20.0, "logits_soft_cap": 20.0,
    "output_logit_soft_cap": 20.0, "attn_logit_softcapping": 5.0, "embedding_multiplier": 1.5,
    "residual_multiplier": 0.8, "attention_multiplier": 0.4,
}  # fmt: skip
LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "num_decoder_layers")
PER_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")

DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
FOUR_LAYERS = {
    "num_hidden_layers": 4, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
}  # fmt: skip
INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 2,
}  # fmt: skip
SHARED_HYBRID = {
    "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attention_hidden_size": 64,
    "attention_head_dim": 16,
}  # fmt: skip
NOTHING_PER_LAYER = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
ENCODERS = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}}
OTHERWISE: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "parts": {"text_config": {"model_type": "gemma4_text"} | NOTHING_PER_LAYER},
        "text_config": NOTHING_PER_LAYER,
    },
    "gemma4_unified_assistant": {"parts": {"text_config": {"model_type": "gemma4_unified_text"}}},
    "musicgen": {"parts": ENCODERS | {"decoder": {"model_type": "musicgen_decoder"}}},
    "musicgen_melody": {"parts": ENCODERS | {"decoder": {"model_type": "musicgen_melody_decoder"}}},
    "falcon_h1": {"mamba_d_ssm": 64},
    "minicpm3": {"dim_model_base": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "shared_intermediate_size": 16,
    },
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "hrm_text": {"num_hidden_layers": 16, "num_layers_per_stack": 2},
    "mamba2": {"num_heads": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "youtu": {"pad_token_id": None},  # loading sets a padding token's row to zero
    "zaya": {"num_experts_per_tok": 1},
    "zamba": SHARED_HYBRID | {"num_key_value_heads": 4, "n_mamba_heads": 2},
    "zamba2": SHARED_HYBRID | {"num_key_value_heads": 4, "hybrid_layer_ids": [1, 3], "num_query_groups": 4},
    "blt": {
        "encoder_config": {"hidden_size_global": 32},
        "decoder_config": {"hidden_size_global": 32},
        "encoder_hash_byte_group_size": [3, 4],
    },
    "xlm": {"causal": True, "pad_token_id": EOS},  # it takes what follows a padding token for padding
    "xlnet": {"attn_type": "uni"},
    "reformer": {"axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 12], "attn_layers": ["local", "lsh"]},
    "xmod": {"default_language": "en_XX"},
    "gemma3n": {"text_config": FOUR_LAYERS, "vision_config": None},
    "gemma3n_text": FOUR_LAYERS,
    "gemma3": {"text_config": {"final_logit_softcapping": None}},  # which transformers does not apply there
    "gemma4": {"text_config": FOUR_LAYERS | {"initializer_range": 0.1}},
    "gemma4_text": FOUR_LAYERS | {"initializer_range": 0.1},
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8},
    "cohere_compass_text": {"rope_parameters": {"full_attention": DEFAULT_ROPE | {"mrope_section": [2, 1, 1]}}},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
}

TEXT_PART = ("gemma3n", "musicgen", "musicgen_melody")
"""Whose other parts need packages besides transformers, or whose whole cannot be made."""


def shrunk(config: Any) -> dict[str, Any]:
    """Fields for a small configuration of the same class: those of its fields that SIZES knows, and parts inside of it.

    Lists with an entry per layer keep one of each kind, so that there are as many layers as kinds, but at least two.
    """
    from transformers import PreTrainedConfig

    fields: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        own = vars(config).get(name)
        if isinstance(own, PreTrainedConfig):
            fields[name] = shrunk(own) | {"model_type": own.model_type}
        elif name in SPECIAL or (type(value) in (int, list) and name in SIZES):
            fields[name] = (SPECIAL | SIZES)[name]
        elif name in SCALES:
            fields[name] = SCALES[name]
        elif name == "is_decoder":
            fields[name] = True
    kinds = {name: list(dict.fromkeys(value or [])) for name, value in config.to_dict().items() if name in PER_LAYER}
    layers = max([2, *(len(found) for found in kinds.values())])
    fields |= {name: SIZES[name] for name in ("head_dim", "num_key_value_heads") if vars(config).get(name, 0) is None}
    if "kv_lora_rank" in fields and "num_key_value_heads" in fields:
        fields["num_key_value_heads"] = fields["num_attention_heads"]  # latent attention has no groups
    if "qk_rope_head_dim" in fields and vars(config).get("head_dim") == vars(config)["qk_rope_head_dim"]:
        fields["head_dim"] = fields["qk_rope_head_dim"]  # another name of it
    fields |= {name: layers for name in LAYERS if name in fields}
    return fields | {name: (found * layers)[:layers] for name, found in kinds.items() if found}


def merged(fields: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """`fields` with `others` in their place, parts inside of it likewise."""
    result = dict(fields)
    for name, value in others.items():
        inner = isinstance(value, Mapping) and isinstance(result.get(name), Mapping)
        result[name] = merged(result[name], value) if inner else value
    return result


def kinds() -> dict[str, str]:
    """Model type -> class, of all the causal language models that the installed transformers knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()))


def tiny_config(kind: str) -> Any:
    """A small configuration of a model type."""
    from transformers import CONFIG_MAPPING, AutoConfig

    others = dict(OTHERWISE.get(kind, {}))
    begin = {name: AutoConfig.for_model(**part) for name, part in others.pop("parts", {}).items()}
    make = CONFIG_MAPPING[kind]
    config = make(**merged(shrunk(make(**begin)), others))
    return config.get_text_config(decoder=True) if kind in TEXT_PART else config


def tiny_model(config: Any, architecture: str) -> Any:
    """A random model in float32, dropout off. Every parameter gets noise: biases and norms begin with zeros and ones,
    and a mistake in their place would not show."""
    import torch
    import transformers

    known = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    make = transformers.AutoModelForCausalLM.from_config if known else getattr(transformers, architecture)._from_config
    torch.manual_seed(0)
    model = make(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def save(model: Any, config: Any, folder: Path) -> None:
    """A folder of the model with a tokenizer of words, and the whole configuration where the model has a part of it."""
    model.save_pretrained(folder)
    if type(model.config) is not type(config):
        config.save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def tokenizer() -> Any:
    """Byte-level BPE of letters, and of words of one and two letters with a space before; every fourth begins with a.

    Of a kind that the tokenizer classes of all model types can read.
    """
    from string import ascii_lowercase as letters

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {BOS: "<bos>", EOS: "<eos>", PAD: "<pad>"}
    merges = [("Ġ", letter) for letter in letters] + [(f"Ġ{first}", letter) for first in "abc" for letter in letters]
    known = [special[i] for i in range(3)] + ["Ġ", *letters]
    merges = merges[: VOCAB - len(known)]
    known += ["".join(pair) for pair in merges]
    inner = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(known)}, merges=merges))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<pad>"
    )
