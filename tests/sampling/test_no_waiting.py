"""Steps wait for no GPU. In its place stands torch's device without values: whatever is uploaded or read is seen."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dgfast.config import SamplingConfig
from dgfast.networks import Networks
from dgfast.sampler import Sampler
from tests.support.guidance import DATA

aten = torch.ops.aten
CONFIGS = {
    "heun": SamplingConfig(num_steps=4),
    "churn": SamplingConfig(num_steps=4, S_churn=8.0, schedule="vp", scaling="vp"),
    "dpmpp-2m": SamplingConfig(num_steps=4, solver="dpmpp-2m"),
    "ddpm": SamplingConfig(num_steps=4, solver="ddpm"),
    "ddim": SamplingConfig(num_steps=4, solver="ddim", eta=0.5),
}


class Waiting(TorchDispatchMode):
    """Notes every operation after which the host would stand and wait for the device."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [x for x in (*args, result) if isinstance(x, Tensor)]
        moves = func in (aten._to_copy.default, aten.copy_.default) and len({x.device.type for x in tensors}) > 1
        reads = torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags
        if moves or reads:
            self.operations.append(str(func))
        return result


class ArrivedError(Exception):
    """At the last step: behind it the images are looked at, for which the host has to wait."""


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_wait_for_no_device(name: str) -> None:
    sampler = Sampler(Networks(DATA), CONFIGS[name])
    watch, seen = Waiting(), []

    def on_step(step: Any, x: Tensor, *_: Tensor) -> None:
        assert x.is_meta
        seen.append(len(watch.operations))
        if step is sampler.steps[-1]:
            raise ArrivedError

    latents = torch.empty(2, 1, 1, 1, device="meta")
    with pytest.raises(ArrivedError), watch:
        sampler.integrate(latents, None, lambda: torch.zeros_like(latents, dtype=torch.float64), on_step)
    assert seen == [2] * 4, f"the plan's times and log-variances, once; then in the steps {watch.operations[2:]}"
