"""Tests of ARGRE's files, against its own inference with torch's optimizer."""

from pathlib import Path

import pytest
import torch

from interventions.importers.argre import read_argre
from interventions.importers.imported import ImportFileError
from interventions.model import ModelDescription
from steering.settings import RewardSettings
from tests.conftest import LoadTiny
from tests.foreign_files import argre_head, random_tensor, refined_by_argre, write_argre
from tests.oracles import reward
from tests.tiny import WIDTH


@pytest.fixture
def model(load_tiny: LoadTiny) -> ModelDescription:
    return load_tiny().description


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_head_refines_as_the_authors_code(
    tmp_path: Path, model: ModelDescription, dtype: torch.dtype
) -> None:
    theirs = argre_head(1)
    folder = write_argre(tmp_path, theirs, dtype=dtype)
    head = read_argre(folder, folder, model, None).parameters
    states = torch.load(folder / "train_hidden_states.pt")
    mask = torch.load(folder / "train_attention_mask.pt").bool()
    with torch.no_grad():
        expected = float(theirs(states[:, 0][mask[:, 0]].float()).mean())
    assert float(head.positive_reward) == pytest.approx(expected, abs=1e-5)
    direction = torch.load(folder / "direction.pt")[0]
    for row in random_tensor(5, 20, WIDTH):
        mine = reward(row, head, RewardSettings(0.5, 4))
        other = refined_by_argre(theirs, direction, expected, row[None], 0.5, 4)
        assert torch.allclose(mine, other[0], atol=1e-4)


def test_the_head_and_its_states_in_two_folders(tmp_path: Path, model: ModelDescription) -> None:
    folder = write_argre(tmp_path / "one", argre_head(1))
    checkpoints = tmp_path / "two"
    checkpoints.mkdir()
    head = (folder / "best_score_model.pth").rename(checkpoints / "3_score_model.pth")
    imported = read_argre(head, folder, model, None)
    assert imported.training["head"] == "3_score_model.pth"
    with pytest.raises(ImportFileError, match=r"best_score_model\.pth: No such file"):
        read_argre(checkpoints, folder, model, None)


def test_a_given_reward_needs_no_hidden_states(tmp_path: Path, model: ModelDescription) -> None:
    folder = write_argre(tmp_path, argre_head(1))
    (folder / "train_hidden_states.pt").unlink()
    with pytest.raises(ImportFileError, match=r"train_hidden_states\.pt: No such file"):
        read_argre(folder, folder, model, None)
    assert float(read_argre(folder, folder, model, 1.5).parameters.positive_reward) == 1.5


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("best_score_model.pth", {"0.weight": torch.zeros(2, WIDTH)}, "does not hold the tensors"),
        ("best_score_model.pth", torch.zeros(3), "does not hold a state dictionary"),
        ("best_score_model.pth", argre_head(1, WIDTH + 1).state_dict(), "of another model"),
        (
            "best_score_model.pth",
            {**argre_head(1).state_dict(), "2.weight": torch.zeros(2, 24)},
            r'"2.weight" has shape \(2, 24\)',
        ),
        ("direction.pt", torch.zeros(WIDTH), "the direction"),
        ("direction.pt", torch.zeros(3, 1, WIDTH), r"expected \(1, 1, 32\)"),
        ("direction.pt", torch.full((1, 1, WIDTH), torch.inf), "not finite"),
        ("direction.pt", torch.zeros(1, 1, WIDTH).int(), "int32"),
        ("train_hidden_states.pt", torch.zeros(2, 2, 6, WIDTH + 1), "expected"),
        ("train_hidden_states.pt", torch.zeros(11, 2, 6, WIDTH) * torch.nan, "not finite"),
        ("train_hidden_states.pt", torch.zeros(1).expand(11, 2, 6, WIDTH), "not contiguous"),
        ("train_hidden_states.pt", "text", "is not a tensor"),
        ("train_attention_mask.pt", torch.zeros(11, 2, 7).long(), "expected"),
        ("train_attention_mask.pt", torch.zeros(11, 2, 6).long(), "masks every token"),
    ],
)
def test_a_refusal_names_the_file(
    tmp_path: Path, model: ModelDescription, name: str, value: object, message: str
) -> None:
    folder = write_argre(tmp_path, argre_head(1))
    torch.save(value, folder / name)
    with pytest.raises(ImportFileError, match=message) as refusal:
        read_argre(folder, folder, model, None)
    assert str(folder / name) in str(refusal.value)
