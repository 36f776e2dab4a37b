"""A stopped export says one line, ends with the code of what stopped it, and leaves nothing half written."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from dgfast.bundle import Bundle
from dgfast.export import onnx_file, package_file, to_onnx, to_package
from dgfast.stopping import Terminated

_DOORS = {"onnx": (to_onnx.main, onnx_file, "value_rows"), "package": (to_package.main, package_file, "write")}


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt(), 130), (Terminated(), 143)], ids=["Ctrl-C", "SIGTERM"])
@pytest.mark.parametrize("door", _DOORS)
def test_export_that_is_stopped_leaves_nothing(
    door: str, stop: BaseException, code: int, small_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main, writer, half_way = _DOORS[door]
    assert isinstance(main, click.Command)

    def stopped(*_: object) -> None:
        raise stop

    monkeypatch.setattr(writer, half_way, stopped)
    if door == "package":
        monkeypatch.setattr(package_file, "lowered", lambda *_: None)
    options = ["--bundle", str(small_bundle.folder), "--batch", "2", "--what", "generator", "--out", str(tmp_path)]
    done = CliRunner().invoke(main, options)
    assert done.exit_code == code
    assert done.output.splitlines()[-1] == "stopped before a file was written" and "Traceback" not in done.output
    assert not [*tmp_path.iterdir()]
