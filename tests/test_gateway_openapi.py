"""The gateway's OpenAPI document is what it serves, and nothing near it is a 500."""

from __future__ import annotations

from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case
from schemathesis.core.result import Ok
from starlette.routing import Route

from pagedd_http import create_app
from pagedd_http.openapi import BODIES, document
from tests.support.daemon import running_daemon
from tests.support.gateway import running_gateway

EXAMPLES = 12
"""Requests for each operation that are right, and as many that are not."""
ANSWER_S = 60.0


def test_the_document_has_every_route_and_every_body() -> None:
    routes = [route for route in create_app().routes if isinstance(route, Route)]
    told = document(routes)
    assert set(told["paths"]) == {route.path_format for route in routes}
    takes = {route.path for route in routes if "POST" in (route.methods or ())}
    assert takes == set(BODIES)
    for route in routes:
        for method in (route.methods or set()) - {"HEAD"}:
            assert told["paths"][route.path_format][method.lower()]["summary"]


def test_the_document_says_of_a_body_what_is_validated() -> None:
    told = document(create_app().routes)
    assert told["openapi"] == "3.1.0"
    (found,) = told["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"].values()
    body = told["components"]["schemas"][found["schema"]["$ref"].rpartition("/")[2]]
    assert "messages" in body["required"]
    assert body["properties"]["top_logprobs"]["anyOf"][0]["maximum"] == 20


def test_nothing_that_the_document_allows_and_nothing_near_it_is_a_500() -> None:
    # A short context ends what asks for long texts.
    with (
        running_daemon(model="simulated", kv_tokens=512, context=256) as daemon,
        running_gateway(daemon) as gateway,
    ):
        told = httpx.get(f"{gateway.address}/openapi.json").json()
        schema = schemathesis.openapi.from_dict(told)
        for found in schema.get_all_operations():
            assert isinstance(found, Ok)
            operation = found.ok()
            _ask(operation, gateway.address, wrong=False)
            if operation.body:  # what takes nothing but a name cannot be asked wrongly
                _ask(operation, gateway.address, wrong=True)
        assert httpx.get(f"{gateway.address}/v1/models").status_code == 200


def _ask(operation: Any, address: str, *, wrong: bool) -> None:
    mode = schemathesis.GenerationMode("negative" if wrong else "positive")

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def asked(case: Case[Any]) -> None:
        if not wrong:
            _settle(case.body)
        response = case.call(base_url=address, timeout=ANSWER_S)
        assert response.status_code != 500, case.as_curl_command()

    asked()


def _settle(body: Any) -> None:
    """Name a model that there is, and give messages what templates need: else everything would be
    refused for that, and nothing behind it would be asked."""
    if not isinstance(body, dict):
        return
    body["model"] = "simulated"
    messages = body.get("messages")
    for message in messages if isinstance(messages, list) else ():
        if isinstance(message, dict):
            message.setdefault("role", "user")
            message.setdefault("content", "hello")
