"""A package returns what its graph returns, reads weights where they lie, and opens only where it may run."""

import platform
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._inductor.package.package import package_aoti

from dgfast.errors import UserError
from dgfast.runtimes.package import file
from dgfast.runtimes.package.file import Package, add, metadata, read, write
from tests.runtimes.package.conftest import Slope, arguments, graph_of

CPU = torch.device("cpu")


def _agree(results: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> bool:
    return all(torch.allclose(x, y, rtol=2e-5, atol=2e-5) for x, y in zip(results, expected, strict=True))


def test_package_returns_what_its_graph_returns(package_file: Path) -> None:
    package = Package(package_file, CPU, graph_of(0))
    for seed in (1, 2):
        assert _agree(package(*arguments(seed)), Slope(0)(*arguments(seed)))


def test_package_takes_arguments_that_lie_otherwise(package_file: Path) -> None:
    """The code reads memory as the example's lay, whatever it is given."""
    package, (x, _, sigma) = Package(package_file, CPU, graph_of(0)), arguments(1)
    expected = package(x, None, sigma)
    strided = torch.stack([sigma, sigma], 1)[:, 0]
    assert _agree(package(x.contiguous(memory_format=torch.channels_last), None, strided), expected)
    assert _agree(package(x.double(), None, sigma.double()), expected)
    with pytest.raises(ValueError, match=r"shape \[2, 2, 8, 8\], not \[3, 2, 8, 8\]"):
        package(x[:2], None, sigma)
    with pytest.raises(ValueError):
        package(x, None)


def test_package_reads_the_weights_where_they_lie(package_file: Path) -> None:
    """No copy is made: half a gigabyte a shape would be."""
    graph = graph_of(0)
    package = Package(package_file, CPU, graph)
    before = package(*arguments(1))
    with torch.no_grad():
        for held in (*graph.parameters(), *graph.buffers()):
            held.mul_(2)
    assert not _agree(package(*arguments(1)), before)


def test_package_compiled_in_another_process_is_small_and_reads_weights_as_they_lie(package_file: Path) -> None:
    """Its filters are every second of more, and on their way to that process they go through a file.

    The process beside it failed, and left no file.
    """
    assert [*package_file.parent.iterdir()] == [package_file]
    assert package_file.stat().st_size < 2e6 < sum(x.nbytes for x in Slope(0).parameters())
    assert _agree(Package(package_file, CPU, graph_of(0))(*arguments(1)), Slope(0)(*arguments(1)))


def test_package_holds_its_own_weights_and_packs_them_where_no_other_process_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Networks of one architecture have the same code, and by its hash PyTorch names the files that it packs."""
    path, packed = tmp_path / "whole.pt2", set[Path]()

    def pack(archive: str, files: list[Any]) -> str:
        packed.update(Path(file) for file in files)
        (own_folder,) = tmp_path.iterdir()  # of this call alone, see `TemporaryDirectory`
        assert packed and all(file.is_relative_to(own_folder) and file.is_file() for file in packed)
        return package_aoti(archive, files)  # type: ignore[return-value]

    monkeypatch.setattr("torch._inductor.package.package_aoti", pack)
    large, x = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0)), torch.ones(1, 1024)  # 4 MB

    def product(x: Tensor) -> tuple[Tensor, ...]:
        return (x @ large,)

    write(file_graph(product, x), (x,), path, {"what": "product"})
    assert packed and [*tmp_path.iterdir()] == [path]
    assert path.stat().st_size > large.nbytes and metadata(path)["what"] == "product"
    assert _agree(Package(path, CPU)(x), product(x))


def file_graph(function: Any, *example: Tensor) -> Any:
    from dgfast.graph.lower import lower
    from dgfast.graph.trace import trace

    return lower(trace(function, example), example)


def test_package_keeps_what_is_added_and_still_runs(package_file: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(package_file, tmp_path / "more.pt2"))
    add(path, {"note.bin": b"\x8c\0"})
    assert read(path, "note.bin") == b"\x8c\0" and [*tmp_path.iterdir()] == [path]
    assert _agree(Package(path, CPU, graph_of(0))(*arguments(1)), Slope(0)(*arguments(1)))
    with pytest.raises(UserError, match=r"has no other\.bin in it"):
        read(path, "other.bin")


@pytest.mark.parametrize("where", ["code", "directory", "cut", "empty", "other", "compressed", "folder", "nothing"])
def test_package_damaged_is_refused_in_a_line(where: str, package_file: Path, tmp_path: Path) -> None:
    content, path = bytearray(package_file.read_bytes()), tmp_path / "damaged.pt2"
    with zipfile.ZipFile(package_file) as archive:
        code = next(member for member in archive.infolist() if member.filename.endswith(".so"))
    if where == "code":
        content[code.header_offset + code.file_size // 2] ^= 255
    elif where == "directory":
        content[-60:-40] = b"\xff" * 20
    elif where == "cut":
        del content[len(content) // 2 :]
    elif where == "empty":
        content.clear()
    path.write_bytes(content)
    if where in ("other", "compressed"):
        kind = zipfile.ZIP_DEFLATED if where == "compressed" else zipfile.ZIP_STORED
        with zipfile.ZipFile(path, "w", kind) as archive:
            archive.writestr("a/data/model_metadata.json", '{"a": 1}')
    elif where in ("folder", "nothing"):
        path.unlink()
    if where == "folder":
        path.mkdir()
    with pytest.raises(UserError) as refusal:
        Package(path, CPU, graph_of(0))
    assert str(path) in refusal.value.message and "\n" not in refusal.value.message


@pytest.mark.parametrize(
    ("owner", "name", "value"),
    [
        (torch, "__version__", "9.9.9"),
        (platform, "machine", lambda: "riscv64"),
        (torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT"),
    ],
)
def test_package_for_another_machine_is_refused_before_it_is_loaded(
    owner: Any, name: str, value: Any, package_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, value)
    monkeypatch.setattr(file, "AOTIModelPackageLoader", lambda *_: pytest.fail("its code was loaded"))
    with pytest.raises(UserError, match=r"was made for torch .*, and here is .*; make it anew here"):
        Package(package_file, CPU, graph_of(0))


def test_package_is_for_one_kind_of_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = set[str]()
    for capability in ((8, 0), (9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        machines.add(file.machine(torch.device("cuda", 0)))
    assert {name.rpartition(" ")[2] for name in machines} == {"sm_80", "sm_90", "sm_100"}


def test_package_says_what_the_compiler_says(tmp_path: Path) -> None:
    def unknown(x: Tensor) -> tuple[Tensor, ...]:
        return (x + 1,)

    x = torch.ones(2)
    graph = file_graph(unknown, x)
    with pytest.raises(UserError, match="AOTInductor failed"):
        write(graph, (x, x), tmp_path / "f.pt2")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "form",
    [
        {"dtype": "save"}, {"dtype": "nonsense"}, {"stride": [0, 0]}, {"stride": [1, 1]}, {"stride": ["a", 1]},
        {"stride": [3]}, {"shape": [0, 3]}, {"shape": [2**20, 2**20], "stride": [2**20, 1]}, {"shape": None},
    ],
    ids=str,
)  # fmt: skip
def test_package_form_that_no_package_has_is_refused(form: dict[str, Any]) -> None:
    usual = {"shape": [2, 3], "stride": [3, 1], "dtype": "float32"}
    assert file.Form.read(usual) == file.Form.of(torch.zeros(2, 3))
    with pytest.raises((KeyError, TypeError, ValueError)):
        file.Form.read(usual | form)


@pytest.mark.parametrize("said", ["[1, 2]", '{"made_for": "one\\nline", "arguments": "[]"}', '{"made_for": 1}'])
def test_package_that_says_nothing_of_itself_is_refused(said: str, tmp_path: Path) -> None:
    path = tmp_path / "f.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("f/data/aotinductor/model/x_metadata.json", said)
    with pytest.raises(UserError, match="is not a package of dgfast"):
        metadata(path)
