"""What the server is told at start, resolved once: flags, then the environment, then defaults."""

import os
import re
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import (
    Field,
    JsonValue,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from server.environment import Environment
from server.hosts import ANY_ORIGIN, check_host, check_origin, is_loopback
from server.keys import is_key, with_keys_read
from server.toxicity.scorer import parse_spec

MIB = 1024 * 1024
EMBEDDED_MODEL_NAME = "smollm2-135m-instruct"

SteeringJson: TypeAlias = dict[str, JsonValue] | list[dict[str, JsonValue]]
SteeringPolicy: TypeAlias = Literal["optional", "required", "locked"]

_steering_json: TypeAdapter[SteeringJson | None] = TypeAdapter(SteeringJson | None)


class ConfigurationError(Exception):
    """The server cannot start as it was told to, with one sentence that says why."""


class Settings(BaseSettings):
    """The server's settings. One that is not given is read from the variable named as its option.

    Raises:
        pydantic.ValidationError: a value is of the wrong kind, or two contradict each other.
        pydantic_settings.SettingsError: a variable begins as steerserve's do and is none of them.
    """

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        # A message must be able to show the wrong value of any field but a key's.
        hide_input_in_errors=True,
        # The string below a field describes it, on the command line and in docs/options.md.
        use_attribute_docstrings=True,
    )

    model: str = Field(default="embedded", min_length=1)
    """Model to serve: embedded (a small one that comes along), a Hugging Face id, or a folder."""
    engine: Literal["torch"] = "torch"
    """Engine that runs the model."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto takes what suits the model and the device."""
    device_map: Literal["none", "auto"] = "none"
    """How to place the model: none for one device, auto to spread it over all GPUs."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads that the model runs on; if unset, torch decides."""
    served_model_names: Annotated[tuple[str, ...], NoDecode] = ()
    """Names that clients may call the model by, the main one first; if unset, its own."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on."""
    port: int = Field(default=8000, ge=0, le=65535)
    """Port to listen on; 0 for any that is free."""
    api_key: SecretStr | None = None
    """Key that clients of /v1 must send; if unset, they need none."""
    api_key_file: Path | None = None
    """File that holds the API key, which nobody sees in the list of processes then; if unset, there
    is only --api-key."""
    admin_key: SecretStr | None = None
    """Key for upload and delete; if unset, both are allowed from this machine only, on a loopback
    address, without a proxy and without an API key."""
    admin_key_file: Path | None = None
    """File that holds the admin key; if unset, there is only --admin-key."""
    metrics_key: SecretStr | None = None
    """Key that readers of /metrics must send; if unset, they need none."""
    metrics_key_file: Path | None = None
    """File that holds the key for /metrics; if unset, there is only --metrics-key."""
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = ()
    """Names that a request's Host header may give, beside localhost and loopback addresses;
    if unset, no others where the server listens on a loopback address, and any elsewhere."""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """Origins, as https://chat.example.org, whose web pages may use the server from a browser; *
    for all, which needs an API key; if unset, none."""

    registry: Path | None = None
    """Folder of the stored interventions; if unset, steerserve/registry in the user's data."""
    max_loaded_interventions: int = Field(default=64, ge=1)
    """Interventions on the device at once, at most."""
    default_steering: Annotated[SteeringJson | None, NoDecode] = None
    """Steering, as JSON, of requests that ask for none; if unset, they are not steered."""
    steering_policy: SteeringPolicy = "optional"
    """What requests may choose: any steering or none (optional), any that has an effect (required),
    or nothing, as all get the default steering (locked)."""

    max_body_bytes: int = Field(default=4 * MIB, ge=1024)
    """Largest JSON body of a request, in bytes."""
    max_artifact_bytes: int = Field(default=256 * MIB, ge=1024)
    """Largest artifact, in bytes."""
    max_completions_per_request: int = Field(default=128, ge=1)
    """Completions of one request at most: prompts times n, three times that with compare."""
    body_timeout: float = Field(default=30.0, gt=0, allow_inf_nan=False)
    """Seconds that a client may send nothing of a request's body, or no request at all."""
    min_upload_rate: int = Field(default=16 * 1024, ge=1)
    """Bytes a second at which an artifact must come, after as many seconds as the body timeout."""
    keep_alive: float = Field(default=65.0, gt=0, allow_inf_nan=False)
    """Seconds that a connection stays open after an answer without a further request."""
    write_timeout: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """Seconds that a client may read nothing of its answer."""
    default_max_tokens: int | None = Field(default=None, ge=1)
    """Tokens of a chat's answer, at most, where the request sets no limit; if unset, what is left
    of the context, as with OpenAI."""
    request_timeout: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    """Seconds from the arrival of a request to the end of its body, and to its last token."""
    shutdown_timeout: float = Field(default=30.0, ge=0, allow_inf_nan=False)
    """Seconds that running and waiting requests may go on after SIGTERM."""

    toxicity_scorer: str = Field(default="embedded", min_length=1)
    """What tells how toxic completions are: embedded, hf:MODEL, http:URL, or none."""
    toxicity_queue_size: int = Field(default=1024, ge=1)
    """Completions that may wait for a score that nobody asks for; further ones are dropped."""
    toxicity_share: float = Field(default=0.03, gt=0, le=1)
    """Share of a processor that scoring unasked may take, and is let have, while anything is
    generated."""
    baseline_sample_rate: float = Field(default=0.0, ge=0, le=1)
    """Share of steered requests whose unsteered answer is generated and scored too."""
    dose_interval: int = Field(default=16, ge=0)
    """Edits are measured in one of so many steered steps; 0 for never."""
    log_format: Literal["text", "json"] = "text"
    """Format of the log."""
    log_content: bool = False
    """Log prompts and completions too."""
    otlp_endpoint: str | None = Field(default=None, min_length=1)
    """OpenTelemetry collector to send traces to, over HTTP; if unset, there are no traces."""

    max_model_len: int | None = Field(default=None, ge=2)
    """Longest prompt with its completion, in tokens; if unset, the model's own limit."""
    max_waiting: int = Field(default=256, ge=1)
    """Completions that may wait beside those that run; further ones are refused."""
    max_batch_size: int = Field(default=64, ge=1)
    """Completions running at once, at most."""
    max_batch_tokens: int = Field(default=512, ge=1)
    """Tokens of one step, at most; no fewer than completions run at once."""
    kv_cache_gb: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Gigabytes for keys and values, the prefix cache's among them; if unset, 25 % of a CPU's free
    memory, or what is left of a GPU's beside interventions, the largest step and CUDA graphs."""
    attention: Literal["automatic", "pages", "slabs"] = "automatic"
    """Where keys and values are kept: in pages of one GPU's memory, read by a Triton kernel, or in
    slabs, one a sequence, on any device; automatic takes pages where GPU and model suit them."""
    cuda_graphs: bool = True
    """On a GPU with pages, replay steps that only decode as CUDA graphs."""
    compile_layers: bool = True
    """On a CPU, compile layers in the background, and what refines rewards at start."""
    prefix_cache: bool = True
    """Keep what was computed of prompts, for requests that begin alike."""
    check_invariants: bool = False
    """Check the engine's bookkeeping after every step; slow."""

    @model_validator(mode="before")
    @classmethod
    def _read_keys(cls, given: object) -> object:
        """A key in a file is a key: who asks for keys need not know where one came from."""
        return with_keys_read(given) if isinstance(given, dict) else given

    @field_validator("served_model_names", "allowed_hosts", "cors_origins", mode="before")
    @classmethod
    def _split_names(cls, value: object) -> object:
        """A variable holds several names separated by commas or blanks."""
        return tuple(re.split(r"[\s,]+", value.strip())) if isinstance(value, str) else value

    @field_validator("allowed_hosts")
    @classmethod
    def _check_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(check_host, value))

    @field_validator("cors_origins")
    @classmethod
    def _check_origins(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(map(check_origin, value))

    @field_validator("default_steering", mode="before")
    @classmethod
    def _parse_steering(cls, value: object) -> object:
        """A flag or a variable holds JSON."""
        if not isinstance(value, str | bytes):
            return value
        try:
            return _steering_json.validate_json(value)
        except ValidationError as error:
            raise ValueError(
                "the default steering must be a JSON object such as "
                '{"intervention": "detox-lineas", "strength": 0.8}, or a list of them'
            ) from error

    @field_validator("toxicity_scorer")
    @classmethod
    def _check_scorer(cls, value: str) -> str:
        parse_spec(value)
        return value

    @field_validator("api_key", "admin_key", "metrics_key")
    @classmethod
    def _check_key(cls, value: SecretStr | None) -> SecretStr | None:
        if value is not None and not is_key(value.get_secret_value()):
            raise ValueError("a key is one or more printable ASCII characters without blanks")
        return value

    @model_validator(mode="after")
    def _check_agreement(self) -> Self:
        if self.steering_policy == "locked" and not self.default_steering:
            raise ValueError(
                "the steering policy `locked` needs a default steering: without one every "
                "request would be refused"
            )
        if ANY_ORIGIN in self.cors_origins and self.api_key is None:
            raise ValueError(
                "the CORS origin `*` needs an API key: without one, every page that anybody on "
                "this machine opens could use the server; name the origins, or set a key"
            )
        if self.baseline_sample_rate and self.toxicity_scorer == "none":
            raise ValueError(
                "the baseline sample rate needs a toxicity scorer: unsteered answers are generated "
                "to be scored"
            )
        if self.max_batch_tokens < self.max_batch_size:
            raise ValueError(
                f"max_batch_tokens ({self.max_batch_tokens}) must be at least max_batch_size "
                f"({self.max_batch_size}), so that every running request can take its turn"
            )
        if len(set(self.served_names)) < len(self.served_names):
            raise ValueError("the served model names repeat one")
        for name in self.served_names:
            if not re.fullmatch(r"[^\s+\x00-\x1f]+", name):
                raise ValueError(
                    f"the served model name {name!r} is empty or has a blank or a '+' in it "
                    "('+' separates a model from an intervention); give another with "
                    "--served-model-name"
                )
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Take what is given, then the environment, and read no files."""
        return init_settings, Environment(settings_cls)

    @cached_property
    def served_names(self) -> tuple[str, ...]:
        """The names that a request may give as its model, the first being the main one."""
        if self.served_model_names:
            return self.served_model_names
        if self.model == "embedded":
            return (EMBEDDED_MODEL_NAME,)
        folder = Path(self.model).expanduser()
        return (folder.resolve().name,) if folder.is_dir() else (self.model,)

    @cached_property
    def registry_path(self) -> Path:
        """The registry's folder: the given one, or `steerserve/registry` in the user's data."""
        if self.registry is not None:
            return self.registry.expanduser()
        data_home = os.environ.get("XDG_DATA_HOME", "")
        # The XDG specification: a relative path there is to be ignored.
        base = Path(data_home) if Path(data_home).is_absolute() else Path.home() / ".local/share"
        return base / "steerserve" / "registry"

    @property
    def binds_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host.strip("[]"))
