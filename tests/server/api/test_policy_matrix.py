"""Tests that no request gets around the steering policy, for every policy and endpoint.

They check the edits of all requests that are submitted to the engine, not only the answers.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle
from typing import Literal

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute

import interventions.changes
from interventions.registry import Registry
from server.engine.base import Generation
from server.engine.output import ScoredToken, StepOutput, TokenLogprobs
from server.engine.request import Edit, Request
from server.engine.torch.engine import TorchEngine
from tests.conftest import WriteArtifact
from tests.serving import Json, ScriptedGeneration, build_app, error_of

Kind = Literal["default", "none", "nothing", "same", "other", "wrong"]

MAPS: Json = {"intervention": "maps", "strength": 0.5}
HEAD: Json = {"intervention": "head"}
NO_HEAD: Json = {"intervention": "head", "eta": 0, "direction_scale": 0}
NO_MAPS: Json = {"intervention": "maps", "strength": 0}

ENDPOINTS: dict[str, Json] = {
    "/v1/completions": {"prompt": "Hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}]},
    "/v1/responses": {"input": "Hello"},
}
# Other fields of a request, none of which may weaken the policy.
SHAPES: tuple[tuple[str, Json], ...] = (
    ("/v1/completions", {"prompt": ["Hello", "x"], "n": 2}),
    ("/v1/completions", {"echo": True, "logprobs": 2, "max_tokens": 0}),
    ("/v1/completions", {"logprobs": 5, "seed": 1, "logit_bias": {"1": -100}}),
    ("/v1/chat/completions", {"n": 2, "stream": True, "stream_options": {"include_usage": True}}),
    ("/v1/chat/completions", {"logprobs": True, "top_logprobs": 5, "max_completion_tokens": 1}),
    ("/v1/completions", {"compare": True}),
    ("/v1/completions", {"prompt_logprobs": 1, "max_tokens": 0, "return_token_ids": True}),
    ("/v1/completions", {"structured_outputs": {"choice": ["x"]}, "stream": True}),
    ("/v1/chat/completions", {"continue_final_message": False, "stop_token_ids": [1]}),
    ("/v1/chat/completions", {"compare": True, "stream": True}),
    ("/v1/responses", {"stream": True, "instructions": "Hi", "top_logprobs": 1}),
    ("/v1/responses", {"compare": True}),
)


def asks(digests: dict[str, str]) -> Iterator[tuple[Kind, Json]]:
    """Yield requests' fields, each with its kind; the default steering is "maps" at 0.5."""
    maps, other = f"sha256:{digests['maps']}", f"sha256:{digests['other']}"
    same: tuple[object, ...] = (
        *(MAPS, [MAPS], {**MAPS, "intervention": maps}, {**MAPS, "intervention": "same"}),
        *({**MAPS, "positions": "all"}, {"intervention": "maps", "strength": 5e-1}),
    )
    others: tuple[object, ...] = (
        *({"intervention": "maps"}, {**MAPS, "strength": 0.49}, {**MAPS, "strength": 1e-9}),
        *({**MAPS, "strength": -0.5}, {**MAPS, "positions": "prompt"}),
        *({**MAPS, "positions": "generated"}, {**MAPS, "intervention": "other"}),
        *({**MAPS, "intervention": other}, HEAD, {**HEAD, "eta": 0}, {**HEAD, "iterations": 0}),
        *([MAPS, MAPS], [MAPS, HEAD], [HEAD, MAPS], [MAPS, NO_MAPS], [NO_HEAD, MAPS]),
    )
    nothing: tuple[object, ...] = (
        *(
            NO_MAPS,
            [NO_MAPS],
            {**MAPS, "strength": -0.0},
            {**MAPS, "strength": 1e-300},
            {**NO_MAPS, "intervention": maps},
        ),
        *({**NO_MAPS, "intervention": "other"}, NO_HEAD, [NO_MAPS, NO_HEAD, NO_MAPS]),
        {"intervention": "head", "iterations": 0, "direction_scale": 0},
    )
    wrong: tuple[object, ...] = (
        *({}, "", "maps", "none", 0, 1, True, False, [None], [[]], [{}], [[MAPS]], {"strength": 0}),
        *({"intervention": None}, {"intervention": ""}, {"intervention": "none"}),
        *({"intervention": "MAPS"}, {"intervention": " maps"}, {"intervention": "../maps"}),
        *({"intervention": "sha256:"}, {"intervention": f"sha256:{'0' * 64}"}),
        *({"intervention": maps.upper()}, {"intervention": maps[:-1]}, {"intervention": [MAPS]}),
        *({**MAPS, "strength": 7}, {**MAPS, "strength": "0"}, {**MAPS, "strength": None}),
        *({**MAPS, "eta": 0}, {**MAPS, "policy": "optional"}, {**MAPS, "positions": "none"}),
        *([MAPS] * 5, [MAPS, None], [MAPS, {"intervention": "unknown"}], {"a": MAPS}),
    )
    by_field: dict[Kind, tuple[object, ...]] = {
        "same": same,
        "other": others,
        "nothing": nothing,
        "wrong": wrong,
        "none": (None, []),
    }
    for kind, values in by_field.items():
        for value in values:
            yield kind, {"steering": value}
    for fields in ({}, {"user": "steering: null"}):
        yield "default", {**fields}
    for suffix in ("maps", "other", "head", other, maps):
        yield "other", {"model": f"tiny+{suffix}"}
    for model in ("tiny+", "+maps", "tiny+maps+other", "tiny+none", "tiny+null", "Tiny", "tiny "):
        yield "wrong", {"model": model}
    for value in (None, [], MAPS, NO_MAPS):
        yield "wrong", {"model": "tiny+maps", "steering": value}
    for name in ("Steering", "steering ", "extra_body", "default_steering", "steering_policy"):
        yield "wrong", {name: None if name[0] in "Ss" else {"steering": None}}


@dataclass
class Recorder:
    """Replaces an engine's `submit`: records all requests, and answers each with one token."""

    submitted: list[Request] = field(default_factory=list)

    async def submit(self, requests: Sequence[Request]) -> list[Generation]:
        self.submitted.extend(requests)
        return [Answer((_output(each),)) for each in requests]

    def take(self) -> list[Request]:
        """Return the requests submitted since the last call."""
        taken, self.submitted = self.submitted, []
        return taken


@dataclass
class Answer(ScriptedGeneration):
    """A generation of one token with the log-probabilities asked for; it may have a follower."""

    async def follow(self, request: Request) -> Generation:
        return Answer((_output(request),))


def _output(request: Request) -> StepOutput:
    scored = TokenLogprobs(ScoredToken(0, "x", b"x", -1.0), top=(), rank=1)
    sampling = request.sampling
    places = len(request.prompt) - sampling.prompt_logprobs_from
    return StepOutput(
        (1,),
        "x",
        logprobs=(scored,) if sampling.logprobs is not None else (),
        prompt_logprobs=(scored,) * places if sampling.prompt_logprobs is not None else (),
        finish_reason="stop",
    )


@dataclass(frozen=True)
class Server:
    """An application under one policy, with the recorder of what its engine is asked for."""

    policy: str
    default: tuple[Edit, ...]
    client: httpx.AsyncClient
    recorder: Recorder

    async def ask(self, path: str, fields: Json) -> tuple[httpx.Response, list[Request]]:
        """Send a request; assert that its answer keeps the policy and says what was applied."""
        body = {"model": "tiny", **ENDPOINTS[path], **fields}
        response = await self.client.post(path, json=body)
        submitted = self.recorder.take()
        if response.status_code == 200:
            assert submitted, fields
            self._check(response, submitted, fields)
        else:
            assert 400 <= response.status_code < 500, (fields, response.text)
            assert error_of(response)
            assert not submitted, fields
        return response, submitted

    def _check(self, response: httpx.Response, submitted: list[Request], fields: Json) -> None:
        for request in submitted:
            if self.policy == "locked":
                assert request.edits == self.default, fields
            if self.policy == "required":
                assert request.effective_edits, fields
        if not fields.get("compare"):
            assert len({request.edits for request in submitted}) == 1
        told = _echo(response)
        assert [(item["digest"], item["settings"]) for item in told] == [
            (edit.digest, asdict(edit.settings)) for edit in submitted[0].edits
        ]


def _echo(response: httpx.Response) -> list[Json]:
    """Return the field `steering` of the answer, or of the last chunk of a stream that has it."""
    if not response.headers["content-type"].startswith("text/event-stream"):
        whole: list[Json] = response.json()["steering"]
        return whole
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    bodies = [chunk.get("response", chunk) for chunk in chunks]
    told: list[list[Json]] = [body["steering"] for body in bodies if "steering" in body]
    return told[-1]


@pytest.fixture
def digests(
    registry: Registry, affine_artifact: WriteArtifact, reward_artifact: WriteArtifact
) -> dict[str, str]:
    """Store the interventions, and return their digests by name; "same" has the bytes of "maps"."""
    maps = affine_artifact("maps", limits={"strength": (-1, 1)})
    paths = {
        "maps": maps,
        "same": maps,
        "other": affine_artifact("other", seed=1),
        "head": reward_artifact("head"),
    }
    return {name: registry.add(path, name).digest for name, path in paths.items()}


class Serve:
    """Makes servers on one engine, whose `submit` is replaced by a recorder."""

    def __init__(
        self, engine: TorchEngine, registry: Registry, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self._engine = engine
        self._registry = registry
        self._recorder = Recorder()
        monkeypatch.setattr(engine, "submit", self._recorder.submit)
        self.apps: list[FastAPI] = []

    async def __call__(self, policy: str, default: object = MAPS) -> Server:
        app = build_app(
            self._engine, self._registry, steering_policy=policy, default_steering=default
        )
        self.apps.append(app)
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
        client = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        edits: tuple[Edit, ...] = ()
        if default is not None:
            server = Server("optional", (), client, self._recorder)
            _, [request] = await server.ask("/v1/completions", {})
            edits = request.edits
        return Server(policy, edits, client, self._recorder)


@pytest.fixture
def serve(
    chat_engine: TorchEngine,
    registry: Registry,
    digests: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> Serve:
    return Serve(chat_engine, registry, monkeypatch)


def expected(policy: str, kind: Kind) -> tuple[int | None, str | None]:
    """Return the status (None: any but 200) and the error code (None: any) of a kind of request."""
    if kind == "wrong":
        return None, None
    if policy == "locked" and kind not in ("default", "same"):
        return 403, "steering_locked"
    if policy == "required" and kind in ("none", "nothing"):
        return 400, "steering_required"
    return 200, None


async def test_every_endpoint_that_generates_is_in_the_matrix(serve: Serve) -> None:
    await serve("optional")
    posts = {
        route.path
        for route in serve.apps[0].routes
        if isinstance(route, APIRoute) and "POST" in (route.methods or ())
    }
    # These run no model.
    assert posts - {"/v1/interventions", "/tokenize", "/detokenize"} == set(ENDPOINTS)


@pytest.mark.parametrize("policy", ["optional", "required", "locked"])
async def test_policy_for_every_kind_of_request(
    serve: Serve, digests: dict[str, str], policy: str
) -> None:
    server = await serve(policy)
    assert [edit.digest for edit in server.default] == [digests["maps"]]
    # Each request is streamed at every other endpoint.
    for stream, (kind, fields) in zip(cycle((False, True)), asks(digests), strict=False):
        status, code = expected(policy, kind)
        for path, streamed in zip(ENDPOINTS, cycle((stream, not stream)), strict=False):
            response, submitted = await server.ask(path, {**fields, "stream": streamed})
            if status is None:
                assert response.status_code != 200, fields
                continue
            assert response.status_code == status, (fields, response.text)
            if code is not None:
                assert error_of(response)["code"] == code
            for request in submitted:
                same = request.edits == server.default
                assert same == (kind in ("default", "same")), fields
                assert bool(request.effective_edits) == (kind not in ("none", "nothing"))


@pytest.mark.parametrize("policy", ["optional", "required", "locked"])
async def test_whatever_else_is_asked_for(
    serve: Serve, digests: dict[str, str], policy: str
) -> None:
    server = await serve(policy)
    for path, shape in SHAPES:
        answered = 0
        for _, fields in asks(digests):
            response, submitted = await server.ask(path, {**shape, **fields})
            answered += response.status_code == 200
            # A comparison shows the base model's answer, so the other policies refuse it.
            if shape.get("compare"):
                assert policy == "optional" or not submitted
        assert answered or (shape.get("compare") and policy != "optional")


async def test_required_without_a_default(serve: Serve, digests: dict[str, str]) -> None:
    server = await serve("required", None)
    for path, (kind, fields) in zip(cycle(ENDPOINTS), asks(digests), strict=False):
        response, _ = await server.ask(path, fields)
        assert (response.status_code == 200) == (kind in ("same", "other")), fields


@pytest.mark.parametrize("policy", ["required", "locked"])
@pytest.mark.parametrize("form", ["digest", "stack", "head"])
async def test_defaults_of_every_form(
    serve: Serve, digests: dict[str, str], policy: str, form: str
) -> None:
    default: dict[str, object] = {
        "digest": {**MAPS, "intervention": f"sha256:{digests['maps']}"},
        "stack": [HEAD, MAPS],
        "head": {**HEAD, "iterations": 3},
    }
    server = await serve(policy, default[form])
    for path in ENDPOINTS:
        for fields in ({}, {"steering": default[form]}):
            _, [request] = await server.ask(path, fields)
            assert request.edits == server.default
    for path, (_, fields) in zip(cycle(ENDPOINTS), asks(digests), strict=False):
        await server.ask(path, fields)


@pytest.mark.parametrize("policy", ["required", "locked"])
@pytest.mark.parametrize("by_digest", [False, True])
async def test_policy_holds_after_names_move_or_go(
    serve: Serve,
    digests: dict[str, str],
    registry: Registry,
    affine_artifact: WriteArtifact,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    by_digest: bool,
) -> None:
    """The server's own refusal to move or delete the default's name is switched off here."""
    monkeypatch.setattr(interventions.changes, "check_default", lambda *_: None)
    reference = f"sha256:{digests['maps']}" if by_digest else "maps"
    server = await serve(policy, {**MAPS, "intervention": reference})
    for change in ("moved", "deleted"):
        for name in ("maps", "same"):
            if change == "moved":
                registry.add(affine_artifact("other", seed=1), name)
            else:
                registry.delete(name)
        for path in ENDPOINTS:
            _, [request] = await server.ask(path, {})
            assert request.edits == server.default
            response, submitted = await server.ask(path, {"steering": MAPS})
            assert (response.status_code == 200) == (policy == "required" and change == "moved")
            assert all(request.edits[0].digest == digests["other"] for request in submitted)
        for path, (_, fields) in zip(cycle(ENDPOINTS), asks(digests), strict=False):
            await server.ask(path, fields)


@pytest.mark.parametrize("policy", ["required", "locked"])
async def test_ambiguous_bodies_are_refused(serve: Serve, policy: str) -> None:
    """A parser might silently take one of two equal keys, or NaN for a number."""
    server = await serve(policy)
    for path, fields in ENDPOINTS.items():
        start = json.dumps({"model": "tiny", **fields})[:-1]
        for rest in (
            f'"steering": {json.dumps(MAPS)}, "steering": null',
            f'"steering": null, "steering": {json.dumps(MAPS)}',
            '"steering": null, "model": "tiny+maps"',
            '"steering": {"intervention": "maps", "strength": 0.5, "strength": 0}',
            '"steering": {"intervention": "maps", "strength": NaN}',
            '"steering": {"intervention": "maps", "strength": 1e-400}',
            '"ste\\u0065ring": null',
        ):
            response = await server.client.post(
                path,
                content=f"{start}, {rest}}}",
                headers={"Content-Type": "application/json"},
                params={"steering": "null"},
            )
            assert 400 <= response.status_code < 500, rest
            assert error_of(response)
            assert not server.recorder.take()
        response = await server.client.post(
            path,
            json={"model": "tiny", **fields},
            params={"steering": "null", "model": "tiny+head"},
        )
        assert response.status_code == 200
        assert [request.edits for request in server.recorder.take()] == [server.default]
