"""Every route against every kind of caller: the status, and that nothing is told that the caller may not know."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

import httpx
import openai
import pytest
from unit.serving.live_endpoint import live_endpoint

from fedllm.clock import SystemClock
from fedllm.errors import MissingExtra, NotFound, NotReady, Overloaded, QuotaExceeded
from fedllm.rng import OsRng
from fedllm.serving.answers import refusal_headers
from fedllm.serving.keys import hash_key
from fedllm.serving.openapi import openapi_document
from fedllm.serving.quota import Limits
from fedllm.serving.tenant_changes import revoke_keys, rotate_key
from fedllm.serving.tenants import create_tenant

ALIAS = "acme/tools"
CHAT = {"model": ALIAS, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
BODIES: dict[str, dict[str, object]] = {
    "/v1/chat/completions": CHAT,
    "/v1/completions": {"model": ALIAS, "prompt": "hi", "max_tokens": 2},
    "/v1/score": {"model": ALIAS, "prompt_token_ids": [1], "token_ids": [2]},
}
RATING = {"/v1/feedback": {"id": "chatcmpl-0", "score": 1}}
ROUTES = ("/v1/models", *BODIES, *RATING, "/health", "/metrics", "/openapi.json", "/v1/nothing")
DELEGATED = {"x-fedllm-tenant": "far", "x-fedllm-weight": "2"}

# Status by route, in the order of ROUTES.
NOBODY = (401, 401, 401, 401, 401, 200, 401, 200, 404)
USER = (200, 200, 200, 200, 404, 200, 200, 200, 404)
WITHOUT_ACCESS = (200, 404, 404, 404, 404, 200, 200, 200, 404)
OVER_QUOTA = (429, 429, 429, 429, 429, 200, 200, 200, 404)

CALLERS = {
    "no key": NOBODY,
    "empty key": NOBODY,
    "wrong key": NOBODY,
    "wrong scheme": NOBODY,
    "hash as key": NOBODY,
    "revoked": NOBODY,
    "expired": NOBODY,
    "acme": USER,
    "rotated": USER,
    "other": WITHOUT_ACCESS,
    "operator": WITHOUT_ACCESS,
    "busy": OVER_QUOTA,
    "router": USER,
    "router for another": USER,
    "narrow router for another": WITHOUT_ACCESS,
    "router, name malformed": NOBODY,
    "acme for another": NOBODY,
    "operator for another": NOBODY,
}
KNOWS_THE_ALIAS = {caller for caller, statuses in CALLERS.items() if statuses is USER} | {"busy"}


@pytest.fixture(scope="module")
def live(tiny_folder, tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Serve to all of them."""
    path, clock = tmp_path_factory.mktemp("private-folder") / "tenants.toml", SystemClock()
    keys = {
        "other": create_tenant(path, "other", []),
        "operator": create_tenant(path, "operator", [], operator=True),
        "router": create_tenant(path, "router", ["*"], router=True),
        "narrow": create_tenant(path, "narrow", [], router=True),
        "revoked": create_tenant(path, "revoked", [ALIAS]),
        "expired": create_tenant(path, "expired", [ALIAS], expires_s=0),
        "busy": create_tenant(path, "busy", [ALIAS], limits=Limits(requests_per_minute=1)),
        "rotated": create_tenant(path, "rotated", [ALIAS]),
    }
    revoke_keys(path, "revoked", clock)
    rotate_key(path, "rotated", OsRng(), clock, overlap_s=3600)
    with live_endpoint(tiny_folder, path) as world:
        keys["acme"] = world.key
        key = {name: {"authorization": f"Bearer {key}"} for name, key in keys.items()}
        world.secrets = [*keys.values(), world.poor_key, *map(hash_key, keys.values())]
        world.callers = {
            **key,
            "no key": {},
            "empty key": {"authorization": "Bearer"},
            "wrong key": {"authorization": "Bearer fedllm-" + "A" * 43},
            "wrong scheme": {"authorization": f"Basic {world.key}"},
            "hash as key": {"authorization": f"Bearer {hash_key(world.key)}"},
            "router for another": {**key["router"], **DELEGATED},
            "narrow router for another": {**key["narrow"], **DELEGATED},
            "router, name malformed": {**key["router"], "x-fedllm-tenant": "Far/../away"},
            "acme for another": {**key["acme"], **DELEGATED},
            "operator for another": {**key["operator"], **DELEGATED},
        }
        assert httpx.get(f"{world.url}/v1/models", headers=key["busy"]).status_code == 200
        yield world


def ask(live, caller: str, route: str, **changed: object) -> httpx.Response:
    """Ask as a caller."""
    headers = live.callers[caller]
    if route in BODIES or route in RATING:
        body = {**(BODIES | RATING)[route], **changed}
        return httpx.post(live.url + route, json=body, headers=headers, timeout=30)
    return httpx.get(live.url + route, headers=headers)


def test_the_table_has_every_route_of_the_document() -> None:
    """A route that is added must be added here."""
    assert set(openapi_document()["paths"]) <= set(ROUTES)


@pytest.mark.parametrize(
    ("caller", "statuses"), CALLERS.items(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_every_route_answers_every_caller_as_it_must(live, caplog, caller: str, statuses: tuple[int, ...]) -> None:
    """The status; errors in OpenAI's shape; no key, hash or path, and no name of another tenant or its alias."""
    caplog.set_level(logging.DEBUG)
    own = caller.split(maxsplit=1)[0].rstrip(",")
    strangers = {"other", "busy", "rotated", "narrow", "operator"} - {own}
    for route, status in zip(ROUTES, statuses, strict=True):
        answer = ask(live, caller, route)
        assert answer.status_code == status, (route, answer.text)
        text = answer.text + str(answer.headers)
        if status >= 400:
            error = answer.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}
        for secret in (*live.secrets, "private-folder", "sha256"):
            assert secret not in text, (route, secret)
        if route in ("/v1/models", "/health", "/metrics") and caller != "operator":
            assert not [name for name in strangers if f'"{name}"' in text], route
            assert (ALIAS in text) <= (caller in KNOWS_THE_ALIAS), route
        if route == "/health" and status == 200 and statuses is NOBODY:
            assert set(answer.json()) == {"status", "base", "epoch"}
        if route == "/metrics" and status == 200:
            assert ("fedllm_engine_alive" in text) == (caller == "operator")
    logged = caplog.text + str([record.__dict__ for record in caplog.records if record.name.startswith("fedllm")])
    assert not [secret for secret in live.secrets if secret in logged]


@pytest.mark.parametrize("route", BODIES)
def test_what_may_not_be_used_looks_like_what_is_not_there(live, route: str) -> None:
    """Body and headers of the refusal are the same for a live alias and for none, but for the name that was sent."""
    for caller in ("other", "operator", "narrow router for another"):
        real, none = ask(live, caller, route), ask(live, caller, route, model="none/none")
        assert real.status_code == none.status_code == 404
        assert real.text.replace(ALIAS, "none/none") == none.text
        assert set(real.headers) == set(none.headers)


@pytest.mark.parametrize("caller", ["wrong key", "no key", "hash as key"])
def test_strangers_all_hear_the_same(live, caller: str) -> None:
    """Nobody learns how near a key is; only who has a key that is over hears so."""
    words = ask(live, caller, "/v1/models").json()["error"]["message"]
    assert words == ask(live, "empty key", "/v1/models").json()["error"]["message"]
    for over, said in {"revoked": "was revoked", "expired": "has expired"}.items():
        assert said not in words
        assert said in ask(live, over, "/v1/models").json()["error"]["message"]


def test_a_reached_limit_is_openais_429(live) -> None:
    """Name and number in the body, Retry-After, and what is left in the headers that OpenAI's client knows."""
    answer = ask(live, "busy", "/v1/completions")
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("rate_limit_error", "rate_limit_exceeded")
    assert error["message"].startswith("requests_per_minute: 1 allowed")
    assert 1 <= int(answer.headers["retry-after"]) <= 60
    assert answer.headers["x-should-retry"] == "true"
    assert answer.headers["x-ratelimit-limit-requests"] == "1"
    assert answer.headers["x-ratelimit-remaining-requests"] == "0"
    assert answer.headers["x-ratelimit-reset-requests"].endswith("s")
    assert ask(live, "busy", "/v1/completions", prompt="x" * 900_000).status_code == 429
    key = live.callers["busy"]["authorization"].split()[1]
    with (
        openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0) as client,
        pytest.raises(openai.RateLimitError, match="requests_per_minute"),
    ):
        client.models.list()


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (QuotaExceeded("", limit="x", retry_after_s=0.2), {"retry-after": "1", "x-should-retry": "true"}),
        (QuotaExceeded("", limit="x", retry_after_s=7.2), {"retry-after": "8", "x-should-retry": "true"}),
        (QuotaExceeded("", limit="x", retry_after_s=9e5), {"retry-after": "900000", "x-should-retry": "false"}),
        (Overloaded(""), {"retry-after": "1", "x-should-retry": "true"}),
        (NotReady(""), {"x-should-retry": "true"}),
        (MissingExtra("serve", "x"), {"x-should-retry": "false"}),
        (NotFound(""), {}),
    ],
)
def test_who_is_refused_is_told_when_to_come_back(error, headers) -> None:
    """Seconds are rounded up, and OpenAI's client is told not to retry what takes more than a minute."""
    assert refusal_headers(error) == headers


def test_an_answer_says_what_is_left_whole_or_streamed(live, tmp_path_factory) -> None:
    """Tokens that were reserved and not generated are back for the next request; what never fits is a 400."""
    path = next(tmp_path_factory.getbasetemp().glob("private-folder*/tenants.toml"))
    limits = Limits(tokens_per_minute=60, tokens_per_month=10**6, requests_per_minute=6000)
    live.callers["meter"] = {"authorization": f"Bearer {create_tenant(path, 'meter', [ALIAS], limits=limits)}"}
    for stream in (False, True):
        # A token comes back every second: a second request would not fit if the first had kept what it had reserved.
        answer = ask(live, "meter", "/v1/completions", stream=stream, prompt=[1, 2, 3], max_tokens=40, stop=["BB"])
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-ratelimit-limit-tokens"] == "60"
        assert int(answer.headers["x-ratelimit-remaining-tokens"]) < 60
    assert ask(live, "meter", "/v1/models").headers["x-ratelimit-limit-requests"] == "6000"
    many = ask(live, "meter", "/v1/completions", prompt=[1], max_tokens=40, n=2)
    assert many.status_code == 400
    assert "tokens_per_minute: the request may take 81 tokens, 60 are allowed" in many.json()["error"]["message"]


def test_records_name_tenant_key_and_version(live) -> None:
    """What a request was is told once, with alias and version; a router's requests are the router's to tell."""
    live.records.clear()
    ask(live, "router for another", "/v1/completions")
    ask(live, "rotated", "/v1/completions", prompt=[1, 2, 3], temperature=0)
    ask(live, "other", "/v1/completions")
    ask(live, "wrong key", "/v1/completions")
    good, denied, stranger = live.records
    assert (good.tenant, good.key, good.alias, good.version) == ("rotated", "key-1", ALIAS, live.new)
    assert (good.status, good.prompt_tokens, good.completion_tokens) == (200, 3, 2)
    assert good.id.startswith("cmpl-")
    assert 0 < good.ttft_s <= good.seconds
    assert (denied.tenant, denied.alias, denied.version, denied.status) == ("other", "", None, 404)
    assert (stranger.tenant, stranger.key, stranger.status) == ("", "", 401)


def test_cached_tokens_are_in_the_usage(live) -> None:
    """The second of two equal prompts has the blocks of the first, of its own tenant's requests only."""
    asked = {"prompt": [5] * 40, "temperature": 0}
    cached = []
    for caller in ("acme", "acme", "rotated", "rotated"):
        usage = ask(live, caller, "/v1/completions", **asked).json()["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"] == 42
        cached.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert cached[0] == cached[2] == 0
    assert 30 < cached[1] == cached[3] < 40
    assert live.records[-1].cached_tokens == cached[3]


def test_answers_have_the_usage_of_the_document(live) -> None:
    """Every field of the usage is described and every described one is there, streamed or whole."""
    described = openapi_document()["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]
    properties = described["application/json"]["schema"]["properties"]["usage"]["properties"]
    usage = ask(live, "acme", "/v1/completions").json()["usage"]
    assert set(usage) == set(properties)
    assert set(usage["prompt_tokens_details"]) == set(properties["prompt_tokens_details"]["properties"])
    assert "503" in openapi_document()["paths"]["/health"]["get"]["responses"]
