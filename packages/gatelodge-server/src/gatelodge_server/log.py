"""One JSON object a line on standard error: who, what, when, from where. All but ASCII is escaped: one line is one event.

Nothing here is given a secret: what is logged is ids, codes and addresses.
"""

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    import structlog

_ENCODER: Final = msgspec.json.Encoder(enc_hook=repr)
_DELETE: Final = b"\x7f"


def _render(_logger: object, _method: str, event: "structlog.typing.EventDict") -> bytes:
    # One step in place of structlog's three: a line is written for every login and refresh.
    line = _ENCODER.encode({"at": datetime.now(UTC), **event})  # noqa: TID251 - a log has the machine's own time
    if line.isascii() and _DELETE not in line:
        return line
    # U+0085 and U+2028 end a line for some readers, U+009B begins an escape sequence, U+202E turns the text around.
    return json.dumps(json.loads(line)).encode("ascii").replace(_DELETE, b"\\u007f")


def configure_log() -> None:
    """Set up the log of this process."""
    import structlog  # noqa: PLC0415 - see ``Log``

    structlog.configure(
        processors=[_render],
        wrapper_class=structlog.make_filtering_bound_logger("info"),
        logger_factory=structlog.BytesLoggerFactory(sys.stderr.buffer),
        cache_logger_on_first_use=True,
    )


class Log:
    """The log. What it needs takes a third of a second to import, and most commands have nothing to say here."""

    before_first_line: Callable[[], None] | None = None
    """Sets it up, if that has not been done by then."""

    @cached_property
    def _logger(self) -> Any:  # noqa: ANN401 - structlog's own type says no more
        import structlog  # noqa: PLC0415

        if self.before_first_line is not None and not structlog.is_configured():
            self.before_first_line()
        return structlog.get_logger()

    def __getattr__(self, level: str) -> Any:  # noqa: ANN401
        return getattr(self._logger, level)


log: Final = Log()
