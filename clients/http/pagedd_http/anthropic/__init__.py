"""Anthropic's interface: messages, and how many tokens they have.

Shapes are those of its published API reference, as the ``anthropic`` package reads them.
"""

from __future__ import annotations

from pagedd_http.anthropic import messages
from pagedd_http.anthropic.replies import error_body
from pagedd_http.interfaces import Interface

INTERFACE = Interface(prefixes=("/v1/messages",), routes=messages.routes, error_body=error_body)
