"""Scores texts with toxic-comment-classifier, in a virtual environment of its own.

It reads a JSON list of texts from one file, and writes `{"scores": [...], "versions": {...}}` to
another.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path

from keras.utils import pad_sequences
from toxic_classifier.model import LIST_CLASSES, MAXLEN, ToxicCommentClassifier

_PACKAGES = ("toxic-comment-classifier", "tensorflow-cpu", "keras")
_BATCH = 64


def main(texts: str, answer: str) -> None:
    """Score each text by the probability of the class "toxic".

    The package's own `predict` is the mean over six classes, of which the others (as threats) are
    rare: above 0.5 it asks for several at once. Its `predict_batch` reads a text at a time; this is
    the same model with many.
    """
    classifier = ToxicCommentClassifier()
    tokens = classifier.tokenizer.texts_to_sequences(json.loads(Path(texts).read_text()))
    classes = classifier.model.predict(
        pad_sequences(tokens, maxlen=MAXLEN), batch_size=_BATCH, verbose=0
    )
    scores = classes[:, LIST_CLASSES.index("toxic")].tolist()
    versions = {name: version(name) for name in _PACKAGES}
    Path(answer).write_text(json.dumps({"scores": scores, "versions": versions}))


if __name__ == "__main__":
    main(*sys.argv[1:])
