"""Tests that an interrupted `steerserve fit lineas` goes on, and that nothing half-written is left.

A fit that is interrupted after any step and run again ends in the same artifact, to the byte.
"""

import errno
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import Result

from server.cli.fit import output
from server.cli.fit.output import Advance
from tests.disk import FaultyDisk, watching
from tests.fitting import fit_lineas_by_command
from tests.processes import ROOT, START_SECONDS, STOP_SECONDS

OUT = "tiny-lineas.safetensors"
OPTIONS = ("--steps", "8", "--optimizer", "adamw", "--learning-rate", "0.01", "--gamma", "0.01")


@pytest.fixture(autouse=True)
def fixed_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1795219200")


def _fit(model: str, folder: Path, *more: str) -> Result:
    state = ("--checkpoint", str(folder / "state"), "--checkpoint-every", "3")
    return fit_lineas_by_command(model, folder, *OPTIONS, *state, *more)


@contextmanager
def _interrupted_after(step: int) -> Iterator[None]:
    """Make Ctrl-C come right after a step of any fit within the context."""

    @contextmanager
    def progress(_task: str) -> Iterator[Advance]:
        def advance(done: int, total: int, loss: float | None = None, /) -> None:
            if done == step:
                raise KeyboardInterrupt

        yield advance

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(output, "progress", progress)
        yield


def test_a_fit_goes_on_where_it_was_interrupted(model: str, folder: Path) -> None:
    assert fit_lineas_by_command(model, folder, *OPTIONS).exit_code == 0
    whole = (folder / OUT).read_bytes()
    (folder / OUT).unlink()
    for step, saved in ((2, 0), (4, 3), (7, 6)):
        with _interrupted_after(step):
            result = _fit(model, folder)
        assert result.exit_code == 130
        assert "Interrupted: no artifact was written." in result.stderr
        said = f"The state after step {saved} is in {folder / 'state'}: the same command goes on"
        assert (said in result.stderr) == (saved > 0)
        assert not (folder / OUT).exists()
        assert (folder / "state").exists() == (saved > 0)
    assert _fit(model, folder).exit_code == 0
    assert (folder / OUT).read_bytes() == whole
    files = {"toxic.txt", "neutral.txt", "pairs.jsonl"}
    assert {path.name for path in folder.iterdir()} == files | {OUT}


def test_without_a_checkpoint_the_option_is_named(model: str, folder: Path) -> None:
    with _interrupted_after(2):
        result = fit_lineas_by_command(model, folder)
    assert result.exit_code == 130
    assert "With --checkpoint FILE" in result.stderr
    assert not (folder / OUT).exists()


# A shell has the processes that it runs in the background ignore SIGINT, and these tests with them.
_HEARS_CTRL_C = """
import runpy, signal
signal.signal(signal.SIGINT, signal.default_int_handler)
runpy.run_module("server", run_name="__main__")
"""


def test_ctrl_c_ends_the_real_command(model: str, folder: Path) -> None:
    command = [sys.executable, "-c", _HEARS_CTRL_C, "fit", "lineas", "--model", model]
    files = {"--source": "toxic.txt", "--target": "neutral.txt", "--out": OUT, "--checkpoint": "s"}
    options = [part for name, file in files.items() for part in (name, str(folder / file))]
    options += ["--samples", "3", "--steps", "1000000", "--learning-rate", "0.001"]
    with subprocess.Popen(
        [*command, *options, "--checkpoint-every", "1"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            deadline = time.monotonic() + START_SECONDS
            while not (folder / "s").exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=STOP_SECONDS)
        finally:
            process.kill()
    assert process.returncode == 130
    assert "Interrupted: no artifact was written." in stderr
    assert f"is in {folder / 's'}: the same command goes on from there." in stderr
    assert "Traceback" not in stderr
    assert not list(folder.glob("*.tmp"))
    assert not (folder / OUT).exists()


def _append(folder: Path) -> None:
    with (folder / "toxic.txt").open("a") as file:
        file.write("one more\n")


@pytest.mark.parametrize(
    ("options", "change", "other"),
    [
        (("--steps", "9"), None, "with other steps:"),
        (("--seed", "1", "--learning-rate", "0.1"), None, "with other learning_rate, seed:"),
        (("--sites", r"model\.norm"), None, "with other sites:"),
        (("--dtype", "bfloat16"), None, "with other dtype:"),
        ((), _append, "with other source:"),
    ],
)
def test_a_checkpoint_of_another_fit_is_refused(
    model: str,
    folder: Path,
    options: tuple[str, ...],
    change: Callable[[Path], None] | None,
    other: str,
) -> None:
    with _interrupted_after(4):
        assert _fit(model, folder).exit_code == 130
    state = (folder / "state").read_bytes()
    if change is not None:
        change(folder)
    result = _fit(model, folder, *options)
    assert result.exit_code == 2
    assert f"is the checkpoint of a fit {other} give the options" in result.stderr
    assert (folder / "state").read_bytes() == state
    assert not (folder / OUT).exists()


def test_a_checkpoint_of_another_model_is_refused(
    model: str, folder: Path, tiny_folders: dict[str, Path]
) -> None:
    with _interrupted_after(4):
        assert _fit(model, folder).exit_code == 130
    result = _fit(str(tiny_folders["mistral"]), folder)
    assert result.exit_code == 2
    assert "with other model:" in result.stderr


def _not_a_checkpoint(path: Path, kind: str) -> None:
    match kind:
        case "text":
            path.write_text("important notes")
        case "pickle":
            torch.save({"step": torch.tensor(3)}, path)
        case "artifact":
            save_file({"step": torch.tensor(3)}, path, metadata={"manifest": "{}"})
        case "bad metadata":
            save_file({"step": torch.tensor(3)}, path, metadata={"fit": "[1]"})
        case "no step":
            save_file({"x": torch.tensor(3)}, path, metadata={"fit": "{}"})
        case "folder":
            path.mkdir()


@pytest.mark.parametrize(
    "kind", ["text", "pickle", "artifact", "bad metadata", "no step", "folder"]
)
def test_a_file_that_is_no_checkpoint_is_refused_and_kept(
    model: str, folder: Path, kind: str
) -> None:
    state = folder / "state"
    _not_a_checkpoint(state, kind)
    before = None if state.is_dir() else state.read_bytes()
    result = _fit(model, folder)
    assert result.exit_code == 2
    assert f"{state} is not a checkpoint of a fit: give --checkpoint another file" in result.stderr
    assert "Traceback" not in result.output
    assert state.is_dir() if before is None else state.read_bytes() == before
    assert not (folder / OUT).exists()


def test_a_checkpoints_place_is_checked_first(model: str, folder: Path) -> None:
    same = str(folder / OUT)
    result = fit_lineas_by_command(model, folder, "--checkpoint", same)
    assert result.exit_code == 2
    assert "--checkpoint and --out are the same file" in result.stderr
    result = fit_lineas_by_command(model, folder, "--checkpoint", "/nowhere/state")
    assert result.exit_code == 2
    assert "the folder of --checkpoint does not exist" in result.stderr


def test_a_full_disk_keeps_the_last_state(model: str, folder: Path) -> None:
    """The disk is full when the artifact is written, and has room again for the same command."""
    assert fit_lineas_by_command(model, folder, *OPTIONS).exit_code == 0
    whole = (folder / OUT).read_bytes()
    (folder / OUT).write_bytes(b"an older one")
    disk = FaultyDisk(0, errno.ENOSPC, lasting=True)
    saved = 0

    def before(operation: str, path: Path) -> None:
        nonlocal saved
        saved += operation == "replace"
        if saved >= 3:  # the states after the steps 3, 6 and 8
            disk.before(operation, path)

    with watching(folder, before):
        result = _fit(model, folder)
    assert result.exit_code == 2
    assert disk.refused
    assert f"cannot write {folder / OUT}: No space left on device; make room" in result.stderr
    assert f"The state after step 8 is in {folder / 'state'}" in result.stderr
    assert (folder / OUT).read_bytes() == b"an older one"
    assert not list(folder.glob("*.tmp"))
    assert _fit(model, folder).exit_code == 0
    assert (folder / OUT).read_bytes() == whole


@pytest.mark.parametrize("checkpoint", [True, False])
def test_a_disk_that_is_full_from_the_start(model: str, folder: Path, checkpoint: bool) -> None:
    disk = FaultyDisk(0, errno.ENOSPC, lasting=True)
    with watching(folder, disk.before):
        fit = _fit if checkpoint else fit_lineas_by_command
        result = fit(model, folder)
    assert result.exit_code == 2
    option = "--checkpoint" if checkpoint else "--out"
    assert f"No space left on device; make room there or give another {option}" in result.stderr
    assert "The state after" not in result.stderr
    assert {path.name for path in folder.iterdir()} == {"toxic.txt", "neutral.txt", "pairs.jsonl"}


def test_a_fit_that_goes_wrong_by_itself_offers_no_state(model: str, folder: Path) -> None:
    result = _fit(model, folder, "--optimizer", "sgd", "--learning-rate", "1e25")
    assert result.exit_code == 2
    assert "lower the learning rate" in result.stderr
    assert "the same command" not in result.stderr
    assert not (folder / OUT).exists()


def test_the_same_command_prints_the_same_summary_after_an_interruption(
    model: str, folder: Path
) -> None:
    whole = json.loads(fit_lineas_by_command(model, folder, *OPTIONS, "--json").stdout)
    with _interrupted_after(5):
        _fit(model, folder)
    assert json.loads(_fit(model, folder, "--json").stdout) == whole
