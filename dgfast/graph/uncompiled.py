"""Code that torch.compile has made, run as what it was made of: that alone can be watched and traced."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def uncompiled() -> Iterator[None]:
    """Inside, such code computes eagerly."""
    if "torch._dynamo" not in sys.modules:  # nobody has compiled anything, and its import takes as long as torch's
        yield
        return
    with (
        torch.compiler.set_stance("force_eager"),
        torch._dynamo.config.patch(error_on_nested_fx_trace=False),
        warnings.catch_warnings(),
    ):
        warnings.filterwarnings("ignore", r"Using `torch.compile\(module\)` when there are global hooks")
        yield
