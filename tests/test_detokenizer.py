import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from server.engine.torch.detokenizer import Detokenizer
from tests.tiny import EOS, tiny_tokenizer

TOKENIZER = tiny_tokenizer().backend_tokenizer


def run(text: str | bytes, *stop: str) -> tuple[list[str], bool]:
    """The pieces that come out for each token, the end's included."""
    data = text.encode() if isinstance(text, str) else text
    detokenizer = Detokenizer(TOKENIZER, stop)
    pieces = []
    for byte in data:
        pieces.append(detokenizer.push(BYTES[byte]))
        if detokenizer.stopped:
            break
    pieces.append(detokenizer.finish())
    return pieces, detokenizer.stopped


def _byte_tokens() -> dict[int, int]:
    """A byte -> the token of the tiny tokenizer that stands for it."""
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
    pieces, _ = run(data)
    assert "".join(pieces) == TOKENIZER.decode([BYTES[byte] for byte in data])


def test_a_character_comes_when_it_is_whole() -> None:
    assert run("a€b")[0] == ["a", "", "", "€", "b", ""]


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=3), max_size=3))
def test_text_ends_before_the_first_stop_string_and_nothing_of_it_is_shown(
    text: str, stop: list[str]
) -> None:
    # What a stop string ends depends on when it is complete: the first prefix that has one.
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
    """As Llama's: words with a mark for the space, and bytes for what is no word."""
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
    detokenizer = Detokenizer(byte_fallback_tokenizer(), ())
    pieces = [*map(detokenizer.push, tokens), detokenizer.finish()]
    assert all(isinstance(piece, str) for piece in pieces)


def test_words_and_characters_of_several_bytes_with_byte_fallback() -> None:
    tokenizer = byte_fallback_tokenizer()
    tokens = [1, 2, 1, 4 + 0xE2, 4 + 0x82, 4 + 0xAC, 3, 2, 4 + 0x41]
    detokenizer = Detokenizer(tokenizer, ())
    pieces = [*map(detokenizer.push, tokens), detokenizer.finish()]
    assert "".join(pieces) == tokenizer.decode(tokens) == "ab a€ bA"


@pytest.mark.parametrize("token", [EOS, EOS + 1])
def test_special_tokens_give_no_text(token: int) -> None:
    assert Detokenizer(TOKENIZER, ()).push(token) == ""


@given(st.lists(st.sampled_from([1, 2, 3]), min_size=1), st.lists(st.sampled_from([1, 2, 3])))
def test_a_completion_goes_on_from_its_prompt(prompt: list[int], completion: list[int]) -> None:
    """Also where the decoder would strip the blank that a text begins with."""
    tokenizer = byte_fallback_tokenizer()
    detokenizer = Detokenizer(tokenizer, (), prompt)
    text = "".join([*map(detokenizer.push, completion), detokenizer.finish()])
    whole = tokenizer.decode([*prompt, *completion])
    # What a decoder strips at the beginning of the whole is nobody's.
    assert whole.endswith(text)
    assert whole.lstrip() == (tokenizer.decode(prompt) + text).lstrip()


def test_a_character_that_the_prompt_began_is_whole_in_the_completion() -> None:
    euro = [BYTES[byte] for byte in "€".encode()]
    detokenizer = Detokenizer(TOKENIZER, (), [BYTES[ord("a")], *euro[:2]])
    pieces = [detokenizer.push(token) for token in (euro[2], BYTES[ord("b")])]
    assert pieces == ["€", "b"]


def test_the_prompt_is_no_part_of_a_stop_string() -> None:
    detokenizer = Detokenizer(TOKENIZER, ("ab",), [BYTES[ord("a")]])
    assert detokenizer.push(BYTES[ord("b")]) == "b"
    assert not detokenizer.stopped


@pytest.mark.parametrize("token", [TOKENIZER.token_to_id("<eos>"), BYTES[0xFF], BYTES[0xE2]])
def test_what_gives_no_text_does_not_cost_more_and_more(
    token: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    detokenizer = Detokenizer(TOKENIZER, ())
    longest = 0
    decode = detokenizer._decode

    def measured(tokens: list[int]) -> str:
        nonlocal longest
        longest = max(longest, len(tokens))
        return decode(tokens)

    monkeypatch.setattr(detokenizer, "_decode", measured)
    for _ in range(200):
        detokenizer.push(token)
    assert longest < 32
    assert detokenizer.push(BYTES[ord("a")]).endswith("a")
