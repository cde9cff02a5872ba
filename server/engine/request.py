"""Defines what the API asks of an engine: a prompt, its sampling, and its resolved edits."""

from dataclasses import dataclass

from server.engine.grammar import CompiledGrammar
from steering.settings import AffineSettings, RewardSettings


@dataclass(frozen=True, slots=True)
class SamplingSettings:
    """Says how the next token is drawn, and when generation stops.

    The caller validates the values. They apply in this order: logit bias, penalties, grammar,
    temperature, min-p, top-k, top-p. An answer whose grammar allows nothing more ends.
    """

    max_tokens: int  # 0: the prompt is computed and nothing is generated
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 keeps all tokens
    min_p: float = 0.0  # smallest probability kept, as a fraction of the best token's
    repetition_penalty: float = 1.0  # divides positive logits of tokens in prompt or completion
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the completion
    frequency_penalty: float = 0.0  # subtracted once per occurrence of a token in the completion
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token id, number added to its logit)
    seed: int | None = None  # fixes the draws, whatever else is in the batch; None: not fixed
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()  # they end the answer as end tokens do
    ignore_eos: bool = False  # the model's own end tokens do not end the answer
    # Before so many tokens, no token that ends the answer is drawn, and no stop string is looked
    # for. It has no effect on an answer with a grammar, which says itself where it may end.
    min_tokens: int = 0
    include_stop: bool = False  # the text has the stop string, or the token, that ended it
    skip_special_tokens: bool = True  # the text has no special tokens, but for the next ones
    shown_special: frozenset[int] = frozenset()  # special tokens that the text has in any case
    logprobs: int | None = None  # alternatives beside the sampled token; None: no log-probabilities
    prompt_logprobs: int | None = None  # the same for the tokens of the prompt
    grammar: CompiledGrammar | None = None  # the answer obeys it, unless `max_tokens` cuts it off
    prompt_logprobs_from: int = 1  # index of the first prompt token scored; token 0 follows nothing


@dataclass(frozen=True, slots=True)
class Edit:
    """One intervention of a request, with its digest and settings resolved."""

    digest: str
    settings: AffineSettings | RewardSettings


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to be completed. `edits` apply in order."""

    request_id: str
    prompt: tuple[int, ...]
    sampling: SamplingSettings
    edits: tuple[Edit, ...] = ()
    # Background work runs only while there is room for it, and ends with NoBackgroundRoomError when
    # another request needs that room.
    background: bool = False
    # `Generation.follow` will admit a second request after this one; a place in the waiting queue
    # is reserved for it when this one is admitted.
    has_follower: bool = False

    @property
    def effective_edits(self) -> tuple[Edit, ...]:
        """The edits whose settings change something. If there are none, the base model answers."""
        return tuple(edit for edit in self.edits if not edit.settings.does_nothing)

    @property
    def queue_places(self) -> int:
        """Queue places that it takes: one (background work: none), and one more for a follower."""
        return (not self.background) + self.has_follower
