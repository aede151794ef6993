"""Query parameters, checked where they come in. An unknown one is refused: a misspelt filter filters nothing."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from manifests.schema import Status
from services.render import Format

_Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Index = Annotated[int, Field(ge=0, lt=2**31)]
_Count = Annotated[int, Field(ge=1, lt=2**31)]


class FormatQuery(BaseModel):
    """For routes without other parameters."""

    model_config = ConfigDict(extra="forbid")

    format: Format | None = None


class SlidesQuery(FormatQuery):
    """Which slides."""

    status: Status | None = None
    q: str = Field("", max_length=200)
    limit: _Count | None = None
    cursor: str | None = Field(None, max_length=1000)


class TilesQuery(FormatQuery):
    """Which tiles of a slide; `bbox` is x0,y0,x1,y1 in level-0 px, half-open."""

    bbox: str | None = None
    min_tissue: float = Field(0.0, ge=0, le=1, allow_inf_nan=False)
    limit: _Count | None = None
    offset: _Index = 0


class SampleQuery(FormatQuery):
    """Which step's tiles, and which part of them."""

    k: _Count
    seed: _Seed = 0
    epoch: _Index = 0
    part: _Index = 0
    num_parts: _Count = 1
