import pytest

from server.config import ConfigurationError
from server.engine.vllm import versions


@pytest.mark.parametrize("found", ["0.32.0", "0.32.7", "0.32.1rc1"])
def test_the_tested_version_needs_no_word(found: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_installed", lambda: found)
    assert versions.check_version() is None


def test_a_version_that_was_read_only_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "_installed", lambda: "0.33.0")
    assert "vLLM 0.33.0 is not the version" in (versions.check_version() or "")


@pytest.mark.parametrize("found", [None, "0.31.2", "0.34.0", "1.0.0", "unknown"])
def test_others_are_refused_with_the_command_that_installs_the_right_one(
    found: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "_installed", lambda: found)
    with pytest.raises(ConfigurationError, match=r"pip install 'vllm==0\.32\.\*'"):
        versions.check_version()
