"""Tests of control vectors, .svec files and features of sparse autoencoders.

What the projects do with a file is done by hooks like theirs on a tiny model, and compared with the
oracle that applies the imported maps.
"""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from interventions.importers.control_vector import read_control_vector
from interventions.importers.imported import ImportedMaps, ImportFileError
from interventions.importers.sae import Feature, read_sae
from interventions.importers.sites import Place, parse_layers
from interventions.importers.svec import read_svec
from interventions.model import ModelDescription
from server.engine.request import Edit
from server.engine.torch.options import EngineOptions
from server.engine.vllm.plugin.sites import ARCHITECTURES, possible_sites
from steering.settings import AffineSettings
from tests.conftest import LoadTiny, StartEngine
from tests.foreign_files import (
    add_after,
    add_before,
    hooked_logits,
    random_tensor,
    write_control_vector,
    write_gemma_scope,
    write_sae_lens,
    write_svec,
)
from tests.oracles import Oracle
from tests.steered import assert_equal_to_stack, generate
from tests.tiny import FAMILIES, WIDTH, tiny_model

TOKENS = b"how do you do?"
LAYER = {
    "gpt2": "transformer.h.",
    "opt": "model.decoder.layers.",
    "opt-350m": "model.decoder.layers.",
}
DIRECTIONS = {layer: random_tensor(layer, WIDTH) for layer in range(2)}


@pytest.fixture
def model(load_tiny: LoadTiny) -> ModelDescription:
    return load_tiny().description


def steered_logits(imported: ImportedMaps, family: str, strength: float = 1.0) -> torch.Tensor:
    stack = [(imported.parameters, AffineSettings(strength))]
    return Oracle(tiny_model(family)).logits(TOKENS, len(TOKENS), stack)


@pytest.mark.parametrize("family", FAMILIES)
def test_direction_n_is_added_after_the_layer_of_index_n(
    tmp_path: Path, load_tiny: LoadTiny, family: str
) -> None:
    path = write_control_vector(tmp_path / "v.gguf", {1: DIRECTIONS[1]})
    imported = read_control_vector(path, load_tiny(family).description, None, "residual")
    layer = LAYER.get(family, "model.layers.") + "1"
    assert list(imported.parameters) == [layer]
    theirs = hooked_logits(
        tiny_model(family), [(layer, "after", add_after(-1.5 * DIRECTIONS[1]))], TOKENS
    )
    assert torch.allclose(steered_logits(imported, family, -1.5), theirs, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_svec_directions_are_added_before_their_layers(
    tmp_path: Path, load_tiny: LoadTiny, family: str
) -> None:
    path = write_svec(tmp_path / "v.svec", DIRECTIONS)
    described = load_tiny(family).description
    imported = read_svec(path, described, frozenset({0, 1}), "residual")
    prefix = LAYER.get(family, "model.layers.")
    hooks = [(f"{prefix}{n}", "before", add_before(vector)) for n, vector in DIRECTIONS.items()]
    theirs = hooked_logits(tiny_model(family), hooks, TOKENS)
    assert torch.allclose(steered_logits(imported, family), theirs, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
async def test_the_engine_edits_whole_layers(
    tmp_path: Path, load_tiny: LoadTiny, start_engine: StartEngine, family: str
) -> None:
    described = load_tiny(family).description
    vector = write_control_vector(tmp_path / "v.gguf", DIRECTIONS)
    svec = write_svec(tmp_path / "v.svec", DIRECTIONS)
    imported = {
        "after": read_control_vector(vector, described, None, "residual").parameters,
        "before": read_svec(svec, described, frozenset({0, 1}), "residual").parameters,
    }
    engine = await start_engine(imported, family, EngineOptions(kv_cache_gb=0.01))
    settings = AffineSettings(-0.7)
    for name, parameters in imported.items():
        outputs = await generate(engine, TOKENS, (Edit(name, settings),))
        assert_equal_to_stack(outputs, family, TOKENS, [(parameters, settings)])


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "qwen2", "qwen3", "gemma2"])
def test_the_feed_forward_networks_give_the_same_sum_inside_vllm_too(
    tmp_path: Path, load_tiny: LoadTiny, family: str
) -> None:
    described = load_tiny(family).description
    possible = possible_sites(described.architecture, described.num_layers)
    vector = write_control_vector(tmp_path / "v.gguf", DIRECTIONS)
    svec = write_svec(tmp_path / "v.svec", DIRECTIONS)

    def read(place: Place) -> list[ImportedMaps]:
        return [
            read_control_vector(vector, described, None, place),
            read_svec(svec, described, frozenset({1}), place),
        ]

    for residual, other in zip(read("residual"), read("feed-forward"), strict=True):
        assert not set(residual.parameters) & set(possible)
        assert set(other.parameters) <= set(possible)
        mine = steered_logits(other, family)
        assert torch.allclose(mine, steered_logits(residual, family), atol=1e-3)


def test_every_model_of_vllm_has_a_place_for_control_vectors(
    tmp_path: Path, load_tiny: LoadTiny
) -> None:
    path = write_control_vector(tmp_path / "v.gguf", DIRECTIONS)
    seen = set()
    for family in FAMILIES:
        described = load_tiny(family).description
        possible = set(possible_sites(described.architecture, described.num_layers))
        place: Place = "residual" if family in LAYER else "feed-forward"
        assert set(read_control_vector(path, described, None, place).parameters) <= possible
        seen.add(described.architecture)
    assert seen == set(ARCHITECTURES)


def test_the_feed_forward_networks_of_other_families_are_not_known(
    tmp_path: Path, load_tiny: LoadTiny
) -> None:
    path = write_control_vector(tmp_path / "v.gguf", DIRECTIONS)
    with pytest.raises(ImportFileError, match="OPTForCausalLM are not known"):
        read_control_vector(path, load_tiny("opt").description, None, "feed-forward")


def test_metadata_of_all_kinds_and_half_precision(tmp_path: Path, model: ModelDescription) -> None:
    half = {1: DIRECTIONS[1].half()}
    path = write_control_vector(tmp_path / "v.gguf", half, lists=True)
    imported = read_control_vector(path, model, None, "residual")
    assert torch.equal(imported.parameters["model.layers.1"].bias, half[1].float())
    assert imported.training["model_hint"] == "llama"


def test_layers_may_be_chosen_and_zeros_are_left_out(
    tmp_path: Path, model: ModelDescription
) -> None:
    path = write_control_vector(tmp_path / "v.gguf", DIRECTIONS)
    imported = read_control_vector(path, model, parse_layers("1"), "residual")
    assert list(imported.parameters) == ["model.layers.1"]
    zero = {0: torch.zeros(WIDTH), 1: DIRECTIONS[1]}
    path = write_control_vector(tmp_path / "z.gguf", zero)
    imported = read_control_vector(path, model, None, "residual")
    assert list(imported.parameters) == ["model.layers.1"]
    with pytest.raises(ImportFileError, match="every direction is zero"):
        read_control_vector(path, model, parse_layers("0"), "residual")


@pytest.mark.parametrize(
    ("text", "layers"), [("4", {4}), ("4,10-12", {4, 10, 11, 12}), (" 1 - 2 , 1", {1, 2})]
)
def test_lists_of_layers(text: str, layers: set[int]) -> None:
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "3-1", "1,,2", "-1", "99999", "1-2-3", "²"])
def test_no_lists_of_layers(text: str) -> None:
    with pytest.raises(ImportFileError, match="no list of numbers"):
        parse_layers(text)


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        ({2: DIRECTIONS[1]}, "layer 2, but the model .* has layers 0 to 1"),
        ({1: torch.ones(WIDTH + 1)}, "width 33, but the model"),
        ({1: torch.full((WIDTH,), torch.nan)}, "not finite"),
        ({1: torch.ones(2, WIDTH)}, "expected"),
        ({1: torch.ones(WIDTH, dtype=torch.float64)}, "quantized or of integers"),
        ({1: torch.ones(WIDTH).int()}, "quantized or of integers"),
        ({}, "every direction is zero"),
    ],
)
def test_a_control_vector_that_does_not_fit(
    tmp_path: Path,
    model: ModelDescription,
    directions: dict[int, torch.Tensor],
    message: str,
) -> None:
    path = write_control_vector(tmp_path / "v.gguf", directions)
    with pytest.raises(ImportFileError, match=message) as refusal:
        read_control_vector(path, model, None, "residual")
    assert str(path) in str(refusal.value)


def test_a_model_is_no_control_vector(tmp_path: Path, model: ModelDescription) -> None:
    path = write_control_vector(tmp_path / "v.gguf", DIRECTIONS, "llama")
    with pytest.raises(ImportFileError, match="architecture is 'llama', and not 'controlvector'"):
        read_control_vector(path, model, None, "residual")
    path = write_control_vector(tmp_path / "w.gguf", DIRECTIONS)
    with pytest.raises(ImportFileError, match="no direction for layer 7; it has 0, 1"):
        read_control_vector(path, model, parse_layers("1,7"), "residual")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ([], "no directions"),
        ({"directions": [1]}, "no directions"),
        ({"directions": {"1": "x"}}, "not a list of finite numbers"),
        ({"directions": {"1": [1, None]}}, "not a list of finite numbers"),
        ({"directions": {"1": [True]}}, "not a list of finite numbers"),
        ({"directions": {"1": [10**400]}}, "not a list of finite numbers"),
        ({"directions": {"1": []}}, "not a list of finite numbers"),
        ({"directions": {"-1": [1.0]}}, "not the number of a layer"),
        ({"directions": {"1": [1.0] * WIDTH, "01": [1.0]}}, "not the number of a layer"),
        ({"directions": {"0": [1.0] * WIDTH}}, "no direction for layer 1; it has 0"),
        ({"directions": {"1": [1.0] * (WIDTH + 1)}}, "width 33"),
        ({"directions": {}, "code": "x"}, "unknown field 'code'"),
    ],
)
def test_a_svec_that_does_not_fit(
    tmp_path: Path, model: ModelDescription, fields: object, message: str
) -> None:
    path = tmp_path / "v.svec"
    path.write_text(json.dumps(fields))
    with pytest.raises(ImportFileError, match=message) as refusal:
        read_svec(path, model, frozenset({1}), "residual")
    assert str(path) in str(refusal.value)


def test_svec_layers_that_the_model_has_not(tmp_path: Path, model: ModelDescription) -> None:
    path = write_svec(tmp_path / "v.svec", {0: DIRECTIONS[0], 5: DIRECTIONS[1]})
    with pytest.raises(ImportFileError, match="layer 5 was chosen, but the model"):
        read_svec(path, model, frozenset({5}), "residual")
    with pytest.raises(ImportFileError, match="no layer comes before layer 0"):
        read_svec(path, model, frozenset({0}), "feed-forward")


DECODER = random_tensor(3, 7, WIDTH)


@pytest.mark.parametrize(
    ("config", "site"),
    [
        ({"hook_name": "blocks.1.hook_resid_post"}, "model.layers.1"),
        ({"hook_point": "blocks.1.hook_resid_pre"}, "model.layers.1.input"),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_post"}}, "model.layers.0"),
    ],
)
def test_a_feature_of_sae_lens(
    tmp_path: Path, model: ModelDescription, config: dict[str, object], site: str
) -> None:
    folder = write_sae_lens(tmp_path / "sae", DECODER, config)
    for path in (folder, folder / "sae_weights.safetensors"):
        imported = read_sae(path, model, Feature(4, scale=2.5))
        assert list(imported.parameters) == [site]
        assert torch.equal(imported.parameters[site].bias, 2.5 * DECODER[4])
        assert torch.equal(imported.parameters[site].weight, torch.ones(WIDTH))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_a_feature_of_gemma_scope(
    tmp_path: Path, model: ModelDescription, compressed: bool, dtype: torch.dtype
) -> None:
    decoder = DECODER.to(dtype)
    path = write_gemma_scope(tmp_path / "params.npz", decoder, compressed)
    for number in (0, 6):
        imported = read_sae(tmp_path, model, Feature(number, "model.layers.1"))
        assert torch.equal(imported.parameters["model.layers.1"].bias, decoder[number].float())
    with pytest.raises(ImportFileError, match=r"cfg\.json does not exist, so say by --site"):
        read_sae(path, model, Feature(0))


def test_a_decoder_of_a_linear_layer_has_its_features_in_columns(
    tmp_path: Path, model: ModelDescription
) -> None:
    from_rows = read_sae(
        write_sae_lens(tmp_path / "rows", DECODER, {}), model, Feature(2, "model.layers.1")
    )
    path = tmp_path / "final.safetensors"
    save_file({"decoder.weight": DECODER.T.contiguous()}, path)
    from_columns = read_sae(path, model, Feature(2, "model.layers.1"))
    assert torch.equal(
        from_rows.parameters["model.layers.1"].bias, from_columns.parameters["model.layers.1"].bias
    )


@pytest.mark.parametrize(
    ("decoder", "config", "feature", "message"),
    [
        (DECODER, {}, Feature(7, "model.layers.1"), "no feature 7: its W_dec"),
        (DECODER, {}, Feature(0), "names no place"),
        (
            DECODER,
            {"hook_name": "blocks.1.attn.hook_z"},
            Feature(0),
            "names 'blocks.1.attn.hook_z'",
        ),
        (DECODER, {"hook_name": "blocks.8.hook_resid_pre"}, Feature(0), "names layer 8"),
        (DECODER, {}, Feature(0, "model.layers.7"), "has no site"),
        (DECODER, {}, Feature(0, "model.layers.1", 0.0), "is zero at this scale"),
        (DECODER, {}, Feature(0, "model.layers.1", 1e39), "not finite at this scale"),
        (DECODER * torch.nan, {}, Feature(0, "model.layers.1"), "not finite"),
        (DECODER[:, :9].contiguous(), {}, Feature(0, "model.layers.1"), "width 9"),
        (DECODER.int(), {}, Feature(0, "model.layers.1"), "int32"),
        (DECODER[None], {}, Feature(0, "model.layers.1"), "no feature 0"),
    ],
)
def test_a_feature_that_does_not_fit(
    tmp_path: Path,
    model: ModelDescription,
    decoder: torch.Tensor,
    config: dict[str, object],
    feature: Feature,
    message: str,
) -> None:
    folder = write_sae_lens(tmp_path / "sae", decoder, config)
    with pytest.raises(ImportFileError, match=message) as refusal:
        read_sae(folder, model, feature)
    assert str(folder) in str(refusal.value)


def test_a_folder_without_weights(tmp_path: Path, model: ModelDescription) -> None:
    with pytest.raises(ImportFileError, match="has 0 of the files"):
        read_sae(tmp_path, model, Feature(0))
