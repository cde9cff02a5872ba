"""What a request is steered by, once that is resolved: applied, told, pinned and released."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeAlias

from pydantic import JsonValue

from interventions.registry import DIGEST_PREFIX, Entry, Registry, UnknownInterventionError
from server.api.default_steering import default_unavailable
from server.api.errors import from_registry
from server.engine.base import Edit, EngineError, UnservableInterventionError
from server.metrics import NONE, OTHER, SEPARATOR
from server.records import InterventionRecord

Source: TypeAlias = Literal["request", "model", "default"]


@dataclass(frozen=True, slots=True)
class Resolved:
    """One intervention of a request: what is stored, and the settings in full."""

    entry: Entry
    edit: Edit


@dataclass(slots=True)
class AppliedSteering:
    """What a request is steered by. Holds pins in the registry until `release`."""

    edits: tuple[Edit, ...]
    echo: tuple[JsonValue, ...]  # for the client
    kind: str | None  # for the metrics; None where nothing is edited
    labels: tuple[str, ...]  # for the metrics, of each effective edit
    interventions: tuple[InterventionRecord, ...]  # for the log
    source: Source
    _registry: Registry
    _pinned: list[str] = field(default_factory=list)

    def pin(self) -> None:
        """Keep the artifacts' bytes, whatever is deleted meanwhile.

        Raises:
            UnknownInterventionError: one has just been deleted; nothing stays pinned.
        """
        try:
            for edit in self.edits:
                self._registry.pin(edit.digest)
                self._pinned.append(edit.digest)
        except UnknownInterventionError:
            self.release()
            raise

    @contextmanager
    def blamed(self) -> Iterator[None]:
        """Tells a failure in the block to load or apply the server's own default as a 503.

        The request, which did not choose it, is not at fault.
        """
        try:
            yield
        except (UnknownInterventionError, UnservableInterventionError) as error:
            if self.source != "default" or not self.edits:
                raise
            raise default_unavailable(sentence_of(error)) from error

    @property
    def label(self) -> str:
        """All effective edits, for the metrics."""
        return SEPARATOR.join(self.labels) or NONE

    def release(self) -> None:
        """Undo the pins. May be called again."""
        while self._pinned:
            self._registry.unpin(self._pinned.pop())


def applied(resolved: Sequence[Resolved], source: Source, registry: Registry) -> AppliedSteering:
    """What these interventions do to a request that `source` chose them for; not pinned yet."""
    effective = [item.entry for item in resolved if not item.edit.settings.does_nothing]
    kinds = sorted({entry.manifest.kind for entry in effective})
    return AppliedSteering(
        edits=tuple(item.edit for item in resolved),
        echo=tuple(
            {
                "intervention": item.entry.name,
                "digest": item.entry.digest,
                "kind": item.entry.manifest.kind,
                "settings": asdict(item.edit.settings),
                "source": source,
            }
            for item in resolved
        ),
        kind=SEPARATOR.join(kinds) or None,
        labels=tuple(map(_label, effective)),
        interventions=tuple(
            InterventionRecord(item.entry.name, item.entry.digest, item.entry.manifest.kind)
            for item in resolved
        ),
        source=source,
        _registry=registry,
    )


def sentence_of(error: EngineError | UnknownInterventionError) -> str:
    """What a client may know; a damaged artifact's path goes to the log only."""
    return (
        from_registry(error).message if isinstance(error, UnknownInterventionError) else str(error)
    )


def _label(entry: Entry) -> str:
    # A digest that no name points to any more is no name: it must not become a label. And two
    # names mean something else there.
    nameless = entry.name.startswith(DIGEST_PREFIX) or entry.name in (NONE, OTHER)
    return OTHER if nameless else entry.name
