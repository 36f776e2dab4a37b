"""One network's training, from the options of `dgfast train` to the bundle that it joins."""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn

from dgfast import bundle as bundles
from dgfast import nets
from dgfast.bundle import Bundle
from dgfast.checkpoints.joining import alone
from dgfast.devices import pick_device
from dgfast.errors import UserError
from dgfast.options import command_line
from dgfast.training.data import load_images, split
from dgfast.training.early_stopping import EarlyStopping
from dgfast.training.loop import Loss, Player, Schedule, fit_together

_SHAPE = (
    "img_resolution",
    "image_size",
    "img_channels",
    "in_channels",
    "label_dim",
    "num_classes",
)  # as the data have it

SIGMAS = (0.002, 0.01, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 40.0)
"""Noise levels by which noise-aware networks are judged."""


class Job:
    """The data, the bundle, the loop, and what is written at the end.

    Args:
        folder: of the bundle. data, holdout: see `load_images` and `split`. net_json: constructor keywords to change.
        start: bundle whose network of this role is trained on. recipe: what else belongs to this run alone.
        schedule: of `loop.Schedule`.

    Raises:
        UserError: data, a device or an object of keywords that is none.
    """

    def __init__(
        self, role: str, *, folder: Path, data: str, holdout: int, net_json: str, start: Path | None,
        device: str | None, recipe: dict[str, Any] | None = None, **schedule: Any,
    ) -> None:  # fmt: skip
        self._changes = json_object("--net", net_json)
        self.role, self.device = role, pick_device(device)
        self.schedule = Schedule(**schedule)
        everything = load_images(data)
        self.classes = int(everything.labels.max()) + 1
        self.train, self.held_out = split(everything, holdout)
        self.bundle, self._start = bundles.read_or_new(folder), start
        self._recipe = {"data": data, "holdout": holdout, "start": start and str(start), **(recipe or {})}
        self.folder = self.bundle.folder / "training" / role

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
        return fit_together(players, self.schedule, self.folder, self.device, watch, self._recipe, stopping)

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


def json_object(option: str, text: str) -> dict[str, Any]:
    """
    Raises:
        UserError: the option's text is no JSON object.
    """
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"{option} {text!r} is not a JSON object: {error}") from error


def build(option: str, kind: str, keywords: dict[str, Any]) -> Any:
    """
    Raises:
        UserError: keywords with which there is no such network; names the option that they come from.
    """
    try:
        return nets.build(kind, **keywords)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error
