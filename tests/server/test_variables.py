"""Tests of STEERSERVE_ variables that are no settings: known, Kubernetes's, and unknown ones."""

import pytest
from pydantic_settings import SettingsError

from server.config import Settings
from server.variables import OTHER_VARIABLES, UnknownVariableError, Variable, refuse_unknown

# Variables that the kubelet sets for services called "steerserve" and "steerserve-grafana".
KUBERNETES = {
    "STEERSERVE_SERVICE_HOST": "10.96.0.12",
    "STEERSERVE_SERVICE_PORT": "8000",
    "STEERSERVE_SERVICE_PORT_HTTP": "8000",
    "STEERSERVE_PORT": "tcp://10.96.0.12:8000",
    "STEERSERVE_PORT_8000_TCP": "tcp://10.96.0.12:8000",
    "STEERSERVE_PORT_8000_TCP_PROTO": "tcp",
    "STEERSERVE_PORT_8000_TCP_PORT": "8000",
    "STEERSERVE_PORT_8000_TCP_ADDR": "10.96.0.12",
    "STEERSERVE_GRAFANA_SERVICE_HOST": "10.96.0.13",
    "STEERSERVE_GRAFANA_PORT": "tcp://10.96.0.13:3000",
    "STEERSERVE_GRAFANA_PORT_3000_TCP": "tcp://10.96.0.13:3000",
}


def test_what_kubernetes_sets_is_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in KUBERNETES.items():
        monkeypatch.setenv(name, value)
    assert Settings().model_fields_set == set()
    assert Settings().port == 8000


def test_a_port_is_still_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSERVE_PORT", "9000")
    assert Settings().port == 9000


@pytest.mark.parametrize("variable", OTHER_VARIABLES, ids=lambda variable: variable.name)
def test_variables_that_are_no_settings_are_known(
    variable: Variable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(variable.name, raising=False)
    assert variable.read() is None
    monkeypatch.setenv(variable.name, "")
    assert variable.read() is None
    monkeypatch.setenv(variable.name, "x")
    assert variable.read() == "x"
    assert Settings().model_fields_set == set()


def test_an_unknown_variable_is_refused_whatever_else_is_given(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STEERSERVE_STEERING_POLCY", "locked")
    with pytest.raises(SettingsError, match="did you mean STEERSERVE_STEERING_POLICY"):
        Settings(port=1)
    monkeypatch.setenv("STEERSERVE_STEERING_POLCY", "")
    assert Settings(port=1).port == 1


def test_several_are_named_and_a_long_one_costs_no_time() -> None:
    long = "STEERSERVE_" + "A" * 100_000
    with pytest.raises(UnknownVariableError) as caught:
        refuse_unknown({long: "x", "STEERSERVE_PROT": "1", "PATH": "y"}, ["STEERSERVE_PORT"])
    message = str(caught.value)
    assert "did you mean STEERSERVE_PORT?" in message
    assert len(message) < 500
