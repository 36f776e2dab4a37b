"""`dgfast.compile`: values and structure of users' functions, and what is refused, in one line."""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dgfast
from dgfast.errors import UserError
from dgfast.functions import trials
from dgfast.functions.flat import flat
from dgfast.runtimes import RUNTIMES, Runtime


class Net(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(3, 8), inner or nn.Identity(), nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x).tanh()))


class Counts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.number = 0

    def forward(self, x: Tensor) -> Tensor:
        self.number += 1
        return x * self.number


class CountsInATensor(Counts):
    def forward(self, x: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        return x


def forces(net: nn.Module) -> Callable[[Tensor], dict[str, Tensor]]:
    def function(x: Tensor) -> dict[str, Tensor]:
        x = x.detach().requires_grad_()
        energy = net(x).sum()
        return {"energy": energy, "forces": -torch.autograd.grad(energy, x)[0]}

    return function


def points(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
def test_compile_agrees_on_inputs_that_it_has_not_seen(dtype: torch.dtype) -> None:
    function = forces(Net().to(dtype))
    compiled = dgfast.compile(function, points(0, dtype))
    for seed in (1, 2):
        expected, found = function(points(seed, dtype)), compiled(points(seed, dtype))
        assert list(found) == ["energy", "forces"] and found["energy"].shape == () and not found["forces"].requires_grad
        for name, result in found.items():
            torch.testing.assert_close(result, expected[name].detach())


def hessian_product(net: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    return torch.autograd.grad((gradient * v).sum(), x)[0]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch.func, of its own code
def test_compile_takes_torchs_other_ways_to_derivatives() -> None:
    net = Net()

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(net(x).sum(), x)[0]

    def jvp(x: Tensor, v: Tensor) -> Any:
        return torch.func.jvp(net, (x,), (v,))

    def energy(x: Tensor) -> Tensor:
        return net(x).sum()

    wanting = points(0).requires_grad_()
    ways: dict[str, tuple[Callable[..., Any], Any]] = {
        "func.grad": (torch.func.grad(energy), (points(0),)),
        "vmap of hessian": (torch.func.vmap(torch.func.hessian(energy)), (points(0),)),
        "jvp": (jvp, (points(0), points(1))),
        "hessian-vector product": (partial(hessian_product, net), (points(0), points(1))),
        "an input that requires grad": (gradient, (wanting,)),
    }
    for name, (function, example) in ways.items():
        unseen = [points(9 + i).requires_grad_(x.requires_grad) for i, x in enumerate(example)]
        found, expected = dgfast.compile(function, example)(*unseen), function(*unseen)
        torch.testing.assert_close(found, expected, msg=name)


def test_compile_keeps_names_order_and_structure() -> None:
    def function(state: dict[str, Tensor], *, types: Tensor) -> tuple[Tensor, dict[str, list[Tensor]]]:
        return state["x"][types] * state["scale"], {"sums": [state["x"].sum(), types.sum()]}

    example = {"state": {"x": points(0), "scale": torch.tensor(2.0)}, "types": torch.tensor([0, 4, 2])}
    of_tensors = flat(function, example)
    assert of_tensors.inputs == ("state.x", "state.scale", "types")
    assert of_tensors.outputs == ("output_0", "output_1.sums.0", "output_1.sums.1")
    compiled = dgfast.compile(function, example)
    picked, rest = compiled(types=torch.tensor([1, 1, 3]), state={"x": points(1), "scale": torch.tensor(3.0)})
    torch.testing.assert_close(picked, points(1)[[1, 1, 3]] * 3)
    assert rest["sums"][1].item() == 5 and rest["sums"][1].dtype == torch.int64


def test_compile_refuses_calls_of_another_form() -> None:
    compiled = dgfast.compile(lambda x, n: x * n.sum(), (points(0), torch.arange(4)))
    cases = {
        r"x is float32 \[2, 3\], not float32 \[5, 3\] as in the example": (points(0)[:2], torch.arange(4)),
        r"x is float64 \[5, 3\], not float32": (points(0).double(), torch.arange(4)),
        r"do not fit the function: missing a required argument: 'n'": (points(0),),
        r"arguments x\.0, n, not x, n as in the example": ([points(0)], torch.arange(4)),
    }
    for says, arguments in cases.items():
        with pytest.raises(UserError, match=says):
            compiled(*arguments)


def in_place(x: Tensor) -> Tensor:
    return x.mul_(2)


def branch(x: Tensor) -> Tensor:
    if x.sum() > 0:
        return x
    return -x


NET = Net()


def backward(x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    NET(x).sum().backward()
    assert x.grad is not None
    return x.grad


AT = r" at test_compile\.py:\d+: "
IMPURE: dict[str, tuple[Callable[..., Any], str]] = {
    "dropout": (forces(Net(nn.Dropout())), rf"draws random numbers in Net\.inner \(Dropout\){AT}.*call \.eval\(\)"),
    "batch norm": (forces(Net(nn.BatchNorm1d(8))), r"writes to BatchNorm1d's num_batches_tracked in Net\.inner .*eval"),
    "draw": (lambda x: x + torch.randn(3), rf"draws random numbers{AT}.*randn.*: pass them in$"),
    "numpy's draw": (lambda x: x + float(np.random.rand()), "returns other values when it is called again"),
    "Python's draw": (lambda x: x + random.random(), "returns other values when it is called again"),
    "counter": (Counts(), "returns other values when it is called again"),
    "buffer": (CountsInATensor(), rf"writes to CountsInATensor's calls in CountsInATensor .*{AT}"),
    "argument": (in_place, rf"writes to its argument x{AT}return x\.mul_\(2\): make a new tensor instead"),
    "backward": (backward, r"fills \.grad of Linear\.weight: call torch\.autograd\.grad, not backward\(\)"),
    "branch": (branch, rf"does not trace: .*depends on the values.*{AT}if x\.sum\(\) > 0:; .*torch\.where"),
    "item": (lambda x: x * x.max().item(), rf"does not trace: .*{AT}.*item"),
    "numpy": (lambda x: torch.from_numpy(np.tanh(x.numpy())), rf"does not trace: \.numpy\(\).*{AT}.*no numpy"),
    "mask": (lambda x: x[x > 0], rf"does not trace: aten\.index\.Tensor depends on the values of a tensor.*{AT}"),
    "number": (lambda x: {"n": 3.0}, "returns n, a float: let it return tensors"),
    "nothing": (lambda x: (), "the function returns nothing"),
    "imaginary": (lambda x: torch.complex(x, x), r"returns output, complex64 \[5, 3\]: let it return real tensors"),
    "empty": (lambda x: x[:0], r"returns output, float32 \[0, 3\]: let it return real tensors with elements"),
    "random known": (lambda x: x * torch.rand(3).max().item(), "draws random numbers"),
    "no function": (3, "an object of type int: give a function of tensors"),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("name", IMPURE)
def test_compile_says_in_one_line_what_is_impure_and_where(name: str) -> None:
    function, says = IMPURE[name]
    with pytest.raises(UserError, match=says) as error:
        dgfast.compile(function, {"x": points(0)})
    assert "\n" not in str(error.value.message)


def test_compile_refuses_arguments_that_are_no_tensors() -> None:
    with pytest.raises(UserError, match=r"s is a float: give a tensor, or bind it with functools\.partial"):
        dgfast.compile(lambda x, s: x * s, (points(0), 2.0))
    with pytest.raises(UserError, match=r"x is float32 \[0\]: give a dense tensor with elements"):
        dgfast.compile(lambda x: x, torch.ones(0))
    with pytest.raises(UserError, match=r"x is float32 \[1\] on meta: give a dense tensor"):
        dgfast.compile(lambda x: x, torch.ones(1, device="meta"))
    with pytest.raises(UserError, match=r"the example is a float: give a tensor"):
        dgfast.compile(lambda x: x, 1.0)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"does not trace: aten.nonzero.default depends on the values"):
        dgfast.compile(torch.nonzero, torch.ones(1))
    with pytest.raises(UserError, match=r"runtime 'onnx': a function is compiled by compiled or package"):
        dgfast.compile(lambda x: x, torch.ones(1), runtime="onnx")


@pytest.mark.parametrize("way", ["function", "module", "in place", "inside"])
def test_compile_takes_what_torch_has_compiled_as_what_it_was_made_of(way: str) -> None:
    """`torch.compile` computes at the first call; a backend that is never asked says that there was none."""

    def backend(graph: Any, inputs: Any) -> Any:
        raise AssertionError("it was compiled")

    net, made = Net(), Net()
    made.load_state_dict(net.state_dict())
    if way == "in place":
        made.compile(backend=backend)
    compiled: Any = torch.compile(forces(made) if way == "function" else made, backend=backend)
    function: Any = {"in place": made, "inside": forces(compiled)}.get(way, compiled)
    wanted = net(points(1)) if way in ("module", "in place") else forces(net)(points(1))
    torch.testing.assert_close(dgfast.compile(function, points(0))(points(1)), wanted)


@pytest.mark.parametrize(
    ("others", "complaint"),
    [
        (points(1), r"others is a Tensor: give a list of further examples, others=\[\.\.\.\]"),
        ({"x": points(1)}, "others is a dict: give a list"), (None, "others is a NoneType: give a list"),
        ([points(1), torch.ones(2)], r"others\[1\]: x is float32 \[2\], not float32 \[5, 3\]"),
    ],
)  # fmt: skip
def test_compile_and_exports_refuse_others_that_are_no_list_of_examples(
    others: Any, complaint: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=complaint):
        dgfast.compile(Net(), points(0), others=others)
    with pytest.raises(UserError, match=complaint):
        dgfast.export_onnx(Net(), points(0), tmp_path / "net.onnx", others=others)


def test_compile_refuses_what_came_out_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Right at the example alone, as if the trace had taken its values for constants."""

    def build(function: Any, example: Any) -> Any:
        results = function(*example)
        return lambda *arguments: results

    monkeypatch.setitem(RUNTIMES, "compiled", Runtime("compiled", build))
    with pytest.raises(UserError, match=r"compiled, output differs from the function's by .* on near"):
        dgfast.compile(lambda x: x.exp(), torch.ones(3))


LABELS, MASK = torch.tensor([1, 5, 2, 0, 4]), torch.eye(5, 3) > 0


def classes(x: Tensor) -> Tensor:
    return torch.func.grad(lambda y: (y.repeat(1, 2).log_softmax(1) * F.one_hot(LABELS, 6)).sum())(x)


def written_in_part(x: Tensor) -> Tensor:
    held = torch.zeros(5, 3)
    row = held[0]
    row.copy_(x[0])
    return x * held.max().item()


KNOWN: dict[str, Callable[[Tensor], Any]] = {
    "one_hot": classes,
    "mask": lambda x: (x[MASK], x[:, MASK[0]], x[MASK[:, 0], 1:]),
    "mask made": lambda x: (x[:, None] - x)[~torch.eye(5).bool()],
    "item": lambda x: x * (LABELS + 1).float().mean().item(),
    "branch": lambda x: x if (LABELS * 2).sum() > 3 else -x,
    "list": lambda x: torch.stack([x[i] for i in LABELS.clamp(max=4).tolist()]),
}


@pytest.mark.parametrize("name", KNOWN)
def test_compile_reads_what_depends_on_no_argument(name: str) -> None:
    compiled = dgfast.compile(KNOWN[name], points(0))
    torch.testing.assert_close(compiled(points(1)), KNOWN[name](points(1)))


def test_compile_reads_nothing_that_an_argument_was_written_to() -> None:
    with pytest.raises(UserError, match="depends on the values of a tensor"):
        dgfast.compile(written_in_part, points(0))


def test_compiled_function_keeps_its_weights_and_types() -> None:
    """Whatever becomes of the module, or is cast around it."""
    net, shift = nn.Linear(3, 3), torch.ones(3)
    function = partial(lambda x, net: net(x) + shift, net=net)
    compiled, expected = dgfast.compile(function, points(0)), function(points(1)).detach()
    with torch.no_grad():
        net.weight.zero_()
        shift.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(points(1)), expected)
    with pytest.raises(UserError, match="cannot be traced again: give the function that it was made of"):
        dgfast.compile(compiled, points(0))


def test_compile_asks_for_examples_where_it_finds_none() -> None:
    def within(x: Tensor) -> Tensor:
        return torch.where((x - 1).abs() < 1e-3, x, torch.nan)

    with pytest.raises(UserError, match=r"give others=\[\.\.\.\], two more"):
        dgfast.compile(within, torch.ones(3))
    compiled = dgfast.compile(within, torch.ones(3), others=[torch.full((3,), 1.0004), torch.full((3,), 0.9996)])
    assert compiled(torch.ones(3)).tolist() == [1, 1, 1]
    with pytest.raises(UserError, match=r"own 1 of others: the function fails there"):
        dgfast.compile(within, torch.ones(3), others=[torch.zeros(3)])


@hypothesis.settings(max_examples=30)
@hypothesis.given(values=st.lists(st.integers(-3, 9), min_size=1, max_size=6), scale=st.floats(0.1, 9))
def test_trials_stay_among_the_examples_values_and_keep_signs(values: list[int], scale: float) -> None:
    """Whole numbers are labels, of which there may be no others; a noise level stays positive, a zero zero."""
    kinds, levels = torch.tensor(values), scale * torch.tensor(values).clamp(min=0).float()
    made = trials.trials(flat(lambda kinds, levels: (kinds * 1, levels * 2), (kinds, levels)), [], {})
    for trial in made:
        assert set(trial.inputs["kinds"].tolist()) <= set(values)
        if bool(levels.any()):
            assert torch.equal(trial.inputs["levels"].sign(), levels.sign())
    assert len({trial.name for trial in made}) == len(made) >= 4
