"""What is fixed when the process starts: flags, else environment (`MLX_MANAGER_…`), else these defaults."""

import os
import re
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

from platformdirs import user_data_path
from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

LogLevel = Literal["debug", "info", "warning", "error"]
Priority = Literal["high", "normal", "low"]
Eviction = Literal["lru", "lfu"]
WhenFull = Literal["queue", "refuse"]
Several = Annotated[tuple[str, ...], NoDecode]

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
# Holds the starter model, so that a fresh machine answers without a network.
BUNDLED_MODELS = Path(__file__).parent / "bundled"


_UNITS = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SECONDS = {"ms": 1e-3, "s": 1, "m": 60, "h": 3600, "d": 86_400}


def parse_size(text: str) -> int | float:
    """`32GB`, `1.5 GiB` or `1000000` as bytes, and `80%` as 0.8: a whole number and a fraction. Raises `ValueError`."""
    if (share := re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())) and 0 < (percent := float(share[1])) <= 100:
        return percent / 100
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?)?b?", text.strip().lower())
    num_bytes = 0 if size is None else int(float(size[1]) * _UNITS[size[2] or ""])
    if num_bytes <= 0:
        raise ValueError(f"'{text}' is not a size, as 32GB, 80% or a number of bytes")
    return num_bytes


def parse_duration(text: str) -> float | None:
    """`5m`, `1h30m` or `90` in seconds; None, for ever, of what is less than 0. Raises `ValueError`."""
    said = text.strip().lower()
    if re.fullmatch(r"-\d+(\.\d+)?[a-z]*", said):
        return None
    if re.fullmatch(r"\d+(\.\d+)?", said):
        return float(said)
    if not re.fullmatch(r"(\d+(\.\d+)?(ms|[smhd]))+", said):
        raise ValueError(f"'{text}' is not a time, as 5m, 90s, 0 or -1 for ever")
    return sum(float(number) * _SECONDS[unit] for number, _, unit in re.findall(r"(\d+(\.\d+)?)(ms|[smhd])", said))


class Config(BaseSettings):
    """Each field's description is its line in the README; sizes in bytes, times in seconds."""

    model_config = SettingsConfigDict(env_prefix="MLX_MANAGER_", env_ignore_empty=True, extra="ignore", frozen=True)

    host: str = Field("127.0.0.1", description="Address to listen on; beyond loopback an API key is required.")
    port: int = Field(10242, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    data_dir: Path = Field(default_factory=lambda: user_data_path("mlx-manager", appauthor=False), description="Folder of the database.")
    models_dir: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description=f"Folders whose subfolders are models, separated by '{os.pathsep}'; the flag can be repeated."
    )
    adapters_dir: Annotated[tuple[Path, ...], NoDecode] = Field(
        (), description=f"Folders whose subfolders are LoRA adapters, separated by '{os.pathsep}'; the flag can be repeated."
    )
    lm_studio_dir: Path | None = Field(None, description="LM Studio's folder of models; where LM Studio keeps it, if it is there.")
    hub_endpoint: str | None = Field(None, description="Address of the Hub; HF_ENDPOINT, else https://huggingface.co.")
    hub_timeout_s: float = Field(20.0, gt=0, description="The Hub must answer, or send more of a file, within so many seconds.")
    max_downloads: int = Field(2, ge=1, description="Models that are downloaded at a time; more wait.")
    api_key: SecretStr | None = Field(None, description="If set, every request but health checks must carry it.")
    allowed_hosts: Several = Field((), description="Further names that `Host` may have, separated by commas.")
    allowed_origins: Several = Field((), description="Web origins that may call the API from a browser, separated by commas.")
    remote_media_hosts: Several = Field(
        (), description="Hosts that pictures are fetched from, separated by commas; '*' is any. None: nothing is fetched."
    )
    remote_media_http: bool = Field(False, description="Fetch pictures by plain http too.")
    max_concurrent_requests: int = Field(256, ge=1, description="More than these at a time are answered 503.")
    max_batch: int = Field(32, ge=1, description="Sequences that one model decodes together.")
    prefill_budget: int = Field(2048, ge=1, description="Prompt tokens that a model computes at most between two decode steps.")
    step_ms: float = Field(
        40.0, gt=0, description="What a step aims at while replies run, in milliseconds: prompts are computed in pieces."
    )
    max_memory: Annotated[int | float | None, NoDecode] = Field(
        None, description="Memory of all models together, as 32GB, 80% or bytes; most of what the machine has for models."
    )
    kv_cache_gib: float | None = Field(None, gt=0, description="Memory of one model for keys and values, in GiB; a sixth of what is left.")
    eviction: Eviction = Field("lru", description="Who leaves for another model: the least recently (lru) or least often (lfu) used.")
    when_full: WhenFull = Field("queue", description="A model for which nobody can leave is waited for (queue) or refused.")
    memory_wait_s: float = Field(120.0, ge=0, description="How long a request waits for memory, in seconds.")
    keep_alive: Annotated[float | None, NoDecode] = Field(
        None, description="A model that nobody has used for so long is unloaded, as 5m or 0; -1: never."
    )
    preload: Several = Field((), description="Models that are loaded at the start and stay, separated by commas.")
    prefix_disk_gib: float = Field(0.0, ge=0, description="Disk for prefixes that left memory, in GiB for each model; 0: none.")
    endpoint_priority: Several = Field((), description="Classes of priority by path, as /v1/completions=low, separated by commas.")
    ageing_s: float = Field(10.0, gt=0, description="Waiting time that outweighs a class of priority, in seconds.")
    request_timeout_s: float = Field(3600.0, gt=0, description="A reply that takes longer is ended with an error, in seconds.")
    drain_s: float = Field(30.0, ge=0, description="How long replies may go on after Ctrl-C or SIGTERM, in seconds.")
    log_level: LogLevel = Field("info", description="debug, info, warning or error.")

    @field_validator("models_dir", "adapters_dir", mode="before")
    @classmethod
    def _paths(cls, value: object) -> object:
        return tuple(p for p in value.split(os.pathsep) if p) if isinstance(value, str) else value

    @field_validator("max_memory", mode="before")
    @classmethod
    def _size(cls, value: object) -> object:
        return parse_size(value) if isinstance(value, str) else value

    @field_validator("keep_alive", mode="before")
    @classmethod
    def _duration(cls, value: object) -> object:
        return parse_duration(value) if isinstance(value, str) else value

    @field_validator("allowed_hosts", "allowed_origins", "remote_media_hosts", "endpoint_priority", "preload", mode="before")
    @classmethod
    def _names(cls, value: object) -> object:
        return tuple(n.strip() for n in value.split(",") if n.strip()) if isinstance(value, str) else value

    @field_validator("endpoint_priority")
    @classmethod
    def _priorities(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            path, _, priority = entry.partition("=")
            if not path.startswith("/") or priority not in get_args(Priority):
                raise ValueError(f"'{entry}' is not a path and a class, as /v1/completions=low")
        return value

    def priority_of(self, path: str) -> Priority:
        """The class of requests to a path, as far as the server decides: normal where nothing is said."""
        priorities = dict(entry.split("=", 1) for entry in self.endpoint_priority)
        return cast(Priority, priorities.get(path, "normal"))

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK

    @property
    def model_folders(self) -> tuple[Path, ...]:
        """Where models are looked for, beside the Hub cache: the operator's folders first, then what ships with the package."""
        return (*self.models_dir, BUNDLED_MODELS)

    @property
    def kv_cache_bytes(self) -> int | None:
        return None if self.kv_cache_gib is None else int(self.kv_cache_gib * 2**30)

    @property
    def publishers(self) -> Path | None:
        """LM Studio's folder: the one that is named, or where LM Studio keeps it, if it is on this machine."""
        if self.lm_studio_dir is not None:
            return self.lm_studio_dir
        places = (Path.home() / ".lmstudio" / "models", Path.home() / ".cache" / "lm-studio" / "models")
        return next((place for place in places if place.is_dir()), None)

    @property
    def prefix_dir(self) -> Path:
        return self.data_dir / "prefixes"

    @property
    def load_marks_dir(self) -> Path:
        """Where it stands which model is being loaded."""
        return self.data_dir / "loading"

    @property
    def reasoning_key_path(self) -> Path:
        """Of the key that signs reasoning on its way out, so that it is known when it comes back."""
        return self.data_dir / "reasoning.key"

    @property
    def database_path(self) -> Path:
        return self.data_dir / "mlx-manager.db"
