"""Fuzz tests: no input gets a 5xx or changes later answers, and errors come in the envelope.

Each kind of input gets a few hundred mutations, the same in every run. Faults that longer runs
found have tests of their own elsewhere; these tests find what the next change breaks.
"""

import hashlib
import json
import random
from pathlib import Path
from typing import Final
from urllib.parse import quote

import httpx
import pytest

from interventions.registry import Registry
from tests.artifact_samples import with_header
from tests.conftest import WriteArtifact
from tests.mutations import Json, mutated_bytes, mutated_json, spelled
from tests.serving import SAMPLING_FIELDS, bytes_of, complete, error_of, push, text_of, user

BODIES: Final = 800
ARTIFACTS: Final = 600
REFERENCES: Final = 200

COMPLETION: Final[Json] = {
    **SAMPLING_FIELDS,
    "model": "tiny",
    "prompt": ["Hello", "x"],
    "n": 2,
    "echo": True,
    "logprobs": 2,
    "stream": False,
    "stream_options": None,
    "steering": [{"intervention": "maps", "strength": 0.5}, {"intervention": "head", "eta": 0.1}],
    "compare": True,
    "user": "somebody",
}
CHAT: Final[Json] = {
    **SAMPLING_FIELDS,
    "model": "tiny",
    "messages": [
        {"role": "system", "content": "Be brief."},
        user([{"type": "text", "text": "Hello"}, {"type": "text", "text": "!"}], name="ann"),
        {"role": "assistant", "content": "Hi", "refusal": None, "tool_calls": []},
        user("x"),
    ],
    "logprobs": True,
    "top_logprobs": 2,
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "none",
    "steering": {"intervention": "maps", "positions": "generated"},
    "stream_options": {"include_usage": True},
    "stream": True,
}


def check(response: httpx.Response, what: object) -> None:
    """Assert that the answer is good, or a 4xx in the error envelope."""
    assert response.status_code < 500, (response.text, what)
    if response.status_code >= 300:
        error_of(response)


@pytest.mark.parametrize("seed", range(2))
async def test_bodies(
    chat_client: httpx.AsyncClient,
    affine_artifact: WriteArtifact,
    reward_artifact: WriteArtifact,
    seed: int,
) -> None:
    chance = random.Random(seed)
    await push(chat_client, affine_artifact("maps"))
    await push(chat_client, reward_artifact("head"))
    before = await text_of(chat_client)
    answered = 0
    headers = {"Content-Type": "application/json"}
    for _ in range(BODIES // 2):
        path, valid = chance.choice(
            (("/v1/completions", COMPLETION), ("/v1/chat/completions", CHAT))
        )
        body = spelled(mutated_json(valid, chance), chance)
        response = await chat_client.post(path, content=body, headers=headers)
        check(response, body)
        answered += response.status_code == 200
    assert 0 < answered < BODIES // 2, "some are right, and others wrong"
    assert await text_of(chat_client) == before


@pytest.mark.parametrize("kind", ["affine", "reward"])
async def test_artifacts(
    client: httpx.AsyncClient,
    affine_artifact: WriteArtifact,
    reward_artifact: WriteArtifact,
    registry: Registry,
    tmp_path: Path,
    kind: str,
) -> None:
    chance = random.Random(kind)
    write = affine_artifact if kind == "affine" else reward_artifact
    valid = bytes_of(write("sample"))
    await push(client, affine_artifact("kept", seed=1))
    before, stored = await text_of(client), files(tmp_path)
    for _ in range(ARTIFACTS // 2):
        content = _mutated_artifact(valid, chance)
        response = await client.post("/v1/interventions", files={"file": ("x", content)})
        check(response, content[:3000])
        if response.status_code >= 300:
            assert files(tmp_path) == stored, "something was stored"
            continue
        body = response.json()
        assert body["digest"] == hashlib.sha256(content).hexdigest()
        # Its numbers may be too large to steer with: the request then gets a 4xx.
        steering = {"intervention": body["name"]}
        check(await complete(client, steering=steering), content[:3000])
        if body["name"] != "kept":
            assert (await client.delete(f"/v1/interventions/{body['name']}")).status_code == 200
        stored = files(tmp_path)
    assert "kept" in {entry.name for entry in registry.entries()}
    assert await text_of(client) == before


def _mutated_artifact(valid: bytes, chance: random.Random) -> bytes:
    """Return the artifact with a mutation of any byte, its header's JSON, or its manifest."""
    length = int.from_bytes(valid[:8], "little")
    header, data = valid[8 : 8 + length], valid[8 + length :]
    match chance.randrange(4):
        case 0:
            return mutated_bytes(valid, chance)
        case 1:
            return mutated_bytes(valid, chance, end=8 + length)
        case 2:
            return with_header(json.dumps(mutated_json(json.loads(header), chance)).encode(), data)
        case _:
            fields = json.loads(header)
            manifest = json.loads(fields["__metadata__"]["manifest"])
            fields["__metadata__"]["manifest"] = json.dumps(mutated_json(manifest, chance))
            return with_header(json.dumps(fields).encode(), data)


def files(root: Path) -> dict[str, bytes]:
    """Return the path and the bytes of every file in the registry's folder below `root`."""
    folder = root / "registry"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


async def test_references(
    client: httpx.AsyncClient, affine_artifact: WriteArtifact, registry: Registry
) -> None:
    chance = random.Random(0)
    pushed = await push(client, affine_artifact("maps"))
    for _ in range(REFERENCES):
        word = chance.choice(("maps", f"sha256:{pushed['digest']}", "../names/maps", "%00", "é😀"))
        reference = mutated_bytes(word.encode(), chance)
        if reference == b"maps":
            continue
        for method, ending in (("GET", ""), ("GET", "/artifact"), ("DELETE", "")):
            path = f"/v1/interventions/{quote(reference, safe='')}{ending}"
            check(await client.request(method, path), path)
    assert [entry.name for entry in registry.entries()] == ["maps"]
