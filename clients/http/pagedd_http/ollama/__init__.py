"""Ollama's interface: generate, chat, and what it says of models.

Shapes are those of its published API reference, as the ``ollama`` package reads them.
"""

from __future__ import annotations

from pagedd_http.interfaces import Interface
from pagedd_http.ollama import chat, embed, generate, models
from pagedd_http.ollama.replies import error_body

INTERFACE = Interface(
    prefixes=("/api/",),
    routes=[*models.routes, *generate.routes, *chat.routes, *embed.routes],
    error_body=error_body,
)
