"""python -m benchmarks.golden: each network of the golden files at its real size, compiled and through ONNX.

The files hold configurations and inputs, their recipe the weights. An error is the largest of any output against eager
on the CPU, relative to the largest number of the same sample; more than 2e-5 of compiled code or 1e-4 of ONNX is a
failure.
"""

import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dgfast import nets
from dgfast import noise_levels as nl
from dgfast.denoiser import FlowPrecond
from dgfast.graph.agreement import relative_error
from dgfast.guidance import DiscriminatorGuidance
from dgfast.nets.discriminator import Discriminator, NoisyClassifier
from dgfast.runtimes import RUNTIMES, Runtime
from dgfast.weights import placed

FOLDER = Path(__file__).parents[1] / "tests/golden"
JUDGED = {name: RUNTIMES[name] for name in ("compiled", "onnx")}

Arguments = tuple[Tensor | None, ...]
Calls = tuple[Callable[..., tuple[Tensor, ...]], list[Arguments], list[nn.Module]]
"""A function, arguments to call it with, and its networks."""


class Golden:
    """One file."""

    def __init__(self, path: Path) -> None:
        with np.load(path) as stored:
            self.meta: dict[str, Any] = json.loads(str(stored["meta"]))
            self.tensors = {name: torch.from_numpy(stored[name]) for name in stored.files if name != "meta"}
        spec = importlib.util.spec_from_file_location("golden_fill", path.parent / "golden_fill.py")
        assert spec is not None and spec.loader is not None
        self._recipe = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self._recipe)

    def net(self, kind: str, config: str = "config", prefix: str = "prefix") -> Any:
        net = nets.build({"Precond": "EDM2Precond"}.get(kind, kind), **self.meta[config])
        filled: nn.Module = self._recipe.fill_(net, self.meta[prefix])
        return placed(filled, "cpu", torch.float32)

    def calls(self) -> Calls | None:
        """What to compare; None for a file that has no network of its own."""
        meta, has = self.meta, self.tensors.keys()
        if "condition" in meta:
            return self._gradient()
        if meta.get("cls") or "D" in has:
            return self._denoiser(self.net(meta.get("cls", "EDMPrecond")))
        if "logits" in has:
            encoder = self.net("create_classifier")
            classifier, x = NoisyClassifier(encoder), self.tensors["x"]
            return lambda x, t: (classifier(x, t),), [(x, t.expand(len(x))) for t in self.tensors["t"]], [encoder]
        if str(meta.get("source")).startswith("willisma/SiT"):
            return self._velocity() if "out" in has else None
        if "pos_embed_init_sub" in has:
            return self._of_timesteps(self.net("DiT"))
        if "model_out" in has:
            return self._of_timesteps(self.net("create_model", "model_config", "prefix_model"))
        return None

    def _denoiser(self, net: Any) -> Calls:
        x, labels = self.tensors["x_base"], self.tensors.get("class_labels")
        pairs = zip(self.tensors["x_scale"], self.tensors["sigma"], strict=True)
        given: list[Arguments] = [((scale * x).float(), sigma.expand(len(x)), labels) for scale, sigma in pairs]
        return lambda x, sigma, labels: (net(x, sigma, labels),), given, [net]

    def _of_timesteps(self, net: Any) -> Calls:
        x, y = self.tensors["x"], self.tensors["y"]
        times = [t if t.dim() else t.expand(len(x)) for t in self.tensors["t"]]
        return lambda x, t, y: (net(x, t, y),), [(x, t, y) for t in times], [net]

    def _velocity(self) -> Calls:
        raw, x = self.net("DiT"), self.tensors["x"]
        net = FlowPrecond(raw, raw.input_size, raw.in_channels, raw.num_classes).eval()
        labels = F.one_hot(self.tensors["y"], net.label_dim).float()
        levels = [*net.path.sigma(self.tensors["t"].double()), torch.full((len(x),), torch.inf, dtype=torch.float64)]
        return lambda x, sigma, y: (net.velocity(x, sigma, y),), [(x, sigma, labels) for sigma in levels], [net]

    def _gradient(self) -> Calls:
        meta, x = self.meta, self.tensors["x_base"]
        trunk = self.net("create_classifier", "classifier", "prefix_classifier")
        head = self.net("create_classifier", "discriminator", "prefix_discriminator")
        time = nl.cosine_time if meta["resolution"] == 64 else nl.vp_time
        window = meta["time_min"], meta["time_max"]
        guidance = DiscriminatorGuidance(Discriminator(trunk, head).eval(), 1.0, window, time)

        def correction(x: Tensor, sigma: Tensor, labels: Tensor | None) -> tuple[Tensor, ...]:
            direction, gate, log_ratio = guidance.correct(x, sigma, labels, x)
            return gate.view(-1, 1, 1, 1) * direction, log_ratio

        pairs = zip(self.tensors["x_scale"], self.tensors["sigma"], strict=True)
        labels = self.tensors.get("class_labels")
        return correction, [((s * x).float(), sigma.expand(len(x)), labels) for s, sigma in pairs], [trunk, head]


def errors(
    paths: Iterable[Path], runtimes: Mapping[str, Runtime], device: torch.device
) -> Iterator[tuple[str, float, dict[str, float]]]:
    """Name, millions of weights, and error by runtime on that device of every file with a network."""
    for path in paths:
        found = Golden(path).calls()
        if found is None:
            continue
        function, given, networks = found
        with torch.no_grad():
            wanted = [function(*arguments) for arguments in given]
        millions = sum(w.numel() for net in networks for w in net.parameters()) / 1e6
        for net in networks:
            net.to(device)
        there = [tuple(None if x is None else x.to(device) for x in arguments) for arguments in given]
        worst = {name: _worst(runtime.build(function, there[0]), there, wanted) for name, runtime in runtimes.items()}
        yield path.stem, millions, worst


@torch.no_grad()
def _worst(built: Callable[..., tuple[Tensor, ...]], given: list[Arguments], wanted: list[tuple[Tensor, ...]]) -> float:
    pairs = ((a.cpu(), b) for x, y in zip(given, wanted, strict=True) for a, b in zip(built(*x), y, strict=True))
    return max(relative_error(a, b) for a, b in pairs)


@click.command(help=__doc__)
@click.option("--golden", type=click.Path(path_type=Path), default=FOLDER, help="Default: those of this repository.")
def main(golden: Path) -> None:
    click.echo(f"| golden file | million weights | {' | '.join(JUDGED)} |\n|---|---|{'---|' * len(JUDGED)}")
    failed = False
    for name, millions, found in errors(sorted(golden.glob("*.npz")), JUDGED, torch.device("cpu")):
        click.echo(f"| {name} | {millions:.1f} | {' | '.join(f'{error:.1e}' for error in found.values())} |")
        failed |= not all(found[name] <= runtime.tolerance for name, runtime in JUDGED.items())
    sys.exit(failed)


if __name__ == "__main__":
    main()
