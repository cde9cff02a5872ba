"""Tests routes, which say which slots and settings edit each token and logits row of a step."""

import torch

from steering.route import Route, Span, build_route
from steering.settings import AffineSettings, RewardSettings, SlottedEdit

CPU = torch.device("cpu")


def route_of(*spans: Span) -> Route:
    return build_route(spans, CPU)


def span(
    *edits: SlottedEdit, start: int = 0, count: int = 4, prompt: int = 4, rows: range = range(0)
) -> Span:
    return Span(start=start, count=count, prompt_length=prompt, rows=rows, edits=edits)


def test_a_step_without_edits_has_an_empty_route() -> None:
    assert route_of(span(), span()) == Route(None, (), torch.device("cpu"))


def test_positions_are_relative_to_the_requests_own_prompt() -> None:
    """A recomputed request's span may contain both prompt and generated tokens."""
    slots = {}
    for positions in ("all", "prompt", "generated"):
        edit = SlottedEdit(3, AffineSettings(1.0, positions))
        route = route_of(span(count=2), span(edit, start=2, count=5, prompt=4))
        assert route.affine is not None
        [slots[positions]] = route.affine.slots.tolist()
    assert slots == {
        "all": [0, 0, 3, 3, 3, 3, 3],
        "prompt": [0, 0, 3, 3, 0, 0, 0],
        "generated": [0, 0, 0, 0, 3, 3, 3],
    }


def test_a_layer_in_which_no_token_is_edited_is_left_out() -> None:
    edit = SlottedEdit(1, AffineSettings(1.0, "generated"))
    assert route_of(span(edit, count=4, prompt=4)).affine is None


def test_edits_apply_in_list_order_each_kind_by_itself() -> None:
    stack = (
        SlottedEdit(2, AffineSettings(0.2)),
        SlottedEdit(7, RewardSettings(0.5, 1)),
        SlottedEdit(1, AffineSettings(0.1)),
        SlottedEdit(6, RewardSettings(0.4, 2)),
    )
    route = route_of(span(*stack, count=1, rows=range(1)), span(count=1, rows=range(1, 2)))
    assert route.affine is not None
    assert route.affine.indices == (0, 1)
    assert route.affine.slots.tolist() == [[2, 0], [1, 0]]
    torch.testing.assert_close(route.affine.strength, torch.tensor([[0.2, 0], [0.1, 0]]))
    assert route.affine.used_slots == frozenset({1, 2})
    assert [layer.heads for layer in route.reward] == [((7, 1, 1),), ((6, 1, 2),)]
    assert [layer.step_sizes.shape[1] for layer in route.reward] == [1, 2]


def test_rows_of_one_head_come_after_one_another() -> None:
    def user(slot: int, eta: float, row: int) -> Span:
        edit = SlottedEdit(slot, RewardSettings(eta, slot))
        return span(edit, count=1, rows=range(row, row + 1))

    plain = span(count=1, rows=range(1, 2))
    (layer,) = route_of(user(5, 0.25, 0), plain, user(3, 0.125, 2), user(5, 0.5, 3)).reward
    assert layer.heads == ((5, 2, 5), (3, 1, 3))
    assert layer.rows.tolist() == [0, 3, 2]
    assert layer.direction_scale.tolist() == [[1.0]] * 3
    assert layer.step_sizes.tolist() == [[0.25] * 5, [0.5] * 5, [0.125] * 3 + [0.0] * 2]


def test_a_span_without_logits_rows_needs_no_reward() -> None:
    assert route_of(span(SlottedEdit(5, RewardSettings(0.5, 2)))).reward == ()
