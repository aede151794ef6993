"""Query parameters, checked where they come in. An unknown one is refused: a misspelt filter filters nothing.

The models are read here and not by FastAPI's `Query()`, which takes ten times as long as pydantic itself: as long as
drawing the tiles of a step. `describe_parameters` puts them into the OpenAPI document.
"""

from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import parse_qsl

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from manifests.schema import Status
from services.errors import BadParametersError
from services.queries import BBOX
from services.search import SORTS, Search

_Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]
_Index = Annotated[int, Field(ge=0, lt=2**31)]
_Count = Annotated[int, Field(ge=1, lt=2**31)]


def _is_label(text: str) -> str:
    column, colon, _ = text.partition(":")
    if not colon or not column:
        raise ValueError("expected COLUMN:VALUE")
    return text


_Label = Annotated[str, Field(max_length=300, pattern="^[^:]+:"), AfterValidator(_is_label)]


class RecordQuery(BaseModel):
    """For routes without other parameters, whose answer is a JSON object."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["json"] | None = Field(None, description="The only one there is.")


class SlidesQuery(BaseModel):
    """Which slides, in which order."""

    model_config = ConfigDict(extra="forbid")

    format: Literal["json", "arrow"] | None = Field(None, description="Goes before the header Accept.")
    status: Status | None = Field(None, description="Only slides with this outcome.")
    q: str = Field("", max_length=200, description="Only slides whose id holds this text, whatever its case.")
    prefix: str = Field("", max_length=200, description="Only slides whose id begins so.")
    label: list[_Label] = Field(
        [],
        max_length=20,
        description="COLUMN:VALUE of the service's labels; may be given several times, all must hold.",
    )
    sort: Literal[SORTS] = Field(  # type: ignore[valid-type]  # one list of what there is
        "slide_id", description="Order; `-` before it is descending. Equals follow by slide_id."
    )
    limit: _Count | None = Field(None, description="Slides per page, 100 unless given; the service has a highest.")
    cursor: str | None = Field(None, max_length=2000, description="Of the link to the next page; opaque.")

    def to_search(self) -> Search:
        """Without the paging."""
        labels = tuple((column, value) for column, _, value in (label.partition(":") for label in self.label))
        return Search(status=self.status, q=self.q, prefix=self.prefix, labels=labels, sort=self.sort)


class _TilesFormat(BaseModel):
    model_config = ConfigDict(extra="forbid")

    format: Literal["json", "arrow", "geojson"] | None = Field(None, description="Goes before the header Accept.")


class TilesQuery(_TilesFormat):
    """Which tiles of a slide."""

    bbox: Annotated[str, Field(pattern=f"^{BBOX.pattern}$", max_length=47)] | None = Field(
        None, description="x0,y0,x1,y1 in level-0 px, half-open: tiles that intersect it.", examples=["0,0,4480,4480"]
    )
    min_tissue: float = Field(0.0, ge=0, le=1, allow_inf_nan=False, description="Least share of tissue.")
    limit: _Count | None = Field(None, description="Tiles per page; the service has a highest.")
    offset: _Index = Field(0, description="Tiles to pass over: those of the pages before.")


class SampleQuery(_TilesFormat):
    """Which step's tiles, and which part of them."""

    k: _Count = Field(description="Tiles that the step draws of the slide, all parts together.")
    seed: _Seed = Field(0, description="The run's seed.")
    epoch: _Index = Field(0, description="The epoch, from 0.")
    part: _Index = Field(0, description="Which of the contiguous parts; below num_parts.")
    num_parts: _Count = Field(1, description="Encoder shards (virtual ranks), not processes.")


_Query = TypeVar("_Query", bound=BaseModel)


def read_query(model: type[_Query], request: Request) -> _Query:
    """The request's parameters; of several values for one the last holds, except where it may have many.

    Raises:
        BadParametersError: some are unknown, missing, or out of their range.
    """
    values: dict[str, Any] = {}
    for name, value in parse_qsl(request.scope["query_string"].decode("latin-1"), keep_blank_values=True):
        if name == "label":
            values.setdefault(name, []).append(value)
        else:
            values[name] = value
    try:
        return model.model_validate(values)
    except ValidationError as error:
        faults = [(str([*fault["loc"], ""][0]), str(fault["msg"])) for fault in error.errors(include_url=False)]
        raise BadParametersError(faults) from None


def describe_parameters(model: type[BaseModel], **highest: int) -> dict[str, Any]:
    """What OpenAPI says of them: the `openapi_extra` of a route; `highest` are the limits that the settings give."""
    schema = model.model_json_schema()
    required = schema.get("required", [])
    described = []
    for name, told in schema["properties"].items():
        about = {"name": name, "in": "query", "required": name in required, "description": told.pop("description")}
        if name in highest:
            _lower(told, highest[name])
        described.append({**about, "schema": told})
    return {"parameters": described}


def _lower(schema: dict[str, Any], highest: int) -> None:
    """Makes `highest` the maximum of a number, or of the number that it may be."""
    number = next(part for part in schema.get("anyOf", [schema]) if part["type"] == "integer")
    number.pop("exclusiveMaximum")
    number["maximum"] = highest
