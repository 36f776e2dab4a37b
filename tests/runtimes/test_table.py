"""The table of runtimes: each does what it says of itself."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dgfast.devices import DTYPES
from dgfast.graph.agreement import relative_error
from dgfast.runtimes import PRECISIONS, RUNTIMES, Runtime, form

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
