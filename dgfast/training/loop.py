"""The training loop that every network shares: Adam, warm-up and linear decay, averaged weights, exact resumption."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn
from tqdm import tqdm

from dgfast.devices import DTYPES
from dgfast.errors import StoppedError, StorageError, TerminatedError, UserError, one_line
from dgfast.files import replacing
from dgfast.progress import say
from dgfast.stopping import Terminated
from dgfast.training.averaging import averaged
from dgfast.training.early_stopping import Best, EarlyStopping
from dgfast.training.schedule import Schedule as Schedule

_RECORDS = 200  # lines of metrics.jsonl in a whole run


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
        UserError: the folder holds a run of another schedule, recipe or network, one whose state is damaged, or one
            that is at work; a loss or a weight is not finite. StorageError: the folder cannot be written.
        StoppedError: by Ctrl-C or SIGTERM.
    """
    run = _Run(list(players), schedule, folder, device, stopping, dict(recipe or {}))
    with _alone(folder):
        done = run.restore()
        bar = tqdm(total=schedule.steps, initial=done, unit="step", desc=folder.name, dynamic_ncols=True)
        step, started = done, time.monotonic()
        try:
            for step in range(done, schedule.steps):
                if run.best.settled:
                    break
                run.take(step)
                bar.update()
                if run.is_record(step + 1):
                    losses = run.record(step + 1, time.monotonic() - started)
                    bar.set_postfix(loss=" ".join(f"{loss:.4f}" for loss in losses))
                    if watch is not None:
                        watch(run.averages())
        except KeyboardInterrupt as stop:
            # The step under way is lost, the last record is not; every record holds a whole state.
            goes_on = f"the same command goes on from {folder}" if run.saved else "nothing was saved yet"
            kind = TerminatedError if isinstance(stop, Terminated) else StoppedError
            raise kind(f"{folder.name}: interrupted at step {step}; {goes_on}") from None
        finally:
            bar.close()
    if kept := run.best.told(bar.n, schedule.steps):
        say(f"{folder.name}: {kept}", error=True)
    run.best.restore(run.average.module)
    return [net.requires_grad_(False) for net in run.averages()]


class _Run:
    """The networks that are trained, what belongs to them, and how they are kept."""

    def __init__(
        self, players: Sequence[Player], schedule: Schedule, folder: Path, device: torch.device,
        stopping: EarlyStopping | None, recipe: dict[str, Any],
    ) -> None:  # fmt: skip
        self.players, self.schedule, self.folder, self.device = players, schedule, folder, device
        self.nets = nn.ModuleList(player.net for player in players)
        self.nets.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]  # torch types one argument
        self.average = averaged(self.nets, schedule.ema, schedule.ema_rel)
        # One Adam holds all players: its state is each parameter's own, and who is not on turn has no gradient.
        self.optimiser = torch.optim.Adam(
            [{"params": p.net.parameters(), "betas": p.betas, "lr": p.rate * schedule.lr} for p in players],
            weight_decay=schedule.weight_decay,
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimiser, schedule.factor)
        self.best = Best(stopping)
        self.saved = False
        self._settings = asdict(schedule) | recipe
        self._parts = {"net": self.nets, "average": self.average} | (
            {"optimiser": self.optimiser, "scheduler": self.scheduler} | ({"best": self.best} if stopping else {})
        )
        self._recent: list[Tensor] = []
        self._interval = max(1, schedule.steps // _RECORDS)
        if stopping:  # every check is a record
            self._interval = max(1, schedule.steps // stopping.checks // max(1, _RECORDS // stopping.checks))

    def restore(self) -> int:
        """How many steps lie behind the state that was kept, which the run goes on from."""
        done = _restore(self.folder / "state.pt", self._parts, self._settings, self.device)
        self.saved = done > 0
        return done

    def take(self, step: int) -> None:
        """One turn of each player."""
        torch.manual_seed(self.schedule.seed * 1_000_003 + step)
        turns = [_turn(player, self.nets, self.optimiser, self.schedule, step) for player in self.players]
        self._recent.append(torch.stack(turns))
        self.scheduler.step()
        self.average.update_parameters(self.nets)

    def is_record(self, steps: int) -> bool:
        return steps % self._interval == 0 or steps == self.schedule.steps

    def record(self, steps: int, seconds: float) -> list[float]:
        """Look whether all is well after so many steps, judge, and keep the state; the losses since the last record."""
        losses = _checked(torch.stack(self._recent), self.nets, steps - 1, self.folder, self.saved)
        self._recent.clear()
        numbers = {"loss": losses[0]} if len(losses) == 1 else {f"loss_{k}": x for k, x in enumerate(losses)}
        numbers |= self.best.see(self.average.module, steps, self.schedule.steps)
        with _storage(self.folder):
            _save(self.folder / "state.pt", self._parts, self._settings, steps)
            _record(self.folder / "metrics.jsonl", step=steps, **numbers, seconds=seconds)
        self.saved = True
        return losses

    def averages(self) -> list[nn.Module]:
        return list(self.average.module.eval().children())


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Makes the folder, and lets no other training into it.

    Raises:
        UserError: another one is in it. StorageError: it cannot be written.
    """
    lock = FileLock(folder / ".lock")
    with _storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"{folder}: another training is at work there; wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _storage(folder: Path) -> Iterator[None]:
    """Makes a `StorageError`, which names the folder, of what the operating system or torch's writer raises."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise StorageError(
            f"{folder} cannot be written ({one_line(error)}); the last whole state in it, if any, is kept: the same "
            "command goes on"
        ) from error


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


def _checked(losses: Tensor, nets: nn.Module, step: int, folder: Path, saved: bool) -> list[float]:
    """Mean of each player's losses [steps, players] up to `step`, if they and the weights they led to are finite.

    Args:
        saved: whether a state from before is kept, for the message.
    """
    bad = (~losses.isfinite()).any(1).nonzero()
    if len(bad):
        at = int(bad[0])
        trouble = f"loss is {float(losses[at].sum())} at step {step + 1 - len(losses) + at}"
    elif not all(bool(parameter.isfinite().all()) for parameter in nets.parameters()):
        trouble = f"a weight is NaN or infinite after step {step}"
    else:
        return losses.mean(0).tolist()
    kept = f"the state before it is kept in {folder}: to start anew, remove it and" if saved else "nothing was kept:"
    raise UserError(f"{folder.name}: {trouble}; {kept} lower --lr, if the data are in order")


def _save(path: Path, parts: dict[str, Any], settings: dict[str, Any], step: int) -> None:
    state = {name: part.state_dict() for name, part in parts.items()}
    with replacing(path) as file:
        torch.save({"step": step, "schedule": settings, **state}, file)


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
        changed = [name for name, value in settings.items() if before.get(name, value) != value]
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
