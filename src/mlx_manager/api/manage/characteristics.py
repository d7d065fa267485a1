"""What a model is, as searching and the list of what is here tell it, and the filters by that, which are the same for both."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from mlx_manager.api.dependencies import Services
from mlx_manager.api.manage.models import ModelFit
from mlx_manager.hub.characteristics import Capability, Characteristics, Filter, fails
from mlx_manager.hub.checkpoint import Checkpoint
from mlx_manager.inference.memory import Fit, fit_of


class CharacteristicsView(BaseModel):
    """`size_bytes` is that of the weights, `download_bytes` of all that is fetched (null for one that is here). `quantization_bits` null:
    not quantised."""

    kind: str
    architecture: str
    capabilities: list[Capability]
    num_parameters: int
    quantization_bits: int | None
    size_bytes: int
    download_bytes: int | None
    context_length: int | None
    fit: ModelFit

    @classmethod
    def of(cls, told: Characteristics, fit: Fit) -> "CharacteristicsView":
        c = told.checkpoint
        return cls(
            kind=c.kind,
            architecture=c.architecture,
            capabilities=list(told.capabilities),
            num_parameters=c.num_parameters,
            quantization_bits=c.quantization_bits,
            size_bytes=c.size_bytes,
            download_bytes=told.download_bytes,
            context_length=c.context_length,
            fit=ModelFit.of(fit),
        )


class Filters(BaseModel):
    """Of the characteristics."""

    model_config = ConfigDict(extra="forbid")

    architecture: str | None = Field(None, max_length=100)
    capability: list[Capability] = Field([], description="All of these.")
    bits: Annotated[int, Field(ge=0, le=32)] | None = Field(None, description="Of quantised weights; 0: not quantised.")
    max_bytes: Annotated[int, Field(ge=0)] | None = Field(None, description="Of the weights.")
    max_parameters: Annotated[int, Field(ge=0)] | None = None
    min_context: Annotated[int, Field(ge=0)] | None = Field(None, description="In tokens.")
    fits: Literal["true", "false"] | None = Field(None, description="The memory for models; tight ones do.")

    @property
    def asked(self) -> Filter:
        return Filter(
            architecture=self.architecture,
            capability=tuple(self.capability),
            bits=self.bits,
            max_bytes=self.max_bytes,
            max_parameters=self.max_parameters,
            min_context=self.min_context,
            fits=None if self.fits is None else self.fits == "true",
        )


class Judge:
    """What is told of models on this machine: it knows the memory that there is for them."""

    def __init__(self, services: Services, limit: int) -> None:
        self._config = services.config
        self._limit = limit

    @classmethod
    async def of(cls, services: Services) -> "Judge":
        return cls(services, await services.pool.limit())

    def fit(self, checkpoint: Checkpoint) -> Fit:
        c = self._config
        return fit_of(checkpoint, limit=self._limit, kv_bytes=c.kv_cache_bytes, prefill_tokens=c.prefill_budget)

    def view(self, told: Characteristics) -> CharacteristicsView:
        return CharacteristicsView.of(told, self.fit(told.checkpoint))

    def fails(self, asked: Filter, told: Characteristics) -> tuple[str, ...]:
        return fails(asked, told, self.fit(told.checkpoint).verdict != "too large")
