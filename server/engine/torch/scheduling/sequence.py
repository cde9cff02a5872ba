"""An admitted request, and how far it is."""

from dataclasses import dataclass

from server.engine.base import Request
from server.engine.torch.scheduling.block_keys import KeyChain
from steering.settings import SlottedEdit


@dataclass(eq=False, slots=True)
class Sequence:
    """A request's tokens and their state in the engine."""

    request: Request
    tokens: list[int]  # the prompt, then what was generated
    chain: KeyChain  # the keys of its blocks
    edits: tuple[SlottedEdit, ...] = ()  # from the admission on, which knows the slots
    arrival: int = -1  # its place in the order of arrival
    computed: int = 0  # how many of `tokens` have their K/V in the cache
    checked: int = 0  # those of them that logits were seen to follow that are numbers
    # Prompt tokens after which the next one's log-probability is known, or not asked for.
    scored: int = 0
    preemptions: int = 0  # how often it gave up its K/V

    @classmethod
    def of(cls, request: Request) -> "Sequence":
        """A request at its beginning."""
        chain = KeyChain(len(request.prompt), request.effective_edits)
        unasked = request.sampling.prompt_logprobs_from - 1
        return cls(request, list(request.prompt), chain, scored=unasked)

    @property
    def id(self) -> str:
        """The request's id."""
        return self.request.request_id

    @property
    def digests(self) -> tuple[str, ...]:
        """The interventions that it pins, from its admission to its end."""
        return tuple(edit.digest for edit in self.request.effective_edits)

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def max_length(self) -> int:
        """Tokens of the prompt and the longest completion asked for."""
        return self.prompt_length + self.request.sampling.max_tokens

    @property
    def skippable(self) -> int:
        """Its first tokens after which no logits are wanted: K/V is all that is needed of them."""
        asked = self.request.sampling.prompt_logprobs is not None
        if asked and self.scored < self.prompt_length - 1:
            return self.scored
        return len(self.tokens) - 1

    @property
    def pending(self) -> int:
        """Tokens whose K/V is still to be computed: 1 while decoding, more while prefilling."""
        return len(self.tokens) - self.computed
