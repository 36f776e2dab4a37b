"""The kernels of attention and of its gradient against float64, and where the networks take them."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from dgfast import ops
from dgfast.nets.adm_blocks import AttentionBlock
from tests.support.kernels import DEVICE, INTERPRETED, ON_GPU, OPCHECKS, Recorded, own, runs_kernels

KERNELS = ["attention", "attention_backward"]
SHAPES = {
    "one-token": (2, 1, 1, 16),
    "less-than-a-tile": (2, 2, 5, 32),
    "a-tile": (1, 2, 64, 64),
    "ragged": (1, 2, 150, 64),
    "several-tiles": (1, 1, 256, 16),
    "wide": (1, 1, 72, 128),
}
# Beside float64, on a scale of the largest number. The weights of a token are rounded to the type of the values.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# The interpreter multiplies no bfloat16; for a GPU, which has no product of float32, such tiles compile for minutes.
TYPES = [torch.float16, torch.bfloat16 if ON_GPU else torch.float32]


def tokens(
    shape: tuple[int, ...], dtype: torch.dtype = torch.float32, order: str = "three", scale: float = 1
) -> Tensor:
    """Queries, keys and values [3, B, H, N, D] as the networks lay them out."""
    batch, heads, count, channels = shape
    drawn = torch.randn(3, batch, heads, count, channels, generator=torch.Generator().manual_seed(0)) * scale
    there, back = {"three": ((1, 3, 0, 2, 4), (2, 0, 3, 1, 4)), "heads": ((1, 3, 2, 0, 4), (3, 0, 2, 1, 4))}[order]
    return drawn.to(DEVICE, dtype).permute(there).contiguous().permute(back)


def cotangent(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)


def true_values(qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """By the formula, and autograd of it, in float64."""
    leaf = qkv.detach().cpu().double().requires_grad_()
    q, k, v = leaf
    y = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
    (gradient,) = torch.autograd.grad(y, leaf, grad.cpu().double())
    return y.detach(), gradient


def own_values(qkv: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """From the kernels."""
    from dgfast.kernels.attention import attention

    leaf = qkv.detach().requires_grad_()
    y = attention(leaf)[0]
    return y.detach(), torch.autograd.grad(y, leaf, grad)[0]


def off(value: Tensor, truth: Tensor) -> float:
    return float((value.cpu().double() - truth).abs().max() / truth.abs().max())


@runs_kernels
@pytest.mark.parametrize("order", ["three", "heads"])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_attention_matches_float64(name: str, dtype: torch.dtype, order: str) -> None:
    qkv, grad = tokens(SHAPES[name], dtype, order), cotangent(SHAPES[name], dtype)
    y, gradient = own_values(qkv, grad)
    truths = true_values(qkv, grad)
    assert y.dtype == gradient.dtype == dtype
    assert y.transpose(1, 2).is_contiguous() and gradient.stride() == qkv.stride(), "what is read next would be copied"
    for value, truth in zip((y, gradient), truths, strict=True):
        assert off(value, truth) < TOLERANCE[dtype]


@runs_kernels
def test_kernels_attention_takes_a_gradient_in_any_order() -> None:
    qkv, grad = tokens((2, 2, 20, 16)), cotangent((2, 2, 16, 20)).mT
    for value, truth in zip(own_values(qkv, grad), true_values(qkv, grad), strict=True):
        assert off(value, truth) < TOLERANCE[torch.float32]


@runs_kernels
def test_kernels_attention_survives_scores_far_beyond_the_exponential() -> None:
    """Scores of some thousands: their exponentials overflow unless the largest is taken off first."""
    qkv, grad = tokens((1, 2, 100, 16), scale=30), cotangent((1, 2, 100, 16))
    for value, truth in zip(own_values(qkv, grad), true_values(qkv, grad), strict=True):
        assert off(value, truth) < 1e-3  # float32 resolves such scores to 2e-4


@runs_kernels
@pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")  # rows beyond the last, which nothing reads
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_kernels_attention_leaves_out_what_lies_beyond_the_last_token(dtype: torch.dtype) -> None:
    """Scores of -144 all, beside which the 0 of a key that is not there would have an infinite weight."""
    qkv, grad = tokens((1, 2, 20, 16), scale=0.1), cotangent((1, 2, 20, 16), dtype)
    qkv[0] += 6
    qkv[1] -= 6
    for value, truth in zip(own_values(qkv.to(dtype), grad), true_values(qkv.to(dtype), grad), strict=True):
        assert off(value, truth) < max(TOLERANCE[dtype], 3e-5)  # what float32 resolves of such scores


@runs_kernels
def test_kernels_attention_of_equal_keys_is_the_mean_of_the_values() -> None:
    qkv = tokens((1, 1, 70, 16))
    qkv[1] = 1
    y, _ = own_values(qkv, cotangent((1, 1, 70, 16)))
    torch.testing.assert_close(y, qkv[2].mean(dim=2, keepdim=True).expand_as(y), rtol=1e-5, atol=1e-6)


@runs_kernels
@pytest.mark.parametrize(
    "qkv",
    [
        torch.zeros(2, 1, 1, 8, 16), torch.zeros(3, 1, 8, 16), torch.zeros(3, 1, 1, 8, 16, dtype=torch.float64),
        torch.zeros(3, 1, 1, 8, 24), torch.zeros(3, 1, 1, 16, 8).mT,
        torch.zeros(3, 300, 300, 1, 16), torch.zeros(3, 1, 1, 8, 32, device=DEVICE)[..., :16],
        torch.zeros(3, 1, 1, 1, 16, device=DEVICE).expand(3, 1, 1, 8, 16),  # a copy to a GPU would have them closed
    ],
    ids=["two", "without heads", "float64", "odd channels", "channels apart", "heads", "gaps", "overlaps"],
)  # fmt: skip
def test_kernels_attention_refuses_what_it_would_misread(qkv: Tensor) -> None:
    from dgfast.kernels.attention import attention

    with pytest.raises(ValueError, match=r"qkv must|channels a head|more than the kernels count"):
        attention(qkv.to(DEVICE))


# The switch -----------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: takes nothing but the CPU")
@pytest.mark.parametrize(
    ("choice", "change", "names"),
    [
        ("triton", lambda qkv: qkv, KERNELS[:1]),
        ("triton", Tensor.half, KERNELS[:1]),
        ("triton", Tensor.float, []),
        ("triton", lambda qkv: qkv.new_empty(3, 2, 2, 32, 24), []),
        ("triton", lambda qkv: qkv.transpose(3, 4), []),
        ("triton", lambda qkv: qkv.narrow(3, 0, 16), []),
        ("triton", lambda qkv: qkv.narrow(1, 0, 0), KERNELS[:1]),
        ("auto", lambda qkv: qkv, []),
        ("reference", lambda qkv: qkv, []),
    ],
    ids=["bfloat16", "float16", "float32", "odd channels", "channels apart", "gaps", "empty", "auto", "reference"],
)
def test_kernels_attention_is_taken_where_it_was_asked_for_and_can_be(
    choice: ops.Choice, change: Callable[[Tensor], Tensor], names: list[str]
) -> None:
    """On a device that need not be there. No GPU has shown yet that it is faster, so that "auto" does not take it."""
    pytest.importorskip("triton")
    with FakeTensorMode(), torch.no_grad():
        qkv = torch.empty(3, 2, 2, 32, 32, dtype=torch.bfloat16, device="cuda")
        with ops.kernels(choice), Recorded() as recorded:
            assert ops.attention(change(qkv)).shape == change(qkv).shape[1:]
    assert recorded.names == names


@runs_kernels
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_attention_is_registered_as_torch_demands(name: str) -> None:
    from dgfast.kernels.attention import attention

    for order in ("three", "heads"):
        qkv = tokens((2, 2, 5, 16), order=order)
        arguments = (qkv.requires_grad_(),) if name == "attention" else (cotangent((2, 2, 5, 16)), qkv, *attention(qkv))
        torch.library.opcheck(getattr(torch.ops.dgfast, name).default, arguments, test_utils=OPCHECKS)


def with_gradient(block: AttentionBlock) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """x -> what a layer of ADM's makes of it and the gradient of the sum of its squares."""

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = block(leaf)
            (dx,) = torch.autograd.grad((y**2).sum(), leaf)
        return y.detach(), dx

    return function


def layer(new_order: bool) -> tuple[AttentionBlock, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        block = AttentionBlock(32, num_heads=2, new_order=new_order)
        torch.nn.init.normal_(block.proj_out.weight, std=0.1)  # type: ignore[arg-type]
        x = torch.randn(2, 32, 3, 5)
    return block.requires_grad_(False).to(DEVICE, torch.float16), x.to(DEVICE, torch.float16)


@runs_kernels
@pytest.mark.parametrize("new_order", [False, True])
def test_kernels_attention_stands_in_a_layer_without_copies(new_order: bool) -> None:
    """One operation there and one back. Three gradients of their own would be stacked and put in order first."""
    block, x = layer(new_order)
    function, graphs, results = with_gradient(block), [], []
    for choice in ("reference", "triton"):
        with torch.no_grad(), ops.kernels(choice):
            graphs.append(make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(x))
            results.append(function(x))
    copies = [sum(str(node.target).startswith(("aten.stack", "aten.cat")) for node in g.graph.nodes) for g in graphs]
    assert copies == [1, 0] and not own(graphs[0])
    assert [name for name in own(graphs[1]) if name in KERNELS] == KERNELS
    for reference, value in zip(*results, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: there is no kernel to hand over")
def test_kernels_attention_is_handed_to_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor compiles the Triton kernels themselves: called as operations, they would need Python at run time."""
    triton = pytest.importorskip("triton")
    for name in ops.KERNELS:  # before the switch is turned, which decides what a kernel is when it is read
        ops.register(name)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)  # or they leave tensors on the CPU alone
    block, x = layer(new_order=False)
    with torch.no_grad(), ops.kernels("triton"):
        graph = make_fx(with_gradient(block), tracing_mode="fake", _allow_non_fake_inputs=True)(x)
        static = FakeTensorMode(allow_non_fake_inputs=True).from_tensor(x)
        compiled, _ = aot_export_module(graph, [static], trace_joint=False)
    assert isinstance(compiled, GraphModule) and not own(compiled)
    calls = [node for node in compiled.graph.nodes if str(node.target) == "triton_kernel_wrapper_functional"]
    floats = {name for call in calls for name, value in call.kwargs["kwargs"].items() if isinstance(value, float)}
    assert len(calls) == 5 and floats <= {"EPS", "SCALE"}  # with the layer's normalisation and its gradient


@runs_kernels
def test_kernels_attention_leaves_the_default_alone() -> None:
    qkv = tokens((2, 2, 5, 16), torch.float16)
    with nullcontext(), Recorded() as recorded:
        assert torch.equal(ops.attention(qkv), ops.attention_reference(qkv))
    assert recorded.names == []
