"""The training loop that every network shares: Adam, warm-up and linear decay, averaged weights, exact resumption."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dgfast.devices import DTYPES
from dgfast.errors import UserError
from dgfast.training.averaging import averaged
from dgfast.training.early_stopping import Best, EarlyStopping

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
        ema_rel: relative width of EDM2's power-function average, which takes the place of `ema`; None: `ema` it is.
        seed: step k draws its batch and its noise from seed and k alone, so an interrupted run goes on exactly.
        dtype: of `devices.DTYPES`; bf16 rounds what convolutions and matrix products read. Weights, their average,
            normalisations and Adam stay in float32 (torch's autocast).
    """

    images: int
    batch: int = 128
    lr: float = 2e-3
    weight_decay: float = 0.0
    warmup: float = 0.05
    ema: float = 0.999
    ema_rel: float | None = None
    seed: int = 0
    dtype: str = "float32"

    @property
    def steps(self) -> int:
        return max(1, self.images // self.batch)

    def factor(self, step: int) -> float:
        """Learning rate at `step`, as a share of `lr`."""
        progress = step / self.steps
        return min((step + 1) / (self.warmup * self.steps + 1), (1 - progress) / (1 - self.warmup))


Loss = Callable[[nn.Module, int], Tensor]
"""(net, batch) -> mean loss of one fresh batch of that size; all randomness from torch's global generator."""


@dataclass(frozen=True)
class Player:
    """One of the networks that are trained together, step by step in turn.

    Attributes:
        loss: what it lowers; it may read the other players' networks, which stand still meanwhile.
        betas: Adam's. rate: learning rate, as a share of the schedule's. start: steps for which it stands still first.
        penalty: added to the loss at every `penalty_every`th step, the first included.
    """

    net: nn.Module
    loss: Loss
    # As EDM2 and the trial run: with the EMA on top, 0.999 would average twice.
    betas: tuple[float, float] = (0.9, 0.99)
    rate: float = 1.0
    start: int = 0
    penalty: Loss | None = None
    penalty_every: int = 1


def fit(net: nn.Module, loss: Loss, schedule: Schedule, folder: Path, device: torch.device) -> nn.Module:
    """`fit_together` for one network."""
    return fit_together([Player(net, loss)], schedule, folder, device)[0]


def fit_together(
    players: Sequence[Player],
    schedule: Schedule,
    folder: Path,
    device: torch.device,
    watch: Callable[[Sequence[nn.Module]], None] | None = None,
    recipe: Mapping[str, Any] | None = None,
    stopping: EarlyStopping | None = None,
) -> list[nn.Module]:
    """Train the players' networks in place and return their averaged weights as networks in eval mode.

    `folder` gets `state.pt`, from which the same call goes on after an interruption, and `metrics.jsonl`.

    Args:
        watch: called with the averaged networks whenever the state is saved.
        recipe: what else makes this run another than one in the same folder, by name.
        stopping: judges the first player's average; the best one is returned, and the run may end before its time.

    Raises:
        UserError: the folder holds a run of another schedule, recipe or network, or one whose state is damaged; a loss
            or a weight is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    nets = nn.ModuleList(player.net for player in players)
    nets.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # torch types one argument
    average = averaged(nets, schedule.ema, schedule.ema_rel)
    # One Adam holds all players: its state is each parameter's own, and who is not on turn has no gradient.
    optimiser = torch.optim.Adam(
        [{"params": p.net.parameters(), "betas": p.betas, "lr": p.rate * schedule.lr} for p in players],
        weight_decay=schedule.weight_decay,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule.factor)
    best = Best(stopping)
    parts = {"net": nets, "average": average, "optimiser": optimiser, "scheduler": scheduler}
    parts |= {"best": best} if stopping else {}
    settings = asdict(schedule) | dict(recipe or {})
    done = _restore(folder / "state.pt", parts, settings, device)

    step, recent, started = done, [], time.monotonic()
    interval = max(1, schedule.steps // _RECORDS)
    if stopping:  # every check is a record
        interval = max(1, schedule.steps // stopping.checks // max(1, _RECORDS // stopping.checks))
    bar = tqdm(total=schedule.steps, initial=done, unit="step", desc=folder.name, dynamic_ncols=True)
    try:
        for step in range(done, schedule.steps):
            if best.settled:
                break
            torch.manual_seed(schedule.seed * 1_000_003 + step)
            recent.append(torch.stack([_turn(player, nets, optimiser, schedule, step) for player in players]))
            scheduler.step()
            average.update_parameters(nets)
            bar.update()
            if (step + 1) % interval == 0 or step + 1 == schedule.steps:
                losses = _checked(torch.stack(recent), nets, step, folder)
                recent.clear()
                bar.set_postfix(loss=" ".join(f"{loss:.4f}" for loss in losses))
                found = {"loss": losses[0]} if len(losses) == 1 else {f"loss_{k}": x for k, x in enumerate(losses)}
                found |= best.see(average.module, step + 1, schedule.steps)
                _record(folder / "metrics.jsonl", step=step + 1, **found, seconds=time.monotonic() - started)
                _save(folder / "state.pt", parts, settings, step + 1)
                if watch is not None:
                    watch(list(average.module.eval().children()))
    except KeyboardInterrupt:
        # The step under way is lost, the last record is not; every record holds a whole state.
        raise UserError(f"{folder.name}: interrupted at step {step}; the same command goes on from {folder}") from None
    finally:
        bar.close()
    best.restore(average.module)
    return list(average.module.eval().requires_grad_(False).children())


def _turn(
    player: Player, nets: nn.ModuleList, optimiser: torch.optim.Optimizer, schedule: Schedule, step: int
) -> Tensor:
    """One player's step; its loss without the penalty, 0 if it stands still."""
    device = next(nets.parameters()).device
    if step < player.start:
        return torch.zeros((), device=device)
    nets.requires_grad_(False)
    player.net.requires_grad_(True)
    optimiser.zero_grad(set_to_none=True)
    with torch.autocast(device.type, DTYPES[schedule.dtype], enabled=schedule.dtype != "float32"):
        value = player.loss(player.net, schedule.batch)
        whole = value
        if player.penalty is not None and step % player.penalty_every == 0:
            whole = value + player.penalty(player.net, schedule.batch)
    whole.backward()
    optimiser.step()
    return value.detach()


def _checked(losses: Tensor, nets: nn.Module, step: int, folder: Path) -> list[float]:
    """Mean of each player's losses [steps, players] up to `step`, if they and the weights they led to are finite."""
    bad = (~losses.isfinite()).any(1).nonzero()
    if len(bad):
        at = int(bad[0])
        found = f"loss is {float(losses[at].sum())} at step {step + 1 - len(losses) + at}"
    elif not all(bool(parameter.isfinite().all()) for parameter in nets.parameters()):
        found = f"a weight is NaN or infinite after step {step}"
    else:
        return losses.mean(0).tolist()
    raise UserError(
        f"{folder.name}: {found}; the state before it is kept in {folder}: to start anew, remove it and lower --lr"
    )


def _save(path: Path, parts: dict[str, Any], settings: dict[str, Any], step: int) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    partial = path.with_suffix(".partial")
    torch.save({"step": step, "schedule": settings, **state}, partial)
    os.replace(partial, path)


def _restore(path: Path, parts: dict[str, Any], settings: dict[str, Any], device: torch.device) -> int:
    """Load the state at `path`, if there is one, into `parts`; the number of steps it has behind it.

    Raises:
        UserError: it is no whole state, or one of other settings or of other networks.
    """
    if not path.exists():
        return 0
    older = {field.name: field.default for field in fields(Schedule)}  # what a state says nothing of, being older
    try:
        state = torch.load(path, map_location=device, weights_only=True)
        before = older | state["schedule"]
        changed = [name for name, value in settings.items() if before.get(name) != value]
        if changed:
            raise UserError(f"{path} belongs to a run with another {', '.join(changed)}; remove it to start anew")
        for name, part in parts.items():
            part.load_state_dict(state[name])
        return int(state["step"])
    except UserError:
        raise
    except Exception as error:  # torch does not say what a torn file makes it raise
        reason = (str(error).splitlines() or [""])[0]
        raise UserError(
            f"{path} is not the whole state of a training of this network ({type(error).__name__}: {reason}); "
            "remove it to start anew"
        ) from error


def _record(path: Path, **numbers: float) -> None:
    with path.open("a") as file:
        file.write(json.dumps(numbers) + "\n")
