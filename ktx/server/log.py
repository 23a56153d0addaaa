"""Log lines, as text or as JSON objects. Prompts are in none of them unless --hide_input false asks for it."""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from ktx.server import request_id

OWN = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


class LogFormatter(logging.Formatter):
    """Time, level, who, what; JSON with whatever else was said by `extra`, and the request's id where the line is of one."""

    def __init__(self, as_json: bool):
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s", "%H:%M:%S")
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        more = {key: value for key, value in vars(record).items() if key not in OWN and key[0] != "_"}
        if name := request_id.CURRENT.get():
            more["request_id"] = name
        if not self.as_json:
            text = super().format(record)
            return text + "".join(f" {key}={value}" for key, value in more.items())
        told: dict[str, Any] = {
            "time": record.created,
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **more,
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        return json.dumps(told, ensure_ascii=False, default=str)


def set_up(level: str, form: str) -> None:
    """Sends our lines and uvicorn's to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogFormatter(form == "json"))
    for name in ("ktx", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level.upper())
    logging.getLogger("uvicorn").setLevel(max(logging.WARNING, logging.getLogger("ktx").level))
