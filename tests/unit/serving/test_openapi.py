"""The document and the endpoint agree: no request drawn from it, right or wrong, is answered with a 5xx."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from patience import PATIENCE_S
from unit.serving.live_endpoint import live_endpoint, wait_idle

from fedllm.serving.openapi import openapi_document

PATHS = [(path, method.upper()) for path, methods in openapi_document()["paths"].items() for method in methods]
SCHEMA = schemathesis.openapi.from_dict(openapi_document())


@pytest.fixture(scope="module")
def live(tiny_folder, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Serve with room for many."""
    tenants = tmp_path_factory.mktemp("tenants") / "tenants.toml"
    with live_endpoint(tiny_folder, tenants, body_s=5.0) as world:
        yield world


POSITIVE, NEGATIVE = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
CASES = [(path, method, POSITIVE) for path, method in PATHS] + [
    (path, method, NEGATIVE) for path, method in PATHS if method == "POST"
]


@pytest.mark.parametrize(("path", "method", "mode"), CASES, ids=lambda value: str(getattr(value, "value", value)))
def test_no_request_of_the_document_fails_the_endpoint(live, path, method, mode) -> None:
    """Requests as described, and as described but broken; answers have a status that the document names."""
    operation = SCHEMA[path][method]
    known = {int(status) for status in operation.definition.raw["responses"]} | {405, 406, 415}
    seen: set[int] = set()

    @settings(
        max_examples=30 if method == "POST" else 3,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case) -> None:
        if isinstance(case.body, dict):
            if isinstance(case.body.get("model"), str):
                case.body["model"] = "tiny"
            case.body["max_tokens"] = 3
            case.body.pop("max_completion_tokens", None)
        answer = case.call(
            base_url=live.url,
            headers={"authorization": f"Bearer {live.key}"},
            timeout=PATIENCE_S,
            allow_redirects=False,
        )
        seen.add(answer.status_code)
        assert answer.status_code < 500, (answer.text, case.body)
        assert answer.status_code in known, (answer.text, case.body)

    given(case=operation.as_strategy(generation_mode=mode))(check)()
    assert seen
    wait_idle(live)
