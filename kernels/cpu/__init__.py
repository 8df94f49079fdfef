"""The passes and sources in plain PyTorch: on CPUs, in float64, and wherever Triton is missing."""
