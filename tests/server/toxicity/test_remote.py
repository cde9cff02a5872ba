"""Tests of the scorer that asks a service over HTTP: the contract, and services that break it."""

import json
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from server.toxicity.remote import load
from server.toxicity.scorer import ScoringError
from tests.toxicity_service import Service, scoring_service


def score(url: str, texts: list[str]) -> list[float]:
    """Return the scores that the service at `url` gives, over a new connection."""
    scorer = load(url)
    try:
        return scorer.score(texts)
    finally:
        scorer.close()


def answering(status: int, content: bytes) -> list[float]:
    """Score two texts with a service that always gives this answer."""
    with scoring_service(lambda _texts: (status, content)) as service:
        return score(service.url, ["a", "b"])


def test_texts_go_out_as_they_are_and_scores_come_back() -> None:
    texts = ["one", "", 'two\nlines "quoted"', "日本語 🙂\x00"]
    with scoring_service() as service:
        assert score(service.url, texts) == [len(text) / 100 for text in texts]
        assert service.asked == [texts]


def test_further_members_are_ignored() -> None:
    assert answering(200, b'{"model": "x", "scores": [0, 0.5]}') == [0.0, 0.5]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "no JSON"),
        (b"<html>", "no JSON"),
        (b"\xff", "no JSON"),
        (b'{"scores": [0.1, NaN]}', "no JSON"),
        (b'{"scores": [0.1, 0.2], "scores": [0.1, 0.2]}', "no JSON"),
        (b"[0.1, 0.2]", "no JSON object"),
        (b'{"score": [0.1, 0.2]}', "no JSON object"),
        (b'{"scores": 0.1}', "list of scores"),
        (b'{"scores": [0.1]}', "1 scores for 2 texts"),
        (b'{"scores": [0.1, 0.2, 0.3]}', "3 scores for 2 texts"),
        (b'{"scores": [0.1, "0.2"]}', "no number from 0 to 1"),
        (b'{"scores": [0.1, 1.5]}', "no number from 0 to 1"),
        (b'{"scores": [0.1, 1e999]}', "no number from 0 to 1"),
        (b'{"scores": [0.1, "SECRET"]}', "no number from 0 to 1"),
        (b'{"SECRET": 1, "SECRET": 2}', "no JSON"),
    ],
)
def test_wrong_answers_score_nothing_and_are_not_quoted(content: bytes, says: str) -> None:
    with pytest.raises(ScoringError, match=says) as caught:
        answering(200, content)
    assert "SECRET" not in str(caught.value)


@pytest.mark.parametrize("status", [201, 302, 400, 500, 503])
def test_only_a_200_counts(status: int) -> None:
    with pytest.raises(ScoringError, match=f"status {status}"):
        answering(status, json.dumps({"scores": [0.1, 0.2]}).encode())


def test_a_service_that_is_not_there() -> None:
    with scoring_service() as gone:
        pass
    with pytest.raises(ScoringError, match=r"cannot be asked: .*refused") as caught:
        score(gone.url, ["a"])
    assert f"at {urlsplit(gone.url).netloc} " in str(caught.value)


def with_secrets(url: str) -> str:
    """Return the service's URL with secrets added: an error may show nothing of it but the host."""
    return url.replace("http://", "http://user:SECRET@").replace(
        "/score", "/SECRET?key=SECRET#SECRET"
    )


@pytest.mark.parametrize(
    "answer", [lambda _texts: (500, b""), lambda _texts: (200, b"?"), lambda _texts: (200, b"{}")]
)
def test_errors_do_not_give_the_url_away(
    answer: Callable[[list[str]], tuple[int, bytes]],
) -> None:
    with scoring_service(answer) as service:
        url = with_secrets(service.url)
        with pytest.raises(ScoringError) as answered:
            score(url, ["a"])
        assert service.asked == [["a"]]
    with pytest.raises(ScoringError, match="cannot be asked") as gone:
        score(url, ["a"])
    for caught in (answered, gone):
        assert "SECRET" not in str(caught.value)
        assert "user" not in str(caught.value)


def test_what_breaks_the_protocol_is_not_quoted() -> None:
    with (
        scoring_service(lambda _texts: (1000, b"")) as service,
        pytest.raises(ScoringError, match=r"cannot be asked: RemoteProtocolError$"),
    ):
        score(service.url, ["a"])


def test_a_service_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.toxicity.remote.TIMEOUT_SECONDS", 0.1)
    with scoring_service() as service:
        service.hold()
        with pytest.raises(ScoringError, match="cannot be asked"):
            score(service.url, ["a"])
        assert_asked_once(service)


def assert_asked_once(service: Service) -> None:
    assert service.arrived.wait(10)
    assert service.asked == [["a"]]
