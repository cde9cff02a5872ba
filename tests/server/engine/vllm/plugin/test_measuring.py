"""The doses and the times of edits, in a model that is called as vLLM calls its own."""

import pytest
import torch
from torch import Tensor

from server.engine.vllm.plugin.known_requests import KnownRequests, StepPart
from server.engine.vllm.plugin.measuring import _KEPT
from server.engine.vllm.plugin.steered_model import SteeredModel
from server.engine.vllm.plugin.wire import Layout, LoadedEdit, Measured, Steering
from steering.affine import AffineParameters
from steering.dose import DoseTotal
from steering.reward import RewardHead
from steering.settings import AffineSettings, RewardSettings
from tests import oracles
from tests.called_like_vllm import Model
from tests.tiny import WIDTH, random_head, random_maps

TOKENS = 15
SITES = ("norm", "pair", "away")
LOADED: dict[int, AffineParameters | RewardHead] = {
    1: random_maps(1, sites=("norm", "pair"), support=True),
    2: random_maps(2, sites=("pair",), gate=True),
    3: random_head(3),
    4: random_maps(4, sites=("norm", "pair")),
}
ON_ALL = LoadedEdit(1, "1", AffineSettings(0.7))
GATED = LoadedEdit(2, "2", AffineSettings(0.5))
REWARD = LoadedEdit(3, "3", RewardSettings(0.5, 2))
AGAIN = LoadedEdit(1, "1", AffineSettings(0.9))
SIMPLE = LoadedEdit(4, "4", AffineSettings(0.6))
ON_PROMPT = LoadedEdit(1, "1", AffineSettings(0.7, "prompt"))
STACKS = {
    "base": (),
    "maps": (ON_ALL,),
    "prompt": (ON_PROMPT, REWARD),
    "stack": (GATED, REWARD, AGAIN),
    "reward": (REWARD,),
    "simple": (SIMPLE,),
}
# Requests with as many tokens as here in a step; of "prompt" the last one is generated.
PARTS = [
    StepPart("stack", 0, 2, 100),
    StepPart("base", 5, 1, 100),
    StepPart("maps", 3, 3, 4),
    StepPart("prompt", 98, 3, 100),
    StepPart("reward", 9, 1, 2),
    StepPart("simple", 2, 2, 5),
]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def known(model: Model, request: pytest.FixtureRequest) -> KnownRequests:
    """Return the requests of a model whose simple tokens the operator edits, or the model does."""
    layout = Layout(len(LOADED), SITES)
    steered = SteeredModel(model, layout, WIDTH, TOKENS, is_compiled=request.param)
    for slot, parameters in LOADED.items():
        steered.load(slot, str(slot), parameters)
    known = KnownRequests(steered)
    for name, edits in STACKS.items():
        known.admit(f"{name}-in-vllm", Steering(edits, name=name).to_extra_args())
    return known


def step(model: Model, known: KnownRequests, parts: list[StepPart], seed: int = 0) -> Tensor:
    """Compute a step as vLLM does, and return its logits; one token more is padding."""
    torch.manual_seed(seed)
    hidden = torch.randn(sum(part.count for part in parts) + 1, WIDTH)
    known.begin_step(
        [
            StepPart(f"{part.request_id}-in-vllm", part.start, part.count, part.prompt_length)
            for part in parts
        ]
    )
    with torch.inference_mode():
        found = model(hidden)
        known.model.measuring.lap()
        last = torch.tensor([part.count for part in parts]).cumsum(0) - 1
        logits = model.compute_logits(found[last])
        known.model.measuring.lap()
    return logits


def expected(parts: list[StepPart]) -> dict[str, list[tuple[float, int]]]:
    """For each edit of each request the sum and the number of its doses, by the oracle."""
    torch.manual_seed(0)
    hidden = torch.randn(sum(part.count for part in parts) + 1, WIDTH)
    norm = Model().norm
    found: dict[str, list[tuple[float, int]]] = {}
    row = 0
    for part in parts:
        edits = STACKS[part.request_id]
        doses: list[list[float]] = [[] for _ in edits]
        for offset in range(part.count):
            is_prompt = part.start + offset < part.prompt_length
            z = norm(hidden[row + offset]).detach()
            for site in ("norm", "pair"):
                z = z if site == "norm" else z + z
                for edit, own in zip(edits, doses, strict=True):
                    settings, maps = edit.settings, LOADED[edit.slot]
                    if isinstance(settings, RewardSettings) or isinstance(maps, RewardHead):
                        continue
                    if site in maps and (settings.positions == "all" or is_prompt):
                        [after] = oracles.affine_rows(z[None], maps[site], settings.strength)
                        own.append(oracles.dose(z, after))
                        z = after
        for edit, own in zip(edits, doses, strict=True):
            if isinstance(edit.settings, RewardSettings):
                head = LOADED[edit.slot]
                assert isinstance(head, RewardHead)
                own.append(oracles.dose(z, oracles.reward(z, head, edit.settings)))
        row += part.count
        if edits:
            found[part.request_id] = [(sum(own), len(own)) for own in doses]
    return found


def assert_equal(found: Measured, right: dict[str, list[tuple[float, int]]], steps: int) -> None:
    assert found.doses.keys() == right.keys()
    for name, totals in found.doses.items():
        for total, (summed, number) in zip(totals, right[name], strict=True):
            assert total.number == steps * number
            assert total.sum == pytest.approx(steps * summed, rel=1e-4)


def test_doses_of_a_mixed_step_equal_the_slow_reference(model: Model, known: KnownRequests) -> None:
    known.model.measuring.restart(1)
    step(model, known, PARTS)
    found = known.model.measuring.read()
    assert_equal(found, expected(PARTS), 1)
    assert 0 < found.edit_seconds < found.step_seconds
    assert known.model.measuring.read() == Measured(), "they are told once"


def test_doses_of_several_steps_are_added_up(model: Model, known: KnownRequests) -> None:
    known.model.measuring.restart(1)
    for parts in (PARTS, [PARTS[1]], PARTS, PARTS[4:5]):
        step(model, known, parts)
    found = known.model.measuring.read()
    right = expected(PARTS)
    right["reward"] = [
        (2 * summed + alone, 2 * number + number_alone)
        for (summed, number), (alone, number_alone) in zip(
            right["reward"], expected(PARTS[4:5])["reward"], strict=True
        )
    ]
    right |= {
        name: [(2 * summed, 2 * number) for summed, number in totals]
        for name, totals in right.items()
        if name != "reward"
    }
    assert_equal(found, right, 1)


def test_measuring_changes_no_bit(model: Model, known: KnownRequests) -> None:
    plain = step(model, known, PARTS)
    known.model.measuring.restart(1)
    assert torch.equal(step(model, known, PARTS), plain)
    assert known.model.measuring.read().doses
    known.model.measuring.restart(0)
    assert torch.equal(step(model, known, PARTS), plain)
    assert known.model.measuring.read() == Measured()


def test_edits_in_the_compiled_model_are_measured_and_not_timed(model: Model) -> None:
    steered = SteeredModel(model, Layout(len(LOADED), SITES), WIDTH, TOKENS, is_compiled=True)
    steered.load(4, "4", LOADED[4])
    known = KnownRequests(steered)
    known.admit("simple-in-vllm", Steering((SIMPLE,), name="simple").to_extra_args())
    steered.measuring.restart(1)
    parts = [StepPart("simple", 2, 2, 5)]
    step(model, known, parts)
    found = steered.measuring.read()
    assert_equal(found, expected(parts), 1)
    assert found.edit_seconds == 0
    assert found.step_seconds > 0


def test_one_of_so_many_steered_steps_is_measured(model: Model, known: KnownRequests) -> None:
    known.model.measuring.restart(3)
    measured = []
    for index in range(14):
        step(model, known, PARTS[1:2] if index % 2 else PARTS[2:3])
        measured.append(bool(known.model.measuring.read().doses))
    assert [index for index, is_measured in enumerate(measured) if is_measured] == [0, 6, 12]


def test_a_step_after_a_measured_one_has_its_own_doses(model: Model, known: KnownRequests) -> None:
    """Without affine edits, nothing is left of those of the step before."""
    known.model.measuring.restart(1)
    step(model, known, PARTS)
    known.model.measuring.read()
    step(model, known, PARTS[4:5])
    found = known.model.measuring.read()
    assert_equal(found, expected(PARTS[4:5]), 1)


def test_a_prompt_s_scored_rows_are_not_of_the_step(model: Model, known: KnownRequests) -> None:
    known.model.measuring.restart(1)
    step(model, known, PARTS[4:5])
    with torch.inference_mode(), known.model.scoring(known.edits("reward-in-vllm")):
        model.compute_logits(torch.randn(9, WIDTH))
    assert_equal(known.model.measuring.read(), expected(PARTS[4:5]), 1)


def test_what_nobody_reads_is_dropped(model: Model, known: KnownRequests) -> None:
    known.model.measuring.restart(1)
    for _ in range(_KEPT + 5):
        step(model, known, PARTS[2:3])
    [total] = known.model.measuring.read().doses["maps"]
    assert total.number == _KEPT * expected(PARTS[2:3])["maps"][0][1]


def test_ranks_with_other_sites_add_up() -> None:
    """The stages of a pipeline measure the same steps; only the last has rewards."""
    first = Measured(1.0, 0.25, {"a": (DoseTotal(1.0, 2), DoseTotal(0, 0))})
    last = Measured(2.0, 0.5, {"a": (DoseTotal(0.5, 1), DoseTotal(0.25, 1)), "b": ()})
    total = Measured()
    for each in (first, last):
        total.add(Measured.from_message(each.to_message()))
    doses = {"a": (DoseTotal(1.5, 3), DoseTotal(0.25, 1)), "b": ()}
    assert total == Measured(3.0, 0.75, doses)
