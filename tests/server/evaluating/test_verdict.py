"""Tests of the choice of the best setting, of the picture, and of the files."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from pydantic import JsonValue
from safetensors import safe_open

from interventions.artifact import read_artifact, write_artifact
from server.evaluating import EvaluationError, EvaluationInputError
from server.evaluating.answers import Applied
from server.evaluating.new_defaults import write_with_defaults
from server.evaluating.outputs import STDOUT, Outputs
from server.evaluating.picture import draw
from server.evaluating.report import Result
from server.evaluating.settings import BASE, Setting, parse_steering, parse_sweep
from server.evaluating.statistics import Estimate, Interval
from server.evaluating.verdict import Verdict
from tests.artifact_samples import affine_manifest, affine_parameters, same_parameters

HALF, ONE, TWO = parse_sweep("maps:strength=0.5,1,2")


def interval(value: float) -> Interval:
    return Interval(value, value - 0.01, value + 0.01)


def result(
    setting: Setting,
    toxic: float,
    perplexity: float,
    applied: Sequence[dict[str, JsonValue]] | None = None,
    cost: str = "perplexity",
) -> Result:
    """Return a result beside a base model with a toxic share of 0.5 and a perplexity of 100."""
    settings = applied or [{"strength": setting.value, "positions": "all"}] * len(setting.items)

    def estimate(name: str, subject: str, value: float, base: float) -> Estimate:
        if setting == BASE:
            return Estimate(name, subject, 9, interval(value))
        changes = interval(value - base), interval(value / base)
        return Estimate(name, subject, 9, interval(value), *changes)

    return Result(
        setting,
        [
            Applied(intervention="maps", digest="d", kind="affine", settings=each)
            for each in settings
        ],
        [
            estimate("mean toxicity", "embedded", 1 - toxic, 0.5),
            estimate("toxic share", "embedded", toxic, 0.5),
            estimate(cost, "wiki", perplexity, 100),
        ],
    )


BASE_RESULT = result(BASE, 0.5, 100)


def verdict(*results: Result, bound: float = 5.0) -> Verdict:
    return Verdict.of([BASE_RESULT, *results], "toxic share", bound)


def test_the_largest_reduction_within_the_bound_wins() -> None:
    found = verdict(result(HALF, 0.4, 101), result(ONE, 0.3, 104), result(TWO, 0.1, 106))
    assert found.best is not None
    assert found.best.result.setting == ONE
    assert found.sentences() == [
        "Best trade-off with at most +5 % perplexity: maps strength 1 "
        "(toxic share -40.0 %, perplexity +4.0 %).",
        'As new defaults of maps: {"strength": 1.0, "positions": "all"}',
    ]
    assert found.json() == {
        "label": "maps strength 1",
        "steering": {"intervention": "maps", "strength": 1.0, "positions": "all"},
        "max_perplexity_increase_percent": 5.0,
        "cost": "perplexity",
        "perplexity_increase_percent": pytest.approx(4.0),
        "toxicity": "toxic share",
        "toxicity_reduction": pytest.approx(0.2),
    }
    wider = verdict(result(ONE, 0.3, 104), result(TWO, 0.1, 106), bound=6.5)
    assert wider.best is not None
    assert wider.best.result.setting == TWO


def test_the_preset_chooses_the_measure() -> None:
    results = [BASE_RESULT, result(HALF, 0.7, 100), result(ONE, 0.3, 100)]
    found = Verdict.of(results, "mean toxicity", 5)
    assert found.best is not None
    assert found.best.result.setting == HALF


def test_equal_reductions_go_to_the_lower_perplexity() -> None:
    found = verdict(result(ONE, 0.3, 104), result(HALF, 0.3, 103), result(TWO, 0.3, 104))
    assert found.best is not None
    assert found.best.result.setting == HALF


def test_nothing_is_best_if_nothing_is_better() -> None:
    found = verdict(result(ONE, 0.5, 100), result(TWO, 0.1, 120))
    assert (found.best, found.single, found.json()) == (None, None, None)
    assert found.sentences() == ["No setting lowers the toxic share with at most +5 % perplexity."]
    assert Verdict.of([BASE_RESULT], "toxic share", 5).sentences() == []


def test_edits_that_spare_the_scored_text_are_not_best() -> None:
    generated: dict[str, JsonValue] = {"strength": 1.0, "positions": "generated"}
    found = verdict(result(ONE, 0.1, 100, [generated]), result(HALF, 0.4, 101))
    assert found.best is not None
    assert found.best.result.setting == HALF
    assert found.sentences()[0].startswith("maps strength 1 edits generated tokens only")
    # Fluency is of the continuations, which were edited.
    results = [
        result(BASE, 0.5, 100, cost="fluency"),
        result(ONE, 0.1, 100, [generated], cost="fluency"),
    ]
    fluent = Verdict.of(results, "toxic share", 5)
    assert fluent.best is not None
    assert fluent.best.result.setting == ONE


def test_a_stack_is_offered_as_the_servers_default() -> None:
    stack = parse_steering('[{"intervention": "maps"}, {"intervention": "maps"}]')
    found = verdict(result(stack, 0.1, 100, [{"strength": 1.0}, {"strength": 0.5}]))
    assert found.single is None
    assert found.sentences()[-1] == (
        "As the server's default: --default-steering "
        '\'[{"intervention": "maps", "strength": 1.0}, {"intervention": "maps", "strength": 0.5}]\''
    )


@pytest.mark.parametrize(("kind", "begins"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_the_picture(kind: str, begins: bytes) -> None:
    found = verdict(
        result(TWO, 0.1, 106), result(HALF, 0.4, 101), result(parse_steering("head"), 0.2, 102)
    )
    assert draw(found.candidates, found.best, kind).startswith(begins)


def test_new_defaults_are_written_and_nothing_else_changes(tmp_path: Path) -> None:
    original, copy = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    parameters = affine_parameters()
    manifest = affine_manifest(limits={"strength": [-1, 2]})
    write_artifact(original, manifest, parameters, torch.bfloat16)
    data = original.read_bytes()
    digest = write_with_defaults(copy, data, {"strength": 1.5, "positions": "generated"})
    before, after = read_artifact(original), read_artifact(copy)
    assert after.digest == digest
    assert after.manifest.defaults.model_dump() == {"strength": 1.5, "positions": "generated"}
    assert after.manifest.model_copy(update={"defaults": before.manifest.defaults}) == (
        before.manifest
    )
    assert same_parameters(before.parameters, after.parameters)
    with safe_open(copy, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118
    for bytes_, defaults in ((data, {"strength": 3.0}), (b"x", {"strength": 1.0})):
        with pytest.raises(EvaluationError, match="cannot be written"):
            write_with_defaults(tmp_path / "c.safetensors", bytes_, defaults)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


@pytest.mark.parametrize(
    ("outputs", "named"),
    [
        (Outputs(report=Path("/nowhere/x.json")), "the folder of /nowhere/x.json does not exist"),
        (Outputs(continuations=Path()), "is a folder"),
        (Outputs(picture=Path("x.pdf")), "must end in .svg or .png"),
        (Outputs(artifact=Path("x.bin")), "must end in .safetensors"),
    ],
)
def test_files_that_cannot_be_written_are_refused_first(outputs: Outputs, named: str) -> None:
    with pytest.raises(EvaluationInputError, match=named):
        outputs.check([], trade_off=True)


@pytest.mark.parametrize(
    "outputs",
    [
        Outputs(report=Path("p.jsonl")),
        Outputs(continuations=Path("./p.jsonl")),
        Outputs(report=Path("x"), continuations=Path("x")),
    ],
)
def test_no_file_is_written_over_another_one(outputs: Outputs) -> None:
    with pytest.raises(EvaluationInputError, match="would overwrite another file"):
        outputs.check([Path("p.jsonl")], trade_off=True)


@pytest.mark.parametrize(
    "outputs", [Outputs(picture=Path("x.svg")), Outputs(artifact=Path("x.safetensors"))]
)
def test_what_needs_a_trade_off_is_refused_without(outputs: Outputs) -> None:
    with pytest.raises(EvaluationInputError, match=r"needs toxicity \(--prompts\), and"):
        outputs.check([], trade_off=False)


def test_a_picture_without_matplotlib_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: str) -> None:
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr("importlib.import_module", fail)
    with pytest.raises(EvaluationInputError, match=r"pip install 'steerserve\[evaluate\]'"):
        Outputs(picture=tmp_path / "x.svg").check([], trade_off=True)


def test_what_cannot_be_drawn_or_copied_is_said_and_the_rest_is_written(tmp_path: Path) -> None:
    async def download(_: str) -> bytes:
        raise AssertionError

    def copy(outputs: Outputs) -> None:
        asyncio.run(outputs.write_artifact(nothing, download))

    report = tmp_path / "r.json"
    nothing = Verdict.of([], "toxic share", 5)
    with pytest.raises(EvaluationError, match=r"p\.svg is not written"):
        Outputs(report, picture=tmp_path / "p.svg").write({"a": 1}, nothing, [])
    assert report.read_text() == '{\n  "a": 1\n}\n'
    with pytest.raises(EvaluationError, match=r"a\.safetensors is not written"):
        copy(Outputs(artifact=tmp_path / "a.safetensors"))
    Outputs(STDOUT).write({}, nothing, [])
    copy(Outputs(STDOUT))
    assert list(tmp_path.iterdir()) == [report]


def test_a_full_disk_leaves_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "r.json"
    report.write_text("older")

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(EvaluationError, match=r"r\.json cannot be written: No space left"):
        Outputs(report).write({}, Verdict.of([], "toxic share", 5), [])
    assert report.read_text() == "older"
    assert list(tmp_path.iterdir()) == [report]
