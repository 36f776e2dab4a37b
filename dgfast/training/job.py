"""One network's training, from the options of `dgfast train` to the bundle that it joins."""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

from dgfast import bundle as bundles
from dgfast import nets
from dgfast.bundle import Bundle
from dgfast.checkpoints.joining import alone
from dgfast.devices import pick_device
from dgfast.errors import UserError, one_line
from dgfast.options import command_line
from dgfast.training.data import ImageSet, labelled_as, load_images, split
from dgfast.training.early_stopping import EarlyStopping
from dgfast.training.encoding import as_latents, draws_latents
from dgfast.training.loop import Loss, Player, Schedule, fit_together
from dgfast.weights import UNBUILDABLE

_SHAPE = (
    "img_resolution",
    "image_size",
    "img_channels",
    "in_channels",
    "label_dim",
    "num_classes",
)  # as the data have it

_DATA, _GENERATED = "--data", "--generated"
_CLASSIFIERS = ("classifier", "features")  # which learn nothing but labels

SIGMAS = (0.002, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 40.0)
"""Noise levels by which noise-aware networks are judged."""


class Job:
    """The data, the bundle, the loop, and what is written at the end.

    Args:
        folder: of the bundle. data, holdout: see `load_images` and `split`. net_json: constructor keywords to change.
        start: bundle whose network of this role is trained on. recipe: what else belongs to this run alone.
        replaced: whether a network of this role that another command made may be replaced.
        schedule: of `loop.Schedule`.

    Attributes:
        train, held_out: as the bundle's score network reads images, so encoded where it makes latents; but for
            `features`, which are of pixels. classes: of the score network, or of the data where there is none.
        recipe: what makes this run another than one in the same folder, by name, beside the schedule.

    Raises:
        UserError: data, a device, a schedule or an object of keywords that is none; a bundle that has such a network.
    """

    def __init__(
        self, role: str, *, folder: Path, data: str, holdout: int, net_json: str, start: Path | None,
        device: str | None, replaced: bool = False, recipe: dict[str, Any] | None = None, **schedule: Any,
    ) -> None:  # fmt: skip
        self._changes = json_object("--net", net_json)
        self.role, self.device = role, pick_device(device)
        self.schedule = Schedule(**schedule)
        self.bundle, self._start = bundles.read_or_new(folder), start
        self.folder = self.bundle.folder / "training" / role
        if role in self.bundle.nets and not replaced and not (self.folder / "state.pt").exists():
            raise UserError(
                f"{folder} has a {role} network already, which no training in {self.folder} made: give --overwrite to "
                "replace it, or another --bundle"
            )
        data_set, digest = self.read(data, _DATA)
        self.classes = self._classes_of_score() or int(data_set.labels.max()) + 1
        self.class_names = data_set.class_names
        self.train, self.held_out = split(data_set, holdout)
        self.recipe = {"data": data, "holdout": holdout, "start": start and str(start), **(recipe or {})}
        self.recipe |= {"content of --data": digest}

    def read(self, source: str, option: str) -> tuple[ImageSet, str]:
        """Images as networks of this role read them, and the digest of what was read.

        Raises:
            UserError: see `load_images`; images that are not square; labels missing, or beyond the score network's.
        """
        of_latents = self.role != "features" and draws_latents(self.bundle)
        data = load_images(source, option, prefer_latents=of_latents)
        digest = data.digest()
        if self.role != "score":
            data = labelled_as(data, self.bundle.class_names, self._classes_of_score(), f"{option} {source}")
        without = int((data.labels < 0).sum())
        if without and (without < len(data) or self.role in _CLASSIFIERS or self._classes_of_score()):
            raise UserError(
                f"{option} {source}: {without} of {len(data)} images have no label, and a {self.role} network here "
                "needs one for each"
            )
        if of_latents and data.images.dtype == np.uint8:
            if option == _GENERATED:  # what comes back from the VAE is not what the network drew
                raise UserError(f"{option} {source}: the bundle makes latents; draw them with --format latents")
            data = as_latents(data, self.bundle, self.device)
        height, width = data.images.shape[1:3]
        if height != width:
            raise UserError(f"{option} {source}: images of {height} x {width}; what is trained here reads square ones")
        return data, digest

    def _classes_of_score(self) -> int:
        """Of the bundle's score network, beside which others are trained; 0: it has none, or is not there yet."""
        if self.role == "score" or "score" not in self.bundle.nets:
            return 0
        return int(self.bundle.spec("score").keywords.get("label_dim") or 0)

    def build(self, kind: str, keywords: dict[str, Any]) -> Any:
        """The job's network, as --net changes it and as the seed draws it, or as --start has it.

        Raises:
            UserError: --net beside --start, a network of another kind or for other images at --start.
        """
        torch.manual_seed(self.schedule.seed)
        self._kind, self._keywords = kind, {**keywords, **self._changes}
        if self._start is None:
            return build("--net", kind, self._keywords)
        if self._changes:
            raise UserError("--net and --start exclude each other: a network that is trained on keeps its shape")
        start = bundles.read(self._start)
        spec = start.spec(self.role)
        shape = {name: keywords[name] for name in _SHAPE if name in keywords}
        other = {name: spec.keywords.get(name) for name in shape if spec.keywords.get(name) != shape[name]}
        if spec.kind != kind or other:
            raise UserError(
                f"--start {self._start}: its {self.role} network is a {spec.kind} with {other or 'the same shape'}; "
                f"these data are for a {kind} with {shape}"
            )
        self._keywords = spec.keywords
        return start.load(self.role).requires_grad_(True)

    def fit(self, kind: str, keywords: dict[str, Any], loss: Loss, stopping: EarlyStopping | None = None) -> Any:
        """The averaged network after `build` and the loop."""
        return self.fit_together([Player(self.build(kind, keywords), loss)], stopping=stopping)[0]

    def fit_together(
        self, players: Sequence[Player], watch: Callable[[Sequence[nn.Module]], None] | None = None,
        stopping: EarlyStopping | None = None,
    ) -> list[nn.Module]:  # fmt: skip
        _try_out(players, self.schedule.batch, self.device, self.train)
        recipe = self.recipe | {"net": self._keywords}
        return fit_together(players, self.schedule, self.folder, self.device, watch, recipe, stopping)

    def mean_loss(self, net: nn.Module, loss: Loss, batches: int = 20) -> float:
        """`loss` of `net` over fixed draws."""
        torch.manual_seed(0)
        with torch.no_grad():
            return round(sum(float(loss(net, self.schedule.batch)) for _ in range(batches)) / batches, 4)

    def finish(
        self, net: nn.Module, metrics: dict[str, Any], time_schedule: str | None = None,
        about: Callable[[Bundle], Bundle] = lambda bundle: bundle,
    ) -> None:  # fmt: skip
        """Add the network to the bundle as it is by now: others may have joined it while this one was trained.

        Args:
            about: what else changes in the bundle.
        """
        command = f"dgfast train {click.get_current_context().info_name} {shlex.join(command_line())}"
        parameters = sum(p.numel() for p in net.parameters())
        record = {"command": command, "parameters": parameters, **metrics}
        with alone(self.bundle.folder):
            present = about(bundles.read_or_new(self.bundle.folder))
            done = bundles.with_net(present, self.role, net, self._kind, self._keywords, time_schedule)
            bundles.write(replace(done, metrics={**done.metrics, self.role: record}))
        click.echo(f"{self.bundle.folder}: {self.role}, {parameters:,} parameters, {json.dumps(metrics)}")


def _try_out(players: Sequence[Player], batch: int, device: torch.device, data: ImageSet) -> None:
    """One batch through every network: keywords that make a network may still not make one for these images.

    Raises:
        UserError: a network fails on them.
    """
    try:
        for player in players:
            with torch.no_grad():
                player.loss(player.net.to(device).eval(), batch)
    except (IndexError, RuntimeError, ValueError) as error:
        shape = " x ".join(map(str, data.images.shape[1:]))
        raise UserError(
            f"a batch of {batch} does not go through this network for images of {shape} (height, width, channels); "
            f"change --net or --batch: {one_line(error)}"
        ) from error


def json_object(option: str, text: str) -> dict[str, Any]:
    """
    Raises:
        UserError: the option's text is no JSON object.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{option} {text!r:.80} is not a JSON object: {one_line(error)}") from error
    if not isinstance(value, dict):
        raise UserError(f"{option} {text!r:.80} is not a JSON object, such as '{{\"dropout\": 0.1}}'")
    return value


def build(option: str, kind: str, keywords: dict[str, Any]) -> Any:
    """
    Raises:
        UserError: keywords with which there is no such network; names the option that they come from.
    """
    try:
        nets.check_types(kind, keywords)
        return nets.build(kind, **keywords)
    except UNBUILDABLE as error:
        raise UserError(f"{option}: {one_line(error)}") from error
