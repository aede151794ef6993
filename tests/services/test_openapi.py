"""The OpenAPI document says what the service answers: every schema, example, error and format."""

from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import BaseModel

from services import openapi
from services.app import create_app
from services.settings import Settings


@pytest.fixture(scope="module")
def client(settled: Path, tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    labels = tmp_path_factory.mktemp("labels") / "labels.csv"
    labels.write_text("slide_id,label\nB_3,tumour\n")
    return TestClient(create_app(Settings(manifests=settled, labels=labels)), base_url="http://localhost")


@pytest.fixture(scope="module")
def document(client: TestClient) -> dict[str, Any]:
    found: dict[str, Any] = client.get("/openapi.json").json()
    return found


ANSWERS = [
    ("/v1/slides?limit=2", openapi.SlideList),
    ("/v1/slides/B_3", openapi.Slide),
    ("/v1/slides/d_failed", openapi.Slide),
    ("/v1/slides/B_3/tiles?limit=3", openapi.Tiles),
    ("/v1/slides/c_empty/tiles", openapi.Tiles),
    ("/v1/slides/B_3/tiles?limit=3&format=geojson", openapi.FeatureCollection),
    ("/v1/slides/B_3/sample?k=3", openapi.Sample),
    ("/v1/slides/B_3/sample?k=3&format=geojson", openapi.FeatureCollection),
    ("/v1/slides/nobody", openapi.Problem),
    ("/v1/slides?limit=x", openapi.Problem),
    ("/v1/stats", openapi.Stats),
    ("/v1/runs", openapi.RunList),
    ("/healthz", openapi.State),
    ("/readyz", openapi.State),
]


@pytest.mark.parametrize(("path", "model"), ANSWERS, ids=[path for path, _ in ANSWERS])
def test_answers_are_as_described_with_nothing_missing_or_more(
    client: TestClient, path: str, model: type[BaseModel]
) -> None:
    parsed = model.model_validate_json(client.get(path).content, strict=True)
    assert parsed.model_dump(exclude_unset=True, mode="json") == client.get(path).json()


@pytest.mark.parametrize("model", list(openapi.EXAMPLES), ids=lambda model: model.__name__)
def test_examples_are_answers(model: type[BaseModel]) -> None:
    model.model_validate(openapi.EXAMPLES[model])


def test_every_route_says_its_parameters_formats_and_errors(document: dict[str, Any]) -> None:
    schemas = document["components"]["schemas"]
    for path, methods in document["paths"].items():
        assert list(methods) == ["get"]
        route = methods["get"]
        assert route["description"]
        if path.startswith("/v1/"):
            for parameter in route.get("parameters", ()):
                assert parameter["in"] == "path" or parameter["description"]
                if parameter["name"] == "format":
                    offered = parameter["schema"]["anyOf"][0]
                    assert len(route["responses"]["200"]["content"]) == len(offered.get("enum", ["json"]))
            assert "304" in route["responses"]
        for status, response in route["responses"].items():
            if int(status) >= 400:
                assert list(response["content"]) == ["application/problem+json"]
                assert response["content"]["application/problem+json"]["example"]["status"] == int(status)
        assert {"401", "413", "421", "431", "500", "503"} <= set(route["responses"])
        assert "422" not in route["responses"]
    text = str(document)
    for reference in {part.partition("'")[0] for part in text.split("#/components/schemas/")[1:]}:
        assert reference in schemas


def test_the_document_names_the_proxys_path(settled: Path) -> None:
    client = TestClient(create_app(Settings(manifests=settled, root_path="/tiles")), base_url="http://localhost")
    assert client.get("/openapi.json").json()["servers"] == [{"url": "/tiles"}]
