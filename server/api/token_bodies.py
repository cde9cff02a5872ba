"""The log-probabilities of tokens, in the form that chats and responses have in common."""

from pydantic import JsonValue

from server.api.logprobs import Listing, finite
from server.engine.output import ScoredToken, TokenLogprobs


def scored_token(token: TokenLogprobs, listing: Listing) -> dict[str, JsonValue]:
    """Return a token with its log-probability and those of the likeliest tokens."""
    top: JsonValue = [_token(other, listing) for other in token.top]
    return {**_token(token.chosen, listing), "top_logprobs": top}


def _token(token: ScoredToken, listing: Listing) -> dict[str, JsonValue]:
    return {
        "token": listing.name(token),
        "logprob": finite(token.logprob),
        "bytes": list(token.bytes),
    }
