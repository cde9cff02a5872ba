"""Tests of `BatchSize`: the size of the next batch, learned from how long earlier ones took."""

from collections.abc import Callable

import pytest

from server.toxicity.batch_size import MAX_TEXTS, TARGET_SECONDS, BatchSize


def sizes(
    seconds: Callable[[int], float], batches: int, size: BatchSize | None = None
) -> list[int]:
    """Return the sizes of `batches` full batches, where one of n texts takes `seconds(n)`."""
    size = size or BatchSize()
    found = []
    for _ in range(batches):
        found.append(size.size)
        size.took(size.size, seconds(size.size))
    return found


def test_quick_texts_soon_fill_the_largest_batch() -> None:
    assert sizes(lambda texts: 0.001 * texts, 6) == [1, 2, 16, MAX_TEXTS, MAX_TEXTS, MAX_TEXTS]


@pytest.mark.parametrize("each", [0.02, 0.03125, 0.3, 0.9])
def test_batches_take_the_target(each: float) -> None:
    *_, last = sizes(lambda texts: each * texts, 10)
    assert 0 <= TARGET_SECONDS - each * last < each + 1e-9


def test_a_batch_that_is_slow_whatever_its_size_is_large() -> None:
    assert sizes(lambda _: 2.0, 6)[-2:] == [MAX_TEXTS] * 2
    *_, last = sizes(lambda texts: 2.0 + 0.05 * texts, 10)
    assert 0.05 * last == pytest.approx(TARGET_SECONDS, abs=0.1)


def test_texts_that_take_longer_than_the_target_go_one_by_one() -> None:
    """A heavy classifier on a contended processor takes 9 s a text: 64 texts take ten minutes."""
    found = sizes(lambda texts: 9.0 * texts, 100)
    assert found[:3] == [1, 2, 1]  # the batch of two showed what a further text costs
    assert max(found) == 2
    assert found.count(2) < 6  # a batch of two is seldom tried again


def test_size_adapts_to_changed_speed() -> None:
    size = BatchSize()
    assert sizes(lambda texts: 0.001 * texts, 6, size)[-1] == MAX_TEXTS
    assert sizes(lambda texts: 2.0 * texts, 4, size)[1:] == [1, 1, 1]
    assert sizes(lambda texts: 0.001 * texts, 4, size)[-1] == MAX_TEXTS
    assert sizes(lambda texts: 1.0 + 2.0 * texts, 4, size)[1:] == [1, 1, 1]
    assert sizes(lambda _: 1.5, 60, size)[-1] == MAX_TEXTS


def test_a_few_texts_do_not_make_the_next_batch_huge() -> None:
    size = BatchSize()
    sizes(lambda texts: 0.25 * texts, 6, size)
    for _ in range(100):  # short texts, one at a time
        size.took(1, 0.001)
    assert size.size <= 8
    size.took(8, 2.0)
    assert size.size <= 4


def test_a_batch_that_failed_is_not_tried_as_large_again() -> None:
    size = BatchSize()
    sizes(lambda texts: 0.001 * texts, 6, size)
    for texts in (64, 32, 16, 8, 4, 2):
        assert size.size == texts
        size.failed(texts)
    assert size.size == 1
    size.failed(1)
    assert size.size == 1
    size.took(1, 0.001)
    assert size.size > 1
