"""A value that must not get out by accident."""

from typing import NoReturn


class Secret:
    """Text that only ``reveal`` gives out: not ``repr``, ``str`` or a format, no comparison, no hash, no copy on a wire.

    ``reveal`` is one word on purpose: a search for it lists every place where a secret leaves its wrapper.
    """

    __slots__ = ("_text",)

    def __init__(self, text: str) -> None:
        self._text = text

    def reveal(self) -> str:
        """The text itself, for the one who is meant to have it."""
        return self._text

    def __repr__(self) -> str:
        return "Secret(…)"

    __str__ = __repr__

    def __format__(self, spec: str) -> str:
        return repr(self)

    def __eq__(self, other: object) -> NoReturn:
        raise TypeError("compare digests of secrets with hmac.compare_digest, not secrets")

    def __hash__(self) -> NoReturn:
        raise TypeError("a secret is no key of a mapping")

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret is not serialised")
