"""The front door of an endpoint and of a router: who asks, whether a limit is reached, what a request was.

A request gets one `Ticket`. Its end makes one `RequestRecord`, which everybody who counts is told of: they cannot
disagree. A router's key speaks for the router's own tenants, whose quotas and records are the router's affair.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from fedllm.clock import Clock
from fedllm.errors import AuthenticationError, ConfigError
from fedllm.ids import Digest, check_name
from fedllm.serving.quota import Quota
from fedllm.serving.records import RequestObserver, RequestRecord
from fedllm.serving.tenant_file import MAX_WEIGHT, MIN_WEIGHT
from fedllm.serving.tenants import Tenant, TenantFile

TENANT_HEADER = "x-fedllm-tenant"
WEIGHT_HEADER = "x-fedllm-weight"
SCOPE_HEADER = "x-fedllm-scope"
_DELEGATION = (TENANT_HEADER, WEIGHT_HEADER, SCOPE_HEADER)
_SCOPE = re.compile(r"[a-z0-9_:/-]{1,200}")
_WEIGHT = re.compile(r"[0-9]{1,2}(\.[0-9]{1,6})?")


class Span(Protocol):
    """One request in a trace."""

    trace_id: str
    """W3C trace id, 32 hexadecimal digits."""

    def headers(self) -> dict[str, str]:
        """Return the headers that carry the trace on."""

    def end(self, record: RequestRecord) -> None:
        """Close the span with what the request was."""


class Tracer(Protocol):
    """Begins spans."""

    def start(self, route: str, headers: Mapping[str, str]) -> Span:
        """Begin a span, within the trace that the headers name if they name one."""


@dataclass(frozen=True)
class Caller:
    """Who asks.

    Parameters
    ----------
    tenant : Tenant
        Whom the request is for.
    key : str
        Name of the key, never the key.
    delegated : bool
        A router speaks for the tenant: neither quota nor record here.
    scope : str
        Prefix-cache scope that the router decided on; empty: the tenant's own.
    """

    tenant: Tenant
    key: str
    delegated: bool = False
    scope: str = ""


class Access:
    """Lets requests in.

    Parameters
    ----------
    tenants : TenantFile
    clock : Clock
    observers : sequence of RequestObserver
        Told of every ended request, but not of those that a router makes for its tenants.
    spent : callable, optional
        Tokens that a tenant's ended requests used this calendar month (UTC), as the usage store knows. By default
        they are counted here, from the start of the process on.
    tracer : Tracer, optional
        Requests are not traced without one.
    """

    def __init__(
        self,
        tenants: TenantFile,
        clock: Clock,
        *,
        observers: Sequence[RequestObserver] = (),
        spent: Callable[[str], int] | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self.tenants = tenants
        self.clock = clock
        self._observers = tuple(observers)
        self._spent = spent
        self._tracer = tracer
        self._quotas: dict[str, Quota] = {}

    def caller(self, headers: Mapping[str, str]) -> Caller:
        """Return who sent these headers; their names are in lower case.

        Raises
        ------
        AuthenticationError
            If the key is nobody's, revoked or expired; if it is no router's and speaks for another tenant all the
            same; or if a router's headers are malformed.
        """
        kind, _, secret = headers.get("authorization", "").partition(" ")
        secret = secret.strip() if kind.lower() == "bearer" else ""
        tenant, key = self.tenants.authenticate(secret, self.clock.now())
        if not any(name in headers for name in _DELEGATION):
            return Caller(tenant, key.name)
        if not tenant.router:
            raise AuthenticationError(
                f"{TENANT_HEADER}: this key may not speak for another tenant", hint="only a router's key may"
            )
        return Caller(_spoken_for(tenant, headers), key.name, delegated=True, scope=_scope(headers))

    def open(self, caller: Caller, *, route: str, headers: Mapping[str, str]) -> Ticket:
        """Count a request in and return its ticket, which must be ended.

        Raises
        ------
        QuotaExceeded
            If ``requests_per_minute`` or ``concurrent`` is reached; the caller then reports it by `refused`.
        """
        quota = self._quota(caller)
        if quota is not None:
            quota.admit()
        span = self._tracer.start(route, headers) if self._tracer is not None else None
        return Ticket(self, caller, route, quota, span)

    def refused(self, *, route: str, status: int, caller: Caller | None) -> None:
        """Tell the observers of a request that ended before it had a ticket."""
        if caller is not None and caller.delegated:
            return
        tenant, key = (caller.tenant.name, caller.key) if caller else ("", "")
        now = self.clock.now()
        self.tell(RequestRecord("", tenant, key, route, "", None, status, 0, 0, 0, now, None, 0.0))

    def headers(self, caller: Caller) -> dict[str, str]:
        """Return OpenAI's rate limit headers on what the caller has left."""
        quota = self._quota(caller)
        return quota.headers() if quota is not None else {}

    def spent(self, tenant: str) -> int:
        """Return the tokens of a tenant's ended requests this calendar month, UTC."""
        if self._spent is not None:
            return self._spent(tenant)
        quota = self._quotas.get(tenant)
        return quota.used_this_month if quota is not None else 0

    def tell(self, record: RequestRecord) -> None:
        """Tell the observers of an ended request."""
        for observer in self._observers:
            observer.observe(record)

    def _quota(self, caller: Caller) -> Quota | None:
        if caller.delegated:
            return None
        tenant = caller.tenant
        quota = self._quotas.get(tenant.name)
        if quota is None:
            quota = self._quotas[tenant.name] = Quota(tenant.limits, self.clock)
        quota.update(tenant.limits)
        return quota


class Ticket:
    """One request, from admission to its end. Made by `Access.open`; belongs to the event loop.

    Attributes
    ----------
    caller : Caller
    weight : float
        The tenant's share of a busy engine.
    trace : dict of str to str
        Headers to pass on; empty where requests are not traced.
    """

    def __init__(self, access: Access, caller: Caller, route: str, quota: Quota | None, span: Span | None) -> None:
        self.caller = caller
        self.weight = caller.tenant.weight
        self.trace = span.headers() if span is not None else {}
        self._access = access
        self._route = route
        self._quota = quota
        self._span = span
        self._reserved = 0
        self._started, self._begun = access.clock.now(), access.clock.monotonic()
        self._id = self._alias = self._replica = ""
        self._version: Digest | None = None
        self._prompt = self._completion = self._cached = self._retries = 0
        self._ttft: float | None = None
        self._record: RequestRecord | None = None

    def reserve(self, tokens: int) -> None:
        """Take the most that the request may use: its prompt and all that may be generated.

        Raises
        ------
        QuotaExceeded
            If ``tokens_per_minute`` or ``tokens_per_month`` is reached.
        RequestInvalid
            If the request alone is above such a limit.
        """
        if self._quota is not None:
            self._quota.reserve(tokens, self._access.spent(self.caller.tenant.name))
            self._reserved += tokens

    def scope(self, alias: str) -> str:
        """Return whose prefix cache the request uses: the tenant's own, or the alias's if both sides share it."""
        if self.caller.scope:
            return self.caller.scope
        tenant = self.caller.tenant
        if tenant.share_cache and alias in self._access.tenants.table.shared:
            return f"shared:{alias}"
        return tenant.name

    def bound(self, id: str, alias: str, version: Digest, *, prompt_tokens: int, replica: str = "") -> None:  # noqa: A002 - the record's name
        """Note what answers; said again when another replica takes the request over, which is a retry."""
        if self._replica and replica != self._replica:
            self._retries += 1
        self._id, self._alias, self._version = id, alias, version
        self._prompt, self._replica = prompt_tokens, replica

    def token(self, count: int = 1) -> None:
        """Note generated tokens; the first call is the time to first token."""
        if self._ttft is None:
            self._ttft = self._access.clock.monotonic() - self._begun
        self._completion += count

    def cached(self, tokens: int) -> None:
        """Note how much of the prompt the prefix cache had."""
        self._cached = tokens

    def headers(self) -> dict[str, str]:
        """Return OpenAI's rate limit headers on what the tenant has left."""
        return self._quota.headers() if self._quota is not None else {}

    def end(self, status: int) -> RequestRecord:
        """End the request with an HTTP status; only the first call counts.

        Frees its place, gives back what was reserved and not computed, and tells the observers. Tokens that the
        prefix cache had count as computed.
        """
        if self._record is not None:
            return self._record
        record = self._record = RequestRecord(
            id=self._id,
            tenant=self.caller.tenant.name,
            key=self.caller.key,
            route=self._route,
            alias=self._alias,
            version=self._version,
            status=status,
            prompt_tokens=self._prompt,
            completion_tokens=self._completion,
            cached_tokens=self._cached,
            started=self._started,
            ttft_s=self._ttft,
            seconds=self._access.clock.monotonic() - self._begun,
            replica=self._replica,
            retries=self._retries,
            trace=self._span.trace_id if self._span is not None else "",
        )
        if self._quota is not None:
            self._quota.leave(self._reserved, self._prompt + self._completion, self._started)
        if self._span is not None:
            self._span.end(record)
        if not self.caller.delegated:
            self._access.tell(record)
        return record


def _spoken_for(router: Tenant, headers: Mapping[str, str]) -> Tenant:
    """Return the tenant that a router names: it may use what the router may, and is nothing else here."""
    weight = headers.get(WEIGHT_HEADER, "1")
    try:
        name = check_name(headers.get(TENANT_HEADER, "")[:128], what="tenant")
    except ConfigError as error:
        raise AuthenticationError(f"{TENANT_HEADER}: {error.message}") from None
    if not _WEIGHT.fullmatch(weight) or not MIN_WEIGHT <= float(weight) <= MAX_WEIGHT:
        raise AuthenticationError(f"{WEIGHT_HEADER} is {weight[:32]!r}: {MIN_WEIGHT} to {MAX_WEIGHT} allowed")
    return Tenant(name, allow=router.allow, router=True, weight=float(weight))


def _scope(headers: Mapping[str, str]) -> str:
    scope = headers.get(SCOPE_HEADER, "")
    if scope and not _SCOPE.fullmatch(scope):
        raise AuthenticationError(f"{SCOPE_HEADER} has characters or a length that no scope has")
    return scope
