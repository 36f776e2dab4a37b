"""Kernels run where they are chosen and can run, and are operations that torch traces, compiles and exports."""

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from dgfast import ops
from dgfast.errors import UserError
from tests.support.kernels import INTERPRETED, ON_GPU, OPCHECKS, NormCase, called, images, own, runs_kernels

KERNELS = ["group_norm_silu", "group_norm_silu_backward"]


# The switch -----------------------------------------------------------------------------------------------------------
def test_kernels_run_on_the_cpu_where_they_are_chosen_and_interpreted_alone() -> None:
    assert called(ops.kernels("reference")) == []
    assert called(ops.kernels("triton")) == (KERNELS[:1] if ON_GPU or INTERPRETED else [])
    assert called(nullcontext()) == (KERNELS[:1] if ON_GPU else [])
    with ops.kernels("triton"):
        assert called(ops.kernels("reference")) == []
        assert called(ops.kernels("auto")) == (KERNELS[:1] if ON_GPU else [])


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: takes nothing but the CPU")
@pytest.mark.parametrize("choice", ["auto", "triton", "reference"])
def test_kernels_on_cuda_are_the_default(choice: ops.Choice) -> None:
    """On a device that need not be there: none of these operations is executed."""
    pytest.importorskip("triton")
    names = [] if choice == "reference" else KERNELS[:1]
    with FakeTensorMode(), torch.no_grad():
        given = NormCase((2, 8, 5, 5), 2, options=()).arguments()
        given |= {k: torch.empty_like(v, device="cuda") for k, v in given.items() if isinstance(v, Tensor)}
        assert called(ops.kernels(choice), given) == names
        assert choice != "auto" or called(nullcontext(), given) == names
        assert called(ops.kernels(choice), given | {"x": given["x"].double()}) == []


def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")


def _old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9 - 3 * index, 0))


def _no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("dgfast.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)


@pytest.mark.parametrize("obstacle", [_no_compiler, _old_gpu, _no_triton], ids=lambda f: f.__name__)
def test_kernels_on_cuda_are_not_the_default_where_triton_cannot_run(
    monkeypatch: pytest.MonkeyPatch, obstacle: Callable[[pytest.MonkeyPatch], None]
) -> None:
    try:
        with monkeypatch.context() as patch:
            obstacle(patch)
            ops._triton_runs.cache_clear()
            assert not ops.takes_triton("cuda")
    finally:
        ops._triton_runs.cache_clear()


def test_kernels_choice_ends_with_its_block() -> None:
    pytest.importorskip("triton")
    with pytest.raises(ZeroDivisionError), ops.kernels("triton"):
        assert ops.takes_triton("cuda")
        with ops.kernels("reference"):
            assert not ops.takes_triton("cuda")
        raise ZeroDivisionError
    assert not ops.takes_triton("cpu")


def test_kernels_unknown_choice_is_named() -> None:
    expected = r"kernels 'cuda' do not exist.*auto, reference, triton"
    with pytest.raises(UserError, match=expected), ops.kernels("cuda"):  # type: ignore[arg-type]
        pass


def test_kernels_missing_triton_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    _no_triton(monkeypatch)
    with pytest.raises(UserError, match=r"pip install 'dgfast\[triton\]'"), ops.kernels("triton"):
        pass


# Registration ---------------------------------------------------------------------------------------------------------
def positional(name: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of each torch operation, in its order."""
    from dgfast.kernels.group_norm_silu import group_norm_silu

    for options, order in (((), "nchw"), (NormCase.options, "part")):
        case = NormCase((2, 8, 3, 5), 2, order=order, options=options)
        given = {"scale": None, "shift": None, "channel_bias": None} | case.arguments()
        rest = tuple(given[key] for key in ("weight", "bias", "scale", "shift", "channel_bias", "silu"))
        if name == "group_norm_silu":
            yield given["x"].requires_grad_(), case.groups, *rest[:2], case.eps, *rest[2:]
        else:
            _, mean, rstd = group_norm_silu(given["x"], case.groups, *rest[:2], case.eps, *rest[2:])
            yield case.gradient(), given["x"], mean, rstd, *rest


@runs_kernels
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_registered_as_torch_demands(name: str) -> None:
    for arguments in positional(name):
        torch.library.opcheck(getattr(torch.ops.dgfast, name).default, arguments, test_utils=OPCHECKS)


def with_gradient(given: dict[str, Any]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """x -> the normalisation and the gradient of the sum of its squares, as a guided denoiser has both inside."""

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = ops.group_norm_silu(**given | {"x": leaf})
            (dx,) = torch.autograd.grad((y**2).sum(), leaf)
        return y.detach(), dx

    return function


@runs_kernels
@pytest.mark.parametrize("mode", ["real", "fake"])
def test_kernels_trace_with_their_gradient_into_one_graph(mode: Literal["real", "fake"]) -> None:
    """What the runtimes do with a guided denoiser; the graph keeps the choice of its making."""
    given = NormCase((2, 8, 5, 5), 2).arguments()
    function = with_gradient(given)
    with torch.no_grad(), ops.kernels("triton"):
        graph = make_fx(function, tracing_mode=mode, _allow_non_fake_inputs=True)(given["x"])
    assert own(graph) == KERNELS
    x = images(9, torch.float32, "nhwc", (2, 8, 5, 5))
    exported = torch.export.export(graph, (x,), strict=False).module()
    compiled = torch.compile(graph, fullgraph=True, dynamic=False, backend="inductor" if ON_GPU else "eager")
    for run in (graph, exported, compiled):
        with torch.no_grad():
            for value, truth in zip(run(x), function(x), strict=True):
                torch.testing.assert_close(value, truth, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: there is no kernel to hand over")
def test_kernels_are_kept_by_an_export_and_handed_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor compiles the Triton kernels themselves: called as operations, they would need Python at run time."""
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)  # or they leave tensors on the CPU alone
    given = NormCase((2, 8, 5, 5), 2).arguments()
    with torch.no_grad(), ops.kernels("triton"):
        graph = make_fx(with_gradient(given), tracing_mode="fake", _allow_non_fake_inputs=True)(given["x"])
        exported = torch.export.export(graph, (given["x"],), strict=False).graph_module
        assert own(graph) == own(exported) == KERNELS
        static = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(given["x"])
        compiled, _ = aot_export_module(graph, [static], trace_joint=False)
    assert isinstance(compiled, GraphModule)
    calls = [node for node in compiled.graph.nodes if str(node.target) == "triton_kernel_wrapper_functional"]
    assert len(calls) == 2 and not own(compiled)
    handed: list[Any] = [call.kwargs["kwargs"] for call in calls]
    floats = {name for arguments in handed for name, value in arguments.items() if isinstance(value, float)}
    assert floats == {"EPS"}, "inductor hands numbers over in float64, unless they are constants of the kernel"


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: the file would be compared with the kernels")
def test_kernels_are_in_no_onnx_file(monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    pytest.importorskip("onnxruntime")
    from dgfast.runtimes.onnx.build import build

    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)  # or they leave tensors on the CPU alone
    given = NormCase((2, 8, 5, 5), 2).arguments()
    function, x = with_gradient(given), given["x"].contiguous()
    with ops.kernels("triton"), torch.no_grad():
        results = build(function, (x,))(x)
    with ops.kernels("reference"), torch.no_grad():
        for value, truth in zip(results, function(x), strict=True):
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
