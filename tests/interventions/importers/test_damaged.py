"""Tests of damaged and malicious files: a sentence, and neither code that runs nor a bomb."""

import io
import pickle
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from interventions.importers.argre import read_argre
from interventions.importers.control_vector import read_control_vector
from interventions.importers.gguf_files import read_gguf
from interventions.importers.imported import ImportFileError
from interventions.importers.recognise import import_command
from interventions.importers.sae import Feature, read_sae
from interventions.importers.statedicts import TransportOptions, read_transport
from interventions.importers.svec import read_svec
from interventions.importers.torch_files import read_torch_file
from interventions.model import ModelDescription
from tests.conftest import LoadTiny
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

Write: TypeAlias = Callable[[Path], Path]
Read: TypeAlias = Callable[[Path, ModelDescription], object]


@pytest.fixture(scope="module")
def model(load_tiny: LoadTiny) -> ModelDescription:
    return load_tiny().description


def _read_hooks(path: Path, model: ModelDescription) -> object:
    return read_transport(path.parent, model, "lin-act", TransportOptions(gaussian="mean"))


def _read_argre(path: Path, model: ModelDescription) -> object:
    return read_argre(path.parent, path.parent, model, None)


def _write_linear(folder: Path) -> Path:
    state = linear_state(0, WIDTH, "q_0_100")
    return write_hooks(folder, {SITES[0]: state}) / f"{SITES[0]}.statedict"


def _write_gaussian(folder: Path) -> Path:
    state = gaussian_state(0, WIDTH, "q_0_100")
    return write_hooks(folder, {SITES[0]: state}) / f"{SITES[0]}.statedict"


def _argre_file(name: str) -> Write:
    return lambda folder: write_argre(folder, argre_head(0), pairs=2) / name


FORMATS: dict[str, tuple[Write, Read]] = {
    "linear": (_write_linear, _read_hooks),
    "gaussian": (_write_gaussian, _read_hooks),
    "head": (_argre_file("best_score_model.pth"), _read_argre),
    "direction": (_argre_file("direction.pt"), _read_argre),
    "states": (_argre_file("train_hidden_states.pt"), _read_argre),
    "mask": (_argre_file("train_attention_mask.pt"), _read_argre),
    "gguf": (
        lambda folder: write_control_vector(
            folder / "v.gguf", {1: random_tensor(0, WIDTH)}, lists=True
        ),
        lambda path, model: read_control_vector(path, model, None, "residual"),
    ),
    "svec": (
        lambda folder: write_svec(folder / "v.svec", {1: random_tensor(0, WIDTH)}),
        lambda path, model: read_svec(path, model, frozenset({1}), "residual"),
    ),
    "safetensors": (
        lambda folder: (
            write_sae_lens(folder, random_tensor(0, 3, WIDTH), {}) / "sae_weights.safetensors"
        ),
        lambda path, model: read_sae(path, model, Feature(1, "model.layers.1")),
    ),
    "sae config": (
        lambda folder: (
            write_sae_lens(
                folder, random_tensor(0, 3, WIDTH), {"hook_name": "blocks.1.hook_resid_post"}
            )
            / "cfg.json"
        ),
        lambda path, model: read_sae(path.parent, model, Feature(1)),
    ),
    "npz": (
        lambda folder: write_gemma_scope(folder / "params.npz", random_tensor(0, 3, WIDTH)),
        lambda path, model: read_sae(path, model, Feature(1, "model.layers.1")),
    ),
    "compressed npz": (
        lambda folder: write_gemma_scope(folder / "params.npz", random_tensor(0, 3, WIDTH), True),
        lambda path, model: read_sae(path, model, Feature(1, "model.layers.1")),
    ),
}


@pytest.fixture(scope="module", params=FORMATS)
def valid(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, bytes, Read]:
    """Write a valid file; return its path, its bytes, and its reader."""
    write, read = FORMATS[request.param]
    path = write(tmp_path_factory.mktemp("foreign"))
    return path, path.read_bytes(), read


Edits: TypeAlias = list[tuple[float, bytes]]
_EDITS = st.lists(
    st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9)),
    min_size=1,
    max_size=4,
)


@hypothesis.settings(
    max_examples=80, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(edits=_EDITS, kept=st.one_of(st.just(1.0), st.floats(0, 1)))
def test_a_damaged_file_is_refused_in_a_sentence(
    valid: tuple[Path, bytes, Read], model: ModelDescription, edits: Edits, kept: float
) -> None:
    path, content, read = valid
    damaged = bytearray(content)
    for place, data in edits:
        begin = int(place * len(damaged))
        damaged[begin : begin + len(data)] = data
    path.write_bytes(damaged[: int(kept * len(damaged))])
    message = ""
    try:
        read(path, model)
    except ImportFileError as error:
        message = str(error)
    assert not message or (str(path.parent) in message and message.endswith("."))
    import_command(path)


def test_the_valid_files_are_read(valid: tuple[Path, bytes, Read], model: ModelDescription) -> None:
    path, content, read = valid
    path.write_bytes(content)
    read(path, model)


class Harmful:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[[str, str], object], tuple[str, str]]:
        return (open, (str(self._path), "w"))


def test_no_code_is_run(tmp_path: Path) -> None:
    path, proof = tmp_path / "direction.pt", tmp_path / "proof"
    torch.save({"0.weight": Harmful(proof)}, path)
    with pytest.raises(ImportFileError, match="by running code, so the file is refused"):
        read_torch_file(path)
    path.write_bytes(pickle.dumps(Harmful(proof)))
    with pytest.raises(ImportFileError, match="Other pickles are never read"):
        read_torch_file(path)
    torch.save(torch.zeros(2), path, _use_new_zipfile_serialization=False)
    with pytest.raises(ImportFileError, match=r"torch 1\.6 or later"):
        read_torch_file(path)
    assert import_command(path) is None
    assert not proof.exists()


def _recompressed(path: Path) -> None:
    """Write the archive again, with compressed records."""
    data = io.BytesIO(path.read_bytes())
    with zipfile.ZipFile(data) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))


def test_archives_that_expand_are_refused(tmp_path: Path, model: ModelDescription) -> None:
    path = tmp_path / "direction.pt"
    torch.save(torch.zeros(1 << 20), path)
    _recompressed(path)
    with pytest.raises(ImportFileError, match="compressed records"):
        read_torch_file(path)
    zeros = write_gemma_scope(tmp_path / "params.npz", torch.zeros(1 << 15, WIDTH), True)
    with pytest.raises(ImportFileError, match="would expand too much"):
        read_sae(zeros, model, Feature(1, "model.layers.1"))


def _header(tensors: int, entries: int, rest: bytes) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, entries) + rest


def _entry(kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", 1) + b"k" + struct.pack("<I", kind) + value


def _tensor(info: bytes) -> bytes:
    """Return a control vector with one tensor, whose name is empty."""
    value = struct.pack("<Q", 13) + b"controlvector"
    key = struct.pack("<Q", 20) + b"general.architecture" + struct.pack("<I", 8)
    return _header(1, 1, key + value + struct.pack("<Q", 0) + info)


@pytest.mark.parametrize(
    "data",
    [
        _header(1 << 60, 0, b""),
        _header(0, 1 << 60, b""),
        _header(0, 1, struct.pack("<Q", 1 << 60)),
        _header(0, 1, _entry(8, struct.pack("<Q", 1 << 62))),
        _header(0, 1, _entry(9, struct.pack("<IQ", 0, 1 << 60))),  # gguf's own reader hangs here
        _header(0, 1, _entry(9, struct.pack("<IQ", 8, 1 << 60))),
        _header(0, 1, _entry(9, struct.pack("<IQ", 9, 1 << 60))),
        _header(0, 1, _entry(99, b"")),
        _tensor(struct.pack("<I", 1 << 30)),
        _tensor(struct.pack("<IQQIQ", 2, 1 << 40, 1 << 40, 0, 0)),
        _tensor(struct.pack("<IQIQ", 1, 8, 0, 1 << 62)),
        _tensor(struct.pack("<IQIQ", 1, 8, 2, 0)),
        _tensor(b""),
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        b"GGUF",
    ],
)
def test_lengths_beyond_the_file_are_refused_at_once(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(ImportFileError):
            read_gguf(path, "controlvector")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_large_file_is_not_read(tmp_path: Path, model: ModelDescription) -> None:
    for name in ("v.gguf", "v.svec"):
        with (tmp_path / name).open("wb") as file:
            file.write(b"GGUF")
            file.truncate(1 << 30)
    with pytest.raises(ImportFileError, match="the limit is"):
        read_gguf(tmp_path / "v.gguf", "controlvector")
    with pytest.raises(ImportFileError, match="the limit is"):
        read_svec(tmp_path / "v.svec", model, frozenset({1}), "residual")


@pytest.mark.parametrize("form", FORMATS)
def test_a_folder_or_a_missing_file_instead(
    tmp_path: Path, model: ModelDescription, form: str
) -> None:
    write, read = FORMATS[form]
    path = write(tmp_path)
    path.unlink()
    with pytest.raises(ImportFileError):
        read(path, model)
    path.mkdir()
    with pytest.raises(ImportFileError):
        read(path, model)
