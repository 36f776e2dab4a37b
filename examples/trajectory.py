"""python examples/trajectory.py PICTURE: how images come about, a row a seed, a column every second step.

Each image is what the guided denoiser makes of the noisy one; the last column is the finished image. It also prints
the discriminator's log-ratio, which says above 0 that an image looks real at that noise level.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import dgfast
from dgfast.guidance import OUTSIDE_WINDOW
from dgfast.plan import Step

SEEDS = range(6)
EVERY = 2


def main(picture: Path) -> None:
    sampler = dgfast.Sampler(dgfast.load("mnist32"), guidance=dgfast.GuidanceConfig(dg_weight=1.0))
    columns: list[np.ndarray] = []

    def on_step(step: Step, x: torch.Tensor, denoised: torch.Tensor, log_ratio: torch.Tensor) -> None:
        judged = f"{log_ratio.mean():.2f}" if log_ratio.max() < OUTSIDE_WINDOW else "not asked here"
        print(f"step {step.index:2}  sigma {step.sigma:8.3f}  mean log-ratio {judged}")
        if step.index % EVERY == 0:
            columns.append(dgfast.to_uint8(denoised))

    columns.append(dgfast.to_uint8(sampler(SEEDS, on_step=on_step)))
    sheet = np.concatenate([np.concatenate(column) for column in columns], axis=1)
    Image.fromarray(sheet.squeeze(-1)).resize((3 * sheet.shape[1], 3 * sheet.shape[0]), 0).save(picture)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/trajectory.py PICTURE.png")
    main(Path(sys.argv[1]))
