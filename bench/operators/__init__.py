"""The scoring operators beside PyTorch and other projects' functions."""
