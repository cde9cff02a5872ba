"""Tests of ml-act's and ml-lineas's folders, against the formulas of their hooks."""

from pathlib import Path
from typing import Any

import pytest
import torch

from interventions.importers.imported import ImportedMaps, ImportFileError
from interventions.importers.statedicts import TransportOptions, read_transport
from interventions.model import ModelDescription
from steering.affine import AffineParameters
from tests.conftest import LoadTiny
from tests.foreign_files import (
    State,
    gaussian_state,
    linear_state,
    random_tensor,
    transported,
    write_hooks,
)
from tests.oracles import affine_rows
from tests.tiny import SITES, WIDTH


@pytest.fixture
def model(load_tiny: LoadTiny) -> ModelDescription:
    return load_tiny().description


def read(folder: Path, model: ModelDescription, **options: Any) -> ImportedMaps:
    return read_transport(folder, model, "lin-act", TransportOptions(**options))


def assert_same_edit(
    maps: AffineParameters, site: str, state: State, quantiles: str, mean: bool = False
) -> None:
    z = 2 * random_tensor(99, 200, WIDTH)
    if quantiles != "q_all":  # the ends themselves are outside of the hook's interval
        z[:2] = torch.stack(state["quantiles_dict_src"][quantiles])
    for strength in (1.0, 0.4):
        ours = affine_rows(z, maps[site], strength)
        theirs = transported(state, z, strength, quantiles, mean)
        assert torch.allclose(ours, theirs, atol=1e-5)
        if strength == 1:  # at others, the oracle rounds what it leaves alone
            assert torch.equal(ours == z, theirs == z)


@pytest.mark.parametrize("quantiles", ["q_all", "q_0_100", "q_5_95"])
@pytest.mark.parametrize("kind", ["linear", "mean", "gaussian"])
@pytest.mark.parametrize("chosen", ["saved", "named"])
def test_the_edit_is_that_of_the_hook(
    tmp_path: Path, model: ModelDescription, quantiles: str, kind: str, chosen: str
) -> None:
    make = linear_state if kind == "linear" else gaussian_state
    saved = quantiles if chosen == "saved" else "q_40_60"
    states = {site: make(seed, WIDTH, saved) for seed, site in enumerate(SITES)}
    folder = write_hooks(tmp_path / f"incr-{kind}_ot-mean", states)
    options = {} if chosen == "saved" else {"quantiles": quantiles}
    imported = read(folder, model, **options)
    method = {"linear": "lin-act", "mean": "mean", "gaussian": "gaussian-act"}[kind]
    assert imported.method == method
    assert set(imported.parameters) == set(SITES)
    for site in SITES:
        assert_same_edit(imported.parameters, site, states[site], quantiles, kind == "mean")
        assert (imported.parameters[site].low is None) == (quantiles == "q_all")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_and_a_vector_without_its_first_dimension(
    tmp_path: Path, model: ModelDescription, dtype: torch.dtype
) -> None:
    state = {key: random_tensor(3, WIDTH).to(dtype) for key in ("net.w1", "net.b1")}
    [map_] = read(write_hooks(tmp_path, {SITES[0]: state}), model).parameters.values()
    assert torch.equal(map_.weight, state["net.w1"].float())
    assert map_.weight.dtype == torch.float32


def test_the_first_item_of_a_module_s_output(tmp_path: Path, model: ModelDescription) -> None:
    folder = write_hooks(tmp_path, {"model.layers.1.self_attn:0": linear_state(0)})
    assert set(read(folder, model).parameters) == {"model.layers.1.self_attn"}


def test_a_constant_coordinate_is_left_alone(tmp_path: Path, model: ModelDescription) -> None:
    """Between two equal quantiles lies nothing: the hook never edits that coordinate."""
    state = linear_state(0, quantiles="q_5_95")
    for ends in (state["quantiles_src"], state["quantiles_dict_src"]["q_5_95"]):
        ends[1].view(-1)[4] = ends[0].view(-1)[4]
    [map_] = read(write_hooks(tmp_path, {SITES[0]: state}), model).parameters.values()
    assert map_.weight[4] == 1
    assert map_.bias[4] == 0
    assert map_.low is not None
    assert map_.high is not None
    assert (map_.low <= map_.high).all()
    assert_same_edit({SITES[0]: map_}, SITES[0], state, "q_5_95")


def test_mean_or_gaussian_must_be_known(tmp_path: Path, model: ModelDescription) -> None:
    folder = write_hooks(tmp_path / "maps", {SITES[0]: gaussian_state(0)})
    with pytest.raises(ImportFileError, match="--map mean or --map gaussian"):
        read(folder, model)
    assert read(folder, model, gaussian="mean").method == "mean"
    assert read(folder, model, gaussian="gaussian").method == "gaussian-act"


def test_a_hook_of_ml_act_is_no_lineas_map(tmp_path: Path, model: ModelDescription) -> None:
    folder = write_hooks(tmp_path / "mean_ot", {SITES[0]: gaussian_state(0)})
    with pytest.raises(ImportFileError, match="import the folder by ml-act"):
        read_transport(folder, model, "lineas", TransportOptions())


def _without(name: str) -> State:
    return {key: value for key, value in linear_state(0).items() if key != name}


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({}, "holds no file"),
        ({"model.layers.9.mlp": linear_state(0)}, 'has no site "model.layers.9.mlp"'),
        ({f"{SITES[0]}x": linear_state(0)}, f'Its nearest site is "{SITES[0]}"'),
        ({SITES[0]: linear_state(0, WIDTH + 1)}, "width 33, but the model .* has 32"),
        ({f"{SITES[0]}:1": linear_state(0)}, "only item 0"),
        ({SITES[0]: linear_state(0), f"{SITES[0]}:0": linear_state(0)}, "another file"),
        ({SITES[0]: linear_state(0), SITES[1]: gaussian_state(0)}, "several methods"),
        ({SITES[0]: {**linear_state(0), "net.A": torch.zeros(1)}}, "net.A beside"),
        ({SITES[0]: _without("net.b1")}, '"net.b1" is not a tensor'),
        ({SITES[0]: _without("net.w1")}, "neither net.w1"),
        ({SITES[0]: {"auroc": torch.zeros(WIDTH)}}, "neither net.w1"),
        ({SITES[0]: {**linear_state(0), "net.b1": torch.zeros(1, 5)}}, r"shape \(5,\)"),
        ({SITES[0]: {**linear_state(0), "net.b1": torch.zeros(2, WIDTH)}}, "shape"),
        ({SITES[0]: {**linear_state(0), "net.b1": torch.zeros(1, WIDTH).long()}}, "int64"),
        (
            {SITES[0]: {**linear_state(0), "net.b1": torch.full((1, WIDTH), torch.nan)}},
            "not finite",
        ),
        ({SITES[0]: {**linear_state(0), "net.b1": torch.zeros(1, 1).expand(1, WIDTH)}}, "contig"),
        ({SITES[0]: {**linear_state(0), "quantiles_src": "q_7_93"}}, "no quantiles 'q_7_93'"),
        ({SITES[0]: {**linear_state(0), "quantiles_src": [1]}}, "not a pair"),
    ],
)
def test_a_refusal_names_the_file(
    tmp_path: Path, model: ModelDescription, states: dict[str, State], message: str
) -> None:
    folder = write_hooks(tmp_path / "mean_ot", states)
    with pytest.raises(ImportFileError, match=message) as refusal:
        read(folder, model)
    assert str(folder) in str(refusal.value)


def test_a_folder_that_is_not_there(tmp_path: Path, model: ModelDescription) -> None:
    with pytest.raises(ImportFileError, match="No such file"):
        read(tmp_path / "gone", model)
