"""Tests of several servers that share one registry: changes reach all, and needed bytes stay.

The servers are registries of this process, each with a clock of its own, which the test moves.
`poll` reads what others have changed. `heartbeat` does so too and renews the server's lease, the
file that says which bytes it needs; a lease without a heartbeat for a minute counts as dead.
"""

import errno
import fcntl
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pytest

from interventions.artifact import write_artifact
from interventions.errors import (
    DamagedInterventionError,
    NameInUseError,
    RegistryBusyError,
    RegistryDiskError,
    RegistryError,
    RegistryUnreadableError,
    UnknownInterventionError,
)
from interventions.reader import FolderContents, FolderReader
from interventions.registry import Registry
from interventions.watch import polling
from tests.artifact_samples import affine_manifest, affine_parameters
from tests.catalogues import damaged_files, history_of
from tests.disk import WatchedDisk

Make = Callable[[int], Path]


class Clock:
    """A clock, in seconds, that only the test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def watch(self, registry: Registry, seconds: int) -> None:
        """Move the clock on by `seconds`, with a heartbeat every 10 s."""
        for _ in range(0, seconds, 10):
            self.now += 10
            registry.heartbeat()


class Servers:
    """Opens registries on one folder."""

    def __init__(self, root: Path, stack: ExitStack) -> None:
        self.root = root
        self._stack = stack

    def open(self, clock: Clock | None = None) -> Registry:
        """Open one more registry on the folder."""
        return self._stack.enter_context(Registry(self.root, clock=clock or Clock()))

    def crash(self, registry: Registry) -> None:
        """End a server as a kill does: its lease's file stays, but the lock on it is released."""
        leases = registry._changes._leases
        assert leases._descriptor is not None
        os.close(leases._descriptor)
        leases._descriptor = None

    @property
    def objects(self) -> set[str]:
        return {path.stem for path in (self.root / "objects").rglob("*.safetensors")}

    @property
    def leases(self) -> list[Path]:
        return sorted((self.root / "leases").iterdir())


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    with ExitStack() as stack:
        yield Servers(tmp_path / "registry", stack)


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Return a function that writes an artifact for a seed; its digest depends on the seed."""

    def make_artifact(seed: int) -> Path:
        path = tmp_path / f"{seed}.safetensors"
        write_artifact(path, affine_manifest(), affine_parameters(seed))
        return path

    return make_artifact


# Seeing what others change


def test_a_change_at_one_is_seen_by_all_when_they_look(servers: Servers, make: Make) -> None:
    one, two = servers.open(), servers.open()
    entry = one.add(make(1), "a")
    assert not two.known("a")
    two.poll()
    assert two.resolve("a") == entry
    assert two.load(entry.digest).digest == entry.digest
    moved = two.add(make(2), "a")
    one.poll()
    assert one.entries() == two.entries() == [moved]
    assert history_of(one, "a") == history_of(two, "a") == (*entry.history, moved.history[-1])
    two.delete("a")
    one.poll()
    assert one.entries() == []
    assert [version.event for version in history_of(one, "a")] == ["stored", "stored", "deleted"]


def test_a_change_begins_with_what_the_others_have_done(servers: Servers, make: Make) -> None:
    """Neither server calls `poll`: a change itself reads the others' changes first."""
    one, two = servers.open(), servers.open()
    first = one.add(make(1), "a")
    second = two.add(make(2), "a")
    third = one.add(make(3), "a")
    assert [version.digest for version in third.history] == [
        each.digest for each in (first, second, third)
    ]
    assert two.delete("a") == third.digest
    with pytest.raises(UnknownInterventionError):
        one.delete("a")
    assert history_of(one, "a") == history_of(two, "a")


def test_a_look_that_finds_nothing_new_reads_no_file(
    servers: Servers, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = servers.open(), servers.open()
    one.add(make(1), "a")
    two.poll()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read"))
        two.poll()


def test_an_object_that_heals_is_seen(servers: Servers, make: Make) -> None:
    one, two = servers.open(), servers.open()
    entry = one.add(make(1), "a")
    one.path(entry.digest).write_bytes(b"damaged")
    damaged = servers.open()
    assert damaged.entries() == []
    with pytest.raises(DamagedInterventionError):
        damaged.resolve("a")
    two.add(make(1), "a")
    damaged.poll()
    assert damaged.resolve("a") == entry
    assert damaged_files(damaged) == ()


def test_a_deletion_on_a_full_disk_is_seen(
    servers: Servers, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = servers.open(), servers.open()
    one.add(make(1), "a")
    with monkeypatch.context() as patched:

        def refuse(operation: str, path: Path) -> None:
            if operation in ("create", "write", "mkdir"):
                raise OSError(errno.ENOSPC, "full", str(path))

        WatchedDisk(servers.root, refuse).install(patched)
        one.delete("a")
        two.poll()
        assert two.entries() == []
    two.add(make(2), "b")  # writes the record that had no room
    assert sorted(path.name for path in (servers.root / "names").iterdir()) == ["a.json", "b.json"]
    assert history_of(two, "a")[-1].event == "deleted"


# --- objects that another server needs ---


def test_bytes_that_another_server_holds_stay(servers: Servers, make: Make) -> None:
    one, two = servers.open(), servers.open()
    entry = one.add(make(1), "a")
    two.poll()
    two.pin(entry.digest)
    two.heartbeat()
    one.delete("a")
    for _ in range(5):
        one.heartbeat()
        two.heartbeat()
    assert servers.objects == {entry.digest}
    assert two.load(entry.digest).digest == entry.digest
    two.unpin(entry.digest)
    two.heartbeat()
    one.heartbeat()
    assert servers.objects == set()


def test_a_pin_that_the_other_server_has_not_written_down_yet_keeps_the_bytes(
    servers: Servers, make: Make
) -> None:
    one, two = servers.open(), servers.open()
    entry = one.add(make(1), "a")
    two.poll()
    two.heartbeat()
    two.pin(entry.digest)  # between two heartbeats, so not in the lease yet
    one.delete("a")
    one.heartbeat()
    assert servers.objects == {entry.digest}
    two.heartbeat()
    two.heartbeat()
    one.heartbeat()
    assert servers.objects == {entry.digest}
    assert two.load(entry.digest).digest == entry.digest
    two.unpin(entry.digest)
    for server in (two, one):
        server.heartbeat()
    assert servers.objects == set()


def test_a_lease_is_written_under_the_lock_and_after_reading(
    servers: Servers, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise bytes could be deleted that a server pins just after it has written its lease."""
    one, two = servers.open(), servers.open()
    entry = one.add(make(1), "a")
    two.poll()
    one.delete("a")
    assert two.entries() == [entry]
    write = two._changes._leases.heartbeat

    def heartbeat(held: Set[str]) -> None:
        assert two.entries() == []
        with pytest.raises(UnknownInterventionError):
            two.pin(entry.digest)
        with pytest.raises(RegistryBusyError), one._folder.locked(0):
            pass
        write(held)

    monkeypatch.setattr(two._changes._leases, "heartbeat", heartbeat)
    two.heartbeat()
    assert two._changes._leases.own.reads == 1


def test_bytes_stay_until_every_server_has_read_the_deletion_twice(
    servers: Servers, make: Make
) -> None:
    """A server may write its first lease after a deletion by names that it read before it."""
    one, two = servers.open(), servers.open()
    entry = one.add(make(1), "a")
    two.poll()
    one.delete("a")
    for _ in range(3):
        one.heartbeat()
        assert servers.objects == {entry.digest}
    two.heartbeat()
    one.heartbeat()
    assert servers.objects == {entry.digest}
    with pytest.raises(UnknownInterventionError):  # it has read the deletion
        two.pin(entry.digest)
    two.heartbeat()
    one.heartbeat()
    assert servers.objects == set()


def test_a_name_that_came_and_went_again_starts_the_count_anew(
    servers: Servers, make: Make
) -> None:
    one, two, third = servers.open(), servers.open(), servers.open()
    entry = one.add(make(1), "a")
    one.delete("a")
    two.heartbeat()
    two.heartbeat()  # for the first deletion the bytes may go now
    third.add(make(1), "b")
    two.poll()
    two.pin(entry.digest)
    third.delete("b")
    third.heartbeat()
    third.heartbeat()
    one.heartbeat()
    assert servers.objects == {entry.digest}
    assert two.load(entry.digest).digest == entry.digest


def test_bytes_go_at_once_where_there_is_no_other_server(servers: Servers, make: Make) -> None:
    one, two = servers.open(), servers.open()
    two.close()
    one.add(make(1), "a")
    one.delete("a")
    assert servers.objects == set()


@pytest.mark.parametrize("by_digest", [False, True])
def test_a_default_keeps_its_name_at_every_server(
    servers: Servers, make: Make, by_digest: bool
) -> None:
    one, two = servers.open(), servers.open()
    entry = one.add(make(1), "a")
    reference = f"sha256:{entry.digest}" if by_digest else "a"
    two.keep_default({reference: entry.digest})
    with pytest.raises(
        NameInUseError, match=r"Another server's default .* on .* cannot be deleted"
    ):
        one.delete("a")
    assert one.resolve("a") == entry
    if not by_digest:
        with pytest.raises(NameInUseError, match="point to another artifact"):
            one.add(make(2), "a")
    with pytest.raises(NameInUseError, match="The server's default"):
        two.delete("a")
    one.add(make(1), "a")  # the same bytes
    one.add(make(2), "b")
    assert one.delete("b")
    assert one.resolve("a") == entry
    two.close()
    assert one.delete("a") == entry.digest


def test_what_a_default_means_is_not_kept_once_it_is_gone(servers: Servers, make: Make) -> None:
    one, two = servers.open(), servers.open()
    entry = one.add(make(1), "a")
    two.poll()
    one.delete("a")
    with pytest.raises(UnknownInterventionError):
        two.keep_default({"a": entry.digest})


def test_a_default_must_mean_what_it_meant_when_it_was_given(servers: Servers, make: Make) -> None:
    """A name may have changed between a server's reading of it and `keep_default`."""
    one, two = servers.open(), servers.open()
    entry = one.add(make(1), "a")
    one.add(make(1), "b")
    two.poll()
    one.add(make(2), "a")
    with pytest.raises(UnknownInterventionError, match='"a" has just been replaced'):
        two.keep_default({"b": entry.digest, "a": entry.digest})
    one.delete("a")
    with pytest.raises(UnknownInterventionError, match='no intervention "a"'):
        two.keep_default({"b": entry.digest, "a": entry.digest})
    assert one.delete("b") == entry.digest
    two.heartbeat()
    two.heartbeat()
    one.heartbeat()
    assert servers.objects == set()


def test_a_default_that_cannot_be_noted_is_not_kept(
    servers: Servers, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, two = servers.open(), servers.open()
    entry = one.add(make(1), "a")

    def refuse(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", refuse)
        with pytest.raises(RegistryDiskError, match="nothing was changed"):
            two.keep_default({"a": entry.digest})
        with pytest.raises(RegistryBusyError):  # what `two` holds is unknown
            one.delete("a")
    two.heartbeat()
    assert one.delete("a") == entry.digest


def test_a_server_that_starts_on_a_full_disk_keeps_its_default(
    servers: Servers, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = servers.open()
    entry = one.add(make(1), "a")

    def refuse(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", refuse)
        two = servers.open()
        two.keep_default({"a": entry.digest})
        with pytest.raises(NameInUseError, match="The server's default"):
            two.delete("a")
        one.add(make(2), "a")  # `one` cannot know of the default
        one.delete("a")
        for _ in range(3):
            one.heartbeat()
            two.heartbeat()
    assert two.load(entry.digest).digest == entry.digest
    two.heartbeat()
    with pytest.raises(NameInUseError, match="Another server's default"):
        one.add(make(2), "a")
    for _ in range(3):
        one.heartbeat()
        two.heartbeat()
    assert two.load(entry.digest).digest == entry.digest


def test_a_default_is_kept_by_a_server_whose_lease_was_taken_for_dead(
    servers: Servers, make: Make
) -> None:
    clock = Clock()
    one, two = servers.open(clock), servers.open()
    entry = one.add(make(1), "a")
    one.heartbeat()
    clock.watch(one, 60)
    assert len(servers.leases) == 1
    two.keep_default({"a": entry.digest})
    with pytest.raises(NameInUseError):
        one.delete("a")


# Servers that end


def test_a_server_that_was_killed_holds_nothing(servers: Servers, make: Make) -> None:
    one, two = servers.open(), servers.open()
    entry = one.add(make(1), "a")
    two.keep_default({"a": entry.digest})
    staged = two.stage()
    staged.write(b"half")
    assert [path.read_bytes() for path in (servers.root / "tmp").iterdir()] == [b"half"]
    one.heartbeat()
    assert len(list((servers.root / "tmp").iterdir())) == 1
    servers.crash(two)
    assert one.delete("a") == entry.digest
    assert servers.objects == set()
    assert list((servers.root / "tmp").iterdir()) == []
    assert len(servers.leases) == 1


def test_a_lease_that_stopped_beating_for_a_minute_is_dead(servers: Servers, make: Make) -> None:
    """The minute counts on the clock of the server that polls, and only while it polls."""
    clock = Clock()
    one, two = servers.open(clock), servers.open()
    entry = one.add(make(1), "a")
    two.keep_default({"a": entry.digest})
    one.heartbeat()
    clock.watch(one, 50)
    with pytest.raises(NameInUseError):
        one.delete("a")
    two.heartbeat()
    clock.watch(one, 60)
    with pytest.raises(NameInUseError):
        one.delete("a")
    clock.watch(one, 10)
    assert one.delete("a") == entry.digest
    assert servers.objects == set()


def test_time_in_which_nobody_looked_does_not_end_a_lease(servers: Servers, make: Make) -> None:
    """If the folder was away, or the machine suspended, the other had no heartbeat either."""
    clock = Clock()
    one, two = servers.open(clock), servers.open()
    entry = one.add(make(1), "a")
    two.keep_default({"a": entry.digest})
    one.heartbeat()
    for _ in range(2):
        clock.now += 3600
        with pytest.raises(NameInUseError):
            one.delete("a")
    clock.watch(one, 30)
    assert one.delete("a") == entry.digest


def test_a_server_that_comes_back_writes_its_lease_again(servers: Servers, make: Make) -> None:
    """A server that was suspended for longer than a minute has lost its lease."""
    clock = Clock()
    one, two = servers.open(clock), servers.open()
    kept, gone = one.add(make(1), "kept"), one.add(make(2), "gone")
    two.keep_default({"kept": kept.digest})
    two.pin(gone.digest)
    two.heartbeat()
    one.heartbeat()
    clock.watch(one, 60)
    assert one.delete("gone") == gone.digest
    assert servers.objects == {kept.digest}
    assert len(servers.leases) == 1
    with pytest.raises(RegistryError):  # `two` learns only now that the bytes are gone
        two.load(gone.digest)
    two.heartbeat()
    assert len(servers.leases) == 2
    assert two.known("gone")
    assert [entry.name for entry in two.entries()] == ["kept"]
    with pytest.raises(NameInUseError):
        one.delete("kept")
    two.unpin(gone.digest)


def test_a_lease_that_cannot_be_read_holds_everything(servers: Servers, make: Make) -> None:
    clock = Clock()
    one = servers.open(clock)
    two = servers.open()
    one.add(make(1), "a")
    two.poll()
    path = next(path for path in servers.leases if two._changes._leases.path == path)
    whole = path.read_bytes()
    for content in (b"{", whole[:40], b"{}", whole.replace(b'"reads"', b'"roads"'), b"\xff"):
        path.write_bytes(content)
        with pytest.raises(RegistryBusyError, match="lease of another server"):
            one.delete("a")
        one.heartbeat()
    path.write_bytes(whole)
    entry = one.resolve("a")
    one.delete("a")
    path.write_bytes(b"{")
    one.heartbeat()
    assert servers.objects == {entry.digest}
    clock.watch(one, 60)
    assert servers.objects == set()


def test_a_lease_says_who_holds_what(servers: Servers, make: Make) -> None:
    one = servers.open()
    entry, other = one.add(make(1), "a"), one.add(make(2), "b")
    one.keep_default({"a": entry.digest})
    one.pin(other.digest)
    one.heartbeat()
    [path] = servers.leases
    lease = json.loads(path.read_bytes())
    assert lease["process"] == os.getpid()
    assert lease["default"] == {"a": entry.digest}
    assert sorted(lease["held"]) == sorted((entry.digest, other.digest))
    assert lease["reads"] == 1
    one.unpin(other.digest)
    one.heartbeat()
    assert json.loads(path.read_bytes())["held"] == [entry.digest]


def test_a_lease_lives_on_while_another_server_is_slow(
    servers: Servers, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("interventions.changes.LOCK_SECONDS", 0.05)
    monkeypatch.setattr("interventions.changes._POLL_SECONDS", 0.05)
    clock = Clock()
    one, two = servers.open(clock), servers.open()
    entry = one.add(make(1), "a")
    one.heartbeat()
    for _ in range(10):
        with one._folder.locked():
            two.heartbeat()
            with pytest.raises(RegistryBusyError, match="nothing was changed"):
                two.delete("a")
            two.poll()
        clock.watch(one, 10)
    assert len(servers.leases) == 2
    assert one.resolve("a") == entry
    assert two.delete("a") == entry.digest


def test_a_watched_registry_beats_whatever_its_looks_come_to(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    one = servers.open()
    beaten = threading.Event()

    def fail() -> None:
        raise ValueError("a fault")

    monkeypatch.setattr(one, "poll", fail)
    monkeypatch.setattr(one, "heartbeat", beaten.set)
    with polling(one, poll_seconds=0.01, heartbeat_seconds=0.01):
        assert beaten.wait(30)
    assert "could not be watched" in caplog.text


def test_a_beat_that_cannot_read_the_names_lets_nothing_go(
    servers: Servers, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that has not read a deletion may unpin the bytes and pin them again."""
    monkeypatch.setattr("interventions.changes._POLL_SECONDS", 0.05)
    one, two = servers.open(), servers.open()
    entry = one.add(make(1), "a")
    two.poll()
    two.pin(entry.digest)
    one.delete("a")
    two.heartbeat()
    two.heartbeat()
    with one._folder.locked():
        two.unpin(entry.digest)
        two.heartbeat()
        two.pin(entry.digest)
    one.heartbeat()
    assert two.load(entry.digest).digest == entry.digest
    two.unpin(entry.digest)


# Disks


def test_a_folder_that_vanishes_and_comes_back(servers: Servers, make: Make) -> None:
    one, two = servers.open(), servers.open()
    entry = one.add(make(1), "a")
    two.poll()
    assert two.problem() is None
    away = servers.root.with_name("away")
    servers.root.rename(away)
    for _ in range(2):
        two.poll()
        two.heartbeat()
        problem = two.problem()
        assert problem is not None
        assert str(servers.root) not in problem
        assert two.entries() == [entry]
        with pytest.raises(RegistryUnreadableError):
            two.load(entry.digest)
        with pytest.raises(RegistryDiskError):
            two.delete("a")
        with pytest.raises(RegistryDiskError):
            two.add(make(2), "b")
        assert not servers.root.exists()
    servers.root.mkdir()  # like an empty mount point
    two.poll()
    assert two.problem() is not None
    assert list(servers.root.iterdir()) == []
    servers.root.rmdir()
    away.rename(servers.root)
    two.poll()
    assert two.problem() is None
    assert two.load(entry.digest).digest == entry.digest
    assert two.add(make(2), "b").name == "b"
    one.poll()
    assert one.known("b")


def test_a_folder_that_comes_back_with_names_and_objects_alone(
    servers: Servers, make: Make
) -> None:
    """Somebody may have restored a copy of the data alone."""
    one = servers.open()
    one.add(make(1), "a")
    for name in ("leases", "tmp"):
        shutil.rmtree(servers.root / name)
    (servers.root / "lock").unlink()
    one.poll()
    one.heartbeat()
    assert len(servers.leases) == 1
    assert one.add(make(2), "b").name == "b"


@pytest.mark.parametrize("what", ["record", "object"])
def test_a_file_that_could_not_be_read_once_is_read_again(
    servers: Servers, make: Make, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The next upload also continues the name's history."""
    one, two = servers.open(), servers.open()
    entry = one.add(make(1), "a")
    record = servers.root / "names" / "a.json"
    failing = record if what == "record" else one.path(entry.digest)
    whole = (Path.read_bytes, Path.open)

    def refuse(path: Path) -> None:
        if path == failing:
            raise OSError(errno.EIO, "Input/output error", str(path))

    def read_bytes(path: Path) -> bytes:
        refuse(path)
        return whole[0](path)

    def open_file(path: Path, mode: str = "r") -> IO[Any]:
        refuse(path)
        return whole[1](path, mode)

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    monkeypatch.setattr(Path, "open", open_file)
    two.poll()
    two.poll()
    with pytest.raises(DamagedInterventionError):
        two.resolve("a")
    assert two.problem() is None
    monkeypatch.undo()
    two.poll()
    assert two.resolve("a") == entry
    assert damaged_files(two) == ()
    two.add(make(2), "a")
    assert len(history_of(two, "a")) == 2


def test_a_registry_that_cannot_be_opened_leaves_no_lease(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(reader: FolderReader) -> FolderContents:
        raise OSError(errno.EIO, "Input/output error")

    before = len(list(Path("/proc/self/fd").iterdir()))
    with monkeypatch.context() as patched:
        patched.setattr(FolderReader, "read", refuse)
        with pytest.raises(RegistryError, match="Input/output error"):
            servers.open()
    assert servers.leases == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_registry_that_is_closed_leaves_nothing_open(servers: Servers, make: Make) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    one = servers.open()
    entry = one.add(make(1), "a")
    one.keep_default({"a": entry.digest})
    one.poll()
    one.heartbeat()
    with pytest.raises(NameInUseError):
        one.delete("a")
    one.close()
    one.close()
    assert servers.leases == []
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    with pytest.raises(RegistryError, match="closed"):
        one.heartbeat()


def test_a_change_that_does_not_end_does_not_keep_a_registry_from_closing(
    servers: Servers, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("interventions.changes.LOCK_SECONDS", 0.05)
    one = servers.open()
    with one._changes._thread_lock:  # like a thread that waits for a disk
        one.close()
        assert "does not end" in caplog.text
        assert len(servers.leases) == 1
    one.close()
    assert servers.leases == []


def test_a_look_that_hangs_is_told(servers: Servers) -> None:
    clock = Clock()
    one = servers.open(clock)
    one._looking_since = clock.now
    clock.now += 9
    assert one.problem() is None
    clock.now += 3
    assert one.problem() == "The registry's folder has not answered for 12 s."


def test_a_file_system_that_cannot_lock(
    servers: Servers, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", refuse)
        with pytest.raises(RegistryError, match="Operation not supported"):
            servers.open()
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", lambda *_: None)
        with pytest.raises(RegistryError, match="cannot lock files"):
            servers.open()
    servers.open().add(make(1), "a")


def test_a_file_system_that_copies_in_place_of_renaming(
    servers: Servers, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copy(old: str, new: str) -> None:
        shutil.copyfile(old, new)
        os.unlink(old)  # noqa: PTH108  # as pathlib calls it

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", copy)
        with pytest.raises(RegistryError, match="cannot replace a file by renaming"):
            servers.open()
    servers.open().add(make(1), "a")
