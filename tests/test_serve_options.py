"""`steerserve serve`: every flag gets to what it is for."""

from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.main import get_command
from typer.testing import CliRunner

from server.__main__ import app
from server.cli import serve as command
from server.config import Settings
from server.engine.torch.build import EngineOptions
from server.engine.torch.engine import TorchEngine
from server.engine.torch.loader import LoadedModel
from server.lifecycle import Server
from tests.conftest import LoadTiny

OTHERS: dict[str, object] = {
    "model": "other/model",
    "dtype": "float32",
    "device_map": "auto",
    "threads": 3,
    "served_model_names": ("a", "b"),
    "host": "::1",
    "port": 9,
    "registry": Path("elsewhere"),
    "max_loaded_interventions": 4,
    "default_steering": {"intervention": "x"},
    "steering_policy": "required",
    "request_timeout": 1.5,
    "write_timeout": 2.5,
    "shutdown_timeout": 0.0,
    "max_model_len": 5,
    "max_waiting": 6,
    "max_batch_size": 7,
    "max_batch_tokens": 8,
    "kv_cache_gb": 0.5,
    "check_invariants": True,
}
KEYS = ("api_key", "admin_key")


def test_every_flag_sets_its_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    served: list[Settings] = []

    def keep(settings: Settings, _: Console) -> None:
        served.append(settings)

    monkeypatch.setattr(command, "_serve", keep)
    arguments = [
        *("--model", "other/model", "--engine", "torch", "--dtype", "float32"),
        *("--device-map", "auto", "--threads", "3", "--served-model-name", "a", "b"),
        *("--host", "::1", "--port", "9", "--api-key", "k", "--admin-key", "l"),
        *("--registry", "elsewhere", "--max-loaded-interventions", "4"),
        *("--default-steering", '{"intervention": "x"}', "--steering-policy", "required"),
        *("--request-timeout", "1.5", "--write-timeout", "2.5", "--shutdown-timeout", "0"),
        *("--max-model-len", "5", "--max-waiting", "6", "--max-batch-size", "7"),
        *("--max-batch-tokens", "8", "--kv-cache-gb", "0.5", "--check-invariants"),
    ]
    shown = CliRunner().invoke(app, ["serve", *arguments])
    assert shown.exit_code == 0, shown.output
    [settings] = served
    assert {name: getattr(settings, name) for name in OTHERS} == OTHERS
    assert [getattr(settings, key).get_secret_value() for key in KEYS] == ["k", "l"]
    flags = {parameter.name for parameter in get_command(app).commands["serve"].params}  # type: ignore[attr-defined]
    assert flags - {"engine", "served_model_name", "more_names", *KEYS} <= OTHERS.keys()


@pytest.mark.parametrize("died", [False, True])
def test_the_settings_get_to_model_and_engine(
    load_tiny: LoadTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, died: bool
) -> None:
    device_maps: list[str] = []
    engines: list[EngineOptions] = []

    def load(*_: object, device_map: str) -> LoadedModel:
        device_maps.append(device_map)
        return load_tiny()

    def start(loaded: LoadedModel, source: object, options: EngineOptions) -> TorchEngine:
        engines.append(options)
        return TorchEngine(loaded, lambda _: {}, options)

    def run(server: Server) -> None:
        server.engine_died = died

    monkeypatch.setattr(command, "load_model", load)
    monkeypatch.setattr(command, "TorchEngine", start)
    monkeypatch.setattr(Server, "run", run)
    settings = Settings(
        model="tiny",
        registry=tmp_path,
        device_map="auto",
        check_invariants=True,
        max_batch_size=3,
        kv_cache_gb=0.01,
    )
    if died:
        with pytest.raises(typer.Exit) as caught:
            command._serve(settings, Console(quiet=True))
        assert caught.value.exit_code == 1
    else:
        command._serve(settings, Console(quiet=True))
    assert device_maps == ["auto"]
    [options] = engines
    assert (options.check_invariants, options.max_batch_size) == (True, 3)
