"""Users' functions as files: proved on other inputs, in single and double precision, with an open size, and refused."""

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dgfast
from dgfast.errors import UserError
from dgfast.export.functions import FunctionSubject
from dgfast.export.parity import ValueMismatchError, compare
from dgfast.functions.flat import flat
from dgfast.runtimes.onnx.session import OnnxEngine
from tests.support.paths import ROOT

EXAMPLES = ROOT / "examples"


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.SiLU(), nn.Linear(8, 4)).to(dtype)


def guided(x: Tensor, labels: Tensor, net: nn.Module) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    chosen = net(x).log_softmax(-1).gather(1, labels[:, None])
    return {"x": x + torch.autograd.grad(chosen.sum(), x)[0], "log_probability": chosen[:, 0]}


def batch(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(count)
    x = torch.randn(count, 3, generator=generator).to(dtype)
    return x, torch.randint(4, (count,), generator=generator)


def ran(path: Path, **inputs: Tensor) -> dict[str, np.ndarray]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    results = session.run(None, {name: x.numpy() for name, x in inputs.items()})
    return dict(zip((output.name for output in session.get_outputs()), results, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["single", "double"])
def test_functions_file_with_an_open_size_returns_what_the_function_does(dtype: torch.dtype, tmp_path: Path) -> None:
    """Parameters need not be frozen; an output that has an input's name gets another."""
    net, path = network(dtype), tmp_path / "guided.onnx"
    report = dgfast.export_onnx(
        lambda x, labels: guided(x, labels, net), batch(2, dtype), path, dynamic=("x", "labels")
    )
    assert report.passed and {row.case for row in report.rows} >= {"batch 1, near", "batch 5, others"}
    x, labels = batch(6, dtype)
    expected, found = guided(x, labels, net), ran(path, x=x, labels=labels)
    assert list(found) == ["x_out", "log_probability"]
    for result, reference in zip(found.values(), expected.values(), strict=True):
        assert result.dtype == reference.detach().numpy().dtype
        np.testing.assert_allclose(result, reference.detach(), rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)
    OnnxEngine(path).self_test()
    assert path.with_suffix(".parity.json").is_file()


def test_functions_file_has_the_sizes_of_the_example_by_default(tmp_path: Path) -> None:
    net, path = network(), tmp_path / "guided.onnx"
    dgfast.export_onnx(lambda x, labels: guided(x, labels, net), batch(2), path)
    engine = OnnxEngine(path)
    engine.self_test()
    assert engine.inputs == {"x": ((2, 3), "tensor(float)"), "labels": ((2,), "tensor(int64)")}
    with pytest.raises(UserError, match=r"x has shape \[6, 3\], not \[2, 3\]"):
        engine(dict(zip(("x", "labels"), batch(6), strict=True)))


def test_functions_of_no_dimension_and_of_truths_are_files(tmp_path: Path) -> None:
    path, example = tmp_path / "wave.onnx", {"t": torch.tensor(2.0), "on": torch.tensor([True, False])}
    dgfast.export_onnx(lambda t, on: (torch.where(on, t, -t), on.logical_not()), example, path)
    found = ran(path, t=torch.tensor(3.0), on=torch.tensor([False, True]))
    assert found["output_0"].tolist() == [-3.0, 3.0] and found["output_1"].tolist() == [True, False]
    OnnxEngine(path).self_test()


def test_functions_file_that_is_wrong_elsewhere_than_at_the_example_is_refused() -> None:
    """An exporter that takes the gradient at the example for a constant is right there alone."""
    of_tensors = flat(lambda x: 2 * x.exp(), torch.ones(3))
    subject = FunctionSubject(of_tensors, (), ())
    constant = subject(of_tensors.example)

    def candidate(inputs: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return constant

    cases = subject.cases(1)
    assert compare(subject, candidate, cases[:1], 1e-4).passed and not compare(subject, candidate, cases, 1e-4).passed
    with pytest.raises(ValueMismatchError):
        compare(subject, candidate, cases, 1e-4).check()


def test_functions_that_vanish_are_judged_by_their_rounding() -> None:
    """Momentum is conserved: the sum of forces is nothing but rounding, and may be another rounding."""

    def total(x: Tensor) -> Tensor:
        return (x - x.mean(0)).sum(0)

    subject = FunctionSubject(flat(total, torch.randn(50, 3, generator=torch.Generator().manual_seed(0))), (), ())

    def other_order(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"output": total(inputs["x"].flip(0))}

    def off(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"output": total(inputs["x"]) + 1e-2}

    cases = subject.cases(1)
    assert compare(subject, other_order, cases, 1e-4).passed and not compare(subject, off, cases, 1e-4).passed


@pytest.mark.parametrize(
    ("function", "example", "options", "says"),
    [
        (torch.linalg.eigvalsh, torch.eye(3), {}, r"cannot export aten\._linalg_eigh.*no module at .*: the table"),
        (lambda x: x.max().item() * x, torch.ones(3), {}, r"does not trace: .* at test_functions\.py:\d+: .*item"),
        (lambda x: torch.cat([x, x]), torch.ones(3), {"dynamic": ["x"]}, r"multiple of the batch: export it for one"),
        (lambda x: x.sum() * torch.eye(len(x)), torch.ones(3), {"dynamic": ["x"]}, r"batch: export it for one"),
        (F.silu, torch.ones(3), {"dynamic": ["y"]}, r"dynamic=y: there is no such argument .*; there are input"),
        (lambda x: x / len(x), torch.ones(3), {"dynamic": "x"}, r"a number that depends on the batch"),
        (lambda x: x * (1 / len(x)), torch.ones(3), {"dynamic": "x"}, r"a number depends on the batch, 0\.5 and 0\.33"),
        (lambda x: x + torch.ones(3), torch.ones(3), {"dynamic": "x"}, r"fails for another .*; name all the arguments"),
        (lambda x: (x + torch.ones(3).bfloat16()).float(), torch.ones(3), {}, r"cannot export .*type bfloat16"),
        (F.silu, torch.ones(3, dtype=torch.float16), {}, r"input is float16 \[3\]: give a dense tensor"),
    ],
    ids=["operation", "item", "twice", "square", "name", "size", "share", "fixed", "bfloat16", "half"],
)  # fmt: skip
def test_functions_that_cannot_be_files_are_refused_in_a_line(
    function: Any, example: Tensor, options: dict[str, Any], says: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=says) as error:
        dgfast.export_onnx(function, example, tmp_path / "refused.onnx", **options)
    assert "\n" not in str(error.value.message) and not (tmp_path / "refused.onnx").exists()


def test_functions_file_stays_where_another_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "norm.onnx"
    dgfast.export_onnx(lambda x: x / x.norm(), torch.ones(3), path)
    with pytest.raises(UserError, match="does not trace"):
        dgfast.export_onnx(lambda x: x.max().item() * x, torch.ones(3), path)
    np.testing.assert_allclose(ran(path, x=torch.tensor([0.0, 3, 4]))["output"], [0, 0.6, 0.8], rtol=1e-6)
    with pytest.raises(UserError, match="y in double precision, others in single"):
        dgfast.export_onnx(lambda x, y: x + y, (torch.ones(3), torch.ones(3).double()), path)
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(UserError, match="is a folder: give the name of a file"):
        dgfast.export_onnx(F.silu, torch.ones(3), tmp_path / "folder.onnx")


def test_functions_files_have_the_suffix_of_their_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"forces\.pt2: give a name that ends in \.onnx"):
        dgfast.export_onnx(F.silu, torch.ones(3), tmp_path / "forces.pt2")
    with pytest.raises(UserError, match=r"there is no folder"):
        dgfast.export_onnx(F.silu, torch.ones(3), tmp_path / "none" / "f.onnx")
    with pytest.raises(UserError, match="TensorRT has no double precision"):
        dgfast.export_tensorrt(F.silu, torch.ones(3).double(), tmp_path)


def test_functions_become_engines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from dgfast.runtimes.tensorrt.library import find

    try:
        find("tensorrt-rtx")
    except UserError:  # it has wheels for Linux on x86-64 only
        pytest.skip("TensorRT for RTX is not installed")
    net = network()

    def one_hot(x: Tensor, labels: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        chosen = (net(x).log_softmax(-1) * (labels[:, None] == torch.arange(4))).sum()
        return torch.autograd.grad(chosen, x)[0]

    dgfast.export_tensorrt(one_hot, batch(2), tmp_path, flavor="tensorrt-rtx")
    assert "model.engine" in capsys.readouterr().out and (tmp_path / "model.engine").is_file()
    with np.load(tmp_path / "self_test.npz") as stored:
        assert stored["input/labels"].dtype == np.int64 and stored["output/output"].shape == (2, 3)


# Examples -------------------------------------------------------------------------------------------------------------
def test_functions_example_guides_a_diffusers_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As a file; compiling its regions would take a minute."""
    pytest.importorskip("diffusers")
    example = runpy.run_path(str(EXAMPLES / "guided_diffusers.py"))
    example["to_onnx"](example["guided"](*example["networks"]()), tmp_path / "guided.onnx")
    size, difference = capsys.readouterr().out.splitlines()
    assert "convolutions" in size and float(difference.split("off by ")[1].split()[0]) < 1e-5


def test_functions_example_has_energy_and_forces_in_every_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The one package that these tests compile."""
    runpy.run_path(str(EXAMPLES / "forces.py"))["main"](tmp_path)
    lines = capsys.readouterr().out.splitlines()
    off = [float(line.split("forces off by ")[1].split(";")[0]) for line in lines]
    assert [line.split(":")[0] for line in lines] == ["compiled", "ONNX Runtime", "package"] and max(off) < 1e-11
