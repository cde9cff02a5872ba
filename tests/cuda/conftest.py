"""Fixtures of the GPU tests, which need nothing but torch and transformers."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch

from server.engine.torch.model.loader import LoadedModel, load_model
from tests.cuda.devices import DEVICE, DRY_RUN, LoadOnDevice, refuse_waits
from tests.paged import use_pages
from tests.tiny import save_families

# Threads do not speed up operations on tiny tensors, and wait for each other on a busy machine.
torch.set_num_threads(1)

FAMILIES = ("llama", "mistral", "gemma2")


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """Save a tiny random model of each family that these tests use; return folders by family."""
    return save_families(tmp_path_factory.mktemp("models"), FAMILIES)


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make engines use pages and fake CUDA graphs on the CPU in a dry run."""
    if DRY_RUN:
        use_pages(monkeypatch)


@pytest.fixture(autouse=True)
def waits_are_allowed_again() -> Iterator[None]:
    """Let torch wait for the GPU again after a test that has failed while waits were refused."""
    yield
    refuse_waits(False)


@pytest.fixture
def load_on_device(tiny_folders: Mapping[str, Path]) -> LoadOnDevice:
    def load(family: str = "llama", dtype: str = "bfloat16") -> LoadedModel:
        return load_model(str(tiny_folders[family]), dtype, DEVICE.type)

    return load
