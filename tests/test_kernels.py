"""The operations of dgfast/ops.py against float64 and their formulas, and every Triton kernel against its reference.

Kernels run in this process on a GPU, or on the CPU in Triton's interpreter, which is chosen before Triton is first
imported. Where neither holds, `test_kernels_in_the_interpreter` runs those tests in a process of their own.
"""

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dgfast import ops
from dgfast.errors import UserError
from dgfast.nets.blocks import GroupNorm

ON_GPU = torch.cuda.is_available()
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)

Test = Callable[..., None]


def runs_kernels(test: Test) -> Test:
    """Collect this test only where kernels can run."""
    test.__test__ = ON_GPU or INTERPRETED  # type: ignore[attr-defined]  # pytest's own switch
    return test


if not (ON_GPU or INTERPRETED):

    def test_kernels_in_the_interpreter() -> None:
        command = [sys.executable, "-m", "pytest", __file__, "-q", "--tb=short", "-p", "no:cacheprovider"]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        root = Path(__file__).parents[1]
        done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
        print(done.stdout)
        if done.returncode:
            pytest.fail(done.stdout + done.stderr, pytrace=False)


# Inputs ---------------------------------------------------------------------------------------------------------------
def in_order(x: Tensor, order: str) -> Tensor:
    """x [B, C, H, W] with the same values in another memory order: nchw, nhwc, or a part of something larger."""
    if order == "part":
        return torch.cat([x, x], dim=3)[..., : x.shape[3]]
    return x.contiguous(memory_format=torch.channels_last if order == "nhwc" else torch.contiguous_format)


def error(value: Tensor, truth: Tensor, rtol: float, atol: float) -> float:
    """Largest error in units of the tolerance; NaN counts as infinite."""
    value = value.double().cpu()
    ratio = ((value - truth).abs() / (rtol * truth.abs() + atol)).max()
    return math.inf if bool(ratio.isnan()) else float(ratio)


# The interpreter truncates when it stores bfloat16, so that a whole unit in the last place may be lost.
RTOL = {torch.float64: 1e-13, torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}


@dataclass(frozen=True)
class NormCase:
    """A group normalisation of random images, with every option unless told otherwise."""

    shape: tuple[int, int, int, int]
    groups: int
    dtype: torch.dtype = torch.float32
    order: str = "nhwc"
    options: tuple[str, ...] = ("scale", "shift", "channel_bias", "silu")
    mean: float = 0.3
    eps: float = 1e-5

    def arguments(self) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(DEVICE, self.dtype)

        batch, channels = self.shape[:2]
        scale, shift = normal(batch, 2 * channels).chunk(2, dim=1)  # as the nets have them: rows of a wider tensor
        rows = {"scale": scale, "shift": shift, "channel_bias": normal(batch, channels)}
        return {
            "x": in_order(normal(*self.shape) + self.mean, self.order),
            "num_groups": self.groups,
            "weight": normal(channels),
            "bias": normal(channels),
            "eps": self.eps,
            **{name: row for name, row in rows.items() if name in self.options},
            "silu": "silu" in self.options,
        }

    def gradient(self) -> Tensor:
        grad = torch.randn(self.shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, self.dtype)
        return in_order(grad, "nchw")  # whatever the order of x


def in_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same arguments, after any rounding, on the CPU and with every result in float64."""
    wide = {k: v.detach().double().cpu() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    return wide | ({"net_dtype": torch.float64} if "net_dtype" in wide else {})


def per_sample(count: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(DEVICE, dtype) + 0.5


def images(seed: int, dtype: torch.dtype, order: str = "nchw", shape: tuple[int, ...] = (3, 5, 7, 11)) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return in_order(x.to(DEVICE, dtype), order)


def update_arguments(name: str, state: torch.dtype, order: str, extras: bool) -> dict[str, Any]:
    """Arguments of one of the solver's operations, by name."""
    count = 3
    if name == "churn":
        coefficients = {"scale_x": per_sample(count, 1), "scale_noise": per_sample(count, 2)}
        return {"x": images(0, state, order), "noise": images(1, state), **coefficients}
    if name == "guide":
        gradient = images(1, torch.bfloat16 if extras else torch.float32)
        return {"denoised": images(0, state, order), "gradient": gradient, "gate": per_sample(count, 3)}
    arguments = {"x": images(0, state, order), "denoised": images(1, torch.float32)}
    arguments |= {key: per_sample(count, 4 + i).view(-1, 1, 1, 1) for i, key in enumerate("abh")}
    if name == "heun_update":
        arguments |= {"d": images(2, state), "x_prime": images(3, state, order), "w": 0.3}
    if extras:
        arguments |= {"gradient": images(4, torch.bfloat16), "gate": per_sample(count, 7, torch.float32)}
        arguments |= {"c_in": per_sample(count, 8), "net_dtype": torch.bfloat16}
    return arguments


UPDATES = ("churn", "guide", "euler_update", "heun_update")


def listed(result: Tensor | tuple[Tensor | None, ...]) -> list[Tensor]:
    """The tensors that an operation returned."""
    return [value for value in (result if isinstance(result, tuple) else (result,)) if value is not None]


# References -----------------------------------------------------------------------------------------------------------
def test_kernels_group_norm_reference_is_the_formula() -> None:
    arguments = in_float64(NormCase((3, 12, 7, 7), 3).arguments())
    x, eps = arguments["x"] + arguments["channel_bias"][:, :, None, None], arguments["eps"]
    grouped = x.reshape(3, 3, -1)
    centred = grouped - grouped.mean(-1, keepdim=True)
    normed = (centred / ((centred**2).mean(-1, keepdim=True) + eps) ** 0.5).view(x.shape)
    z = normed * arguments["weight"][:, None, None] + arguments["bias"][:, None, None]
    z = z * (1 + arguments["scale"][:, :, None, None]) + arguments["shift"][:, :, None, None]
    torch.testing.assert_close(ops.group_norm_silu(**arguments), z / (1 + (-z).exp()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ops.group_norm_silu(**arguments | {"silu": False}), z, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_kernels_group_norm_reference_is_what_the_blocks_write_bit_for_bit(dtype: torch.dtype) -> None:
    norm = GroupNorm(24).to(dtype)
    x, params = torch.randn(2, 24, 5, 5, dtype=dtype), torch.randn(2, 48, dtype=dtype)
    scale, shift = params[:, :, None, None].chunk(2, dim=1)
    given = (norm.num_groups, norm.weight, norm.bias, norm.eps)
    ours = ops.group_norm_silu(x, *given, *params.chunk(2, dim=1))
    assert torch.equal(ours, F.silu(norm(x) * (scale + 1) + shift))
    assert torch.equal(ops.group_norm_silu(x, *given), F.silu(norm(x)))
    added = ops.group_norm_silu(x, *given, channel_bias=params[:, :24], silu=False)
    assert torch.equal(added, norm(x + params[:, :24, None, None]))


def test_kernels_group_norm_reference_has_every_gradient() -> None:
    arguments = in_float64(NormCase((2, 4, 2, 3), 2).arguments())
    tensors = {k: v.detach().clone().requires_grad_() for k, v in arguments.items() if isinstance(v, Tensor)}

    def function(*values: Tensor) -> Tensor:
        return ops.group_norm_silu(**arguments | dict(zip(tensors, values, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("name", UPDATES)
def test_kernels_update_references_are_the_formulas(name: str) -> None:
    """One pixel of each sample in Python's own arithmetic."""
    arguments = in_float64(update_arguments(name, torch.float64, "nhwc", extras=True))
    results = listed(getattr(ops, name)(**arguments))
    for i in range(3):
        v = {k: v.flatten(1)[i, -1].item() for k, v in arguments.items() if isinstance(v, Tensor) and v.ndim == 4}
        v |= {k: v.flatten()[i].item() for k, v in arguments.items() if isinstance(v, Tensor) and v.numel() == 3}
        if name == "churn":
            truth = [v["scale_x"] * v["x"] + v["scale_noise"] * v["noise"]]
        elif name == "guide":
            truth = [v["denoised"] + v["gate"] * v["gradient"]]
        else:
            d = v["a"] * v.get("x_prime", v["x"]) - v["b"] * (v["denoised"] + v["gate"] * v["gradient"])
            mean = d if name == "euler_update" else 0.7 * v["d"] + 0.3 * d
            x_next = v["x"] + v["h"] * mean
            truth = [x_next, *([d] if name == "euler_update" else []), v["c_in"] * x_next]
        assert [r.flatten(1)[i, -1].item() for r in results] == pytest.approx(truth, rel=1e-13)


def test_kernels_euler_update_to_no_noise_ends_at_the_denoised_image() -> None:
    """EDM's coordinates: a = b = 1 / sigma, h = -sigma."""
    x, denoised, sigma = images(0, torch.float64), images(1, torch.float32), per_sample(3, 2)
    x_next, _, net_input = ops.euler_update(x, denoised, 1 / sigma, 1 / sigma, -sigma)
    torch.testing.assert_close(x_next, denoised.double(), rtol=1e-12, atol=1e-12)
    assert net_input is None


# The switch -----------------------------------------------------------------------------------------------------------
class Recorded(TorchDispatchMode):
    """Names of dgfast's own operations among those that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "dgfast":
            self.names.append(func._opname)
        return func(*args, **(kwargs or {}))


def called(context: AbstractContextManager[None]) -> list[str]:
    """Which of dgfast's own operations a call of every function of `ops` reaches."""
    with context, Recorded() as recorded:
        ops.group_norm_silu(**NormCase((2, 8, 3, 3), 2).arguments())
        for name in UPDATES:
            getattr(ops, name)(**update_arguments(name, torch.float32, "nchw", extras=False))
    return recorded.names


def test_kernels_reference_runs_unless_triton_is_chosen_and_can_run() -> None:
    kernels = ["group_norm_silu", *UPDATES] if ON_GPU or INTERPRETED else []
    assert called(ops.kernels("reference")) == []
    assert called(ops.kernels("triton")) == kernels
    with ops.kernels("triton"):
        assert called(ops.kernels("reference")) == []


def test_kernels_choice_ends_with_its_block() -> None:
    with pytest.raises(ZeroDivisionError), ops.kernels("triton"):
        raise ZeroDivisionError
    assert ops._triton_devices() == ()


def test_kernels_unknown_choice_is_named() -> None:
    with pytest.raises(UserError, match=r"kernels 'cuda' do not exist.*reference, triton"), ops.kernels("cuda"):  # type: ignore[arg-type]
        pass


def test_kernels_missing_triton_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("dgfast.kernels.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(UserError, match="pip install triton"), ops.kernels("triton"):
        pass


# Group normalisation --------------------------------------------------------------------------------------------------
SHAPES = {
    "odd": ((3, 12, 7, 7), 3),
    "six-a-group": ((2, 24, 5, 3), 4),
    "one-group": ((2, 48, 4, 4), 1),
    "one-a-group": ((2, 5, 6, 6), 5),
    "one-pixel": ((2, 8, 1, 1), 2),
    "one-channel": ((2, 1, 5, 5), 1),
    "wide": ((1, 512, 4, 4), 32),
    "looped": ((1, 32, 32, 32), 8),
    "looped-odd": ((2, 12, 43, 37), 3),
}


def norm_and_gradient(case: NormCase) -> tuple[Tensor, Tensor]:
    """Both from the kernels."""
    arguments = case.arguments()
    arguments["x"].requires_grad_()
    with ops.kernels("triton"):
        y = ops.group_norm_silu(**arguments)
        (dx,) = torch.autograd.grad(y, arguments["x"], case.gradient())
    return y.detach(), dx


def true_norm_and_gradient(case: NormCase) -> tuple[Tensor, Tensor]:
    """Both from autograd of the reference in float64, for the same rounded inputs."""
    arguments = in_float64(case.arguments())
    arguments["x"].requires_grad_()
    y = ops.group_norm_silu_reference(**arguments)
    (dx,) = torch.autograd.grad(y, arguments["x"], case.gradient().double().cpu())
    return y.detach(), dx


@runs_kernels
@pytest.mark.parametrize("order", ["nhwc", "nchw", "part"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_group_norm_matches_float64(name: str, dtype: torch.dtype, order: str) -> None:
    case = NormCase(*SHAPES[name], dtype=dtype, order=order)
    y, dx = norm_and_gradient(case)
    true_y, true_dx = true_norm_and_gradient(case)
    assert y.dtype == dx.dtype == dtype
    memory = torch.contiguous_format if order == "nchw" else torch.channels_last
    assert y.is_contiguous(memory_format=memory) and dx.is_contiguous(memory_format=memory)
    assert error(y, true_y, RTOL[dtype], atol=1e-5) <= 1
    assert error(dx, true_dx, RTOL[dtype], atol=1e-5 * float(true_dx.abs().max())) <= 1


OPTIONS = [
    tuple(o for o, on in zip(NormCase.options, chosen, strict=True) if on) for chosen in product((0, 1), repeat=4)
]


@runs_kernels
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "+".join(options) or "plain")
def test_kernels_group_norm_options(options: tuple[str, ...]) -> None:
    case = NormCase((2, 6, 5, 7), 2, options=options)
    for value, truth in zip(norm_and_gradient(case), true_norm_and_gradient(case), strict=True):
        assert error(value, truth, 1e-5, atol=1e-5) <= 1


# numpy's, in the interpreter: where nothing is stored, or where the activation is 0 anyway
overflows = pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")


@runs_kernels
@overflows
@pytest.mark.parametrize("shape", [(2, 8, 6, 6), (1, 8, 80, 80)], ids=["resident", "looped"])
def test_kernels_group_norm_survives_a_mean_far_beyond_the_deviation(shape: tuple[int, int, int, int]) -> None:
    """float32 resolves 1000 to 6e-5; E[x^2] - E[x]^2 would be off by 6e-2."""
    case = NormCase(shape, 2, mean=1000.0)
    for value, truth in zip(norm_and_gradient(case), true_norm_and_gradient(case), strict=True):
        assert error(value, truth, 0, atol=1e-3 * float(truth.abs().max())) <= 1


@runs_kernels
@pytest.mark.parametrize("order", ["nhwc", "nchw"])
def test_kernels_group_norm_of_a_constant_image_is_its_bias(order: str) -> None:
    """Deviation 0, where only eps stands between the kernel and 0 / 0; gradients must be finite too."""
    arguments = NormCase((2, 8, 70, 70), 2, order=order, options=()).arguments()
    arguments["x"] = torch.full_like(arguments["x"], 3.0).requires_grad_()
    with ops.kernels("triton"):
        y = ops.group_norm_silu(**arguments)
        (dx,) = torch.autograd.grad(y.sum(), arguments["x"])
    # A mean wrong in its last bit, 2e-7 of 3, is multiplied by 1 / sqrt(eps) = 316 and the weight.
    torch.testing.assert_close(y.detach(), arguments["bias"][:, None, None].expand_as(y), rtol=0, atol=1e-3)
    assert bool(dx.isfinite().all())


@runs_kernels
@overflows
def test_kernels_group_norm_activation_is_finite_far_out() -> None:
    case = NormCase((2, 8, 5, 5), 2)
    arguments = case.arguments()
    arguments["weight"] = arguments["weight"] * 1e4
    with ops.kernels("triton"):
        x = arguments["x"].requires_grad_()
        y = ops.group_norm_silu(**arguments)
        (dx,) = torch.autograd.grad(y.sum(), x)
    assert bool(y.isfinite().all() & dx.isfinite().all())
    assert error(y.detach(), ops.group_norm_silu_reference(**in_float64(arguments)).detach(), 1e-4, atol=1e-2) <= 1


@runs_kernels
def test_kernels_group_norm_returns_the_statistics_in_float32() -> None:
    from dgfast.kernels.group_norm_silu import group_norm_silu

    arguments = NormCase((3, 12, 7, 7), 3, torch.bfloat16, options=("channel_bias",)).arguments()
    channel_bias = arguments.pop("channel_bias")
    _, mean, rstd = group_norm_silu(**arguments, scale=None, shift=None, channel_bias=channel_bias)
    grouped = (arguments["x"].double() + channel_bias.double()[:, :, None, None]).reshape(3, 3, -1).cpu()
    assert mean.dtype == rstd.dtype == torch.float32
    assert error(mean, grouped.mean(-1), 1e-6, atol=1e-6) <= 1
    assert error(rstd, (grouped.var(-1, unbiased=False) + 1e-5).rsqrt(), 1e-5, atol=0) <= 1


@runs_kernels
@pytest.mark.parametrize("name", ["weight", "bias", "scale", "shift", "channel_bias"])
def test_kernels_group_norm_refuses_gradients_it_does_not_have(name: str) -> None:
    arguments = NormCase((2, 8, 3, 3), 2).arguments()
    arguments[name] = arguments[name].detach().requires_grad_()
    with ops.kernels("triton"):
        with pytest.raises(RuntimeError, match="gradient for x alone: freeze"):
            ops.group_norm_silu(**arguments)
        with torch.no_grad():
            ops.group_norm_silu(**arguments)


@runs_kernels
@pytest.mark.parametrize(
    "wrong",
    [
        {"x": torch.zeros(2, 8, 9)},
        {"num_groups": 3},
        {"weight": torch.zeros(7)},
        {"scale": torch.zeros(1, 8)},
        {"channel_bias": torch.zeros(2, 8, 1, 1)},
    ],
    ids=lambda wrong: next(iter(wrong)),
)
def test_kernels_group_norm_refuses_what_it_would_read_past_the_end_of(wrong: dict[str, Any]) -> None:
    moved = {name: value.to(DEVICE) if isinstance(value, Tensor) else value for name, value in wrong.items()}
    with ops.kernels("triton"), pytest.raises(ValueError, match=r"x must be|groups|per-channel"):
        ops.group_norm_silu(**NormCase((2, 8, 3, 3), 2).arguments() | moved)


@runs_kernels
def test_kernels_group_norm_in_float64_takes_the_reference() -> None:
    arguments = {
        k: v.double() if isinstance(v, Tensor) else v for k, v in NormCase((2, 8, 3, 3), 2).arguments().items()
    }
    with ops.kernels("triton"):
        assert torch.equal(ops.group_norm_silu(**arguments), ops.group_norm_silu_reference(**arguments))


# Solver and guidance --------------------------------------------------------------------------------------------------
@runs_kernels
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "extras"])
@pytest.mark.parametrize("order", ["nchw", "nhwc", "part"])
@pytest.mark.parametrize("state", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", UPDATES)
def test_kernels_updates_match_float64(name: str, state: torch.dtype, order: str, extras: bool) -> None:
    arguments = update_arguments(name, state, order, extras)
    with ops.kernels("triton"):
        results = listed(getattr(ops, name)(**arguments))
    truths = listed(getattr(ops, f"{name}_reference")(**in_float64(arguments)))
    dtypes = [state] * len(results) if "c_in" not in arguments else [*[state] * (len(results) - 1), torch.bfloat16]
    for value, truth, dtype in zip(results, truths, dtypes, strict=True):
        assert value.dtype == dtype
        assert value.is_contiguous(memory_format=torch.contiguous_format if order == "nchw" else torch.channels_last)
        assert error(value, truth, RTOL[dtype], atol=RTOL[state]) <= 1


@runs_kernels
@pytest.mark.parametrize("name", UPDATES)
def test_kernels_updates_refuse_other_shapes(name: str) -> None:
    arguments = update_arguments(name, torch.float32, "nchw", extras=False)
    image = {"churn": "noise", "guide": "gradient"}.get(name, "denoised")
    coefficient = {"churn": "scale_x", "guide": "gate"}.get(name, "a")
    with ops.kernels("triton"):
        with pytest.raises(ValueError, match="does not match"):
            getattr(ops, name)(**arguments | {image: arguments[image][:, :4]})
        with pytest.raises(ValueError, match="2 coefficients"):
            getattr(ops, name)(**arguments | {coefficient: arguments[coefficient][:2]})


# Registration ---------------------------------------------------------------------------------------------------------
def positional(name: str) -> Iterator[tuple[Any, ...]]:
    """Arguments of each torch operation, in its order."""
    from dgfast.kernels.group_norm_silu import group_norm_silu

    if name.startswith("group_norm_silu"):
        for options, order in (((), "nchw"), (NormCase.options, "nhwc"), (("scale", "silu"), "part")):
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
def test_kernels_trace_with_their_gradient_into_one_graph(mode: str) -> None:
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
