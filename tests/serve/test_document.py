"""The OpenAPI document is true: Schemathesis finds nothing that it does not say, and no fault."""

import pytest

from tests.serve.cases import try_document

pytestmark = pytest.mark.slow


def test_no_case_of_the_document_brings_a_fault(address: str) -> None:
    pytest.importorskip("schemathesis")
    statuses = try_document(address, count=500, seed=0)
    assert statuses.total() >= 450
    # Both pictures that are drawn and wishes that are refused were among them.
    assert statuses[200] >= 50
    assert statuses[400] >= 50
    assert statuses[202] >= 5
