"""The clients, harnesses and tools of `make conformance`, and what each of them is asked to do."""

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import httpx

from server.config import EMBEDDED_MODEL_NAME as MODEL
from tests.conformance.environments import node_environment, python_environment, source_of

# The names of checks, and what went wrong; None where nothing did.
Results: TypeAlias = Mapping[str, str | None]

HERE: Final = Path(__file__).parent
PROMPT: Final = "Write one sentence about my rude neighbour."
OPENAI: Final = "3.57.0"
_SECONDS: Final = 600

# openai-python's own tests of what this server refuses, and why. A name stands for the test of each
# client (synchronous, asynchronous, aiohttp) and of the raw and the streamed response.
REFUSED: Final[Mapping[str, str]] = {
    "retrieve": "nothing is stored: 404",
    "update": "nothing is stored: 404",
    "list": "nothing is stored: 405",
    "delete": "nothing is stored, and a model cannot be deleted: 404, 405",
    "cancel": "nothing runs in the background: 404",
    "compact": "a conversation is not compacted: 404",
    "create_with_all_params": 'logit_bias with the key "foo", audio, tools of other types, '
    "a stored prompt: 400",
    "responses.create": "no model is named: 400",
}


# langchain-tests' tests that a model of 135 million parameters fails, and why.
TOO_HARD: Final[Mapping[str, str]] = {
    "test_agent_loop": "the model calls no tool by itself",
    "test_json_mode": "the model is told of two keys in words, and writes others",
}


@dataclass(frozen=True, slots=True)
class Suite:
    """A client, harness or tool, with the versions that it is tested at."""

    name: str
    packages: tuple[str, ...]
    run: Callable[["Suite", str], Results]  # gets the server's address


def run_client(suite: Suite, url: str) -> Results:
    """Run a client's script in Python."""
    python = python_environment(suite.name, suite.packages)
    script = HERE / "clients" / f"{suite.name.replace('-', '_')}_client.py"
    return _reports([str(python), str(script)], url, script.parent)


def run_node_client(suite: Suite, url: str) -> Results:
    """Run a client's script in Node.js."""
    packages = [
        package for each in SUITES if each.run is run_node_client for package in each.packages
    ]
    folder = node_environment(packages, HERE / "clients" / "node")
    return _reports(["node", f"{suite.name.replace('-', '_')}.mjs"], url, folder)


def run_openai_tests(suite: Suite, url: str) -> Results:
    """Run openai-python's own tests of the endpoints that this server has."""
    python = python_environment(suite.name, suite.packages)
    source = source_of("openai", OPENAI)
    files = ("test_completions", "chat/test_completions", "test_models", "test_responses")
    command = [str(python), "-m", "pytest", "-q", "-n2", "-p", "no:cacheprovider", "--tb=no", "-rf"]
    output = _output(
        [*command, *(f"tests/api_resources/{name}.py" for name in files)],
        source,
        {"TEST_API_BASE_URL": f"{url}/v1"},
    )
    failed = set(re.findall(r"^FAILED (\S+?)(?:\[| |$)", output, re.MULTILINE))
    found: dict[str, str | None] = {
        test: "failed" for test in sorted(failed) if not _is_refused(test)
    }
    counts = re.search(r"(\d+) failed, (\d+) passed", output)
    if counts is None:
        return {"run": output[-500:]}
    name = f"{counts[2]} pass, {counts[1]} are refused as listed"
    return found or {name: None}


def run_langchain_tests(suite: Suite, url: str) -> Results:
    """Run langchain-tests' standard tests of a chat model."""
    python = python_environment(suite.name, suite.packages)
    alone = ["-c", os.devnull, "--rootdir", ".", "--confcutdir", ".", "-p", "no:cacheprovider"]
    one_loop = ["-o", "asyncio_mode=auto", "-o", "asyncio_default_test_loop_scope=session"]
    output = _output(
        [
            *(str(python), "-m", "pytest", "-q", *alone, *one_loop, "--tb=line", "-rf"),
            "langchain_standard.py",
        ],
        HERE / "clients",
        {"STEERSERVE_URL": url, "STEERSERVE_MODEL": MODEL},
    )
    failed = set(re.findall(r"^FAILED \S+::(\w+)", output, re.MULTILINE))
    passed = re.search(r"(\d+) passed", output)
    if passed is None:
        return {"run": output[-500:]}
    found: dict[str, str | None] = dict.fromkeys(sorted(failed - TOO_HARD.keys()), "failed")
    return found or {f"{passed[1]} pass, {', '.join(sorted(failed))} fail as listed": None}


def run_schemathesis(suite: Suite, url: str) -> Results:
    """Have schemathesis make requests of the API's own description."""
    command = [str(python_environment(suite.name, suite.packages).parent / "schemathesis"), "run"]
    checks = ["not_a_server_error", "status_code_conformance", "content_type_conformance"]
    output = _output(
        [
            *(*command, f"{url}/openapi.json", "--url", url, "--max-examples", "20"),
            *("--checks", ",".join([*checks, "response_schema_conformance"])),
            *("--phases", "examples,coverage,fuzzing", "--continue-on-failure"),
        ],
    )
    counts = re.search(r"(\d+) generated, (\d+) passed", output)
    if counts is None or counts[1] != counts[2]:
        return {"requests": output[-1500:]}
    return {f"{counts[1]} requests": None}


def run_guidellm(suite: Suite, url: str) -> Results:
    """Run a load generator for three requests."""
    command = str(python_environment(suite.name, suite.packages).parent / "guidellm")
    tokenizer = os.environ["CONFORMANCE_TOKENIZER"]
    output = _output(
        [
            *(command, "run", "--profile", "kind=synchronous"),
            *("--backend", f"kind=openai_http,target={url},model={MODEL}"),
            *("--constraint", "kind=max_requests,count=3"),
            *("--tokenizer", f"kind=huggingface_auto,model={tokenizer}"),
            *("--data", "kind=synthetic_text,prompt_tokens=16,output_tokens=8"),
            *("--output", "kind=console"),
        ],
        variables={"HF_HUB_OFFLINE": "1"},
    )
    complete = "Benchmarking complete" in output
    return {"load": None if complete else output[-1500:]}


def expected_answers(url: str) -> dict[str, str]:
    """Return the base model's and the steered answer to PROMPT, as clients' scripts expect them."""

    def answer(model: str) -> str:
        asked: dict[str, Any] = {
            "model": model,
            "messages": [{"role": "user", "content": PROMPT}],
            "temperature": 0,
            "max_tokens": 24,
        }
        body = httpx.post(f"{url}/v1/chat/completions", json=asked, timeout=60).json()
        return str(body["choices"][0]["message"]["content"])

    base, steered = answer(MODEL), answer(f"{MODEL}+detox-lineas")
    assert base != steered
    return {"EXPECTED_BASE": base, "EXPECTED_STEERED": steered}


def _reports(command: list[str], url: str, folder: Path) -> Results:
    variables = {"STEERSERVE_URL": url, "STEERSERVE_MODEL": MODEL, **expected_answers(url)}
    lines = [line for line in _output(command, folder, variables).splitlines() if line[:2] == '["']
    results = dict(json.loads(line) for line in lines)
    return results or {"run": "it reported nothing"}


def _output(
    command: list[str], folder: Path | None = None, variables: Mapping[str, str] | None = None
) -> str:
    """Run a command, in a new folder if none is given, and return what it printed."""
    with tempfile.TemporaryDirectory() as scratch:  # some tools leave files where they run
        done = subprocess.run(
            command,
            cwd=folder or scratch,
            env={**os.environ, **(variables or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_SECONDS,
            check=False,
            text=True,
        )
    return done.stdout


def _is_refused(test: str) -> bool:
    name = test.rpartition("::")[2]
    if "test_responses.py" in test and "_create_overload" in name:
        return True
    return any(word in name for word in REFUSED)


_PYTEST: Final = ("pytest", "pytest-asyncio", "pytest-xdist", "inline-snapshot", "rich", "trio")
SUITES: Final = (
    Suite("openai-python", (f"openai=={OPENAI}",), run_client),
    Suite("langchain-openai", ("langchain-openai==1.7.4",), run_client),
    Suite("litellm", ("litellm==1.110.2",), run_client),
    Suite("llm", ("llm==0.36",), run_client),
    Suite("pydantic-ai", ("pydantic-ai-slim[openai]==2.68.0",), run_client),
    Suite("instructor", ("instructor==1.17.0",), run_client),
    Suite("llama-index", ("llama-index-llms-openai-like==0.8.1",), run_client),
    Suite("openai-node", ("openai@6.49.0", "zod@4.6.7"), run_node_client),
    Suite("vercel-ai", ("ai@6.0.326", "@ai-sdk/openai-compatible@2.0.92"), run_node_client),
    Suite("openai-python's own tests", (f"openai[aiohttp]=={OPENAI}", *_PYTEST), run_openai_tests),
    Suite(
        "langchain-tests",
        ("langchain-tests==1.1.9", "langchain-openai==1.7.4"),
        run_langchain_tests,
    ),
    Suite("guidellm", ("guidellm==0.8.1",), run_guidellm),
    Suite("schemathesis", ("schemathesis==4.32.5",), run_schemathesis),
)
