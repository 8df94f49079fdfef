"""The same passes and sources as Triton kernels, under the same names."""
