"""A network joins the others of a bundle: all or nothing, one at a time, and none in the place of another."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import click
from filelock import FileLock, Timeout
from safetensors import SafetensorError

from dgfast import bundle as bundles
from dgfast.bundle import Bundle
from dgfast.checkpoints import defaults, one_line
from dgfast.checkpoints.account import Assumed
from dgfast.checkpoints.network import Converted
from dgfast.config import SamplingConfig
from dgfast.errors import UserError

_LOCK = ".lock"
_PATIENCE = 600  # seconds that another command may take to write


def join(
    converted: Converted, out: Path, role: str, *, name: str | None, fallback_name: str, provenance: str,
    license_: str | None, time_schedule: str | None, vae: str | None,
) -> list[Assumed]:  # fmt: skip
    """Add the network to the bundle in that folder, which is made if need be.

    Args:
        name: of a new bundle, and that of the old one if it is told at all; fallback_name: of a new one otherwise.
        provenance, license_: of the network. time_schedule, vae: as told on the command line.

    Returns:
        what is assumed of the network, and of the bundle with it.

    Raises:
        UserError: there is no room for it, or the folder cannot be written; nothing has changed then.
    """
    for option, text in (("name", name), ("license", license_), ("provenance", provenance)):
        if text and not text.replace("\n", " ").isprintable():  # a bundle with such a text would not be read
            raise UserError(f"--{option} has control characters: {one_line(text)!r}")
    with alone(out):
        bundle = room(out, role, name) or Bundle(folder=out, name=name or fallback_name, nets={})
        converted = defaults.like_its_sibling(bundle, role, converted)
        assumed = list(converted.assumed)
        if role == "classifier":
            time_schedule, entries = defaults.classifier_time(bundle, converted.keywords["image_size"], time_schedule)
            assumed += entries
        if role == "score":
            own = converted.sampling if bundle.sampling == SamplingConfig() else {}
            bundle, entries = defaults.beside_score(bundle, converted, vae)
            bundle = replace(bundle, sampling=replace(bundle.sampling, **own))
            assumed += entries
        bundle = replace(
            bundle,
            provenance=_extended(bundle.provenance, role, provenance),
            license=_extended(bundle.license, role, license_),
        )
        _write(bundle, role, converted, time_schedule)
    return assumed


def room(out: Path, role: str, name: str | None) -> Bundle | None:
    """The bundle in that folder, if there is one.

    Raises:
        UserError: it has such a network, or another name.
    """
    bundle = bundles.read(out) if (out / "bundle.json").is_file() else None
    if bundle is not None and name not in (None, bundle.name):
        raise UserError(f"{out} holds the bundle {bundle.name!r} already; leave out --name, or use another --out")
    if bundle is not None and role in bundle.nets:
        raise UserError(f"{out} has a {role} network already; nothing was replaced. Use another --out")
    if (out / f"{role}.safetensors").exists():
        raise UserError(
            f"{out} has a {role} network already, though no bundle.json names it, as after an interrupted conversion: "
            f"move {role}.safetensors away, or use another --out"
        )
    return bundle


def _extended(text: str, role: str, more: str | None) -> str:
    return "; ".join(filter(None, [text, more and f"{role}: {more}"]))


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Makes the folder if need be, and lets no other command change its bundle.json meanwhile.

    Raises:
        UserError: the folder cannot be written, or another command does not end.
    """
    new_folders = [folder for folder in (out, *out.parents) if not folder.exists()]
    lock = FileLock(out / _LOCK)
    try:
        out.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            click.echo(f"waiting for another command that writes to {out}", err=True)
            lock.acquire(timeout=_PATIENCE)
        yield
    except Timeout as error:
        raise UserError(f"{out}: another command has not ended for {_PATIENCE} s; try again later") from error
    except BaseException as error:
        _unmake(new_folders)
        if isinstance(error, OSError | SafetensorError):
            raise UserError(f"cannot write to {out}: {error}; nothing was changed") from error
        raise
    finally:
        lock.release()


def _unmake(new_folders: list[Path]) -> None:
    """Remove those folders, if nothing has come into them but the lock."""
    with suppress(OSError):
        if new_folders and all(path.name == _LOCK for path in new_folders[0].iterdir()):
            (new_folders[0] / _LOCK).unlink(missing_ok=True)
        for folder in new_folders:
            folder.rmdir()


def _write(bundle: Bundle, role: str, converted: Converted, time_schedule: str | None) -> None:
    """Write the network and `bundle.json`, or leave everything as it was."""
    try:
        added = bundles.with_net(bundle, role, converted.net, converted.kind, converted.keywords, time_schedule)
        bundles.write(added)
    except BaseException:
        for name in (f"{role}.safetensors", f"{role}.safetensors.partial", "bundle.json.partial"):
            with suppress(OSError):
                (bundle.folder / name).unlink()
        raise
