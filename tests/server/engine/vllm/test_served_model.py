"""Tests which model and which sites vLLM is started with."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from transformers import MixtralConfig

from server.config import ConfigurationError
from server.engine.model.description import ModelLoadError
from server.engine.torch.model.loader import load_model
from server.engine.vllm.options import VllmOptions
from server.engine.vllm.served_model import ServedModel, describe_served_model
from tests.tiny import FAMILIES, SITES, family_sites, tiny_config, tiny_model, tiny_tokenizer


def served(
    folder: Path, options: VllmOptions | None = None, stored: tuple[str, ...] = ()
) -> ServedModel:
    return describe_served_model(
        str(folder), "float32", options or VllmOptions(), stored, lambda _sentence: None
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_the_model_is_the_one_that_transformers_loads(
    family: str, tiny_folders: Mapping[str, Path]
) -> None:
    found, loaded = served(tiny_folders[family]), load_model(str(tiny_folders[family]), "float32")
    assert (found.source, found.dtype) == (str(tiny_folders[family]), "float32")
    assert found.description.fingerprint == loaded.description.fingerprint
    assert found.description.site_widths == loaded.description.site_widths
    assert found.eos_tokens == loaded.eos_tokens
    assert found.max_model_len == 512
    assert set(found.layout.sites) == set(family_sites(family))


def test_stored_sites_are_prepared_and_impossible_ones_do_not_stop_the_start(
    tiny_folders: Mapping[str, Path],
) -> None:
    possible, fused, other = (
        "model.layers.1.mlp",
        "model.layers.0.self_attn.q_proj",
        "transformer.h.0.ln_1",
    )
    found = served(tiny_folders["llama"], stored=(possible, fused, other, f"{possible}.input"))
    assert set(found.layout.sites) == {*SITES, possible}
    assert possible not in found.description.unprepared_sites
    assert "model.layers.0.mlp" in found.description.unprepared_sites
    assert {fused, f"{possible}.input"} <= found.description.impossible_sites.keys()


def test_sites_that_the_operator_names_are_prepared(tiny_folders: Mapping[str, Path]) -> None:
    options = VllmOptions(sites=(r"model\.layers\.\d+\.mlp", r"model\.norm"))
    found = served(tiny_folders["llama"], options)
    wanted = {"model.layers.0.mlp", "model.layers.1.mlp", "model.norm"}
    assert set(found.layout.sites) == {*SITES, *wanted}
    assert not wanted & found.description.unprepared_sites.keys()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (VllmOptions(sites=("model.layers.0.self_attn.q_proj",)), "matches no module"),
        (VllmOptions(sites=("(",)), "not a regular expression"),
        (VllmOptions(max_model_len=513), "exceeds the model's 512 positions"),
    ],
)
def test_options_that_the_model_does_not_have_end_the_start(
    options: VllmOptions, says: str, tiny_folders: Mapping[str, Path]
) -> None:
    with pytest.raises(ConfigurationError, match=says):
        served(tiny_folders["llama"], options)


def test_an_architecture_that_is_not_steered_inside_vllm_ends_the_start(tmp_path: Path) -> None:
    fields = tiny_config("mistral").to_dict() | {"num_local_experts": 2, "model_type": "mixtral"}
    tiny_model("mistral", config=MixtralConfig(**fields)).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match=r"MixtralForCausalLM is not .* LlamaForCausalLM"):
        served(tmp_path)
