"""Bundles: what is written is what is read, and a broken one is refused by name."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dgfast import bundle as bundles
from dgfast import nets
from dgfast.bundle import Bundle, NetSpec
from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.errors import UserError

KEYWORDS = {
    "img_resolution": 8,
    "img_channels": 1,
    "label_dim": 3,
    "model_type": "SongUNet",
    "model_channels": 8,
    "channel_mult": [1],
    "num_blocks": 1,
    "attn_resolutions": [8],
    "embedding_type": "fourier",
}
CLASSIFIER = {
    "image_size": 8,
    "in_channels": 1,
    "model_channels": 32,
    "out_channels": 3,
    "num_res_blocks": 1,
    "attention_resolutions": [],
    "channel_mult": [1],
    "num_head_channels": 32,
}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A small bundle on disk, with nothing left at its default."""
    torch.manual_seed(0)
    made = Bundle(
        folder=tmp_path / "small",
        name="small",
        nets={},
        sampling=SamplingConfig(num_steps=9, solver="euler", sigma_max=60.0, S_churn=2.0),
        guidance=GuidanceConfig(dg_weight=1.5, dg_window=(0.02, 0.9), dg_schedule=((0.1, 0.0),), boosting=True),
        class_names=("zero", "one", "two"),
        provenance="drawn at random",
        license="CC0-1.0",
        metrics={"fid": 12.5, "by": {"class": [1, 2, 3]}},
    )
    made = bundles.with_net(made, "score", nets.build("EDMPrecond", **KEYWORDS), "EDMPrecond", KEYWORDS)
    encoder = nets.build("EncoderUNetModel", **CLASSIFIER)
    made = bundles.with_net(made, "classifier", encoder, "EncoderUNetModel", CLASSIFIER, "cosine")
    bundles.write(made)
    return made


def edit(bundle: Bundle, change: Callable[[dict[str, Any]], Any]) -> None:
    path = bundle.folder / "bundle.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


# Round trip -----------------------------------------------------------------------------------------------------------
def test_bundle_reads_back_what_was_written(bundle: Bundle) -> None:
    assert bundles.read(bundle.folder) == bundle
    assert bundles.read(str(bundle.folder)) == bundle
    assert sorted(path.name for path in bundle.folder.iterdir()) == [
        "bundle.json",
        "classifier.safetensors",
        "score.safetensors",
    ]  # and no partial file


def test_bundle_of_defaults_stores_no_settings(tmp_path: Path) -> None:
    """So that a better default of a later version reaches old bundles."""
    plain = Bundle(tmp_path / "plain", "plain", {})
    bundles.write(plain)
    raw = json.loads((plain.folder / "bundle.json").read_text())
    assert raw["sampling"] == raw["guidance"] == {}
    assert bundles.read(plain.folder) == plain
    assert plain.provenance == plain.license == ""
    (plain.folder / "bundle.json").write_text('{"format": 1, "name": "plain", "nets": {}}')  # all that must be there
    assert bundles.read(plain.folder) == plain


def test_bundle_with_a_number_that_json_lacks_leaves_the_old_one(bundle: Bundle) -> None:
    """JSON has no infinity; other readers than Python's would refuse the file."""
    endless = NetSpec("EDMPrecond", KEYWORDS | {"sigma_max": math.inf}, "score.safetensors")
    with pytest.raises(ValueError, match="JSON"):
        bundles.write(replace(bundle, nets={"score": endless}))
    assert bundles.read(bundle.folder) == bundle


def test_bundle_that_is_shipped_is_written_as_it_is(tmp_path: Path) -> None:
    """To the byte: a line for each entry, so that a change of one shows as one."""
    shipped = bundles.read("mnist32")
    bundles.write(replace(shipped, folder=tmp_path / "copy"))
    assert (tmp_path / "copy/bundle.json").read_bytes() == (shipped.folder / "bundle.json").read_bytes()


def test_bundle_is_read_where_there_is_one_and_begun_where_there_is_none(bundle: Bundle, tmp_path: Path) -> None:
    assert bundles.read_or_new(bundle.folder) == bundle
    new = tmp_path / "deep" / ".." / "new"
    assert bundles.read_or_new(new) == Bundle(new, "new", {}) and not new.exists()


def test_bundle_loads_the_network_that_was_saved(bundle: Bundle) -> None:
    torch.manual_seed(5)
    net = nets.build("EDMPrecond", **KEYWORDS).eval()
    bundles.write(bundles.with_net(bundle, "reference", net, "EDMPrecond", KEYWORDS))
    loaded = bundles.read(bundle.folder).load("reference")
    x, sigma, labels = torch.randn(2, 1, 8, 8), torch.tensor([0.5, 3.0]), torch.eye(3)[:2]
    assert torch.equal(loaded(x, sigma, labels), net(x, sigma, labels))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_bundle_loads_weights_in_another_type_and_buffers_as_they_are(bundle: Bundle) -> None:
    """Random Fourier frequencies of about 16 would turn to noise in bfloat16."""
    loaded = bundle.load("score", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert {b.dtype for b in loaded.buffers()} == {torch.float32}
    assert torch.equal(
        loaded.get_buffer("model.map_noise.freqs"), bundle.load("score").get_buffer("model.map_noise.freqs")
    )


# Descriptions that are refused ----------------------------------------------------------------------------------------
def test_bundle_that_does_not_exist_is_refused_with_those_that_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"unknown bundle 'cifar99'.*come with dgfast"):
        bundles.read("cifar99")
    with pytest.raises(UserError, match="unknown bundle"):
        bundles.read(tmp_path)  # a folder without bundle.json


def test_bundle_that_comes_along_is_found_by_its_name(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bundles, "_ASSETS", tmp_path)
    (tmp_path / "another").mkdir()
    (tmp_path / "no folder").touch()
    assert bundles.read("small") == bundle
    with pytest.raises(UserError, match=r"bundles that come with dgfast: another, small$"):
        bundles.read("no folder")


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '"bundle"', '{"format": 1}', "\xff", "[" * 100_000, '{"format": 1, "format": 1}',
        '{"format": NaN}', '{"format": 1' + "0" * 5000 + "}", " " * 9 * 2**20,
    ],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_bundle_description_that_is_none_is_refused(bundle: Bundle, text: str) -> None:
    (bundle.folder / "bundle.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="not a bundle description"):
        bundles.read(bundle.folder)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda raw: raw.update(format=2), "format 2"),
        (lambda raw: raw.pop("name"), "name"),
        (lambda raw: raw["nets"]["score"].pop("kind"), "kind"),
        (lambda raw: raw["nets"]["score"].update(weights="x"), "weights"),
        (lambda raw: raw["nets"].update(upscaler=raw["nets"]["score"]), "unknown role 'upscaler'"),
        (lambda raw: raw["nets"]["classifier"].update(time_schedule="sqrt"), "sqrt"),
        (lambda raw: raw["nets"]["score"].update(kind="FeatureNet"), "score cannot be of the kind 'FeatureNet'"),
        (lambda raw: raw["sampling"].update(steps=5), "steps"),
        (lambda raw: raw["sampling"].update(solver="rk4"), "rk4"),
        (lambda raw: raw["guidance"].update(dg_window=[0.9, 0.1]), "dg_window"),
        (lambda raw: raw["guidance"].update(dg_window=[0.9]), "bundle.json"),
        (lambda raw: raw["nets"]["score"].update(file="../score.safetensors"), r"\.\./score"),
        (lambda raw: raw["nets"]["score"].update(file="/etc/passwd"), "/etc/passwd"),
        (lambda raw: raw["nets"]["score"].update(file="deep/score.safetensors"), "deep/score"),
        (lambda raw: raw["nets"]["score"].update(file=5), "bundle.json"),
        (lambda raw: raw["nets"]["score"].update(file="a\x00"), "bundle.json"),
        (lambda raw: raw["nets"]["score"].update(file="a\x1b[2J"), "bundle.json"),
        (lambda raw: raw["nets"]["score"]["keywords"].update(model_channels=10**7), "100,000 is the most"),
        (lambda raw: raw["nets"]["score"]["keywords"].update(channel_mult=[1] * 100), "a short list"),
        (lambda raw: raw["nets"]["score"]["keywords"].update(channel_mult=[[[1]]]), "a short list"),
        (lambda raw: raw["nets"]["score"]["keywords"].update(img_resolution=10**5), "4,096 is the most"),
        (lambda raw: raw.update(name="a\x1b[2J"), "name .* can be shown"),
        (lambda raw: raw.update(name=5), "name 5"),
        (lambda raw: raw.update(class_names=["a\nb"]), "class name .* can be shown"),
        (lambda raw: raw.update(license="\x1b[2J"), "license .* can be shown"),
        (lambda raw: raw.update(provenance="\x1b[2J"), "provenance '.* can be shown"),
        (lambda raw: raw.update(metrics=_nested(30)), "nested too deeply"),
        (lambda raw: raw["sampling"].update(num_steps=10**9), "at most 10,000"),
        (lambda raw: raw["sampling"].update(M=10**9), "at most 10,000"),
        (lambda raw: raw["sampling"].update(sigma_max="80"), "must be real number"),
        (lambda raw: raw["sampling"].update(sigma_max=[80]), "must be real number"),
        (lambda raw: raw["sampling"].update(clip_denoised="no"), "clip_denoised"),
        (lambda raw: raw["sampling"].update(respacing="9" * 5000), "respacing"),
        (lambda raw: raw["sampling"].update(solver="\x1b[2J" * 1000), "solver"),
        (lambda raw: raw["guidance"].update(dg_weight="\x1b[2J"), "must be real number"),
        (lambda raw: raw["guidance"].update(dg_window=[10**400, 2]), "too large"),
        (lambda raw: raw.update(vae={"source": "\x1b[2J"}), "vae"),
    ],
)
def test_bundle_description_names_what_is_wrong_with_it(
    bundle: Bundle, change: Callable[[dict[str, Any]], Any], named: str
) -> None:
    edit(bundle, change)
    with pytest.raises(UserError, match=named) as caught:
        bundles.read(bundle.folder)
    assert caught.value.message.isprintable() and len(caught.value.message) < 1000


def _nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": value}
    return value


def test_bundle_texts_may_have_lines(bundle: Bundle) -> None:
    edit(bundle, lambda raw: raw.update(license="MIT\nand nothing else"))
    assert bundles.read(bundle.folder).license == "MIT\nand nothing else"


@pytest.mark.parametrize("place", ["bundle.json", "score.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path)])
def test_bundle_waits_for_no_pipe_and_reads_no_device(bundle: Bundle, place: str, make: Callable[[Path], None]) -> None:
    (bundle.folder / place).unlink()
    make(bundle.folder / place)
    with pytest.raises(UserError, match=place):
        bundles.read(bundle.folder).load("score")
    if place != "bundle.json":
        with pytest.raises(UserError, match="a folder, a pipe or a device"):
            bundles.read(bundle.folder).fingerprint()


@pytest.mark.parametrize("file", ["", ".", ".."])
def test_bundle_network_that_names_a_folder_is_refused(bundle: Bundle, file: str) -> None:
    edit(bundle, lambda raw: raw["nets"]["score"].update(file=file))
    with pytest.raises(UserError):
        bundles.read(bundle.folder).load("score")


def test_bundle_names_the_roles_that_it_has(bundle: Bundle) -> None:
    with pytest.raises(UserError, match="small has no reference network; it has score, classifier"):
        bundle.load("reference")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda spec: spec.update(kind="DDPMPrecond"), "DDPMPrecond"),
        (lambda spec: spec["keywords"].update(sigma_mean=1.0), "sigma_mean"),
        (lambda spec: spec["keywords"].pop("img_channels"), "img_channels"),
    ],
)
def test_bundle_network_that_cannot_be_built_is_refused(
    bundle: Bundle, change: Callable[[dict[str, Any]], Any], named: str
) -> None:
    edit(bundle, lambda raw: change(raw["nets"]["score"]))
    with pytest.raises(UserError, match=named):
        bundles.read(bundle.folder).load("score")


# Weights that are refused ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop("model.map_layer0.weight"), r"missing model\.map_layer0\.weight"),
        (lambda t: t.update({"model.extra": torch.zeros(1)}), r"superfluous model\.extra"),
        (
            lambda t: t.update({"model.map_layer0.bias": torch.zeros(7)}),
            r"misshapen model\.map_layer0\.bias \[7\], not \[32\]",
        ),
    ],
)
def test_bundle_weights_that_do_not_fit_are_named(
    bundle: Bundle, change: Callable[[dict[str, Tensor]], Any], named: str
) -> None:
    tensors = bundles.read_tensors(bundle.folder / "score.safetensors")
    change(tensors)
    bundles.with_tensors(bundle, "score", tensors, "EDMPrecond", KEYWORDS)
    with pytest.raises(UserError, match=named):
        bundle.load("score")


def test_bundle_lists_the_first_few_of_many_tensors_that_do_not_fit(bundle: Bundle) -> None:
    bundles.with_tensors(bundle, "score", {"other": torch.zeros(1)}, "EDMPrecond", KEYWORDS)
    with pytest.raises(UserError, match=r"missing .* and \d+ more; superfluous other"):
        bundle.load("score")


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_bundle_weights_that_are_cut_short_are_refused(bundle: Bundle, share: float) -> None:
    path = bundle.folder / "score.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UserError, match=r"score\.safetensors: not a readable safetensors file"):
        bundle.load("score")


def test_bundle_weights_that_are_not_there_are_refused(bundle: Bundle) -> None:
    (bundle.folder / "score.safetensors").unlink()
    with pytest.raises(UserError, match=r"score\.safetensors"):
        bundle.load("score")


def test_bundle_network_that_fails_to_save_leaves_the_old_one(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (bundle.folder / "score.safetensors").read_bytes()

    def disk_full(path: Path, data: bytes) -> int:
        with path.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", disk_full)
    with pytest.raises(OSError, match="no space"):
        bundles.with_net(bundle, "score", nets.build("EDMPrecond", **KEYWORDS), "EDMPrecond", KEYWORDS)
    assert (bundle.folder / "score.safetensors").read_bytes() == before
    assert bundles.read(bundle.folder) == bundle
