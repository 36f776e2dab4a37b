"""What a guidance says of itself, once: its formula, its options, the networks that it needs, how it is made.

Command lines, `GuidanceConfig`, bundles, the loading of networks, the plan, exported files and the table in
docs/guidance.md read it here. A class of your own that derives from `Guidance` is in all of them from then on.

`--help` reads it too, without torch, which takes seconds to import. So the files of the guidances import torch inside
of the functions that call it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, make_dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar

from dgfast.errors import UserError
from dgfast.guidance.options import Option, declared

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dgfast.config import GuidanceConfig
    from dgfast.networks import Networks

T = TypeVar("T")
GUIDANCES: list[type[Guidance]] = []
"""All that are declared: the order of their sections in `--help`, of their inputs in a file, and of what they add."""


class Guidance(ABC):
    """One correction of the denoised image, and its declaration.

    Attributes:
        Options: a frozen dataclass of `option`s, first the one that turns it on; while it is off, the others are
            refused, see `require_on`. Without `Options` it is no part of command lines and files.
        name: in errors and in docs/guidance.md, beside `cost`, of a call, and `use`. formula: in `--help`.
        roles: the networks that it needs, first the one that it is named after.
        evaluations, gradients, backwards: forwards of a denoiser, forwards with input gradient of another network, and
            backward passes through the score network, that one call costs on top of the denoiser's own forward.
            With a gradient it is one toward a log-density, whose gate is weight x `denoiser_gate`; the ancestral form
            puts the step's variance in that one's place. With a backward pass, `correct` gets an x that requires a
            gradient and a `denoised` that was made of it. With neither, it mixes denoisers. The last two correct the
            denoised image whatever the solver. Properties, where they depend on how a guidance was made.
        mixes_velocities: it mixes what its networks predict, so that it mixes velocities as well, see
            `guidance.velocity`; its fields are the networks.
    """

    Options: ClassVar[type | None] = None
    name: ClassVar[str] = ""
    formula: ClassVar[str] = ""
    cost: ClassVar[str] = ""
    use: ClassVar[str] = ""
    roles: ClassVar[tuple[str, ...]] = ()
    evaluations: ClassVar[int] = 0
    mixes_velocities: ClassVar[bool] = False
    config: ClassVar[type | None] = None

    levels: Sequence[float] = ()
    """Of the plan, of a guidance that goes by its steps: another plan needs another exported file. See `along`."""
    second: bool = False
    """Of such a guidance: it is one of the solver's second point."""

    @property
    def gradients(self) -> int:
        return 0

    @property
    def backwards(self) -> int:
        return 0

    def __init_subclass__(cls) -> None:
        if "Options" in vars(cls):
            _declare(cls)
            if Guidance.config is not None:
                _grow(Guidance.config, cls.Options)

    @abstractmethod
    def active(self, sigma_low: float, sigma_high: float) -> bool:
        """Whether it corrects anything at all between two noise levels; where not, it need not be called."""

    @abstractmethod
    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add gate x direction to `denoised`: direction [B, C, H, W] and gate [B]; and the log-ratio [B] if it has one.

        Arguments as for the function that `guided_denoiser` returns. Pure: no host synchronisation and no branch on
        the value of a tensor, so that it can be traced, compiled and exported.
        """

    @classmethod  # noqa: B027 - most have nothing to refuse
    def check(cls, config: GuidanceConfig) -> None:
        """Raises UserError for options that contradict one another; each by itself is fine."""

    @classmethod
    def make(cls, networks: Networks, config: GuidanceConfig) -> Self:
        """The guidance at the solver's first point.

        Raises:
            UserError: a network that is missing or does not fit.
        """
        raise TypeError(f"{cls.__name__} declares no options that it could be made of")

    @classmethod
    def classes(cls, networks: Networks, config: GuidanceConfig) -> int:
        """Number of classes among which a label chooses for this guidance alone; 0 where it looks at no label."""
        return 0

    @classmethod
    @cache
    def options(cls) -> tuple[Option, ...]:
        """What its `Options` say, in their order."""
        if cls.Options is None:
            return ()
        return declared(cls.Options)

    @classmethod
    def weights(cls, second: bool = False) -> dict[str, Option]:
        """The options that are its weights at the solver's first or second point, by its attributes."""
        of_point = sorted(cls.options(), key=lambda one: one.second)  # what holds at the second point comes last
        return {one.attribute: one for one in of_point if one.attribute and (second or not one.second)}

    @classmethod
    def switches(cls) -> list[str]:
        """The options that turn it on: the first one, and what else is a weight at the solver's first point."""
        return [one.name for one in (*cls.options()[:1], *cls.weights().values())]

    @classmethod
    def on(cls, config: GuidanceConfig, second: bool = False) -> bool:
        """Whether a weight of that point is other than off."""
        return any(getattr(config, one.name) not in (one.default, one.off) for one in cls.weights(second).values())

    def at_second_point(self, config: GuidanceConfig) -> Self:
        """The same guidance with the weights of the solver's second point."""
        changes = {key: getattr(config, one.name) for key, one in self.weights(second=True).items() if one.second}
        return replace(self, **changes) if changes else self  # type: ignore[type-var]

    def fitted(self, shape: Sequence[int], device: torch.device) -> Self:
        """The same guidance for images of this shape, [C, H, W], on this device; most take any.

        Raises:
            UserError: it does not fit them.
        """
        return self

    def images(self) -> dict[str, Tensor]:
        """What of it is images [1 or B, C, H, W], each by the name that it has as an input of an exported file."""
        return {}

    def with_images(self, given: Mapping[str, Tensor]) -> Self:
        """The same guidance with those of `given` that have the names of its `images` in their place."""
        return self

    def along(self, levels: Sequence[float], second: bool = False) -> Self:
        """The same guidance for a plan of these noise levels, highest first and 0 last; most act alike on every plan.

        Args:
            second: for the calls at the solver's second point, where a step from one level to the next one ends.
        """
        return self

    @property
    def remembers(self) -> bool:
        """Whether it keeps something from call to call: in a function of `memory.remembering`, its `memory`."""
        return False

    @property
    def needs_plain_steps(self) -> str:
        """The option by which it has a meaning only where each step follows the denoised images of its own."""
        return ""

    @classmethod
    def needed(cls, network: T | None, role: str) -> T:
        """The network of that role.

        Raises:
            UserError: there is none.
        """
        if network is None:
            raise UserError(f"{cls.name} needs a {role} network, which this bundle does not have")
        return network


class Repair(Guidance):
    """What mends denoised images that guidances have mixed, such as colours that a large scale has burnt.

    Repairs come after all guidances that mix, in the order of their declaration, for they do not commute; before
    `clip_denoised` and before the guidances by gradients. One of what mixing does to an image, and not of any image
    like `DynamicThreshold`, returns `plain` as it is where nothing was mixed in.
    """

    @abstractmethod
    def repaired(self, x: Tensor, sigma: Tensor, mixed: Tensor, plain: Tensor) -> Tensor:
        """The images [B, C, H, W] in the place of `mixed`; `plain` are those before any guidance. Pure."""

    def correct(
        self, x: Tensor, sigma: Tensor, class_labels: Tensor | None, denoised: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        raise TypeError(f"{type(self).__name__} is a repair: it corrects nothing by itself")


def _declare(guidance: type[Guidance]) -> None:
    """Enter a guidance into the list; one that is declared again, as when a notebook's cell is run anew, once.

    Raises:
        UserError: an option that another guidance has, and is not the same; or a field that is no option.
    """
    own = {f.name: (f.default, dict(f.metadata)) for f in fields(guidance.Options)}  # type: ignore[arg-type]
    plain = next((name for name, (_, metadata) in own.items() if "attribute" not in metadata), None)
    if plain is not None:
        raise UserError(f"{guidance.__name__}.Options: {plain} is made by no `option`")
    names = [(one.__module__, one.__qualname__) for one in GUIDANCES]
    at = names.index(name) if (name := (guidance.__module__, guidance.__qualname__)) in names else None
    for other in (one for i, one in enumerate(GUIDANCES) if i != at):
        for f in fields(other.Options):  # type: ignore[arg-type]
            if f.name in own and own[f.name] != (f.default, dict(f.metadata)):
                raise UserError(f"{guidance.__name__}.Options: {other.__name__} has an option {f.name} of its own")
    GUIDANCES[slice(len(GUIDANCES), None) if at is None else slice(at, at + 1)] = [guidance]


def configure(record: type) -> None:
    """Let `record` have the options of all guidances, of those declared before it and of those to come."""
    Guidance.config = record
    for guidance in GUIDANCES:
        if not {one.name for one in guidance.options()} <= {one.name for one in fields(record)}:
            _grow(record, guidance.Options)


def guiding(config: GuidanceConfig) -> Iterator[type[Guidance]]:
    """The guidances that act at one of the solver's points."""
    return (guidance for guidance in GUIDANCES if guidance.on(config) or guidance.on(config, second=True))


def overridden(config: GuidanceConfig, given: Mapping[str, Any]) -> GuidanceConfig:
    """The guidance of a bundle with the options that a command line gives, by name.

    What the bundle has for a guidance that the command line turns off goes with it.

    Raises:
        UserError: options that contradict one another, or one of a guidance that is off.
    """
    merged: Any = SimpleNamespace(**{one.name: given.get(one.name, getattr(config, one.name)) for one in all_options()})
    acting, acted = {*guiding(merged)}, {*guiding(config)}
    taken = {one.name for guidance in acting for one in guidance.options()}
    gone = {one.name: one.default for guidance in acted - acting for one in guidance.options()}
    changed = replace(config, **{name: value for name, value in gone.items() if name not in taken} | dict(given))
    require_on(changed, given)
    return changed


def require_on(config: GuidanceConfig, names: Collection[str]) -> None:
    """Raises UserError for one of these options if its guidance is off; a weight may say so itself."""
    acting = {*guiding(config)}
    for one in (one for one in all_options() if one.name in names):
        owners = [kind for kind in GUIDANCES if one in kind.options() and {*kind.switches()} - {one.name}]
        says_off = one.attribute and getattr(config, one.name) == one.off
        if owners and not says_off and acting.isdisjoint(owners):
            switches = [next(name for name in owner.switches() if name != one.name) for owner in owners]
            which = f", which turns {owners[0].name} on" if len(owners) == 1 else ""
            raise UserError(f"{one.name} does nothing without {' or '.join(switches)}{which}")


def all_options() -> Iterator[Option]:
    """The options of all guidances, each once."""
    return iter({one.name: one for guidance in GUIDANCES for one in guidance.options()}.values())


def off_values() -> Mapping[str, float]:
    """The value of each input that guides nothing."""
    return {one.input: one.off for one in all_options() if one.attribute}


def _grow(record: type, options: Any) -> None:
    """Give a frozen dataclass the fields of another one too."""
    grown = make_dataclass(record.__name__, (), bases=(options, record), frozen=True)
    for name in ("__init__", "__dataclass_fields__", "__match_args__", "__repr__", "__eq__", "__hash__"):
        setattr(record, name, vars(grown)[name])
    for own in fields(options):
        setattr(record, own.name, own.default)
