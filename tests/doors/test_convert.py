"""The door `python -m dgfast.convert`: official files in, bundles out, nothing else ever."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors.torch import save_file
from torch import nn

from dgfast import bundle as bundles
from dgfast.checkpoints import joining, network
from dgfast.errors import UserError
from tests.support.convert import convert, refused
from tests.support.paths import ROOT

TINY: dict[str, Any] = {
    "img_resolution": 8, "img_channels": 1, "label_dim": 3, "model_type": "SongUNet",
    "model_channels": 16, "channel_mult": [1, 2], "num_blocks": 1, "attn_resolutions": [8],
}  # fmt: skip
HEAD: dict[str, Any] = {
    "image_size": 8, "classifier_use_fp16": False, "classifier_width": 128, "classifier_depth": 2,
    "classifier_attention_resolutions": "32,16,8", "classifier_use_scale_shift_norm": True,
    "classifier_resblock_updown": True, "classifier_pool": "attention", "out_channels": 1, "in_channels": 512,
    "condition": False,
}  # fmt: skip
TRUNK = {**HEAD, "image_size": 32, "classifier_width": 64, "out_channels": 10, "in_channels": 3}
FilledNet = Callable[..., nn.Module]


@pytest.fixture
def saved(tmp_path: Path, filled_net: FilledNet) -> Callable[..., tuple[Path, nn.Module]]:
    """(file name, kind, keywords, prefix) -> a state dict in a file, and the network that it is of."""

    def save(name: str, kind: str, keywords: dict[str, Any], prefix: str = "convert/") -> tuple[Path, nn.Module]:
        net = filled_net(kind, keywords, prefix)
        write = save_file if name.endswith(".safetensors") else torch.save
        write(net.state_dict(), tmp_path / name)
        return tmp_path / name, net

    return save


def assert_same_weights(net: nn.Module, original: nn.Module) -> None:
    tensors = net.state_dict()
    assert tensors.keys() == original.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in original.state_dict().items())


def test_help_does_not_wait_for_torch() -> None:
    check = "import sys, dgfast.convert; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=ROOT)
    code, output = convert("--help")
    assert code == 0 and "network snapshot of NVIDIA's EDM" in output


# What is converted ----------------------------------------------------------------------------------------------------
def test_snapshot_denoises_as_the_official_network(own_golden_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "bundle"
    code, output = convert(own_golden_folder / "edm_tiny.pkl", "--out", out)
    net = bundles.read(out).load("score")
    count = sum(parameter.numel() for parameter in net.parameters())
    assert code == 0 and output.startswith(f"{out}: score EDMPrecond, {count:,} parameters\n"), output
    assert sorted(path.name for path in out.glob("[!.]*")) == ["bundle.json", "score.safetensors"]

    golden = np.load(own_golden_folder / "edm_tiny_expected.npz")
    labels = torch.from_numpy(golden["class_labels"])
    calls = [(scale * golden["x_base"], sigma) for scale, sigma in zip(golden["x_scale"], golden["sigma"], strict=True)]
    for (x, sigma), expected in zip(calls, golden["D"], strict=True):
        denoised = net(torch.from_numpy(x), torch.tensor(sigma), labels).numpy()
        assert np.abs(denoised - expected).max() <= 2e-4 * expected.std(), sigma


def test_texts_and_defaults(own_golden_folder: Path, tmp_path: Path) -> None:
    convert(own_golden_folder / "edm_tiny.pkl", "--out", tmp_path / "plain")
    plain = bundles.read(tmp_path / "plain")
    assert (plain.name, plain.license, plain.class_names) == ("edm_tiny", "", ())
    assert plain.provenance == "score: converted from edm_tiny.pkl"
    assert (plain.sampling.num_steps, plain.sampling.discretization) == (18, "edm")
    texts = ("--name", "tiny", "--license", "MIT", "--provenance", "a test")
    convert(own_golden_folder / "edm_tiny.pkl", "--out", tmp_path / "told", *texts)
    told = bundles.read(tmp_path / "told")
    assert (told.name, told.license, told.provenance) == ("tiny", "score: MIT", "score: a test")


def test_large_images_get_edms_larger_number_of_steps(saved: Callable[..., Any], tmp_path: Path) -> None:
    keywords = {**TINY, "img_resolution": 64}
    file, _ = saved("x.safetensors", "EDMPrecond", keywords)
    (tmp_path / "keywords.json").write_text(json.dumps(keywords))
    convert(
        file, "--out", tmp_path / "b", "--role", "score", "--kind", "EDMPrecond", "--config", tmp_path / "keywords.json"
    )
    assert bundles.read(tmp_path / "b").sampling.num_steps == 40


@pytest.mark.parametrize("kind", ["EDMPrecond", "VPPrecond", "VEPrecond", "iDDPMPrecond"])
def test_score_state_dict_with_its_keywords(saved: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    file, net = saved("x.safetensors", kind, TINY)
    config = tmp_path / "keywords.json"
    config.write_text(json.dumps({**TINY, "label_dim": 1000}))
    code, output = convert(
        file, "--out", tmp_path / "b", "--role", "reference", "--kind", kind, "--config", config, "--set", "label_dim=3"
    )
    assert code == 0, output
    assert_same_weights(bundles.read(tmp_path / "b").load("reference"), net)


@pytest.mark.parametrize("prefix", ["pub/dis_u/", "pub/dis_c22/"])
def test_discriminator_of_dg(saved: Callable[..., Any], tmp_path: Path, own_golden_folder: Path, prefix: str) -> None:
    keywords = {**HEAD, "condition": prefix == "pub/dis_c22/"}
    file, net = saved("discriminator_60.pt", "create_classifier", keywords, prefix)
    assert convert(file, "--out", tmp_path / "b", "--role", "discriminator")[0] == 0
    bundle = bundles.read(tmp_path / "b")
    assert (bundle.spec("discriminator").keywords, bundle.spec("discriminator").time_schedule) == (keywords, None)
    assert_same_weights(bundle.load("discriminator"), net)


@pytest.mark.parametrize("size", [32, 64])
def test_classifier(saved: Callable[..., Any], tmp_path: Path, size: int) -> None:
    keywords = {**TRUNK, "image_size": size}
    file, net = saved("classifier.pt", "create_classifier", keywords)
    assert convert(file, "--out", tmp_path / "b", "--role", "classifier")[0] == 0
    bundle = bundles.read(tmp_path / "b")
    assert bundle.spec("classifier").keywords == keywords
    assert_same_weights(bundle.load("classifier"), net)


def test_encoder_of_ones_own(saved: Callable[..., Any], tmp_path: Path) -> None:
    keywords: dict[str, Any] = {"image_size": 16, "in_channels": 1, "model_channels": 32, "out_channels": 10}
    keywords |= {"num_res_blocks": 1, "attention_resolutions": [2], "channel_mult": [1, 2], "num_head_channels": 32}
    file, net = saved("x.pt", "EncoderUNetModel", keywords)
    settings = [part for name, value in keywords.items() for part in ("--set", f"{name}={value}")]
    role = ("--out", tmp_path / "b", "--role", "classifier")
    assert "--kind EncoderUNetModel" in refused(file, *role)
    assert convert(file, *role, "--kind", "EncoderUNetModel", *settings)[0] == 0
    assert_same_weights(bundles.read(tmp_path / "b").load("classifier"), net)


def test_roles_join_in_one_bundle_and_are_never_replaced(
    saved: Callable[..., Any], own_golden_folder: Path, tmp_path: Path
) -> None:
    head, _ = saved("head.pt", "create_classifier", HEAD)
    snapshot, out = own_golden_folder / "edm_tiny.pkl", tmp_path / "b"
    assert convert(head, "--out", out, "--role", "discriminator", "--license", "MIT", "--name", "both")[0] == 0
    assert convert(snapshot, "--out", out, "--license", "CC BY-NC-SA 4.0", "--name", "both")[0] == 0
    bundle = bundles.read(out)
    assert (bundle.name, list(bundle.nets)) == ("both", ["discriminator", "score"])
    assert bundle.license == "discriminator: MIT; score: CC BY-NC-SA 4.0"
    assert bundle.provenance == "discriminator: converted from head.pt; score: converted from edm_tiny.pkl"

    before = {path.name: path.read_bytes() for path in out.iterdir()}
    assert "has a score network already" in refused(snapshot, "--out", out)
    assert "holds the bundle 'both' already" in refused(
        snapshot, "--out", out, "--role", "reference", "--name", "other"
    )
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert convert(snapshot, "--out", out, "--role", "reference")[0] == 0
    assert len(bundles.read(out).nets) == 3


def test_a_file_name_of_control_characters_does_not_spoil_the_bundle(
    saved: Callable[..., Any], own_golden_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "a\nb\x1b[2J.pkl").write_bytes((own_golden_folder / "edm_tiny.pkl").read_bytes())
    code, output = convert(tmp_path / "a\nb\x1b[2J.pkl", "--out", tmp_path / "b")
    bundle = bundles.read(tmp_path / "b")
    assert code == 0 and "\x1b" not in output
    assert (bundle.name, bundle.provenance) == ("a b [2J", "score: converted from a b [2J.pkl")


def test_a_file_that_lies_in_the_folder_is_not_overwritten(own_golden_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "score.safetensors").write_text("precious")
    output = refused(own_golden_folder / "edm_tiny.pkl", "--out", tmp_path)
    assert (
        "has a score network already, though no bundle.json names it" in output
        and "move score.safetensors away" in output
    )
    assert (tmp_path / "score.safetensors").read_text() == "precious"


# Two conversions at once ----------------------------------------------------------------------------------------------
def at_once(jobs: list[Callable[[], object]]) -> list[str]:
    """What each of them was refused with, "" for those that were not."""

    def run(job: Callable[[], object]) -> str:
        try:
            job()
        except UserError as error:
            return error.message
        return ""

    with ThreadPoolExecutor(len(jobs)) as pool:
        return list(pool.map(run, jobs))


@pytest.fixture
def slow_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the reading of a bundle and its writing, there is time enough for anyone to come in between."""
    with_net = bundles.with_net

    def slow(*arguments: Any) -> bundles.Bundle:
        time.sleep(0.2)
        return with_net(*arguments)

    monkeypatch.setattr(bundles, "with_net", slow)


def joined(file: Path, out: Path, role: str) -> Callable[[], object]:
    converted = network.read(file, role, None, {}, None)
    about: dict[str, Any] = dict.fromkeys(("name", "license_", "time_schedule", "vae"))
    return lambda: joining.join(converted, out, role, fallback_name="b", provenance="a test", **about)


@pytest.mark.usefixtures("slow_writing")
@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
def test_two_networks_at_once_both_land(
    saved: Callable[..., Any], own_golden_folder: Path, tmp_path: Path, existing: bool
) -> None:
    head, net = saved("head.pt", "create_classifier", HEAD)
    snapshot, out = own_golden_folder / "edm_tiny.pkl", tmp_path / "new" / "b"
    if existing:
        assert convert(snapshot, "--out", out, "--role", "reference")[0] == 0
    assert at_once([joined(head, out, "discriminator"), joined(snapshot, out, "score")]) == ["", ""]
    bundle = bundles.read(out)
    assert set(bundle.nets) == {"discriminator", "score"} | ({"reference"} if existing else set())
    assert_same_weights(bundle.load("discriminator"), net)
    assert all(bundle.load(role) for role in bundle.nets) and not list(out.glob("*.partial"))


@pytest.mark.usefixtures("slow_writing")
def test_of_two_networks_for_one_place_the_first_stays(own_golden_folder: Path, tmp_path: Path) -> None:
    jobs = [joined(own_golden_folder / "edm_tiny.pkl", tmp_path / "b", "score") for _ in range(2)]
    first, second = sorted(at_once(jobs))
    assert first == "" and "has a score network already" in second
    assert bundles.read(tmp_path / "b").load("score")


def test_a_conversion_that_does_not_end_is_not_waited_for_for_ever(
    own_golden_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    job = joined(own_golden_folder / "edm_tiny.pkl", tmp_path, "score")
    monkeypatch.setattr(joining, "_PATIENCE", 0.1)
    with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match="another command has not ended"):
        job()
    assert "waiting for another command" in capsys.readouterr().err
    assert not list(tmp_path.glob("[!.]*"))


# What is refused ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        pytest.param({"out.2.c_proj.bias": None}, "missing out.2.c_proj.bias", id="missing"),
        pytest.param({"out.2.qkv_proj.bias": (4,)}, "misshapen out.2.qkv_proj.bias [4], not [384]", id="misshapen"),
        pytest.param({"extra": (4,)}, "superfluous extra", id="superfluous"),
        pytest.param({"time_embed.0.weight": None}, "time_embed.0.weight is missing", id="no_width"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    saved: Callable[..., Any], tmp_path: Path, spoil: dict[str, Any], complaint: str
) -> None:
    file, net = saved("head.pt", "create_classifier", HEAD)
    changed = {**net.state_dict(), **{name: shape and torch.zeros(shape) for name, shape in spoil.items()}}
    torch.save({name: tensor for name, tensor in changed.items() if tensor is not None}, file)
    assert complaint in refused(file, "--out", tmp_path / "b", "--role", "discriminator")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        pytest.param("x.pt", "", "give --role", id="no_role"),
        pytest.param("x.onnx", "--role score", "unknown ending '.onnx'", id="ending"),
        pytest.param("x.pkl", "--kind EDMPrecond", "leave out --kind", id="pkl_kind"),
        pytest.param("x.pkl", "--set a=1", "leave out --kind", id="pkl_set"),
        pytest.param("x.pkl", "--role classifier", "cannot be of the kind 'EDMPrecond'", id="pkl_role"),
        pytest.param("x.pkl", "--time-schedule linear", "a score network has none", id="score_time"),
        pytest.param("x.pt", "--role score", "an encoder of ADM: give --role classifier or disc", id="encoder_role"),
        pytest.param("score.pt", "--role discriminator", "makes images: give --role score or ref", id="score_role"),
        pytest.param("score.pt", "--role score", "give --kind (EDMPrecond", id="score_without_kind"),
        pytest.param("none.pt", "--role score", "cannot read none.pt: No such file", id="no_file"),
        pytest.param("x.pt", "--role discriminator --name a\tb", "--name has control characters", id="name"),
        pytest.param("score.pt", "--role score --kind SongUNet", "cannot be of the kind 'SongUNet'", id="unknown_kind"),
        pytest.param("x.pt", "--role classifier --kind EDMPrecond", "cannot be of the kind", id="unfit_kind"),
        pytest.param("score.pt", "--role score --kind EDMPrecond", "its keywords make no EDMPrecond", id="no_keywords"),
        pytest.param("x.pt", "--role discriminator --set image_size=9", "known sizes", id="image_size"),
        pytest.param("x.pt", "--role discriminator --set colour=red", "unexpected keyword", id="unknown_keyword"),
        pytest.param("x.pt", "--role discriminator --set classifier_width=-64", "negative", id="negative_width"),
        pytest.param("x.pt", "--role score --set image_size", "expected KEY=VALUE", id="no_value"),
        pytest.param("x.pt", "--role score --set sigma_max=Infinity", "finite keywords only", id="infinity"),
        pytest.param("x.pt", "--role score --set sigma_max=1e999", "finite keywords only", id="overflow"),
        pytest.param("x.pt", "--role discriminator --set image_size=" + "9" * 5000, "known sizes", id="long_number"),
        pytest.param("x.pt", "--role discriminator --set kind=x", "multiple values", id="reserved_keyword"),
        pytest.param("x.pt", "--role score --config x.pt", "not readable JSON", id="broken_config"),
        pytest.param("x.pt", "--role score --config list.json", "must hold an object", id="list_config"),
    ],
)
def test_orders_that_make_no_sense(
    saved: Callable[..., Any],
    own_golden_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    options: str,
    complaint: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    saved("x.pt", "create_classifier", HEAD)
    saved("score.pt", "EDMPrecond", TINY)
    Path("x.pkl").write_bytes((own_golden_folder / "edm_tiny.pkl").read_bytes())
    Path("x.onnx").touch()
    Path("list.json").write_text("[]")
    assert complaint in refused(name, "--out", "b", *filter(None, options.split(" ")))
    assert not Path("b").exists()


@pytest.mark.parametrize("out", ["file", "file/below/it"])
def test_unwritable_folder(own_golden_folder: Path, tmp_path: Path, out: str) -> None:
    (tmp_path / "file").write_text("precious")
    assert "cannot write to" in refused(own_golden_folder / "edm_tiny.pkl", "--out", tmp_path / out)
    assert (tmp_path / "file").read_text() == "precious"


@pytest.mark.parametrize("existing", [False, True], ids=["new", "existing"])
@pytest.mark.parametrize("moment", ["write", "with_net"])
def test_failed_writing_leaves_everything_as_it_was(
    saved: Callable[..., Any],
    own_golden_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    existing: bool,
) -> None:
    out = tmp_path / "new" / "bundle"
    if existing:
        head, _ = saved("head.pt", "create_classifier", HEAD)
        convert(head, "--out", out, "--role", "discriminator")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def full(*_: object) -> None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "score.safetensors.partial").write_text("half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(bundles, moment, full)
    assert "No space left" in refused(own_golden_folder / "edm_tiny.pkl", "--out", out)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert (tmp_path / "new").exists() == existing
