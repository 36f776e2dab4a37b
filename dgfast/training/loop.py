"""The training loop that every network shares: Adam, warm-up and linear decay, averaged weights, exact resumption."""

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from dgfast.errors import UserError

_RECORDS = 200  # lines of metrics.jsonl in a whole run


@dataclass(frozen=True)
class Schedule:
    """How long and how fast to train.

    Attributes:
        images: training images to draw in all, with replacement.
        batch: images a step.
        lr: Adam's largest learning rate, reached after `warmup` of the run and falling linearly to 0.
        weight_decay: Adam's, as DG uses it.
        ema: decay of the averaged weights, which are the ones that are kept.
        seed: step k draws its batch and its noise from seed and k alone, so an interrupted run goes on exactly.
    """

    images: int
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.0
    warmup: float = 0.05
    ema: float = 0.999
    seed: int = 0

    @property
    def steps(self) -> int:
        return max(1, self.images // self.batch)

    def factor(self, step: int) -> float:
        """Learning rate at `step`, as a share of `lr`."""
        progress = step / self.steps
        return min((step + 1) / (self.warmup * self.steps + 1), (1 - progress) / (1 - self.warmup))


def fit(
    net: nn.Module, loss: Callable[[nn.Module, int], Tensor], schedule: Schedule, folder: Path, device: torch.device
) -> nn.Module:
    """Train `net` in place and return its averaged weights as a network in eval mode.

    `folder` gets `state.pt`, from which the same call goes on after an interruption, and `metrics.jsonl`.

    Args:
        loss: mean loss of one fresh batch of the given size; all randomness must come from torch's global generator.

    Raises:
        UserError: the folder holds a run of another schedule, or the loss is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    net.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # torch types one argument
    average = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(schedule.ema), use_buffers=True)
    # betas as EDM2 and the trial run: with the EMA on top, 0.999 would average twice.
    optimiser = torch.optim.Adam(
        net.parameters(), lr=schedule.lr, betas=(0.9, 0.99), weight_decay=schedule.weight_decay
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule.factor)
    parts = {"net": net, "average": average, "optimiser": optimiser, "scheduler": scheduler}
    done = _restore(folder / "state.pt", parts, schedule, device)

    step, recent, started = done, [], time.monotonic()
    interval = max(1, schedule.steps // _RECORDS)
    bar = tqdm(total=schedule.steps, initial=done, unit="step", desc=folder.name, dynamic_ncols=True)
    try:
        for step in range(done, schedule.steps):
            torch.manual_seed(schedule.seed * 1_000_003 + step)
            optimiser.zero_grad(set_to_none=True)
            value = loss(net, schedule.batch)
            value.backward()
            optimiser.step()
            scheduler.step()
            average.update_parameters(net)
            recent.append(value.detach())
            bar.update()
            if (step + 1) % interval == 0 or step + 1 == schedule.steps:
                mean = float(torch.stack(recent).mean())
                if not torch.isfinite(torch.tensor(mean)):
                    raise UserError(
                        f"{folder.name}: loss is {mean} at step {step}; the state before it is kept in {folder}: "
                        "to start anew, remove it and lower --lr"
                    )
                recent.clear()
                bar.set_postfix(loss=f"{mean:.4f}")
                _record(folder / "metrics.jsonl", step=step + 1, loss=mean, seconds=time.monotonic() - started)
                _save(folder / "state.pt", parts, schedule, step + 1)
    except KeyboardInterrupt:
        # The step under way is lost, the last record is not; every record holds a whole state.
        raise UserError(f"{folder.name}: interrupted at step {step}; the same command goes on from {folder}") from None
    finally:
        bar.close()
    return average.module.eval().requires_grad_(False)


def _save(path: Path, parts: dict[str, Any], schedule: Schedule, step: int) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    partial = path.with_suffix(".partial")
    torch.save({"step": step, "schedule": asdict(schedule), **state}, partial)
    os.replace(partial, path)


def _restore(path: Path, parts: dict[str, Any], schedule: Schedule, device: torch.device) -> int:
    """Load the state at `path`, if there is one, into `parts`; the number of steps it has behind it."""
    if not path.exists():
        return 0
    state = torch.load(path, map_location=device, weights_only=True)
    if state["schedule"] != asdict(schedule):
        changed = [name for name, value in asdict(schedule).items() if state["schedule"].get(name) != value]
        raise UserError(f"{path} belongs to a run with another {', '.join(changed)}; remove it to start anew")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return int(state["step"])


def _record(path: Path, **numbers: float) -> None:
    with path.open("a") as file:
        file.write(json.dumps(numbers) + "\n")
