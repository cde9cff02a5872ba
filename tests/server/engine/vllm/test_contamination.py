"""Shows that the traffic of tests/prefix_traffic.py notices K/V that the wrong requests share."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from server.engine.request import Edit
from steering.settings import AffineSettings
from tests.both_engines import Subject, each_vllm
from tests.prefix_traffic import KIN, contaminate

pytestmark = [pytest.mark.asyncio(loop_scope="session"), each_vllm]
Edits = tuple[Edit, ...]


def at_one_strength(edits: Edits) -> Edits:
    return tuple(
        Edit(edit.digest, replace(edit.settings, strength=1.0))
        if isinstance(edit.settings, AffineSettings)
        else edit
        for edit in edits
    )


def of_one_digest(edits: Edits) -> Edits:
    return tuple(replace(edit, digest="a") for edit in edits)


def in_no_order(edits: Edits) -> Edits:
    return tuple(sorted(edits, key=lambda edit: edit.digest))


def at_all_positions(edits: Edits) -> Edits:
    return tuple(
        Edit(edit.digest, AffineSettings(edit.settings.strength))
        if isinstance(edit.settings, AffineSettings)
        else edit
        for edit in edits
    )


WEAKER: Mapping[str, Callable[[Edits], Edits]] = {
    "no digest": of_one_digest,
    "no strength": at_one_strength,
    "no order": in_no_order,
    "no positions": at_all_positions,
    "no edits": lambda _edits: (),
}


@pytest.mark.parametrize("weaker", WEAKER)
async def test_a_salt_that_leaves_something_out_is_noticed(
    subject: Subject, monkeypatch: pytest.MonkeyPatch, weaker: str
) -> None:
    """Equal answers would prove nothing, if the traffic did not detect weakened salts."""
    # By name, because vLLM is not installed everywhere.
    from server.engine.vllm import sampling  # noqa: PLC0415

    engine: Any = subject.engine
    whole = sampling.cache_salt
    monkeypatch.setattr(
        sampling,
        "cache_salt",
        lambda asked: whole(replace(asked, edits=WEAKER[weaker](asked.edits))),
    )
    await engine._llm.reset_prefix_cache()
    try:
        with pytest.raises(AssertionError):  # of a token, or of its log-probability
            await contaminate(subject, 2 * len(KIN), seed=1)
    finally:
        await subject.settle()
        assert await engine._llm.reset_prefix_cache()
