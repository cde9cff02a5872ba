"""Tests of the registry: names, digests, histories, pins, damage, and crashes at every step."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from interventions.artifact import read_artifact, write_artifact
from interventions.catalogue import Entry
from interventions.errors import (
    DamagedInterventionError,
    InvalidNameError,
    RegistryDiskError,
    RegistryError,
    UnknownInterventionError,
)
from interventions.header import ArtifactError, ArtifactLimits
from interventions.layout import AffineShapes
from interventions.registry import Registry
from tests.artifact_samples import (
    affine_manifest,
    affine_parameters,
    reward_head,
    reward_manifest,
    same_parameters,
)
from tests.catalogues import damaged_files, history_of, names_of
from tests.disk import FOLDER_SYNC, SlowDisk, WatchedDisk, watching


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "registry"


@pytest.fixture
def registry(root: Path) -> Iterator[Registry]:
    with Registry(root) as opened:
        yield opened


@pytest.fixture
def make(tmp_path: Path) -> Callable[[int], Path]:
    """Return a function that writes an artifact for a seed; its digest depends on the seed."""

    def make_artifact(seed: int) -> Path:
        path = tmp_path / f"{seed}.safetensors"
        write_artifact(path, affine_manifest(), affine_parameters(seed))
        return path

    return make_artifact


def upload(registry: Registry, path: Path, name: str) -> tuple[Entry, bool]:
    """Stage an artifact in two pieces, check and commit it, as the HTTP API does."""
    with registry.stage() as staged:
        data = path.read_bytes()
        staged.write(data[:100])
        staged.write(data[100:])
        return registry.commit(staged, read_artifact(staged.path), name)


def until(condition: Callable[[], bool]) -> None:
    """Wait until another thread makes the condition true, for at most 20 s."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def files(root: Path) -> set[str]:
    """Return all files in the registry's folder except its lock and the leases."""
    found = (path.relative_to(root) for path in root.rglob("*") if path.is_file())
    return {str(path) for path in found if path.parts[0] not in ("lock", "leases")}


def object_file(digest: str) -> str:
    return f"objects/{digest[:2]}/{digest}.safetensors"


# Storing and finding


def test_stores_and_resolves(registry: Registry, root: Path, make: Callable[[int], Path]) -> None:
    entry, new = upload(registry, make(1), "detox")

    assert new
    assert entry.name == "detox"
    assert entry.size == make(1).stat().st_size
    assert entry.manifest == affine_manifest()
    assert [(version.digest, version.event) for version in entry.history] == [
        (entry.digest, "stored")
    ]
    assert entry.created == entry.history[0].at
    assert entry.created.tzinfo is not None
    assert registry.resolve("detox") == registry.resolve("detox") == entry
    assert registry.resolve(f"sha256:{entry.digest}") == entry
    assert registry.entries() == [entry]
    assert files(root) == {object_file(entry.digest), "names/detox.json"}
    assert registry.path(entry.digest).read_bytes() == make(1).read_bytes()
    loaded = registry.load(entry.digest)
    assert loaded.digest == entry.digest
    assert same_parameters(loaded.parameters, affine_parameters(1))
    widths = {"model.layers.0.norm": 4, "model.layers.1.norm": 4}
    assert registry.shapes(entry.digest) == AffineShapes(widths)


def test_everything_is_there_after_opening_again(root: Path, make: Callable[[int], Path]) -> None:
    with Registry(root) as registry:
        upload(registry, make(1), "a")
        upload(registry, make(2), "a")
        upload(registry, make(3), "b")
        upload(registry, make(4), "gone")
        registry.delete("gone")
        entries = registry.entries()
        history = history_of(registry, "gone")
    with Registry(root) as registry:
        assert registry.entries() == entries
        assert [entry.name for entry in entries] == ["a", "b"]
        assert history_of(registry, "gone") == history
        assert damaged_files(registry) == ()


def test_add_takes_the_manifests_name_or_another(
    registry: Registry, make: Callable[[int], Path]
) -> None:
    assert registry.add(make(1)).name == "sample"
    assert registry.add(make(2), "other").name == "other"
    assert make(1).exists()


def test_both_kinds(registry: Registry, tmp_path: Path) -> None:
    write_artifact(tmp_path / "head", reward_manifest("head"), reward_head())
    entry = registry.add(tmp_path / "head")
    assert entry.manifest.kind == "reward"
    assert same_parameters(registry.load(entry.digest).parameters, reward_head())


@pytest.mark.parametrize("reference", ["missing", "", "../x", "sha256:", "sha256:" + "0" * 64])
def test_an_unknown_reference(registry: Registry, reference: str) -> None:
    with pytest.raises(UnknownInterventionError) as caught:
        registry.resolve(reference)
    assert caught.value.reference == reference
    assert not registry.known(reference)


@pytest.mark.parametrize("name", ["", "../x", "a/b", "A", "a" * 65, "a\n", ".hidden", "sha256:0"])
def test_a_bad_name_stores_nothing(
    registry: Registry, root: Path, make: Callable[[int], Path], name: str
) -> None:
    with pytest.raises(InvalidNameError):
        upload(registry, make(1), name)
    with pytest.raises(InvalidNameError):
        registry.add(make(1), name)
    assert files(root) == set()


def test_a_file_that_is_no_artifact_stores_nothing(
    registry: Registry, root: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad").write_bytes(b"nothing")
    with pytest.raises(ArtifactError):
        registry.add(tmp_path / "bad")
    with pytest.raises(ArtifactError):
        upload(registry, tmp_path / "bad", "bad")
    assert files(root) == set()


def test_the_size_limit_holds_while_writing(root: Path) -> None:
    with Registry(root, ArtifactLimits(max_bytes=10)) as registry, registry.stage() as staged:
        staged.write(b"0123456789")
        with pytest.raises(ArtifactError, match="limit of 10 bytes"):
            staged.write(b"0")


def test_only_the_bytes_that_were_checked_are_stored(
    registry: Registry, root: Path, make: Callable[[int], Path]
) -> None:
    other = read_artifact(make(2))
    with registry.stage() as staged:
        staged.write(make(1).read_bytes())
        with pytest.raises(RegistryDiskError, match="not those of the artifact; nothing was"):
            registry.commit(staged, other, "a")
    assert files(root) == set()


def test_discarding_twice_and_after_a_commit(
    registry: Registry, make: Callable[[int], Path]
) -> None:
    staged = registry.stage()
    staged.write(make(1).read_bytes())
    entry, _ = registry.commit(staged, read_artifact(staged.path), "a")
    staged.discard()
    staged.discard()
    assert registry.load(entry.digest).digest == entry.digest


# Versions


def test_the_same_bytes_twice_is_no_error_and_nothing_new(
    registry: Registry, root: Path, make: Callable[[int], Path]
) -> None:
    first, _ = upload(registry, make(1), "a")
    before = files(root)
    again, new = upload(registry, make(1), "a")
    assert (again, new) == (first, False)
    assert files(root) == before


def test_the_same_bytes_under_another_name(
    registry: Registry, root: Path, make: Callable[[int], Path]
) -> None:
    first, _ = upload(registry, make(1), "b")
    second, new = upload(registry, make(1), "a")
    assert new
    assert second.digest == first.digest
    assert files(root) == {object_file(first.digest), "names/a.json", "names/b.json"}
    assert registry.resolve(f"sha256:{first.digest}").name == "a"


def test_a_new_version_moves_the_name_and_keeps_the_old_bytes(
    registry: Registry, make: Callable[[int], Path]
) -> None:
    old, _ = upload(registry, make(1), "a")
    new, is_new = upload(registry, make(2), "a")

    assert is_new
    assert registry.resolve("a") == new
    assert [version.digest for version in new.history] == [old.digest, new.digest]
    reference = f"sha256:{old.digest}"
    by_digest = registry.resolve(reference)
    assert (by_digest.name, by_digest.digest) == (reference, old.digest)
    assert by_digest.created == old.created
    assert same_parameters(registry.load(old.digest).parameters, affine_parameters(1))


def test_going_back_to_an_old_version(registry: Registry, make: Callable[[int], Path]) -> None:
    first, _ = upload(registry, make(1), "a")
    second, _ = upload(registry, make(2), "a")
    third, new = upload(registry, make(1), "a")
    assert new
    assert [version.digest for version in third.history] == [
        first.digest,
        second.digest,
        first.digest,
    ]


# Deleting


def test_deleting_lets_all_versions_go_and_leaves_a_tombstone(
    registry: Registry, root: Path, make: Callable[[int], Path]
) -> None:
    old, _ = upload(registry, make(1), "a")
    new, _ = upload(registry, make(2), "a")
    registry.delete("a")

    assert files(root) == {"names/a.json"}
    assert registry.known("a")
    assert registry.entries() == []
    for reference in ("a", f"sha256:{old.digest}", f"sha256:{new.digest}"):
        with pytest.raises(UnknownInterventionError):
            registry.resolve(reference)
    for digest in (old.digest, new.digest):
        with pytest.raises(UnknownInterventionError):
            registry.load(digest)
        with pytest.raises(UnknownInterventionError):
            registry.pin(digest)
        with pytest.raises(UnknownInterventionError):
            registry.shapes(digest)
    last = history_of(registry, "a")[-1]
    assert (last.digest, last.event) == ("", "deleted")


def test_the_names_of_a_digest(registry: Registry, make: Callable[[int], Path]) -> None:
    first, second = registry.add(make(1), "a").digest, read_artifact(make(2)).digest
    registry.add(make(1), "b")
    assert names_of(registry, first) == {"a", "b"}
    assert names_of(registry, second) == set()
    registry.add(make(2), "a")
    assert names_of(registry, first) == {"b"}
    assert names_of(registry, second) == {"a"}
    registry.delete("b")
    assert names_of(registry, first) == {"a"}  # an earlier version of "a"
    registry.delete("a")
    assert names_of(registry, first) == names_of(registry, second) == set()


def test_deleting_what_is_not_there(registry: Registry, make: Callable[[int], Path]) -> None:
    with pytest.raises(UnknownInterventionError):
        registry.delete("a")
    assert not registry.known("a")
    upload(registry, make(1), "a")
    registry.delete("a")
    with pytest.raises(UnknownInterventionError):
        registry.delete("a")
    assert len(history_of(registry, "a")) == 2


def test_deleting_keeps_what_another_name_needs(
    registry: Registry, make: Callable[[int], Path]
) -> None:
    shared, _ = upload(registry, make(1), "a")
    upload(registry, make(1), "b")
    upload(registry, make(2), "b")  # the shared bytes are an old version of b
    registry.delete("a")
    assert registry.load(shared.digest).digest == shared.digest
    registry.delete("b")
    assert not registry.path(shared.digest).exists()


def test_storing_a_deleted_name_again(registry: Registry, make: Callable[[int], Path]) -> None:
    old, _ = upload(registry, make(1), "a")
    registry.delete("a")
    entry, new = upload(registry, make(2), "a")

    assert new
    assert [version.event for version in entry.history] == ["stored", "deleted", "stored"]
    with pytest.raises(UnknownInterventionError):  # what came before the deletion stays gone
        registry.resolve(f"sha256:{old.digest}")


def test_storing_the_same_bytes_again_after_a_deletion(
    registry: Registry, make: Callable[[int], Path]
) -> None:
    upload(registry, make(1), "a")
    registry.delete("a")
    entry, new = upload(registry, make(1), "a")
    assert new
    assert registry.load(entry.digest).digest == entry.digest


# Pins


def test_pinned_bytes_outlive_their_name(registry: Registry, make: Callable[[int], Path]) -> None:
    entry, _ = upload(registry, make(1), "a")
    registry.pin(entry.digest)
    registry.pin(entry.digest)
    registry.delete("a")

    with pytest.raises(UnknownInterventionError):  # no new request gets it
        registry.resolve(f"sha256:{entry.digest}")
    registry.unpin(entry.digest)
    assert same_parameters(registry.load(entry.digest).parameters, affine_parameters(1))
    registry.unpin(entry.digest)
    until(lambda: not registry.path(entry.digest).exists())


def test_unpinning_keeps_what_a_name_needs(registry: Registry, make: Callable[[int], Path]) -> None:
    entry, _ = upload(registry, make(1), "a")
    registry.pin(entry.digest)
    registry.unpin(entry.digest)
    assert registry.load(entry.digest).digest == entry.digest
    with pytest.raises(RegistryError, match="not pinned"):
        registry.unpin(entry.digest)


def test_pinned_bytes_of_a_deleted_name_go_at_the_next_start(
    root: Path, make: Callable[[int], Path]
) -> None:
    with Registry(root) as registry:
        entry, _ = upload(registry, make(1), "a")
        registry.pin(entry.digest)
        registry.delete("a")
    registry.unpin(entry.digest)  # once closed, the folder may be another process's
    assert registry.path(entry.digest).exists()
    with Registry(root):
        assert files(root) == {"names/a.json"}


def test_no_pin_takes_bytes_that_are_being_removed(
    registry: Registry, root: Path, make: Callable[[int], Path]
) -> None:
    entry, _ = upload(registry, make(1), "a")
    disk = SlowDisk("unlink")
    with ThreadPoolExecutor(1) as pool, watching(root, disk.before):
        deletion = pool.submit(registry.delete, "a")
        until(lambda: bool(disk.waiting))
        with pytest.raises(UnknownInterventionError):
            registry.pin(entry.digest)
        assert registry.path(entry.digest).exists()
        disk.go_on.set()
        deletion.result()
    assert not registry.path(entry.digest).exists()
    assert disk.on_the_loop == []


def test_a_pin_that_comes_during_a_deletion_keeps_the_bytes(
    registry: Registry, root: Path, make: Callable[[int], Path]
) -> None:
    entry, _ = upload(registry, make(1), "a")
    disk = SlowDisk(FOLDER_SYNC)
    with ThreadPoolExecutor(1) as pool, watching(root, disk.before):
        deletion = pool.submit(registry.delete, "a")
        until(lambda: bool(disk.waiting))
        registry.pin(entry.digest)
        disk.go_on.set()
        deletion.result()
    assert disk.on_the_loop == []
    assert registry.load(entry.digest).digest == entry.digest
    registry.unpin(entry.digest)
    until(lambda: not registry.path(entry.digest).exists())


def test_many_threads(registry: Registry, make: Callable[[int], Path]) -> None:
    paths = [make(seed) for seed in range(4)]
    upload(registry, paths[0], "shared")
    start = threading.Barrier(4)

    def work(thread: int) -> None:
        start.wait()
        for round_number in range(6):
            upload(registry, paths[(thread + round_number) % 4], "shared")
            upload(registry, paths[thread], f"own-{thread}")
            digest = registry.resolve("shared").digest
            registry.pin(digest)
            assert registry.load(digest).digest == digest
            registry.delete(f"own-{thread}")
            registry.unpin(digest)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert [entry.name for entry in registry.entries()] == ["shared"]
    for version in registry.resolve("shared").history:
        assert registry.load(version.digest).digest == version.digest


# Opening and closing


def test_a_closed_registry_takes_no_changes(
    registry: Registry, make: Callable[[int], Path]
) -> None:
    upload(registry, make(1), "a")
    staged = registry.stage()
    staged.write(make(2).read_bytes())
    artifact = read_artifact(staged.path)
    registry.close()
    registry.close()

    with pytest.raises(RegistryError, match="closed"):
        registry.stage()
    with pytest.raises(RegistryError, match="closed"):
        registry.commit(staged, artifact, "b")
    with pytest.raises(RegistryError, match="closed"):
        registry.delete("a")
    staged.discard()


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RegistryError, match="cannot be opened"):
        Registry(tmp_path / "file")
    (tmp_path / "registry").mkdir()
    (tmp_path / "registry" / "names").write_text("")
    with pytest.raises(RegistryError, match="cannot be opened"):
        Registry(tmp_path / "registry")
    (tmp_path / "registry" / "names").unlink()
    Registry(tmp_path / "registry").close()  # the lock was let go


# Damage


def test_leftovers_are_removed_at_the_start(root: Path, make: Callable[[int], Path]) -> None:
    with Registry(root) as registry:
        kept, _ = upload(registry, make(1), "a")
        stray, _ = upload(registry, make(2), "b")
    (root / "names" / "b.json").unlink()
    (root / "tmp" / "half").write_bytes(b"half")
    with Registry(root):
        assert files(root) == {object_file(kept.digest), "names/a.json"}
    assert stray.digest != kept.digest


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b"\xff",
        b"[" * 100_000,
        b'{"name": "a", "versions": [], "format": "steerserve-name/1"}',
        b'{"name": "b", "versions": [{"digest": "", "at": "2026-11-21T00:00:00Z", '
        b'"event": "deleted"}], "format": "steerserve-name/1"}',
        b'{"name": "a", "versions": [{"digest": "", "at": "2026-11-21T00:00:00Z", '
        b'"event": "stored"}], "format": "steerserve-name/1"}',
        b'{"name": "a", "versions": [{"digest": "../x", "at": "2026-11-21T00:00:00Z", '
        b'"event": "stored"}], "format": "steerserve-name/1"}',
        b'{"name": "a", "versions": [], "format": "steerserve-name/2"}',
    ],
)
def test_a_damaged_record_loses_nothing(
    root: Path,
    make: Callable[[int], Path],
    caplog: pytest.LogCaptureFixture,
    content: bytes,
) -> None:
    with Registry(root) as registry:
        behind, _ = upload(registry, make(1), "a")
        upload(registry, make(2), "fine")
    record = root / "names" / "a.json"
    record.write_bytes(content)
    before = files(root)

    with caplog.at_level(logging.WARNING), Registry(root) as registry:
        assert str(record) in caplog.text
        assert [damage.path for damage in damaged_files(registry)] == [record]
        assert registry.known("a")
        assert [entry.name for entry in registry.entries()] == ["fine"]
        with pytest.raises(DamagedInterventionError, match="damaged"):
            registry.resolve("a")
        with pytest.raises(DamagedInterventionError):
            registry.delete("a")
        assert files(root) == before  # also the bytes that the record may have pointed to

        upload(registry, make(3), "a")  # replaces the record, whose bytes are kept beside it
        assert registry.resolve("a").manifest == affine_manifest()
        registry.delete("fine")
    with Registry(root) as registry:
        kept = [damage.path for damage in damaged_files(registry)]
        assert [path.read_bytes() for path in kept] == [content]
        assert object_file(behind.digest) in files(root)
        assert [entry.name for entry in registry.entries()] == ["a"]


def test_a_damaged_object_loses_nothing_and_heals(
    root: Path, make: Callable[[int], Path], caplog: pytest.LogCaptureFixture
) -> None:
    with Registry(root) as registry:
        entry, _ = upload(registry, make(1), "a")
        upload(registry, make(2), "fine")
    damaged = registry.path(entry.digest)
    damaged.write_bytes(b"damaged")

    with caplog.at_level(logging.WARNING), Registry(root) as registry:
        assert str(damaged) in caplog.text
        assert [damage.path for damage in damaged_files(registry)] == [damaged]
        assert [found.name for found in registry.entries()] == ["fine"]
        for reference in ("a", f"sha256:{entry.digest}"):
            with pytest.raises(DamagedInterventionError):
                registry.resolve(reference)
        assert damaged.read_bytes() == b"damaged"
        _, new = upload(registry, make(1), "a")
        assert not new
        assert damaged_files(registry) == ()
        assert registry.load(registry.resolve("a").digest).digest == entry.digest


def test_a_missing_object(root: Path, make: Callable[[int], Path]) -> None:
    with Registry(root) as registry:
        entry, _ = upload(registry, make(1), "a")
    registry.path(entry.digest).unlink()
    with Registry(root) as registry:
        assert [damage.path for damage in damaged_files(registry)] == [registry.path(entry.digest)]
        with pytest.raises(DamagedInterventionError):
            registry.resolve("a")
        registry.delete("a")
        assert registry.entries() == []


def test_foreign_files_stay(root: Path, make: Callable[[int], Path]) -> None:
    with Registry(root) as registry:
        upload(registry, make(1), "a")
    foreign = {"objects/README", "objects/ab/notes.txt", "names/README", "names/UPPER.json"}
    for path in foreign:
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_text("mine")
    with Registry(root) as registry:
        assert {damage.path for damage in damaged_files(registry)} == {
            root / path for path in foreign
        }
        assert foreign < files(root)
        assert registry.resolve("a").name == "a"


def test_changed_bytes_are_noticed_when_loaded(
    registry: Registry, make: Callable[[int], Path]
) -> None:
    entry, _ = upload(registry, make(1), "a")
    data = bytearray(make(1).read_bytes())
    data[-2] ^= 1  # another finite number
    registry.path(entry.digest).write_bytes(data)
    with pytest.raises(DamagedInterventionError, match="changed"):
        registry.load(entry.digest)
    registry.path(entry.digest).write_bytes(b"short")
    with pytest.raises(DamagedInterventionError):
        registry.load(entry.digest)


# A crash at every step


class PowerCutError(BaseException):
    """Stands for a power cut: a BaseException, which the code under test does not handle."""


class _Steps:
    """Records the operations that change the disk; the power is cut before number `stop_before`."""

    def __init__(
        self, root: Path, monkeypatch: pytest.MonkeyPatch, stop_before: int | None
    ) -> None:
        self.calls: list[str] = []
        self._stop_before = stop_before
        WatchedDisk(root, self._count).install(monkeypatch)

    def _count(self, operation: str, path: Path) -> None:
        if len(self.calls) == self._stop_before:
            raise PowerCutError
        self.calls.append(f"{operation} {path.parent.name}/{path.suffix}")


STAGING = [
    "create tmp/.tmp",
    "write tmp/.tmp",
    "write tmp/.tmp",
    "fsync tmp/.tmp",
    "close tmp/.tmp",
]
RECORD = [
    "create tmp/.tmp",
    "write tmp/.tmp",
    "fsync tmp/.tmp",
    "close tmp/.tmp",
    "replace tmp/.tmp",  # moves the record to its place
    "fsync of a folder registry/",  # of the folder `names`
]
COMMIT = [*STAGING, "replace tmp/.tmp", "fsync of a folder objects/", *RECORD]
DELETION = [*RECORD, "unlink {shard}/.safetensors"]


def test_the_order_of_a_commit(
    registry: Registry, root: Path, make: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry, _ = upload(registry, make(1), "a")
    registry.delete("a")
    path = make(1)

    with monkeypatch.context() as patched:
        steps = _Steps(root, patched, stop_before=None)
        upload(registry, path, "a")
        unlocked = "close registry/"
        assert steps.calls == [*COMMIT, unlocked, "unlink tmp/.tmp"]
        steps.calls.clear()
        registry.delete("a")
        deletion = [call.format(shard=entry.digest[:2]) for call in DELETION]
        assert steps.calls == [*deletion, unlocked]


@pytest.mark.parametrize("step", range(len(COMMIT)))
def test_a_crash_at_any_step_of_a_commit(
    root: Path, make: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    replacement = make(2)
    with Registry(root) as registry:
        old, _ = upload(registry, make(1), "a")
        digest = read_artifact(replacement).digest
        registry.path(digest).parent.mkdir(exist_ok=True)
        with monkeypatch.context() as patched:
            _Steps(root, patched, stop_before=step)
            with pytest.raises(PowerCutError):
                upload(registry, replacement, "a")
    with Registry(root) as registry:
        resolved = registry.resolve("a")
        assert resolved.digest == (digest if step == len(COMMIT) - 1 else old.digest)
        assert registry.load(resolved.digest).digest == resolved.digest
        assert registry.load(old.digest).digest == old.digest
        assert damaged_files(registry) == ()
        kept = {object_file(version.digest) for version in resolved.history}
        assert files(root) == kept | {"names/a.json"}


@pytest.mark.parametrize("step", range(len(DELETION)))
def test_a_crash_at_any_step_of_a_deletion(
    root: Path, make: Callable[[int], Path], monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    with Registry(root) as registry:
        old, _ = upload(registry, make(1), "a")
        with monkeypatch.context() as patched:
            _Steps(root, patched, stop_before=step)
            with pytest.raises(PowerCutError):
                registry.delete("a")
    with Registry(root) as registry:
        assert registry.known("a")
        if step < len(DELETION) - 2:
            assert registry.load(registry.resolve("a").digest).digest == old.digest
        else:
            assert files(root) == {"names/a.json"}


def test_records_are_plain_json(
    registry: Registry, root: Path, make: Callable[[int], Path]
) -> None:
    entry, _ = upload(registry, make(1), "a")
    record = json.loads((root / "names" / "a.json").read_text())
    assert record["format"] == "steerserve-name/1"
    assert record["name"] == "a"
    assert [version["digest"] for version in record["versions"]] == [entry.digest]
