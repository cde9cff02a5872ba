"""Defines what an engine gives the API: outputs of steps, descriptions of prompts, gauges."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """A token and the steered model's log-probability of it, before bias, penalties and filters."""

    token: int
    text: str  # the token's name in the vocabulary if its bytes alone are not valid UTF-8
    bytes: bytes
    logprob: float


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """The log-probabilities of a token of a text and of the likeliest tokens at its position."""

    chosen: ScoredToken
    top: tuple[ScoredToken, ...]  # best first; as many as were asked for
    rank: int  # the chosen token's place among all tokens, 1 for the likeliest
    # For a completion's token: the index of the text's character in which it begins. A token that
    # completes no character begins in the one that its bytes belong to, a special token where the
    # next token does. It is at least the text's length if nothing of the token is in the text.
    offset: int = 0


@dataclass(frozen=True, slots=True)
class PromptDescription:
    """A prompt as token ids and as text, to be shown with its completion."""

    tokens: tuple[int, ...]
    # The text as given. For a prompt given as token ids: their text, special tokens included,
    # without an incomplete character at the end (a completion that completes it has it instead).
    text: str
    offsets: tuple[int, ...]  # for each token, the index of the text's character where it begins
    first_token: str  # the text of the first token alone


@dataclass(frozen=True, slots=True)
class TokenizerDescription:
    """A tokenizer's special tokens, those that it has, and its chat template, if it has one."""

    kind: str  # the name of its class
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """One step's addition to one request's answer. The last output carries `finish_reason`.

    `text` may lag behind `token_ids` while a character or a possible stop string is incomplete.
    """

    token_ids: tuple[int, ...]
    text: str
    logprobs: tuple[TokenLogprobs, ...] = ()
    # On the first output, if asked for: one entry for each prompt token, from
    # `prompt_logprobs_from` to the last.
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    queue_seconds: float | None = None  # on the first output: from submission to first scheduling
    # On the first output: the number of prompt tokens that the prefix cache had.
    cached_tokens: int = 0
    # On some outputs only, one number for each effective edit: norm of the edit / norm of what it
    # edited, the mean over the edit's sites and over the tokens of one or several measured steps
    # up to this one. None for an edit that acted on none of these tokens.
    doses: tuple[float | None, ...] = ()


@dataclass(frozen=True, slots=True)
class EngineStats:
    """The engine's gauges and counters at one moment."""

    running: int
    waiting: int
    kv_cache_usage: float  # 0 to 1
    slots_used: int
    preemptions: int = 0  # since the start: how often a sequence gave up its K/V
    prefix_cache_queries: int = 0  # since the start: prompt tokens looked up
    prefix_cache_hits: int = 0  # since the start: prompt tokens found
    compiling: int = 0  # graphs being compiled or waiting for it; their layers run uncompiled
    # Since the start: the time of the measured steered steps, and of the edits in them. Both stay
    # 0 where the engine cannot measure them.
    measured_step_seconds: float = 0.0
    measured_edit_seconds: float = 0.0
