"""The resolved steering of one request: what is applied, reported, pinned and released."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from pydantic import JsonValue

from interventions.catalogue import DIGEST_PREFIX, Entry
from interventions.errors import UnknownInterventionError
from interventions.registry import Registry
from server.api.default_steering import default_unavailable
from server.api.errors import from_registry
from server.engine.errors import EngineError, UnservableInterventionError
from server.engine.request import Edit
from server.metrics import NONE, OTHER, SEPARATOR
from server.records import InterventionRecord

Source: TypeAlias = Literal["request", "model", "default"]


@dataclass(frozen=True, slots=True)
class Resolved:
    """One intervention of a request: its registry entry, and its edit with all settings."""

    entry: Entry
    edit: Edit


class AppliedSteering:
    """The steering of one request. It holds pins in the registry from `pin` to `release`."""

    def __init__(self, resolved: Sequence[Resolved], source: Source, registry: Registry) -> None:
        effective = [item.entry for item in resolved if not item.edit.settings.does_nothing]
        self._source = source
        self._registry = registry
        self._pinned: list[str] = []
        self.edits = tuple(item.edit for item in resolved)
        self.echo: list[JsonValue] = [_echo(item, source) for item in resolved]
        """The answer's field `steering`."""
        self.kind = SEPARATOR.join(sorted({entry.manifest.kind for entry in effective})) or None
        """The label `kind` of the metrics; None if nothing is edited."""
        self.labels = tuple(map(_label, effective))
        """The labels `intervention` of the metrics, one for each effective edit."""
        self.interventions = tuple(
            InterventionRecord(item.entry.name, item.entry.digest, item.entry.manifest.kind)
            for item in resolved
        )

    def pin(self) -> None:
        """Pin the artifacts, so that their bytes stay even if their names are deleted.

        Raises:
            UnknownInterventionError: an artifact has just been deleted; nothing stays pinned.
        """
        try:
            for edit in self.edits:
                self._registry.pin(edit.digest)
                self._pinned.append(edit.digest)
        except UnknownInterventionError:
            self.release()
            raise

    @contextmanager
    def default_failures_as_503(self) -> Iterator[None]:
        """Turn a failure in the block to load or apply the default steering into a 503.

        The request did not choose the default steering, so it is not at fault.
        """
        try:
            yield
        except (UnknownInterventionError, UnservableInterventionError) as error:
            if self._source != "default" or not self.edits:
                raise
            raise default_unavailable(message_for_client(error)) from error

    @property
    def label(self) -> str:
        """The labels of all effective edits, joined to one label of the metrics."""
        return SEPARATOR.join(self.labels) or NONE

    def release(self) -> None:
        """Undo the pins. May be called again."""
        while self._pinned:
            self._registry.unpin(self._pinned.pop())


def message_for_client(error: EngineError | UnknownInterventionError) -> str:
    """Return the error as a sentence for the client; a damaged artifact's path is only logged."""
    return (
        from_registry(error).message if isinstance(error, UnknownInterventionError) else str(error)
    )


def _echo(item: Resolved, source: Source) -> JsonValue:
    return {
        "intervention": item.entry.name,
        "digest": item.entry.digest,
        "kind": item.entry.manifest.kind,
        "settings": asdict(item.edit.settings),
        "source": source,
    }


def _label(entry: Entry) -> str:
    # Labels are registry names, so a digest that no name points to must not become one. The names
    # NONE and OTHER have meanings of their own among the labels.
    nameless = entry.name.startswith(DIGEST_PREFIX) or entry.name in (NONE, OTHER)
    return OTHER if nameless else entry.name
