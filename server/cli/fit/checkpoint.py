"""The file that holds the state of a fit, so that an interrupted fit can go on.

It is a safetensors file: the tensors of the state, and in the metadata what the fit was started
with. Nothing in it is unpickled. A new state replaces the older one in one step, so that a crash
leaves one of them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Final

import safetensors.torch
import typer
from safetensors import SafetensorError, safe_open
from torch import Tensor

from interventions.storage import publish, temporary_path, write_synced
from server.cli.fit.output import FitCommandError, WriteError

_METADATA: Final = "fit"


class CheckpointFile:
    """Keeps a fit's state in a file (see `steering.fit.lineas.Checkpoint`)."""

    def __init__(self, path: Path, out: Path, every: int) -> None:
        """Check that the path can be a checkpoint's.

        Args:
            path: the file, which need not exist.
            out: the artifact that the fit will write.
            every: the steps after which a state is written.

        Raises:
            FitCommandError: the folder does not exist, or the path is the artifact's.
        """
        if not path.parent.is_dir():
            raise FitCommandError(f"the folder of --checkpoint does not exist: {path.parent}")
        if path.resolve() == out.resolve():
            raise FitCommandError(f"--checkpoint and --out are the same file: {path}")
        self.path = path
        self._every = every
        self._fit: dict[str, str] = {}
        self._last_step = 0
        self.saved_step = 0  # 0: nothing was loaded or saved

    def identify(self, last_step: int, **fit: object) -> None:
        """Say which fit the states are of; they can be loaded by an equal one only.

        Args:
            last_step: the number of the fit's last step, after which a state is always saved.
            fit: what the fit is started with, by the name that an error message has for it.
        """
        self._last_step = last_step
        self._fit = {name: str(value) for name, value in fit.items()}

    def load(self) -> dict[str, Tensor] | None:
        """Return the state in the file; None if there is no file.

        Raises:
            FitCommandError: the file is not a checkpoint, is of another fit, or cannot be read.
        """
        if not self.path.exists():
            return None
        try:
            with safe_open(self.path, framework="pt", device="cpu") as file:
                fit = dict(json.loads((file.metadata() or {})[_METADATA]))
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            step = int(state["step"])
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            raise FitCommandError(
                f"{self.path} is not a checkpoint of a fit: give --checkpoint another file"
            ) from error
        if other := sorted(
            name for name in fit.keys() | self._fit.keys() if fit.get(name) != self._fit.get(name)
        ):
            raise FitCommandError(
                f"{self.path} is the checkpoint of a fit with other {', '.join(other)}: give the "
                "options of that fit, or another --checkpoint, or delete the file"
            )
        self.saved_step = step
        return state

    def save(self, step: int, state: Mapping[str, Tensor]) -> None:
        """Write the state, if it is the turn of the step.

        Raises:
            WriteError: the file cannot be written. An older state is still there.
        """
        if step % self._every and step != self._last_step:
            return
        tensors = {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in state.items()}
        data = safetensors.torch.save(tensors, metadata={_METADATA: json.dumps(self._fit)})
        temporary = temporary_path(self.path.parent)
        try:
            write_synced(temporary, data)
            publish(temporary, self.path)
        except OSError as error:
            raise WriteError(self.path, error, "--checkpoint") from error
        finally:
            temporary.unlink(missing_ok=True)
        self.saved_step = step


@contextmanager
def removed_at_the_end(checkpoint: CheckpointFile | None) -> Iterator[None]:
    """Remove the checkpoint after the block; say on stderr that it is kept if the block is left.

    Nothing is said of a fit that went wrong by itself, since it would go wrong again.
    """
    try:
        yield
    except (KeyboardInterrupt, WriteError):
        if checkpoint is None:
            typer.echo("With --checkpoint FILE, a fit can go on where it stopped.", err=True)
        elif checkpoint.saved_step:
            typer.echo(
                f"The state after step {checkpoint.saved_step} is in {checkpoint.path}: the same "
                "command goes on from there.",
                err=True,
            )
        raise
    if checkpoint is not None:
        checkpoint.path.unlink(missing_ok=True)


def digest(sequences: Sequence[Sequence[int]]) -> str:
    """Return a sha256 of token ids, hexadecimal."""
    return sha256(json.dumps([list(each) for each in sequences]).encode()).hexdigest()
