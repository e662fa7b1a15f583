"""One JSON object a line on standard error: who, what, when, from where. Values are escaped, so a line is always one event.

Nothing here is given a secret: what is logged is ids, codes and addresses.
"""

import sys
from typing import Any, Final

import msgspec
import structlog

_ENCODER: Final = msgspec.json.Encoder(enc_hook=repr)


def _encode(event: Any, **_: Any) -> bytes:  # noqa: ANN401 - structlog's signature
    return _ENCODER.encode(event)


def configure_log() -> None:
    """Set up the log of this process."""
    structlog.configure(
        processors=[
            structlog.processors.TimeStamper(fmt="iso", utc=True, key="at"),
            structlog.processors.JSONRenderer(serializer=_encode),
        ],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer),
        cache_logger_on_first_use=True,
    )


log: structlog.typing.FilteringBoundLogger = structlog.get_logger()
