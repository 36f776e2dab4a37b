"""What the shipped networks answer, as numbers: a change in how they are read, called or computed shows here.

Whoever trains the bundle anew prints the new numbers with `python -m tests.bundles.test_mnist32_pinned`.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

import dgfast
from dgfast import bundle as bundles
from dgfast.networks import load

PINNED: dict[str, list[float]] = {
    "score": [0.0525572, 0.568471, -0.0557755, -0.869782, -0.932255, -0.779015, 0.644809],
    "score without class": [0.0604472, 0.56741, -0.0638615, -0.826257, -0.917795, -0.77462, 0.648865],
    "reference": [0.385153, 0.432362, 0.0380271, -0.229952, -0.349476, -0.208137, 0.31335],
    "classifier": [0.241864, -1.3163, 0.723028, -0.472553, 0.636972, -0.13554, 0.722973],
    "discriminator": [-0.609223, -0.609223, -0.609223, -0.172574, -0.172574, -0.172574, 0.447736],
    "features": [-4.43534, -8.11883, 7.52783, -6.217, 9.69671, -4.91903, 8.17205],
    "generator": [0.72846, 0.626662, -0.999928, 0.736875, 0.645764, 0.57388, 0.881519],
    "one step": [-1, -0.988967, 0.54409, -1, -0.999993, -0.856561, 0.89015],
    "labels of the seeds": [5, 3, 6, 4, 3, 5, 5, 0, 2, 8, 4, 1],
    "sampler": [-5.82008, -5.01115, -0.923878, -3.04652, -0.110807, -5.19423, 3.16632],
}


def wave(*shape: int) -> Tensor:
    """The same numbers on every machine."""
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float64).mul(0.37).cos().view(shape)


def few(x: Tensor) -> list[float]:
    """Six of the results, spread over all, and how large all of them are together."""
    flat = x.detach().double().flatten()
    picked = flat[torch.linspace(0, len(flat) - 1, 6).round().long()]
    return [*picked.tolist(), float(flat.square().mean().sqrt())]


def middle(images: Tensor) -> Tensor:
    """Where the digits are; the border is black whatever happens."""
    return images[..., 10:22, 10:22]


@torch.no_grad()
def answers() -> dict[str, list[float]]:
    networks: Any = load("mnist32")
    sigma = torch.tensor([0.2, 4.0], dtype=torch.float64)
    labels = torch.eye(10)[[3, 8]]
    x = (0.3 + sigma).view(-1, 1, 1, 1) * wave(2, 1, 32, 32)
    u, t = (x / (1 + sigma**2).sqrt().view(-1, 1, 1, 1)).float(), networks.time(sigma)
    features: Any = bundles.read("mnist32").load("features")
    one_step: Any = dgfast.OneStep.load("mnist32")
    drawn = one_step.draw_labels(range(12))
    return {
        "score": few(networks.denoiser(x, sigma, labels)),
        "score without class": few(networks.denoiser(x, sigma, None)),
        "reference": few(networks.reference(x, sigma, labels)),
        "classifier": few(networks.classifier(u, t)),
        "discriminator": few(networks.discriminator(u, t, labels)),
        "features": few(features(wave(2, 1, 32, 32).float())),
        "generator": few(middle(one_step.generator(wave(2, one_step.generator.latent_dim).float(), labels))),
        "one step": few(middle(one_step([0, 5, 2**31]))),
        "labels of the seeds": [float(label) for label in drawn],
        "sampler": few(
            dgfast.Sampler(networks, dgfast.SamplingConfig(num_steps=3), dgfast.GuidanceConfig(1.0))([0, 5])
        ),
    }


@pytest.fixture(scope="module")
def found() -> dict[str, list[float]]:
    return answers()


def test_pins_are_of_every_network(found: dict[str, list[float]]) -> None:
    assert found.keys() == PINNED.keys() and set(bundles.read("mnist32").nets) <= PINNED.keys()


@pytest.mark.parametrize("name", PINNED)
def test_shipped_network_answers_as_pinned(found: dict[str, list[float]], name: str) -> None:
    largest = max(map(abs, PINNED[name]))
    assert found[name] == pytest.approx(PINNED[name], rel=1e-3, abs=1e-4 * largest)


if __name__ == "__main__":
    for name, numbers in answers().items():
        print(f"    {name!r}: [{', '.join(f'{number:.6g}' for number in numbers)}],")
