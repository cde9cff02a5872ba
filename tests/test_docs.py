"""The documentation is held to the code."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from interventions.artifact import artifact_digest
from interventions.bundled import bundled_artifacts
from server.__main__ import app
from server.config import Settings

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
STRUCTURES = (ROOT / "docs" / "structures.md").read_text()


def test_structures_names_every_module_and_no_other() -> None:
    modules = {
        str(path.relative_to(ROOT))
        for package in ("server", "interventions", "steering")
        for path in (ROOT / package).rglob("*.py")
        if path.name != "__init__.py" or path.parent.name == "bundled"
    }
    assert set(re.findall(r"^\| `([^`]+)`", STRUCTURES, re.MULTILINE)) == modules


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md", "docs/observability.md"):
        text = (ROOT / page).read_text()
        named = set(re.findall(r"^\s*make ([a-z]+)", text, re.MULTILINE))
        assert named
        assert named <= targets


def test_every_command_and_option_in_the_readme_exists() -> None:
    commands = re.findall(r"^(?:\$ )?steerserve ((?:[^\\\n]|\\\n)+)", README, re.MULTILINE)
    assert commands
    runner = CliRunner()
    for line in commands:
        words = shlex.split(line.replace("\\\n", " "))
        name = words[: 2 if words[0] == "fit" else 1]
        shown = runner.invoke(app, [*name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert shown.exit_code == 0, name
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, f"{name} has no {option}"


def test_every_setting_has_a_flag_or_is_named_as_a_variable() -> None:
    serve = get_command(app).commands["serve"]  # type: ignore[attr-defined]
    flags = {parameter.name for parameter in serve.params}
    for field in Settings.model_fields:
        flag = "served_model_name" if field == "served_model_names" else field
        assert flag in flags or f"STEERSERVE_{field.upper()}" in README, field


def test_the_readmes_output_is_of_the_bundled_artifacts() -> None:
    shown = set(re.findall(r'"digest":"([0-9a-f]{64})"', README))
    assert shown == {artifact_digest(path) for path in bundled_artifacts()}


@pytest.mark.parametrize("body", re.findall(r"-d '(\{.*?\})'", README, re.DOTALL))
def test_every_body_in_the_readme_is_json(body: str) -> None:
    fields = json.loads(body)
    assert fields.get("prompt") or fields["messages"]


def test_every_link_to_a_file_leads_somewhere() -> None:
    for page in ("README.md", "CONTRIBUTING.md", "docs/structures.md", "docs/observability.md"):
        for target in re.findall(r"\]\(((?!https?:)[^)#]+)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), target
