"""Makes the token ids of pairs' continuations, and of neutral texts, for `steerserve fit argre`."""

from collections.abc import Sequence
from itertools import takewhile

from server.cli.fit import output
from server.cli.fit.training_files import PromptedText, TextPair, TrainingFile
from server.engine.torch.model.loader import LoadedModel
from steering.fit.hidden_states import Continuation


def continuations(
    loaded: LoadedModel, pairs: Sequence[TextPair], max_tokens: int
) -> tuple[list[Continuation], list[Continuation]]:
    """Return the positives and the negatives, each after its prompt, cut to `max_tokens`.

    Raises:
        FitCommandError: a text has no token after its prompt.
    """
    positives: list[Continuation] = []
    negatives: list[Continuation] = []
    for number, pair in enumerate(pairs, start=1):
        for side, prompted, found in (
            ("positive", pair.positive, positives),
            ("negative", pair.negative, negatives),
        ):
            continuation = _after_prompt(loaded, prompted, max_tokens)
            if continuation.start == len(continuation.token_ids):
                raise output.FitCommandError(
                    f"pair {number}: nothing of its {side} is left within --max-tokens {max_tokens}"
                )
            found.append(continuation)
    return positives, negatives


def _after_prompt(loaded: LoadedModel, prompted: PromptedText, max_tokens: int) -> Continuation:
    """Return the tokens of a prompt and its text; nothing may be left of the text."""
    prompt = output.tokenize(loaded, prompted.prompt, max_tokens) if prompted.prompt else []
    token_ids = output.tokenize(loaded, prompted.prompt + prompted.text, max_tokens)
    # The prompt's length would be wrong if its last token merges with the text's first.
    both = zip(prompt, token_ids, strict=False)
    start = sum(1 for _ in takewhile(lambda tokens: tokens[0] == tokens[1], both))
    return Continuation(token_ids, start)


def whole_texts(loaded: LoadedModel, file: TrainingFile, max_tokens: int) -> list[Continuation]:
    """Return a file's lines, which have no prompt, cut to `max_tokens`.

    Raises:
        FitCommandError: a line has no token.
    """
    return [Continuation(ids) for ids in output.tokenize_lines(loaded, file, max_tokens)]
