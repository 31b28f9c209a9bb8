"""One OpenTelemetry span a request, at the router and at the engine: who asked what, how long, how many tokens.

W3C ``traceparent`` comes in and goes on, so that an engine's span is a child of the router's, and both hang under what
a client began. Attributes have the GenAI semantic conventions' names where there are any. No text, no key.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import AttributeValue

from fedllm.errors import ConfigError
from fedllm.serving.records import RequestRecord
from fedllm.telemetry import event

QUEUE = 2048
"""Spans that may wait for the exporter; more are lost, and counted."""
_BATCH = 256
_DELAY_MS = 1000
_TIMEOUT_S = 5.0
_PATH = "/v1/traces"
_OPERATIONS = {"/v1/chat/completions": "chat", "/v1/completions": "text_completion"}
_W3C = TraceContextTextMapPropagator()
_LOG = logging.getLogger("fedllm.serving.tracing")


def open_tracer(address: str, service: str) -> OtlpTracer:
    """Return a tracer that sends to an OTLP/HTTP receiver from a thread of its own.

    Parameters
    ----------
    address : str
        The receiver, ``http://host:4318``; ``/v1/traces`` is meant where no path is given.
    service : str
        ``service.name`` of the spans.

    Raises
    ------
    ConfigError
        If the address is no http or https URL.
    """
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"traces go to an http or https URL, one of scheme {parts.scheme[:16]!r} found",
            hint="http://127.0.0.1:4318",
        )
    url = parts._replace(path=_PATH if parts.path in ("", "/") else parts.path).geturl()
    # It logs every failure in its own words; ours is one event at the first, and a count.
    logging.getLogger("opentelemetry").addHandler(logging.NullHandler())
    return OtlpTracer(OTLPSpanExporter(endpoint=url, timeout=_TIMEOUT_S), service)


class OtlpTracer:
    """Makes spans and hands them to an exporter.

    Parameters
    ----------
    exporter : SpanExporter
        Where ended spans go, in batches, off the event loop. What it raises or refuses is counted as lost.
    service : str
        ``service.name`` of the spans.
    """

    def __init__(self, exporter: SpanExporter, service: str) -> None:
        self._delivery = _Delivery(exporter)
        # The environment's variables would otherwise choose sampler and resource behind the configuration's back.
        provider = TracerProvider(
            sampler=ParentBased(ALWAYS_ON),
            resource=Resource({"service.name": service}),
            shutdown_on_exit=False,
        )
        batches = BatchSpanProcessor(
            self._delivery,
            max_queue_size=QUEUE,
            schedule_delay_millis=_DELAY_MS,
            max_export_batch_size=_BATCH,
            export_timeout_millis=1000 * _TIMEOUT_S,
        )
        provider.add_span_processor(batches)
        self._provider = provider
        self._tracer = provider.get_tracer("fedllm")

    @property
    def lost(self) -> int:
        """Spans that the exporter did not take, or that found no room in the queue."""
        return self._delivery.lost

    def start(self, route: str, headers: Mapping[str, str]) -> RequestSpan:
        """Begin a request's span, under the trace that its headers name if they do."""
        carrier = {name.lower(): value for name, value in headers.items()}
        context = _W3C.extract(carrier, context=Context())
        return RequestSpan(self._tracer.start_span(route, context=context, kind=SpanKind.SERVER), self._delivery)

    def close(self) -> None:
        """Send what waits; blocks for some seconds at most. Spans that end later are not sent."""
        self._delivery.hurry()
        self._provider.shutdown()


class RequestSpan:
    """One request, from arrival to end.

    Attributes
    ----------
    trace_id : str
        The W3C trace id, 32 hexadecimal digits; empty if the caller's trace is not sampled.
    """

    def __init__(self, span: Span, delivery: _Delivery) -> None:
        self._span = span
        self._delivery = delivery
        self._open = True
        self.trace_id = f"{span.get_span_context().trace_id:032x}" if span.is_recording() else ""

    def headers(self) -> dict[str, str]:
        """Return ``traceparent`` (and ``tracestate``) for whoever computes the answer."""
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, context=set_span_in_context(self._span, Context()))
        return carrier

    def end(self, record: RequestRecord) -> None:
        """Say what is known of the request and hand the span over; nothing happens the second time."""
        if not self._open:
            return
        self._open = False
        if not self._span.is_recording() or not self._delivery.has_room():
            return
        operation = _OPERATIONS.get(record.route)
        if operation:
            self._span.update_name(f"{operation} {record.alias}".rstrip())
        self._span.set_attributes(span_attributes(record))
        if record.status >= 500:
            self._span.set_status(Status(StatusCode.ERROR))
        self._span.end()


def span_attributes(record: RequestRecord) -> dict[str, AttributeValue]:
    """Return a span's attributes; what is not known of the request is left out."""
    operation = _OPERATIONS.get(record.route)
    known: dict[str, AttributeValue | None] = {
        "http.route": record.route,
        "http.response.status_code": record.status,
        "error.type": str(record.status) if record.status >= 400 else None,
        "fedllm.tenant": record.tenant,
        "fedllm.alias": record.alias,
        "fedllm.version": record.version,
        "fedllm.replica": record.replica,
        "fedllm.retries": record.retries or None,
    }
    if operation:
        known |= {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": "fedllm",
            "gen_ai.request.model": record.alias,
            "gen_ai.response.id": record.id,
            "gen_ai.response.model": f"{record.alias}@{record.version}" if record.version else None,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.completion_tokens,
            "gen_ai.usage.cache_read.input_tokens": record.cached_tokens,
            "gen_ai.response.time_to_first_chunk": record.ttft_s,
        }
    return {name: value for name, value in known.items() if value is not None and value != ""}


class _Delivery(SpanExporter):
    """The exporter, with a count of what it did not take, and a bound on what waits for it."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._lock = threading.Lock()
        self._waiting = 0
        self._failing = False
        self._closing = False
        self.lost = 0

    def has_room(self) -> bool:
        """Count one more span in, or lost."""
        with self._lock:
            if self._closing or self._waiting >= QUEUE:
                self.lost += 1
                return False
            self._waiting += 1
            return True

    def hurry(self) -> None:
        """Give up on a receiver that is down; nobody waits for it at the end."""
        self._closing = True

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send one batch; on the processor's thread."""
        taken = False
        if not (self._closing and self._failing):
            try:
                taken = self._exporter.export(spans) is SpanExportResult.SUCCESS
            except Exception as error:  # noqa: BLE001 - whatever an exporter raises, requests go on
                event(_LOG, "trace exporter raised", level=logging.ERROR, kind=type(error).__name__)
        with self._lock:
            self._waiting -= len(spans)
            self.lost += 0 if taken else len(spans)
        if self._failing == taken:
            level = logging.INFO if taken else logging.WARNING
            event(_LOG, "traces delivered again" if taken else "traces not delivered", level=level, lost=self.lost)
        self._failing = not taken
        return SpanExportResult.SUCCESS if taken else SpanExportResult.FAILURE

    def shutdown(self) -> None:
        """Close the exporter."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Nothing is kept here."""
        return self._exporter.force_flush(timeout_millis)
