"""Compiles the grammars of answers for a tokenizer, after a trial in a process of its own."""

import json
import subprocess
import sys
from collections import OrderedDict
from functools import cached_property
from threading import Lock
from typing import Final

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.hf import from_tokenizer
from transformers import PreTrainedTokenizerFast

from server.engine.errors import InvalidRequestError
from server.engine.grammar import SHOWN, CompiledGrammar, refused
from server.engine.text import grammar_check

_KEPT: Final = 16  # compiled grammars, beside those that running requests hold
_TRIAL_SECONDS: Final = 10.0  # on a busy machine; the processor time is limited by the trial itself
# A row is what the parser still considers after a character. In an ambiguous grammar the time of a
# token grows with the square of the row (500 items: 20 ms), and all requests wait for it. In a
# schema each property that may come next takes four items, which cost less (4,000 items: 20 ms).
_LIMITS: Final = LLParserLimits(max_items_in_row=500)
_SCHEMA_LIMITS: Final = LLParserLimits(max_items_in_row=5_000)


class GrammarCompiler:
    """Compiles grammars, and keeps the last ones. Used from any thread."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerFast, vocab_size: int, eos_tokens: frozenset[int]
    ) -> None:
        """`vocab_size` is the width of the model's logits."""
        self._source = tokenizer
        self._vocab_size = max(vocab_size, len(tokenizer))
        self._eos_tokens = eos_tokens
        self._kept: OrderedDict[str, LLMatcher] = OrderedDict()
        self._lock = Lock()

    def compile(self, lark: str, field: str, *, of_schemas: bool = False) -> CompiledGrammar:
        """Return a compiled grammar. The first one takes a second or two.

        Args:
            lark: in llguidance's dialect of Lark.
            field: the request's field that asks for it.
            of_schemas: whether all that clients have written of it is JSON schemas.

        Raises:
            InvalidRequestError: it cannot be compiled, or not within the limits.
        """
        with self._lock:
            matcher = self._kept.get(lark)
        if matcher is None:  # compiled without the lock: other requests go on meanwhile
            _try(lark, field)
            matcher = self._compiled(lark, field, _SCHEMA_LIMITS if of_schemas else _LIMITS)
        with self._lock:
            self._kept[lark] = matcher
            self._kept.move_to_end(lark)
            if len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return CompiledGrammar(lark, field, matcher)

    def _compiled(self, lark: str, field: str, limits: LLParserLimits) -> LLMatcher:
        try:
            tokenizer = self._tokenizer
        except ValueError as error:
            raise InvalidRequestError(
                f"'{field}' cannot be used: structures do not work with this model's tokenizer "
                f"({str(error)[:SHOWN]})",
                field,
                "unsupported_parameter",
            ) from error
        matcher = LLMatcher(tokenizer, lark, log_level=0, limits=limits)
        if matcher.is_error():
            raise refused(field, matcher.get_error().partition("\n")[0][:SHOWN])
        return matcher

    @cached_property
    def _tokenizer(self) -> LLTokenizer:
        """llguidance's form of the tokenizer. To make it takes a second, often for nothing."""
        ends = sorted(token for token in self._eos_tokens if token < self._vocab_size)
        return from_tokenizer(self._source, self._vocab_size, ends or None)


def _try(lark: str, field: str) -> None:
    """Raise InvalidRequestError if a grammar cannot be compiled within the limits."""
    command = [sys.executable, "-m", grammar_check.__name__]
    try:
        trial = subprocess.run(
            command, input=lark.encode(), capture_output=True, timeout=_TRIAL_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise _too_complex(field) from None
    if faults := trial.stdout.splitlines():
        place, fault = json.loads(faults[-1])
        raise refused(field + place, fault[:SHOWN])
    if trial.returncode != 0:
        raise _too_complex(field)


def _too_complex(field: str) -> InvalidRequestError:
    return refused(field, "it takes more time or memory than this server allows")
