"""Scoring for a hand-written loop with Hugging Face models: hidden states and head of any causal language model.

    backbone_and_head(model, input_ids, attention_mask)             hidden states [B, T, H], and the head as data
    head_scores(hidden, head, ref_hidden, ref_head, target_ids)  scores of any N positions from the two
    score_tokens(policy, reference, input_ids, completion_mask)  scores of the completions' tokens, each [B, T]
    completion_mask(input_ids, prompt_tokens, stop_token_ids)    which tokens a model has sampled, bool [B, T]

A whole loop, KL-penalised RLOO, takes twenty lines:

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from fastkl.integrations.transformers import completion_mask, score_tokens
    from fastkl.storyteller import model_path

    tokenizer = AutoTokenizer.from_pretrained(model_path())
    policy = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-4)
    prompt = tokenizer("Once upon a time", return_tensors="pt").input_ids.repeat(16, 1)
    for step in range(3):
        ids = policy.generate(prompt, do_sample=True, top_k=0, max_new_tokens=32)
        mask = completion_mask(ids, prompt.shape[1], policy.generation_config.eos_token_id)
        scores = score_tokens(policy, reference, ids, mask)  # each [16, T], zero outside of the mask
        reward = torch.tensor([text.count(" a") for text in tokenizer.batch_decode(ids)])
        kl = (scores.policy_logprobs.detach() - scores.ref_logprobs).sum(1)
        total = reward - 0.1 * kl
        advantage = (total - total.mean()) * 16 / 15  # total minus the mean of the others
        loss = -(advantage * scores.policy_logprobs.sum(1)).mean()
        loss.backward(), optimizer.step(), optimizer.zero_grad()
        print(f"step {step}: reward {reward.float().mean():.2f}, KL {scores.kl.sum(1).mean():.3f} nats")

`generate` keeps 50 ids unless top_k is set. If you sample so, score the same way: score_tokens(...,
support=Support(top_k=50)), and take the scores that end in `_support`.

The first call with a model compares backbone and head with its own logits, and the batched forward with separate
ones, on a few tokens: a model that would be mis-scored is refused (UserError). Padding is never forwarded, the logits
are never stored, and dropout is off while scoring. Hidden states stay in the model's dtype, autocast included; logits
are float32 (float64 for float64 models).

PEFT: adapters count, and their weights get the gradient; adapters on the head itself are refused. torch.compile: the
backbone runs as the module has it, so compile in place (`model.model.compile()`). DistributedDataParallel and FSDP2
work from a module's forward, so give them one that scores, as `DistributedDataParallel(Scored(policy))` or
`fully_shard(Scored(policy))`; a wrapped policy would be scored without its wrapper taking part, and is refused:

    class Scored(torch.nn.Module):
        def __init__(self, policy):
            super().__init__()
            self.policy = policy

        def forward(self, ids, mask, reference=None):
            return score_tokens(self.policy, reference, ids, mask)
"""

from __future__ import annotations

from fastkl.kernels.types import Head
from fastkl.scoring.score_tokens import backbone_and_head, completion_mask, head_scores, layout_of, score_tokens

__all__ = ["Head", "backbone_and_head", "completion_mask", "head_scores", "layout_of", "score_tokens"]
