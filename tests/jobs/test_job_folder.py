"""One job, one folder: what is there is known, what is damaged is noticed, and nobody else writes there."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dgfast.chunks import Chunks
from dgfast.config import GRID_IMAGES, KEPT, PRODUCTS
from dgfast.errors import StorageError, UserError
from dgfast.files import replacing
from dgfast.image_folder import read_images
from dgfast.job_folder import JobFolder
from dgfast.manifest import Manifest
from dgfast.outputs import FORMATS, Drawn
from dgfast.ranges import Ranges

JOB = {"bundle": "b", "sampling": {"num_steps": 18, "S_max": float("inf")}, "seeds": "0-9"}


def _folder(
    path: Path, formats: Sequence[str] = ("npz", "grid"), job: dict[str, Any] = JOB, rank: int = 0, processes: int = 1
) -> JobFolder:
    return JobFolder(path, job, Chunks(Ranges([(0, 9)]), None, 4), formats, rank, processes)


def _drawn(folder: JobFolder, index: int) -> Drawn:
    chunk = folder.chunks[index]
    pixels = np.stack([np.full((8, 8, 1), seed, np.uint8) for seed in chunk.seeds])
    latents = pixels.transpose(0, 3, 1, 2).astype(np.float32)
    return Drawn(chunk, np.asarray(list(chunk.seeds)) % 3, {"images": pixels, "latents": latents})


def _draw(folder: JobFolder, indices: Sequence[int] | None = None) -> None:
    for index in folder.missing if indices is None else indices:
        folder.add(_drawn(folder, index))


def _finished(path: Path, formats: Sequence[str] = ("npz", "grid")) -> JobFolder:
    folder = _folder(path, formats)
    with folder.opened({}):
        _draw(folder)
        folder.manifest.end(outcome="complete")
        folder.finish()
    return folder


def _names(path: Path) -> set[str]:
    return {str(entry.relative_to(path)) for entry in path.rglob("*") if entry.is_file() and entry.name != ".lock"}


def _manifest(path: Path) -> dict[str, Any]:
    return json.loads((path / "manifest.json").read_text())


def test_formats_of_the_command_line_are_those_that_exist() -> None:
    assert tuple(FORMATS) == KEPT and not {*KEPT} & {*PRODUCTS}


@given(st.integers(1, 40), st.integers(1, 12), st.lists(st.integers(0, 5), min_size=1, max_size=7) | st.none())
def test_chunks_hold_every_seed_and_label_once_and_in_order(count: int, size: int, labels: list[int] | None) -> None:
    chunks = Chunks(Ranges([(3, 2 + count)]), None if labels is None else Ranges.of(labels), size)
    parts = list(chunks)
    assert [seed for part in parts for seed in part.seeds] == list(range(3, 3 + count))
    assert [part.index for part in parts] == list(range(len(chunks)))
    assert {len(part.seeds) for part in parts[:-1]} <= {size}
    if labels is not None:
        assert [label for part in parts for label in part.labels or ()] == [
            labels[k % len(labels)] for k in range(count)
        ]
    assert chunks.images(Ranges([(0, len(chunks) - 1)])) == count
    assert chunks.images(Ranges([(0, len(chunks) - 2)])) == count - len(parts[-1].seeds)


# The manifest ---------------------------------------------------------------------------------------------------------
def test_manifest_is_there_before_the_first_image(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "new" / "out")
    with folder.opened({"command": "draw"}):
        manifest = _manifest(folder.path)
        assert manifest["job"]["sampling"] == {"num_steps": 18, "S_max": "inf"} and manifest["images"] == 10
        assert manifest["owner"]["pid"] > 0 and manifest["complete"] is False and manifest["chunks"] == {}
        assert manifest["runs"][0]["command"] == "draw" and re.match(r"20\d\d-.*T", manifest["runs"][0]["began"])
        _draw(folder)
        folder.manifest.end(outcome="complete")
        folder.finish()
    manifest = _manifest(folder.path)
    assert manifest["complete"] is True and "owner" not in manifest and [*manifest["chunks"]] == ["0", "1", "2"]
    assert _names(folder.path) == {f"images-0000{k}.npz" for k in range(3)} | {"grid.png", "manifest.json"}


def test_manifest_takes_up_what_a_killed_run_noted(tmp_path: Path) -> None:
    """Chunks that other processes and this one had finished are there, a torn line and a lost file are not."""
    folder = _finished(tmp_path)
    manifest = _manifest(tmp_path)
    digests = manifest.pop("chunks")
    (tmp_path / "manifest.json").write_text(json.dumps({**manifest, "chunks": {}, "products": None} | {"products": {}}))
    (tmp_path / ".journal-0").write_text(f"0 {digests['0']}\n2 {digests['2'][:30]}")
    (tmp_path / ".journal-5").write_text(f"1 {digests['1']}\nnonsense\n7 {digests['1']}\n")
    (tmp_path / "images-00002.npz.partial").write_text("torn")
    again = _folder(tmp_path)
    with again.opened({}):
        assert list(again.missing) == [2]
        assert not list(tmp_path.glob("*.partial")) and not list(tmp_path.glob(".journal-*"))
        _draw(again)
        again.manifest.end()
        again.finish()
    assert _manifest(tmp_path)["chunks"] == digests and len(read_images(tmp_path)[0]) == 10
    assert len(_manifest(tmp_path)["runs"]) == 2 and folder.missing == Ranges([(0, 2)])


@pytest.mark.parametrize("formats", [("npz",), ("png", "grid"), ("npz", "png", "latents")], ids=" ".join)
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_files_are_drawn_anew_and_the_rest_is_left(tmp_path: Path, formats: Sequence[str], damage: str) -> None:
    _finished(tmp_path, formats)
    before = {name: (tmp_path / name).read_bytes() for name in _names(tmp_path) if name != "manifest.json"}
    victim = tmp_path / sorted(name for name in before if "1" in name and "grid" not in name)[0]
    content = victim.read_bytes()
    if damage == "remove":
        victim.unlink()
    else:
        victim.write_bytes(content[:-9] if damage == "cut" else content[:60] + bytes([content[60] ^ 1]) + content[61:])
    folder = _folder(tmp_path, formats)
    with folder.opened({}):
        assert len(folder.missing) == 1 and folder.damaged == 1
        _draw(folder)
        folder.manifest.end()
        folder.finish()
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    with (same := _folder(tmp_path, formats)).opened({}):
        assert not same.missing


def test_a_lost_grid_is_made_anew_from_the_images(tmp_path: Path) -> None:
    _finished(tmp_path)
    grid = (tmp_path / "grid.png").read_bytes()
    (tmp_path / "grid.png").unlink()
    folder = _folder(tmp_path)
    with folder.opened({}):
        assert not folder.missing
        folder.manifest.end()
        folder.finish()
    assert (tmp_path / "grid.png").read_bytes() == grid


def test_adm_alone_keeps_one_file_and_notices_its_loss(tmp_path: Path) -> None:
    _finished(tmp_path, ["adm"])
    assert _names(tmp_path) == {"samples_10x8x8x3.npz", "manifest.json"}
    images, labels = read_images(tmp_path)
    assert images[:, 0, 0, 2].tolist() == list(range(10)) and labels.tolist() == [k % 3 for k in range(10)]
    assert _manifest(tmp_path)["chunks"] == {} and _manifest(tmp_path)["complete"]  # its shards are gone
    with (same := _folder(tmp_path, ["adm"])).opened({}):
        assert not same.missing
    (tmp_path / "samples_10x8x8x3.npz").write_bytes(b"damaged")
    with (again := _folder(tmp_path, ["adm"])).opened({}):
        assert len(again.missing) == 3


def test_adm_alone_forgets_its_shards_though_it_is_killed_before_they_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(_: Manifest) -> None:
        raise KeyboardInterrupt

    folder = _folder(tmp_path, ["adm"])
    with pytest.raises(KeyboardInterrupt), folder.opened({}):
        _draw(folder)
        monkeypatch.setattr(Manifest, "remove_journals", killed)
        folder.finish()
    assert len(folder.there()) == 3 and len([*tmp_path.glob("images-*.npz")]) == 3
    monkeypatch.undo()
    with (same := _folder(tmp_path, ["adm"])).opened({}):
        assert not same.missing and len(same.there()) == 3 and _manifest(tmp_path)["chunks"] == {}
        same.manifest.end(outcome="complete", images=0)
        same.finish()
    assert _names(tmp_path) == {"samples_10x8x8x3.npz", "manifest.json"}


def test_grid_shows_the_first_images_of_many(tmp_path: Path) -> None:
    folder = JobFolder(tmp_path, JOB, Chunks(Ranges([(0, GRID_IMAGES + 50)]), None, 64), ["npz", "grid"])
    with folder.opened({}):
        for index in folder.missing:
            chunk = folder.chunks[index]
            folder.add(Drawn(chunk, None, {"images": np.zeros((len(chunk.seeds), 2, 2, 3), np.uint8)}))
        folder.manifest.end()
        folder.finish()
    from PIL import Image

    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.size == (40, 40)  # 20 x 20 images of 2 x 2


# Whose folder it is ---------------------------------------------------------------------------------------------------
def test_another_job_is_refused_by_what_differs(tmp_path: Path) -> None:
    _finished(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in _names(tmp_path)}
    other = {**JOB, "sampling": {"num_steps": 12, "S_max": float("inf")}, "labels": "3"}
    with pytest.raises(UserError) as error, _folder(tmp_path, ("npz",), other).opened({}):
        pass
    assert "num_steps 18 there, 12 here" in error.value.message and "labels none there, 3 here" in error.value.message
    assert "formats grid,npz there, npz here" in error.value.message and "--overwrite" in error.value.message
    assert "S_max" not in error.value.message
    assert {name: (tmp_path / name).read_bytes() for name in before} == before


def test_overwrite_removes_the_other_job_and_nothing_else(tmp_path: Path) -> None:
    _finished(tmp_path, ["png", "grid"])
    (tmp_path / "notes.txt").write_text("mine")
    folder = _folder(tmp_path, ["npz"], {**JOB, "seeds": "other"})
    with folder.opened({}, overwrite=True):
        assert len(folder.missing) == 3 and _names(tmp_path) == {"notes.txt", "manifest.json"}
        _draw(folder)
        folder.manifest.end()
        folder.finish()
    assert _names(tmp_path) == {"notes.txt", "manifest.json", *(f"images-0000{k}.npz" for k in range(3))}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_other_things_is_refused_and_untouched(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match=r"already holds precious\.txt"), _folder(tmp_path).opened({}, overwrite):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["precious.txt"]


def test_a_job_killed_while_its_first_manifest_was_written_goes_on(tmp_path: Path) -> None:
    for name in (".lock", "manifest.json.partial"):
        (tmp_path / name).write_text("{")
    folder = _folder(tmp_path)
    with folder.opened({}):
        _draw(folder)
    assert len(folder.there()) == 3 and not (tmp_path / "manifest.json.partial").exists()


def test_a_second_owner_is_refused_and_told_who_is_there(tmp_path: Path) -> None:
    with _folder(tmp_path).opened({}):
        with pytest.raises(UserError, match=r"process \d+ on .* is drawing into it"), _folder(tmp_path).opened({}):
            pass
        with pytest.raises(UserError, match="is drawing into it"), _folder(tmp_path).opened({}, overwrite=True):
            pass


@pytest.mark.parametrize(
    "content",
    ["", "[]", "{}", '{"format": 1, "job": {}}', '{"format": 2, "job": [], "runs": [], "chunks": {}}',
     '{"format": 2, "job": {}, "runs": [1], "chunks": {}}', '{"format": 2, "job": {}, "runs": [], "chunks": {"x": ""}}',
     '{"format": 2, "job": {}, "runs": [], "chunks": {}, "products": {"../x": ""}}', "[" * 100_000, "\udcff"],
)  # fmt: skip
def test_a_damaged_manifest_is_refused_in_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "manifest.json").write_text(content, errors="surrogateescape")
    message = r"manifest\.json is damaged, or that of another dgfast version"
    with pytest.raises(UserError, match=message), _folder(tmp_path).opened({}):
        pass
    with (folder := _folder(tmp_path)).opened({}, overwrite=True):
        assert len(folder.missing) == 3


def test_a_run_that_draws_nothing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="mine"), _folder(tmp_path / "out").opened({}):
        raise RuntimeError("mine")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError), (folder := _folder(tmp_path / "out")).opened({}):
        _draw(folder, [1])
        raise RuntimeError
    assert _names(tmp_path / "out") == {"images-00001.npz", "manifest.json", ".journal-0"}
    assert [*_manifest(tmp_path / "out")["chunks"]] == ["1"]


def test_a_run_of_several_processes_that_draws_nothing_still_knows_what_comes_late(tmp_path: Path) -> None:
    """All are stopped at once, and one of them writes its last chunk after the first has left the folder."""
    first, second = (_folder(tmp_path, rank=rank, processes=2) for rank in (0, 1))
    with pytest.raises(KeyboardInterrupt), first.opened({}):
        raise KeyboardInterrupt
    _draw(second, [1])
    with (again := _folder(tmp_path)).opened({}):
        assert str(again.missing) == "0,2"
        _draw(again)
        again.finish()


# What the system refuses ----------------------------------------------------------------------------------------------
def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(StorageError, match="can't be written"), _folder(tmp_path / "out").opened({}):
        pass
    assert (tmp_path / "out").read_text() == "a file"


def test_a_folder_that_vanishes_is_named(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "out")
    with pytest.raises(StorageError, match="the folder is gone"), folder.opened({}):
        (tmp_path / "out").rename(tmp_path / "elsewhere")
        _draw(folder, [0])


@pytest.mark.parametrize("formats", [["npz"], ["png"]])
def test_a_full_disk_leaves_no_torn_file(tmp_path: Path, formats: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def writing() -> Any:
            with replacing(path) as file:
                file.write(b"half")
                raise OSError(28, "No space left on device")
                yield file

        return writing()

    folder = _folder(tmp_path, formats)
    with pytest.raises(StorageError, match=r"can't be written \(No space left on device\)"), folder.opened({}):
        _draw(folder, [0])
        monkeypatch.setattr("dgfast.job_folder.replacing", full)
        _draw(folder, [1])
    assert not list(tmp_path.rglob("*.partial")) and len(read_first(tmp_path)) == 4


def read_first(folder: Path) -> list[Path]:
    shards = list(folder.glob("images-*.npz"))
    return shards * 4 if shards else list(folder.rglob("*.png"))


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(self: Any) -> None:
        raise NotImplementedError("no flock")

    monkeypatch.setattr("dgfast.job_folder.FileLock.acquire", no_locks)
    with pytest.raises(StorageError, match="has no locks"), _folder(tmp_path / "out").opened({}):
        pass
