"""What each ATen operation of a lowered graph is in ONNX: one table, a file for each kind of operation.

Gradients of activations, softmax, pooling and slices are written as the inference operations that they are. Results
that only a backward operation would read (a normalisation's statistics) are kept in float32.
"""

from dgfast.runtimes.onnx.operations import (  # each enters its operations
    elementwise,
    indexing,
    layout,
    numbers,
    products,
    resampling,
    sums,
)
from dgfast.runtimes.onnx.operations.table import TABLE, NoFormError, Out

__all__ = [
    "TABLE", "NoFormError", "Out", "elementwise", "indexing", "layout", "numbers", "products", "resampling", "sums",
]  # fmt: skip
