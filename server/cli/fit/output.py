"""The shared parts of the fit commands: the model, its tokens, progress, errors and output."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

import torch
import typer
from rich.console import Console
from rich.progress import TextColumn

from interventions.artifact import write_artifact
from interventions.header import ArtifactError
from interventions.importers.imported import ImportFileError
from interventions.manifest import Manifest
from server.cli.fit.training_files import TrainingFile, TrainingFileError
from server.cli.progress import progress as progress_bar
from server.engine.model.description import ModelLoadError
from server.engine.model.embedded import EmbeddedModelError
from server.engine.torch.model.loader import LoadedModel, load_model
from steering.affine import AffineParameters
from steering.fit import FitError
from steering.reward import RewardHead
from steering.sites import SiteError

_INTERRUPTED: Final = 130  # exit status after SIGINT, by the shells' convention


class Advance(Protocol):
    """Moves a progress bar."""

    def __call__(self, done: int, total: int, loss: float | None = None, /) -> None:
        """Show that `done` of `total` are done."""


class FitCommandError(ValueError):
    """The options are wrong or contradict each other; the message is a sentence that says why."""


class WriteError(FitCommandError):
    """A file cannot be written, because a disk is full or otherwise."""

    def __init__(self, path: Path, error: OSError, option: str) -> None:
        """Say which file, why, and what to do.

        Args:
            path: the file.
            error: what the system said.
            option: the option that names the file.
        """
        super().__init__(
            f"cannot write {path}: {error.strerror or error}; make room there or give another "
            f"{option}, and run the command again"
        )


_USER_ERRORS = (
    ArtifactError,
    EmbeddedModelError,
    FitCommandError,
    FitError,
    ImportFileError,
    ModelLoadError,
    OSError,
    SiteError,
    TrainingFileError,
)


def load(model: str, dtype: str, device: str, threads: int | None) -> LoadedModel:
    """Load the model, and report slow steps on stderr."""
    if device == "cuda":
        if not torch.cuda.is_available():
            raise FitCommandError("--device cuda: torch finds no CUDA device")
        # So that the same seed gives the same artifact; cuBLAS reads the variable when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console(stderr=True, highlight=False)
    return load_model(
        model,
        dtype,
        device,
        lambda sentence: console.print(f"steerserve: {sentence}", markup=False, soft_wrap=True),
    )


def warn(sentence: str) -> None:
    """Print a sentence on stderr that the user should read, though the fit goes on."""
    console = Console(stderr=True, highlight=False)
    console.print(f"Warning: {sentence}", markup=False, soft_wrap=True)


def tokenize(loaded: LoadedModel, text: str, max_tokens: int) -> list[int]:
    """Return a text's token ids, as the server would make them, cut to the first `max_tokens`.

    Raises:
        FitCommandError: the model has no position for the last of them.
    """
    token_ids: list[int] = loaded.tokenizer(text)["input_ids"][:max_tokens]
    positions: int = loaded.model.config.max_position_embeddings
    if len(token_ids) > positions:
        raise FitCommandError(
            f"--max-tokens {max_tokens}: a text has so many tokens, and the model {positions} "
            f"positions: give at most {positions}"
        )
    return token_ids


def tokenize_lines(loaded: LoadedModel, file: TrainingFile, max_tokens: int) -> list[list[int]]:
    """Return the token ids of a file's lines, each cut to the first `max_tokens`.

    Raises:
        FitCommandError: a line has no token, or one that the model has no position for.
    """
    sequences = [tokenize(loaded, line, max_tokens) for line in file.lines]
    for number, sequence in enumerate(sequences, start=1):
        if not sequence:
            raise FitCommandError(
                f"{file.name}:{number}: the model's tokenizer makes no token of the line: remove it"
            )
    return sequences


def write(
    path: Path,
    manifest: Manifest,
    parameters: AffineParameters | RewardHead,
    figures: Mapping[str, float],
    as_json: bool,
) -> None:
    """Write the artifact and print a summary, as text or as JSON for machines.

    Raises:
        WriteError: the artifact cannot be written. An older one at its path is still there.
    """
    try:
        digest = write_artifact(path, manifest, parameters)
    except OSError as error:
        raise WriteError(path, error, "--out") from error
    if as_json:
        summary = {
            "path": str(path),
            "name": manifest.name,
            "kind": manifest.kind,
            "method": manifest.method,
            "digest": f"sha256:{digest}",
            "bytes": path.stat().st_size,
            **figures,
        }
        typer.echo(json.dumps(summary))
        return
    shown = ", ".join(f"{key.replace('_', ' ')} {_short(value)}" for key, value in figures.items())
    typer.echo(f"{path}  sha256:{digest}\n{shown}")


@contextmanager
def progress(task: str) -> Iterator[Advance]:
    """Show a progress bar on stderr during the block."""
    with progress_bar(TextColumn("{task.fields[note]}")) as bar:
        row = bar.add_task(task, total=None, note="")

        def advance(done: int, total: int, loss: float | None = None, /) -> None:
            note = "" if loss is None else f"loss {loss:.4g}"
            bar.update(row, completed=done, total=total, note=note)

        yield advance


@contextmanager
def user_errors_explained() -> Iterator[None]:
    """Print an error that the user can correct as one sentence on stderr, and exit with 2.

    Ctrl-C exits with 130, as shells do.
    """
    try:
        yield
    except _USER_ERRORS as error:
        typer.echo(f"Error: {error}", err=True)
        raise typer.Exit(2) from error
    except KeyboardInterrupt as interrupt:
        typer.echo("Interrupted: no artifact was written.", err=True)
        raise typer.Exit(_INTERRUPTED) from interrupt


def _short(figure: float) -> str:
    return str(figure) if isinstance(figure, int) else f"{figure:.4g}"
