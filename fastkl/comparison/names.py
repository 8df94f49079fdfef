"""Which settings of a training an evaluation has, too; they are known before torch is loaded."""

SHARED = (
    *("prompts", "system_prompt", "reward", "reward_weights", "reward_timeout", "max_new_tokens", "top_k", "top_p"),
    *("min_p", "min_tokens", "banned_token_ids", "allowed_token_ids", "generator", "gpu_memory_utilization", "seed"),
    *("micro_batch_tokens", "dtype", "device"),
)
