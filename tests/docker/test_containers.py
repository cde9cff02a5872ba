"""Checks the Dockerfile and the compose files as far as that is possible without Docker."""

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
from tests.nginx import idle_seconds
from tests.prometheus import tool

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"
HADOLINT = Path(sys.executable).parent / "hadolint"
SCRIPT = DOCKER / "with-admin-key.sh"
DOCKERFILE = (ROOT / "Dockerfile").read_text()
COMPOSE_FILES = ("compose.yaml", "compose.replicas.yaml")

each_file = pytest.mark.parametrize("name", COMPOSE_FILES)


def read_compose(name: str) -> dict[str, Any]:
    made: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text())
    return made


def services_of(name: str) -> dict[str, dict[str, Any]]:
    """Read a file's services, merged with the services that they extend."""
    found = {}
    for service, own in read_compose(name)["services"].items():
        source = own.get("extends", {})
        taken = read_compose(source["file"])["services"][source["service"]] if source else {}
        found[service] = {**taken, **own}
        for key in ("environment", "volumes"):
            both = [part[key] for part in (taken, own) if key in part]
            if len(both) == 2:
                found[service][key] = (
                    both[0] | both[1] if key == "environment" else both[0] + both[1]
                )
    return found


def with_admin_key(folder: Path, **env: str) -> str:
    """Run the script; returns the admin key in the environment of its command."""
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


@each_file
def test_everything_that_is_mounted_or_built_exists(name: str) -> None:
    volumes = read_compose(name)["volumes"]
    for service, made in services_of(name).items():
        for volume in made.get("volumes", ()):
            source = volume.partition(":")[0]
            if source.startswith("."):
                assert (DOCKER / source).is_file() or (DOCKER / source).is_dir(), (service, source)
            else:
                assert source in volumes, (service, source)
        if "build" in made:
            assert (DOCKER / made["build"] / "Dockerfile").is_file()
    assert set(volumes) == {"data", "cache", "prometheus"}


@each_file
def test_images_are_pinned_and_ports_are_this_machines_only(name: str) -> None:
    for service, made in services_of(name).items():
        if made["image"] != "steerserve":
            assert re.search(r":v?\d+\.\d+\.\d+$", made["image"]), service
        for port in made.get("ports", ()):
            assert port.startswith("127.0.0.1:"), service


@each_file
def test_services_wait_for_healthy_ones(name: str) -> None:
    services = services_of(name)
    for service, made in services.items():
        for other, wanted in made.get("depends_on", {}).items():
            assert wanted["condition"] == "service_healthy", service
            checked = services[other].get("healthcheck", {}).get("test")
            assert checked or ("build" in services[other] and "HEALTHCHECK" in DOCKERFILE), other


@each_file
def test_every_variable_of_the_server_is_a_setting_or_its_own(name: str) -> None:
    settings = {variable_name(*item) for item in Settings.model_fields.items()}
    built = [service for service in services_of(name).values() if "build" in service]
    named = {variable for service in built for variable in service["environment"]}
    named |= set(re.findall(r"(STEERSERVE_\w+)=", DOCKERFILE))
    assert len(named) >= 6
    assert named <= settings | {CACHE.name}


def test_the_two_servers_are_told_the_same_and_share_one_folder() -> None:
    one, two = (services_of("compose.replicas.yaml")[f"steerserve-{place}"] for place in (1, 2))
    # The order of their start (`depends_on`) is the only difference allowed.
    assert {**two, "depends_on": None} == {**one, "depends_on": None}
    assert "data:/data" in one["volumes"]
    assert "STEERSERVE_REGISTRY=/data/registry" in DOCKERFILE
    assert "ports" not in one  # clients reach the servers only through nginx


def test_what_stands_before_the_servers_knows_them_and_their_times() -> None:
    services = services_of("compose.replicas.yaml")
    servers = {f"{name}:8000" for name, made in services.items() if "build" in made}
    assert len(servers) == 2
    listed = re.findall(r"^server (\S+)", (DOCKER / "nginx" / "servers.conf").read_text(), re.M)
    assert set(listed) == servers
    (scraped,) = yaml.safe_load((DOCKER / "prometheus" / "replicas.yml").read_text())[
        "scrape_configs"
    ]
    (targets,) = scraped["static_configs"]
    assert set(targets["targets"]) == servers
    last = float(services["steerserve-1"]["environment"]["STEERSERVE_SHUTDOWN_KEEP_ALIVE"])
    assert idle_seconds() < last < Settings().shutdown_timeout


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


@each_file
def test_compose_takes_its_file(name: str) -> None:
    run(tool("docker-compose"), "-f", DOCKER / name, "config", "--quiet")


def run(*command: str | Path) -> None:
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
