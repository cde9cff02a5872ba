"""Tests of the embedded scorer, which is alt-profanity-check."""

from profanity_check import predict_prob  # type: ignore[import-untyped]

from server.toxicity.profanity import load


def test_scores_are_the_librarys_in_order() -> None:
    texts = ["You are a stupid asshole.", "Good morning!", "", "two\nlines", "日本語 🙂"]
    scores = load("").score(texts)
    assert scores == [float(predict_prob([text])[0]) for text in texts]
    assert scores[0] > 0.9
    assert max(scores[1:]) < 0.3
    assert load("").score([]) == []
