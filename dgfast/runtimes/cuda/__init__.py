"""CUDA: inductor's kernels, networks on streams beside one another, whole steps as one CUDA graph."""
