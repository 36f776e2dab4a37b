"""What an exported file is tried with: a case that says less than it seems to would let a wrong file pass."""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dgfast.config import GuidanceConfig, SamplingConfig
from dgfast.export import self_test
from dgfast.export.joint_graph import joint as made
from dgfast.export.parity import Case, Report, Row, compare, signature
from dgfast.export.subject import GeneratorSubject, Joint
from dgfast.graph.agreement import relative_error
from dgfast.guidance.declaration import off_values
from dgfast.networks import Networks

SIGMAS = (80.0, 9.0, 1.5, 0.2, 0.002, 0.0)


def guided(x: Tensor, sigma: Tensor, labels: Tensor, weight: Tensor, boost: Tensor) -> tuple[Tensor, Tensor]:
    """A stand-in for a guided denoiser: half the image, less a little of the weight, more where it is bright."""
    return 0.5 * x - 1e-3 * (weight * boost).view(-1, 1, 1, 1) * (1 + (x > 0)) + 0 * labels.sum(), sigma * 0


def joint(what: str = "denoiser", function: Any = guided, **own: Any) -> Joint:
    inputs = ("x", "sigma", "class_labels", "dg_weight", "dg_boost")
    outputs = {"denoiser": ("denoised", "log_ratio"), "step": ("x_next",)}.get(
        what, ("denoised", "shift", "variance", "log_ratio")
    )
    fields: dict[str, Any] = {"inputs": inputs, "weights": {"dg_weight": 2.0, "dg_boost": 2.0}, "sigmas": SIGMAS}
    return Joint(what, function, outputs=outputs, label_dim=3, **fields | {"image": (1, 4, 4)} | own)


# The inputs -----------------------------------------------------------------------------------------------------------
def test_case_is_noise_of_its_levels_with_all_that_the_inputs_name() -> None:
    names = ("x", "sigma", "sigma_next", "class_labels", "log_least", "log_most", "dg_weight")
    subject = joint(inputs=names, weights={"dg_weight": 2.0}, image=(1, 40, 40))
    levels = [30.0, 0.01, 2.0]
    inputs = subject.case("a", levels, seed=3).inputs
    assert tuple(inputs) == names
    assert inputs["sigma"].tolist() == pytest.approx(levels)
    assert inputs["sigma_next"].tolist() == pytest.approx([0.8 * level for level in levels])
    for image, level in zip(inputs["x"], levels, strict=True):
        assert float(image.std()) == pytest.approx(math.hypot(0.5, level), rel=0.1)
    share = [level**2 / (1 + level**2) for level in levels]
    assert inputs["log_least"].tolist() == pytest.approx([math.log(0.2 * s) for s in share], rel=1e-4)
    assert inputs["log_most"].tolist() == pytest.approx([math.log(0.4 * s) for s in share], rel=1e-4)
    assert inputs["class_labels"].shape == (3, 3) and inputs["class_labels"].sum(1).tolist() == [1, 1, 1]
    assert inputs["dg_weight"].tolist() == [2.0]
    assert subject.case("a", levels, 3, {"dg_weight": 0.5}).inputs["dg_weight"].tolist() == [0.5]
    assert not torch.equal(subject.case("a", levels, 4).inputs["x"], inputs["x"])
    again = subject.case("a", levels, 3).inputs
    assert all(torch.equal(again[name], inputs[name]) for name in names)


def test_case_has_what_is_known_of_images_for_every_sample_in_memory_of_its_own() -> None:
    """A package takes no tensor whose samples lie in one place."""
    known = torch.rand(1, 1, 4, 4)
    inputs = ("x", "sigma", "observed")
    subject = joint(inputs=inputs, weights={}, image=(1, 4, 4), images={"observed": known})
    observed = subject.case("", [1.0, 2.0], seed=0).inputs["observed"]
    assert torch.equal(observed, known.repeat(2, 1, 1, 1)) and observed.is_contiguous()
    assert subject.sizes()["observed"] == (1, 4, 4)


def test_cases_have_every_class_and_the_least_size_of_a_noise_predictor() -> None:
    classes = {
        int(row.argmax()) for seed in range(8) for row in joint().case("", [1.0] * 4, seed).inputs["class_labels"]
    }
    assert classes == {0, 1, 2}
    assert "denoised" not in joint().case("", [1.0], 0).least
    case = joint(predicts_noise=True).case("", [50.0], 0)
    assert float(case.least["denoised"]) == pytest.approx(0.01 * float(case.inputs["x"].abs().max()))


def test_cases_meet_every_noise_level_and_the_guidance_amplified() -> None:
    for batch in (1, 3, 5, 12):
        cases = joint().cases(batch)
        usual, raised = cases[::2], cases[1::2]
        levels = {round(float(s), 6) for case in usual for s in case.inputs["sigma"]}
        every = {80.0, 0.5, 5.0, 0.01, 0.1, 160.0, 1.0, 20.0, 0.002, 2.0}
        assert levels == (every if batch > 1 else {80.0, 5.0, 0.1, 1.0, 0.002})  # one at a time, every other one
        assert all(len(case.inputs["x"]) == batch for case in cases)
        assert all(case.name.endswith(", amplified") for case in raised) and len(raised) == len(usual)
        assert all(case.name.startswith(f"batch {batch}, sigma ") for case in cases)
        assert usual[0].name.endswith("...") == (batch > 5)
    plain = joint(weights={}, inputs=("x", "sigma"), function=lambda x, s: (x, s)).cases(2)
    assert not any("amplified" in case.name for case in plain) and len(plain) == 5


def test_cases_of_a_step_include_the_last_one_to_sigma_zero() -> None:
    names = ("x", "sigma", "sigma_next", "dg_weight")

    def step(x: Tensor, sigma: Tensor, sigma_next: Tensor, weight: Tensor) -> tuple[Tensor]:
        return (x * 0.5 + 1e-2 * weight,)

    subject = joint("step", step, inputs=names, weights={"dg_weight": 2.0})
    last = [case for case in subject.cases(2) if "last step" in case.name]
    assert len(last) == 1 and last[0].inputs["sigma_next"].tolist() == [0.0, 0.0]
    assert not [case for case in joint().cases(2) if "last step" in case.name]


def test_amplified_guidance_is_as_large_as_the_image() -> None:
    """An error in the guidance is then an error of the same share; the boost is a factor of it and stays."""
    subject = joint()
    case = subject.amplified("", [1.0, 5.0], seed=2)
    assert case.inputs["dg_boost"].tolist() == [2.0]
    off = {**case.inputs, "dg_weight": torch.zeros(1)}
    plain = subject(off)["denoised"]
    guidance = (subject(case.inputs)["denoised"] - plain).abs().amax((1, 2, 3)) / plain.abs().amax((1, 2, 3))
    assert float(guidance.max()) == pytest.approx(1.0, rel=1e-3)
    still = joint(function=lambda x, *rest: (x, rest[0])).amplified("", [1.0], seed=2)  # what no weight moves
    assert still.inputs["dg_weight"].tolist() == [2.0]


def test_reference_is_computed_in_double_precision() -> None:
    seen: dict[str, torch.dtype] = {}

    def function(*arguments: Tensor) -> tuple[Tensor, Tensor]:
        seen.update(zip(joint().inputs, (a.dtype for a in arguments), strict=True))
        return arguments[0], arguments[1]

    results = joint(function=function)(joint().example(2, 1))
    assert {name for name, dtype in seen.items() if dtype == torch.float64} == {"x", "sigma"}
    assert list(results) == ["denoised", "log_ratio"] and all(x.dtype == torch.float32 for x in results.values())


# Whole runs -----------------------------------------------------------------------------------------------------------
def drawn(subject: Joint, share: float) -> Row:
    """A whole run against one that is off by this share at each call."""

    def candidate(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: x * (1 + share) for name, x in subject(inputs).items()}

    (row,) = subject.whole_run(subject, candidate, batch=2, tolerance=1e-3)
    return row


@pytest.mark.parametrize("what", ["denoiser", "step", "posterior"])
def test_whole_run_ends_at_the_last_denoised_images_and_measures_the_drift(what: str) -> None:
    def function(*arguments: Tensor) -> tuple[Tensor, ...]:
        x, sigma = arguments[0], arguments[1]
        grey = torch.full_like(x, 0.5)
        return {"denoiser": (grey, sigma), "step": (grey,), "posterior": (grey, 0 * x, 1e-4 + 0 * x, sigma)}[what]

    names = ("x", "sigma", *{"step": ("sigma_next",), "posterior": ("log_least", "log_most")}.get(what, ()))
    subject = joint(what, function, inputs=names, weights={})
    row = drawn(subject, 0.1)
    assert row.error == pytest.approx(0.1 * 0.5 / 2, rel=1e-5)  # of a pixel range of 2
    assert row.problem == "ValueMismatchError" and "2.5e-02 of the pixel range" in row.detail
    assert row.case.startswith("all 5 steps") and row.output == "x" and row.tolerance == 1e-3
    assert drawn(subject, 0.0) == Row(row.case, "x", 0.0, 1e-3, "", "drifts by 0.0e+00 of the pixel range")
    assert drawn(subject, math.nan).error == math.inf and drawn(subject, math.nan).problem


def test_whole_run_is_judged_by_the_worst_image_or_by_all_but_one_in_ten() -> None:
    """In 16 bits one image of eleven that takes another way is no fault of the file; two are, and so is an only one."""

    def off(*shifts: float) -> Callable[[Mapping[str, Tensor]], dict[str, Tensor]]:
        return lambda inputs: {"x_next": torch.zeros_like(inputs["x"]) + torch.tensor(shifts).view(-1, 1, 1, 1)}

    def run(candidate: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], batch: int, share: float) -> Row:
        (row,) = subject.whole_run(subject, candidate, batch, 1e-3, share)
        return row

    subject = joint("step", lambda x, *_: (torch.zeros_like(x),), inputs=("x", "sigma", "sigma_next"), weights={})
    one, two = off(0.2, *[0.0] * 10), off(0.2, 0.1, *[0.0] * 9)
    worst, most = run(one, 11, 1.0), run(one, 11, 0.9)
    assert worst.error == pytest.approx(0.1) and worst.problem and not most.problem and most.error == 0
    assert most.case == f"{worst.case}, 90% of the images"
    assert run(two, 11, 0.9).error == pytest.approx(0.05) and run(two, 11, 0.9).problem
    assert run(off(0.2), 1, 0.9).error == pytest.approx(0.1) and run(off(math.nan), 1, 0.9).error == math.inf


def test_whole_run_follows_the_plan_and_takes_of_a_long_one_every_so_many_th_level() -> None:
    seen: list[tuple[float, float]] = []

    def step(x: Tensor, sigma: Tensor, sigma_next: Tensor) -> tuple[Tensor]:
        seen.append((float(sigma[0]), float(sigma_next[0])))
        return (x,)

    names = ("x", "sigma", "sigma_next")
    short = joint("step", step, inputs=names, weights={})
    short.whole_run(short, short, 1, 1.0)
    assert seen[:5] == seen[5:]
    assert sum(seen[:5], ()) == pytest.approx(sum(pairwise(SIGMAS), ()))
    seen.clear()
    many = (*torch.linspace(80.0, 1.0, 100).tolist(), 0.0)
    long = joint("step", step, inputs=names, weights={}, sigmas=many)
    (row,) = long.whole_run(long, long, 1, 1.0)
    assert row.case.startswith("34 of 100 steps") and len(seen) == 2 * 34
    assert [sigma for sigma, _ in seen[:34]] == pytest.approx(list(many[:-1:3])) and seen[33][1] == 0


def test_generator_is_tried_with_latents_as_drawn_far_off_and_without_class() -> None:
    subject = GeneratorSubject(lambda z, y: (z + y.sum(),), ("latents", "class_labels"), 6, 3, (1, 4, 4))
    usual, far, none = subject.cases(4)
    assert usual.inputs["latents"].shape == (4, 6) and float(usual.inputs["latents"].std()) == pytest.approx(1, abs=0.4)
    assert torch.equal(far.inputs["latents"], 4 * usual.inputs["latents"])
    assert not none.inputs["class_labels"].any() and far.inputs["class_labels"].sum(1).tolist() == [1.0] * 4
    (images,) = subject(usual.inputs).values()
    assert torch.equal(images, usual.inputs["latents"] + 4) and list(subject(usual.inputs)) == ["images"]
    unconditional = GeneratorSubject(lambda z: (z,), ("latents",), 6, 0, (1, 4, 4))
    assert len(unconditional.cases(2)) == 2 and list(unconditional.example(2, 1)) == ["latents"]
    assert subject.whole_run(subject, subject, 2, 0.1) == []
    assert subject.sizes() == {"latents": (6,), "class_labels": (3,), "images": (1, 4, 4)}


# The report -----------------------------------------------------------------------------------------------------------
def test_compare_judges_each_output_by_its_own_tolerance_and_least_size() -> None:
    ones = {"a": torch.ones(1, 2), "b": torch.ones(1, 2)}
    off = {name: 1.01 * x for name, x in ones.items()}
    rows = compare(lambda _: ones, lambda _: off, [Case("c", {})], {"a": 0.1, "b": 0.001}).rows
    assert [row.problem for row in rows] == ["", "ValueMismatchError"] and rows[1].tolerance == 0.001
    least = Case("c", {}, {"b": torch.tensor([100.0])})
    assert compare(lambda _: ones, lambda _: off, [least], {"a": 0.1, "b": 0.001}).passed
    exact = compare(lambda _: ones, lambda _: {"a": torch.full((1, 2), 1.5), "b": ones["b"]}, [Case("c", {})], 0.5)
    assert exact.passed and exact.worst == {"a": 0.5, "b": 0.0}  # the tolerance itself is allowed
    other = compare(lambda _: ones, lambda _: {"b": ones["b"], "a": ones["a"]}, [Case("c", {}), Case("d", {})], 1.0)
    assert [row.problem for row in other.rows] == ["NameMismatchError"] * 2
    assert other.rows[0].detail == "outputs b, a, not a, b"


def test_report_is_a_table_of_aligned_columns_and_names_its_first_bad_row() -> None:
    rows = [Row("long name", "y", 1e-6, 1e-4), Row("b", "z", 0.5, 1e-4, "ValueMismatchError", "differs")]
    text = Report(rows, {"bundle": "small"}).table().splitlines()
    assert text == [
        "bundle: small",
        "case       output  error    allowed",
        "long name  y       1.0e-06  1e-04    ok",
        "b          z       5.0e-01  1e-04    ValueMismatchError",
    ]
    with pytest.raises(Exception, match=r"^b: z: differs$") as caught:
        Report([*rows, Row("c", "q", 9.0, 1.0, "NameMismatchError")]).check()
    assert type(caught.value).__name__ == "ValueMismatchError" and getattr(caught.value, "exit_code", 0) == 1


def test_signature_says_what_was_found_in_the_place_of_what() -> None:
    expected = {"x": (("n", 3), "float"), "y": ((2,), "float")}

    def row(**found: Any) -> Row:
        (only,) = signature(expected, expected | found, "inputs")
        return only

    assert row(x=(("n", 3), "half")) == Row("signature", "x", math.inf, 0.0, "DtypeMismatchError", "half, not float")
    assert row(y=(("n",), "float")) == Row("signature", "y", math.inf, 0.0, "AxesMismatchError", "axes ['n'], not [2]")
    assert row(y=((4,), "float")) == Row("signature", "y", math.inf, 0.0, "ShapeMismatchError", "[4], not [2]")
    (names,) = signature(expected, {"y": expected["y"], "x": expected["x"]}, "inputs")
    assert names == Row("signature", "inputs", math.inf, 0.0, "NameMismatchError", "y, x, not x, y")
    (found,) = compare(lambda _: {"a": torch.ones(1)}, lambda _: {}, [Case("c", {})], 1.0).rows
    assert found == Row("c", "outputs", math.inf, 0.0, "NameMismatchError", "outputs , not a")
    (found,) = compare(lambda _: {"a": torch.ones(1, 2)}, lambda _: {"a": torch.ones(2)}, [Case("c", {})], 0.5).rows
    assert found == Row("c", "a", math.inf, 0.5, "ShapeMismatchError", "shape [2], not [1, 2]")


# What a built engine is tried with ------------------------------------------------------------------------------------
def file_of(**inputs: tuple[Any, ...]) -> Any:
    return SimpleNamespace(
        inputs={name: (sizes, "tensor(float)") for name, sizes in inputs.items()}, metadata={"predicts_noise": "true"}
    )


def test_self_test_leaves_no_weight_off_and_no_two_alike() -> None:
    off = off_values()
    assert {"dg_boost", "cfg_scale", "cfg_scale_low", "autoguidance"} <= {name for name in off if off[name] == 1}
    fed = self_test.case(file_of(x=("n", 1, 4, 4), **{name: (1,) for name in off}), 2).inputs
    assert all(float(fed[name]) != value for name, value in off.items())
    assert len({float(fed[name]) for name in off}) == len(off)


@pytest.mark.parametrize(
    "guidance",
    [
        GuidanceConfig(dg_weight=1.0, boosting=True, autoguidance=2.0),
        GuidanceConfig(cfg_scale=2.0, cfg_scale_low=3.0, cfg_branch=1.0),
    ],
    ids=["boosting, autoguidance", "two scales"],
)
def test_self_test_sees_every_branch(
    guidance: GuidanceConfig, tiny_net: Callable[..., Any], small_discriminator: Callable[[int], Any]
) -> None:
    """A branch that does nothing, as if its weight were off, is another function there."""
    net, reference = tiny_net(label_dim=3, channel_mult=[1]), tiny_net(label_dim=3, channel_mult=[1], prefix="worse/")
    networks = Networks(net, small_discriminator(3), reference=reference)
    subject = made(networks, SamplingConfig(num_steps=3), guidance, "denoiser")
    sizes = {name: ((1,) if name in subject.weights else ("n", *subject.sizes()[name])) for name in subject.inputs}
    inputs = self_test.case(file_of(**sizes), self_test.MOST).inputs
    whole = subject(inputs)["denoised"]
    assert len(subject.weights) > 1
    for name in subject.weights:
        without = subject({**inputs, name: torch.full((1,), off_values()[name])})["denoised"]
        assert relative_error(without, whole) > 1e-3, name


def test_self_test_has_every_kind_of_input() -> None:
    file = file_of(
        x=("n", 1, 40, 40), sigma=("n",), sigma_next=("n",), class_labels=("n", 3), log_least=("n",), log_most=("n",),
        dg_weight=(1,),
    )  # fmt: skip
    case = self_test.case(file, 8)
    inputs = case.inputs
    levels = [0.5, 3.0, 0.01, 20.0, 80.0, 1.2, 0.5, 3.0]
    assert self_test.MOST == 6 and case.name == "batch 8" and list(inputs) == list(file.inputs)
    assert inputs["sigma"].tolist() == pytest.approx(levels)
    assert inputs["sigma_next"].tolist() == pytest.approx([0.8 * level for level in levels])
    assert inputs["class_labels"].argmax(1).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert inputs["class_labels"].sum(1).tolist() == [1.0] * 8
    assert inputs["log_least"].tolist() == [-2.0] * 8 and inputs["log_most"].tolist() == [-1.0] * 8
    assert inputs["dg_weight"].tolist() == [1.5]
    for image, level in zip(inputs["x"], levels, strict=True):
        assert float(image.std()) == pytest.approx(0.5 + level, rel=0.1)
    assert case.least["denoised"].tolist() == pytest.approx((0.01 * inputs["x"].abs().flatten(1).amax(1)).tolist())
    assert torch.equal(self_test.case(file, 8).inputs["x"], inputs["x"])
    assert not torch.equal(self_test.case(file, 8, seed=1).inputs["x"], inputs["x"])
    assert self_test.case(file_of(x=(2, 1, 4, 4)), 2).inputs["x"].shape == (2, 1, 4, 4)
    latents = self_test.case(file_of(latents=("n", 500)), 2).inputs["latents"]
    assert latents.shape == (2, 500) and float(latents[1].std()) == pytest.approx(3.5, rel=0.2)


def test_self_test_is_saved_as_arrays_of_both_sides(tmp_path: Path) -> None:
    path = tmp_path / "self_test.npz"
    self_test.save(path, {"x": torch.ones(2, 3)}, {"y": torch.zeros(2)})
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file.files) == ["input/x", "output/y"]
        assert file["input/x"].tolist() == [[1.0] * 3] * 2 and file["output/y"].dtype == np.float32
