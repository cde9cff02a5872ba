"""Defines the engine protocol: all that the API knows about an engine.

An engine never sees an intervention's name: a request carries digests and resolved settings.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from interventions.model import ModelDescription
from server.engine.chat import ChatPrompt, Conversation
from server.engine.grammar import CompiledGrammar
from server.engine.output import EngineStats, PromptDescription, StepOutput, TokenizerDescription
from server.engine.request import Request


class Generation(Protocol):
    """The outputs of one admitted request, in order."""

    def __aiter__(self) -> AsyncIterator[StepOutput]:
        """Yield outputs until one carries a finish reason; raise EngineError on failure."""

    async def follow(self, request: Request) -> "Generation":
        """Admit one more request into the queue place that is reserved for it.

        Call this at most once, for a request with `has_follower` that is not cancelled.

        Raises:
            EngineError: for the reasons that `Engine.submit` names, but never QueueFullError.
        """

    def cancel(self) -> None:
        """Stop generating, and free what the request holds, its follower's queue place included.

        Harmless when the request has finished.
        """


class PromptReader(Protocol):
    """Turns prompts and conversations into token ids, and token ids into text. For any thread."""

    def tokenize(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return a text's token ids, with or without the special tokens that the tokenizer adds.

        Raises:
            InvalidRequestError: the text has more characters than `max_model_len` tokens can
                hold; this is checked before it is tokenized.
        """

    def detokenize(self, tokens: Sequence[int]) -> str:
        """Return the tokens' text, special tokens included."""

    def describe_prompt(self, prompt: str | Sequence[int]) -> PromptDescription:
        """Return a prompt's tokens and text, and where in the text each token begins.

        Raises:
            InvalidRequestError: the prompt is a text that `tokenize` refuses, has no tokens, or
                has more token ids than `max_model_len`.
        """

    def read_chat(self, conversation: Conversation) -> ChatPrompt:
        """Return the token ids of a conversation, as the model's template renders it.

        Raises:
            InvalidRequestError: the model has no template, its template reads no such variable or
                knows no tools, it is not known how the model calls tools, or the template refuses
                the messages.
        """

    def names(self, tokens: Sequence[int]) -> list[str]:
        """Return the tokens' names in the vocabulary; that of an unknown id is empty."""

    @property
    def tokenizer(self) -> TokenizerDescription:
        """The tokenizer's special tokens and chat template."""


class Engine(Protocol):
    """Generates from a base model, with each request's own edits."""

    @property
    def model(self) -> ModelDescription:
        """The description of the loaded model."""

    @property
    def prompts(self) -> PromptReader:
        """The model's reader of prompts."""

    @property
    def max_model_len(self) -> int:
        """The largest number of tokens that a prompt and its completion may have together."""

    @property
    def ready(self) -> bool:
        """True while the model is loaded and the engine is alive."""

    @property
    def died(self) -> bool:
        """True once the engine has ended without being told to, also after `close`."""

    def compile_grammar(
        self, lark: str, field: str, *, of_schemas: bool = False
    ) -> CompiledGrammar:
        """Compile a grammar for answers; it may take a second or two.

        Args:
            lark: the grammar, in llguidance's dialect of Lark.
            field: the request's field that asks for it; errors name it.
            of_schemas: whether all that clients have written of it is JSON schemas, which cost
                less than other grammars of the same size.

        Raises:
            InvalidRequestError: this engine serves no grammars, or the grammar cannot be compiled
                within its limits.
        """

    async def submit(self, requests: Sequence[Request]) -> Sequence[Generation]:
        """Admit requests, all or none: load and pin their interventions, then queue them.

        Raises:
            InvalidRequestError: a prompt is empty or has unknown token ids; a prompt and its
                completion are too long for the model or for the memory; or the requests name
                more interventions than the engine can hold at once.
            QueueFullError: the waiting queue has no room for them.
            BankFullError: no slot can be freed for one of their interventions.
            UnservableInterventionError: an edit does not reach this engine's logits.
            NoBackgroundRoomError: there is no room for background work now.
            EngineDeadError: the engine thread has ended.
        """

    def stats(self) -> EngineStats:
        """Return the gauges and counters for the metrics page."""

    async def start(self) -> None:
        """Start the engine, and return when it is ready. Its self-test has passed by then."""

    async def close(self) -> bool:
        """Stop the engine; running requests fail with ShuttingDownError at once. Idempotent.

        Returns:
            True if the engine has ended. False if it is stuck in a step, which only the end of
            the process will end.
        """
