"""What no file says: taken from the bundle, else from the authors' default, always printed, never a silent guess."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file
from torch import nn

from dgfast import bundle as bundles
from dgfast import nets
from dgfast.checkpoints.account import Assumed, account
from dgfast.convert import main
from dgfast.networks import load
from dgfast.noise_levels import TIME_SCHEDULES
from dgfast.sample import main as sample

FilledNet = Callable[..., nn.Module]
DIT = {"input_size": 8, "hidden_size": 32, "depth": 1, "num_heads": 2}
ADM = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1", "attention_resolutions": "8"}
ENCODER = {
    "image_size": 64, "in_channels": 3, "model_channels": 64, "out_channels": 10, "num_res_blocks": 1,
    "attention_resolutions": [], "channel_mult": [1], "pool": "adaptive",
}  # fmt: skip


def settings(keywords: dict[str, Any]) -> list[str]:
    return [part for name, value in keywords.items() for part in ("--set", f"{name}={value}")]


def convert(file: Path, role: str, out: Path, *options: str) -> str:
    """What the conversion prints."""
    result = CliRunner().invoke(main, [str(file), "--role", role, "--out", str(out), *options])
    assert result.exit_code == 0, result.output
    return result.output


def rows(output: str) -> dict[str, list[str]]:
    """The table of what is not in the file: [value, because, otherwise] by name, where each takes one line."""
    lines = output.split("not in the file")[1].splitlines()[1:]
    return {cells[0]: cells[1:] for cells in ([cell for cell in line.strip().split("  ") if cell] for line in lines)}


def stripped(cells: Iterable[str]) -> list[str]:
    return [cell.strip() for cell in cells]


@pytest.fixture
def adm(tmp_path: Path, filled_net: FilledNet) -> Callable[..., tuple[Path, list[str]]]:
    """(learns its variance) -> the file of a small U-Net of guided-diffusion's code for 64 x 64, and its options."""

    def make(learn_sigma: bool = False) -> tuple[Path, list[str]]:
        net = filled_net("create_model", {"image_size": 64, "learn_sigma": learn_sigma, **ADM}, "assumed/adm/")
        torch.save(net.state_dict(), tmp_path / "net.pt")
        shape = {"model_type": "create_model", "img_resolution": 64, "img_channels": 3, "learn_sigma": learn_sigma}
        return tmp_path / "net.pt", ["--kind", "DDPMPrecond", *settings({**shape, **ADM})]

    return make


@pytest.fixture
def classifier(tmp_path: Path, filled_net: FilledNet) -> tuple[Path, list[str]]:
    """The file of a small noise-aware classifier of 64 x 64 images, and its options."""
    torch.save(filled_net("EncoderUNetModel", ENCODER, "assumed/encoder/").state_dict(), tmp_path / "classifier.pt")
    return tmp_path / "classifier.pt", ["--kind", "EncoderUNetModel", *settings(ENCODER)]


# How its authors sample -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("learn_sigma", "variance"), [(False, "large"), (True, "small")])
def test_adm_without_learned_variance_gets_its_authors_large_one(
    adm: Callable[..., Any], tmp_path: Path, learn_sigma: bool, variance: str
) -> None:
    file, options = adm(learn_sigma)
    output = convert(file, "score", tmp_path / "b", *options)
    assert bundles.read(tmp_path / "b").sampling.fixed_variance == variance
    assert ("fixed_variance" in output) == (not learn_sigma) == ("dgfast sample --fixed-variance" in output)


def test_dit_without_learned_variance_gets_the_large_one_too(tmp_path: Path, filled_net: FilledNet) -> None:
    net = filled_net("DiT", {**DIT, "learn_sigma": False, "num_classes": 3}, "assumed/dit/")
    torch.save(net.state_dict(), tmp_path / "dit.pt")
    convert(tmp_path / "dit.pt", "score", tmp_path / "b", "--set", "num_heads=2")
    assert bundles.read(tmp_path / "b").sampling.fixed_variance == "large"


# The label table of a DiT ---------------------------------------------------------------------------------------------
@pytest.fixture
def dit(tmp_path: Path, filled_net: FilledNet) -> Callable[[int], Path]:
    """(rows of the label table) -> a file."""

    def make(rows: int) -> Path:
        keywords = {**DIT, "num_classes": rows, "class_dropout_prob": 0.0}
        torch.save(filled_net("DiT", keywords, f"assumed/{rows}/").state_dict(), tmp_path / f"{rows}.pt")
        return tmp_path / f"{rows}.pt"

    return make


@pytest.mark.parametrize(
    ("rows_", "told", "classes", "null_class", "assumed"),
    [
        pytest.param(10, [], 9, 9, "above 0", id="ten_rows"),
        pytest.param(10, ["class_dropout_prob=0"], 10, None, None, id="ten_classes"),
        pytest.param(10, ["class_dropout_prob=0.0"], 10, None, None, id="ten_classes_as_a_fraction"),
        pytest.param(10, ["class_dropout_prob=0.2"], 9, 9, None, id="nine_classes_told"),
        pytest.param(10, ["label_dim=10"], 10, None, None, id="ten_classes_by_their_number"),
        pytest.param(10, ["label_dim=9"], 9, 9, None, id="nine_classes_by_their_number"),
        pytest.param(1, [], 1, None, "0", id="one_row"),
        pytest.param(1, ["class_dropout_prob=0"], 1, None, None, id="one_class"),
    ],
)
def test_dit_label_rows_are_classes_or_a_null_class(
    dit: Callable[[int], Path], tmp_path: Path, rows_: int, told: list[str], classes: int, null_class: int | None,
    assumed: str | None,
) -> None:  # fmt: skip
    options = [part for setting in ["num_heads=2", *told] for part in ("--set", setting)]
    output = convert(dit(rows_), "score", tmp_path / "b", *options)
    score: Any = load(tmp_path / "b").denoiser
    assert (score.label_dim, score.null_class) == (classes, null_class)
    cells = rows(output).get("class_dropout_prob")
    assert (cells and cells[0].strip()) == assumed


@pytest.mark.parametrize("told", ["class_dropout_prob=0.1", "label_dim=0"])
def test_dit_with_no_row_for_a_class_is_refused(dit: Callable[[int], Path], tmp_path: Path, told: str) -> None:
    options = ["--role", "score", "--set", "num_heads=2", "--set", told, "--out", str(tmp_path / "b")]
    result = CliRunner().invoke(main, [str(dit(1)), *options])
    assert result.exit_code == 2 and "leave out --set class_dropout_prob" in result.output, result.output
    assert not (tmp_path / "b").exists()


def test_dit_of_one_class_samples_and_refuses_classifier_free_guidance(
    dit: Callable[[int], Path], tmp_path: Path
) -> None:
    from diffusers import AutoencoderKL

    kind: Any = AutoencoderKL  # diffusers leaves it unannotated
    vae = kind(latent_channels=4, block_out_channels=(8,), norm_num_groups=4)
    vae.save_pretrained(tmp_path / "vae")
    convert(dit(1), "score", tmp_path / "b", "--set", "num_heads=2", "--vae", str(tmp_path / "vae"))
    job = ["--bundle", str(tmp_path / "b"), "--respacing", "2", "--seeds", "0-1", "--device", "cpu"]
    result = CliRunner().invoke(sample, [*job, "--out", str(tmp_path / "drawn")])
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(sample, [*job, "--cfg-scale", "2", "--out", str(tmp_path / "guided")])
    assert result.exit_code == 2 and "trained without labels too" in result.output, result.output


# The time that a classifier reads -------------------------------------------------------------------------------------
def reads(folder: Path) -> str:
    """Which schedule's time the bundle's classifier reads."""
    sigma = torch.tensor([0.05, 0.5, 5.0], dtype=torch.float64)
    time = load(folder).time(sigma).double()
    near = [name for name, schedule in TIME_SCHEDULES.items() if torch.allclose(time, schedule(sigma), atol=2e-3)]
    assert len(near) == 1, time
    return near[0]


@pytest.mark.parametrize("first", ["score", "classifier"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_classifier_reads_the_time_of_the_bundles_score_network(
    adm: Callable[..., Any], classifier: tuple[Path, list[str]], tmp_path: Path, first: str, schedule: str
) -> None:
    file, options = adm()
    steps = {
        "score": (file, [*options, "--set", f"noise_schedule={schedule}"]),
        "classifier": classifier,
    }
    printed = {}
    for role in (first, *(role for role in steps if role != first)):
        printed[role] = convert(steps[role][0], role, tmp_path / "b", *steps[role][1])
    assert reads(tmp_path / "b") == schedule
    if first == "score":
        assert stripped(rows(printed["classifier"])["time_schedule"])[:2] == [schedule, "this bundle's score network's"]
    else:
        assert "time_schedule" in rows(printed["classifier"])
        assert stripped(rows(printed["score"])["classifier's time"])[0] == schedule


def test_classifier_of_64_pixels_beside_a_network_without_a_schedule_reads_cosine_time(
    classifier: tuple[Path, list[str]], tmp_path: Path, tiny_net: Callable[..., nn.Module]
) -> None:
    keywords: dict[str, Any] = {"img_resolution": 64, "img_channels": 3, "model_type": "SongUNet", "model_channels": 8}
    keywords |= {"channel_mult": [1], "num_blocks": 1, "attn_resolutions": []}
    save_file(nets.build("EDMPrecond", **keywords).state_dict(), tmp_path / "edm.safetensors")
    options = ["--kind", "EDMPrecond", *settings(keywords)]
    convert(tmp_path / "edm.safetensors", "score", tmp_path / "before", *options)
    for folder in ("before", "after"):
        output = convert(classifier[0], "classifier", tmp_path / folder, *classifier[1])
        assert stripped(rows(output)["time_schedule"])[0] == "cosine"
    convert(tmp_path / "edm.safetensors", "score", tmp_path / "after", *options)
    assert reads(tmp_path / "before") == reads(tmp_path / "after") == "cosine"


@pytest.mark.parametrize("first", ["score", "classifier"])
def test_classifiers_time_that_is_told_stays_and_a_difference_is_said(
    adm: Callable[..., Any], classifier: tuple[Path, list[str]], tmp_path: Path, first: str
) -> None:
    steps = {"score": adm(), "classifier": (classifier[0], [*classifier[1], "--time-schedule", "cosine"])}
    printed = ""
    for role in (first, *(role for role in steps if role != first)):
        printed = convert(steps[role][0], role, tmp_path / "b", *steps[role][1])
    assert reads(tmp_path / "b") == "cosine"
    assert "told" in printed.split("not in the file")[1] and "has linear" in " ".join(printed.split())


# What the constructors take for what nobody tells ---------------------------------------------------------------------
def test_defaults_that_no_shape_shows_are_printed(adm: Callable[..., Any], tmp_path: Path) -> None:
    file, options = adm()
    printed = rows(convert(file, "score", tmp_path / "b", *options))
    unseen = {"noise_schedule", "steps", "predict_xstart", "rescale_timesteps", "num_heads", "use_new_attention_order"}
    assert stripped(printed["num_heads"])[0] == "4", "as guided-diffusion's scripts have it, unlike its constructor"
    assert unseen <= printed.keys() and not printed.keys() & {"dropout", "resblock_updown", "use_fp16", "learn_sigma"}
    told = ["--set", "num_heads=4", "--set", "steps=500", "--set", "predict_xstart=True"]
    printed = rows(convert(file, "score", tmp_path / "told", *options, *told))
    assert not printed.keys() & {"num_heads", "steps", "predict_xstart"}
    net: Any = load(tmp_path / "told").denoiser
    assert net.predict_xstart is True and len(net.levels) == 500


def test_encoders_channels_a_head_are_printed_because_they_go_before_heads(
    classifier: tuple[Path, list[str]], tmp_path: Path
) -> None:
    printed = rows(convert(classifier[0], "classifier", tmp_path / "b", *classifier[1], "--set", "num_heads=2"))
    assert stripped(printed["num_head_channels"])[:2] == ["64", "dgfast's default"]


@pytest.mark.parametrize(("spelling", "value"), [("True", True), ("False", False), ("true", True), ("None", None)])
def test_set_reads_words_as_guided_diffusion_has_them(spelling: str, value: object) -> None:
    from dgfast.convert import _keywords

    assert _keywords(None, (f"learn_sigma={spelling}",)) == {"learn_sigma": value}


# The table ------------------------------------------------------------------------------------------------------------
def test_table_is_aligned_and_not_wider_than_a_page() -> None:
    read = {"file": "x.pt, a file", "by shapes": ", ".join(f"keyword_{i} 5" for i in range(30)), "told": ""}
    assumed = [Assumed("a", 1, "short", "--set a=..."), Assumed("name", float("inf"), "many words " * 8, "")]
    lines = account(read, assumed).splitlines()
    assert max(map(len, lines)) <= 100 and not any("told" in line for line in lines)
    header, first, second, *wrapped = lines[lines.index("") + 1 :]
    assert [header.index(word) for word in ("value", "because", "otherwise")] == [
        first.index(word) for word in ("1", "short", "--set")
    ]
    assert (
        second.split()[:3] == ["name", "inf", "many"] and wrapped and wrapped[0].startswith(" " * header.index("bec"))
    )


# Weights that diverged ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300], ids=["nan", "inf", "beyond_float32"])
def test_tensors_that_are_not_finite_are_named_and_refused(
    dit: Callable[[int], Path], tmp_path: Path, bad: float
) -> None:
    tensors = torch.load(dit(3), weights_only=True)
    tensors["blocks.0.attn.qkv.bias"] = tensors["blocks.0.attn.qkv.bias"].double()
    tensors["blocks.0.attn.qkv.bias"][:2] = bad
    tensors["x_embedder.proj.bias"][0] = float("nan")
    torch.save({"ema": tensors}, tmp_path / "diverged.pt")
    options = ["--role", "score", "--set", "num_heads=2", "--out", str(tmp_path / "b")]
    result = CliRunner().invoke(main, [str(tmp_path / "diverged.pt"), *options])
    assert result.exit_code == 2 and result.output.count("\n") == 1 and not (tmp_path / "b").exists()
    for said in (
        "diverged.pt has weights that are not finite",
        "blocks.0.attn.qkv.bias (2 of 96",
        "x_embedder.proj.bias",
    ):
        assert said in result.output


@pytest.mark.parametrize(("first", "second"), [("score", "reference"), ("reference", "score")])
def test_a_second_denoiser_has_the_time_of_the_first(
    tmp_path: Path, filled_net: FilledNet, first: str, second: str
) -> None:
    torch.save(filled_net("DiT", {**DIT, "num_classes": 3}, "assumed/sibling/").state_dict(), tmp_path / "net.pt")
    heads = ["--set", "num_heads=2"]
    convert(tmp_path / "net.pt", first, tmp_path / "b", *heads, "--set", "noise_schedule=cosine", "--set", "steps=500")
    table = rows(convert(tmp_path / "net.pt", second, tmp_path / "b", *heads, "--set", "rescale_timesteps=true"))
    assert stripped(table["noise_schedule"][:2]) == ["cosine", f"this bundle's {first} network's"]
    assert stripped(table["steps"][:1]) == ["500"]
    keywords = bundles.read(tmp_path / "b").nets[second].keywords
    assert (keywords["noise_schedule"], keywords["steps"], keywords["rescale_timesteps"]) == ("cosine", 500, True)
