"""Tests of `benchmarks.effect`, with a tiny model and judges of the tests' own."""

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from rich.progress import Progress
from transformers import AutoTokenizer
from typer.testing import CliRunner, Result

from benchmarks.decoding import BenchmarkError
from benchmarks.effect.__main__ import main
from benchmarks.effect.arms import BASE_ARM, STRENGTHS, Arm, Choice, Goal
from benchmarks.effect.baselines import fit_baselines
from benchmarks.effect.data import Rows, read_data
from benchmarks.effect.disagreement import disagreement
from benchmarks.effect.goals import reached
from benchmarks.effect.judge import SecondJudge
from benchmarks.effect.measuring import choose, measure
from interventions.artifact import read_artifact
from interventions.registry import Registry
from server.__main__ import app
from server.engine.torch.engine import TorchEngine
from server.evaluating import EvaluationInputError
from server.evaluating import report as evaluation
from server.evaluating.client import EvaluationClient
from server.evaluating.files import Item
from server.evaluating.plan import Sampling
from server.evaluating.run import Continuation, Outcome
from server.evaluating.settings import BASE, Setting
from server.evaluating.statistics import Estimate, Interval
from tests.conftest import WriteArtifact
from tests.live import live
from tests.serving import build_app

PREFIX = Arm(Setting("polite", None), "Be kind.\n")
ROWS = Rows(
    [Item("p:1", "You are"), Item("p:2", "Hello")],
    [Item("t:1", " A cat", " sat."), Item("t:2", "Oui", " élève.")],
)
SETTINGS = ("base model", "good", "better", "dear")


def lengths(texts: Sequence[str]) -> list[float]:
    """Judge texts by their lengths alone."""
    return [len(text) % 7 / 7 for text in texts]


def estimate(name: str, subject: str, base: float, value: float) -> Estimate:
    ratio = Interval(value / base, None, None) if base else None
    difference = Interval(value - base, None, None)
    return Estimate(name, subject, 2, Interval(value, None, None), difference, ratio)


def result(label: str, share: float, perplexity: float, second: float = 0.0) -> evaluation.Result:
    """Return a setting's result, where the base has a share of 0.4, a perplexity of 20."""
    return evaluation.Result(
        BASE if label == BASE.label else Setting(label, {"intervention": label}),
        [],
        [
            estimate("toxic share", "first", 0.4, share),
            estimate("toxic share", "second", 0.4, second),
            estimate("perplexity", "texts", 20.0, perplexity),
        ],
    )


@pytest.fixture
def tokenizer(tiny_folders: Mapping[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(tiny_folders["llama"])


@pytest.fixture
async def client(
    tiny_engine: TorchEngine, registry: Registry, affine_artifact: WriteArtifact
) -> AsyncIterator[EvaluationClient]:
    registry.add(affine_artifact("maps"), "maps")
    transport = httpx.ASGITransport(app=build_app(tiny_engine, registry))
    async with EvaluationClient.connect("http://localhost", None, "", 4, transport) as client:
        yield client


async def measured(
    client: EvaluationClient, tokenizer: Any, arms: Sequence[Arm], *, fluency: bool
) -> Outcome:
    judges = {"first": lengths}
    with Progress(disable=True) as bar:
        return await measure(client, tokenizer, arms, ROWS, judges, bar, fluency=fluency)


async def test_a_prompt_is_measured_on_the_tokens_that_the_base_model_is_measured_on(
    client: EvaluationClient, tokenizer: Any
) -> None:
    maps = Arm(Setting("maps", {"intervention": "maps"}))
    found = await measured(client, tokenizer, [BASE_ARM, maps, PREFIX], fluency=True)
    base, _, polite = found.results
    scores = [
        # The tiny model's tokens are bytes; the first of a text alone has no probability.
        await client.score(PREFIX.prefix + item.text, len(PREFIX.prefix) + 1, BASE)
        for item in ROWS.texts
    ]
    assert sum(score.tokens for score in scores) == sum(
        len(t.text.encode()) - 1 for t in ROWS.texts
    )
    perplexity = polite.find("perplexity")
    assert perplexity is not None
    assert perplexity.ratio is not None
    expected = sum(score.nats for score in scores) / sum(score.tokens for score in scores)
    assert perplexity.value.value == pytest.approx(2.718281828**expected, rel=1e-4)
    assert base.find("perplexity") != perplexity
    texts = [each.text for each in found.continuations if each.setting == "polite"]
    sampling = Sampling(20)
    assert texts == [
        await client.complete(PREFIX.prefix + item.prompt, sampling, number, BASE)
        for number, item in enumerate(ROWS.prompts)
    ]
    plain = [
        await client.score(item.prompt + text, len(item.prompt), BASE)
        for item, text in zip(ROWS.prompts, texts, strict=True)
    ]
    fluency = polite.find("fluency")
    assert fluency is not None
    expected = sum(score.nats for score in plain) / sum(score.tokens for score in plain)
    assert fluency.value.value == pytest.approx(2.718281828**expected, rel=1e-4)


async def test_a_prefix_that_changes_what_is_counted_is_refused(client: EvaluationClient) -> None:
    def tokens_of_two(text: str, **_: object) -> dict[str, list[tuple[int, int]]]:
        return {"offset_mapping": [(at, at + 2) for at in range(0, len(text), 2)]}

    with pytest.raises(BenchmarkError, match=r"^t:1: after the prefix of polite the text has 9 "):
        await measured(client, tokens_of_two, [BASE_ARM, PREFIX], fluency=False)


def test_the_lowest_share_at_an_accepted_price_is_chosen() -> None:
    arms = {label: Arm(Setting(label, {"intervention": label})) for label in SETTINGS[1:]}
    results = [
        result("base model", 0.4, 20.0),
        result("good", 0.3, 20.1),
        result("better", 0.2, 20.9),
        result("dear", 0.1, 21.1),
    ]
    outcome = Outcome("tiny", results, [])
    assert choose(Choice("all", list(arms.values())), outcome) == arms["better"]
    assert choose(Choice("one", [arms["good"], arms["dear"]]), outcome) == arms["good"]
    assert choose(Choice("none", [arms["dear"]]), outcome) is None


@pytest.mark.parametrize(
    ("share", "perplexity", "verdict"),
    [
        (0.15, 20.9, "met"),
        (0.16, 20.0, "not met: share by 2.0"),
        (0.1, 21.2, "not met: perplexity by 1.0"),
        (0.2, 21.2, "not met: share by 12.0, perplexity by 1.0"),
    ],
)
def test_a_goal_is_met_if_both_figures_reach_it(
    share: float, perplexity: float, verdict: str
) -> None:
    goal = Goal(("good",), 62.0 - 1e-9)
    found = reached(
        goal, [result("base model", 0.4, 20.0), result("good", share, perplexity)], "first"
    )
    assert (found.verdict, found.met) == (verdict, verdict == "met")


def test_judges_are_compared_by_sign_order_and_continuation() -> None:
    results = [
        result("base model", 0.4, 20.0, 0.4),
        result("good", 0.3, 20.0, 0.4),
        result("better", 0.2, 20.0, 0.5),
        result("dear", 0.1, 20.0, 0.1),
    ]
    continuations = [
        Continuation("good", "p", 0, "x", {"first": 0.6, "second": 0.5}),
        Continuation("good", "p", 0, "x", {"first": 0.6, "second": 0.6}),
        Continuation("dear", "p", 0, "x", {"first": 0.1, "second": 0.6}),
    ]
    found = disagreement(("first", "second"), results, continuations)
    assert [row.label for row in found.rows if row.signs_differ] == ["good", "better"]
    assert found.reversed_pairs == [("base model", "better"), ("good", "better")]
    assert [(row.only_first, row.only_second) for row in found.rows] == [
        (0, 0),
        (1, 0),
        (0, 0),
        (0, 1),
    ]
    assert [found.rank(row, 0) for row in found.rows] == [4, 3, 2, 1]
    assert [found.rank(row, 1) for row in found.rows] == [2, 2, 4, 1]


def environment(folder: Path, worker: str) -> Path:
    """Write a script that prints the folder of an environment whose Python is a shell script."""
    python = folder / "environment" / "bin" / "python"
    python.parent.mkdir(parents=True)
    script = folder / "environment.sh"
    for path, text in ((python, worker), (script, f"echo {folder / 'environment'}")):
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    return script


def test_the_second_judge_answers_from_another_process(tmp_path: Path) -> None:
    answer = '{"scores": [0.25], "versions": {"judge": "1"}}'
    judge = SecondJudge.prepare(environment(tmp_path, f"echo '{answer}' > \"$4\""))
    assert judge.versions == {"judge": "1"}
    assert judge.score(["Hello"]) == [0.25]
    with pytest.raises(BenchmarkError, match=r"gave 1 scores for 2 texts$"):
        judge.score(["Hello", "Good day"])


def test_a_second_judge_that_cannot_be_had_is_told_in_a_sentence(tmp_path: Path) -> None:
    failing = environment(tmp_path, "echo one >&2; echo 'no such module' >&2; exit 1")
    with pytest.raises(BenchmarkError, match=r"classifier, failed: no such module$"):
        SecondJudge.prepare(failing)
    failing.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(BenchmarkError, match="cannot be had"):
        SecondJudge.prepare(failing)


def write_data(folder: Path, prompts: int, texts: int) -> None:
    lines = {
        "rtp_challenge_dev.jsonl": [{"prompt": f"P{row}"} for row in range(prompts)],
        "wiki_samples_dev.jsonl": [{"prompt": f"T{row}", "gold": " so."} for row in range(texts)],
    }
    for name, rows in lines.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_the_rows_are_those_that_nothing_was_tuned_on(tmp_path: Path) -> None:
    write_data(tmp_path, 600, 800)
    data = read_data(tmp_path, None)
    assert [item.prompt for item in data.held_out.prompts] == [f"P{row}" for row in range(400, 600)]
    assert [item.prompt for item in data.held_out.texts] == [f"T{row}" for row in range(400, 500)]
    assert [item.prompt for item in data.choosing.texts] == [f"T{row}" for row in range(100)]
    assert len(read_data(tmp_path, 3).held_out.prompts) == 3
    write_data(tmp_path, 599, 800)
    with pytest.raises(EvaluationInputError, match=r"dev\.jsonl has 599 rows; rows 400 to 599"):
        read_data(tmp_path, None)


def test_baselines_are_fitted_once_for_the_same_files(
    tmp_path: Path, tiny_folders: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def run(command: Sequence[str], **_: object) -> subprocess.CompletedProcess[str]:
        """Run `steerserve` in this process."""
        arguments = list(command[3:])
        calls.append(arguments[1])
        done = CliRunner().invoke(app, arguments)
        return subprocess.CompletedProcess(command, done.exit_code, "", done.stderr)

    monkeypatch.setattr("benchmarks.effect.baselines.subprocess.run", run)
    model = str(tiny_folders["llama"])
    (tmp_path / "about_to_swear.txt").write_text("You are such\nWhat the\n")
    with pytest.raises(BenchmarkError, match=r"calm\.txt is missing: .*bundled_data"):
        fit_baselines(model, tmp_path)
    (tmp_path / "calm.txt").write_text("It is\nWe saw\nThey are\n")
    paths = fit_baselines(model, tmp_path)
    fit_baselines(model, tmp_path)
    assert calls == list(paths) == ["caa", "mean-act", "lin-act"]
    for name, path in paths.items():
        manifest = read_artifact(path).manifest
        assert manifest.training["pooling"] == ("last" if name == "caa" else "mean")
        assert manifest.limits.strength[1] >= max(STRENGTHS[name])  # type: ignore[union-attr]
    (tmp_path / "calm.txt").write_text("It was\n")
    with pytest.raises(BenchmarkError, match="fit lin-act failed: "):
        fit_baselines(model, tmp_path)
    assert calls[3:] == ["caa", "mean-act", "lin-act"]


@dataclass
class Ready:
    """A server that runs already."""

    url: str


async def test_the_command_writes_the_page_its_picture_and_the_figures(
    tiny_engine: TorchEngine,
    registry: Registry,
    affine_artifact: WriteArtifact,
    reward_artifact: WriteArtifact,
    tiny_folders: Mapping[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    registry.add(affine_artifact("detox-dsas", 1), "detox-dsas")
    registry.add(reward_artifact("detox-argre", 2), "detox-argre")
    fitted = {
        name: affine_artifact(name, 3 + number, {"strength": (0.0, 4.0)})
        for number, name in enumerate(STRENGTHS)
    }
    write_data(tmp_path, 600, 800)
    monkeypatch.setattr("benchmarks.effect.arms.PREFIXES", {"prompt 1": PREFIX.prefix})
    monkeypatch.setattr("benchmarks.effect.__main__.model_folder", lambda _: tiny_folders["llama"])
    monkeypatch.setattr("benchmarks.effect.__main__.fit_baselines", lambda _, __: fitted)
    monkeypatch.setattr(SecondJudge, "prepare", lambda: SecondJudge(Path(), {"judge": "1"}))
    monkeypatch.setattr(SecondJudge, "score", lambda _, texts: lengths(texts))
    command = typer.Typer()
    command.command()(main)
    async with live(build_app(tiny_engine, registry)) as server:

        @contextmanager
        def running(*_: str) -> Iterator[Ready]:
            yield Ready(server.url)

        monkeypatch.setattr("benchmarks.effect.__main__.running_server", running)
        arguments = [str(tmp_path), "--work", str(tmp_path), "--limit", "2"]
        done: Result = await asyncio.to_thread(CliRunner().invoke, command, arguments)
    assert done.exit_code == 0, done.output
    page = (tmp_path / "results.md").read_text()
    assert page in done.stdout
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    assert "Not bundled, so not measured: detox-lineas." in page
    assert "## By toxic-comment-classifier, which selected nothing" in page
    figures = json.loads((tmp_path / "effect.json").read_text())
    labels = [each["label"] for each in figures["settings"]]
    assert labels[:4] == ["base model", "detox-argre", "detox-dsas", "detox-dsas + detox-argre"]
    assert {f"{name} strength 1" for name in STRENGTHS} | {"prompt 1"} <= set(labels)
    assert [each["label"] for each in figures["goals"]] == labels[1:4]
    for each in figures["settings"][1:4]:
        for item in each["applied"]:
            assert item["digest"] in page
    lines = (tmp_path / "continuations.jsonl").read_text().splitlines()
    assert len(lines) == 2 * len(labels)
    assert json.loads(lines[0])["toxicity"].keys() == {
        "alt-profanity-check",
        "toxic-comment-classifier",
    }


def test_what_is_missing_is_told_in_a_sentence(tmp_path: Path) -> None:
    command = typer.Typer()
    command.command()(main)
    done = CliRunner().invoke(command, [str(tmp_path), "--work", str(tmp_path)])
    assert done.exit_code == 1
    assert (
        done.stderr == f"Error: {tmp_path / 'rtp_challenge_dev.jsonl'}: No such file or directory\n"
    )
