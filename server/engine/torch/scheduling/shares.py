"""How a step's tokens are shared among the prompts that are being computed."""

from collections.abc import Sequence


def share(left: Sequence[int], budget: int) -> list[int]:
    """How many tokens of each prompt a step computes.

    The oldest takes up to half of the budget, and what remains goes to the shortest first. So a
    short prompt gets past long ones, and as the oldest always goes on, and every prompt becomes
    the oldest, nobody starves.

    Args:
        left: tokens that each prompt still needs, in order of arrival.
        budget: tokens of the step.
    """
    counts = [0] * len(left)
    shortest_first = sorted(range(len(left)), key=left.__getitem__)
    turns = [(place, budget) for place in shortest_first]
    if left:
        turns.insert(0, (0, max(budget // 2, 1)))
    for place, most in turns:
        count = min(left[place] - counts[place], most, budget)
        counts[place] += count
        budget -= count
    return counts
