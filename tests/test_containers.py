"""The container files: what can be told without a daemon. See docs/observability.md."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.config import Settings
from server.environment import variable_name
from server.variables import CACHE
from tests.prometheus import tool

ROOT = Path(__file__).parent.parent
DOCKER = ROOT / "docker"
HADOLINT = Path(sys.executable).parent / "hadolint"
SCRIPT = DOCKER / "with-admin-key.sh"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load((DOCKER / "compose.yaml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def with_admin_key(folder: Path, **env: str) -> str:
    """Run the script; returns the key that its command was given."""
    ran = subprocess.run(
        [SCRIPT, "sh", "-c", 'printf %s "$STEERSERVE_ADMIN_KEY"'],
        env={"PATH": os.environ["PATH"], "STEERSERVE_ADMIN_KEY_PATH": str(folder / "key"), **env},
        capture_output=True,
        text=True,
        check=True,
        timeout=30,
    )
    return ran.stdout


def test_an_admin_key_is_made_once_and_kept_from_others(tmp_path: Path) -> None:
    key = with_admin_key(tmp_path)
    assert re.fullmatch(r"[!-~]{40,}", key)
    assert Settings(admin_key=key).admin_key is not None  # type: ignore[arg-type]
    assert with_admin_key(tmp_path) == key
    assert (tmp_path / "key").stat().st_mode & 0o077 == 0
    assert [path.name for path in tmp_path.iterdir()] == ["key"]
    other = tmp_path / "other"
    other.mkdir()
    assert with_admin_key(other) != key


def test_an_admin_key_that_is_given_is_kept(tmp_path: Path) -> None:
    assert with_admin_key(tmp_path, STEERSERVE_ADMIN_KEY="given") == "given"
    assert with_admin_key(tmp_path, STEERSERVE_ADMIN_KEY="") != ""
    assert with_admin_key(tmp_path, STEERSERVE_ADMIN_KEY="given") == "given"


def test_an_admin_key_that_is_given_by_file_is_the_only_one(tmp_path: Path) -> None:
    assert with_admin_key(tmp_path, STEERSERVE_ADMIN_KEY_FILE="/run/secrets/admin") == ""
    assert with_admin_key(tmp_path, STEERSERVE_ADMIN_KEY_FILE="") != ""


def test_everything_that_is_mounted_or_built_exists() -> None:
    for name, service in SERVICES.items():
        for volume in service.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).exists(), (name, source)
            else:
                assert source in COMPOSE["volumes"], (name, source)
    assert (DOCKER / SERVICES["steerserve"]["build"] / "Dockerfile").is_file()
    assert set(COMPOSE["volumes"]) == {"data", "cache", "prometheus"}


def test_images_are_pinned_and_ports_are_this_machines_only() -> None:
    for name, service in SERVICES.items():
        if service["image"] != "steerserve":
            assert re.search(r":v?\d+\.\d+\.\d+$", service["image"]), name
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), name


def test_services_wait_for_healthy_ones() -> None:
    for name, service in SERVICES.items():
        for other, wanted in service.get("depends_on", {}).items():
            assert wanted["condition"] == "service_healthy", name
            checked = SERVICES[other].get("healthcheck", {}).get("test")
            assert checked or ("build" in SERVICES[other] and "HEALTHCHECK" in DOCKERFILE), other


def test_every_variable_of_the_server_is_a_setting_or_its_own() -> None:
    settings = {variable_name(*item) for item in Settings.model_fields.items()}
    named = set(SERVICES["steerserve"]["environment"])
    named |= set(re.findall(r"(STEERSERVE_\w+)=", DOCKERFILE))
    assert len(named) >= 6
    assert named <= settings | {CACHE.name}


def test_the_image_gets_every_file_that_it_copies() -> None:
    kept = set(re.findall(r"^!(\S+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    sources = [
        source
        for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, re.MULTILINE)
        for source in [word for word in line.split() if not word.startswith("--")][:-1]
    ]
    assert set(sources) == kept
    assert all((ROOT / source).exists() for source in sources)


@pytest.mark.skipif(not HADOLINT.exists(), reason="hadolint has no wheel for this machine")
def test_the_dockerfile_is_clean() -> None:
    run(HADOLINT, ROOT / "Dockerfile")


def test_compose_takes_its_file() -> None:
    run(tool("docker-compose"), "-f", DOCKER / "compose.yaml", "config", "--quiet")


def run(*command: str | Path) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
