"""The state of a request in the engine."""

from dataclasses import dataclass

from server.engine.request import Request
from server.engine.torch.scheduling.block_keys import KeyChain
from steering.settings import SlottedEdit


@dataclass(eq=False, slots=True)
class Sequence:
    """A request's tokens, and how far the engine has computed them."""

    request: Request
    tokens: list[int]  # the prompt, then what was generated
    chain: KeyChain  # the keys of its blocks
    edits: tuple[SlottedEdit, ...] = ()  # set at the admission, when the slots are known
    arrival: int = -1  # its place in the order of arrival
    computed_tokens: int = 0  # how many of `tokens` have their K/V in memory
    # How many first tokens have K/V from which finite logits were computed since; the prefix cache
    # keeps no others.
    finite_tokens: int = 0
    # How many first prompt tokens need no score: the log-probability of the token after each is
    # known, or was not asked for.
    scored_prompt_tokens: int = 0
    preemptions: int = 0  # how often it gave up its K/V

    @classmethod
    def of(cls, request: Request) -> "Sequence":
        """Make the sequence of a request of which nothing is computed yet."""
        chain = KeyChain(len(request.prompt), request.effective_edits)
        unasked = request.sampling.prompt_logprobs_from - 1
        return cls(request, list(request.prompt), chain, scored_prompt_tokens=unasked)

    @property
    def digests(self) -> tuple[str, ...]:
        """The digests of the interventions that it pins, from its admission to its end."""
        return tuple(edit.digest for edit in self.request.effective_edits)

    @property
    def prompt_length(self) -> int:
        """The number of tokens of the prompt."""
        return len(self.request.prompt)

    @property
    def max_length(self) -> int:
        """The number of tokens of the prompt and the longest completion asked for."""
        return self.prompt_length + self.request.sampling.max_tokens

    @property
    def reusable_tokens(self) -> int:
        """The number of first tokens whose logits nobody wants, so that cached K/V will do."""
        asked = self.request.sampling.prompt_logprobs is not None
        if asked and self.scored_prompt_tokens < self.prompt_length - 1:
            return self.scored_prompt_tokens
        return len(self.tokens) - 1

    @property
    def pending_tokens(self) -> int:
        """The number of tokens without K/V: 1 while decoding, more while prefilling."""
        return len(self.tokens) - self.computed_tokens
