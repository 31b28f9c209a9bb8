"""What endpoints report of versions: read strictly, kept as sums, shown as what it is. It moves no alias."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

from pydantic import TypeAdapter, ValidationError

from fedllm.errors import FedllmError, RequestInvalid
from fedllm.ids import check_alias, check_digest, check_name
from fedllm.registry.observed import COUNTS, MAX_OBSERVATIONS, TTFT_BOUNDS_S, Observation, Report, ttft_quantile

MAX_BODY_BYTES = 1 << 20
MAX_COUNT = 10**12
"""Of one field of one observation: sums of millions of them stay within 64 bits."""
SOURCE = "reported by endpoints, not verified"
_QUANTILES = {"ttft_p50_s": 0.5, "ttft_p90_s": 0.9, "ttft_p99_s": 0.99}
_RUN = re.compile("[0-9a-f]{16,64}")
_READER = TypeAdapter(Report)


def read_report(data: bytes) -> Report:
    """Read the body of ``POST /v1/observations``.

    Raises
    ------
    RequestInvalid
        If it is no JSON, has an unknown or missing field, or a value outside its range; names the field.
    """
    try:
        report = _READER.validate_json(data)
    except ValidationError as error:
        wrong = error.errors(include_url=False, include_context=False, include_input=False)
        where = ".".join(str(step) for step in wrong[0]["loc"] if not isinstance(step, str) or step in _FIELDS)
        raise RequestInvalid(f"report: {where or 'body'}: {wrong[0]['type']}") from None
    try:
        _check(report)
    except RequestInvalid:
        raise
    except FedllmError as error:  # of a name or digest in it
        raise RequestInvalid(f"report: {error.message}") from None
    return report


_FIELDS = frozenset({*Report.__dataclass_fields__, *Observation.__dataclass_fields__})
"""Steps of a path that may be said again: an unknown field is the sender's own text."""


def _check(report: Report) -> None:
    check_name(report.endpoint, what="endpoint")
    if not _RUN.fullmatch(report.run):
        raise RequestInvalid("report: run is 16 to 64 hexadecimal digits")
    _within("sequence", report.sequence, 1, MAX_COUNT)
    _within("observations", len(report.observations), 1, MAX_OBSERVATIONS)
    for seen in report.observations:
        _check_observation(seen)
    keys = {(seen.version, seen.alias) for seen in report.observations}
    if len(keys) != len(report.observations):
        raise RequestInvalid("report: one observation for each version and alias, one is there twice")


def _check_observation(seen: Observation) -> None:
    check_digest(seen.version, what="version")
    check_alias(seen.alias)
    if not 0 <= seen.start <= seen.end <= MAX_COUNT:
        raise RequestInvalid("report: start and end are seconds since 1970, start first")
    if len(seen.ttft) != len(TTFT_BOUNDS_S) + 1:
        raise RequestInvalid(f"report: ttft has {len(seen.ttft)} counts, {len(TTFT_BOUNDS_S) + 1} expected")
    for count in seen.ttft:
        _within("ttft", count, 0, MAX_COUNT)
    for name in COUNTS:
        _within(name, getattr(seen, name), -MAX_COUNT if name in ("up", "down") else 0, MAX_COUNT)
    _within("errors", seen.errors_4xx + seen.errors_5xx, 0, seen.requests)
    _within("sum of ttft", sum(seen.ttft), 0, seen.requests)
    _within("up + down", seen.up + seen.down, 0, MAX_COUNT)


def _within(what: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise RequestInvalid(f"report: {what} is {value}: {least} to {most} allowed")


def summary_json(seen: Mapping[str, Iterable[Observation]]) -> dict[str, Any]:
    """Return what endpoints said of one version.

    Parameters
    ----------
    seen : Mapping[str, Iterable[Observation]]
        Endpoint to its sums by alias, all of one version.
    """
    every = [(endpoint, each) for endpoint, sums in seen.items() for each in sums]
    return {
        "source": SOURCE,
        "total": _numbers(reduce(Observation.plus, [each for _, each in every])) if every else None,
        "endpoints": [{"endpoint": endpoint, "alias": each.alias, **_numbers(each)} for endpoint, each in every],
    }


def _numbers(seen: Observation) -> dict[str, Any]:
    rated = seen.up + seen.down
    return {
        "first": seen.start,
        "last": seen.end,
        **{name: getattr(seen, name) for name in COUNTS},
        "error_rate": seen.errors_5xx / seen.requests if seen.requests else None,
        "up_share": seen.up / rated if rated else None,
        **{name: ttft_quantile(seen.ttft, share) for name, share in _QUANTILES.items()},
        "ttft": list(seen.ttft),
        "ttft_bounds_s": list(TTFT_BOUNDS_S),
    }
