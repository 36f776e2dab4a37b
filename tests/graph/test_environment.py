"""What a trace depends on besides its function: settings, sources, and code that somebody has changed in memory."""

import operator
import time
from collections.abc import Iterator
from functools import partial, update_wrapper, wraps
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast import ops
from dgfast.graph import environment
from dgfast.graph.key import NamelessError
from dgfast.guidance import DiscriminatorGuidance, compose
from dgfast.guidance import discriminator as discriminator_module
from dgfast.guidance import gradient as gradient_module
from dgfast.nets import blocks
from tests.support.graphs import Nets, guided, key

pytestmark = pytest.mark.usefixtures("folder")


def _settings() -> Iterator[tuple[Any, ...]]:
    attention, mkldnn = torch.backends.cuda, torch.backends.mkldnn
    yield "deterministic", *(partial(torch.use_deterministic_algorithms, on) for on in (False, True))
    yield "dtype", *(partial(torch.set_default_dtype, dtype) for dtype in (torch.float64, torch.float32))
    yield "matmul", *(partial(torch.set_float32_matmul_precision, how) for how in ("medium", "highest"))
    yield "attention", *(partial(attention.enable_flash_sdp, on) for on in (False, True))
    yield "onednn", *(partial(setattr, mkldnn, "enabled", on) for on in (False, True))


@pytest.mark.parametrize(("change", "restore"), [pytest.param(*s[1:], id=s[0]) for s in _settings()])
def test_graph_cache_misses_other_settings(tiny: Nets, change: Any, restore: Any) -> None:
    restore()
    before = key(guided(tiny))
    try:
        change()
        assert before != key(guided(tiny)) is not None
    finally:
        restore()
    assert before == key(guided(tiny))


def test_graph_cache_misses_other_kernels(tiny: Nets, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)  # or they leave tensors on the CPU alone
    before = key(guided(tiny))
    with ops.kernels("triton"):
        assert before != key(guided(tiny)) is not None


def test_graph_cache_misses_other_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for name, version in (("H100", 91000), ("H200", 91000), ("H200", 92000), ("H200", 92000)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda version=version: version)
        made.append(environment.environment(torch.device("cuda", 0)))
    assert made[0] != made[1] != made[2] == made[3]


def test_graph_cache_misses_other_sources(tiny: Nets, monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(guided(tiny))
    monkeypatch.setattr(environment, "_hash", lambda *_: "another")
    assert before != key(guided(tiny)) is not None


def test_graph_cache_keeps_nothing_while_sources_change(tiny: Nets, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "IMPORTED_AT", time.time())
    assert key(guided(tiny)) is not None
    monkeypatch.setattr(environment, "IMPORTED_AT", (environment._ROOT / "job.py").stat().st_ctime - 1)
    assert key(guided(tiny)) is None


def test_graph_cache_keeps_nothing_under_a_mode() -> None:
    with torch.device("cpu"), pytest.raises(NamelessError, match="modes"):
        environment.environment(torch.device("cpu"))


def test_graph_cache_keeps_nothing_under_a_hook_of_all_modules(tiny: Nets) -> None:
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert key(guided(tiny)) is None
    finally:
        hook.remove()


# Code changed in memory -----------------------------------------------------------------------------------------------
def _mine(x: Tensor, *_: Any) -> Tensor:
    return x


class _Mine:
    def __call__(self, x: Tensor, *_: Any) -> Tensor:
        return x


@pytest.mark.parametrize(
    ("holder", "name", "value"),
    [
        (discriminator_module, "LOGIT_LIMIT", 1.0), (DiscriminatorGuidance, "gradients", 0),
        (compose, "corrected", gradient_module.denoiser_gate), (blocks.Conv2d, "forward", blocks.Linear.forward),
        (blocks.Conv2d, "forward", nn.Identity.forward), (compose, "denoiser_gate", torch.relu), (F, "silu", F.relu),
    ],
)  # fmt: skip
def test_graph_cache_misses_changed_code(
    tiny: Nets, monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, value: Any
) -> None:
    before = key(guided(tiny))
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, value)
        assert before != key(guided(tiny)) is not None
    assert before == key(guided(tiny))


@pytest.mark.parametrize(
    ("holder", "name", "value"),
    [
        (blocks.Conv2d, "forward", _mine), (blocks.Conv2d, "forward", staticmethod(_mine)),
        (blocks.Conv2d, "kernel", property(_mine)), (DiscriminatorGuidance, "correct", partial(_mine)),
        (ops, "group_norm_silu_reference", _mine), (compose, "corrected", torch.no_grad()(_mine)),
        (compose, "corrected", wraps(compose.corrected)(_mine)),
        (compose, "corrected", update_wrapper(_Mine(), compose.corrected)), (blocks, "ops", ModuleType("mine")),
        (blocks, "Linear", type("Linear", (nn.Linear,), {"__module__": "mine"})),
        (F, "silu", _mine), (F, "silu", partial(operator.mul, 2)), (torch, "relu", _mine), (Tensor, "view", _mine),
        (nn.Linear, "forward", _mine), (nn.Conv1d, "_conv_forward", _mine), (nn.Module, "__call__", _mine),
    ],
)  # fmt: skip
def test_graph_cache_keeps_nothing_of_patched_code(
    tiny: Nets, monkeypatch: pytest.MonkeyPatch, holder: Any, name: str, value: Any
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, value, raising=False)
        assert key(guided(tiny)) is None
    assert key(guided(tiny)) is not None
