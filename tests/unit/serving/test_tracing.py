"""One span a request, child of the caller's, without text or key; a receiver that is down harms nobody."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from fedllm.errors import ConfigError
from fedllm.ids import sha256
from fedllm.serving import tracing
from fedllm.serving.records import RequestRecord
from fedllm.serving.tracing import OtlpTracer, open_tracer

CLIENT_TRACE, CLIENT_SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{CLIENT_TRACE}-{CLIENT_SPAN}-01"
ROUTE = "/v1/chat/completions"
RECORD = RequestRecord(
    id="chatcmpl-1", tenant="acme", key="laptop", route=ROUTE, alias="acme/tools", version=sha256(b"v"), status=200,
    prompt_tokens=30, completion_tokens=11, cached_tokens=16, started=1000.0, ttft_s=0.25, seconds=1.2, replica="east",
)  # fmt: skip


@contextmanager
def receiver() -> Iterator[tuple[str, list[ExportTraceServiceRequest]]]:
    """Run an OTLP/HTTP receiver on loopback; yield its address and what it has been sent."""
    received: list[ExportTraceServiceRequest] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            data = self.rfile.read(int(self.headers["content-length"]))
            assert (self.path, self.headers["content-type"]) == ("/v1/traces", "application/x-protobuf")
            received.append(ExportTraceServiceRequest.FromString(data))
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", received
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Gate(SpanExporter):
    """An exporter that refuses, raises or holds still as told."""

    def __init__(self, answer: SpanExportResult | Exception) -> None:
        self.answer = answer
        self.entered, self.go = threading.Event(), threading.Event()
        self.go.set()

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Answer a batch."""
        self.entered.set()
        assert self.go.wait(60)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


def one_span(record: RequestRecord, headers: dict[str, str] | None = None) -> ReadableSpan:
    """Trace one request and return its span as it is exported."""
    kept = InMemorySpanExporter()
    tracer = OtlpTracer(kept, "endpoint")
    tracer.start(record.route, headers or {}).end(record)
    tracer.close()
    (span,) = kept.get_finished_spans()
    assert tracer.lost == 0
    return span


def test_a_span_says_who_what_and_how_long() -> None:
    """The conventions' names where they exist, ours for tenant, alias, version and replica; no name of a key."""
    span = one_span(RECORD)
    assert span.name == "chat acme/tools"
    assert dict(span.attributes or {}) == {
        "http.route": ROUTE,
        "http.response.status_code": 200,
        "fedllm.tenant": "acme",
        "fedllm.alias": "acme/tools",
        "fedllm.version": sha256(b"v"),
        "fedllm.replica": "east",
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "fedllm",
        "gen_ai.request.model": "acme/tools",
        "gen_ai.response.id": "chatcmpl-1",
        "gen_ai.response.model": f"acme/tools@{sha256(b'v')}",
        "gen_ai.usage.input_tokens": 30,
        "gen_ai.usage.output_tokens": 11,
        "gen_ai.usage.cache_read.input_tokens": 16,
        "gen_ai.response.time_to_first_chunk": 0.25,
    }
    assert span.resource.attributes == {"service.name": "endpoint"}
    assert "laptop" not in span.to_json()


@pytest.mark.parametrize(
    ("status", "is_error", "error_type"), [(200, False, None), (429, False, "429"), (503, True, "503")]
)
def test_a_status_from_500_on_is_the_servers_error(status: int, is_error: bool, error_type: str | None) -> None:
    """Refusals have an error type; only what the server did wrong makes the span an error."""
    span = one_span(replace(RECORD, status=status))
    assert span.status.is_ok is not is_error
    assert (span.attributes or {}).get("error.type") == error_type


def test_the_environment_does_not_decide_what_is_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables of the SDK neither switch sampling off nor add attributes: only the configuration does."""
    monkeypatch.setenv("OTEL_TRACES_SAMPLER", "always_off")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "user=somebody")
    assert one_span(RECORD).resource.attributes == {"service.name": "endpoint"}


def test_a_request_that_is_no_generation_claims_none() -> None:
    """A list of models has a route and a status, and nothing of generative AI."""
    span = one_span(replace(RECORD, route="/v1/models", alias="", version=None, replica=""))
    assert span.name == "/v1/models"
    assert not [name for name in span.attributes or {} if name.startswith("gen_ai.")]


def test_a_clients_trace_is_carried_on() -> None:
    """`traceparent` in whatever case is the parent; what goes out names the same trace and this span."""
    kept = InMemorySpanExporter()
    tracer = OtlpTracer(kept, "router")
    span = tracer.start(ROUTE, {"Traceparent": PARENT, "tracestate": "vendor=1", "authorization": "Bearer secret"})
    assert span.trace_id == CLIENT_TRACE
    out = span.headers()
    span.end(RECORD)
    span.end(RECORD)
    tracer.close()
    (found,) = kept.get_finished_spans()
    assert found.parent is not None
    assert f"{found.parent.span_id:016x}" == CLIENT_SPAN
    assert out == {"traceparent": f"00-{CLIENT_TRACE}-{found.context.span_id:016x}-01", "tracestate": "vendor=1"}
    assert "secret" not in found.to_json()


def test_a_trace_that_its_caller_does_not_sample_is_passed_on_and_not_sent() -> None:
    """The flag 00 holds for every hop; the record then has no trace to look for."""
    kept = InMemorySpanExporter()
    tracer = OtlpTracer(kept, "router")
    span = tracer.start(ROUTE, {"traceparent": PARENT[:-2] + "00"})
    assert span.trace_id == ""
    assert span.headers()["traceparent"].startswith(f"00-{CLIENT_TRACE}-")
    assert span.headers()["traceparent"].endswith("-00")
    span.end(RECORD)
    tracer.close()
    assert kept.get_finished_spans() == ()
    assert tracer.lost == 0


@given(st.text(st.characters(max_codepoint=255, exclude_categories=["Cc"]), max_size=80))
def test_a_header_that_is_no_traceparent_begins_a_new_trace(header: str) -> None:
    """Whatever a client sends, its request is served, under a trace of its own."""
    span = TRACER.start(ROUTE, {"traceparent": header, "tracestate": header})
    assert len(span.trace_id) == 32
    assert span.trace_id != CLIENT_TRACE
    assert span.headers()["traceparent"].startswith(f"00-{span.trace_id}-")


@pytest.fixture(scope="module", autouse=True)
def _shared_tracer() -> Iterator[None]:
    """Keep one tracer for the examples of a property: each has a thread."""
    global TRACER  # noqa: PLW0603
    TRACER = OtlpTracer(InMemorySpanExporter(), "router")
    yield
    TRACER.close()


def test_two_hops_meet_in_a_real_receiver() -> None:
    """Router and engine, with a tracer and a connection each, send by OTLP: one trace, the engine under the router."""
    with receiver() as (address, received):
        router, engine = open_tracer(address, "fedllm-router"), open_tracer(f"{address}/v1/traces", "fedllm-endpoint")
        outer = router.start(ROUTE, {"traceparent": PARENT})
        inner = engine.start(ROUTE, {**outer.headers(), "host": "replica"})
        inner.end(replace(RECORD, replica=""))
        outer.end(replace(RECORD, retries=1))
        engine.close()
        router.close()
        assert (engine.lost, router.lost) == (0, 0)
    spans = {
        resource.resource.attributes[0].value.string_value: span
        for request in received
        for resource in request.resource_spans
        for scope in resource.scope_spans
        for span in scope.spans
    }
    above, below = spans["fedllm-router"], spans["fedllm-endpoint"]
    assert above.trace_id.hex() == below.trace_id.hex() == CLIENT_TRACE
    assert above.parent_span_id.hex() == CLIENT_SPAN
    assert below.parent_span_id == above.span_id
    numbers = {a.key: a.value.int_value for a in below.attributes if a.value.HasField("int_value")}
    assert (numbers["gen_ai.usage.input_tokens"], numbers["gen_ai.usage.output_tokens"]) == (30, 11)


@pytest.mark.parametrize("answer", [SpanExportResult.FAILURE, OSError("receiver at secret.example")])
def test_a_receiver_that_is_down_is_counted_and_harms_nobody(answer: SpanExportResult | Exception, caplog) -> None:
    """Requests end as ever; the spans are counted lost, said once and without the error's text."""
    caplog.set_level(logging.INFO, "fedllm.serving.tracing")
    gate = Gate(answer)
    tracer = OtlpTracer(gate, "endpoint")
    for _ in range(5):
        tracer.start(ROUTE, {}).end(RECORD)
        tracer._provider.force_flush()
    assert tracer.lost == 5
    gate.answer = SpanExportResult.SUCCESS
    for _ in range(5):
        tracer.start(ROUTE, {}).end(RECORD)
        tracer._provider.force_flush()
    tracer.close()
    assert tracer.lost == 5
    assert "secret.example" not in caplog.text
    said = [r.message for r in caplog.records if r.name == "fedllm.serving.tracing"]
    assert (said.count("traces not delivered"), said.count("traces delivered again")) == (1, 1)


def test_what_is_delivered_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound is on what waits, not on all that was ever sent."""
    monkeypatch.setattr(tracing, "QUEUE", 300)
    tracer = OtlpTracer(InMemorySpanExporter(), "endpoint")
    for _ in range(3):
        for _ in range(200):
            tracer.start(ROUTE, {}).end(RECORD)
        tracer._provider.force_flush()
    tracer.close()
    assert tracer.lost == 0


def test_a_port_that_nobody_listens_on_is_no_error() -> None:
    """The real exporter, refused at the socket: lost spans are counted and closing comes back."""
    with receiver() as (address, _):
        pass
    tracer = open_tracer(address, "endpoint")
    tracer.start(ROUTE, {}).end(RECORD)
    tracer.close()
    assert tracer.lost == 1


def test_a_receiver_that_hangs_fills_a_bounded_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """With no room left, spans are dropped and counted; none is counted twice when the receiver comes back."""
    monkeypatch.setattr(tracing, "QUEUE", 300)
    gate = Gate(SpanExportResult.SUCCESS)
    gate.go.clear()
    tracer = OtlpTracer(gate, "endpoint")
    for _ in range(500):
        tracer.start(ROUTE, {}).end(RECORD)
    assert tracer.lost == 200
    gate.go.set()
    tracer.close()
    assert tracer.lost == 200
    tracer.start(ROUTE, {}).end(RECORD)
    assert tracer.lost == 201


@pytest.mark.parametrize("address", ["collector:4318", "ftp://collector", "http://", "traces.jsonl"])
def test_an_address_that_is_no_url_is_named(address: str) -> None:
    """With what is allowed."""
    with pytest.raises(ConfigError, match="http or https URL"):
        open_tracer(address, "endpoint")


def test_an_address_is_not_said_again_with_its_password() -> None:
    """What stands before the host is a secret."""
    with pytest.raises(ConfigError, match="'grpc'") as caught:
        open_tracer("grpc://me:secret@collector:4317", "endpoint")
    assert "secret" not in str(caught.value)
