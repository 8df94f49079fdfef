"""`fastkl score`: per-token scores of completions, from JSONL to JSONL.

A line of the input holds one completion:

    prompt       a text, chat messages, or token ids (prompt_token_ids is taken
                 before it)
    completion   a text or token ids (token_ids, then sampled_token_ids, are
                 taken before it)
    sampling     how it was drawn, where lines differ: {"temperature": 0.7,
                 "top_k": 50}; the options otherwise. Also under "settings"
    mask         0/1 for each of the completion's tokens; those with 0 are not
                 scored (default: all are)
    id           copied to the output

Other fields are left alone. A line {"settings": {...}} that holds nothing else
has sampling parameters for the lines below it. The names are those of vLLM's
SamplingParams; what cannot be replayed, penalties for repetition for one, is
refused by name.

Prompts are tokenised with the tokenizer's special tokens, chats by their
template, completions without special tokens: no end of the text is added, so
write it (the tokenizer knows it as text) or give token ids where it was
sampled. Prompt and completion are tokenised apart, as a generator sees them;
where their texts together would make other tokens, the completion is scored as
it was generated, not as it would be re-encoded.

The output has a header, {"settings": {...}}, and then one line for each
completion, in order:

    line, id     where the completion stands in the input, from 1
    num_tokens   of the completion, and sums, the totals of the lists below
    token_ids    what was scored, and lists with a number for each token, nats;
                 null for an infinite one, as of an id with the logit -inf:
    policy_logprobs, ref_logprobs, entropy, kl
                 over the whole vocabulary, at the sampling temperature
    policy_logprobs_support, ref_logprobs_support, kl_support
                 over the ids that the sampler could draw, if not all
    outside_support
                 1 for a token that is not among these ids, else 0; it is scored
                 as if it were
    error        instead of all these: why the line could not be scored
                 (--skip-malformed)
"""
