"""How a step's tokens are shared among the prompts that are being computed."""

from collections.abc import Sequence


def share(left: Sequence[int], lanes: Sequence[int], budget: int) -> list[int]:
    """How many tokens of each prompt a step computes.

    The oldest takes up to half of the budget, and what remains goes to the shortest first. So a
    short prompt gets past long ones, and as the oldest always goes on, and every prompt becomes
    the oldest, nobody starves.

    Args:
        left: tokens that each prompt still needs, in order of arrival.
        lanes: how many of the budget's tokens one token of each takes.
        budget: tokens of the step, all lanes together.
    """
    counts = [0] * len(left)
    shortest_first = sorted(range(len(left)), key=left.__getitem__)
    turns = [(place, budget) for place in shortest_first]
    if left:
        turns.insert(0, (0, max(budget // 2, lanes[0])))
    for place, most in turns:
        count = min(left[place] - counts[place], min(most, budget) // lanes[place])
        counts[place] += count
        budget -= count * lanes[place]
    return counts
