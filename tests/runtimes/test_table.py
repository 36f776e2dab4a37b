"""The table of runtimes: each does what it says of itself."""

import weakref
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast.devices import DTYPES
from dgfast.graph import Function, form
from dgfast.graph.agreement import relative_error
from dgfast.runtimes import PRECISIONS, RUNTIMES, SIZES, Kept, Runtime

CPU = torch.device("cpu")


def gradient_of_a_network(x: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
    weight = torch.linspace(-1, 1, 9).view(1, 1, 3, 3)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        score = F.silu(F.conv2d(x, weight.to(x.dtype), padding=1)).sum()
        (gradient,) = torch.autograd.grad(score, x)
    return (gradient if labels is None else gradient + labels.sum(1).view(-1, 1, 1, 1),)


def image(seed: int) -> Tensor:
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["eager", "compiled", "onnx"])
def test_runtimes_return_what_the_function_returns(name: str) -> None:
    runtime = RUNTIMES[name]
    assert runtime.missing(CPU) is None
    for labels in (None, torch.ones(2, 3)):
        run = runtime.whole(gradient_of_a_network, (image(0), labels))
        (mine,), (wanted,) = run(image(1), labels), gradient_of_a_network(image(1), labels)
        assert relative_error(mine, wanted) <= runtime.tolerance


def test_runtimes_say_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("dgfast.extras.find_spec", lambda name: None)
    missing = {name: runtime.missing(CPU) or "" for name, runtime in RUNTIMES.items()}
    assert missing["eager"] == "" and missing["tensorrt"] == "TensorRT runs on CUDA only"
    assert "apt install g++" in missing["compiled"] and "pip install 'dgfast[onnx]'" in missing["onnx"]
    assert not any("\n" in line for line in missing.values())


def test_runtimes_stand_in_the_table_under_their_names() -> None:
    assert all(name == runtime.name for name, runtime in RUNTIMES.items())
    assert all({*runtime.precisions} <= {*PRECISIONS} for runtime in RUNTIMES.values())
    assert tuple(DTYPES) == PRECISIONS


def test_runtimes_of_whole_functions_are_captured_where_they_can_be() -> None:
    def twice(function: object, example: object) -> object:
        return lambda x: tuple(2 * y for y in function(x))  # type: ignore[operator]

    runtime = Runtime("twice", twice, lambda device: twice if device == CPU else None)  # type: ignore[arg-type,return-value]
    (result,) = runtime.whole(lambda x: (x,), [torch.ones(2)])(torch.ones(2))
    assert result.tolist() == [4, 4]


def test_runtimes_form_tells_arguments_apart_for_which_functions_differ() -> None:
    x, labels = image(0), torch.ones(2, 3)
    forms = [form(a) for a in ((x, None), (x, labels), (x[:1], None), (x.double(), None), (x, labels.double()))]
    assert len({*forms}) == len(forms) and form((image(1), None)) == forms[0]


def test_runtimes_keep_what_is_built_for_the_batch_sizes_called_last() -> None:
    kept, built = Kept(), list[tuple[str, int]]()

    def call(name: str, batch: int) -> None:
        def build() -> Function:
            built.append((name, batch))
            return lambda x: (x + batch,)

        x = torch.zeros(batch, 3)
        assert kept(name, (None, x), build)(x)[0].tolist() == (x + batch).tolist()

    sizes = [10, *range(1, SIZES)]
    for batch in (*sizes, *sizes):  # a job's full batch and the rests of its chunks, in turns
        for name in ("predictor", "corrector"):
            call(name, batch)
    assert built == [(name, batch) for batch in sizes for name in ("predictor", "corrector")]
    built.clear()
    call("predictor", 10)
    call("predictor", 11)  # one more than is kept, in the place of the one that was called the longest ago
    call("predictor", 10)
    call("predictor", 1)
    assert built == [("predictor", 11), ("predictor", 1)]
    kept.clear()
    built.clear()
    call("predictor", 10)
    assert built == [("predictor", 10)]


def test_runtimes_hold_nothing_of_batch_sizes_that_are_given_up() -> None:
    class Built:
        def __call__(self, *arguments: Tensor | None) -> tuple[Tensor, ...]:
            return ()

    kept, held = Kept(), list[weakref.ref[Built]]()

    def build() -> Function:
        made = Built()
        held.append(weakref.ref(made))
        return made

    for batch in range(1, 20):
        kept("f", [torch.zeros(batch)], build)
    assert [made() is not None for made in held] == [False] * (19 - SIZES) + [True] * SIZES
    kept.clear()
    assert not any(made() for made in held)
