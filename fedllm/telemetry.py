"""Logs as JSON lines (or plain lines on a terminal), with fields instead of sentences built from data.

Log calls pass names and numbers as fields; training text, prompts and secrets are never fields.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import TextIO

from fedllm.clock import Clock, iso_utc

_FIELDS = "fedllm_fields"


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, logger, event, fields.

    Parameters
    ----------
    clock : Clock
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line."""
        entry: dict[str, object] = {
            "time": iso_utc(self._clock.now()),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        entry.update(getattr(record, _FIELDS, {}))
        if record.exc_info and record.exc_info[0] is not None:
            # The traceback's text could quote data; type and place are enough to find the line.
            trace = record.exc_info[2]
            while trace is not None and trace.tb_next is not None:
                trace = trace.tb_next
            at = f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}" if trace else "?"
            entry["exception"] = f"{record.exc_info[0].__name__} at {at}"
        return json.dumps(entry, default=str)


class PlainLines(JsonLines):
    """The same content for people: ``12:00:00 event key=value``."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one readable line."""
        entry = json.loads(super().format(record))
        stamp = entry.pop("time")[11:19]
        level, event = entry.pop("level"), entry.pop("event")
        entry.pop("logger")
        mark = "" if level == "info" else f"{level}: "
        return " ".join([stamp, mark + event, *(f"{k}={v}" for k, v in entry.items())])


def configure(clock: Clock, *, stream: TextIO | None = None, level: int = logging.INFO) -> None:
    """Send all ``fedllm`` logs to stderr: plain lines on a terminal, JSON lines elsewhere."""
    target = stream or sys.stderr
    handler = logging.StreamHandler(target)
    handler.setFormatter(PlainLines(clock) if target.isatty() else JsonLines(clock))
    root = logging.getLogger("fedllm")
    root.handlers[:] = [handler]
    root.setLevel(level)
    root.propagate = False


def event(logger: logging.Logger, name: str, *, level: int = logging.INFO, **fields: object) -> None:
    """Log one event with fields; names and numbers only."""
    logger.log(level, name, extra={_FIELDS: fields})
