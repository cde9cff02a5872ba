"""Tests of a disk that is full or fails at any operation: nothing is lost and nothing left over."""

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

import pytest

from interventions.artifact import read_artifact, write_artifact
from interventions.catalogue import Entry
from interventions.errors import RegistryDiskError
from interventions.name_records import Version
from interventions.registry import Registry
from tests.artifact_samples import affine_manifest, affine_parameters
from tests.catalogues import damaged_files, history_of
from tests.disk import FaultyDisk, watching

CHUNK_BYTES = 700  # an artifact comes in two chunks
NAMES = ("a", "b", "new")
FULL, FAILING = errno.ENOSPC, errno.EIO

Contents: TypeAlias = tuple[list[Entry], dict[str, tuple[Version, ...]]]
Artifacts: TypeAlias = tuple[Path, ...]
Change: TypeAlias = Callable[[Registry, Artifacts], object]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Write four artifacts of different bytes; return their paths."""
    folder = tmp_path_factory.mktemp("artifacts")
    paths = tuple(folder / f"{seed}.safetensors" for seed in range(4))
    for seed, path in enumerate(paths):
        write_artifact(path, affine_manifest(), affine_parameters(seed))
    return paths


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Return an empty folder, in memory if possible, since hundreds of registries come and go."""
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=parent) as made:
        yield Path(made)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, artifacts: Artifacts) -> Path:
    """Make a registry where "a" has two versions and "b" the second of them; return its folder."""
    root = tmp_path_factory.mktemp("template") / "registry"
    with Registry(root) as registry:
        for number, name in ((0, "a"), (1, "a"), (1, "b")):
            upload(registry, artifacts[number], name)
    return root


def upload(registry: Registry, path: Path, name: str) -> None:
    """Stage an artifact in chunks, check and commit it, as the HTTP API does."""
    with registry.stage() as staged:
        data = path.read_bytes()
        for start in range(0, len(data), CHUNK_BYTES):
            staged.write(data[start : start + CHUNK_BYTES])
        registry.commit(staged, read_artifact(staged.path), name)


def contents(registry: Registry) -> Contents:
    """Return a registry's entries, and the history of each name that it knows."""
    known = [name for name in NAMES if registry.known(name)]
    return registry.entries(), {name: history_of(registry, name) for name in known}


def reopened(root: Path) -> Contents:
    """Open a copy of the folder as another registry, and return its contents."""
    copy = root.with_name("copy")
    shutil.copytree(root, copy)
    try:
        with Registry(copy) as other:
            return contents(other)
    finally:
        shutil.rmtree(copy)


def objects(root: Path) -> set[str]:
    return {path.stem for path in (root / "objects").rglob("*.safetensors")}


def referred(registry: Registry) -> set[str]:
    """Return the digests that live names have had since their last deletion."""
    digests: set[str] = set()
    for entry in registry.entries():
        for version in reversed(entry.history):
            if version.event == "deleted":
                break
            digests.add(version.digest)
    return digests


def nothing_left(registry: Registry, root: Path) -> bool:
    """Return whether the folder has no files but those that its names need."""
    names = {f"{name}.json" for name in NAMES if registry.known(name)}
    return (
        not list((root / "tmp").iterdir())
        and objects(root) == referred(registry)
        and {path.name for path in (root / "names").iterdir()} == names
    )


CHANGES: dict[str, Change] = {
    "a new name": lambda registry, artifacts: upload(registry, artifacts[2], "new"),
    "a new version": lambda registry, artifacts: upload(registry, artifacts[2], "a"),
    "bytes that are stored": lambda registry, artifacts: upload(registry, artifacts[0], "new"),
    "nothing new": lambda registry, artifacts: upload(registry, artifacts[1], "b"),
    "a deletion": lambda registry, _: registry.delete("a"),
    "a deletion of shared bytes": lambda registry, _: registry.delete("b"),
}


def operations(change: Change, template: Path, root: Path, artifacts: Artifacts) -> int:
    """Return how many disk operations a change takes."""
    shutil.copytree(template, root)
    counted = FaultyDisk(-1, FAILING, lasting=False)
    with Registry(root) as registry, watching(root, counted.before):
        change(registry, artifacts)
    return len(counted.done)


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from there on"])
@pytest.mark.parametrize("fails", [FULL, FAILING], ids=["full", "failing"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_disk_that_refuses_any_operation(
    folder: Path, template: Path, artifacts: Artifacts, what: str, fails: int, lasting: bool
) -> None:
    change = CHANGES[what]
    count = operations(change, template, folder / "counted", artifacts)
    assert count >= 5
    for number in range(count):
        root = folder / str(number)
        shutil.copytree(template, root)
        with Registry(root) as registry:
            before = contents(registry)
            disk = FaultyDisk(number, fails, lasting=lasting)
            error = None
            with watching(root, disk.before):
                try:
                    change(registry, artifacts)
                except RegistryDiskError as raised:
                    error = raised
            place = f"{disk.refused} after {disk.done[:number]}"

            after = contents(registry)
            if error is not None:
                assert disk.refused, place
                assert error.full == (fails == FULL), place
                assert str(root) not in str(error)
                assert (after != before) == error.visible, place
            else:
                assert (after != before) == (what != "nothing new"), place
            if fails == FULL and "deletion" in what:
                assert error is None, place
            assert reopened(root) == after, place
            for entry in registry.entries():
                assert registry.load(entry.digest).digest == entry.digest, place
            # Bytes stay until the deletion of their name is sure to last.
            if "unlink" not in disk.refused and not (lasting and "deletion" in what):
                assert nothing_left(registry, root), place

            upload(registry, artifacts[3], "new")
            assert nothing_left(registry, root), place
            registry.delete("new")
            assert nothing_left(registry, root), place
            assert reopened(root) == contents(registry), place


class UnreadableDisk:
    """Refuses to list a folder or to read a record, once or from then on."""

    def __init__(self, root: Path, number: int, *, lasting: bool) -> None:
        """Refuse read number `number` (from 0) below `root`, and all later ones if `lasting`."""
        self._root = root
        self._number = number
        self._lasting = lasting
        self.done = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Refuse until the patches are undone."""
        scandir, read_bytes = os.scandir, Path.read_bytes

        def refuse_list(path: str) -> "os._ScandirIterator[str]":
            self._refuse(path)
            return scandir(path)

        def refuse_read(path: Path) -> bytes:
            self._refuse(path)
            return read_bytes(path)

        monkeypatch.setattr(os, "scandir", refuse_list)
        monkeypatch.setattr(Path, "read_bytes", refuse_read)

    def _refuse(self, path: str | Path) -> None:
        if not Path(path).is_relative_to(self._root):
            return
        number, self.done = self.done, self.done + 1
        if number == self._number or (self._lasting and number > self._number):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from there on"])
@pytest.mark.parametrize("what", CHANGES)
def test_a_disk_that_cannot_be_read_at_any_moment(
    folder: Path, template: Path, artifacts: Artifacts, what: str, lasting: bool
) -> None:
    for number in range(1000):
        root = folder / str(number)
        shutil.copytree(template, root)
        with Registry(root) as registry:
            before = contents(registry)
            disk = UnreadableDisk(root, number, lasting=lasting)
            error = None
            with pytest.MonkeyPatch.context() as patched:
                disk.install(patched)
                try:
                    CHANGES[what](registry, artifacts)
                except RegistryDiskError as raised:
                    error = raised
            assert damaged_files(registry) == ()
            registry.poll()
            after = contents(registry)
            made = what != "nothing new" and (error is None or error.visible)
            assert (after != before) == made, number
            assert reopened(root) == after, number
            for entry in registry.entries():
                assert registry.load(entry.digest).digest == entry.digest, number
            registry.heartbeat()
            assert nothing_left(registry, root), number
        if disk.done <= number:
            break
    assert 5 < number < 999


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Mount a file system of 1 MB, or skip the test where this user may not."""
    mount_point = tmp_path / "disk"
    mount_point.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(mount_point)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield mount_point
    finally:
        subprocess.run(["umount", "--lazy", str(mount_point)], check=True)


def fill(path: Path) -> None:
    """Write into a file until the disk is full."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1024))


def test_a_file_system_that_is_full(small_disk: Path, artifacts: Artifacts) -> None:
    root = small_disk / "registry"
    with Registry(root) as registry:
        upload(registry, artifacts[0], "a")
        upload(registry, artifacts[0], "b")
        fill(small_disk / "filler")
        before = contents(registry)
        for name in ("a", "new"):
            with pytest.raises(RegistryDiskError) as caught:
                upload(registry, artifacts[1], name)
            assert caught.value.full
            assert contents(registry) == before
            assert nothing_left(registry, root)

        registry.delete("a")  # frees nothing, as "b" has the same bytes
        assert [entry.name for entry in registry.entries()] == ["b"]
        deleted = history_of(registry, "a")
        assert {path.name for path in (root / "names").iterdir()} == {"a.deleted", "b.json"}
    with Registry(root) as registry:
        assert [entry.name for entry in registry.entries()] == ["b"]
        history = history_of(registry, "a")
        assert [version.event for version in history] == ["stored", "deleted"]
        assert abs(history[-1].at - deleted[-1].at).total_seconds() < 0.001
        registry.delete("b")  # frees its bytes, which is room for both records
        assert nothing_left(registry, root)
        assert history_of(registry, "a") == history
        (small_disk / "filler").unlink()
        upload(registry, artifacts[0], "a")
        assert [version.event for version in history_of(registry, "a")] == [
            "stored",
            "deleted",
            "stored",
        ]
        assert nothing_left(registry, root)


def test_servers_that_start_on_a_full_disk(small_disk: Path, artifacts: Artifacts) -> None:
    """Their leases cannot be written, which keeps neither from deleting to make room."""
    root = small_disk / "registry"
    with Registry(root) as registry:
        upload(registry, artifacts[0], "a")
        upload(registry, artifacts[1], "b")
    fill(small_disk / "filler")
    with Registry(root) as one, Registry(root) as two:
        digest = two.resolve("a").digest
        two.pin(digest)
        one.delete("a")
        one.heartbeat()
        assert two.load(digest).digest == digest
        (small_disk / "filler").unlink()
        for _ in range(3):
            two.heartbeat()
            one.heartbeat()
        assert two.load(digest).digest == digest
        two.unpin(digest)
        for registry in (two, two, one):
            registry.heartbeat()
        assert objects(root) == {one.resolve("b").digest}


def test_a_record_is_newer_than_the_mark_beside_it(
    folder: Path, template: Path, artifacts: Artifacts
) -> None:
    """A crash between writing the record and removing the mark of a deletion leaves both."""
    root = folder / "registry"
    shutil.copytree(template, root)
    shutil.copy(root / "names" / "a.json", root / "names" / "a.deleted")
    with Registry(root) as registry:
        assert registry.resolve("a").manifest == affine_manifest()
        assert nothing_left(registry, root)
    shutil.copy(root / "names" / "a.json", root / "names" / "a.deleted")
    (root / "names" / "a.json").write_bytes(b"damaged")
    with Registry(root) as registry:
        assert [damage.path.name for damage in damaged_files(registry)] == ["a.json"]
        assert (root / "names" / "a.json").read_bytes() == b"damaged"
        assert len(objects(root)) == 2
    (root / "names" / "a.json").unlink()
    (root / "names" / "b.deleted").write_bytes(b"damaged")
    with Registry(root) as registry:
        assert [damage.path.name for damage in damaged_files(registry)] == ["b.deleted"]
        assert [entry.name for entry in registry.entries()] == ["b"]
        assert [version.event for version in history_of(registry, "a")][-1] == "deleted"


def test_a_mark_with_a_time_that_no_calendar_has(folder: Path, template: Path) -> None:
    root = folder / "registry"
    shutil.copytree(template, root)
    (root / "names" / "a.json").rename(root / "names" / "a.deleted")
    os.utime(root / "names" / "a.deleted", (1e12, 1e12))
    if (root / "names" / "a.deleted").stat().st_mtime < 1e12:
        pytest.skip("the file system has no such times")
    with Registry(root) as registry:
        assert [damage.path.name for damage in damaged_files(registry)] == ["a.deleted"]
        assert [entry.name for entry in registry.entries()] == ["b"]


def test_an_upload_in_place_of_a_damaged_record(
    folder: Path, template: Path, artifacts: Artifacts
) -> None:
    """Bytes that the damaged record may point to stay; those of a failed upload go."""
    damaged = folder / "damaged"
    shutil.copytree(template, damaged)
    (damaged / "names" / "b.json").write_bytes(b"damaged")
    change: Change = lambda registry, artifacts: upload(registry, artifacts[2], "b")  # noqa: E731
    for number in range(operations(change, damaged, folder / "counted", artifacts)):
        root = folder / str(number)
        shutil.copytree(damaged, root)
        stored = objects(root)
        with Registry(root) as registry:
            disk = FaultyDisk(number, FAILING, lasting=False)
            with watching(root, disk.before):
                try:
                    change(registry, artifacts)
                    made = True
                except RegistryDiskError as error:
                    made = error.visible
            place = f"{disk.refused} after {disk.done[:number]}"
            kept = [path.name for path in (root / "names").iterdir() if path.suffix == ".damaged"]
            assert len(kept) == made, place
            assert len(damaged_files(registry)) == 1, place
            assert (objects(root) == stored) == (not made), place
            assert stored <= objects(root), place
            assert not list((root / "tmp").iterdir()) or "unlink" in disk.refused, place
            upload(registry, artifacts[2], "b")
            assert registry.resolve("b").digest in objects(root)
            assert not list((root / "tmp").iterdir())


def test_failed_removal_is_retried_by_the_next_change(
    folder: Path, template: Path, artifacts: Artifacts
) -> None:
    root = folder / "registry"
    shutil.copytree(template, root)
    with Registry(root) as registry:
        digest = registry.resolve("a").history[0].digest
        registry.pin(digest)
        registry.delete("a")

        def refuse(operation: str, path: Path) -> None:
            if operation == "unlink":
                raise PermissionError(errno.EPERM, "immutable", str(path))

        with watching(root, refuse):
            registry.unpin(digest)
            upload(registry, artifacts[2], "new")  # works: its temporary file is moved, not removed
            registry.delete("new")
            assert digest in objects(root)
            assert len(objects(root)) == 3
        registry.delete("b")
        assert objects(root) == set()
        assert nothing_left(registry, root)


class PowerCutError(BaseException):
    """Stands for a power cut: a BaseException, which the code under test does not handle."""


def test_a_crash_at_any_step_of_a_deletion_on_a_full_disk(folder: Path, template: Path) -> None:
    full = FaultyDisk(0, FULL, lasting=True)
    outcomes: list[bool] = []
    for step in range(100):
        root = folder / str(step)
        shutil.copytree(template, root)
        steps = 0

        def before(operation: str, path: Path, step: int = step) -> None:
            nonlocal steps
            if steps == step:
                raise PowerCutError
            steps += 1
            full.before(operation, path)

        with Registry(root) as registry:
            old = registry.resolve("a")
            with watching(root, before), suppress(PowerCutError):
                registry.delete("a")
        with Registry(root) as registry:
            assert damaged_files(registry) == ()
            events = [version.event for version in history_of(registry, "a")]
            outcomes.append(events[-1] == "deleted")
            if not outcomes[-1]:
                assert registry.resolve("a") == old
            assert nothing_left(registry, root)
            for digest in referred(registry):
                assert registry.load(digest).digest == digest
        if steps < step:
            break
    # Up to some step the name is still whole; from it on, the name is deleted for good.
    assert outcomes == sorted(outcomes)
    assert len(outcomes) > 6
    assert outcomes[-1]
