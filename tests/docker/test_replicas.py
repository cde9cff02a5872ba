"""Tests two real servers that share a registry, under load, behind nginx as configured here."""

import signal
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

from interventions.artifact import write_artifact
from server.engine.torch.model.loader import load_model
from tests.load import PROMPTS, Load, Questions, text_at, under_load
from tests.manifests import manifest_of
from tests.nginx import FAIL_SECONDS, NginxProcess, nginx
from tests.processes import STOP_SECONDS, ServerProcess, free_port, steerserve
from tests.tiny import random_maps

ADMIN = {"Authorization": "Bearer the-admin-key"}
CLIENTS = 4
UPLOADS = 24
SEEN_SECONDS = 2  # from an upload at one server until all servers know the name
COMPLETIONS = "/v1/completions"


@dataclass
class Replica:
    """A server that can be restarted at the same address."""

    folder: Path
    registry: Path
    model: Path
    port: int = field(default_factory=free_port)
    _stack: ExitStack = field(default_factory=ExitStack)
    _running: list[ServerProcess] = field(default_factory=list)

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def start(self) -> None:
        """Start the server, and wait until it is ready."""
        self.folder.mkdir(exist_ok=True)
        server = steerserve(
            self.folder,
            *("--model", str(self.model), "--dtype", "float32", "--toxicity-scorer", "none"),
            *("--threads", "1"),  # more threads of two servers would compete for the processors
            *("--shutdown-keep-alive", "6", "--admin-key", "the-admin-key"),
            module="tests.tiny_server",
            env={"STEERSERVE_TEST_DEATH": str(self.folder / "never")},
            port=self.port,
            registry=self.registry,
        )
        self._running.append(self._stack.enter_context(server))

    def drain(self) -> float:
        """Stop the server with SIGTERM; returns the seconds until it has exited."""
        began = time.monotonic()
        self._running[-1].process.send_signal(signal.SIGTERM)
        assert self._running[-1].process.wait(STOP_SECONDS) == 0
        return time.monotonic() - began

    def kill(self) -> None:
        """Kill the server."""
        self._running[-1].process.kill()
        self._running[-1].process.wait()

    def close(self) -> None:
        """Stop the server at the end of the tests."""
        self._stack.close()


@dataclass(frozen=True)
class Cluster:
    """The servers and the nginx in front of them."""

    replicas: tuple[Replica, ...]
    nginx: NginxProcess
    artifact: Path

    def upload(self, name: str, **headers: str) -> httpx.Response:
        """Upload the artifact through nginx under a name."""
        return httpx.post(
            f"{self.nginx.url}/v1/interventions",
            files={"file": ("x", self.artifact.read_bytes())},
            data={"name": name},
            headers=headers,
            timeout=60,
        )

    def check_nothing_was_repeated(self) -> None:
        """Assert that nothing but a GET was sent to more than one server."""
        for passage in self.nginx.passages():
            if passage.method != "GET":
                assert not any(passage.sent[:-1]), passage


@pytest.fixture(scope="module")
def cluster(
    tmp_path_factory: pytest.TempPathFactory, tiny_folders: Mapping[str, Path]
) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("replicas")
    model = tiny_folders["llama"]
    artifact = folder / "maps.safetensors"
    parameters = random_maps(3)
    description = load_model(str(model), "float32").description
    write_artifact(artifact, manifest_of(parameters, description, "maps"), parameters)
    replicas = tuple(Replica(folder / name, folder / "registry", model) for name in ("a", "b"))
    with ExitStack() as stack:
        for replica in replicas:
            stack.callback(replica.close)
        balancer = stack.enter_context(nginx(folder / "nginx", [each.address for each in replicas]))
        with ThreadPoolExecutor() as pool:
            list(pool.map(Replica.start, replicas))
        yield Cluster(replicas, balancer, artifact)


@pytest.fixture(scope="module")
def questions(cluster: Cluster) -> Questions:
    """Return prompts with the answers that both servers give when asked directly."""
    uploaded = cluster.upload("maps", **ADMIN)
    assert uploaded.status_code == 201, uploaded.text
    time.sleep(SEEN_SECONDS)
    one, other = (replica.url for replica in cluster.replicas)
    expected = {prompt: text_at(one, prompt) for prompt in PROMPTS}
    for prompt, text in expected.items():
        assert text_at(other, prompt) == text
        assert text_at(other, prompt, steered=False) != text
    return Questions(uploaded.json()["digest"], expected)


def test_what_goes_through_nginx_is_judged_as_such(cluster: Cluster) -> None:
    refused = cluster.upload("other")
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
    foreign = httpx.get(f"{cluster.nginx.url}/v1/models", headers={"Host": "evil.example.org"})
    assert (foreign.status_code, foreign.json()["error"]["code"]) == (403, "host_not_allowed")


@pytest.mark.usefixtures("questions")
def test_every_server_says_the_same_of_what_was_uploaded_to_one(cluster: Cluster) -> None:
    lists = [
        httpx.get(f"{address}/v1/interventions").json()
        for address in (cluster.nginx.url, *(replica.url for replica in cluster.replicas))
    ]
    assert lists[0] == lists[1] == lists[2]
    assert [each["name"] for each in lists[0]["data"]] == ["maps"]


def test_both_are_drained_in_turn_under_load_and_nobody_notices(
    cluster: Cluster, questions: Questions
) -> None:
    load = Load(cluster.nginx.url, questions)
    with under_load(load, CLIENTS):
        load.wait_for(3 * CLIENTS)
        for replica in cluster.replicas:
            took = replica.drain()
            assert took < 25, "it was ended, and not drained"
            load.wait_for(CLIENTS)  # by the other one
            replica.start()
            time.sleep(FAIL_SECONDS + 1)  # until nginx tries it again
            load.wait_for(3 * CLIENTS)
    assert load.problems() == []
    assert {outcome.streamed for outcome in load.outcomes} == {True, False}
    cluster.check_nothing_was_repeated()
    passages = [each for each in cluster.nginx.passages() if each.path == COMPLETIONS]
    last = passages[-2 * CLIENTS :]
    assert {passage.addresses[-1] for passage in last} == {
        replica.address for replica in cluster.replicas
    }
    # nginx sent requests that a stopped server had refused to the other server.
    assert any(len(passage.addresses) == 2 for passage in passages)


def test_one_is_killed_under_load_and_only_what_it_had_is_lost(
    cluster: Cluster, questions: Questions
) -> None:
    load = Load(cluster.nginx.url, questions)
    uploads: dict[str, int] = {}

    def upload(name: str) -> None:
        uploads[name] = cluster.upload(name, **ADMIN).status_code

    killed = cluster.replicas[1]
    with under_load(load, CLIENTS), ThreadPoolExecutor(4) as pool:
        load.wait_for(3 * CLIENTS)
        for number in range(UPLOADS):
            pool.submit(upload, f"copy-{number}")
        while len(uploads) < 8:
            time.sleep(0.005)
        moment = time.monotonic()
        killed.kill()
        load.wait_for(6 * CLIENTS)
    lost = load.problems()
    # Only requests in flight are lost, and those sent before nginx notices the kill.
    assert all(outcome.running_at(moment) or 0 < outcome.begun - moment < 2 for outcome in lost)
    assert len(lost) <= CLIENTS
    for outcome in lost:
        problem = outcome.problem or ""
        cut_off = outcome.streamed and ("no whole stream" in problem or "Protocol" in problem)
        assert cut_off or problem.startswith('502: {"error"'), problem
        assert "not steered" not in problem
    cluster.check_nothing_was_repeated()
    check_uploads(cluster, uploads)


def check_uploads(cluster: Cluster, uploads: Mapping[str, int]) -> None:
    """Assert that a confirmed upload is stored once, and a lost one at most once."""
    assert len(uploads) == UPLOADS
    assert set(uploads.values()) <= {201, 502}
    time.sleep(SEEN_SECONDS)
    for name, status in uploads.items():
        shown = httpx.get(f"{cluster.nginx.url}/v1/interventions/{name}")
        if status == 201:
            assert shown.status_code == 200, shown.text
        if shown.status_code == 200:
            assert len(shown.json()["history"]) == 1
