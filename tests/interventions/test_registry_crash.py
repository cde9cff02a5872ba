"""Test of a process that stores versions and is killed at random moments: no version may be lost.

Run as a script, this file is that process's parent: it imports once (seconds, because of torch)
and forks a fresh child for every kill.
"""

import hashlib
import os
import random
import signal
import struct
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import torch

from interventions.artifact import read_artifact, write_artifact
from interventions.registry import Registry
from steering.affine import AffineMap
from tests.artifact_samples import affine_manifest
from tests.catalogues import damaged_files, history_of

KILLS = 50
LONGEST_WAIT = 0.05  # seconds, about what opening takes, or storing a version
MOST_VERSIONS = 3  # that a child reports before the wait begins
CHUNK_BYTES = 8192
VERSIONS_A_CHILD = 1000  # then a child ends, even an orphan


def version_bytes(template: bytes, number: int) -> bytes:
    """Return a valid artifact for each number: the template with its last float32 replaced."""
    return template[:-4] + struct.pack("<f", number)


def store_versions(root: Path, template: bytes, first: int) -> None:
    """Be the child: store new versions of one name again and again, and report each on stdout."""
    os.write(1, f"ready {os.getpid()}\n".encode())
    with Registry(root) as registry:
        for number in range(first, first + VERSIONS_A_CHILD):
            with registry.stage() as staged:
                data = version_bytes(template, number)
                for start in range(0, len(data), CHUNK_BYTES):
                    staged.write(data[start : start + CHUNK_BYTES])
                entry, _ = registry.commit(staged, read_artifact(staged.path), "moving")
            os.write(1, f"stored {entry.digest}\n".encode())


def fork_children(root: Path, template: bytes) -> None:
    """Be the script: for each number on stdin, fork a child that starts from it; report its end."""
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            try:
                store_versions(root, template, int(line))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        os.waitpid(pid, 0)
        os.write(1, b"dead\n")


class Children:
    """The running script, which forks the children, from the test's side."""

    def __init__(self, root: Path, template: Path) -> None:
        here = Path(__file__)
        self.process = subprocess.Popen(
            [sys.executable, str(here), str(root), str(template)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(here.parents[2])},
        )

    def live_and_die(self, first: int, versions: int, seconds: float) -> list[str]:
        """Start a child at number `first`; kill it `seconds` after its report number `versions`.

        Returns the digests that it reported as stored.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{first}\n")
        self.process.stdin.flush()
        word, _, pid = self.process.stdout.readline().strip().partition(" ")
        assert word == "ready"
        stored = [self._stored(self.process.stdout.readline()) for _ in range(versions)]
        time.sleep(seconds)
        os.kill(int(pid), signal.SIGKILL)
        while (line := self.process.stdout.readline()) != "dead\n":
            stored.append(self._stored(line))
        return stored

    def _stored(self, line: str) -> str:
        word, _, digest = line.strip().partition(" ")
        assert word == "stored", f"the child ended by itself: {line!r}"
        return digest


@pytest.fixture
def template(tmp_path: Path) -> Path:
    path = tmp_path / "template.safetensors"
    parameters = {"model.layers.0.norm": AffineMap(torch.ones(8192), torch.zeros(8192))}
    write_artifact(path, affine_manifest(), parameters)
    return path


@pytest.fixture
def children(tmp_path: Path, template: Path) -> Iterator[Children]:
    started = Children(tmp_path / "registry", template)
    with started.process:
        yield started
        assert started.process.stdin is not None
        started.process.stdin.close()


def test_killed_at_random_moments(tmp_path: Path, template: Path, children: Children) -> None:
    root = tmp_path / "registry"
    moments = random.Random(20261121)
    numbers = count(0, VERSIONS_A_CHILD)
    with Registry(root) as registry:
        stable = registry.add(template, "stable")
    expected: list[str] = []  # the history of the name, deletions as ""

    for kill in range(KILLS):
        first = next(numbers)
        versions, wait = moments.randint(0, MOST_VERSIONS), moments.uniform(0, LONGEST_WAIT)
        stored = children.live_and_die(first, versions, wait)
        unreported = version_bytes(template.read_bytes(), first + len(stored))
        expected += stored

        with Registry(root) as registry:
            assert list((root / "tmp").iterdir()) == []
            assert damaged_files(registry) == ()
            assert registry.resolve("stable") == stable
            assert registry.load(stable.digest).digest == stable.digest
            history = _history(registry)
            if len(history) > len(expected):  # stored, but killed before it could say so
                expected.append(hashlib.sha256(unreported).hexdigest())
            assert history == expected
            _check_objects(registry, root, expected, stable.digest)
            if kill % 10 == 9 and registry.known("moving"):  # so that it stays quick
                registry.delete("moving")
                expected.append("")


def _history(registry: Registry) -> list[str]:
    if not registry.known("moving"):
        return []
    return [version.digest for version in history_of(registry, "moving")]


def _check_objects(registry: Registry, root: Path, expected: list[str], stable: str) -> None:
    """Assert that the versions since the last deletion are stored whole, and no other object."""
    deletions = [place for place, digest in enumerate(expected) if not digest]
    available = expected[deletions[-1] + 1 :] if deletions else expected
    if available:
        assert registry.resolve("moving").digest == available[-1]
        assert registry.load(available[-1]).digest == available[-1]
    objects = {path.stem for path in (root / "objects").rglob("*.safetensors")}
    assert objects == {*available, stable}
    for digest in available:
        assert hashlib.sha256(registry.path(digest).read_bytes()).hexdigest() == digest


if __name__ == "__main__":
    fork_children(Path(sys.argv[1]), Path(sys.argv[2]).read_bytes())
