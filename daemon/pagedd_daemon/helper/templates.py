"""Chat templates of model files, as Hugging Face's ``apply_chat_template`` understands them.

The sandbox keeps a template from reaching anything but its variables; time and memory are limited
by the process (`confine`) and the front. A template comes from a model file, never from a request.
"""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class TemplateRefusedError(Exception):
    """The template cannot be used, or not with these messages; ``E_TEMPLATE`` on the wire."""


class _Generation(Extension):
    """``{% generation %}`` marks what a model wrote, for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 -- jinja2 reads a set

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        """The body of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: object) -> NoReturn:
    raise TemplateError(str(message))


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is, where jinja2's own filter would escape it for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class ChatTemplate:
    """A compiled chat template."""

    def __init__(self, source: str, bos_token: str, eos_token: str) -> None:
        """Compile a template.

        Raises:
            TemplateRefusedError: It is no valid template.
        """
        self._now = datetime.now().astimezone()
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols", _Generation],
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda form: self._now.strftime(form)
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise TemplateRefusedError(f"the chat template is invalid: {_short(error)}") from error

    def renew_clock(self) -> None:
        """What ``strftime_now`` returns until the next call: all renders of a request agree."""
        self._now = datetime.now().astimezone()

    def render(self, variables: dict[str, Any]) -> str:
        """The text of a conversation.

        Args:
            variables: ``messages``, ``tools``, ``add_generation_prompt`` and template arguments.

        Raises:
            TemplateRefusedError: The template refused the messages, or failed on them.
            MemoryError: It made too much of them.
        """
        try:
            return self._template.render({**variables, **self._tokens})
        except MemoryError:
            raise
        except TemplateError as error:
            raise TemplateRefusedError(f"the chat template refused: {_short(error)}") from error
        except Exception as error:  # a template is a program, and can fail in any way
            kind = type(error).__name__
            raise TemplateRefusedError(
                f"the chat template failed with {kind}: {_short(error)}"
            ) from error


def _short(error: Exception) -> str:
    return str(error)[:300]
