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
    "score": [-0.0106756, 0.582264, -0.0453005, -0.957784, -1.0157, -0.861876, 0.693055],
    "score without class": [0.00246435, 0.581068, -0.0651189, -0.914368, -1.00691, -0.855584, 0.698214],
    "reference": [0.160704, 0.476236, 0.0248567, -0.843591, -0.851158, -0.520655, 0.611464],
    "classifier": [-0.294436, -2.5054, 1.47142, -1.06791, 0.859074, 0.187904, 1.39216],
    "discriminator": [-4.26063, -4.26063, -4.26063, 5.08763, 5.08763, 5.08763, 4.69239],
    "features": [-4.43534, -8.11883, 7.52783, -6.217, 9.69671, -4.91903, 8.17205],
    "generator": [0.72846, 0.626662, -0.999928, 0.736875, 0.645764, 0.57388, 0.881519],
    "one step": [-1, -0.988967, 0.54409, -1, -0.999993, -0.856561, 0.89015],
    "labels of the seeds": [5, 3, 6, 4, 3, 5, 5, 0, 2, 8, 4, 1],
    "sampler": [-4.52382, -5.22363, -1.7137, -5.80193, -2.94612, -3.5262, 3.48825],
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
