"""Tests incremental detokenization, and stop strings, which end a text."""

import codecs
import time
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from server.engine.text.detokenizer import Detokenizer
from server.engine.text.stop_strings import StopStrings
from server.engine.text.vocabulary import Vocabulary
from tests.tiny import EOS, tiny_tokenizer

TOKENIZER = tiny_tokenizer().backend_tokenizer
VOCABULARY = Vocabulary(TOKENIZER)


def run(text: str | bytes, *stop: str) -> tuple[list[str], bool]:
    """Detokenize text as one token a byte, until a stop string ends it.

    Returns:
        Each token's text and the text that comes at the end; and whether a stop string was found.
    """
    data = text.encode() if isinstance(text, str) else text
    detokenizer = Detokenizer(VOCABULARY, stop)
    pieces = []
    for byte in data:
        pieces.append(detokenizer.push(BYTES[byte]))
        if detokenizer.stopped:
            break
    pieces.append(detokenizer.finish())
    return pieces, detokenizer.stopped


def _byte_tokens() -> dict[int, int]:
    """Return byte -> its token in the tiny tokenizer."""
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    names = {byte: chr(byte) for byte in letters}
    others = [byte for byte in range(256) if byte not in names]
    names |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    vocabulary = TOKENIZER.get_vocab()
    return {byte: vocabulary[name] for byte, name in names.items()}


BYTES = _byte_tokens()


@given(st.text(max_size=20))
def test_pieces_join_to_the_text(text: str) -> None:
    pieces, stopped = run(text)
    assert "".join(pieces) == text
    assert not stopped


@given(st.binary(max_size=20))
def test_bytes_that_are_no_text_give_what_the_tokenizer_gives(data: bytes) -> None:
    """An incomplete character at the end gives no text, unlike in the tokenizer."""
    pieces, _ = run(data)
    unfinished = len(_unfinished(data))
    whole = data[: len(data) - unfinished]
    assert "".join(pieces) == TOKENIZER.decode([BYTES[byte] for byte in whole])


def _unfinished(data: bytes) -> bytes:
    """Return the bytes at the end that may still become a character."""
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    decoder.decode(data)
    return decoder.getstate()[0]


@pytest.mark.parametrize("end", [b"\xf0", b"\xf0\x9f\x98", "\U0001f600".encode()[:2]])
def test_a_character_that_is_unfinished_at_the_end_is_nothing(end: bytes) -> None:
    assert "".join(run(b"a" + end)[0]) == "a"
    assert "".join(run("\ufffd".encode() + end)[0]) == "\ufffd", "a real one was lost"
    assert "".join(run(end + b"a")[0]) == "\ufffda", "it is none, and went on"


def test_a_character_comes_when_it_is_whole() -> None:
    assert run("a€b")[0] == ["a", "", "", "€", "b", ""]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop_string_and_nothing_of_it_is_shown(
    text: str, stop: list[str]
) -> None:
    # The text is cut in the shortest prefix that contains a stop string, at the first one in it.
    expected, ends = text, False
    for length in range(1, len(text) + 1):
        found = [place for s in stop if (place := text[:length].find(s)) >= 0]
        if found:
            expected, ends = text[: min(found)], True
            break
    pieces, stopped = run(text, *stop)
    assert "".join(pieces) == expected
    assert stopped is ends


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    assert run("a\n\nUser", "\n\nUser:")[0] == ["a", "", "", "", "", "", "", "\n\nUser"]
    assert run("a\nb", "\n\n")[0] == ["a", "", "\nb", ""]


def byte_fallback_tokenizer() -> Tokenizer:
    """Return a tokenizer like Llama's: words with a mark for the space, and tokens for bytes."""
    vocabulary = {"<unk>": 0, "\u2581a": 1, "b": 2, "\u2581": 3}
    vocabulary |= {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


@given(st.lists(st.sampled_from([1, 2, 3, 4 + 0xE2, 4 + 0x82, 4 + 0xAC, 4 + 0xFF, 4 + 0x41])))
def test_bytes_that_are_no_character_never_fail_with_byte_fallback(tokens: list[int]) -> None:
    detokenizer = Detokenizer(Vocabulary(byte_fallback_tokenizer()), ())
    pieces = [*map(detokenizer.push, tokens), detokenizer.finish()]
    assert all(isinstance(piece, str) for piece in pieces)


def test_words_and_characters_of_several_bytes_with_byte_fallback() -> None:
    tokenizer = byte_fallback_tokenizer()
    tokens = [1, 2, 1, 4 + 0xE2, 4 + 0x82, 4 + 0xAC, 3, 2, 4 + 0x41]
    detokenizer = Detokenizer(Vocabulary(tokenizer), ())
    pieces = [*map(detokenizer.push, tokens), detokenizer.finish()]
    assert "".join(pieces) == tokenizer.decode(tokens) == "ab a€ bA"


@pytest.mark.parametrize("token", [EOS, EOS + 1])
def test_special_tokens_give_no_text(token: int) -> None:
    assert Detokenizer(VOCABULARY, ()).push(token) == ""


@given(st.lists(st.sampled_from([1, 2, 3]), min_size=1), st.lists(st.sampled_from([1, 2, 3])))
def test_a_completion_goes_on_from_its_prompt(prompt: list[int], completion: list[int]) -> None:
    """A completion keeps its leading space, which the decoder strips only at a text's beginning."""
    tokenizer = byte_fallback_tokenizer()
    detokenizer = Detokenizer(Vocabulary(tokenizer), (), prompt)
    text = "".join([*map(detokenizer.push, completion), detokenizer.finish()])
    whole = tokenizer.decode([*prompt, *completion])
    # The decoder strips a space at the beginning of the whole text, so both sides are stripped.
    assert whole.endswith(text)
    assert whole.lstrip() == (tokenizer.decode(prompt) + text).lstrip()


def test_a_character_that_the_prompt_began_is_whole_in_the_completion() -> None:
    euro = [BYTES[byte] for byte in "€".encode()]
    detokenizer = Detokenizer(VOCABULARY, (), [BYTES[ord("a")], *euro[:2]])
    pieces = [detokenizer.push(token) for token in (euro[2], BYTES[ord("b")])]
    assert pieces == ["€", "b"]


def test_the_prompt_is_no_part_of_a_stop_string() -> None:
    detokenizer = Detokenizer(VOCABULARY, ("ab",), [BYTES[ord("a")]])
    assert detokenizer.push(BYTES[ord("b")]) == "b"
    assert not detokenizer.stopped


def test_incomplete_prompt_bytes_give_no_text() -> None:
    euro = [BYTES[byte] for byte in "\u20ac".encode()]
    detokenizer = Detokenizer(VOCABULARY, (), [BYTES[ord("a")], *euro[:2]])
    assert (detokenizer.push(BYTES[ord("b")]), detokenizer.offset) == ("b", 0)
    detokenizer = Detokenizer(VOCABULARY, (), [BYTES[ord("a")], *euro[:1]])
    assert (detokenizer.push(euro[1]), detokenizer.offset) == ("", 0)
    # The completion has one of the broken character's bytes, so it shows the replacement character.
    assert (detokenizer.push(BYTES[ord("b")]), detokenizer.offset) == ("\ufffdb", 1)


@pytest.mark.parametrize("token", [TOKENIZER.token_to_id("<eos>"), BYTES[0xFF], BYTES[0xE2]])
def test_textless_tokens_are_decoded_in_constant_time(
    token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = Vocabulary(TOKENIZER)
    longest = 0
    decode = vocabulary._decode

    def measured(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(tokens)

    monkeypatch.setattr(vocabulary, "_decode", measured)
    detokenizer = Detokenizer(vocabulary, ("<eos><bos>",))
    pieces = [detokenizer.push(token) for _ in range(200)]
    assert longest <= 2
    assert len("".join([*pieces, detokenizer.push(BYTES[ord("a")])])) <= 201


# --- special tokens in stop strings ---

PIECES = ("a", "b", "<bos>", "<eos>")
TOKENS = {piece: TOKENIZER.get_vocab()[piece] for piece in PIECES}


def emit(pieces: list[str], *stop: str, ends: bool = False) -> tuple[list[str], bool]:
    """Detokenize tokens given by name, until a stop string ends the text.

    Args:
        ends: whether the last token ends the text, like an end-of-sequence token.

    Returns:
        Each token's text and the text that comes at the end; and whether a stop string was found.
    """
    detokenizer = Detokenizer(VOCABULARY, stop)
    out = []
    for place, piece in enumerate(pieces, 1):
        out.append(detokenizer.push(TOKENS[piece], ends=ends and place == len(pieces)))
        if detokenizer.stopped:
            break
    return [*out, detokenizer.finish()], detokenizer.stopped


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("<bos>", "ab"),
        ("<bos>a", "ab"),
        ("b<bos>a", "a"),
        ("os>", "ab"),
        ("aa", None),
        ("ba", "a"),  # the shown text has no <bos> between b and a
        ("a<bos>b", None),
    ],
)
def test_a_stop_string_may_have_special_tokens_in_it(stop: str, text: str | None) -> None:
    pieces, stopped = emit(["a", "b", "<bos>", "a"], stop)
    assert "".join(pieces) == ("aba" if text is None else text)
    assert stopped is (text is not None)


def test_what_comes_before_the_end_token_may_be_part_of_a_stop_string() -> None:
    assert emit(["a", "b", "<eos>"], "b<eos>", ends=True) == (["a", "", "", ""], True)
    assert emit(["a", "b", "<eos>"], "b<bos>", ends=True) == (["a", "", "", "b"], False)
    # A token that ends the text gives no text, even if it is no special token.
    assert emit(["a", "b"], ends=True) == (["a", "", ""], False)


def test_text_before_a_special_token_waits_only_while_it_may_be_stopped_at() -> None:
    assert emit(["a", "<bos>", "b", "a"], "a<bos>a")[0] == ["", "", "ab", "", "a"]


@given(
    st.lists(st.sampled_from(PIECES), max_size=10),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=3).map("".join),
)
def test_no_stop_string_is_ever_shown_and_nothing_else_is_lost(
    pieces: list[str], stop: str
) -> None:
    out, stopped = emit(pieces, stop)
    marked = [(letter, len(piece) == 1) for piece in pieces for letter in piece]
    ends = next(
        (end for end in _ends(pieces) if _stops_at(marked[:end], stop) is not None), len(marked)
    )
    cut = _stops_at(marked[:ends], stop)
    assert stopped is (cut is not None)
    assert "".join(out) == "".join(letter for letter, shown in marked[:cut] if shown)
    assert stop not in "".join(out)


def _ends(pieces: list[str]) -> list[int]:
    """Return the number of characters up to the end of each piece."""
    return [*accumulate(map(len, pieces))]


def _stops_at(marked: list[tuple[str, bool]], stop: str) -> int | None:
    """Return where the stop string begins, with or without hidden special tokens; None if absent.

    Args:
        marked: characters, each with whether it is shown.
    """
    readings = [[*range(len(marked))], [at for at, (_, shown) in enumerate(marked) if shown]]
    found = []
    for places in readings:
        at = "".join(marked[place][0] for place in places).find(stop)
        if at >= 0:
            found.append(places[at])
    return min(found, default=None)


def test_a_text_that_is_held_back_for_long_does_not_cost_more_and_more() -> None:
    # Only the first stop string can be completed by "a"s, but each "a" also begins the others.
    stops = ["a" * 1000, *(f"ab{number:02}" + "a" * 996 for number in range(31))]
    waiting = StopStrings(stops)
    began = time.process_time()
    shown = "".join(waiting.push("a", shown=True) for _ in range(998))
    assert shown == ""
    for _ in range(20):  # each "c" releases all of the text that was held back
        assert waiting.push("c" + "a" * 998, shown=True)
    # Comparing each stop string with every end of the text took 4.6 s.
    assert time.process_time() - began < 2


def test_special_tokens_that_mark_calls_are_text() -> None:
    tokenizer = tiny_tokenizer()
    vocabulary = Vocabulary(tokenizer.backend_tokenizer)
    bos, pad = tokenizer.bos_token_id, tokenizer.pad_token_id
    assert {bos, pad} <= vocabulary.special
    detokenizer = Detokenizer(vocabulary, (), shown_special=frozenset({bos}))
    assert [detokenizer.push(token) for token in (bos, pad)] == ["<bos>", ""]
