"""Test of a real server that is killed by SIGKILL in the middle of an upload."""

import contextlib
import hashlib
import random
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx

from interventions.artifact import artifact_digest, write_artifact
from server.engine.torch.model.loader import load_model
from tests.manifests import manifest_of
from tests.processes import steerserve
from tests.tiny import random_maps

KILLS = 3


def slowly(body: bytes, seconds: float) -> Iterator[bytes]:
    """Yield a request body in pieces over `seconds`, so that a kill may come anywhere in it."""
    pieces = 40
    size = -(-len(body) // pieces)
    for start in range(0, len(body), size):
        yield body[start : start + size]
        time.sleep(seconds / pieces)


def upload_slowly(url: str, path: Path, seconds: float) -> None:
    request = httpx.Request("POST", url, files={"file": (path.name, path.read_bytes())})
    headers = {"content-type": request.headers["content-type"]}
    with contextlib.suppress(httpx.TransportError):  # the server was killed
        httpx.post(url, content=slowly(request.read(), seconds), headers=headers, timeout=20)


def test_a_killed_server_opens_again_with_the_old_state_or_the_new(
    tmp_path: Path, tiny_folders: Mapping[str, Path]
) -> None:
    model = str(tiny_folders["llama"])
    description = load_model(model, "float32").description
    versions = []
    for seed in range(KILLS + 1):
        parameters = random_maps(seed)
        versions.append(tmp_path / f"{seed}.safetensors")
        write_artifact(versions[-1], manifest_of(parameters, description, "x"), parameters)
    digests = [artifact_digest(path) for path in versions]
    rng = random.Random(0)
    stored = None
    for kill in range(KILLS + 1):
        with steerserve(tmp_path, "--model", model, "--dtype", "float32") as server:
            url = f"{server.url}/v1/interventions"
            if stored is None:
                upload_slowly(url, versions[0], 0)
                stored = digests[0]
            shown = httpx.get(f"{url}/x").json()
            assert shown["digest"] in {stored, digests[kill]}
            stored = shown["digest"]
            data = httpx.get(f"{url}/x/artifact").content
            assert hashlib.sha256(data).hexdigest() == stored
            assert not list((tmp_path / "registry" / "tmp").iterdir())
            if kill < KILLS:
                upload = threading.Thread(target=upload_slowly, args=(url, versions[kill + 1], 0.3))
                upload.start()
                time.sleep(rng.uniform(0, 0.4))
                server.process.kill()
                server.process.wait()
                upload.join()
