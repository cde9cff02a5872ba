"""Tests of the settings: where their values come from, and which values are refused."""

from pathlib import Path

import pytest
from pydantic import JsonValue, SecretStr, ValidationError

from server.config import Settings


def problem(**fields: object) -> str:
    """Return the message with which these settings are refused."""
    with pytest.raises(ValidationError) as caught:
        Settings.model_validate(fields)
    return str(caught.value)


def test_flags_come_before_the_environment_and_it_before_the_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("STEERSERVE_PORT", "9000")
    monkeypatch.setenv("STEERSERVE_HOST", "0.0.0.0")
    settings = Settings(port=9001)
    assert (settings.port, settings.host, settings.max_batch_size) == (9001, "0.0.0.0", 64)


def test_an_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSERVE_ADMIN_KEY", "")
    monkeypatch.setenv("STEERSERVE_PORT", "")
    settings = Settings()
    assert settings.admin_key is None
    assert settings.port == 8000


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(ValidationError):
        Settings().port = 1


def test_a_misspelt_setting_is_refused() -> None:
    assert "prot" in problem(prot=1)


def test_attention_is_one_of_three() -> None:
    assert Settings().attention == "automatic"
    assert "attention" in problem(attention="paged")


def test_served_names_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSERVE_SERVED_MODEL_NAME", "a, org/b  c")
    assert Settings().served_names == ("a", "org/b", "c")


def test_served_name_by_default(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert Settings().served_names == ("smollm2-135m-instruct",)
    assert Settings(model="org/model").served_names == ("org/model",)
    assert Settings(model=str(folder)).served_names == ("my-model",)


@pytest.mark.parametrize("names", [("a+b",), ("",), ("a b",), ("a", "a")])
def test_served_names_that_would_be_ambiguous(names: tuple[str, ...]) -> None:
    assert "served model name" in problem(served_model_names=names)


def test_default_steering_is_json(monkeypatch: pytest.MonkeyPatch) -> None:
    expected: dict[str, JsonValue] = {"intervention": "x", "strength": 0.5}
    assert Settings(default_steering=expected).default_steering == expected
    monkeypatch.setenv("STEERSERVE_DEFAULT_STEERING", '[{"intervention": "x", "strength": 0.5}]')
    assert Settings().default_steering == [expected]


@pytest.mark.parametrize("text", ["detox", "{", '"detox"', "[1]"])
def test_default_steering_that_is_not_json(text: str) -> None:
    assert "must be a JSON object such as" in problem(default_steering=text)


def test_threads_that_no_machine_has_are_refused() -> None:
    assert "threads" in problem(threads=0)
    assert "threads" in problem(threads=10**9)


def test_every_running_request_must_fit_into_a_step() -> None:
    assert "max_batch_tokens (8)" in problem(max_batch_tokens=8, max_batch_size=16)


@pytest.mark.parametrize("value", [-1, 0, float("inf"), float("nan")])
@pytest.mark.parametrize(
    "field",
    [
        *("body_timeout", "keep_alive", "request_timeout", "write_timeout"),
        *("shutdown_timeout", "shutdown_keep_alive"),
    ],
)
def test_times_that_mean_nothing(field: str, value: float) -> None:
    if field.startswith("shutdown_") and value == 0:
        assert getattr(Settings.model_validate({field: 0}), field) == 0
    else:
        assert field in problem(**{field: value})


def test_flags_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not Settings().check_invariants
    monkeypatch.setenv("STEERSERVE_CHECK_INVARIANTS", "1")
    monkeypatch.setenv("STEERSERVE_DEVICE_MAP", "auto")
    assert Settings().check_invariants
    assert Settings().device_map == "auto"


@pytest.mark.parametrize("default", [None, [], {}])
def test_locked_needs_a_default(default: object) -> None:
    message = problem(steering_policy="locked", default_steering=default)
    assert "`locked` needs a default steering" in message


@pytest.mark.parametrize("key", ["", "two words", "ümlaut", "line\nbreak"])
def test_a_key_that_no_header_can_carry(key: str) -> None:
    assert "a key is" in problem(api_key=key)


def test_keys_are_never_shown() -> None:
    settings = Settings.model_validate({"api_key": "secret-1", "admin_key": "secret-2"})
    assert "secret-" not in repr(settings)
    assert "secret-" not in problem(api_key="secret-1 secret-2")


@pytest.mark.parametrize("name", ["api_key", "admin_key", "metrics_key"])
@pytest.mark.parametrize("content", [b"the-key", b"the-key\n", b"  the-key\r\n\n"])
def test_a_key_may_be_in_a_file(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    settings = Settings.model_validate({f"{name}_file": path})
    assert getattr(settings, name) == SecretStr("the-key")
    assert "the-key" not in repr(settings)


def test_a_key_file_in_the_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "key").write_text("the-key")
    monkeypatch.setenv("STEERSERVE_ADMIN_KEY_FILE", "~/key")
    assert Settings().admin_key == SecretStr("the-key")
    assert "cannot be read" in problem(api_key_file="~nobody-of-this-name/key")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b" \n", "is empty"),
        (b"secret one\nsecret two\n", "does not hold one key"),
        ("schlüssel-secret".encode(), "does not hold one key"),
        (b"\0secret", "does not hold one key"),
        (b"secret" * 1000, "does not hold one key"),
        (None, "cannot be read: Is a directory"),
    ],
)
def test_a_file_without_a_key_ends_the_start(
    content: bytes | None, told: str, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    message = problem(api_key_file=path)
    assert f"the file of api_key_file, {path}, {told}" in message
    assert "secret" not in message
    assert "cannot be read: No such file" in problem(admin_key_file=tmp_path / "none")


def test_a_key_that_is_given_twice_ends_the_start(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_text("secret-1")
    message = problem(api_key="secret-2", api_key_file=path)
    assert "api_key and api_key_file are both given" in message
    assert "secret" not in message
    settings = Settings.model_validate({"api_key": "secret-2", "admin_key_file": path})
    assert settings.admin_key == SecretStr("secret-1")


def test_hosts_and_origins_are_kept_as_requests_name_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERSERVE_ALLOWED_HOST", "LLM.example.org, [::2] 10.0.0.1")
    monkeypatch.setenv("STEERSERVE_CORS_ORIGIN", "HTTPS://Chat.example.org:443,tauri://localhost")
    settings = Settings()
    assert settings.allowed_hosts == ("llm.example.org", "::2", "10.0.0.1")
    assert settings.cors_origins == ("https://chat.example.org", "tauri://localhost")


def test_every_origin_needs_an_api_key(tmp_path: Path) -> None:
    assert "needs an API key" in problem(cors_origins=["*"])
    assert "needs an API key" in problem(cors_origins=["http://a", "*"], admin_key="k")
    (tmp_path / "key").write_text("k")
    for key in ({"api_key": "k"}, {"api_key_file": tmp_path / "key"}):
        assert Settings.model_validate({"cors_origins": ["*"], **key}).cors_origins == ("*",)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.9.1", True),
        ("::1", True),
        ("localhost", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.1.2", False),
        ("localhost.example.org", False),
    ],
)
def test_which_hosts_are_loopback(host: str, loopback: bool) -> None:
    assert Settings(host=host).binds_loopback is loopback


def test_registry_lies_in_the_users_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert Settings().registry_path == tmp_path / ".local/share/steerserve/registry"
    monkeypatch.setenv("XDG_DATA_HOME", "not/absolute")
    assert Settings().registry_path == tmp_path / ".local/share/steerserve/registry"
    monkeypatch.setenv("XDG_DATA_HOME", "/data")
    assert Settings().registry_path == Path("/data/steerserve/registry")
    assert Settings(registry=Path("~/r")).registry_path == tmp_path / "r"
