"""Training checkpoints: whose tensors are taken, and what is said of the choice."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dgfast import bundle as bundles
from dgfast.checkpoints import openai_pt
from dgfast.checkpoints.torch_file import Opaque
from dgfast.checkpoints.wrappers import StateDict, unwrap
from dgfast.convert import main
from dgfast.errors import UserError

DIT = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
A, B = torch.full((2,), 1.0), torch.full((2,), 2.0)  # averaged weights, and the others


def read(tmp_path: Path, content: Any, key: str | None = None) -> StateDict:
    torch.save(content, tmp_path / "x.pt")
    return openai_pt.read(tmp_path / "x.pt", key)


def taken(tmp_path: Path, content: Any, key: str | None = None) -> dict[str, float]:
    """The tensors that are taken: their names, and which they are."""
    return {name: float(value[0]) for name, value in read(tmp_path, content, key).tensors.items()}


@pytest.mark.parametrize(
    ("content", "part"),
    [
        pytest.param({"x.w": A, "y.w": A}, "", id="bare"),
        pytest.param({"model": {"x.w": B}, "ema": {"x.w": A, "y.w": A}, "opt": {"state": {0: B}}}, "ema", id="dit"),
        pytest.param({"ema": {"x.w": A, "y.w": A}, "net": {"x.w": B}, "ema_decay": 0.999}, "ema", id="edm"),
        pytest.param({"state_dict": {"x.w": A, "y.w": A}, "epoch": 3, "callbacks": {}}, "state_dict", id="lightning"),
        pytest.param({"params": {"x.w": B}, "params_ema": {"x.w": A, "y.w": A}}, "params_ema", id="restoration"),
        pytest.param({"model": {"x.w": A, "y.w": A}, "ema": None, "step": 5}, "model", id="without_average"),
        pytest.param({"model": {"state_dict": {"x.w": A, "y.w": A}}}, "model.state_dict", id="nested"),
        pytest.param({"weights": {"x.w": A, "y.w": A}, "rng": torch.get_rng_state()}, "weights", id="the_only_one"),
        pytest.param({"state_dict": {"net.x.w": B, "ema.x.w": A, "ema.y.w": A}}, "state_dict.ema", id="by_names"),
        pytest.param(
            {"model": {"x.w": B}, "ema": {"ema_model.x.w": A, "ema_model.y.w": A, "online_model.x.w": B, "step": B}},
            "ema.ema_model", id="average_within",
        ),
    ],
)  # fmt: skip
def test_averaged_weights_go_first_else_the_only_ones(tmp_path: Path, content: Any, part: str) -> None:
    state = read(tmp_path, content)
    assert {name: float(value[0]) for name, value in state.tensors.items()} == {"x.w": 1.0, "y.w": 1.0}
    assert state.part == part


@pytest.mark.parametrize(
    ("names", "taken_off"),
    [
        pytest.param(["module.x.w", "module.y.w"], ("module",), id="parallel"),
        pytest.param(["_orig_mod.x.w", "_orig_mod.y.w"], ("_orig_mod",), id="compiled"),
        pytest.param(["module._orig_mod.x.w", "module._orig_mod.y.w"], ("module", "_orig_mod"), id="both"),
        pytest.param(["_orig_mod.module.x.w", "_orig_mod.module.y.w"], ("module", "_orig_mod"), id="both_turned_round"),
        pytest.param(["net.x.w", "net.y.w"], ("net",), id="attribute_of_a_trainer"),
        pytest.param(["net._orig_mod.x.w", "net._orig_mod.y.w"], ("_orig_mod", "net"), id="compiled_attribute"),
        pytest.param(["x._orig_mod.w", "y.module.w"], ("module", "_orig_mod"), id="wrapped_within"),
        pytest.param(["a.b.c.x.w", "a.b.c.y.w"], ("a", "b", "c"), id="deep"),
    ],
)
def test_wrappers_words_are_taken_off(tmp_path: Path, names: list[str], taken_off: tuple[str, ...]) -> None:
    for content in ({name: A for name in names}, {"ema": {name: A for name in names}, "model": {"x.w": B}}):
        state = read(tmp_path, content)
        assert (sorted(state.tensors), state.taken_off) == (["x.w", "y.w"], taken_off)


def test_names_that_meet_once_a_word_is_taken_off_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has x\.w twice, if module is left out of names: give --key"):
        read(tmp_path, {"module.x.w": A, "x.w": B, "y": A})


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("model", {"x": 2.0, "y": 2.0}),
        ("ema", {"x": 1.0, "y": 1.0}),
        ("state.net", {"x": 3.0, "y": 3.0}),
        ("state.old", {"x": 4.0, "y": 4.0}),
        ("a.b", {"x": 5.0, "y": 5.0}),
    ],
)
def test_key_chooses_a_part_by_keys_and_by_names(tmp_path: Path, key: str, expected: dict[str, float]) -> None:
    def two(value: float) -> dict[str, Tensor]:
        return dict.fromkeys("xy", torch.full((2,), value))

    by_name = {f"{word}.{name}": v for word, value in (("net", 3.0), ("old", 4.0)) for name, v in two(value).items()}
    content = {"model": two(2.0), "ema": two(1.0), "state": by_name, "a.b": two(5.0)}
    assert taken(tmp_path, content, key) == expected


def test_parts_of_safetensors_are_their_names(tmp_path: Path) -> None:
    named = {f"{part}.{name}.w": value.clone() for part, value in (("ema", A), ("model", B)) for name in "xy"}
    save_file(named, tmp_path / "x.safetensors")
    for key, value in ((None, 1.0), ("model", 2.0)):
        tensors = openai_pt.read(tmp_path / "x.safetensors", key).tensors
        assert {name: float(tensor[0]) for name, tensor in tensors.items()} == {"x.w": value, "y.w": value}


def test_counters_and_settings_are_left_out_and_named(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    state = read(tmp_path, AveragedModel(net).state_dict() | {"args": argparse.Namespace(lr=1), "step": 3})
    assert list(state.tensors) == list(net.state_dict())
    assert (state.left_out, state.taken_off) == (("n_averaged", "args", "step"), ("module",))


@pytest.mark.parametrize(
    ("content", "key", "complaint"),
    [
        pytest.param({"model": {"x": A}, "ema": {"shadow": [A]}}, None, "'ema', are a dict and not .*--key", id="list"),
        pytest.param({"model": {"x": A}, "ema": [A]}, None, "'ema', are a list and not tensors", id="bare_list"),
        pytest.param({"model": {"x": A}, "ema": nn.ReLU()}, None, r"are a torch\.nn.*ReLU and not", id="module"),
        pytest.param({"ema_1": {"x": A}, "ema_2": {"x": A}}, None, "parts ema_1, ema_2: choose one", id="two_averages"),
        pytest.param({"ema_1.x": A, "ema_2.x": A}, None, "the parts ema_1, ema_2: choose one", id="two_by_name"),
        pytest.param({"gen": {"x": A}, "disc": {"x": A}}, None, "the parts gen, disc: choose one", id="two_networks"),
        pytest.param({"model": {"x": A}}, "ema", "has no part 'ema'; it has model$", id="no_such_part"),
        pytest.param({"x.w": A, "y.w": A}, "model.z", "has no part 'model.z'; it has x, y$", id="no_such_names"),
        pytest.param({"x": A, "opt": {"state": {0: A}}}, "opt.state", "'state' is of type dict, not", id="optimizer"),
        pytest.param({"model": {"x": A}, "step": 3}, "step", "its part 'step' is of type int, not", id="number"),
        pytest.param({"net": nn.ReLU(), "step": 3}, None, r"no tensors by name, only net \(.*ReLU\)", id="pickled"),
        pytest.param({"x": A, "y": torch.zeros(3, dtype=torch.int8)}, None, "'y' is not a dense tensor", id="integers"),
        pytest.param({"x": A, "more": {"y": A}}, None, "'more' is not a dense tensor", id="both"),
        pytest.param({}, None, "no tensors by name: save net.state_dict", id="empty"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_refused_by_name(tmp_path: Path, content: Any, key: str | None, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        read(tmp_path, content, key)
    assert caught.value.message.isprintable()


def test_parts_that_hold_themselves_or_are_named_again_and_again_come_to_an_end() -> None:
    endless: dict[str, Any] = {}
    endless |= {f"ema{i}": endless for i in range(1000)}
    large: dict[str, Any] = {str(i): i for i in range(10_000)}
    for content in (endless, {f"part {i}": large for i in range(10_000)}):
        with pytest.raises(UserError, match="no tensors by name"):
            unwrap(content, None, "x.pt")
    assert list(unwrap({"ema": endless, "x": A}, None, "x.pt").tensors) == ["x"]
    inner: dict[str, Any] = {"x": A}
    inner["model"] = inner
    with pytest.raises(UserError, match="parts within parts"):
        unwrap(inner, None, "x.pt")


_WORDS = st.sampled_from(
    ["ema", "model", "net", "state_dict", "module", "_orig_mod", "x", "y", "", ".", "a.b", "\x1b", "é"]
)
_NAMES = st.one_of(_WORDS, st.lists(_WORDS, max_size=4).map(".".join), st.integers(), st.none())
_VALUES = st.one_of(
    st.sampled_from([A, B, torch.zeros(0), torch.tensor(3), torch.zeros(2, dtype=torch.bool), Opaque("a.b")]),
    st.none(), st.integers(), st.text(max_size=3),
)  # fmt: skip
_TREES = st.recursive(_VALUES, lambda inner: st.one_of(st.lists(inner), st.dictionaries(_NAMES, inner)), max_leaves=20)


@settings(max_examples=300)
@given(content=_TREES, key=st.one_of(st.none(), _WORDS, st.text(max_size=5)))
def test_any_content_is_unwrapped_or_refused_in_one_line(content: Any, key: str | None) -> None:
    try:
        state = unwrap(content, key, "x.pt")
    except UserError as error:
        assert error.message.isprintable()
    else:
        assert state.tensors and all(value.is_floating_point() and value.numel() for value in state.tensors.values())
        assert all(name.isprintable() for name in state.tensors)


# At the door ----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def nets_of(filled_net: Callable[..., nn.Module]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The averaged tensors of a DiT, and others."""
    averaged, other = (filled_net("DiT", DIT, f"wrappers/{name}/").state_dict() for name in ("ema", "model"))
    return averaged, other


@pytest.mark.parametrize(
    ("wrap", "facts"),
    [
        pytest.param(
            lambda a, b: {"model": b, "ema": a, "opt": {"state": {0: b}}, "args": argparse.Namespace(epochs=1400)},
            "x.pt, file of torch.save; its part ema; not model (--key)", id="dit",
        ),
        pytest.param(
            lambda a, b: {"state_dict": {f"model._orig_mod.{n}": v for n, v in a.items()}, "epoch": 3, "loops": {}},
            "x.pt, file of torch.save; its part state_dict; names without _orig_mod.", id="lightning",
        ),
        pytest.param(
            lambda a, b: {f"module.{n}": v for n, v in a.items()} | {"n_averaged": torch.tensor(3)},
            "x.pt, file of torch.save; names without module.; without n_averaged", id="averaged_model",
        ),
    ],
)  # fmt: skip
def test_convert_takes_the_averaged_weights_and_says_so(
    nets_of: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path, wrap: Callable[..., Any], facts: str
) -> None:
    torch.save(wrap(*nets_of), tmp_path / "x.pt")
    options = ["--role", "score", "--set", "num_heads=2", "--out", str(tmp_path / "b")]
    result = CliRunner().invoke(main, [str(tmp_path / "x.pt"), *options])
    assert result.exit_code == 0 and facts in result.output, result.output
    tensors = bundles.read(tmp_path / "b").load("score").state_dict()
    assert all(torch.equal(tensors[f"model.{name}"], value) for name, value in nets_of[0].items())


def test_convert_takes_the_part_that_is_asked_for(
    nets_of: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path
) -> None:
    torch.save({"model": nets_of[1], "ema": nets_of[0]}, tmp_path / "x.pt")
    options = ["--role", "score", "--set", "num_heads=2", "--key", "model", "--out", str(tmp_path / "b")]
    result = CliRunner().invoke(main, [str(tmp_path / "x.pt"), *options])
    assert result.exit_code == 0 and "its part model" in result.output, result.output
    tensors = bundles.read(tmp_path / "b").load("score").state_dict()
    assert all(torch.equal(tensors[f"model.{name}"], value) for name, value in nets_of[1].items())
