"""The sweep over all causal architectures of transformers, and its table in docs/models.md."""
