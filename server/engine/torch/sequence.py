"""An admitted request, and how far it is."""

from dataclasses import dataclass

from server.engine.base import Request
from server.engine.torch.block_keys import KeyChain
from steering.settings import SlottedEdit


def lanes_of(request: Request) -> int:
    """How often the model runs on a request's tokens, with K/V of its own each time.

    Once as steered, and once more as the base model where the divergence of the two is wanted.
    """
    return 2 if request.with_divergence and request.effective_edits else 1


@dataclass(eq=False, slots=True)
class Sequence:
    """A request's tokens and their state in the engine."""

    request: Request
    tokens: list[int]  # the prompt, then what was generated
    edits: tuple[SlottedEdit, ...] = ()  # from the admission on, which knows the slots
    lanes: int = 1  # see `lanes_of`
    arrival: int = -1  # its place in the order of arrival
    computed: int = 0  # how many of `tokens` have their K/V in the cache
    checked: int = 0  # those of them that logits were seen to follow that are numbers
    scored: int = 0  # prompt tokens after which the next one's log-probability is known
    preemptions: int = 0  # how often it gave up its K/V
    chains: tuple[KeyChain, ...] = ()  # the keys of each lane's blocks

    @classmethod
    def of(cls, request: Request) -> "Sequence":
        """A request at its beginning."""
        lanes, length = lanes_of(request), len(request.prompt)
        # The first lane is edited, a second is the base model's.
        edits = (request.effective_edits, ())[:lanes]
        chains = tuple(KeyChain(length, each) for each in edits)
        return cls(request, list(request.prompt), lanes=lanes, chains=chains)

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
    def held(self) -> int:
        """Tokens that need a place in the K/V cache, those of all lanes together."""
        return len(self.tokens) * self.lanes

    @property
    def pending(self) -> int:
        """Tokens whose K/V is still to be computed: 1 while decoding, more while prefilling."""
        return len(self.tokens) - self.computed
