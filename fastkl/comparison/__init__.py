"""`fastkl eval`: several models or checkpoints on the same prompts, as a table.

Every model answers the same prompts with the same random numbers. The table
has a row for each measure and a column for each model, with standard errors
over prompts; docs/evaluation.md says what they are. Below it stand the
differences from the first model, prompt by prompt, whose errors are smaller.

A model is a local folder (a run's checkpoints/step-10 or checkpoints/best, for
example), a hub id, or "storyteller". A prompt passes where its reward is at
least --pass; temperature 0 takes the likeliest token.

Beside the table, --output holds the same as JSON, and OUTPUT.samples.jsonl the
completions. Models with different tokenizers can be compared by their rewards,
but not by --text.
"""
