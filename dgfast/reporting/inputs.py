"""Tells apart by their content what a page can be made of."""

from collections.abc import Sequence
from pathlib import Path

from dgfast import bounds
from dgfast.errors import UserError
from dgfast.reporting import evaluation, noise_errors, runs, timings, trajectory
from dgfast.reporting.page import Content

_KNOWN = (
    "give folders of `dgfast sample`, files of `dgfast evaluate --json` or of `pytest --benchmark-json`, the "
    "results.json of `python -m benchmarks.gpu`, or the trajectory.npz of an earlier page"
)


def read(paths: Sequence[Path]) -> Content:
    """What folders and files hold.

    Raises:
        UserError: one is given twice, cannot be read, or is nothing that a page is made of.
    """
    content = Content()
    for k, path in enumerate(paths):
        if path.resolve() in {other.resolve() for other in paths[:k]}:
            raise UserError(f"{path} is given twice; give it once")
        if path.is_dir():
            content.runs.append(runs.read(path))
        elif path.suffix == ".npz":
            content.trajectories.append(trajectory.read(path))
        else:
            _add_json(content, path)
    return content


def _add_json(content: Content, path: Path) -> None:
    try:
        found = bounds.read_json(path)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is no JSON that dgfast reads ({error}); {_KNOWN}") from error
    names = found if isinstance(found, dict) else {}
    if names.get("format") == evaluation.FORMAT:
        content.evaluations.append(evaluation.parse(path, found))
    elif "benchmarks" in names:
        content.timings.append((str(path), timings.parse(path, found)))
    elif "parts" in names:
        content.errors += noise_errors.parse(path, found)
    else:
        raise UserError(f"{path} is none of the files that this page is made of; {_KNOWN}")
