"""Kernels run where they are chosen and can run, and are operations that torch traces and compiles."""

import sys
from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from dgfast import ops
from dgfast.errors import UserError
from tests.support.kernels import (
    DEVICE,
    INTERPRETED,
    ON_GPU,
    UPDATES,
    NormCase,
    called,
    images,
    runs_kernels,
    update_arguments,
)


# The switch -----------------------------------------------------------------------------------------------------------
def test_kernels_reference_runs_unless_triton_is_chosen_and_can_run() -> None:
    kernels = ["group_norm_silu", *UPDATES] if ON_GPU or INTERPRETED else []
    assert called(ops.kernels("reference")) == []
    assert called(ops.kernels("triton")) == kernels
    with ops.kernels("triton"):
        assert called(ops.kernels("reference")) == []


def test_kernels_choice_ends_with_its_block() -> None:
    with pytest.raises(ZeroDivisionError), ops.kernels("triton"):
        raise ZeroDivisionError
    assert ops.triton_devices() == ()


def test_kernels_unknown_choice_is_named() -> None:
    with pytest.raises(UserError, match=r"kernels 'cuda' do not exist.*reference, triton"), ops.kernels("cuda"):  # type: ignore[arg-type]
        pass


def test_kernels_missing_triton_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("dgfast.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match=r"pip install 'dgfast\[triton\]'"), ops.kernels("triton"):
        pass


# Registration ---------------------------------------------------------------------------------------------------------
def positional(name: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of each torch operation, in its order."""
    from dgfast.kernels.group_norm_silu import group_norm_silu

    if name.startswith("group_norm_silu"):
        for options, order in (((), "nchw"), (NormCase.options, "part")):
            case = NormCase((2, 8, 3, 5), 2, order=order, options=options)
            given = {"scale": None, "shift": None, "channel_bias": None} | case.arguments()
            rest = tuple(given[key] for key in ("weight", "bias", "scale", "shift", "channel_bias", "silu"))
            if name == "group_norm_silu":
                yield given["x"].requires_grad_(), case.groups, *rest[:2], case.eps, *rest[2:]
            else:
                _, mean, rstd = group_norm_silu(given["x"], case.groups, *rest[:2], case.eps, *rest[2:])
                yield case.gradient(), given["x"], mean, rstd, *rest
        return
    schema = getattr(torch.ops.dgfast, name).default._schema
    for extras in (False, True):
        given = {"net_dtype": torch.float32} | update_arguments(name, torch.float64, "nhwc", extras)
        yield tuple(given.get(argument.name) for argument in schema.arguments)


@runs_kernels
@pytest.mark.parametrize("name", ["group_norm_silu", "group_norm_silu_backward", *UPDATES])
def test_kernels_are_registered_as_torch_demands(name: str) -> None:
    called(ops.kernels("triton"))  # imports and so registers all of them
    for arguments in positional(name):
        torch.library.opcheck(getattr(torch.ops.dgfast, name).default, arguments)


@runs_kernels
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_kernels_trace_with_their_gradient_into_one_graph(mode: Literal["real", "fake"]) -> None:
    """What the runtimes do with a guided denoiser; the graph keeps the choice of its making."""
    given = NormCase((2, 8, 5, 5), 2).arguments()

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = ops.group_norm_silu(**given | {"x": leaf})
            (dx,) = torch.autograd.grad((y**2).sum(), leaf)
        return y.detach(), ops.guide(x, dx, torch.ones(len(x), device=DEVICE))

    with torch.no_grad(), ops.kernels("triton"):
        graph = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(given["x"])
    names = [node.target._opname for node in graph.graph.nodes if getattr(node.target, "namespace", "") == "dgfast"]
    assert names == ["group_norm_silu", "group_norm_silu_backward", "guide"]
    x = images(9, torch.float32, "nhwc", (2, 8, 5, 5))
    compiled = torch.compile(graph, fullgraph=True, dynamic=False, backend="inductor" if ON_GPU else "aot_eager")
    for run in (graph, compiled):
        with torch.no_grad():
            for value, truth in zip(run(x), function(x), strict=True):
                torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-4)


@runs_kernels
def test_kernels_work_inside_a_compiled_function() -> None:
    arguments = NormCase((2, 8, 5, 5), 2).arguments()
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, example: list[Tensor]) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    compiled = torch.compile(ops.group_norm_silu, fullgraph=True, backend=backend)
    with ops.kernels("triton"), torch.no_grad():
        assert torch.equal(compiled(**arguments), ops.group_norm_silu(**arguments))
    assert "dgfast.group_norm_silu.default" in seen
