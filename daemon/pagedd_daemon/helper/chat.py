"""Conversations to token ids, such that no message can forge a turn.

1. The template is rendered twice: plainly, and with the client's strings marked (`marks`). If the
   second without its marks is not the first, the marks changed what the template did: then only the
   contents of messages are marked, and if that does not help either, a conversation in which any
   string, or all of them joined, contains the spelling of a special token is refused, and any other
   is taken as it is.
2. The text is tokenised as a whole with special tokens on, which gives exactly the ids the model
   was trained on. If no special token reaches across a mark, these are the ids.
3. Otherwise a client wrote the spelling of a special token. The parts are tokenised one by one, the
   template's with special tokens and the client's without. Only then, the tokens at the edges of
   these parts may be others than those of the whole text: no token reaches across an edge.

What this does not guard is the choice of ``role``: a template may build a special token from it
(``<|`` + role + ``|>``), and choosing the role is the client's right.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from itertools import accumulate
from typing import Any

from pagedd_daemon.helper.marks import Marker, Rendered, SpecialText, strings_of
from pagedd_daemon.helper.templates import ChatTemplate, TemplateRefusedError
from pagedd_daemon.helper.vocabulary import Vocabulary


class ChatTokenizer:
    """Tokenises prompts and conversations for one model."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self._special = SpecialText(vocabulary.specials.values())
        self._template: ChatTemplate | None = None
        self._span = array("i", vocabulary.piece_lengths)
        for token, text in vocabulary.specials.items():
            self._span[token] = len(text.encode())

    def tokenize(self, text: str, *, special: bool, bos: bool) -> array[int]:
        """The ids of a text, with the model's start token where it wants one."""
        return self._with_bos(self.vocabulary.encode(text.encode(), special=special), bos)

    def chat(
        self,
        messages: list[Any],
        tools: list[Any] | None,
        args: dict[str, Any] | None,
        *,
        generation: bool,
        bos: bool,
        known: str | None,
    ) -> tuple[array[int], str, bool]:
        """Render and tokenise a conversation.

        Args:
            messages: For the template.
            tools: For the template.
            args: Further variables of the template.
            generation: Begin the model's turn.
            bos: Put the model's start token in front, where it wants one.
            known: Text whose ids the caller has.

        Returns:
            The ids; the text; whether ``known`` was given and the text does not begin with it. If
            it was and does, the ids are those of the rest.

        Raises:
            TemplateRefusedError: No template, or it does not take this conversation.
        """
        request = {**(args or {}), "messages": messages, "tools": tools or None}
        rendered = self._render(request, generation)
        if known is not None and rendered.text.startswith(known):
            return self._encode(rendered.after(known), glued=True), rendered.text, False
        ids = self._with_bos(self._encode(rendered, glued=False), bos)
        return ids, rendered.text, known is not None

    # ------------------------------------------------------------------------------- rendering

    def _render(self, request: dict[str, Any], generation: bool) -> Rendered:
        template = self._compiled()
        template.renew_clock()
        plain = template.render({**request, "add_generation_prompt": generation})
        for everything in (True, False):
            marker = Marker(self._special)
            marked = {
                name: marker.mark(value, everything=everything, key=name)
                for name, value in request.items()
            }
            try:
                rendered = marker.read(
                    template.render({**marked, "add_generation_prompt": generation})
                )
            except TemplateRefusedError:
                continue
            if rendered.text == plain:
                return self._checked(rendered, request)
        shown = list(strings_of(request, shown=True))
        joined = "".join(shown), "".join(text.strip() for text in shown)
        for text in (*strings_of(request), *joined):
            if text in self._special:
                raise TemplateRefusedError(
                    "the chat template rewrites messages, and a message contains the text of a "
                    "special token, which could then not be told from the template's own"
                )
        return Rendered.plain(plain)

    def _checked(self, rendered: Rendered, request: dict[str, Any]) -> Rendered:
        """The render, unless its marks cannot show a special token spelt with one character."""
        if not rendered.whole and any(map(self._special.has_single, strings_of(request))):
            raise TemplateRefusedError(
                "the chat template takes messages apart, and a message contains a character that "
                "is a special token of the model"
            )
        return rendered

    def _compiled(self) -> ChatTemplate:
        if self._template is None:
            vocabulary = self.vocabulary
            if vocabulary.template is None:
                raise TemplateRefusedError("the model has no chat template")
            self._template = ChatTemplate(
                vocabulary.template,
                vocabulary.specials.get(vocabulary.bos, ""),
                vocabulary.specials.get(vocabulary.eos, ""),
            )
        return self._template

    # ------------------------------------------------------------------------------ tokenising

    def _encode(self, rendered: Rendered, *, glued: bool) -> array[int]:
        data = rendered.text.encode()
        ids = self.vocabulary.encode(data, special=True, glued=glued)
        if self._all_genuine(ids, len(data), rendered):
            return ids
        ids = array("i")
        for client, part in rendered.parts:
            after_text = ids[-1] not in self.vocabulary.specials if ids else glued
            ids += self.vocabulary.encode(part.encode(), special=not client, glued=after_text)
        return ids

    def _all_genuine(self, ids: array[int], size: int, rendered: Rendered) -> bool:
        """Whether every special token in the ids of the whole text is the template's."""
        specials = self.vocabulary.specials
        found = [index for index, token in enumerate(ids) if token in specials]
        if not found or not rendered.cuts:
            return True
        if any(client and self._special.has_single(part) for client, part in rendered.parts):
            return False
        ends = list(accumulate(map(self._span.__getitem__, ids)))
        if ends[-1] != size:
            return False  # the tokeniser changed the text (put spaces in): positions say nothing
        cuts = rendered.cuts
        for index in found:
            start = ends[index - 1] if index else 0
            cut = bisect_right(cuts, start)
            if cut < len(cuts) and cuts[cut] < ends[index]:
                return False
        return True

    def _with_bos(self, ids: array[int], bos: bool) -> array[int]:
        """The ids with the start token, which the template may have put there already."""
        vocabulary = self.vocabulary
        if bos and vocabulary.add_bos and ids[:1] != array("i", [vocabulary.bos]):
            ids.insert(0, vocabulary.bos)
        return ids
