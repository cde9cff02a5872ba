"""Checks the alert rules with promtool: their syntax and their unit tests."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.prometheus import FOLDER, tool

RULES = FOLDER / "rules" / "steerserve.yml"
TESTS = FOLDER / "tests" / "steerserve_test.yml"


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tool("promtool"), *map(str, arguments)], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize(
    ("command", "path"),
    [
        ("check config", FOLDER / "prometheus.yml"),
        ("check config", FOLDER / "replicas.yml"),
        ("check config", FOLDER / "local.yml"),
        ("check rules", RULES),
        ("test rules", TESTS),
    ],
)
def test_promtool_agrees(command: str, path: Path) -> None:
    ran = promtool(*command.split(), path)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_promtool_takes_the_example_of_a_key_for_metrics(tmp_path: Path) -> None:
    page = (FOLDER.parent.parent / "docs" / "observability.md").read_text()
    [example] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    key = tmp_path / "key"
    key.write_text("the-key")
    config = tmp_path / "prometheus.yml"
    config.write_text(example.replace("/run/secrets/steerserve-metrics-key", str(key)))
    ran = promtool("check", "config", config)
    assert ran.returncode == 0, ran.stdout + ran.stderr


@pytest.mark.parametrize(
    "path", [FOLDER / f"{name}.yml" for name in ("prometheus", "replicas", "local")]
)
def test_promtool_takes_the_lines_for_a_key_that_are_a_comment(path: Path, tmp_path: Path) -> None:
    text = re.sub(r"# (?=authorization:|  credentials_file:)", "", path.read_text())
    text = text.replace("rules/steerserve.yml", str(RULES))
    [scrape] = yaml.safe_load(text)["scrape_configs"]
    key = tmp_path / "key"
    key.write_text("the-key")
    config = tmp_path / "prometheus.yml"
    config.write_text(text.replace(scrape["authorization"]["credentials_file"], str(key)))
    ran = promtool("check", "config", config)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_a_broken_rule_would_be_found(tmp_path: Path) -> None:
    """Moves the bound of each rule far off, and expects the rule's unit test to fail."""
    text = RULES.read_text()
    moved = {
        "== 0)": "== 7)",
        "< 0.5)": "< -1)",
        ") > 5": ") > 5000",
        "[1m])) > 0": "[1m])) > 1000",
        "> 0.5)": "> 50)",
        "> 0.25)": "> 25)",
        "_seconds) > 60": "_seconds) > 60000",
        ") > 10": ") > 10000",
    }
    for bound, other in moved.items():
        assert bound in text
        text = text.replace(bound, other)
    (tmp_path / "rules.yml").write_text(text)
    tests = TESTS.read_text().replace("../rules/steerserve.yml", "rules.yml")
    (tmp_path / "test.yml").write_text(tests)
    ran = promtool("test", "rules", tmp_path / "test.yml")
    assert ran.returncode == 1
    failed = set(re.findall(r"alertname: ?(\w+)", ran.stdout + ran.stderr))
    assert failed == {rule["alert"] for rule in alerts()}


def alerts() -> list[dict[str, Any]]:
    return [
        rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
    ]


def test_every_alert_says_what_is_wrong_and_is_tested_both_ways() -> None:
    names = [alert["alert"] for alert in alerts()]
    assert len(set(names)) == len(names) > 0
    for alert in alerts():
        assert alert["labels"]["severity"] in ("critical", "warning")
        assert re.fullmatch(r"[1-9][0-9]*[sm]", alert["for"])
        assert set(alert["annotations"]) == {"summary", "description"}
    cases = [
        case
        for test in yaml.safe_load(TESTS.read_text())["tests"]
        for case in test.get("alert_rule_test", ())
    ]
    firing = {case["alertname"] for case in cases if case.get("exp_alerts")}
    quiet = {case["alertname"] for case in cases if not case.get("exp_alerts")}
    assert firing == quiet == set(names)
