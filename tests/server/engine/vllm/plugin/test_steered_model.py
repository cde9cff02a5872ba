"""The edits inside a model that is called as vLLM calls its own, without vLLM."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from server.engine.vllm.plugin.known_requests import KnownRequests, StepPart
from server.engine.vllm.plugin.steered_model import SteeredModel, SteeringError
from server.engine.vllm.plugin.wire import Layout, LoadedEdit, Steering, WireError
from steering.affine import AffineMap
from steering.settings import AffineSettings, RewardSettings
from tests import oracles
from tests.called_like_vllm import Model
from tests.tiny import WIDTH, random_head, random_maps

TOKENS = 14
SITES = ("norm", "pair", "away")
MAPS = random_maps(1, sites=("norm", "pair"), support=True)
GATED = random_maps(2, sites=("pair",), gate=True)
HEAD = random_head(3)
SIMPLE = random_maps(4, sites=("norm", "pair"))
CPU = torch.device("cpu")


def expected(hidden: Tensor, edits: list[tuple[int, AffineSettings]], rows: slice) -> Tensor:
    """What the model gives with these edits of some rows, by the oracle."""
    model = Model()
    by_slot = {1: MAPS, 2: GATED, 4: SIMPLE}
    z: Tensor = model.norm(hidden)
    for site in ("norm", "pair"):
        z = z if site == "norm" else z + z
        for slot, settings in edits:
            if site in by_slot[slot]:
                edited = oracles.affine_rows(z, by_slot[slot][site], settings.strength)
                z = torch.cat([z[: rows.start], edited[rows], z[rows.stop :]])
    return z


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture(params=[False, True], ids=["eager", "compiled"])
def known(model: Model, request: pytest.FixtureRequest) -> KnownRequests:
    """Return the requests of a model whose simple tokens the operator edits, or the model does."""
    steered = SteeredModel(model, Layout(4, SITES), WIDTH, TOKENS, is_compiled=request.param)
    steered.load(1, "maps", MAPS)
    steered.load(2, "gated", GATED)
    steered.load(3, "head", HEAD)
    steered.load(4, "simple", SIMPLE)
    known = KnownRequests(steered)
    for name, edits in {
        "base": (),
        "maps": (LoadedEdit(1, "maps", AffineSettings(0.7)),),
        "prompt": (LoadedEdit(1, "maps", AffineSettings(0.7, "prompt")),),
        "simple": (LoadedEdit(4, "simple", AffineSettings(0.6)),),
        "both": (
            LoadedEdit(2, "gated", AffineSettings(0.5)),
            LoadedEdit(3, "head", RewardSettings(0.5, 2)),
            LoadedEdit(1, "maps", AffineSettings(0.9)),
        ),
    }.items():
        known.admit(name, Steering(edits).to_extra_args())
    return known


def part(name: str, count: int, start: int = 0, prompt_length: int = 100) -> StepPart:
    return StepPart(name, start, count, prompt_length)


@torch.no_grad()
def test_each_request_of_a_step_has_its_own_edits_and_padding_none(
    model: Model, known: KnownRequests
) -> None:
    hidden = torch.randn(TOKENS, WIDTH)
    known.begin_step(
        [
            part("base", 2),
            part("maps", 3),
            part("prompt", 2, 9, 10),
            part("both", 3, 4),
            part("simple", 2),
        ]
    )
    found = model(hidden)
    maps = [(1, AffineSettings(0.7))]
    both = [(2, AffineSettings(0.5)), (1, AffineSettings(0.9))]
    plain = Model()(hidden)
    assert torch.equal(found[:2], plain[:2])
    torch.testing.assert_close(found[2:5], expected(hidden, maps, slice(2, 5))[2:5])
    torch.testing.assert_close(found[5], expected(hidden, maps, slice(5, 6))[5])  # its last one
    assert torch.equal(found[6], plain[6])
    torch.testing.assert_close(found[7:10], expected(hidden, both, slice(7, 10))[7:10])
    simple = [(4, AffineSettings(0.6))]
    torch.testing.assert_close(found[10:12], expected(hidden, simple, slice(10, 12))[10:12])
    assert torch.equal(found[12:], plain[12:])


@torch.no_grad()
def test_one_compiled_model_edits_every_step(model: Model, known: KnownRequests) -> None:
    """Whatever its tokens are; those without an edit get the bits that a step without edits has."""
    compiled = torch.compile(model, dynamic=True, backend="inductor")
    sizes = {"base": 2, "maps": 3, "both": 2, "simple": 3, "prompt": 2}
    edits = {
        "maps": [(1, AffineSettings(0.7))],
        "prompt": [(1, AffineSettings(0.7))],
        "both": [(2, AffineSettings(0.5)), (1, AffineSettings(0.9))],
        "simple": [(4, AffineSettings(0.6))],
    }
    hidden = torch.randn(TOKENS, WIDTH)
    for names in (["base"], ["simple"], ["simple", "base"], list(sizes), ["both", "simple"]):
        known.begin_step([part("base", TOKENS)])
        plain = compiled(hidden.clone())
        known.begin_step([part(name, sizes[name]) for name in names])
        found = compiled(hidden.clone())
        first = 0
        for name in names:
            rows = slice(first, first + sizes[name])
            first = rows.stop
            if name == "base":
                assert torch.equal(found[rows], plain[rows])
            else:
                right = expected(hidden, edits[name], rows)[rows]
                torch.testing.assert_close(found[rows], right, rtol=1e-4, atol=1e-4)
        assert torch.equal(found[first:], plain[first:])
        known.model.measuring.restart(1)
        known.begin_step([part(name, sizes[name]) for name in names])
        assert torch.equal(compiled(hidden.clone()), found), "measuring changes no bit"
        known.model.measuring.restart(0)


@torch.no_grad()
def test_a_step_leaves_nothing_for_the_next(model: Model, known: KnownRequests) -> None:
    hidden = torch.randn(4, WIDTH)
    known.begin_step([part("both", 2), part("simple", 2)])
    model(hidden)
    known.begin_step([part("base", 4)])
    assert torch.equal(model(hidden), Model()(hidden))


@torch.no_grad()
def test_a_reward_edits_the_rows_of_its_own_requests(model: Model, known: KnownRequests) -> None:
    rows = torch.randn(3, WIDTH)
    known.begin_step([part("base", 1), part("both", 2), part("maps", 1)])
    logits = model.compute_logits(rows.clone())
    plain = model.lm_head(rows)
    edited = oracles.reward(rows[1], HEAD, RewardSettings(0.5, 2))
    torch.testing.assert_close(logits[1], model.lm_head(edited), rtol=1e-4, atol=1e-4)
    assert torch.equal(logits[[0, 2]], plain[[0, 2]])


@torch.no_grad()
def test_every_row_of_a_prompt_is_scored_by_its_own_request(
    model: Model, known: KnownRequests
) -> None:
    rows = torch.randn(5, WIDTH)
    with known.model.scoring(known.edits("both")):
        logits = model.compute_logits(rows)
    edited = torch.stack([oracles.reward(row, HEAD, RewardSettings(0.5, 2)) for row in rows])
    torch.testing.assert_close(logits, model.lm_head(edited), rtol=1e-4, atol=1e-4)
    with known.model.scoring(known.edits("maps")):
        assert torch.equal(model.compute_logits(rows), model.lm_head(rows))


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 4, 9])
def test_every_token_of_a_step_is_scored_by_its_own_request(
    model: Model, known: KnownRequests, chunk: int
) -> None:
    """As vLLM's V2 runner does: all tokens of the step, a chunk at a time."""
    rows = torch.randn(9, WIDTH)
    known.begin_step([part("base", 2), part("both", 4), part("maps", 3)])
    model.compute_logits(rows[:3])
    with known.scoring_tokens():
        logits = torch.cat([model.compute_logits(each) for each in torch.split(rows, chunk)])
    edited = [oracles.reward(row, HEAD, RewardSettings(0.5, 2)) for row in rows[2:6]]
    expected = model.lm_head(torch.stack(edited))
    torch.testing.assert_close(logits[2:6], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits[:2], model.lm_head(rows[:2]))
    torch.testing.assert_close(logits[6:], model.lm_head(rows[6:]))


@pytest.mark.parametrize("chunks", [(2,), (2, 4), (3, 1)])
def test_scoring_a_part_of_a_step_s_tokens_is_an_error(
    model: Model, known: KnownRequests, chunks: tuple[int, ...]
) -> None:
    """Which tokens the rows belong to would be unknown."""
    known.begin_step([part("base", 2), part("both", 3)])

    def score() -> None:
        with known.scoring_tokens():
            for rows in chunks:
                model.compute_logits(torch.zeros(rows, WIDTH))

    with pytest.raises(SteeringError, match=f"{sum(chunks)} tokens, where a step has 5"):
        score()


def test_scoring_no_prompt_of_a_step_is_none(model: Model, known: KnownRequests) -> None:
    known.begin_step([part("base", 2), part("both", 3)])
    with known.scoring_tokens():
        pass
    with pytest.raises(SteeringError, match="no known request"):
        model.compute_logits(torch.zeros(5, WIDTH))


@torch.no_grad()
def test_at_rest_nothing_is_edited(model: Model, known: KnownRequests) -> None:
    hidden = torch.randn(4, WIDTH)
    known.begin_step([part("both", 2), part("simple", 2)])
    with known.model.at_rest():
        found = model(hidden)
        assert torch.equal(found, Model()(hidden))
        assert torch.equal(model.compute_logits(found), model.lm_head(found))


@pytest.mark.parametrize("rows", [1, 3])
def test_logits_of_other_rows_than_the_step_s_are_an_error(
    model: Model, known: KnownRequests, rows: int
) -> None:
    known.begin_step([part("base", 1), part("both", 2)])
    with pytest.raises(SteeringError, match=f"of {rows} rows, where a step has 2"):
        model.compute_logits(torch.zeros(rows, WIDTH))


def test_logits_that_no_step_asked_for_are_an_error(model: Model, known: KnownRequests) -> None:
    def compute() -> Tensor:
        return model.compute_logits(torch.zeros(1, WIDTH))

    with pytest.raises(SteeringError, match="no known request"):
        compute()
    known.begin_step([part("base", 1)])
    compute()
    with pytest.raises(SteeringError, match="no known request"):
        compute()


@torch.no_grad()
def test_a_row_that_overflows_is_marked_whole(model: Model, known: KnownRequests) -> None:
    """vLLM counts a row's NaN, not its infinities."""
    rows = torch.randn(2, WIDTH)
    rows[1, 0] = torch.inf
    known.begin_step([part("base", 1), part("maps", 1)])
    logits = model.compute_logits(rows)
    assert logits[0].isfinite().all()
    assert logits[1].isnan().all()


def test_a_request_whose_slot_was_given_to_others_is_an_error(known: KnownRequests) -> None:
    known.model.load(1, "others", MAPS)
    stale = Steering((LoadedEdit(1, "maps", AffineSettings(0.5)),))
    with pytest.raises(SteeringError, match="slot 1 does not hold maps"):
        known.admit("late", stale.to_extra_args())


def test_a_slot_that_is_overwritten_below_a_request_is_an_error(known: KnownRequests) -> None:
    known.model.load(1, "others", MAPS)
    known.begin_step([part("base", 1)])
    with pytest.raises(SteeringError, match="slot 1 does not hold maps"):
        known.begin_step([part("base", 1), part("maps", 1)])


def test_a_request_of_another_client_is_an_error(known: KnownRequests) -> None:
    with pytest.raises(WireError, match="how it is steered"):
        known.admit("foreign", None)


def test_a_rank_loads_the_maps_at_its_own_sites(known: KnownRequests) -> None:
    assert known.model.sites == ("norm", "pair")
    known.model.load(1, "elsewhere", random_maps(4, sites=("away", "norm")))


@pytest.mark.parametrize(
    ("maps", "message"),
    [
        (random_maps(4, sites=("norm", "other")), "the site other was not prepared"),
        (random_maps(4, 2 * WIDTH, ("norm",)), "width 64, the site 32"),
    ],
)
def test_a_load_that_fails_leaves_its_slot_empty(
    known: KnownRequests, maps: dict[str, AffineMap], message: str
) -> None:
    with pytest.raises(SteeringError, match=message):
        known.model.load(1, "new", maps)
    for digest in ("new", "maps"):
        with pytest.raises(SteeringError, match="does not hold"):
            known.model.slotted([LoadedEdit(1, digest, AffineSettings(1.0))])


def drawn(known: KnownRequests, parts: list[StepPart]) -> dict[int, float]:
    known.begin_step(parts)
    return {
        row: float(torch.rand((), generator=generator)) for row, generator in known.generators(CPU)
    }


def test_a_seed_s_draws_depend_on_the_position_alone(known: KnownRequests) -> None:
    for name, seed in {"one": 1, "one again": 1, "two": 2}.items():
        known.admit(name, Steering(seed=seed).to_extra_args())
    decoding = drawn(known, [part("one", 1, 20), part("two", 1, 20)])
    assert len({*decoding.values()}) == 2
    chunk = drawn(known, [part("two", 4, 17), part("maps", 1), part("one again", 7, 14)])
    assert (chunk[0], chunk[2]) == (decoding[1], decoding[0])
    assert drawn(known, [part("one", 1, 21)])[0] not in decoding.values()


def test_requests_without_a_seed_have_no_draws_of_their_own(known: KnownRequests) -> None:
    known.admit("seeded", Steering(seed=0).to_extra_args())
    assert drawn(known, [part("base", 1), part("seeded", 1)]).keys() == {1}


def test_a_compiled_model_reads_what_a_step_has_written(model: Model, known: KnownRequests) -> None:
    """Traced at rest with as many tokens as a step may have, as vLLM does it."""
    seen: list[object] = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., object]:
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        hidden = torch.randn(TOKENS, WIDTH)
        torch._dynamo.mark_dynamic(hidden, 0)
        with known.model.at_rest():
            compiled(hidden)
        known.begin_step([part("both", 3), part("base", 2)])
        few = torch.randn(5, WIDTH)
        assert torch.equal(compiled(few), model(few))
        assert not torch.equal(compiled(few)[:3], Model()(few)[:3])
    assert seen.count(torch.ops.steerserve.routed_edit) == 2, "it was traced once"
