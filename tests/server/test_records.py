"""Records of requests, and the sink that only some servers have."""

import subprocess
import sys

import pytest

from server.config import ConfigurationError
from server.records import load_trace_sink


def test_without_the_extra_the_endpoint_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "server.tracing", raising=False)
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    with pytest.raises(ConfigurationError, match=r"steerserve\[otel\]"):
        load_trace_sink("http://localhost:4318", with_content=False)


def test_another_module_that_is_missing_is_not_blamed_on_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "server.tracing", None)
    with pytest.raises(ModuleNotFoundError, match=r"server\.tracing"):
        load_trace_sink("http://localhost:4318", with_content=False)


@pytest.mark.parametrize(
    "endpoint",
    ["localhost:4318", "ftp://x", "http://", "http://x:port", "http://[", "http://x/?a=b", "grpc"],
)
def test_an_endpoint_that_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(ConfigurationError, match="http://localhost:4318"):
        load_trace_sink(endpoint, with_content=False)


def test_nothing_imports_opentelemetry_unless_it_is_asked_for() -> None:
    code = (
        "import sys, server.logs, server.records; "
        "print([name for name in sys.modules if 'opentelemetry' in name])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[]\n"
