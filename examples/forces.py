"""python examples/forces.py FOLDER: energy and forces of a small potential, compiled and as files.

Lennard-Jones and a tiny network of each pair's distance and elements, in double precision. The forces are a gradient
inside of the function. Each way to run it is compared with eager PyTorch on atoms that it has not seen.
"""

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnxruntime
import torch
import torch._inductor  # which opens packages
from torch import Tensor, nn

import dgfast

ATOMS = 24


class Pairs(nn.Module):
    """A correction to the energy of each pair of atoms."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = nn.Embedding(3, 8)
        self.layers = nn.Sequential(nn.Linear(9, 32), nn.SiLU(), nn.Linear(32, 1))

    def forward(self, distance: Tensor, first: Tensor, second: Tensor) -> Tensor:
        both = self.elements(first) + self.elements(second)
        return self.layers(torch.cat([distance.unsqueeze(-1), both], -1)).squeeze(-1) * torch.exp(-distance)


def energy_and_forces(network: Pairs, positions: Tensor, elements: Tensor) -> dict[str, Tensor]:
    """positions [N, 3], elements [N] -> energy [], forces [N, 3]."""
    x = positions.detach().requires_grad_()
    first, second = torch.triu_indices(len(x), len(x), 1)
    distance = torch.linalg.vector_norm(x[first] - x[second], dim=-1)
    sixth = distance.pow(-6)
    energy = (4 * (sixth**2 - sixth)).sum() + network(distance, elements[first], elements[second]).sum()
    (gradient,) = torch.autograd.grad(energy, x)
    return {"energy": energy, "forces": -gradient}


def atoms(seed: int) -> tuple[Tensor, Tensor]:
    """Near the points of a lattice."""
    generator = torch.Generator().manual_seed(seed)
    lattice = 1.2 * torch.cartesian_prod(torch.arange(2.0), torch.arange(3.0), torch.arange(4.0)).double()
    moved = lattice + 0.1 * torch.randn(ATOMS, 3, dtype=torch.float64, generator=generator)
    return moved, torch.randint(3, (ATOMS,), generator=generator)


def milliseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(30):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


def main(folder: Path) -> None:
    torch.manual_seed(0)
    function = partial(energy_and_forces, Pairs().double())
    example, unseen = atoms(0), atoms(1)
    expected = function(*unseen)
    compiled = dgfast.compile(function, example)
    off = (compiled(*unseen)["forces"] - expected["forces"]).abs().max()
    eager_ms, compiled_ms = milliseconds(lambda: function(*unseen)), milliseconds(lambda: compiled(*unseen))
    print(f"compiled: forces off by {off:.1e}; eager takes {eager_ms / compiled_ms:.1f} times as long")

    dgfast.export_onnx(function, example, folder / "forces.onnx")
    session = onnxruntime.InferenceSession(folder / "forces.onnx", providers=["CPUExecutionProvider"])
    energy, forces = session.run(None, {"positions": unseen[0].numpy(), "elements": unseen[1].numpy()})
    print(f"ONNX Runtime: energy {energy:.6f}, eager {expected['energy']:.6f}; forces off by "
          f"{abs(forces - expected['forces'].numpy()).max():.1e}")  # fmt: skip

    dgfast.export_package(function, example, folder / "forces.pt2")
    package = torch._inductor.aoti_load_package(str(folder / "forces.pt2"))
    off = (package(*unseen)[1] - expected["forces"]).abs().max()
    package_ms = milliseconds(lambda: package(*unseen))
    print(f"package: forces off by {off:.1e}; eager takes {eager_ms / package_ms:.1f} times as long")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/forces.py FOLDER")
    main(Path(sys.argv[1]))
