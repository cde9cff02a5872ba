"""Tests where the packages are imported from."""

from pathlib import Path

import pytest

import interventions
import server
import steering

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("package", [server, interventions, steering])
def test_packages_are_imported_from_this_repository(package: object) -> None:
    """Other distributions may have packages of these common names, which must not be imported."""
    file = getattr(package, "__file__", None)
    assert file is not None
    assert Path(file).is_relative_to(ROOT)
