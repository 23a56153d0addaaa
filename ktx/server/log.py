"""Log output as text or JSON lines. Prompts are logged only with --log-prompts."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from ktx.server import request_id

STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


class LogFormatter(logging.Formatter):
    """Formats a record as text or as JSON, with the fields of `extra` and the id of the current request.

    Args:
        as_json: whether to format records as JSON.
    """

    def __init__(self, as_json: bool):
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """Returns a record as one line: its message, the fields of `extra`, and the request id if there is one."""
        extra = {key: value for key, value in vars(record).items() if key not in STANDARD_FIELDS and key[0] != "_"}
        if current_id := request_id.CURRENT.get():
            extra["request_id"] = current_id
        if not self.as_json:
            text = super().format(record)
            return text + "".join(f" {key}={value}" for key, value in extra.items())
        fields: dict[str, Any] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **extra,
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json.dumps(fields, ensure_ascii=False, default=str)


def configure_logging(level: str, log_format: str) -> None:
    """Sends the log of ktx and uvicorn (warnings and errors only) to standard error.

    Args:
        level: lowest level that is logged, such as "info".
        log_format: "json" or "text".
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter(log_format == "json"))
    for name in ("ktx", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger("ktx").level))
