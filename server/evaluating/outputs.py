"""The files of an evaluation: checked before anything is measured, written whole or not at all."""

import importlib
import json
import os
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import JsonValue

from interventions.storage import publish, temporary_path, write_synced
from server.evaluating import EvaluationError, EvaluationInputError
from server.evaluating.new_defaults import write_with_defaults
from server.evaluating.run import Continuation
from server.evaluating.verdict import Verdict

STDOUT: Final = Path("-")
_PICTURES: Final = (".svg", ".png")


@dataclass(frozen=True, slots=True)
class Outputs:
    """The files to write; those that are None are not wanted. STDOUT as `report` is printed."""

    report: Path | None = None
    picture: Path | None = None
    continuations: Path | None = None
    artifact: Path | None = None

    def check(self, inputs: Collection[Path], *, trade_off: bool) -> None:
        """Check that all files can be written, and that matplotlib is there if it is needed.

        Args:
            inputs: the files that are read, none of which may be written.
            trade_off: whether toxicity and its cost are measured.

        Raises:
            EvaluationInputError: one cannot be written.
        """
        self._check_different(inputs)
        for path in (self.picture, self.artifact):
            if path is not None and not trade_off:
                raise EvaluationInputError(
                    f"{path} needs toxicity (--prompts), and perplexity (--text) or fluency"
                )
        for path, suffixes in (
            (None if self.report == STDOUT else self.report, ()),
            (self.picture, _PICTURES),
            (self.continuations, ()),
            (self.artifact, (".safetensors",)),
        ):
            if path is not None:
                _check(path, suffixes)
        if self.picture is not None:
            _load_picture()

    def write(
        self, report: JsonValue, verdict: Verdict, continuations: Sequence[Continuation]
    ) -> None:
        """Write all wanted files but the artifact.

        Raises:
            EvaluationError: a file cannot be written; those before it were.
        """
        if self.report not in (None, STDOUT):
            _write(self.report, json_text(report))
        if self.continuations is not None:
            lines = [json.dumps(asdict(each), ensure_ascii=False) for each in continuations]
            _write(self.continuations, "".join(f"{line}\n" for line in lines))
        if self.picture is not None:
            if not verdict.candidates:
                raise EvaluationError(
                    f"{self.picture} is not written: the base model has no toxicity and perplexity"
                )
            drawn = _load_picture().draw(
                verdict.candidates, verdict.best, self.picture.suffix.removeprefix(".")
            )
            _write(self.picture, drawn)

    async def write_artifact(
        self, verdict: Verdict, download: Callable[[str], Awaitable[bytes]]
    ) -> None:
        """Write a copy of the best intervention with its best settings, if one is wanted.

        Args:
            verdict: says which one is the best.
            download: returns the bytes of the artifact with a digest.

        Raises:
            EvaluationError: the best setting is not one intervention, or its artifact cannot be
                downloaded or written.
        """
        if self.artifact is None:
            return
        if verdict.single is None:
            raise EvaluationError(
                f"{self.artifact} is not written: the best setting is not one intervention"
            )
        artifact = await download(verdict.single.digest)
        try:
            write_with_defaults(self.artifact, artifact, verdict.single.settings)
        except OSError as error:
            raise _unwritten(self.artifact, error) from error

    def _check_different(self, inputs: Collection[Path]) -> None:
        files = (self.report, self.picture, self.continuations, self.artifact)
        taken = {path.resolve() for path in inputs}
        for path in files:
            if path is None or path == STDOUT:
                continue
            if path.resolve() in taken:
                raise EvaluationInputError(f"{path} would overwrite another file of this command")
            taken.add(path.resolve())


def json_text(report: JsonValue) -> str:
    """Return a report as the text of a JSON file."""
    return json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _check(path: Path, suffixes: Collection[str]) -> None:
    if suffixes and path.suffix not in suffixes:
        raise EvaluationInputError(f"{path} must end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise EvaluationInputError(f"{path} is a folder")
    if not path.parent.is_dir():
        raise EvaluationInputError(f"the folder of {path} does not exist")
    if not os.access(path.parent, os.W_OK):
        raise EvaluationInputError(f"the folder of {path} cannot be written to")


def _load_picture() -> Any:
    """Import the module that draws. matplotlib is imported only by this call."""
    try:
        return importlib.import_module("server.evaluating.picture")
    except ImportError as error:
        if not (error.name or "").startswith("matplotlib"):
            raise
        raise EvaluationInputError(
            "--picture needs matplotlib, which is not installed: pip install 'steerserve[evaluate]'"
        ) from error


def _write(path: Path, data: str | bytes) -> None:
    temporary = temporary_path(path.parent)
    try:
        write_synced(temporary, data.encode() if isinstance(data, str) else data)
        publish(temporary, path)
    except OSError as error:
        raise _unwritten(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def _unwritten(path: Path, error: OSError) -> EvaluationError:
    return EvaluationError(f"{path} cannot be written: {error.strerror or error}")
