"""Runs servers that change one registry at random while a test kills and suspends them.

Run as a script, this file is the servers' parent process: it imports torch once, which takes
seconds, and forks a server for each plan that it reads from stdin.
"""

import hashlib
import json
import logging
import os
import random
import signal
import struct
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch

from interventions.artifact import read_artifact
from interventions.catalogue import DIGEST_PREFIX
from interventions.errors import (
    DamagedInterventionError,
    NameInUseError,
    RegistryBusyError,
    RegistryDiskError,
    RegistryError,
    UnknownInterventionError,
)
from interventions.header import UnreadableArtifactError
from interventions.name_records import Version
from interventions.registry import Registry
from interventions.watch import polling
from tests.catalogues import damaged_files, history_of

NAMES: Final = ("a", "b", "c")
SHARED: Final = 3  # number of artifacts that all servers upload; every other upload is new
FAILED: Final = 3  # exit status of a server that has found a fault
_CHUNK_BYTES: Final = 512
_LONGEST_PAUSE: Final = 0.03  # seconds; limit of the usual random pauses
_LONG: Final = 0.4  # seconds; a rare pause during which other servers delete and renew leases
_MOST_HELD: Final = 3


@dataclass(frozen=True, slots=True)
class Plan:
    """The arguments of one server."""

    root: str  # path of the registry
    template: str  # path of an artifact from which others are made
    journal: str  # path of the file to which the server writes its events
    number: int  # unique among the servers of a registry
    seed: int
    clock_speed: float = 1.0  # at 60, a lease expires after a second
    forgiving: bool = False  # whether the lease may expire while the server lives


def version_bytes(template: bytes, number: int) -> bytes:
    """Return an artifact with its own digest for each number: its last float32 is the number."""
    return template[:-4] + struct.pack("<f", number)


def fingerprint(versions: Sequence[Version]) -> str:
    """Return a hash of a name's history, or of the beginning of one."""
    return hashlib.sha256(repr(versions).encode()).hexdigest()


class Journal(logging.Handler):
    """Writes a server's events to a file, each line in one write, so that a kill cuts none.

    It is also the registry's log handler: a warning is a fault, unless it is one that kills cause.
    """

    def __init__(self, path: str, *, forgiving: bool) -> None:
        super().__init__(logging.WARNING)
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        expected = ["a server's lease is dead", "this server's lease was gone"]
        self._expected = tuple(expected if forgiving else expected[:1])

    def write(self, event: str, **fields: object) -> None:
        """Append an event."""
        line = json.dumps({"event": event, "time": time.monotonic(), **fields})
        os.write(self._descriptor, f"{line}\n".encode())

    def emit(self, record: logging.LogRecord) -> None:
        """End the server, unless the message is an expected one."""
        if not record.getMessage().startswith(self._expected):
            self.fail(logging.Formatter().format(record))

    def fail(self, reason: str) -> None:
        """Write the reason and end the process at once with status FAILED."""
        self.write("failed", reason=reason)
        os._exit(FAILED)


class RacingServer:
    """Performs one random operation on the registry in each `act`."""

    def __init__(self, registry: Registry, plan: Plan, journal: Journal) -> None:
        self._registry = registry
        self._plan = plan
        self._journal = journal
        self._template = Path(plan.template).read_bytes()
        self._random = random.Random(plan.seed)
        self._uploads = 0
        self._held: list[str] = []
        self._default: dict[str, str] = {}

    def act(self) -> None:
        """Perform a random operation, then check the registry's invariants."""
        operations = {
            self._upload: 4,
            self._delete: 3,
            self._use: 8,
            self._let_go: 3,
            self._observe: 2,
            self._registry.heartbeat: 1,
            self._keep_default: 0.2,
        }
        [operation] = self._random.choices(list(operations), list(operations.values()))
        operation()
        assert damaged_files(self._registry) == ()
        if self._plan.forgiving:
            return
        assert self._registry.problem() is None
        for name, digest in self._default.items():
            assert self._registry.resolve(name).digest == digest, "a default's name has moved"

    def end(self) -> None:
        """Unpin every pinned digest."""
        while self._held:
            self._let_go()

    def _upload(self) -> None:
        self._uploads += 1
        new = SHARED + self._plan.number * 1000 + self._uploads
        number = self._random.choice((self._random.randrange(SHARED), new))
        data = version_bytes(self._template, number)
        digest, name = hashlib.sha256(data).hexdigest(), self._random.choice(NAMES)
        try:
            with self._registry.stage() as staged:
                for start in range(0, len(data), _CHUNK_BYTES):
                    staged.write(data[start : start + _CHUNK_BYTES])
                    if self._random.random() < 0.1:
                        self._pause()
                artifact = read_artifact(staged.path)
                self._journal.write("begun", name=name, digest=digest)
                entry, changed = self._registry.commit(staged, artifact, name)
        except (NameInUseError, RegistryBusyError) as error:
            self._journal.write("refused", reason=str(error))
        except (UnreadableArtifactError, RegistryDiskError) as error:
            if not self._plan.forgiving:
                raise
            self._journal.write("refused", reason=str(error))
        else:
            assert (entry.name, entry.digest) == (name, digest)
            assert entry.history[-1].digest == digest
            self._done(name, digest, entry.history, changed=changed)

    def _delete(self) -> None:
        name = self._random.choice(NAMES)
        self._journal.write("begun", name=name, digest="")
        try:
            digest = self._registry.delete(name)
        except DamagedInterventionError:
            raise
        except (UnknownInterventionError, NameInUseError, RegistryBusyError) as error:
            self._journal.write("refused", reason=str(error))
        else:
            self._journal.write("done", name=name, digest="", changed=True, was=digest)

    def _done(self, name: str, digest: str, history: Sequence[Version], *, changed: bool) -> None:
        self._journal.write(
            "done",
            name=name,
            digest=digest,
            changed=changed,
            length=len(history),
            fingerprint=fingerprint(history),
        )

    def _use(self) -> None:
        """Resolve, pin and load a digest, and unpin it now or later."""
        entries = self._registry.entries()
        if not entries or len(self._held) == _MOST_HELD:
            return
        chosen = self._random.choice(entries)
        versions = [version for version in chosen.history if version.digest]
        references = (chosen.name, DIGEST_PREFIX + self._random.choice(versions).digest)
        try:
            digest = self._registry.resolve(self._random.choice(references)).digest
            if self._random.random() < 0.03:
                time.sleep(_LONG)  # lets deletions show and other servers renew leases twice
            elif self._random.random() < 0.3:
                self._pause()
            self._registry.pin(digest)
        except DamagedInterventionError:
            raise
        except UnknownInterventionError:
            return
        self._held.append(digest)
        if self._random.random() < 0.5:
            self._pause()
        self._load(digest)
        if self._random.random() < 0.6:
            self._let_go()

    def _load(self, digest: str) -> None:
        try:
            assert self._registry.load(digest).digest == digest
        except RegistryError as error:
            if not self._plan.forgiving:
                raise
            self._journal.write("lost", digest=digest, reason=str(error))

    def _let_go(self) -> None:
        if self._held:
            digest = self._held.pop(self._random.randrange(len(self._held)))
            self._load(digest)
            self._registry.unpin(digest)

    def _observe(self) -> None:
        self._registry.poll()
        for name in NAMES:
            with suppress(KeyError):  # the name was never stored
                versions = history_of(self._registry, name)
                self._journal.write(
                    "seen", name=name, length=len(versions), fingerprint=fingerprint(versions)
                )

    def _keep_default(self) -> None:
        entries = self._registry.entries()
        if self._default or not entries:
            return
        entry = self._random.choice(entries)
        with suppress(UnknownInterventionError, RegistryBusyError):
            self._registry.keep_default({entry.name: entry.digest})
            self._default = {entry.name: entry.digest}
            self._journal.write("default", name=entry.name, digest=entry.digest)

    def _pause(self) -> None:
        time.sleep(self._random.uniform(0, _LONGEST_PAUSE))


def run_server(plan: Plan) -> None:
    """Change the registry until SIGTERM, until the parent has ended, or until a fault."""
    parent = os.getppid()
    journal = Journal(plan.journal, forgiving=plan.forgiving)
    logging.getLogger("interventions").addHandler(journal)
    ended = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: ended.set())
    try:
        with Registry(
            Path(plan.root), clock=lambda: time.monotonic() * plan.clock_speed
        ) as registry:
            journal.write("opened")
            with polling(registry, poll_seconds=0.05, heartbeat_seconds=0.1):
                server = RacingServer(registry, plan, journal)
                while not ended.is_set() and os.getppid() == parent:
                    server.act()
                server.end()
        journal.write("closed")
    except BaseException:
        journal.fail(traceback.format_exc())


def serve_plans() -> None:
    """Read commands from stdin: fork a server and print its pid, or wait for a pid's exit code."""
    torch.set_num_threads(1)
    for line in sys.stdin:
        word, _, rest = line.partition(" ")
        if word == "wait":
            _, status = os.waitpid(int(rest), 0)
            sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        else:
            pid = os.fork()
            if pid == 0:
                run_server(Plan(**json.loads(rest)))
                os._exit(0)
            sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()


def plan_line(plan: Plan) -> str:
    """Return the line with which `serve_plans` starts a server for a plan."""
    return f"start {json.dumps(asdict(plan))}\n"


if __name__ == "__main__":
    serve_plans()
