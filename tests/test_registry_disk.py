"""A disk that is full or fails, at every operation in turn: nothing is lost, nothing is left."""

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from interventions.artifact import read_artifact, write_artifact
from interventions.errors import RegistryDiskError
from interventions.registry import Entry, Registry, Version
from tests.artifact_samples import affine_manifest, affine_parameters
from tests.disk import FaultyDisk, WatchedDisk

CHUNK_BYTES = 700  # so that an artifact comes in two
NAMES = ("a", "b", "new")
FULL, FAILING = errno.ENOSPC, errno.EIO

Contents: TypeAlias = tuple[list[Entry], dict[str, tuple[Version, ...]]]
Artifacts: TypeAlias = tuple[Path, ...]
Change: TypeAlias = Callable[[Registry, Artifacts], None]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Artifacts:
    """Four, of other bytes each."""
    folder = tmp_path_factory.mktemp("artifacts")
    paths = tuple(folder / f"{seed}.safetensors" for seed in range(4))
    for seed, path in enumerate(paths):
        write_artifact(path, affine_manifest(), affine_parameters(seed))
    return paths


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder, in memory where that is possible: hundreds of registries come and go."""
    memory = Path("/dev/shm")
    parent = memory if os.access(memory, os.W_OK) else tmp_path
    with tempfile.TemporaryDirectory(dir=parent) as made:
        yield Path(made)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, artifacts: Artifacts) -> Path:
    """A registry's folder: "a" has two versions, and "b" the second of them."""
    root = tmp_path_factory.mktemp("template") / "registry"
    with Registry(root) as registry:
        for number, name in ((0, "a"), (1, "a"), (1, "b")):
            upload(registry, artifacts[number], name)
    return root


def upload(registry: Registry, path: Path, name: str) -> None:
    """What the HTTP API does."""
    with registry.stage() as staged:
        data = path.read_bytes()
        for start in range(0, len(data), CHUNK_BYTES):
            staged.write(data[start : start + CHUNK_BYTES])
        registry.commit(staged, read_artifact(staged.path), name)


def contents(registry: Registry) -> Contents:
    """What the registry says that it holds."""
    known = [name for name in NAMES if registry.known(name)]
    return registry.entries(), {name: registry.history(name) for name in known}


def reopened(root: Path) -> Contents:
    """What another registry finds in a copy of the folder."""
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
    """The digests that live names have had since their last deletion."""
    digests: set[str] = set()
    for entry in registry.entries():
        for version in reversed(entry.history):
            if version.event == "deleted":
                break
            digests.add(version.digest)
    return digests


def nothing_left(registry: Registry, root: Path) -> bool:
    """Whether the folder has no files but those that its names need."""
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
    """How many operations of the disk a change takes."""
    shutil.copytree(template, root)
    counted = FaultyDisk(-1, FAILING, lasting=False)
    with Registry(root) as registry, pytest.MonkeyPatch.context() as patched:
        WatchedDisk(root, counted.before).install(patched)
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
            with pytest.MonkeyPatch.context() as patched:
                WatchedDisk(root, disk.before).install(patched)
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
