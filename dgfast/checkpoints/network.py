"""From a file to a network with its weights, and to what is told of both."""

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from dgfast import nets, weights
from dgfast.checkpoints import DENOISERS, ENCODERS, dit, edm2, nvidia_pickle, one_line, openai_pt, phema
from dgfast.checkpoints.account import Assumed, listed
from dgfast.checkpoints.foreign import file_format, require_own_names
from dgfast.checkpoints.wrappers import StateDict
from dgfast.denoiser import PRECONDITIONERS
from dgfast.errors import UserError
from dgfast.latents import VaeSpec

_ENCODER_KINDS = ("EncoderUNetModel", "create_classifier")
_FORMATS = {"snapshot": "snapshot of NVIDIA's", "safetensors": "safetensors", "torch": "file of torch.save"}
_UNSEEN = {"num_heads", "num_head_channels", "use_new_attention_order"}  # raw networks' that change no tensor's shape


_OTHERS = {"noise_schedule": "cosine", "path": "gvp", "prediction": "noise"}  # what else a keyword may be


@dataclass(frozen=True)
class Converted:
    """A network with its weights, and `nets.build`'s arguments for another.

    Attributes:
        read: facts about the file, by what they are about. assumed: what it does not say.
        sampling: what it says of how its authors sample, as `SamplingConfig` has it.
        vae: what decodes its images, where the file says that they are latents.
    """

    net: nn.Module
    kind: str
    keywords: dict[str, Any]
    read: dict[str, str]
    assumed: list[Assumed] = field(default_factory=list)
    sampling: Mapping[str, Any] = field(default_factory=dict)
    vae: VaeSpec | None = None


def read(file: Path, role: str, kind: str | None, told: Mapping[str, Any], key: str | None) -> Converted:
    """The network in a file.

    Args:
        kind, told: see `nets.build`; None and nothing: as the file says, or its tensors' shapes.
        key: the part of the file, see `wrappers.unwrap`.

    Raises:
        UserError: unreadable, unsuited to the role, not finite, or of another shape than its keywords say.
    """
    form, told_kind = file_format(file), kind
    if form == "snapshot":
        return _of_snapshot(nvidia_pickle.read(file), role, file)
    state = openai_pt.read(file, key)
    own, repa = dit.without_training_parts(state.tensors)
    left_out = (*state.left_out, *(["the projectors of its training"] if repa else []))
    state = replace(state, tensors=own, left_out=left_out)
    kind, keywords, assumed = _recognised(own, role, kind, told, repa, file)
    _require_kind(kind, role)
    try:
        net = weights.build(kind, keywords, _as_in_a_bundle(state.tensors, kind), file)
    except UserError as error:
        raise UserError(f"{error.message}; mend its keywords with --set") if told_kind else error from error
    _require_honest(state.tensors, kind, keywords, file)
    told_too = {name: value for name, value in keywords.items() if name in told}
    assumed_too = {entry.name for entry in assumed}
    seen = {name: value for name, value in keywords.items() if name not in told and name not in assumed_too}
    facts = {
        "file": _about(file, form, state, kind),
        "tensors": counted(state.tensors),
        "by shapes": listed(seen),
        "told": listed(told_too),
    }
    return Converted(net, kind, keywords, facts, assumed)


def average(files: Sequence[Path], role: str, std: float, kimg: int | None) -> tuple[Converted, str]:
    """An average over training that EDM2's snapshots make together, see `phema.reconstruct`, and how it was made.

    Raises:
        UserError: as `read` and `phema.reconstruct`.
    """
    snapshot, last, made = phema.reconstruct(files, std, kimg)
    converted = _of_snapshot(snapshot, role, last)
    return replace(converted, read={"average": made, **converted.read}), made


def _of_snapshot(snapshot: nvidia_pickle.Snapshot, role: str, file: Path) -> Converted:
    """The network of a snapshot, which says itself what it is."""
    kind, keywords, tensors, vae = snapshot.kind, snapshot.keywords, snapshot.tensors, snapshot.vae
    _require_kind(kind, role)
    net = weights.build(kind, keywords, tensors, file)
    _require_honest(tensors, kind, keywords, file)
    facts = {
        "file": _about(file, "snapshot", StateDict(tensors), kind),
        "tensors": counted(tensors),
        "in the file": listed(keywords),
        "encoder": snapshot.encoder + (f" with {vae.source}, a scale and bias a channel" if vae else ""),
    }
    return Converted(net, kind, keywords, facts, vae=vae)


def _require_kind(kind: str, role: str) -> None:
    """Raises UserError for a network that cannot have the role."""
    kinds = tuple(PRECONDITIONERS) if role in DENOISERS else _ENCODER_KINDS
    if kind not in kinds:
        raise UserError(f"a {role} network cannot be of the kind {kind!r}; use {', '.join(kinds)}")


def _require_honest(tensors: Mapping[str, Tensor], kind: str, keywords: Mapping[str, Any], file: Path) -> None:
    """Raises UserError for weights that are not finite, and for others than the file's name says."""
    require_finite(tensors, file)
    edm2.require_own_size(file, kind, keywords)


def _recognised(
    tensors: Mapping[str, Tensor], role: str, kind: str | None, told: Mapping[str, Any], repa: bool, file: Path
) -> tuple[str, dict[str, Any], list[Assumed]]:
    """The kind of network that has these tensors, its keywords, and which of them are assumed."""
    require_own_names(tensors, file)
    _require_role(tensors, role, file)
    if role not in DENOISERS and kind in (None, "create_classifier"):
        return "create_classifier", openai_pt.classifier_keywords(tensors, told, file), []
    if role not in DENOISERS:
        assert kind is not None
        return kind, dict(told), _defaults(kind, told)
    if openai_pt.is_upsampler(tensors) and told.get("img_channels") != 6:
        raise UserError(
            f"{file} is an upsampler of guided-diffusion: it also reads an image of lower resolution, which dgfast "
            "does not draw from"
        )
    if kind in (None, "EDM2Precond") and edm2.is_edm2(tensors):
        keywords = edm2.score_keywords(tensors, told, file)
        return "EDM2Precond", keywords, _defaults("EDM2Precond", keywords)
    if kind == "DiT" or (kind in (None, "DDPMPrecond", "FlowPrecond") and dit.is_dit(tensors)):
        kind, keywords, assumed = dit.kind_and_keywords(tensors, kind, told, repa, file)
        return kind, keywords, assumed + _defaults(kind, keywords)
    if kind is None:
        keywords, assumed = openai_pt.score_keywords(tensors, told, file)
    else:
        keywords, assumed = openai_pt.with_script_defaults(kind, told)
        return kind, keywords, assumed + _defaults(kind, keywords)
    return "DDPMPrecond", keywords, assumed + _defaults("DDPMPrecond", keywords)


def _require_role(tensors: Mapping[str, Tensor], role: str, file: Path) -> None:
    """
    Raises:
        UserError: the names of its tensors are those of a network for another role.
    """
    adm = "input_blocks.0.0.weight" in tensors
    decodes = any(name.startswith(("output_blocks.", "dec.", "model.dec.")) for name in tensors) or dit.is_dit(tensors)
    if role in DENOISERS and adm and not decodes:
        raise UserError(f"{file} holds an encoder of ADM: give --role {' or '.join(ENCODERS)}")
    if role not in DENOISERS and decodes:
        raise UserError(f"{file} holds a network that makes images: give --role {' or '.join(DENOISERS)}")


def _defaults(kind: str, keywords: Mapping[str, Any]) -> list[Assumed]:
    """The constructors' defaults that no tensor's shape shows, and so no file."""
    left_out, wrapper = nets.defaults(kind, keywords), PRECONDITIONERS.get(kind)
    own = inspect.signature(wrapper).parameters if wrapper else {}
    unseen = {name for name, parameter in own.items() if parameter.default is not parameter.empty} | _UNSEEN
    if {**left_out, **keywords}.get("num_head_channels", -1) != -1:
        unseen.discard("num_heads")  # says nothing then
    elif "num_head_channels" in left_out:
        unseen.discard("num_head_channels")
    because = "dgfast's default" if kind == "EncoderUNetModel" else "its authors' default"
    return [
        Assumed(name, value, because, f"--set {name}={'true' if value is False else _OTHERS.get(name, '...')}")
        for name, value in left_out.items()
        if name in unseen - {"learn_sigma"}  # which the last layer shows
    ]


def _as_in_a_bundle(tensors: dict[str, Tensor], kind: str) -> dict[str, Tensor]:
    """A denoiser's tensors under its preconditioner's names; published ones are often of the raw network."""
    if kind not in PRECONDITIONERS:
        return tensors
    raw = f"{PRECONDITIONERS[kind].raw_name}."
    if any(name.startswith(raw) for name in tensors):
        return tensors
    return {f"{raw}{name}": value for name, value in tensors.items()}


def require_finite(tensors: Mapping[str, Tensor], file: Path) -> None:
    """
    Raises:
        UserError: which tensors are not, in float32, and how much of them.
    """
    wrong = {name: int((~value.float().isfinite()).sum()) for name, value in tensors.items()}
    complaints = [f"{name} ({count:,} of {tensors[name].numel():,} values)" for name, count in wrong.items() if count]
    if complaints:
        more = f" and {len(complaints) - 3} more" if len(complaints) > 3 else ""
        raise UserError(
            f"{file} has weights that are not finite, as after a training that diverged: "
            f"{one_line(', '.join(complaints[:3]))}{more}; give an earlier checkpoint"
        )


# What is told of it ---------------------------------------------------------------------------------------------------
def _about(file: Path, form: str, state: StateDict, kind: str) -> str:
    taken_off = list(state.taken_off)
    if kind in PRECONDITIONERS and taken_off[-1:] == ["model"]:
        taken_off.pop()  # a preconditioner's own
    notes = [
        f"{file.name}, {_FORMATS[form]}",
        state.part and f"its part {state.part}",
        state.beside and f"not {' or '.join(state.beside)} (--key)",
        taken_off and f"names without {' and '.join(f'{word}.' for word in taken_off)}",
        state.left_out and f"without {', '.join(state.left_out)}",
    ]
    return one_line("; ".join(note for note in notes if note))


def counted(tensors: Mapping[str, Tensor]) -> str:
    by_dtype = Counter(str(value.dtype).removeprefix("torch.") for value in tensors.values())
    kept = "" if set(by_dtype) == {"float32"} else ", kept as float32"
    return " and ".join(f"{count:,} of {dtype}" for dtype, count in by_dtype.items()) + kept
