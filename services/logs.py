"""What is logged: slide ids, never a path. To stderr, as text from warnings on, or as JSON with a line per request."""

import json
import logging
import time
from typing import Any

from manifests.privacy import without_paths


class TextFormatter(logging.Formatter):
    """A sentence, and what went wrong, without paths."""

    def format(self, record: logging.LogRecord) -> str:
        return without_paths(super().format(record))


class JsonFormatter(logging.Formatter):
    """One object per line: time (UTC), level, message, and what the record tells besides."""

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {"time": f"{at}.{round(record.msecs) % 1000:03d}Z", "level": record.levelname.lower()}
        line |= {"message": without_paths(record.getMessage()), **getattr(record, "told", {})}
        if record.exc_info:
            line["error"] = without_paths(self.formatException(record.exc_info))
        return json.dumps(line, ensure_ascii=False, default=str)


def set_up_logging(as_json: bool) -> None:
    """Everything that this process logs goes to stderr from now on."""
    handler = logging.StreamHandler()
    handler.setFormatter(JsonFormatter() if as_json else TextFormatter("slidegrad: %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("services").setLevel(logging.INFO if as_json else logging.WARNING)
    # One line for each broken request would let anybody fill the disk.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
