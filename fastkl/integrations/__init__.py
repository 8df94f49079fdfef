"""Adapters that bring fastkl's scoring into other trainers and hand-written loops; each is imported on its own."""
