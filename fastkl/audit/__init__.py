"""The KL audit: the alarm during a run, and the doctor for runs and for other trainers' rollouts.

The doctor reads a run folder (config.yaml, metrics.jsonl, samples.jsonl), or a
JSONL file with one object per completion, whose lists have one entry per
completion token:

    logprobs           the trainer's log-probs of the policy, as it scored them
                       (required)
    ref_logprobs       the same of the reference (required)
    sampler_logprobs   what the generator recorded when it drew the tokens;
                       shows most causes
    mask               1 where the KL counts the token, 0 where not; all 1
                       without it
    token_ids          what the trainer scored; for padding
    sampled_token_ids  what the generator drew; for re-encoding
    finish_reason      "stop" or "length"; for truncated rows
    step               the step that drew it; the policy is the reference in
                       step 1; for dropout, stale weights

A line {"settings": {...}} that holds nothing else may say how the tokens of the
lines below it were drawn: the sampling parameters of `fastkl score`, and
eos_token_ids; settings in a row are that row's. The names that TRL, verl and
OpenRLHF give these fields are understood (old_per_token_logps, old_log_probs,
action_log_probs, ...).
"""
