"""One meaning of each number format: torch's flags inside and after `dgfast.precision`, and what a manifest says."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import dgfast
from benchmarks import measure
from dgfast import devices
from dgfast.bundle import Bundle
from dgfast.runtimes import PRECISIONS
from dgfast.sample import main
from dgfast.sampler import Sampler

STRICT = {"products": "float32", "convolutions": "float32"}
ROUNDED = {"products": "tf32", "convolutions": "tf32"}


def flags() -> list[str]:
    """All that torch has of them, in the newer form, which can always be read."""
    parts = [("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn"), ("mkldnn", "matmul"), ("mkldnn", "conv")]
    return [torch._C._get_fp32_precision_getter(*part) for part in (*parts, ("generic", "all"))]


def older_flags() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def _newer() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch._C._set_fp32_precision_setter("cuda", "conv", "ieee")


def _general() -> None:
    torch._C._set_fp32_precision_setter("generic", "all", "tf32")
    torch.backends.cudnn.fp32_precision = "tf32"


STATES: dict[str, Callable[[], object]] = {
    "torch's own": lambda: None,
    "older: medium": lambda: torch.set_float32_matmul_precision("medium"),
    "older: high": lambda: torch.set_float32_matmul_precision("high"),
    "older: strict": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "newer": _newer,
    "newer, of everything": _general,
}


@pytest.fixture(params=STATES)
def state(request: pytest.FixtureRequest) -> Iterator[str]:
    """What a user did to the flags before."""
    STATES[request.param]()
    yield request.param
    torch._C._set_fp32_precision_setter("generic", "all", "none")
    torch.backends.cudnn.fp32_precision = "none"
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    torch._C._set_fp32_precision_setter("cuda", "conv", "tf32")
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("name", PRECISIONS)
def test_precision_holds_inside_and_is_gone_afterwards(name: str, state: str) -> None:
    before, older = flags(), older_flags() if state != "newer" else None
    with pytest.raises(ZeroDivisionError), dgfast.precision(name):
        assert devices.arithmetic() == (ROUNDED if name == "tf32" else STRICT)
        # What inductor reads, and raises where the flags contradict one another.
        assert older_flags() == (("high", True) if name == "tf32" else ("highest", False))
        raise ZeroDivisionError
    assert flags() == before
    assert older is None or older_flags() == older


def test_precision_nests() -> None:
    before = flags()
    with dgfast.precision("tf32"):
        with dgfast.precision("bf16"):
            assert devices.arithmetic() == STRICT
        assert devices.arithmetic() == ROUNDED
    assert flags() == before


def test_precision_of_another_name_is_one_line() -> None:
    with pytest.raises(dgfast.UserError, match="no precision float64: there are float32, tf32, bf16, fp16"):
        dgfast.precision("float64").__enter__()


def test_precision_is_that_of_the_benchmarks_beside_torchs_own() -> None:
    own = devices.arithmetic()
    with measure.precision("tf32"):
        assert devices.arithmetic() == ROUNDED
    with measure.precision("float32"):
        assert devices.arithmetic() == STRICT
    with measure.precision(measure.TORCH_DEFAULT):
        assert devices.arithmetic() == own


def test_precision_stays_as_it_is_for_who_calls_a_sampler(tiny_net: Callable[..., Any]) -> None:
    before = flags()
    Sampler(dgfast.Networks(tiny_net()), dgfast.SamplingConfig(num_steps=2))([0])
    assert flags() == before


# The door -------------------------------------------------------------------------------------------------------------
def _draw(bundle: Bundle, out: Path, *options: str) -> Result:
    base = ["--bundle", str(bundle.folder), "--seeds", "0-1", "--device", "cpu", "--out", str(out)]
    return CliRunner().invoke(main, [*base, *options])


@pytest.mark.parametrize("name", PRECISIONS)
def test_sample_draws_in_the_precision_that_its_manifest_says(
    small_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    held: list[dict[str, str]] = []
    call, before = Sampler.__call__, flags()

    def spied(self: Sampler, *arguments: Any) -> torch.Tensor:
        held.append(devices.arithmetic())
        return call(self, *arguments)

    monkeypatch.setattr(Sampler, "__call__", spied)
    result = _draw(small_bundle, tmp_path / "out", "--dtype", name)
    assert result.exit_code == 0, result.output
    job = json.loads((tmp_path / "out" / "manifest.json").read_text())["job"]
    assert held == [job["arithmetic"]] == [ROUNDED if name == "tf32" else STRICT]
    assert flags() == before


def test_sample_goes_on_in_the_same_arithmetic_alone(
    small_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _draw(small_bundle, tmp_path / "out").exit_code == 0
    monkeypatch.setattr(devices, "arithmetic", lambda: ROUNDED)  # as an older dgfast, or another torch, may have it
    result = _draw(small_bundle, tmp_path / "out")
    assert result.exit_code == 2
    assert (
        "holds another job: products float32 there, tf32 here; convolutions float32 there, tf32 here" in result.output
    )
