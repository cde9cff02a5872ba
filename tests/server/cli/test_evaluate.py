"""Tests of `steerserve evaluate` against a running server."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from interventions.artifact import read_artifact
from interventions.registry import Registry
from server.__main__ import app
from server.engine.torch.engine import TorchEngine
from server.evaluating import EvaluationError
from server.evaluating.client import EvaluationClient
from tests.artifact_samples import same_parameters
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
    labels = ["base model", "maps", "maps + head", "maps strength 0", "maps strength 0.5"]
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


@pytest.mark.usefixtures("server")
async def test_the_best_setting_becomes_the_defaults_of_a_copy(
    files: dict[str, str], tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_scorer(tmp_path, "base_only", monkeypatch)
    copy = tmp_path / "copy.safetensors"
    result = await evaluate(
        *("--prompts", files["prompts"], "--text", files["texts"], "--tokens", "8", "--no-fluency"),
        *("--sweep", "maps:strength=0.75,1", "--scorer", "python:base_only:score"),
        *("--max-perplexity-increase", "1e6", "--write-artifact", str(copy), "--json", "-"),
    )
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    strength = report["best"]["steering"]["strength"]
    assert strength in (0.75, 1.0)
    written = read_artifact(copy)
    stored = registry.load(registry.resolve("maps").digest)
    assert written.manifest.defaults.model_dump() == {"strength": strength, "positions": "all"}
    assert same_parameters(written.parameters, stored.parameters)
    base, *_ = report["settings"]
    assert {each["name"] for each in base["measures"]} >= {"toxic share", "perplexity"}
    assert "fluency" not in {each["name"] for each in base["measures"]}


@pytest.mark.usefixtures("server")
async def test_an_artifact_that_cannot_be_downloaded_loses_no_measurement(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def gone(_client: EvaluationClient, _digest: str) -> bytes:
        raise EvaluationError("it is gone")

    _write_scorer(tmp_path, "only_base", monkeypatch)
    monkeypatch.setattr(EvaluationClient, "artifact", gone)
    report = tmp_path / "report.json"
    result = await evaluate(
        *("--prompts", files["prompts"], "--text", files["texts"], "--tokens", "4", "--no-fluency"),
        *("--steering", "maps", "--scorer", "python:only_base:score", "--json", str(report)),
        *("--max-perplexity-increase", "1e6", "--write-artifact", str(tmp_path / "x.safetensors")),
    )
    assert result.exit_code == 1
    assert "Error: it is gone" in result.stderr
    assert "toxic share" in result.stdout
    assert json.loads(report.read_text())["best"] is not None


async def test_an_interrupt_is_one_sentence(
    files: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_args: object, **_named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("server.cli.evaluate.EvaluationClient.connect", interrupted)
    report = tmp_path / "report.json"
    result = await evaluate("--prompts", files["prompts"], "--json", str(report))
    assert result.exit_code == 130
    assert "Interrupted: the evaluation is not finished." in result.stderr
    assert not report.exists()


@pytest.mark.usefixtures("server")
async def test_samples_and_the_options_of_a_preset(files: dict[str, str]) -> None:
    result = await evaluate(
        *("--prompts", files["prompts"], "--preset", "lineas", "--samples", "3", "--seed", "9"),
        *("--tokens", "5", "--json", "-", "--scorer", "embedded"),
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["sampling"] == {
        "max_tokens": 5,
        "temperature": 1.0,
        "top_p": 0.3,
        "repetition_penalty": 1.2,
        "samples": 3,
        "seed": 9,
    }
    shown = await evaluate(
        *("--prompts", files["prompts"], "--preset", "lineas", "--samples", "2", "--tokens", "3")
    )
    assert "expected maximum toxicity [95 %]" in shown.stdout


@pytest.mark.usefixtures("server")
async def test_failures_are_one_sentence_and_leave_no_file(
    files: dict[str, str], tmp_path: Path
) -> None:
    before = _files(tmp_path)
    report = tmp_path / "report.json"
    common = ("--prompts", files["prompts"], "--tokens", "2", "--json", str(report))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    unreachable = f"http://127.0.0.1:{port}"
    for arguments, status, text in (
        (("--steering", "unknown"), 1, 'Error: unknown: There is no intervention "unknown".'),
        (("--sweep", "maps:strength=7"), 1, "(HTTP 400)"),
        (("--model", "other"), 1, "does not serve the model 'other'"),
        (("--api-key", "wrong"), 1, "Incorrect key provided. (HTTP 401)"),
        (("--url", unreachable), 1, f"Cannot reach {unreachable}: "),
        (("--url", "nonsense"), 1, "Cannot reach nonsense: "),
        (("--write-artifact", str(tmp_path / "x.safetensors")), 1, "x.safetensors is not written"),
        (("--continuations", files["prompts"]), 2, "would overwrite another file"),
        (("--no-fluency", "--picture", str(tmp_path / "x.svg")), 2, "x.svg needs toxicity"),
        (("--steering", '{"intervention": "maps", "strength": NaN}'), 2, "is not JSON"),
        (("--steering", "{"), 2, "--steering is not JSON"),
        (("--sweep", "maps:speed=1"), 2, "--sweep is NAME:SETTING=VALUE"),
        (("--samples", "2"), 2, "--samples above 1 needs a --temperature above 0"),
        (("--scorer", "magic"), 2, "--scorer magic: the toxicity scorer 'magic' is none of"),
        (("--scorer", "none"), 2, "scores nothing"),
        (("--text", str(tmp_path / "missing")), 2, "missing: No such file"),
        (("--questions", files["prompts"]), 2, ":1: the field 'question' must be"),
        (("--questions", files["mmlu"], "--questions", files["mmlu"]), 2, "are called mmlu.json"),
        (("--picture", str(tmp_path / "x.pdf")), 2, "must end in .svg or .png"),
    ):
        result = await evaluate(*common, *arguments)
        assert result.exit_code == status, (arguments, result.output)
        line = result.stderr.splitlines()[-1]  # the progress bar comes before it
        assert line.startswith("Error: ")
        assert text in line, arguments
        # A measured report is written, also if the artifact cannot be.
        assert report.exists() == ("--write-artifact" in arguments)
        report.unlink(missing_ok=True)
    key = await evaluate(*common, "--api-key", "schlüssel")
    assert key.exit_code == 2
    assert "printable ASCII" in key.stderr
    nothing = await evaluate()
    assert nothing.exit_code == 2
    assert "there is nothing to measure" in nothing.stderr
    assert _files(tmp_path) == before


def _write_scorer(folder: Path, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a scorer to which the base model's continuations are toxic, and no others."""
    (folder / f"{module}.py").write_text(
        "BASE = []\n"
        "def score(texts):\n"
        "    BASE.extend(texts[:2] if not BASE else [])\n"
        "    return [float(text in BASE) for text in texts]\n"
    )
    monkeypatch.syspath_prepend(str(folder))


def _files(folder: Path) -> set[str]:
    """Return the names of a folder's files."""
    return {path.name for path in folder.iterdir() if path.is_file()}


class DyingServer(BaseHTTPRequestHandler):
    """A server that answers four requests and then ends each connection without an answer."""

    requests = count()

    def do_GET(self) -> None:
        self._answer({"data": [{"id": "m"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        logprobs = {"token_logprobs": [None], "text_offset": [0]} if body.get("echo") else None
        if next(self.requests) < 4:
            self._answer({"choices": [{"text": " a", "logprobs": logprobs}]})
        else:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base's name
        """Print nothing."""

    def _answer(self, body: object) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


async def test_a_server_that_dies_in_the_middle(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    await asyncio.to_thread(prompts.write_text, "one\n" * 9)
    with ThreadingHTTPServer(("127.0.0.1", 0), DyingServer) as dying:
        thread = threading.Thread(target=dying.serve_forever)
        thread.start()
        url = f"http://127.0.0.1:{dying.server_port}"
        outputs = ("--json", str(tmp_path / "r.json"), "--continuations", str(tmp_path / "c.jsonl"))
        result = await evaluate(
            "--url", url, "--prompts", str(prompts), "--concurrency", "1", *outputs
        )
        dying.shutdown()
        thread.join()
    assert result.exit_code == 1
    line = result.stderr.splitlines()[-1]
    assert line.startswith(f"Error: base model, {prompts}:4: Cannot reach {url}: ")
    assert _files(tmp_path) == {"prompts.txt"}
