"""python examples/observe.py inpainting|super-resolution|blur PICTURE [METHOD [WEIGHT]]: digits that agree with y.

Each row is a digit, what is known of it, and four digits that a sampler draws from that. The operators are plain
functions: anything linear that keeps the samples of a batch apart will do. SDA costs the least and serves a mask;
where the operator mixes pixels, MMPS comes closer to what is known, for a backward pass an iteration.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

import dgfast
from dgfast.guidance import ObservationGuidance

ROWS, DRAWS, STD = 4, 4, 0.05


def lower_half(images: Tensor) -> Tensor:
    return images[:, :, 16:]


def coarse(images: Tensor) -> Tensor:
    return F.avg_pool2d(images, 4)


def blurred(images: Tensor) -> Tensor:
    taps = torch.exp(-0.5 * torch.linspace(-3, 3, 13).square()).to(images)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    return F.conv2d(images, kernel[None, None], padding=6)


def shown(y: Tensor) -> Tensor:
    """An observation as large as a digit: what is missing is gray."""
    return F.pad(y, (0, 0, 32 - y.shape[2], 0)) if y.shape[3] == 32 else F.interpolate(y, scale_factor=4.0)


OPERATORS: dict[str, Callable[[Tensor], Tensor]] = {
    "inpainting": lower_half, "super-resolution": coarse, "blur": blurred,
}  # fmt: skip


def main(problem: str, picture: Path, method: str = "", weight: str = "1") -> None:
    networks, operator = dgfast.load("mnist32"), OPERATORS[problem]
    labels = torch.tensor([2, 3, 5, 8])
    digits = dgfast.Sampler(networks, guidance=dgfast.GuidanceConfig(autoguidance=1.5))(range(ROWS), labels)
    y = operator(digits)
    y = y + STD * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))

    method = method or ("sda" if problem == "inpainting" else "mmps")
    iterations = 2 if method == "mmps" else 1
    guidance = ObservationGuidance(  # of one observation a sample
        operator, y.repeat_interleave(DRAWS, 0), STD, float(weight), method=method, iterations=iterations
    )
    sampler = dgfast.Sampler(networks, guidance=[guidance])
    drawn = sampler(range(100, 100 + ROWS * DRAWS), labels.repeat_interleave(DRAWS))
    error = (operator(drawn) - guidance.observation).square().mean().sqrt()
    print(f"{sampler.score_evaluations} forwards and {sampler.score_backwards} backward passes of the score network")
    print(f"the digits differ from what is known by {error:.3f}, noise of {STD}")

    columns = [digits, shown(y), *drawn.view(ROWS, DRAWS, *drawn.shape[1:]).unbind(1)]
    sheet = np.concatenate([np.concatenate(dgfast.to_uint8(column)) for column in columns], axis=1)
    Image.fromarray(sheet.squeeze(-1)).resize((3 * sheet.shape[1], 3 * sheet.shape[0]), 0).save(picture)


if __name__ == "__main__":
    if len(sys.argv) not in (3, 4, 5) or sys.argv[1] not in OPERATORS:
        sys.exit(f"usage: python examples/observe.py {'|'.join(OPERATORS)} PICTURE.png [METHOD [WEIGHT]]")
    main(sys.argv[1], Path(sys.argv[2]), *sys.argv[3:])
