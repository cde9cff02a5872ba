"""Tests that the documentation agrees with the code."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from interventions.artifact import artifact_digest
from interventions.bundled import bundled_artifacts
from server.__main__ import app
from server.cli import limits_page as limits_page_module
from server.cli.limits_page import limits_page
from server.cli.options_page import options_page
from server.config import Settings
from server.environment import variable_name
from server.variables import OTHER_VARIABLES

ROOT = Path(__file__).parent.parent
# Files with STEERSERVE_ variables that the program does not read: examples of mistakes, and ones
# that Kubernetes sets.
WITH_WRONG_NAMES = ("test_serve_options.py", "test_variables.py", "options_page.py", "options.md")
DOCS = (
    "compatibility",
    "evaluating",
    "fit-your-own",
    "interventions",
    "limits",
    "observability",
    "options",
    "playground",
    "results",
    "scaling",
    "security",
    "serving",
    "structures",
    "tools",
)
README = (ROOT / "README.md").read_text()
SERVING = (ROOT / "docs" / "serving.md").read_text()
OPTIONS = (ROOT / "docs" / "options.md").read_text()
STRUCTURES = (ROOT / "docs" / "structures.md").read_text()


def test_structures_names_every_room_and_no_other() -> None:
    rooms = {
        str(path.parent.relative_to(ROOT))
        for package in ("server", "interventions", "steering")
        for path in (ROOT / package).rglob("__init__.py")
    }
    assert set(re.findall(r"\*\*`([^`]+)`\*\*", STRUCTURES)) == rooms


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in ("README.md", "CONTRIBUTING.md", "docs/observability.md"):
        text = (ROOT / page).read_text()
        named = set(re.findall(r"^\s*make ([a-z-]+)", text, re.MULTILINE))
        assert named
        assert named <= targets


@pytest.mark.parametrize(
    "page", ["evaluating", "fit-your-own", "serving", "interventions", "security", "scaling"]
)
def test_every_command_and_option_that_is_shown_exists(page: str) -> None:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    commands = re.findall(
        r"^(?:\$ |\.venv/bin/)?steerserve ((?:[^\\\n]|\\\n)+)", text, re.MULTILINE
    )
    assert commands
    runner = CliRunner()
    for line in commands:
        words = shlex.split(line.replace("\\\n", " "))
        name = words[: 2 if words[0] in ("fit", "import") else 1]
        shown = runner.invoke(app, [*name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
        assert shown.exit_code == 0, name
        for option in (word for word in words if word.startswith("--")):
            assert option in shown.output, f"{name} has no {option}"


def test_the_page_of_options_is_of_the_settings() -> None:
    remake = "remake docs/options.md: python -m server.cli.options_page > docs/options.md"
    assert options_page() == OPTIONS, remake


def test_the_page_of_limits_is_what_the_code_says() -> None:
    remake = "remake docs/limits.md: python -m server.cli.limits_page > docs/limits.md"
    assert limits_page() == (ROOT / "docs" / "limits.md").read_text(), remake
    named = set(vars(limits_page_module))
    for path in (ROOT / "server" / "api").glob("*.py"):
        for limit in re.findall(r"^(MAX_\w+): Final", path.read_text(), re.MULTILINE):
            assert limit in named or path.stem == "upload", limit


def test_every_setting_has_a_row_in_the_page_of_options() -> None:
    rows = [line for line in OPTIONS.splitlines() if line.startswith("| `--")]
    assert len(rows) == len(Settings.model_fields)
    for row, (name, field) in zip(rows, Settings.model_fields.items(), strict=True):
        flags, variable, _, default, description = row.strip("| ").split(" | ")
        flag = name.removesuffix("s") if field.default == () else name
        assert flags.split(", ")[0] == f"`--{flag.replace('_', '-')}`"
        assert variable == f"`STEERSERVE_{flag.upper()}`"
        assert description == " ".join((field.description or "").split())
        if field.default in (None, ()):
            assert default.strip() == ""
        else:
            given = Settings.model_validate({name: default.strip("`")})
            assert getattr(given, name) == field.default


def test_every_variable_anywhere_is_a_setting_or_in_the_table_of_others() -> None:
    settings = {variable_name(*item) for item in Settings.model_fields.items()}
    others = {variable.name for variable in OTHER_VARIABLES}
    used: set[str] = set()
    for place in (
        "server",
        "docker",
        "benchmarks",
        "tests",
        ".ci",
        "Dockerfile",
        "Makefile",
        "docs",
    ):
        for path in (ROOT / place).rglob("*") if (ROOT / place).is_dir() else [ROOT / place]:
            if path.suffix in (".pyc", ".png") or path.is_dir() or path.name in WITH_WRONG_NAMES:
                continue
            used.update(re.findall(r"\bSTEERSERVE_[A-Z_]*[A-Z]\b", path.read_text()))
    assert used <= settings | others
    for variable in OTHER_VARIABLES:
        assert f"| `{variable.name}` | {variable.description} |" in OPTIONS


def test_variables_that_are_no_settings_are_read_through_their_table() -> None:
    settings = {variable_name(*item) for item in Settings.model_fields.items()}
    for path in (ROOT / "server").rglob("*.py"):
        if path.name != "variables.py":
            assert set(re.findall(r'"(STEERSERVE_\w+)"', path.read_text())) <= settings, path


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_setting_is_described_in_a_sentence(name: str) -> None:
    field = Settings.model_fields[name]
    # Excludes characters that are markup in a Markdown table or in the command's help.
    assert re.fullmatch(r"[A-Z][^|<>\[\]`]+\.", field.description or "")
    if field.default in (None, ()):
        assert "if unset, " in (field.description or "")


def test_the_output_that_is_shown_is_of_the_bundled_artifacts() -> None:
    bundled = {artifact_digest(path) for path in bundled_artifacts()}
    assert set(re.findall(r'"digest":"([0-9a-f]{64})"', SERVING)) == bundled
    [begins] = re.findall(r'"digest": "([0-9a-f]{8})…"', README)
    assert any(digest.startswith(begins) for digest in bundled)


@pytest.mark.parametrize("body", re.findall(r"-d '(\{.*?\})'", README + SERVING, re.DOTALL))
def test_every_body_that_is_shown_is_json(body: str) -> None:
    fields = json.loads(body)
    assert fields.keys() & {"prompt", "messages", "input"}


def test_every_link_to_a_file_leads_somewhere() -> None:
    pages = ("README.md", "CONTRIBUTING.md", *(f"docs/{name}.md" for name in DOCS))
    for page in pages:
        for target in re.findall(r"\]\(((?!https?:)[^)#]+)", (ROOT / page).read_text()):
            assert ((ROOT / page).parent / target).exists(), target
