"""Tests the hidden states before the head: their values, their file, and what memory holds."""

import errno
from io import FileIO
from pathlib import Path

import pytest
import torch

from steering.fit import FitError
from steering.fit.hidden_states import (
    Continuation,
    SpooledStates,
    collect_hidden_states,
    spooled_hidden_states,
)
from tests.allocations import PeakBytes
from tests.tiny import WIDTH, tiny_model

_SEQUENCES = [[1, 2, 3], [7], [5, 6, 7, 8, 9, 10, 11, 12]]


def test_hidden_states_are_the_heads_input_whatever_the_padding() -> None:
    model = tiny_model("llama")
    lm_head = model.get_submodule("lm_head")
    ran: list[str] = []
    handle = lm_head.register_forward_hook(lambda *_: ran.append("lm_head"))
    done: list[tuple[int, int]] = []
    together = collect_hidden_states(
        model, lm_head, _SEQUENCES, 2, lambda count, total: done.append((count, total))
    )
    alone = collect_hidden_states(model, lm_head, _SEQUENCES, 1)
    handle.remove()
    assert ran == []
    assert done == [(2, 3), (3, 3)]
    for sequence, padded, single in zip(_SEQUENCES, together, alone, strict=True):
        assert padded.shape == (len(sequence), WIDTH)
        assert padded.dtype == torch.float32
        torch.testing.assert_close(padded, single, atol=1e-5, rtol=1e-4)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([sequence])).logits[0]
        torch.testing.assert_close(lm_head(padded), logits, atol=1e-4, rtol=1e-4)


def test_a_head_that_is_not_run_is_an_error() -> None:
    with pytest.raises(FitError, match="does not run"):
        collect_hidden_states(tiny_model("llama"), torch.nn.Linear(2, 2), [[1]], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_spool_gives_back_the_bits_that_the_model_made(
    tmp_path: Path, dtype: torch.dtype
) -> None:
    model = tiny_model("llama")
    torch.nn.Module.to(model, dtype)
    lm_head = model.get_submodule("lm_head")
    texts = [Continuation(ids, start) for ids, start in zip(_SEQUENCES, (1, 0, 3), strict=True)]
    expected = collect_hidden_states(model, lm_head, _SEQUENCES, 2)
    with spooled_hidden_states(model, lm_head, texts, 2, tmp_path) as spool:
        assert len(spool) == 3
        assert list(tmp_path.iterdir()) == []  # the file has no name
        in_order = list(spool)
        for index in (2, 0, 1):
            states = spool[index]
            assert states.dtype == torch.float32
            assert torch.equal(states, expected[index][texts[index].start :])
            assert torch.equal(states, in_order[index])
    assert list(tmp_path.iterdir()) == []


def test_no_texts_make_an_empty_spool(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with spooled_hidden_states(model, model.get_submodule("lm_head"), [], 2, tmp_path) as spool:
        assert len(spool) == 0
        assert list(spool) == []


def test_memory_holds_one_batch_of_hidden_states_however_many_texts(tmp_path: Path) -> None:
    model = tiny_model("llama")
    lm_head = model.get_submodule("lm_head")

    def peak(texts: int, *, spooled: bool) -> int:
        sequences = [[1 + index % 50] * 40 for index in range(texts)]
        allocated = PeakBytes()
        with allocated:
            if spooled:
                continuations = [Continuation(sequence) for sequence in sequences]
                with spooled_hidden_states(model, lm_head, continuations, 4, tmp_path) as spool:
                    for index in range(texts):
                        spool[index].sum()
            else:
                collect_hidden_states(model, lm_head, sequences, 4)
        return allocated.peak

    size = 40 * WIDTH * 4  # bytes of a text's hidden states
    # The meter sees tensors that are kept: without a file, all of them are.
    assert peak(64, spooled=False) - peak(8, spooled=False) > 50 * size
    assert peak(64, spooled=True) == peak(8, spooled=True)


def test_a_full_disk_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: FileIO("/dev/full", "r+"))
    model = tiny_model("llama")
    texts = [Continuation([1, 2])]
    with (
        pytest.raises(FitError, match=r"in a file in .*No space.*make room"),
        spooled_hidden_states(model, model.get_submodule("lm_head"), texts, 2, tmp_path),
    ):
        pass


def test_a_folder_that_takes_no_file_is_a_sentence(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with (
        pytest.raises(FitError, match=r"No such file.*another folder"),
        spooled_hidden_states(
            model, model.get_submodule("lm_head"), [Continuation([1])], 1, tmp_path / "gone"
        ),
    ):
        pass


def test_an_error_of_the_fit_is_not_taken_for_the_disks(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with (
        pytest.raises(OSError, match="of the fit"),
        spooled_hidden_states(
            model, model.get_submodule("lm_head"), [Continuation([1])], 1, tmp_path
        ),
    ):
        raise OSError(errno.EIO, "of the fit")


def test_hidden_states_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    torch.nn.init.constant_(model.get_parameter("model.norm.weight"), float("inf"))
    with (
        pytest.raises(FitError, match="not finite: load it in another dtype"),
        spooled_hidden_states(
            model, model.get_submodule("lm_head"), [Continuation([1])], 1, tmp_path
        ),
    ):
        pass


def test_a_spool_that_lost_bytes_is_an_error(tmp_path: Path) -> None:
    with FileIO(tmp_path / "spool", "w+") as file:
        spool = SpooledStates(file, torch.device("cpu"))
        spool.write(0, torch.ones(2, 3))
        file.truncate(5)
        with pytest.raises(OSError, match="hidden states"):
            spool[0]
