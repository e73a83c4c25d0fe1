"""Between texts and token ids: what a request gives the model to read, and the verbs that ask for
nothing else."""

from __future__ import annotations

import asyncio
from array import array
from typing import Any

from pagedd_daemon.front import requests as r
from pagedd_daemon.front.detokenizer import Detokenizer, pack_ids, unpack_ids
from pagedd_daemon.front.errors import WireError
from pagedd_daemon.front.fitting import check_ids
from pagedd_daemon.front.model_ports import Conversation
from pagedd_daemon.front.models import Model
from pagedd_daemon.front.sessions import Turn

OfTexts = r.Tokenize | r.Detokenize | r.Render
"""Verbs that are answered by a model's text alone."""

_SLICE = 4096
"""Token ids turned into text before other work gets its turn."""


async def prompt(request: r.Generation, model: Model, turn: Turn | None) -> array[int]:
    """What the model is to go on from, once the grammar of the request has been tried.

    Args:
        request: Text, conversation, turn of a session, or token ids.
        model: The one that serves it.
        turn: Of the session, if it is one's.

    Raises:
        WireError: ``E_NO_TOKENIZER``, or what the helpers say.
    """
    if model.text.pieces is None:
        raise WireError("E_NO_TOKENIZER", "the model has no tokeniser: send token ids")
    kind, grammar = request.constraint()
    if kind:
        await model.text.try_grammar(kind, grammar)
    if turn is not None:
        return await turn.prompt(model)
    if isinstance(request, r.Chat):
        chat = Conversation(request.messages, request.tools, request.template_args)
        return (await model.text.chat(chat)).ids
    assert isinstance(request, r.Generate)
    if request.tokens is not None:
        return unpack_ids(request.tokens)
    assert request.prompt is not None
    # As `tokenize` does by default: a text that apps pasted together cannot forge a turn.
    return await model.text.tokenize(request.prompt, special=False, bos=True)


async def inputs(request: r.Embed, model: Model) -> list[array[int]]:
    """Token ids of each text whose vector is asked for.

    Raises:
        WireError: ``E_NO_TOKENIZER``, ``E_FIELD``, or what the helpers say.
    """
    if request.tokens:
        found = [unpack_ids(ids) for ids in request.tokens]
    elif model.text.pieces is None:
        raise WireError("E_NO_TOKENIZER", "the model has no tokeniser: send token ids")
    else:
        found = [await model.text.tokenize(text, special=False, bos=True) for text in request.texts]
    for ids in found:
        check_ids(ids, model.ready.vocab_size)
    return found


async def answer(request: OfTexts, model: Model, most_pieces: int) -> dict[str, Any]:
    """The result of a verb; at most ``most_pieces`` tokens are told the bytes of.

    Raises:
        WireError: ``E_NO_TOKENIZER``, ``E_FIELD``, ``E_LIMIT``, or what the helpers say.
    """
    if model.text.pieces is None:
        raise WireError("E_NO_TOKENIZER", "the model has no tokeniser")
    if isinstance(request, r.Tokenize):
        ids = await model.text.tokenize(request.text, request.special, request.bos)
        return {"tokens": pack_ids(ids)}
    if isinstance(request, r.Render):
        rendered = await model.text.chat(
            Conversation(request.messages, request.tools, request.template_args)
        )
        told = {"text": rendered.text, "tokens": pack_ids(rendered.ids)}
        return {**told, "model": model.entry.name}
    return await _detokenize(request, model, most_pieces)


async def _detokenize(request: r.Detokenize, model: Model, most: int) -> dict[str, Any]:
    table = model.text.pieces
    assert table is not None
    ids = unpack_ids(request.tokens)
    check_ids(ids, len(table))
    if request.pieces and len(ids) > most:
        details = {"limit": "list_entries", "value": most, "tokens": len(ids)}
        raise WireError("E_LIMIT", f"pieces of {len(ids)} tokens, {most} at most", details=details)
    detokenizer = Detokenizer(table)
    parts = []
    for at in range(0, len(ids), _SLICE):
        parts.append(detokenizer.push(ids[at : at + _SLICE]))
        await asyncio.sleep(0)
    text = "".join(parts) + detokenizer.finish()
    if table.space_prefix:
        text = text.removeprefix(" ")
    pieces = {"pieces": [table[token] for token in ids]} if request.pieces else {}
    return {"text": text, **pieces}
