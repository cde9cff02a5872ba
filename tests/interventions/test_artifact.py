"""Tests of artifacts: what is written reads back, and every wrong file is refused as a whole."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from interventions.artifact import (
    artifact_digest,
    read_artifact,
    read_manifest,
    read_summary,
    write_artifact,
)
from interventions.bundled import bundled_artifacts
from interventions.header import ArtifactError, ArtifactLimits, UnreadableArtifactError
from interventions.layout import AffineShapes, RewardShapes
from interventions.manifest import manifest_text
from steering.affine import AffineMap, AffineParameters
from steering.reward import RewardHead
from tests.artifact_samples import (
    Entry,
    Json,
    affine_entries,
    affine_manifest,
    affine_parameters,
    entry,
    floats,
    handmade,
    header_fields,
    manifest_fields,
    reward_entries,
    reward_head,
    reward_manifest,
    same_parameters,
    with_header,
    write,
)

DATA = b"".join(data for _, _, data in affine_entries().values())
METADATA: Json = {"manifest": json.dumps(manifest_fields())}


def _head(parameters: AffineParameters | RewardHead) -> RewardHead:
    assert isinstance(parameters, RewardHead)
    return parameters


def _maps(parameters: AffineParameters | RewardHead) -> AffineParameters:
    assert not isinstance(parameters, RewardHead)
    return parameters


# Writing and reading back


def test_an_affine_artifact_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    digest = write_artifact(path, affine_manifest(), affine_parameters())

    artifact = read_artifact(path)
    assert artifact.digest == digest == sha256(path.read_bytes()).hexdigest()
    assert artifact.size == path.stat().st_size
    assert artifact.manifest == affine_manifest()
    assert same_parameters(artifact.parameters, affine_parameters())
    assert read_manifest(path) == affine_manifest()
    assert artifact_digest(path) == digest
    widths = {"model.layers.0.norm": 4, "model.layers.1.norm": 4}
    assert read_summary(path).shapes == AffineShapes(widths)


def test_a_reward_artifact_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    digest = write_artifact(path, reward_manifest(), reward_head())

    artifact = read_artifact(path)
    assert artifact.digest == digest
    assert same_parameters(artifact.parameters, reward_head())
    head = _head(artifact.parameters)
    assert (head.w2.shape, head.b2.shape, head.positive_reward.shape) == ((3,), (), ())
    assert read_summary(path).shapes == RewardShapes(units=3, width=4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_is_stored_in_half_is_read_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "a.safetensors"
    write_artifact(path, reward_manifest(), reward_head(), dtype)

    stored = safetensors.torch.load_file(path)
    assert {tensor.dtype for tensor in stored.values()} == {dtype}
    head = _head(read_artifact(path).parameters)
    assert head.w1.dtype == torch.float32
    assert torch.equal(head.w1, reward_head().w1.to(dtype).float())


def test_the_same_input_gives_the_same_bytes(tmp_path: Path) -> None:
    parameters = affine_parameters()
    backwards = dict(reversed(parameters.items()))
    first = write_artifact(tmp_path / "a", affine_manifest(), parameters)
    second = write_artifact(tmp_path / "b", affine_manifest(), backwards)
    other = write_artifact(tmp_path / "c", affine_manifest("other"), parameters)

    assert first == second
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert other != first


def test_sites_may_share_a_tensor(tmp_path: Path) -> None:
    ones, bias = torch.ones(4), torch.arange(8.0)[::2]
    parameters = {
        "a.0": AffineMap(ones, bias),
        "a.1": AffineMap(ones, torch.zeros(()).expand(4)),
    }
    write_artifact(tmp_path / "a", affine_manifest(), parameters)
    assert same_parameters(read_artifact(tmp_path / "a").parameters, parameters)


def test_what_was_read_does_not_depend_on_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_artifact(path, affine_manifest(), affine_parameters())
    artifact = read_artifact(path)

    path.write_bytes(b"\xff" * path.stat().st_size)
    assert same_parameters(artifact.parameters, affine_parameters())


def test_unwritable_parameters_leave_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    digest = write_artifact(path, affine_manifest(), affine_parameters())
    head = replace(reward_head(), b1=torch.full((3,), 1e6))

    with pytest.raises(ArtifactError, match="finite"):
        write_artifact(path, reward_manifest(), head, torch.float16)
    with pytest.raises(ArtifactError, match="no tensor called"):
        write_artifact(path, affine_manifest(), head)
    with pytest.raises(ArtifactError, match="float64"):
        write_artifact(path, reward_manifest(), head, torch.float64)
    assert artifact_digest(path) == digest
    assert os.listdir(tmp_path) == [path.name]  # noqa: PTH208


def test_a_header_that_looks_like_a_pickle_is_no_pickle(tmp_path: Path) -> None:
    """A file whose header has 640 (896) bytes starts with 80 02 (80 03), like a pickle."""
    header = json.dumps(header_fields(affine_entries(), METADATA)).encode()
    length = next(size for size in (0x0280, 0x0380, 0x0480) if size >= len(header))
    data = with_header(header.ljust(length), DATA)
    assert data[0] == 0x80
    assert read_artifact(write(tmp_path, data)).manifest == affine_manifest()


def test_bundled_artifacts_can_be_read() -> None:
    for path in bundled_artifacts():
        assert path.suffix == ".safetensors"
        assert read_artifact(path).size == path.stat().st_size


# Handmade files: `handmade` itself makes valid ones


def test_a_handmade_affine_file_is_accepted(tmp_path: Path) -> None:
    part = _maps(read_artifact(write(tmp_path, handmade(affine_entries()))).parameters)
    assert part["model.layers.0.norm"].weight.tolist() == [1, 2]
    assert part["model.layers.0.norm"].bias.tolist() == [3, 4]
    assert part["model.layers.0.norm"].low is None


def test_a_handmade_reward_file_is_accepted(tmp_path: Path) -> None:
    head = _head(read_artifact(write(tmp_path, handmade(reward_entries(), "reward"))).parameters)
    assert head.w1.shape == (3, 2)


def test_other_metadata_is_ignored(tmp_path: Path) -> None:
    header = json.dumps(header_fields(affine_entries(), METADATA | {"format": "pt"})).encode()
    assert read_manifest(write(tmp_path, with_header(header, DATA))) == affine_manifest()


# Files that are no safetensors files


def _pickled() -> bytes:
    return pickle.dumps({"weight": [1.0] * 100}, protocol=2)


def _zipped() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(3)}, buffer)
    assert zipfile.is_zipfile(buffer)
    return buffer.getvalue()


def _legacy() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": torch.ones(3)}, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


@pytest.mark.parametrize("make", [_pickled, _zipped, _legacy])
@pytest.mark.parametrize("read", [read_artifact, read_manifest])
def test_pickles_are_never_read(
    tmp_path: Path, make: Callable[[], bytes], read: Callable[[Path], object]
) -> None:
    with pytest.raises(ArtifactError, match="pickles are never read"):
        read(write(tmp_path, make()))


def _with_length(length: int) -> bytes:
    return length.to_bytes(8, "little") + handmade(affine_entries())[8:]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "cut short"),
        (b"\x01", "cut short"),
        (b"\0" * 8, "not a JSON object"),
        (b"\0" * 4096, "not a JSON object"),
        (b"hello world, this is text", "not a safetensors file"),
        (_with_length(2**64 - 1), "header length lies"),
        (_with_length(2**63), "header length lies"),
        (_with_length(len(handmade(affine_entries())) - 7), "header length lies"),
        (_with_length(5), "not valid JSON"),
        (_with_length(0), "not a JSON object"),
        (with_header(b"{not json}", DATA), "not valid JSON"),
        (with_header(b"[]", DATA), "not a JSON object"),
        (with_header(b"{" * 100_000, b""), "nested too deeply"),
        (with_header(b'{"a":' * 10_000, b""), "nested too deeply"),
        (with_header(b'{"a":' + b"[" * 100_000, b""), "nested too deeply"),
        (with_header(b'{"\xff": 1}', b""), "UTF-8"),
        (with_header(b'{"a": NaN}', b""), "not valid JSON"),
        (with_header(b'{"a": 1, "a": 2}', b""), "repeats the key 'a'"),
        (with_header(b'{"a": 1}', b""), "malformed"),
        (with_header(b'{"' + b"a" * 501 + b'": {}}', b""), r"aaa'… has 501 characters; the limit"),
        (with_header(b'{"' + b"a" * 500 + b'": {}}', b""), "malformed"),
        (with_header(b'{"a": {}}', b""), "malformed"),
        (with_header(b'{"__metadata__": 1}', b""), "not an object"),
        (with_header(b'{"__metadata__": {"manifest": {}}}', b""), "not a string"),
    ],
    ids=lambda value: repr(value)[:30] if isinstance(value, bytes) else value,
)
def test_refuses_what_is_no_safetensors_file(tmp_path: Path, data: bytes, reason: str) -> None:
    with pytest.raises(ArtifactError, match=reason):
        read_artifact(write(tmp_path, data))


@pytest.mark.parametrize("kind", ["affine", "reward"])
def test_refuses_a_file_cut_anywhere(tmp_path: Path, kind: str) -> None:
    data = handmade(affine_entries() if kind == "affine" else reward_entries(), kind)
    for length in range(len(data)):
        with pytest.raises(ArtifactError):
            read_artifact(write(tmp_path, data[:length]))


def test_refuses_appended_bytes(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="appended"):
        read_artifact(write(tmp_path, handmade(affine_entries()) + b"\0"))


WEIGHT = "sites.model.layers.0.norm.weight"
BIAS = "sites.model.layers.0.norm.bias"


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        (BIAS, {"data_offsets": [0, 8]}, "overlap"),
        (BIAS, {"data_offsets": [4, 12]}, "overlap"),
        (BIAS, {"data_offsets": [12, 20]}, "overlap others or leave a gap"),
        (BIAS, {"data_offsets": [8, 20]}, "contradicts"),
        (BIAS, {"data_offsets": [16, 8]}, "contradicts"),
        (BIAS, {"data_offsets": [-8, 0]}, "malformed"),
        (BIAS, {"data_offsets": [8]}, "malformed"),
        (BIAS, {"data_offsets": [8, 16, 24]}, "malformed"),
        (BIAS, {"data_offsets": [8.0, 16.0]}, "malformed"),
        (BIAS, {"data_offsets": "8"}, "malformed"),
        (BIAS, {"shape": [3]}, "contradicts"),
        (BIAS, {"shape": [2**40, 2**40]}, "contradicts"),
        (BIAS, {"shape": [-2]}, "malformed"),
        (BIAS, {"shape": [True, 2]}, "malformed"),
        (BIAS, {"shape": [1, 1, 2]}, "malformed"),
        (BIAS, {"shape": 2}, "malformed"),
        (BIAS, {"dtype": "F64"}, "F64"),
        (BIAS, {"dtype": ["F32"]}, "only F32, F16 and BF16"),
        (BIAS, {"extra": 1}, "malformed"),
        (WEIGHT, {"data_offsets": [0, 2**70]}, "contradicts"),
    ],
)
def test_refuses_a_lying_entry(tmp_path: Path, name: str, fields: Json, reason: str) -> None:
    header = header_fields(affine_entries(), METADATA)
    old = header[name]
    assert isinstance(old, dict)
    header[name] = old | fields
    with pytest.raises(ArtifactError, match=reason):
        read_artifact(write(tmp_path, with_header(json.dumps(header).encode(), DATA)))


def test_a_file_that_goes_while_it_is_read_is_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """safetensors checks the file, and then torch opens it once more."""
    [path, *_] = bundled_artifacts()
    copied = tmp_path / "copied.safetensors"
    copied.write_bytes(path.read_bytes())
    open_by_torch = torch.UntypedStorage.from_file

    def open_too_late(*args: object, **kwargs: object) -> object:
        copied.unlink()
        return open_by_torch(*args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", open_too_late)
    with pytest.raises(UnreadableArtifactError, match="cannot be read"):
        read_artifact(copied)


def test_refuses_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not a regular file"):
        read_artifact(tmp_path)
    with pytest.raises(UnreadableArtifactError, match="cannot be read"):
        read_artifact(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ArtifactError, match="not a regular file"):
        read_artifact(tmp_path / "pipe")


@given(position=st.integers(0, 10_000), byte=st.integers(0, 255))
def test_a_changed_byte_is_refused_or_read_but_never_another_error(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int
) -> None:
    data = bytearray(handmade(affine_entries()))
    data[position % len(data)] = byte
    path = write(tmp_path_factory.mktemp("changed"), bytes(data))
    try:
        artifact = read_artifact(path)
    except ArtifactError:
        return
    assert artifact.digest == sha256(data).hexdigest()


# The manifest inside


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        (None, 'no "manifest"'),
        ({"format": "pt"}, 'no "manifest"'),
        ({"manifest": "{"}, "not valid JSON"),
        ({"manifest": json.dumps(manifest_fields(name="../x"))}, '"name"'),
        ({"manifest": json.dumps(manifest_fields() | {"surprise": 1})}, 'field "surprise"'),
        ({"manifest": json.dumps(manifest_fields() | {"description": "x" * 70_000})}, "65536"),
    ],
)
def test_refuses_a_bad_manifest(tmp_path: Path, metadata: Json | None, reason: str) -> None:
    header = json.dumps(header_fields(affine_entries(), metadata)).encode()
    path = write(tmp_path, with_header(header, DATA))
    for read in (read_artifact, read_manifest):
        with pytest.raises(ArtifactError, match=reason):
            read(path)


# The tensors


def _file(
    base: Mapping[str, Entry], changed: Mapping[str, Entry | None], kind: str = "affine"
) -> bytes:
    entries = dict(base) | {name: value for name, value in changed.items() if value is not None}
    for name, value in changed.items():
        if value is None:
            del entries[name]
    return handmade(entries, kind)


LOW = "sites.model.layers.0.norm.low"
HIGH = "sites.model.layers.0.norm.high"
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({BIAS: None}, f'"{WEIGHT}" has no "{BIAS}"'),
        ({WEIGHT: None}, f'"{BIAS}" has no "{WEIGHT}"'),
        ({WEIGHT: None, BIAS: None}, "no site"),
        (
            {WEIGHT: None, BIAS: None, LOW: entry([2], [0, 0]), HIGH: entry([2], [1, 1])},
            f'"{LOW}" has no "{WEIGHT}"',
        ),
        ({LOW: entry([2], [0, 0])}, f'"{LOW}" has no "{HIGH}"'),
        ({HIGH: entry([2], [0, 0])}, f'"{HIGH}" has no "{LOW}"'),
        ({LOW: entry([2], [0, 2]), HIGH: entry([2], [1, 1])}, "low above its high"),
        ({LOW: entry([2], [0, -INF]), HIGH: entry([2], [1, 1])}, "finite"),
        ({LOW: entry([1], [0]), HIGH: entry([2], [1, 1])}, r"shape \(1\)"),
        ({BIAS: entry([3], [1, 2, 3])}, r"shape \(3\)"),
        ({BIAS: entry([1, 2], [1, 2])}, r"shape \(1, 2\)"),
        ({WEIGHT: entry([1, 2], [1, 2]), BIAS: entry([1, 2], [1, 2])}, "one dimension"),
        ({WEIGHT: entry([], [1]), BIAS: entry([], [1])}, "one dimension"),
        ({WEIGHT: entry([0], []), BIAS: entry([0], [])}, "one dimension"),
        ({BIAS: entry([2], [1, NAN])}, "finite"),
        ({WEIGHT: entry([2], [INF, 1])}, "finite"),
        ({BIAS: ("F16", [2], b"\x00\x7c\x00\x00")}, "finite"),
        ({BIAS: ("BF16", [2], b"\x80\x7f\x00\x00")}, "finite"),
        ({BIAS: ("I64", [2], b"\0" * 16)}, "I64"),
        ({BIAS: ("F64", [2], b"\0" * 16)}, "F64"),
        ({BIAS: ("F8_E4M3", [2], b"\0" * 2)}, "F8_E4M3"),
        ({BIAS: ("BOOL", [2], b"\0" * 2)}, "BOOL"),
        ({"sites.model.layers.0.norm.scale": entry([2], [1, 2])}, "no tensor called"),
        ({"direction": entry([2], [1, 2])}, "no tensor called 'direction'"),
        ({"weight": entry([2], [1, 2])}, "no tensor called 'weight'"),
        ({"sites.weight": entry([2], [1, 2])}, "not the path of a module"),
        ({"sites..weight": entry([2], [1, 2])}, "not the path of a module"),
        ({"sites.a..b.weight": entry([2], [1, 2])}, "not the path of a module"),
        ({"sites.../x.weight": entry([2], [1, 2])}, "not the path of a module"),
        ({"sites.a b.weight": entry([2], [1, 2])}, "not the path of a module"),
        ({"sites.a\n.weight": entry([2], [1, 2])}, "not the path of a module"),
        ({"sites.é.weight": entry([2], [1, 2])}, "not the path of a module"),
        ({f"sites.{'a' * 301}.weight": entry([2], [1, 2])}, "not the path of a module"),
    ],
)
def test_refuses_wrong_affine_tensors(
    tmp_path: Path, changed: Mapping[str, Entry | None], reason: str
) -> None:
    with pytest.raises(ArtifactError, match=reason):
        read_artifact(write(tmp_path, _file(affine_entries(), changed)))


@pytest.mark.parametrize("name", sorted(reward_entries()))
def test_refuses_a_head_that_lacks_a_tensor(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError, match=f'lacks the tensor "{name}"'):
        read_artifact(write(tmp_path, _file(reward_entries(), {name: None}, "reward")))


@pytest.mark.parametrize("name", sorted(reward_entries()))
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_refuses_a_head_that_is_not_finite(tmp_path: Path, name: str, value: float) -> None:
    _, shape, data = reward_entries()[name]
    changed = {name: ("F32", shape, data[:-4] + floats(value))}
    with pytest.raises(ArtifactError, match=f'"{name}" holds a value that is not finite'):
        read_artifact(write(tmp_path, _file(reward_entries(), changed, "reward")))


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("head.0.weight", [6]),
        ("head.0.weight", [2, 3]),
        ("head.0.weight", [0, 2]),
        ("head.0.weight", [3, 0]),
        ("head.0.bias", [4]),
        ("head.0.bias", [1, 3]),
        ("head.2.weight", [3]),
        ("head.2.weight", [3, 1]),
        ("head.2.bias", []),
        ("head.2.bias", [2]),
        ("direction", [3]),
        ("direction", [1, 2]),
        ("positive_reward", [1]),
    ],
)
def test_refuses_a_head_of_wrong_shapes(tmp_path: Path, name: str, shape: list[int]) -> None:
    count = torch.Size(shape).numel()
    changed = {name: entry(shape, [0.5] * count)}
    with pytest.raises(ArtifactError, match=r"has shape .*; expected \("):
        read_artifact(write(tmp_path, _file(reward_entries(), changed, "reward")))


def test_refuses_a_tensor_that_a_head_does_not_have(tmp_path: Path) -> None:
    for name in ("head.1.weight", WEIGHT):
        changed = {name: entry([2], [1, 2])}
        with pytest.raises(ArtifactError, match="no tensor called"):
            read_artifact(write(tmp_path, _file(reward_entries(), changed, "reward")))


def test_refuses_a_kind_that_is_not_its_tensors(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no tensor called"):
        read_artifact(write(tmp_path, handmade(affine_entries(), "reward")))
    with pytest.raises(ArtifactError, match="no tensor called"):
        read_artifact(write(tmp_path, handmade(reward_entries(), "affine")))


# The limits


def test_at_most_8192_hidden_units(tmp_path: Path) -> None:
    widest = handmade(reward_entries(units=8192, width=1), "reward")
    assert _head(read_artifact(write(tmp_path, widest)).parameters).b1.shape == (8192,)
    with pytest.raises(ArtifactError, match="8193 hidden units; the limit is 8192"):
        read_artifact(write(tmp_path, handmade(reward_entries(units=8193, width=1), "reward")))


def _many_sites(count: int) -> bytes:
    parts = ((site, part) for site in range(count) for part in ("weight", "bias"))
    return handmade({f"sites.m.{site}.{part}": entry([1], [1]) for site, part in parts})


def test_at_most_1024_sites(tmp_path: Path) -> None:
    assert len(_maps(read_artifact(write(tmp_path, _many_sites(1024))).parameters)) == 1024
    beyond = r'1025 sites; the limit is 1024\. The tensor "sites\..*" is beyond'
    with pytest.raises(ArtifactError, match=beyond):
        read_artifact(write(tmp_path, _many_sites(1025)))


def test_the_limits_of_bytes(tmp_path: Path) -> None:
    data = handmade(affine_entries())
    path = write(tmp_path, data)
    header_bytes = int.from_bytes(data[:8], "little")
    manifest_bytes = len(manifest_text(affine_manifest())) // 2

    read_artifact(path, ArtifactLimits(max_bytes=len(data), max_header_bytes=header_bytes))
    with pytest.raises(ArtifactError, match=f"the limit is {len(data) - 1}"):
        read_artifact(path, ArtifactLimits(max_bytes=len(data) - 1))
    with pytest.raises(ArtifactError, match=f"the limit is {header_bytes - 1}"):
        read_artifact(path, ArtifactLimits(max_header_bytes=header_bytes - 1))
    with pytest.raises(ArtifactError, match=f"the limit is {manifest_bytes}"):
        read_artifact(path, ArtifactLimits(max_manifest_bytes=manifest_bytes))


def test_the_size_limit_is_checked_before_anything_is_read(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(ArtifactError, match="the limit is 1073741824"):
        read_artifact(path)
