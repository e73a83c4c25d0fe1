"""The errors the daemon answers with: docs/protocol.md, section 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RETRYABLE: Mapping[str, bool] = {
    "E_MALFORMED": False,
    "E_VERSION": False,
    "E_VERB": False,
    "E_FIELD": False,
    "E_LIMIT": False,
    "E_HELLO": False,
    "E_TOKEN": False,
    "E_TOO_LONG": False,
    "E_NEVER_FITS": False,
    "E_TOKEN_ID": False,
    "E_TEMPLATE": False,
    "E_GRAMMAR": False,
    "E_NO_TOKENIZER": False,
    "E_NO_EMBEDDING": False,
    "E_CANCELLED": False,
    "E_SESSION": False,
    "E_EXPIRED": False,
    "E_COMMIT": False,
    "E_BUSY": True,
    "E_DUPLICATE": False,
    "E_MODEL": False,
    "E_NO_MODEL": True,
    "E_DRAINING": True,
    "E_DEADLINE": True,
    "E_ENGINE": True,
    "E_POISON": False,
    "E_HELPER": True,
    "E_SLOW": True,
    "E_FORBIDDEN": False,
    "E_CONFIG": False,
    "E_INTERNAL": False,
}
"""Every code, and whether the same request may succeed later."""


class WireError(Exception):
    """What is wrong with a request, ready to be sent.

    Attributes:
        code: One of `RETRYABLE`.
        message: For people; never holds text of a prompt.
        details: The figures that explain it; str, int, float, None, and lists of these.
        id: The request it answers; ``""`` where none could be read.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        details: Mapping[str, Any] | None = None,
        id: str = "",
    ) -> None:
        assert code in RETRYABLE, code
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.details: dict[str, Any] = dict(details or {})
        self.id = id

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed later."""
        return RETRYABLE[self.code]

    def as_event(self, id: str, seq: int) -> dict[str, Any]:
        """The ``error`` event that ends request ``id``."""
        return {
            "id": id,
            "seq": seq,
            "type": "error",
            "code": self.code,
            "message": self.message,
            "retryable": self.retryable,
            "details": self.details,
        }


def limit_error(name: str, value: int, at_most: int, **details: Any) -> WireError:
    """``E_LIMIT``: ``value`` is over the limit called ``name`` in docs/protocol.md, section 7."""
    return WireError(
        "E_LIMIT",
        f"{name} is {value}, the limit is {at_most}",
        details={"limit": name, "value": value, "max": at_most, **details},
    )
