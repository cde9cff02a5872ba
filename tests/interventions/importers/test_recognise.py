"""Tests that other projects' files are recognised by their content."""

import shlex
from pathlib import Path

import pytest
import torch

from interventions.importers.recognise import import_command
from tests.conftest import WriteArtifact
from tests.foreign_files import (
    argre_head,
    gaussian_state,
    linear_state,
    random_tensor,
    write_argre,
    write_control_vector,
    write_gemma_scope,
    write_hooks,
    write_sae_lens,
    write_svec,
)
from tests.tiny import SITES, WIDTH

DECODER = random_tensor(0, 3, WIDTH)


@pytest.mark.parametrize(
    ("make", "command"), [(linear_state, "ml-lineas"), (gaussian_state, "ml-act")]
)
def test_hooks(tmp_path: Path, make: type, command: str) -> None:
    write_hooks(tmp_path, {SITES[0]: make(0)})
    expected = f"{command} {tmp_path}"
    assert import_command(tmp_path) == expected
    file = tmp_path / f"{SITES[0]}.statedict"
    assert import_command(file) == expected
    renamed = file.rename(tmp_path / "renamed.bin")
    assert import_command(renamed) == f"{command} FOLDER"


def test_a_path_is_quoted_for_a_shell(tmp_path: Path) -> None:
    folder = write_argre(tmp_path / "a b", argre_head(0))
    assert shlex.split(import_command(folder) or "") == ["argre", str(folder)]


def test_argre(tmp_path: Path) -> None:
    folder = write_argre(tmp_path, argre_head(0))
    assert import_command(folder) == f"argre {folder}"
    for name in ("direction.pt", "train_hidden_states.pt", "train_attention_mask.pt"):
        assert import_command(folder / name) == f"argre {folder}"
    renamed = (folder / "best_score_model.pth").rename(folder / "head.bin")
    assert import_command(renamed) == f"argre {renamed}"


def test_vectors_and_features(tmp_path: Path) -> None:
    vectors = {1: random_tensor(0, WIDTH)}
    gguf = write_control_vector(tmp_path / "x.safetensors", vectors)
    assert import_command(gguf) == f"control-vector {gguf}"
    svec = write_svec(tmp_path / "y.safetensors", vectors)
    assert import_command(svec) == f"svec {svec}"
    folder = write_sae_lens(tmp_path / "sae", DECODER, {})
    for path in (folder, folder / "sae_weights.safetensors"):
        assert import_command(path) == f"sae {path} --feature N"
    npz = write_gemma_scope(tmp_path / "params.npz", DECODER)
    assert import_command(npz) == f"sae {npz} --feature N"


def test_what_no_command_takes(tmp_path: Path, affine_artifact: WriteArtifact) -> None:
    for name, content in (("a", b""), ("b", b"text"), ("c", b'{"x": 1}'), ("d", b"PK\3\4")):
        (tmp_path / name).write_bytes(content)
        assert import_command(tmp_path / name) is None
    torch.save(torch.zeros(2), tmp_path / "e.pt")
    model = write_control_vector(tmp_path / "model.gguf", {}, "llama")
    empty = tmp_path / "empty"
    empty.mkdir()
    artifact = affine_artifact("maps")
    for path in (tmp_path / "e.pt", model, empty, artifact, tmp_path / "gone"):
        assert import_command(path) is None
