"""Shares a step's tokens among the prompts that are being computed."""

from collections.abc import Sequence


def share_tokens(pending: Sequence[int], budget: int) -> list[int]:
    """Return how many tokens of each prompt a step computes.

    The oldest prompt takes up to half of the budget, and the rest goes to the shortest prompts
    first. So short prompts pass long ones. No prompt starves, because the oldest always goes on,
    and every prompt becomes the oldest.

    Args:
        pending: tokens that each prompt still needs, in order of arrival.
        budget: tokens that the step may compute.
    """
    counts = [0] * len(pending)
    shortest_first = sorted(range(len(pending)), key=pending.__getitem__)
    turns = [(place, budget) for place in shortest_first]
    if pending:
        turns.insert(0, (0, max(budget // 2, 1)))
    for place, most in turns:
        count = min(pending[place] - counts[place], most, budget)
        counts[place] += count
        budget -= count
    return counts
