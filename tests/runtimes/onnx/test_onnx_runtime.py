"""ATen to ONNX, operation by operation, and the ONNX runtime against the function that it was given."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError
from dgfast.guidance import DiscriminatorGuidance, guided_denoiser
from dgfast.networks import Networks
from dgfast.runtimes.onnx import build as runtime
from dgfast.runtimes.onnx import session
from dgfast.runtimes.onnx.file import save
from dgfast.runtimes.onnx.graph import OnnxGraph
from dgfast.runtimes.onnx.session import OnnxEngine
from dgfast.runtimes.onnx.values import Batch
from dgfast.runtimes.onnx.writer import convert, operations
from dgfast.sampler import Sampler

NetFactory = Callable[..., Any]
WINDOW = (0.2, 0.8)  # of tau: noise levels of about 0.7 to 26
LEVELS = (0.002, 0.6, 0.9, 3.0, 20.0, 80.0)  # below, inside and above


def run(model: Any, arguments: dict[str, Tensor]) -> list[np.ndarray]:
    import onnx
    import onnxruntime

    onnx.checker.check_model(model, full_check=True)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {name: x.numpy() for name, x in arguments.items()})


def image(batch: int, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, *shape, generator=torch.Generator().manual_seed(seed))


def gradient_of(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The input gradient of a sum that gives every element a weight of its own."""

    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = function(x)
            weighted = (y * torch.linspace(-1, 2, y[0].numel()).reshape(y[0].shape)).sum()
            return torch.autograd.grad(weighted, x)

    return gradient


# Operations -----------------------------------------------------------------------------------------------------------
WEIGHT, BIAS = image(6, seed=1).abs() + 0.5, image(6, seed=2)
KERNEL, PLANES = image(4, 6, 3, 3, seed=3) / 7, image(6, 8, 8, seed=4)


def attention(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    q, k, v = tokens.unflatten(-1, (2, 3, -1)).permute(3, 0, 2, 1, 4)
    return F.scaled_dot_product_attention(q, k, v)


def of_every_kind(x: Tensor) -> Tensor:
    bent = [x.exp(), x.abs().sqrt(), x.tanh(), x.atan(), x.sigmoid(), x**3, 2**x]
    return torch.stack([*bent, x.clamp(-1, 0.5), 1 - x, x / 3], 1)


OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "elementwise": of_every_kind,
    "comparisons": lambda x: torch.where((x > 0.3) & (x <= 1), x, -1.0) + (x >= 0) + (x < 0.1) * 0.5,
    "sums": lambda x: x.mean(dim=(2, 3)) + x.sum(dim=(1, 2, 3)).unsqueeze(1) + x.amax(dim=(2, 3)) - x.amin(dim=(2, 3)),
    "norms": lambda x: torch.stack([F.normalize(x.flatten(1), p=p, dim=1) for p in (2.0, torch.inf)]).sum(0),
    "any": lambda x: (x > 2).any(dim=1) + 2.0 * x.relu().any(dim=3, keepdim=True).squeeze(3).any(dim=1)[:, None],
    "log1p": lambda x: (1e-6 * x.abs()).log1p() * 1e6,
    "silu": F.silu,
    "softmax": lambda x: x.flatten(2).softmax(-1) + x.log_softmax(1).flatten(2),
    "layer norm": lambda x: F.layer_norm(x + 5, (8,)) + F.layer_norm(x, (6, 8, 8), bias=PLANES),
    "gelu": lambda x: F.gelu(3 * x) + F.gelu(x, approximate="tanh"),
    "group norm": lambda x: F.group_norm(x + 5, 3, WEIGHT, BIAS),
    "group norms of one image": lambda x: F.group_norm(x, 3, WEIGHT) * F.group_norm(x, 3, WEIGHT.flip(0) ** 2, BIAS),
    "group norm, scale, shift": lambda x: F.group_norm(x, 2, WEIGHT, BIAS) * (x.mean((2, 3), keepdim=True) + 1) + 0.5,
    "convolution": lambda x: F.conv2d(x, KERNEL, BIAS[:4], padding=1),
    "strided": lambda x: F.conv2d(x, KERNEL, stride=2, padding=1),
    "transposed": lambda x: F.conv_transpose2d(x, KERNEL.transpose(0, 1), stride=2, padding=1, output_padding=1),
    "depthwise": lambda x: F.conv2d(x, KERNEL.flatten(0, 1)[:6, None], groups=6, padding=1),
    "pooling": lambda x: F.avg_pool2d(x, 2),
    "upsampling": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
    "slices": lambda x: torch.cat([x[:, 1:3], x[:, :, :, 1:5].flip(1).repeat(1, 1, 1, 2)[:, :2], x.chunk(2, 1)[1]], 1),
    "selection": lambda x: x[:, 2] * x[:, -1],
    "padding": lambda x: F.pad(x, (1, 2, 0, 1), value=3.0),
    "attention": attention,
    "linear": lambda x: F.linear(x.flatten(2).transpose(1, 2), KERNEL[:, :, 0, 0], BIAS[:4]),
}
_FORWARD_ONLY = ("any", "comparisons", "elementwise", "gelu", "layer norm", "norms", "padding", "sums")
BACKWARD = [name for name in OPERATIONS if name not in _FORWARD_ONLY]


@pytest.mark.parametrize("rank_4", [False, True], ids=["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("name", OPERATIONS)
def test_onnx_operations_are_what_torch_says(name: str, rank_4: bool) -> None:
    function = OPERATIONS[name]
    model = convert(lambda x: (function(x),), {"x": image(2, 6, 8, 8)}, ["y"], rank_4=rank_4)
    x = image(2, 6, 8, 8, seed=5)
    np.testing.assert_allclose(run(model, {"x": x})[0], function(x), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("rank_4", [False, True], ids=["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("name", BACKWARD)
def test_onnx_gradients_are_what_torch_says_at_every_batch(name: str, rank_4: bool) -> None:
    gradient = gradient_of(OPERATIONS[name])
    model = convert(gradient, {"x": image(2, 6, 8, 8)}, ["dx"], dynamic=True, rank_4=rank_4)
    for batch in (1, 4):
        x = image(batch, 6, 8, 8, seed=6)
        (reference,) = gradient(x)
        np.testing.assert_allclose(
            run(model, {"x": x})[0], reference, rtol=2e-5, atol=2e-5 * float(reference.abs().max())
        )


def test_onnx_images_stay_in_four_dimensions_for_tensorrt() -> None:
    gradient = gradient_of(OPERATIONS["group norm"])
    counted = operations(convert(gradient, {"x": image(2, 6, 8, 8)}, ["dx"], rank_4=True))
    assert "LayerNormalization" not in counted and counted["ReduceMean"] and counted["ReduceSum"]


def test_onnx_gradient_of_attention_sums_over_channels_not_keys() -> None:
    import onnx

    model = onnx.shape_inference.infer_shapes(convert(gradient_of(attention), {"x": image(2, 6, 8, 8)}, ["dx"]))
    shapes = {v.name: [d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.value_info}
    (summed,) = (shapes[node.input[0]] for node in model.graph.node if node.op_type == "ReduceSum")
    assert summed == [4, 64, 1]  # two heads of one channel each, for two samples of 64 keys


def test_onnx_log1p_keeps_its_digits() -> None:
    model = convert(lambda x: (x.log1p(),), {"x": torch.ones(4)}, ["y"])
    x = torch.tensor([0.0, 4e-6, 1e-3, 6e3])
    np.testing.assert_allclose(run(model, {"x": x})[0], x.double().log1p().numpy(), rtol=3e-7)


def test_onnx_group_norm_and_what_follows_it_is_one_affine_map() -> None:
    def norm(x: Tensor, scale: Tensor, shift: Tensor) -> tuple[Tensor]:
        z = F.group_norm(x, 3, WEIGHT, BIAS) * (scale[:, :, None, None] + 1) + shift[:, :, None, None]
        return (z,)

    model = convert(norm, {"x": image(2, 6, 8, 8), "scale": image(2, 6), "shift": image(2, 6)}, ["y"])
    assert [node.op_type for node in model.graph.node[-2:]] == ["Add", "Identity"]
    centred = next(node.output[0] for node in model.graph.node if node.op_type == "Sub")
    readers = [node.op_type for node in model.graph.node if centred in node.input]
    assert sorted(readers) == ["Mul", "Reshape"]  # its variance, and the map


def test_onnx_group_norm_keeps_its_digits_far_from_zero() -> None:
    """A variance that is the mean of squares less the square of the mean would lose three of them."""
    model = convert(lambda x: (F.group_norm(x, 2),), {"x": image(2, 4, 32, 16)}, ["y"])
    x = image(2, 4, 32, 16, seed=5) + 30
    np.testing.assert_allclose(run(model, {"x": x})[0], F.group_norm(x.double(), 2), rtol=0, atol=1e-5)


def test_onnx_moments_are_matrix_products_where_rows_are_long() -> None:
    """A transpose before the product, which ONNX Runtime takes into it: a row times itself without a copy."""
    model = convert(lambda x: (F.group_norm(x, 2),), {"x": image(2, 4, 32, 16)}, ["y"])
    assert operations(model)["MatMul"] == operations(model)["Transpose"] == 1
    x = image(2, 4, 32, 16, seed=5) + 3
    np.testing.assert_allclose(run(model, {"x": x})[0], F.group_norm(x, 2), rtol=2e-5, atol=2e-5)


def test_onnx_graph_writes_nothing_twice_and_nothing_unread() -> None:
    g = OnnxGraph()
    x = g.input("x", (Batch(1), 4), np.float32)
    once, again = (g.unary("Exp", x) for _ in range(2))
    there_and_back = g.transpose(g.transpose(g.reshape(g.reshape(x, (2, Batch(2))), (Batch(1), 4)), [1, 0]), [1, 0])
    assert once is again and there_and_back == x
    g.unary("Log", x)
    records, _ = g.live([once])
    assert [record.op for record in records] == ["Exp"]


# Refusals -------------------------------------------------------------------------------------------------------------
class _Strange(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.logcumsumexp(1)


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleList([nn.Identity(), _Strange()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = layer(x)
        return x


def test_onnx_names_the_module_of_an_operation_that_it_has_not() -> None:
    net = _Net()
    with pytest.raises(
        UserError, match=r"cannot export aten\.logcumsumexp\.default, called by _Net\.body\.1 \(_Strange\)"
    ):
        convert(lambda x: (net(x),), {"x": image(2, 3)}, ["y"])


def test_onnx_refuses_opsets_that_are_too_old() -> None:
    with pytest.raises(UserError, match="opset 17 is too old: dgfast writes 18 and newer"):
        convert(lambda x: (x,), {"x": image(2, 3)}, ["y"], opset=17)


def test_onnx_says_which_extra_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"onnxruntime is not installed: pip install 'dgfast\[onnx\]'"):
        session.OnnxEngine(tmp_path / "f.onnx")


def test_onnx_says_which_provider_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "f.onnx"
    save(convert(lambda x: (x + 1,), {"x": image(2, 3)}, ["y"]), path)
    with pytest.raises(UserError, match=r"has no tensorrt provider .*cpu.*onnx-gpu"):
        session.OnnxEngine(path, provider="tensorrt")


# The runtime ----------------------------------------------------------------------------------------------------------
def arguments(batch: int, label_dim: int, first: int) -> tuple[Tensor, Tensor, Tensor | None]:
    sigma = torch.tensor([LEVELS[(first + k) % len(LEVELS)] for k in range(batch)], dtype=torch.float64)
    x = (0.5 + sigma).view(-1, 1, 1, 1) * image(batch, 1, 8, 8, seed=first).double()
    return x, sigma, F.one_hot(torch.arange(batch) % label_dim, label_dim).float() if label_dim else None


@pytest.fixture(scope="module")
def networks(tiny_net: NetFactory, tiny_discriminator: NetFactory) -> Networks:
    return Networks(tiny_net(label_dim=3), tiny_discriminator(num_classes=3))


@pytest.fixture(scope="module")
def guided(networks: Networks) -> Callable[..., tuple[Tensor, Tensor]]:
    assert networks.discriminator is not None
    return guided_denoiser(networks.denoiser, (DiscriminatorGuidance(networks.discriminator, 30.0, WINDOW),))


def test_onnx_runtime_agrees_inside_and_outside_of_the_window(guided: Callable[..., tuple[Tensor, Tensor]]) -> None:
    example = arguments(3, 3, 0)
    built = runtime.build(guided, example)
    for first in range(0, 6, 3):
        inputs = arguments(3, 3, first)
        for mine, reference in zip(built(*inputs), guided(*inputs), strict=True):
            assert mine.dtype == reference.dtype == torch.float64
            largest = reference.abs().reshape(3, -1).amax(1)
            assert float(((mine - reference).abs().reshape(3, -1).amax(1) / largest).max()) < 1e-4


@pytest.mark.parametrize("published", [False, True])
def test_onnx_runtime_divides_a_batch_unless_one_sample_depends_on_another(
    networks: Networks, monkeypatch: pytest.MonkeyPatch, published: bool
) -> None:
    sizes: list[int] = []

    class Engine(OnnxEngine):
        def __call__(self, arguments: Any) -> dict[str, Tensor]:
            sizes.append(len(arguments["input_0"]))
            return super().__call__(arguments)

    assert networks.discriminator is not None
    guidance = DiscriminatorGuidance(networks.discriminator, 30.0, WINDOW, published_window=published)
    function, inputs = guided_denoiser(networks.denoiser, (guidance,)), arguments(16, 3, 0)
    monkeypatch.setattr(runtime, "OnnxEngine", Engine)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    built = runtime.build(function, inputs)
    for mine, reference in zip(built(*inputs), function(*inputs), strict=True):
        largest = reference.abs().reshape(16, -1).amax(1)
        assert float(((mine - reference).abs().reshape(16, -1).amax(1) / largest).max()) < 1e-4
    assert sizes == ([16] if published else [8, 8])


def relative(mine: Tensor, reference: Tensor) -> float:
    return float((mine - reference).abs().max() / reference.abs().max())


def test_onnx_runtime_draws_the_same_images(networks: Networks) -> None:
    built: list[Any] = []

    def build(function: Any, example: Sequence[Tensor | None]) -> Any:
        built.append(runtime.build(function, example))
        return built[-1]

    config = SamplingConfig(num_steps=3), GuidanceConfig(cfg_scale=2.0)
    images = [Sampler(networks, *config, runtime=r)([0, 1], [0, 2]) for r in ("eager", build)]
    assert built and relative(*images) < 2e-4
    assert relative(Sampler(networks, config[0])([0, 1], [0, 2]), images[0]) > 2e-3
