"""What an engine must reproduce: what ONNX Runtime makes of the float32 ONNX file, for inputs of every noise level."""

from itertools import count
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dgfast.export.parity import Case, Tensors
from dgfast.graph.agreement import PREDICTS_NOISE, least_sizes
from dgfast.guidance.declaration import off_values
from dgfast.runtimes.onnx.session import OnnxEngine

_LEVELS = (0.5, 3.0, 0.01, 20.0, 80.0, 1.2)  # of sigma: inside of guidance's window, below it and above
_LEVEL_FACTORS = {"sigma": 1.0, "sigma_next": 0.8, "sigma_last": 1.25}
MOST = len(_LEVELS)
"""More samples than that test nothing new."""


def case(onnx: OnnxEngine, batch: int, seed: int = 0) -> Case:
    """Inputs for an ONNX file by their names: noise levels, one-hot classes and weights; else noisy images.

    Each weight is another one, and none of them off: two that were exchanged, or a branch that is broken, would show.
    Of a user's function, those of its self-test.
    """
    if onnx.metadata.get("what") == "function":  # whose inputs nobody could guess
        stored, said = onnx.stored_inputs(), onnx.stored_case()["least"]
        return Case("example", stored, said)
    generator = torch.Generator().manual_seed(seed)
    sigma = torch.tensor([_LEVELS[k % len(_LEVELS)] for k in range(batch)])
    inputs: dict[str, Tensor] = {}
    off, above_off = off_values(), count(1.5, 0.3)
    for name, (sizes, _) in onnx.inputs.items():
        shape = [batch if isinstance(size, str) else size for size in sizes]
        if name in _LEVEL_FACTORS:
            inputs[name] = _LEVEL_FACTORS[name] * sigma
        elif name == "class_labels":
            inputs[name] = torch.eye(shape[1])[torch.arange(shape[0]) % shape[1]]
        elif name in ("log_least", "log_most"):
            inputs[name] = torch.full(shape, -2.0 if name == "log_least" else -1.0)
        elif len(shape) < 2:
            inputs[name] = torch.full(shape, off.get(name, 0.0) + next(above_off))
        else:
            spread = (0.5 + sigma).view(-1, *[1] * (len(shape) - 1))
            inputs[name] = torch.randn(shape, generator=generator) * spread
    return Case(f"batch {batch}", inputs, least_sizes(onnx.metadata.get(PREDICTS_NOISE) == "true", inputs))


def save(path: Path, inputs: Tensors, outputs: Tensors) -> None:
    """Write what `dgfast.runtimes.tensorrt.engine.read_self_test` reads."""
    sides: dict[str, Tensor] = {f"input/{name}": x for name, x in inputs.items()}
    sides |= {f"output/{name}": x for name, x in outputs.items()}
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **{name: x.cpu().numpy() for name, x in sides.items()})
