"""A function of CUDA tensors as one CUDA graph: one launch instead of thousands.

A solver step at batch 1 launches some two thousand kernels of a few microseconds, as many as the host can issue in the
time that they run; a graph is issued at once. Its tensors have fixed addresses, so inputs are copied in and results
copied out.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dgfast.graph import Function, form

_WARM_UP = 3  # as PyTorch's documentation has it: lazily made handles and workspaces must exist before the capture


def capture(function: Function, example: Sequence[Tensor | None]) -> Function:
    """`function` captured for the shapes of `example`.

    It must not wait for the device, branch on the value of a tensor or draw random numbers.
    """
    inputs, captured = [None if x is None else x.clone() for x in example], form(example)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(_WARM_UP):
            function(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads go on: one fetches the images of the last batch meanwhile, and waits for an event.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"), torch.no_grad():
        results = function(*inputs)

    def replay(*arguments: Tensor | None) -> tuple[Tensor, ...]:
        # In the place of a None the tensor of the call before would stay; one row would be spread over the batch.
        assert form(arguments) == captured, f"captured for {captured}, called with {form(arguments)}"
        for fixed, given in zip(inputs, arguments, strict=True):
            if fixed is not None and given is not None:
                fixed.copy_(given)
        graph.replay()
        return tuple(result.clone() for result in results)

    return replay
