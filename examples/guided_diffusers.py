"""python examples/guided_diffusers.py FILE.onnx: a classifier-guided diffusers model in one ONNX file.

The noise that a (tiny, random) UNet2DModel predicts, less the gradient of a classifier's log-probability: Dhariwal and
Nichol, arXiv 2105.05233, algorithm 2. The gradient is inside of the file, which onnxruntime runs by itself.
"""

import sys
import time
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import torch
from diffusers import DDPMScheduler, UNet2DModel
from torch import Tensor, nn

import dgfast

Guided = Callable[[Tensor, Tensor, Tensor], Tensor]


class Classifier(nn.Module):
    """Log-probabilities of four classes, of noisy images at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.SiLU())
        self.time = nn.Linear(1, 16)
        self.last = nn.Sequential(nn.Conv2d(16, 32, 3, 2, 1), nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.classes = nn.Linear(32, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        moved = self.first(x) + self.time(t[:, None] / 1000)[:, :, None, None]
        return self.classes(self.last(moved)).log_softmax(-1)


def guided(unet: nn.Module, classifier: nn.Module, alphas_cumprod: Tensor, scale: float = 3.0) -> Guided:
    """The guided noise [B, 1, H, W] of noisy images x [B, 1, H, W], times t [B] and class labels [B]."""

    def noise(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        chosen = classifier(x, t).gather(1, labels[:, None]).sum()
        (gradient,) = torch.autograd.grad(chosen, x)
        spread = (1 - alphas_cumprod[t]).sqrt()[:, None, None, None]
        return unet(x, t).sample - scale * spread * gradient

    return noise


def inputs(batch: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 1, 16, 16, generator=generator)
    return x, torch.randint(1000, (batch,), generator=generator), torch.randint(4, (batch,), generator=generator)


def milliseconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(20):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return 1000 * min(times)


def networks() -> tuple[nn.Module, nn.Module, Tensor]:
    """Network and classifier with random weights, and the noise schedule."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=4, attention_head_dim=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return unet.eval(), Classifier().eval(), DDPMScheduler().alphas_cumprod


def to_onnx(function: Guided, path: Path) -> None:
    """For any number of images."""
    report = dgfast.export_onnx(function, inputs(2, 0), path, dynamic=("x", "t", "labels"))
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {report.about['nodes']['Conv']} convolutions")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    x, t, labels = inputs(7, 1)
    (found,) = session.run(None, {"x": x.numpy(), "t": t.numpy(), "labels": labels.numpy()})
    expected = function(x, t, labels).detach()
    print(
        f"ONNX Runtime, 7 other images: off by {abs(found - expected.numpy()).max():.1e} of {expected.abs().max():.1f}"
    )


def compile(function: Guided) -> None:
    """For seven images."""
    compiled, unseen = dgfast.compile(function, inputs(7, 2)), inputs(7, 1)
    off = (compiled(*unseen) - function(*unseen)).abs().max()
    ratio = milliseconds(lambda: function(*unseen)) / milliseconds(lambda: compiled(*unseen))
    print(f"compiled: off by {off:.1e}; eager takes {ratio:.1f} times as long")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python examples/guided_diffusers.py FILE.onnx")
    guided_noise = guided(*networks())
    to_onnx(guided_noise, Path(sys.argv[1]))
    compile(guided_noise)
