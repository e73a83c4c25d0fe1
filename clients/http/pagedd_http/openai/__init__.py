"""OpenAI's interface: completions, chat completions, responses, models.

Shapes are those of the published API reference, as the ``openai`` package reads them.
"""

from __future__ import annotations

from pagedd_http.interfaces import Interface
from pagedd_http.openai import chat, completions, embeddings, models, responses, tokens
from pagedd_http.openai.replies import error_body

INTERFACE = Interface(
    prefixes=("/v1/",),
    routes=[
        *models.routes,
        *completions.routes,
        *chat.routes,
        *embeddings.routes,
        *responses.routes,
        *tokens.routes,
    ],
    error_body=error_body,
)
