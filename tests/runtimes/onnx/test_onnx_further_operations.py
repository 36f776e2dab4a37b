"""Operations of other people's functions in ONNX, with their input gradients, against eager."""

from collections.abc import Callable

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast.errors import UserError
from dgfast.runtimes.onnx.writer import convert
from tests.runtimes.onnx.test_onnx_runtime import run

Operations = dict[str, Callable[[Tensor], Tensor]]

ROWS, PAIRS = torch.tensor([0, 2, -1, 4]), torch.tensor([[0, 3, 5], [1, 1, 2], [5, 0, 3], [2, 4, 1], [3, 2, 0]])
IMAGE = torch.linspace(-2, 3, 2 * 4 * 8 * 8).sin().reshape(2, 4, 8, 8)
EMBEDDING = torch.linspace(-1, 1, 42).sin().reshape(7, 6)
torch.manual_seed(0)
NORM, RECURRENT = nn.BatchNorm2d(4).eval().requires_grad_(False), nn.GRU(6, 5, batch_first=True).requires_grad_(False)


def image(x: Tensor) -> Tensor:
    """An image of which every pixel depends on x."""
    return IMAGE * (x.tanh().sum() / 7 + 1)


GROUPS: dict[str, Operations] = {
    "functions": {
        "tan": lambda x: (x / 4).tan(),
        "asin": lambda x: (x / 9).asin(),
        "acos": lambda x: (x / 9).acos(),
        "sinh": torch.sinh,
        "cosh": torch.cosh,
        "asinh": torch.asinh,
        "acosh": lambda x: (x.abs() + 1.1).acosh(),
        "atanh": lambda x: (x / 9).atanh(),
        "atan2": lambda x: torch.atan2(x, x.flip(1) + 0.3),
        "exp2": torch.exp2,
        "log2": lambda x: (x.abs() + 0.1).log2(),
        "log10": lambda x: (x.abs() + 0.1).log10(),
        "erfc": torch.erfc,
        "hypot": lambda x: torch.hypot(x, x + 1),
        "logaddexp": lambda x: torch.logaddexp(x, 2 * x),
        "xlogy": lambda x: torch.xlogy(x, x.abs() + 0.1),
        "square": torch.square,
        "power": lambda x: x.abs() ** 2.5,
        "sinc": torch.sinc,
        "lerp": lambda x: torch.lerp(x, 2 * x, 0.3),
        "addcdiv": lambda x: x.addcdiv(x, x.abs() + 1),
    },
    "activations": {
        "elu": F.elu,
        "leaky_relu": F.leaky_relu,
        "relu6": F.relu6,
        "hardswish": F.hardswish,
        "mish": F.mish,
        "hardsigmoid": F.hardsigmoid,
        "selu": F.selu,
        "celu": F.celu,
        "logsigmoid": F.logsigmoid,
        "glu": F.glu,
        "softplus": F.softplus,
        "softsign": F.softsign,
        "hardtanh": F.hardtanh,
        "gelu": F.gelu,
        "softmin": lambda x: F.softmin(x, 1),
        "prelu": lambda x: F.prelu(x, torch.tensor([0.2])),
        "tanhshrink": F.tanhshrink,
    },
    "truths and roundings": {
        "remainder": lambda x: x.remainder(0.7),
        "negative": lambda x: x.remainder(-0.7),
        "fmod": lambda x: x.fmod(0.7),
        "ceil": lambda x: x.ceil() * x,
        "round": lambda x: x.round() * x,
        "trunc": lambda x: x.trunc() * x,
        "floor division": lambda x: (x.detach() // 0.3) * x,
        "unequal": lambda x: x * (x != 0),
        "not": lambda x: x * ~(x > 0),
        "xor": lambda x: x * ((x > 0) ^ (x < 1)),
        "any": lambda x: x * (x > 2).any(),
        "all": lambda x: x * (x > -9).all(1, keepdim=True),
        "nan": lambda x: torch.where(x.isnan(), 0.0, x),
        "clamp": lambda x: x.clamp(-x.abs() / 2, x + 1),
        "heaviside": lambda x: x * (x > 0) * (x < 2),
        "bits": lambda x: x * (ROWS[[0, 1]].sum() & 6),
        "sign": lambda x: x.sgn() * x,
        "frac": torch.frac,
    },
    "sums": {
        "cumsum": lambda x: x.cumsum(1),
        "cumprod": lambda x: x.cumprod(1),
        "prod": lambda x: x.prod(1),
        "prod of all": torch.prod,
        "var": lambda x: x.var(1),
        "std": lambda x: x.std((0, 1), correction=0),
        "logsumexp": lambda x: x.logsumexp(1),
        "norm 1": lambda x: x.norm(p=1, dim=1),
        "norm 2": lambda x: x.norm(dim=1),
        "norm 3": lambda x: torch.linalg.vector_norm(x, 3, dim=1),
        "cdist": lambda x: torch.cdist(x, x + 1),
        "norm -inf": lambda x: torch.linalg.vector_norm(x, -torch.inf, dim=1),
        "cdist 1": lambda x: torch.cdist(x, x + 1, p=1),
        "pairs": lambda x: (x[:, None] - x[None]).pow(2).sum(-1),
        "einsum": lambda x: torch.einsum("ij,ij,j->i", x, x, x[0]),
        "outer": lambda x: torch.outer(x[0], x[1]),
        "cross": lambda x: torch.linalg.cross(x[:, :3], x[:, 3:]),
        "trace": lambda x: x[:5, :5].trace(),
        "cross entropy": lambda x: F.cross_entropy(x, torch.arange(5)),
        "huber": lambda x: F.huber_loss(x, 3 * x.sin()),
        "cosine": lambda x: F.cosine_similarity(x, x.sin() + 1),
        "rms norm": lambda x: F.rms_norm(x, (6,)),
    },
    "indices": {
        "index": lambda x: x[ROWS] * 2,
        "columns": lambda x: x[:, ROWS],
        "both": lambda x: x[ROWS, ROWS],
        "apart": lambda x: x.reshape(5, 3, 2)[ROWS, :, [0, 1, 1, 0]],
        "index_select": lambda x: x.index_select(0, ROWS[[0, 1]]),
        "inner": lambda x: x.reshape(3, 5, 2)[:, ROWS, [0, 1, 1, 0]],
        "gather": lambda x: x.gather(1, PAIRS),
        "scatter": lambda x: x.new_zeros(5, 6).scatter(1, PAIRS, x[:, :3]),
        "scatter_add": lambda x: x.sin().scatter_add(1, PAIRS[:4, :2], x[1:, 2:4]),
        "amax": lambda x: x.new_zeros(5, 6).scatter_reduce(1, PAIRS, x[:, :3], "amax"),
        "index_add": lambda x: x.new_zeros(6, 6).index_add(0, torch.tensor([0, 2, 2, 5]), x[:4]),
        "index_put": lambda x: x.new_zeros(6, 7).index_put((ROWS, ROWS), x[:4, 0], accumulate=True),
        "inner put": lambda x: x.new_zeros(2, 6, 6).index_put((torch.tensor(1), PAIRS[:, 0]), x),
        "written": lambda x: x.sin().index_copy(0, torch.tensor([0, 3]), x[:2]),
        "embedding": lambda x: F.embedding(PAIRS, x.T),
        "diagonal": lambda x: x.diagonal(1),
        "diagonal matrix": torch.diag_embed,
        "triangle": lambda x: x.tril() - x.triu(1),
        "roll": lambda x: x.roll(1, 0),
        "unfold": lambda x: x.unfold(1, 3, 2),
        "every second": lambda x: x[:, 1::2],
        "chunk": lambda x: x.chunk(2, 1)[0],
        "unbound": lambda x: x.unbind(0)[1],
        "twice": lambda x: x.repeat_interleave(2, 0),
        "topk": lambda x: x.topk(3, 1)[0],
        "smallest": lambda x: x.topk(2, 0, largest=False)[0],
        "sort": lambda x: x.sort(1)[0],
        "max": lambda x: x.max(1)[0],
        "min": lambda x: x.min(0, keepdim=True)[0],
        "median": lambda x: x.median(1)[0],
        "kthvalue": lambda x: x.kthvalue(2, 1)[0],
        "argsort": lambda x: x.gather(1, x.argsort(1, descending=True)),
        "bucketize": lambda x: x * torch.bucketize(x.detach(), torch.tensor([-1.0, 0.0, 1.0])),
        "quantile": lambda x: x.quantile(0.4, 1),
        "argmax": lambda x: x * x.argmax(),
    },
    "images": {
        "max pooling": lambda x: F.max_pool2d(image(x), 2),
        "overlapping": lambda x: F.max_pool2d(image(x), 3, 2, 1),
        "mean pooling": lambda x: F.avg_pool2d(image(x), 3, 2, 1),
        "to 2 x 2": lambda x: F.adaptive_avg_pool2d(image(x), 2),
        "bilinear": lambda x: F.interpolate(image(x), scale_factor=2.0, mode="bilinear"),
        "aligned": lambda x: F.interpolate(image(x), size=(5, 11), mode="bilinear", align_corners=True),
        "nearest": lambda x: F.interpolate(image(x), scale_factor=2.0),
        "shuffle": lambda x: F.pixel_shuffle(image(x), 2),
        "reflected": lambda x: F.pad(image(x), (1, 2, 3, 1), mode="reflect"),
        "replicated": lambda x: F.pad(image(x), (1, 2, 3, 1), mode="replicate"),
        "circular": lambda x: F.pad(image(x), (1, 2, 3, 1), mode="circular"),
        "batch norm": lambda x: NORM(image(x)),
        "3-D": lambda x: F.conv3d(image(x)[None], IMAGE[:, :2, :3, :3].reshape(2, 2, 1, 3, 3)),
        "recurrent": lambda x: RECURRENT(x[None])[0],
    },
}


def numbers(seed: int) -> Tensor:
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("group", GROUPS)
def test_onnx_further_operations_and_their_gradients_are_what_torch_says(group: str) -> None:
    """All of a group in one file: every result and every gradient has an output of its own."""
    both = [part for operation in GROUPS[group].values() for part in (_forward(operation), _gradient(operation))]
    names = [f"{kind} {name}" for name in GROUPS[group] for kind in ("value", "gradient")]
    model = convert(lambda x: tuple(part(x)[0] for part in both), {"x": numbers(0)}, names)
    x = numbers(1)
    for name, part, found in zip(names, both, run(model, {"x": x}), strict=True):
        expected = part(x)[0]
        size = float(expected.abs().max())
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5 * max(size, 0.1), err_msg=name)


def _forward(operation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    return lambda x: (operation(x),)


def _gradient(operation: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """The input gradient of a sum that gives every element a weight of its own."""

    def gradient(x: Tensor) -> tuple[Tensor, ...]:
        x = x.detach().requires_grad_()
        with torch.enable_grad():
            y = operation(x)
            return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel()).reshape(y.shape)).sum(), x)

    return gradient


@hypothesis.settings(max_examples=12)
@hypothesis.given(
    divisor=st.sampled_from([0.5, -0.25, 3.0]), whole=st.integers(-9, 9), share=st.sampled_from([-0.5, 0.0, 0.5])
)
def test_onnx_remainders_of_either_sign_are_torchs(divisor: float, whole: int, share: float) -> None:
    x = torch.full((3,), (whole + share) * divisor)
    model = convert(lambda x: (x.remainder(divisor), x.fmod(divisor), x // divisor), {"x": x}, ["r", "f", "q"])
    for found, expected in zip(
        run(model, {"x": x}), (x.remainder(divisor), x.fmod(divisor), x // divisor), strict=True
    ):
        np.testing.assert_array_equal(found, expected)


def test_onnx_whole_numbers_are_divided_as_torch_does() -> None:
    a, b = torch.arange(-7, 8), torch.tensor([3, -3, 2, -2, 5] * 3)

    def divided(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        return a // b, torch.div(a, b, rounding_mode="trunc"), a % b, a.fmod(b), a & 6, a | b

    model = convert(divided, {"a": a, "b": b}, ["floor", "trunc", "remainder", "fmod", "and", "or"])
    for found, expected in zip(run(model, {"a": a, "b": b}), divided(a, b), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_onnx_double_precision_stays_where_it_is_asked_for() -> None:
    x = numbers(2).double()

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return (F.layer_norm(x, (6,)) + (x / 3).exp() * (x > 0.1)).cumsum(1), x.softmax(1)

    (kept, _), (rounded, _) = (
        run(convert(function, {"x": x}, ["y", "s"], double=double), {"x": x if double else x.float()})
        for double in (True, False)
    )
    np.testing.assert_allclose(kept, function(x)[0], rtol=1e-11, atol=1e-11)  # the epsilon of ONNX is single
    assert rounded.dtype == np.float32 and 1e-9 < np.abs(rounded - kept).max() < 1e-5


def test_onnx_names_module_and_line_of_an_operation_that_it_has_not() -> None:
    for function, operation in ((torch.linalg.eigvalsh, r"aten\._linalg_eigh"), (torch.lgamma, r"aten\.lgamma")):
        with pytest.raises(UserError, match=rf"cannot export {operation}.*called by no module at .*\.py:\d+: .*"):
            convert(lambda x, function=function: (function(x),), {"x": torch.eye(3)}, ["y"])


def test_onnx_batch_that_is_open_belongs_to_the_inputs_that_are_named() -> None:
    """A table with as many rows as there are samples keeps its size."""
    table, rows = numbers(3)[:2], torch.tensor([0, 1])

    def function(table: Tensor, rows: Tensor) -> tuple[Tensor]:
        return (table[rows].tanh() @ table.T,)

    model = convert(function, {"table": table, "rows": rows}, ["y"], dynamic=("rows",))
    more = torch.tensor([1, 0, 0, 1, 1])
    np.testing.assert_allclose(run(model, {"table": table, "rows": more})[0], function(table, more)[0], rtol=1e-5)
    with pytest.raises(UserError, match=r"y has a size that is a multiple of the batch: export it for one batch size"):
        convert(lambda x: (torch.cat([x, x]),), {"x": table}, ["y"], dynamic=True)
    with pytest.raises(UserError, match=r"no multiple of the batch|others at another batch"):
        convert(lambda x: (torch.cat([x, x[:1]]),), {"x": table}, ["y"], dynamic=True)
