"""EDM2's files: snapshots, state dicts, averages over training, and names that say too much."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dgfast import bundle as bundles
from dgfast import nets, presets
from dgfast.bundle import VaeSpec
from dgfast.checkpoints import edm2, network, nvidia_pickle, phema
from dgfast.checkpoints.defaults import EDM2_VAE
from dgfast.config import SamplingConfig
from dgfast.errors import UserError
from tests.support import mutations
from tests.support.convert import convert, refused
from tests.support.snapshots import Persistent, persistent, pickled

TINY: dict[str, Any] = {
    "img_resolution": 8, "img_channels": 3, "label_dim": 3, "model_channels": 8, "channel_mult": [1, 2],
    "num_blocks": 1, "attn_resolutions": [4], "channels_per_head": 8,
}  # fmt: skip


def net_of(seed: int, **keywords: Any) -> nn.Module:
    """A network of one training run: frequencies are all runs' first draws, weights are the seed's."""
    torch.manual_seed(keywords.pop("run", 0))
    net = nets.build("EDM2Precond", **TINY | keywords).half()
    torch.manual_seed(seed)
    for parameter in net.parameters():
        nn.init.normal_(parameter)
    return net


def snapshot_of(net: nn.Module, **content: Any) -> bytes:
    ema = persistent(net, **TINY)
    ema.meta["class_name"] = "Precond"
    return pickled({"ema": ema, "dataset_kwargs": {}, **content})


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    def save(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    return save


# Snapshots ------------------------------------------------------------------------------------------------------------
def test_edm2_snapshot_becomes_a_bundle_with_its_decoder_and_sampling(own_golden_folder: Path, tmp_path: Path) -> None:
    code, output = convert(own_golden_folder / "edm2_tiny.pkl", "--out", tmp_path / "b")
    assert code == 0 and "63 of float16, kept as float32" in output and "StabilityVAEEncoder" in output, output
    bundle = bundles.read(tmp_path / "b")
    assert bundle.sampling == SamplingConfig(num_steps=32, state_dtype="float32")
    assert bundle.vae and bundle.vae.source == "stabilityai/sd-vae-ft-mse" and bundle.vae.pixels == "unit"
    stored = bundles.read_tensors(bundle.folder / "score.safetensors")
    snapshot = nvidia_pickle.read(own_golden_folder / "edm2_tiny.pkl")
    assert all(torch.equal(stored[name], value.float()) for name, value in snapshot.tensors.items()), "not folded"
    with torch.no_grad():
        assert bundle.load("score")(torch.randn(1, 4, 16, 16), torch.tensor([2.0])).isfinite().all()
    convert(own_golden_folder / "edm2_tiny.pkl", "--vae", "some/folder", "--out", tmp_path / "told")
    told = bundles.read(tmp_path / "told").vae
    assert told == VaeSpec("some/folder", bundle.vae.scale, bundle.vae.bias, "unit")


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        ({}, ""),
        ({"encoder": None}, ""),
        ({"encoder": Persistent("StandardRGBEncoder", {"_init_kwargs": {}})}, "StandardRGBEncoder"),
    ],
)
def test_edm2_snapshots_of_pixels_need_no_decoder(
    save: Callable[..., Path], encoder: dict[str, Any], said: str
) -> None:
    snapshot = nvidia_pickle.read(save("x.pkl", snapshot_of(net_of(0), **encoder)))
    assert (snapshot.kind, snapshot.keywords, snapshot.encoder, snapshot.vae) == ("EDM2Precond", TINY, said, None)


class _Array:
    """Is pickled as numpy's arrays are, with any state."""

    def __init__(self, *state: Any) -> None:
        self.state = state

    def __reduce__(self) -> Any:
        reduced: Any = np.zeros(1, np.float32).__reduce__()
        return *reduced[:2], self.state


_F4 = np.dtype("<f4")


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        pytest.param((1, (2,), _F4, False, b"\0" * 12), "error", id="torn"),
        pytest.param((1, (10**9,), _F4, False, b"\0" * 16), "no short list", id="long"),
        pytest.param((1, (2, 2), _F4, False, b"\0" * 16), "no short list", id="two_dimensions"),
        pytest.param((1, (0,), _F4, False, b""), "no short list", id="empty"),
        pytest.param((1, (4,), _F4, False, b"\0" * 16), "number above 0", id="zeros"),
        pytest.param((1, (2,), _F4), "unpack", id="short_state"),
    ],
)
def test_edm2_encoders_that_are_none_are_refused(
    save: Callable[..., Path], state: tuple[Any, ...], complaint: str
) -> None:
    arrays = {"scale": _Array(*state), "bias": _Array(1, (4,), _F4, False, b"\0" * 16)}
    encoder = Persistent("StabilityVAEEncoder", {"vae_name": "x", **arrays})
    with pytest.raises(UserError, match=complaint) as caught:
        nvidia_pickle.read(save("x.pkl", snapshot_of(net_of(0), encoder=encoder)))
    assert "nothing in it was run" in caught.value.message


def test_edm2_other_encoder_is_named(save: Callable[..., Path]) -> None:
    path = save("x.pkl", snapshot_of(net_of(0), encoder=Persistent("MyEncoder", {})))
    assert "its encoder is 'MyEncoder'" in refused(path, "--out", path.parent / "b")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("edm2-img512-xs-2147483-0.135.pkl", "img_resolution 8, not 64, img_channels 3, not 4, model_channels 8, not"),
        ("edm2-img64-s-uncond-0134217-0.110.pkl", "label_dim 3, not 0"),
    ],
)  # fmt: skip
def test_edm2_name_that_contradicts_the_size_is_refused(
    save: Callable[..., Path], name: str, complaint: str
) -> None:  # fmt: skip
    path = save(name, snapshot_of(net_of(0)))
    assert complaint in refused(path, "--out", path.parent / "b") and not (path.parent / "b").exists()


def test_edm2_state_dict_says_itself_what_it_is(tmp_path: Path) -> None:
    keywords = TINY | {"channel_mult_noise": 3, "channel_mult_emb": 4, "logvar_channels": 6, "label_dim": 0}
    net = nets.build("EDM2Precond", **keywords)
    torch.save({"ema": net.state_dict(), "step": 3}, tmp_path / "x.pt")
    options = ["--role", "score", "--set", "channels_per_head=8"]
    code, output = convert(tmp_path / "x.pt", *options, "--out", tmp_path / "b")
    assert code == 0 and "sigma_data" in output, output
    assert bundles.read(tmp_path / "b").spec("score").keywords == keywords
    torch.save({name: v for name, v in net.state_dict().items() if "out_conv" not in name}, tmp_path / "x.pt")
    assert "no whole network of EDM2" in refused(tmp_path / "x.pt", *options, "--out", tmp_path / "c")


def test_edm2_network_of_latents_in_a_file_that_says_nothing_takes_edm2s_statistics(tmp_path: Path) -> None:
    net = nets.build("EDM2Precond", **TINY | {"img_channels": 4})
    torch.save(net.state_dict(), tmp_path / "x.pt")
    options = ["--role", "score", "--set", "channels_per_head=8"]
    assert "which one decodes" in convert(tmp_path / "x.pt", *options, "--out", tmp_path / "a")[1]
    code, output = convert(tmp_path / "x.pt", *options, "--vae", "a/vae", "--out", tmp_path / "b")
    assert code == 0 and "vae.bias" in output, output
    assert bundles.read(tmp_path / "b").vae == VaeSpec("a/vae", EDM2_VAE.scale, EDM2_VAE.bias, "unit")


def test_edm2_altered_snapshots_are_read_or_refused(own_golden_folder: Path, save: Callable[..., Path]) -> None:
    content = (own_golden_folder / "edm2_tiny.pkl").read_bytes()
    for seed in range(30):
        path = save("x.pkl", mutations.pickle(random.Random(seed), content))
        try:
            network.read(path, "score", None, {}, None)
        except UserError as error:
            assert error.message.isprintable() and len(error.message) < 2000


# Averages over training -----------------------------------------------------------------------------------------------
KIMGS, STDS = (8388, 16777, 25165), (0.05, 0.1)


@pytest.fixture
def training(save: Callable[..., Path]) -> dict[tuple[int, float], Path]:
    return {
        (kimg, std): save(f"network-snapshot-{kimg:07d}-{std:.3f}.pkl", snapshot_of(net_of(7 * i + j)))
        for i, kimg in enumerate(KIMGS)
        for j, std in enumerate(STDS)
    }


def test_phema_of_a_tracked_average_is_that_average(training: dict[tuple[int, float], Path]) -> None:
    snapshot, last, made = phema.reconstruct([*training.values()], 0.05, 16777)
    wanted = nvidia_pickle.read(training[16777, 0.05]).tensors
    for name, value in snapshot.tensors.items():
        torch.testing.assert_close(value, wanted[name].float(), rtol=0, atol=1e-5)
    assert last == training[16777, 0.1] and "0.05" in made and "4 snapshots" in made


def test_phema_follows_weights_that_moved(save: Callable[..., Path]) -> None:
    """One weight that grows evenly: its average of std s lies at T (k + 1) / (k + 2)."""
    paths, end = [], phema._images(KIMGS[-1])
    for kimg in KIMGS:
        for std in STDS:
            net, k = net_of(0), float(phema.exponent(np.array(std)))
            net.get_parameter("unet.out_gain").data.fill_(phema._images(kimg) / end * (k + 1) / (k + 2))
            paths.append(save(f"network-snapshot-{kimg:07d}-{std:.3f}.pkl", snapshot_of(net)))
    for std in (0.06, 0.08):
        k = float(phema.exponent(np.array(std)))
        found = phema.reconstruct(paths[::-1], std)[0].tensors["unet.out_gain"]
        assert float(found) == pytest.approx((k + 1) / (k + 2), abs=0.006)


def test_phema_door_makes_a_bundle_of_snapshots(training: dict[tuple[int, float], Path], tmp_path: Path) -> None:
    code, output = convert("--phema-std", "0.07", *training.values(), "--out", tmp_path / "b")
    assert code == 0 and "average of relative std 0.07 as of network-snapshot-0025165-0.100.pkl" in output, output
    bundle = bundles.read(tmp_path / "b")
    assert "6 snapshots" in bundle.provenance
    stored = bundles.read_tensors(bundle.folder / "score.safetensors")
    expected = phema.reconstruct([*training.values()], 0.07)[0].tensors
    assert all(torch.equal(stored[name], value) for name, value in expected.items())


@pytest.mark.parametrize("std", ["0", "-1", "1e-200", "0.2887", "1"])
def test_phema_of_no_possible_std_is_refused(training: dict[tuple[int, float], Path], tmp_path: Path, std: str) -> None:
    said = refused("--phema-std", std, *training.values(), "--out", tmp_path / "b")
    assert "above 0.0001 and below 0.2887" in said


def test_phema_refuses_what_makes_no_average(
    training: dict[tuple[int, float], Path], save: Callable[..., Path], own_golden_folder: Path, tmp_path: Path
) -> None:
    out, first, paths = ("--out", tmp_path / "b"), training[8388, 0.05], list(training.values())
    again = tmp_path / "again-0008388-0.050.pkl"
    shutil.copy(first, again)
    other_run = save("network-snapshot-0033554-0.050.pkl", snapshot_of(net_of(1, run=5)))
    wider = save("wide-0033554-0.050.pkl", (own_golden_folder / "edm2_tiny.pkl").read_bytes())
    edm = save("edm-0033554-0.050.pkl", (own_golden_folder / "edm_tiny.pkl").read_bytes())
    plain = save("plain.pkl", first.read_bytes())
    for arguments, complaint in (
        (["--phema-std", "0.25", *paths], "is out of reach"),
        (["--phema-std", "0.1", first], "is out of reach: the nearest average of 1 snapshots differs"),
        (["--phema-std", "0.07", "--phema-kimg", "9000", *paths], "no snapshot was saved then, only 0008388, 0016777"),
        (["--phema-kimg", "8388", first], "give both"),
        (["--phema-std", "0.07", first, again], "are the same average by their names"),
        (["--phema-std", "0.05", *paths, other_run], "are of different networks (unet.emb_fourier.freqs"),
        (["--phema-std", "0.05", *paths, wider], "are of different networks (img_resolution, img_channels, label_dim"),
        (["--phema-std", "0.05", edm], "is no snapshot of EDM2"),
        (["--phema-std", "0.07", plain], "name must end as EDM2's do"),
        (paths, "6 files: convert one at a time"),
    ):
        assert complaint in refused(*arguments, *out), complaint
    assert not (tmp_path / "b").exists()


# Names ----------------------------------------------------------------------------------------------------------------
def test_presets_name_files_that_say_what_they_are() -> None:
    assert len(presets.PRESETS) == 36
    for preset in presets.PRESETS.values():
        for file in preset.files.values():
            assert presets.named(file.name) == file
            resolution, channels = (64, 4) if file.data == "img512" else (64, 3)
            keywords = {
                "img_resolution": resolution, "img_channels": channels, "label_dim": 0 if file.unconditional else 1000,
                "model_channels": presets.CHANNELS[file.size],
            }  # fmt: skip
            assert not file.contradiction("EDM2Precond", keywords)
            assert file.contradiction("EDM2Precond", keywords | {"model_channels": 8}) and file.contradiction("DiT", {})
        assert (preset.weight == 1) == (preset.reference is None)
    published = presets.PRESETS["edm2-img512-s-autog-fid"]
    assert (published.net.name, published.weight) == ("edm2-img512-s-2147483-0.070.pkl", 2.1)
    assert published.reference and published.reference.name == "edm2-img512-xs-0134217-0.125.pkl"


@pytest.mark.parametrize(
    "name", ["edm2_tiny.pkl", "edm2-img512-xsm.pkl", "edm2-img32-s-1-0.1.pkl", "my-edm2-img64-s.pkl"]
)
def test_presets_other_names_say_nothing(name: str) -> None:
    assert presets.named(name) is None


@pytest.mark.parametrize("size", ["xs", "xxl"])
def test_edm2_published_sizes_are_known_by_their_tensors(size: str) -> None:
    keywords = {
        "img_resolution": 64, "img_channels": 4, "label_dim": 1000, "model_channels": presets.CHANNELS[size],
    }  # fmt: skip
    with torch.device("meta"):
        tensors = nets.build("EDM2Precond", **keywords).state_dict()
    millions = {"xs": 125, "xxl": 1523}
    assert round(sum(v.numel() for n, v in tensors.items() if "logvar" not in n) / 1e6) == millions[size]
    found = edm2.score_keywords(tensors, {}, size)
    with torch.device("meta"):
        again = nets.build("EDM2Precond", **found).state_dict()
    assert {name: value.shape for name, value in again.items()} == {name: v.shape for name, v in tensors.items()}
