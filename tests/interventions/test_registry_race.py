"""Tests of servers that change one registry at once, and are killed and suspended at random.

Each server (tests/racing.py) does random operations, writes them to a journal, and fails where
something is wrong. At the end the journals are compared with what the registry holds.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from interventions.artifact import write_artifact
from interventions.name_records import Version
from interventions.registry import Registry
from tests import racing
from tests.artifact_samples import affine_manifest, affine_parameters
from tests.catalogues import damaged_files, history_of
from tests.racing import NAMES, Plan, fingerprint, plan_line

Event = Mapping[str, Any]

SERVERS = 4
KILLS = 50  # of each race
LONGEST_WAIT = 0.08  # seconds, between two kills or suspensions
LONGEST_SUSPENSION = 0.2
MEMORY_DISK = Path("/dev/shm")  # syncs at once, so more races fit in a second


class Parent:
    """The process that the servers are forked from."""

    def __init__(self) -> None:
        here = Path(racing.__file__)
        self.process = subprocess.Popen(
            [sys.executable, str(here)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(here.parents[1])},
        )

    def start(self, plan: Plan) -> int:
        """Fork a server; return its process id."""
        return self._ask(plan_line(plan))

    def wait(self, process: int) -> int:
        """Wait for a server's end; return its exit status, which is -signal if it was killed."""
        return self._ask(f"wait {process}\n")

    def _ask(self, line: str) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(line)
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@dataclass
class Race:
    """A registry, the servers that run on it, and those that have ended."""

    parent: Parent
    folder: Path
    seed: int
    clock_speed: float = 1.0
    forgiving: bool = False
    running: list[int] = field(default_factory=list)
    suspended: dict[int, float] = field(default_factory=dict)  # process id → when to resume it
    kills: int = 0
    _started: int = 0
    _statuses: list[tuple[int, int]] = field(default_factory=list)  # process, exit status

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)
        (self.folder / "journals").mkdir()
        write_artifact(self.folder / "template", affine_manifest(), affine_parameters(1, width=64))

    @property
    def root(self) -> Path:
        """The registry's folder."""
        return self.folder / "registry"

    def start(self) -> None:
        """Start one more server."""
        self._started += 1
        plan = Plan(
            root=str(self.root),
            template=str(self.folder / "template"),
            journal=str(self.folder / "journals" / f"{self._started}"),
            number=self._started,
            seed=self._random.randrange(1 << 30),
            clock_speed=self.clock_speed,
            forgiving=self.forgiving,
        )
        self.running.append(self.parent.start(plan))

    def step(self) -> None:
        """Wait a moment; then kill a server and start another, or suspend one."""
        time.sleep(self._random.uniform(0, LONGEST_WAIT))
        self.resume(time.monotonic())
        process = self._random.choice(self.running)
        if self._random.random() < 0.7:
            self.kill(process)
            self.start()
        else:
            self.suspend(process, self._random.uniform(0, LONGEST_SUSPENSION))

    def suspend(self, process: int, seconds: float) -> None:
        """Suspend a server, and note that it is to be resumed in `seconds`."""
        os.kill(process, signal.SIGSTOP)
        self.suspended[process] = time.monotonic() + seconds

    def resume(self, until: float) -> None:
        """Resume the suspended servers that are due by `until`."""
        for process in [each for each, due in self.suspended.items() if due <= until]:
            os.kill(process, signal.SIGCONT)
            del self.suspended[process]

    def kill(self, process: int) -> None:
        """Kill a server."""
        self.kills += 1
        os.kill(process, signal.SIGKILL)
        self._end(process)

    def finish(self) -> None:
        """End all servers, every other one by SIGKILL and the rest by SIGTERM."""
        self.resume(float("inf"))
        while self.running:
            process = self.running[0]
            if len(self.running) % 2:
                self.kill(process)
            else:
                os.kill(process, signal.SIGTERM)
                self._end(process)

    def abandon(self) -> None:
        """Kill what still runs after a failure."""
        for process in self.running:
            os.kill(process, signal.SIGKILL)
            self.parent.wait(process)
        self.running.clear()

    def _end(self, process: int) -> None:
        self.running.remove(process)
        self.suspended.pop(process, None)
        self._statuses.append((process, self.parent.wait(process)))
        assert self._statuses[-1][1] in (0, -signal.SIGKILL), "a server has failed"

    def journals(self) -> list[list[Event]]:
        """Return each server's journal, in the order in which the servers started."""
        paths = sorted((self.folder / "journals").iterdir(), key=lambda path: int(path.name))
        return [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]

    def story(self) -> str:
        """Describe a race that went wrong: its seed, and its servers' last events and failures."""
        lines = [f"seed {self.seed}, {self.kills} kills; servers and their last events:"]
        for number, journal in enumerate(self.journals(), 1):
            failures = [str(event["reason"]) for event in journal if event["event"] == "failed"]
            if failures or number > self._started - SERVERS:
                lines += [f"server {number}:", *map(str, journal[-8:]), *failures]
        return "\n".join(lines)


@dataclass
class Change:
    """An upload or a deletion (whose digest is empty) that was asked of a server."""

    begun: float
    name: str
    digest: str
    done: float | None = None  # None: killed before it could say so, or refused
    refused: bool = False
    changed: bool = True
    length: int | None = None  # of the name's history just after it


def changes(journal: list[Event]) -> list[Change]:
    """Return all changes in a server's journal, each with its outcome."""
    found: list[Change] = []
    for event in journal:
        if event["event"] == "begun":
            found.append(Change(event["time"], event["name"], event["digest"]))
        elif event["event"] == "refused" and found and found[-1].done is None:
            found[-1].refused = True
        elif event["event"] == "done":
            found[-1].done = event["time"]
            found[-1].changed = event["changed"]
            found[-1].length = event.get("length")
    return found


def check_journals(journals: list[list[Event]], registry: Registry) -> None:
    """Assert that the servers' journals agree with what the registry holds at the end."""
    known = [name for name in NAMES if registry.known(name)]
    histories = {name: history_of(registry, name) for name in known}
    for journal in journals:
        for event in journal:
            if "fingerprint" in event:
                seen = histories[event["name"]][: event["length"]]
                assert len(seen) == event["length"], event
                assert fingerprint(seen) == event["fingerprint"], event
    asked = [change for journal in journals for change in changes(journal)]
    stored = Counter(
        (name, version.digest) for name, history in histories.items() for version in history
    )
    certain = Counter((each.name, each.digest) for each in asked if each.done and each.changed)
    possible = Counter(
        (each.name, each.digest) for each in asked if each.changed and not each.refused
    )
    for key in {*stored, *certain, *possible}:
        assert certain[key] <= stored[key] <= possible[key], key
    for name, history in histories.items():
        check_order(history, [each for each in asked if each.name == name and each.length])


def check_order(history: tuple[Version, ...], done: list[Change]) -> None:
    """Assert that each change has its own place in the history, after all that ended before it."""
    made = {each.length: each for each in done if each.changed and each.length}
    assert len(made) == sum(each.changed for each in done)
    for each in done:
        assert each.length
        assert history[each.length - 1].digest == each.digest
    earliest_end = float("inf")
    for _, each in sorted(made.items(), reverse=True):
        assert each.begun < earliest_end
        assert each.done
        earliest_end = min(earliest_end, each.done)


def check_folder(registry: Registry, root: Path) -> None:
    """Assert that the folder has the files that the names need, whole, and no others."""
    assert damaged_files(registry) == ()
    needed: set[str] = set()
    for entry in registry.entries():
        for version in reversed(entry.history):
            if version.event == "deleted":
                break
            needed.add(version.digest)
    objects = [path for path in (root / "objects").rglob("*") if path.is_file()]
    assert {path.stem for path in objects} == needed
    for path in objects:
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.stem
        assert registry.load(path.stem).digest == path.stem
    known = {f"{name}.json" for name in NAMES if registry.known(name)}
    assert {path.name for path in (root / "names").iterdir()} == known
    assert list((root / "tmp").iterdir()) == []
    assert len(list((root / "leases").iterdir())) == 1


def check(race: Race) -> None:
    """Check all that must hold once every server has ended."""
    with Registry(race.root) as last:
        check_folder(last, race.root)
        check_journals(race.journals(), last)
    assert list((race.root / "leases").iterdir()) == []


@contextmanager
def raced(race: Race) -> Iterator[Race]:
    """Starts the servers, ends them after the block, and checks what they have done.

    A note on an error says the seed and what happened.
    """
    try:
        for _ in range(SERVERS):
            race.start()
        yield race
        race.finish()
        check(race)
    except BaseException as error:
        error.add_note(race.story())
        raise
    finally:
        race.abandon()


@pytest.fixture(scope="module")
def parent() -> Iterator[Parent]:
    """Start one parent of the servers for all races, because it takes seconds to start."""
    started = Parent()
    with started.process:
        yield started
        assert started.process.stdin is not None
        started.process.stdin.close()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Return a folder, in memory (/dev/shm) where there is such a disk."""
    if not MEMORY_DISK.is_dir():
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK) as made:
        yield Path(made)


@pytest.mark.parametrize("seed", range(5))
def test_servers_that_are_killed_and_suspended(parent: Parent, folder: Path, seed: int) -> None:
    with raced(Race(parent, folder, seed)) as race:
        while race.kills < KILLS:
            race.step()


def test_servers_that_are_suspended_for_longer_than_their_leases_live(
    parent: Parent, folder: Path
) -> None:
    """Such a server may lose bytes that it pinned, but none that others need, and it goes on."""
    race = Race(parent, folder, seed=100, clock_speed=60.0, forgiving=True)
    with raced(race):
        for _ in range(2):
            for process in race.running[:2]:
                race.suspend(process, 1.5)
            time.sleep(1.5)
            race.resume(float("inf"))
            time.sleep(0.3)
