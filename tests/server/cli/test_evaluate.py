"""Tests of `steerserve evaluate` against a running server."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from interventions.registry import Registry
from server.__main__ import app
from server.engine.torch.engine import TorchEngine
from tests.conftest import WriteArtifact
from tests.live import LiveServer, live
from tests.serving import build_app


@pytest.fixture
async def server(
    tiny_engine: TorchEngine,
    registry: Registry,
    affine_artifact: WriteArtifact,
    reward_artifact: WriteArtifact,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[LiveServer]:
    """Run a server with a map and a head, whose URL and key the command finds in variables."""
    registry.add(affine_artifact("maps"), "maps")
    registry.add(reward_artifact("head"), "head")
    monkeypatch.setenv("COLUMNS", "200")
    async with live(build_app(tiny_engine, registry, api_key="key")) as server:
        monkeypatch.setenv("STEERSERVE_URL", server.url)
        monkeypatch.setenv("STEERSERVE_API_KEY", "key")
        yield server


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """Write a file of each sort."""
    return _write(
        tmp_path,
        {
            "prompts.jsonl": '{"prompt": "You are"}\n\n{"prompt": "Hello", "more": 1}\n',
            "texts.jsonl": '{"prompt": "A cat", "gold": " sat."}\n{"text": "So it is."}\n',
            "mmlu.json": '[{"question": "1+1?", "choices": ["2", "three"], "answer": 0}]',
        },
    )


def _write(folder: Path, texts: dict[str, str]) -> dict[str, str]:
    for name, text in texts.items():
        (folder / name).write_text(text)
    return {name.partition(".")[0]: str(folder / name) for name in texts}


async def evaluate(*arguments: str) -> Result:
    """Run the command in a thread, since its server runs on this thread's event loop."""
    return await asyncio.to_thread(CliRunner().invoke, app, ["evaluate", *arguments])


@pytest.mark.usefixtures("server")
async def test_everything_is_measured_and_reported(files: dict[str, str], tmp_path: Path) -> None:
    result = await evaluate(
        *("--prompts", files["prompts"], "--text", files["texts"], "--questions", files["mmlu"]),
        *(
            "--steering",
            "maps",
            "--steering",
            '[{"intervention": "maps"}, {"intervention": "head"}]',
        ),
        *("--sweep", "maps:strength=0,0.5", "--tokens", "4", "--max-perplexity-increase", "1000"),
        *("--json", str(tmp_path / "report.json"), "--picture", str(tmp_path / "picture.svg")),
        *("--continuations", str(tmp_path / "continuations.jsonl")),
    )
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    labels = ["base", "maps", "maps + head", "maps strength 0", "maps strength 0.5"]
    assert [each["label"] for each in report["settings"]] == labels
    assert report["sampling"]["max_tokens"] == 4
    assert [file["name"] for file in report["files"]] == [
        "prompts.jsonl",
        "texts.jsonl",
        "mmlu.json",
    ]
    base, _, stack, zero, _ = report["settings"]
    assert [item["intervention"] for item in stack["applied"]] == ["maps", "head"]
    for each in zero["measures"]:
        [own] = [other for other in base["measures"] if other["name"] == each["name"]]
        assert each["value"] == own["value"]
        assert each["difference"]["value"] == 0
    names = {each["name"] for each in base["measures"]}
    assert {"toxic share", "fluency", "perplexity", "accuracy"} < names
    assert "| maps strength 0.5" in result.stdout
    assert "<svg" in (tmp_path / "picture.svg").read_text()
    lines = (tmp_path / "continuations.jsonl").read_text().splitlines()
    assert len(lines) == 2 * len(labels)
    assert json.loads(lines[0])["toxicity"].keys() == {"embedded"}
