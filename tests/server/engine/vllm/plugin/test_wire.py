import json

import pytest

from server.engine.vllm.plugin.wire import KEY, Layout, LoadedEdit, Steering, WireError
from steering.settings import AffineSettings, RewardSettings

STEERING = Steering(
    (
        LoadedEdit(3, "a" * 64, AffineSettings(0.8, "generated")),
        LoadedEdit(1, "b" * 64, RewardSettings(0.5, 5, 0.25)),
    ),
    seed=7,
)


def over_the_wire(message: object) -> object:
    """As msgpack does, which like JSON knows lists and no tuples."""
    return json.loads(json.dumps(message))


@pytest.mark.parametrize("steering", [STEERING, Steering(), Steering((), seed=0)])
def test_what_a_request_asks_for_arrives(steering: Steering) -> None:
    sent = over_the_wire(steering.to_extra_args())
    assert isinstance(sent, dict)
    assert Steering.from_extra_args(sent) == steering


@pytest.mark.parametrize("given", [None, {}, {KEY: {}}, {KEY: {"edits": []}}, {"other": 1}])
def test_a_request_that_does_not_say_how_it_is_steered_is_an_error(
    given: dict[str, object] | None,
) -> None:
    """It may come from another client of vLLM, or a part of it may have been lost."""
    with pytest.raises(WireError, match="does not say how it is steered"):
        Steering.from_extra_args(given)


def test_a_layout_arrives() -> None:
    layout = Layout(8, ("model.layers.0.mlp", "model.norm"))
    assert Layout.from_config(over_the_wire(layout.to_config())) == layout


def test_the_runner_of_a_layout_arrives() -> None:
    layout = Layout(8, (), "v2")
    assert Layout.from_config(over_the_wire(layout.to_config())) == layout


@pytest.mark.parametrize(
    "given",
    [None, {}, {KEY: {"slots": 3}}, {KEY: Layout(1, ()).to_config()[KEY] | {"runner": "v3"}}],
)
def test_a_missing_layout_is_an_error(given: object) -> None:
    with pytest.raises(WireError, match="start it by steerserve"):
        Layout.from_config(given)


def test_another_version_s_layout_is_an_error() -> None:
    config = Layout(1, ()).to_config()
    config[KEY]["version"] += 1
    with pytest.raises(WireError, match="version 3, not 2"):
        Layout.from_config(config)
