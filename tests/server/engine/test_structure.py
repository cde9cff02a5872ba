"""Tests that answers obey their grammars, whatever else runs and steers."""

import asyncio
import json
import re
from dataclasses import replace

import jsonschema
import pytest
from llguidance import regex_to_lark

from server.engine.errors import InvalidRequestError
from server.engine.grammar import GrammarState, refused
from server.engine.output import StepOutput
from server.engine.request import SamplingSettings
from tests.both_engines import Subject, each_torch, each_vllm, finished, request
from tests.oracles import allowed_by_choices
from tests.prefix_traffic import stack_of
from tests.steered import GREEDY, PROMPTS, STACKS, logprobs_of, tokens_of
from tests.tiny import EOS, tiny_tokens

pytestmark = pytest.mark.asyncio(loop_scope="session")
CHOICES = ("yes, of course", "yes", "no", "nobody knows")
LARK = {
    "choices": "start: " + " | ".join(map(json.dumps, CHOICES)),
    "pattern": f"start: /{regex_to_lark('[a-f]{3}-[0-9]{2,4}!', 'd')}/",
}
SCHEMA = {
    "type": "object",
    "properties": {
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "name": {"type": "string", "maxLength": 8},
        "kinds": {"type": "array", "items": {"enum": ["a", "bc"]}, "maxItems": 3},
    },
    "required": ["age", "name", "kinds"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
LARK["object"] = f"start: %json {json.dumps(SCHEMA)}"
# The name of a grammar, and how tokens are drawn.
SAMPLINGS = (
    ("object", replace(GREEDY, max_tokens=120)),
    ("pattern", SamplingSettings(60, temperature=1.2, seed=1)),
    ("choices", SamplingSettings(60, temperature=1.5, top_p=0.7, seed=2)),
    ("choices", SamplingSettings(60, temperature=1.5, min_p=0.3, seed=3, min_tokens=20)),
    (None, SamplingSettings(30, temperature=1, seed=4, ignore_eos=True)),
)
WORK = [
    (PROMPTS[number % 3], STACKS[stack], name, sampling)
    for number, stack in enumerate(("base", "a", "r", "a on the prompt", "a and r"))
    for name, sampling in SAMPLINGS
]


def obeying(subject: Subject, name: str, sampling: SamplingSettings) -> SamplingSettings:
    return replace(sampling, grammar=subject.engine.compile_grammar(LARK[name], name))


def text_of(outputs: list[StepOutput]) -> str:
    return "".join(output.text for output in outputs)


@each_torch
@pytest.mark.parametrize("stack", ["base", "a", "r", "a and r", "four"])
async def test_a_steered_answer_is_the_best_that_its_grammar_allows(
    subject: Subject, stack: str
) -> None:
    """The oracle masks the edited model's logits, and takes the best token that is left."""
    sampling = obeying(subject, "choices", replace(GREEDY, max_tokens=20))
    prompt = PROMPTS[0]
    [outputs] = await subject.generate(request(prompt, STACKS[stack], sampling))
    tokens = tokens_of(outputs)
    for place, token in enumerate(tokens):
        before = [*prompt, *tokens[:place]]
        [row] = subject.oracle.logits(before, len(prompt), stack_of(STACKS[stack]), last=1)
        allowed = allowed_by_choices(tokens[:place], [*map(tiny_tokens, CHOICES)], EOS)
        assert token in allowed
        assert row[token] >= max(row[each] for each in allowed) - 1e-4
        expected = float(row[token] - row.logsumexp(dim=0))
        assert logprobs_of(outputs)[place] == pytest.approx(expected, abs=1e-4)
    assert text_of(outputs) in CHOICES
    assert outputs[-1].finish_reason == "stop"


@each_torch
async def test_any_mix_gives_what_each_gives_alone(subject: Subject) -> None:
    """Rows with and without grammars share steps; sequences are preempted where it is tight."""
    work = [
        request(prompt, edits, sampling if name is None else obeying(subject, name, sampling))
        for prompt, edits, name, sampling in WORK
    ]
    alone = [tokens_of(await subject.answer(each)) for each in work]
    together = await asyncio.gather(*(subject.answer(each) for each in work))
    assert [tokens_of(each) for each in together] == alone
    for (*_, name, _sampling), outputs in zip(WORK, together, strict=True):
        text = text_of(outputs)
        if name == "object":
            jsonschema.validate(json.loads(text), SCHEMA)
        elif name == "pattern":
            assert re.fullmatch("[a-f]{3}-[0-9]{2,4}!", text)
        elif name == "choices":
            assert text in CHOICES


@each_torch
async def test_bias_and_penalties_choose_among_what_the_grammar_allows(subject: Subject) -> None:
    [y], [n], [q] = map(tiny_tokens, "ynq")
    for wanted, other in ((y, n), (n, y)):
        sampling = replace(
            GREEDY,
            max_tokens=30,
            logit_bias=((wanted, 50.0), (other, -50.0), (q, 100.0)),
            frequency_penalty=2.0,
            repetition_penalty=1.5,
        )
        structured = obeying(subject, "choices", sampling)
        [outputs] = await subject.generate(request(PROMPTS[1], (), structured))
        assert text_of(outputs) in CHOICES
        assert tokens_of(outputs)[0] == wanted


@each_torch
async def test_an_answer_that_is_cut_off_says_length(subject: Subject) -> None:
    sampling = obeying(subject, "object", replace(GREEDY, max_tokens=9))
    [outputs] = await subject.generate(request(PROMPTS[0], STACKS["a"], sampling))
    assert (len(tokens_of(outputs)), outputs[-1].finish_reason) == (9, "length")
    assert text_of(outputs).startswith('{"age":')


@each_torch
async def test_a_stop_string_ends_a_structured_answer(subject: Subject) -> None:
    sampling = obeying(subject, "object", replace(GREEDY, max_tokens=60, stop=('"name"',)))
    [outputs] = await subject.generate(request(PROMPTS[0], (), sampling))
    assert outputs[-1].finish_reason == "stop"
    assert re.fullmatch(r'\{"age":[0-9]{1,3},', text_of(outputs))


@each_torch
@pytest.mark.parametrize("lark", ['start: ""', 'start: "a"', 'start: "" | "a"'])
async def test_an_answer_that_may_be_empty_ends(subject: Subject, lark: str) -> None:
    """End tokens are what is left, also where they are ignored or too early otherwise."""
    grammar = subject.engine.compile_grammar(lark, "grammar")
    sampling = replace(GREEDY, ignore_eos=True, min_tokens=8, grammar=grammar)
    [outputs] = await subject.generate(request(PROMPTS[0], (), sampling))
    assert text_of(outputs) in {"", "a"}
    assert (len(tokens_of(outputs)), outputs[-1].finish_reason) == (1, "stop")


@each_torch
async def test_a_grammar_that_fails_in_the_middle_harms_no_neighbour(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = obeying(subject, "pattern", SamplingSettings(60, temperature=1, seed=1))
    free = request(PROMPTS[0], STACKS["a"], GREEDY)
    [alone] = await subject.generate(free)
    mask, calls = GrammarState.mask, iter(range(100))

    def fails_later(state: GrammarState) -> bytes:
        if next(calls) == 3:
            raise refused("regex", "too much")
        return mask(state)

    monkeypatch.setattr(GrammarState, "mask", fails_later)
    failing, going_on = await subject.submit(request(PROMPTS[1], (), sampling), free)
    found, error = await asyncio.gather(
        finished(going_on), finished(failing), return_exceptions=True
    )
    assert isinstance(error, InvalidRequestError)
    assert error.param == "regex"
    assert isinstance(found, list)
    assert tokens_of(found) == tokens_of(alone)


@each_vllm
async def test_vllm_refuses_a_structure_by_its_field(subject: Subject) -> None:
    with pytest.raises(InvalidRequestError, match="vLLM") as refusal:
        subject.engine.compile_grammar('start: "a"', "response_format")
    assert refusal.value.param == "response_format"
