"""The OpenAPI document is true: Schemathesis finds nothing that it does not say, and no fault."""

import pytest
from fastapi.testclient import TestClient

from tests.serve.cases import try_document


def test_bodies_that_are_read_by_hand_stand_in_the_document(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path, media_type, field in (
        ("/v1/images/generations", "application/json", "partial_images"),
        ("/v1/images/edits", "multipart/form-data", "image[]"),
        ("/sdapi/v1/txt2img", "application/json", "cfg_scale"),
        ("/sdapi/v1/img2img", "application/json", "init_images"),
    ):
        described = paths[path]["post"]
        schema = described["requestBody"]["content"][media_type]["schema"]
        assert field in schema["properties"], path
        assert {"200", "400", "409", "413", "429", "503"} <= set(described["responses"]), path


@pytest.mark.slow
def test_no_case_of_the_document_brings_a_fault(address: str) -> None:
    statuses = try_document(address, count=900, seed=0)
    assert statuses.total() >= 600
    # Both pictures that are drawn and wishes that are refused were among them.
    assert statuses[200] >= 50
    assert statuses[400] >= 50
    assert statuses[202] >= 5
