"""Tokens to text: the same text for any grouping, whole characters, an exact cut at a stop."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pagedd_daemon.front.detokenizer import Detokenizer, PieceTable, pack_ids, unpack_ids

BYTES = PieceTable([1] * 256 + [0, 0], bytes(range(256)))


def table_of(pieces: list[bytes]) -> PieceTable:
    return PieceTable([len(p) for p in pieces], b"".join(pieces))


def cut(data: bytes, points: list[int]) -> list[bytes]:
    edges = [0, *sorted(p % (len(data) + 1) for p in points), len(data)]
    return [data[a:b] for a, b in pairwise(edges)]


def first_stop(text: str, stops: list[str]) -> int | None:
    """Where the text ends by definition: the stop complete first, the longest on a tie."""
    for end in range(1, len(text) + 1):
        starts = [end - len(s) for s in stops if text.endswith(s, 0, end)]
        if starts:
            return min(starts)
    return None


def begin_before(pieces: list[bytes], first: int) -> list[bool]:
    """Of each token with text, whether it begins before character ``first``, from bytes alone."""
    data = b"".join(pieces)
    stop_byte = next(
        n for n in range(len(data) + 1) if len(decoded_characters(data[:n], data)) >= first + 1
    )
    starts = [len(b"".join(pieces[:i])) for i in range(len(pieces))]
    return [start < stop_byte - 1 for start, piece in zip(starts, pieces, strict=True) if piece]


def decoded_characters(prefix: bytes, data: bytes) -> str:
    """The characters of ``data`` whose first byte lies in ``prefix``."""
    whole = data.decode("utf-8", "replace")
    at = 0
    for index in range(len(whole)):
        if at >= len(prefix):
            return whole[:index]
        at += character_bytes(data, at)
    return whole


def character_bytes(data: bytes, at: int) -> int:
    """How many bytes the decoder turns into the one character at ``at``."""
    one = data[at:].decode("utf-8", "replace")[0]
    for n in range(1, 5):
        if data[at : at + n].decode("utf-8", "replace") == one and (
            data[at : at + n + 1].decode("utf-8", "replace") != one or at + n >= len(data)
        ):
            return n
    raise AssertionError((data, at))


ALPHABET = "ab<|é€😀 \ufffd"
texts = st.text(st.sampled_from(ALPHABET), max_size=40)
raw = st.one_of(
    texts.map(str.encode),
    st.lists(
        st.sampled_from([b"a", b"b", b"\xc3", b"\xa9", b"\xe2\x82", b"\xf0\x9f", b"\xff", b"\x80"]),
        max_size=30,
    ).map(b"".join),
)
stop_lists = st.lists(st.text(st.sampled_from(ALPHABET), min_size=1, max_size=4), max_size=4)
points = st.lists(st.integers(0, 10_000), max_size=30)


def run(pieces: list[bytes], stops: list[str], group: int) -> tuple[list[str], str, Detokenizer]:
    detokenizer = Detokenizer(table_of(pieces), stops)
    ids = list(range(len(pieces)))
    shown = [detokenizer.push(ids[i : i + group]) for i in range(0, len(ids), group)]
    return shown, detokenizer.finish(), detokenizer


@settings(max_examples=400, deadline=None)
@given(raw, points, st.integers(1, 5))
def test_any_split_of_any_bytes_gives_the_text_of_the_whole(
    data: bytes, where: list[int], group: int
) -> None:
    shown, rest, detokenizer = run(cut(data, where), [], group)
    assert "".join(shown) + rest == data.decode("utf-8", "replace")
    assert detokenizer.kept_tokens == len(cut(data, where))


@settings(max_examples=1500, deadline=None)
@given(raw, points, stop_lists, st.integers(1, 5))
def test_text_ends_exactly_before_the_first_stop_string_and_never_shows_one(
    data: bytes, where: list[int], stops: list[str], group: int
) -> None:
    pieces = cut(data, where)
    shown, rest, detokenizer = run(pieces, stops, group)
    whole = data.decode("utf-8", "replace")
    first = first_stop(whole, stops)
    assert "".join(shown) + rest == whole[:first]
    assert detokenizer.stopped == (first is not None)
    assert not any(s in "".join(shown) + rest for s in stops)
    for text in shown:
        text.encode()  # every piece shown is whole characters
    if first is None:
        assert detokenizer.kept_tokens == len(pieces)
    else:
        kept = pieces[: detokenizer.kept_tokens]
        assert sum(begin_before(pieces, first)) == sum(1 for piece in kept if piece)


@settings(max_examples=200, deadline=None)
@given(texts, points, stop_lists)
def test_nothing_is_held_that_cannot_start_a_stop_string(
    text: str, where: list[int], stops: list[str]
) -> None:
    detokenizer = Detokenizer(BYTES, stops)
    shown = ""
    for end, char in enumerate(text, 1):
        shown += detokenizer.push(list(char.encode()))
        if detokenizer.stopped:
            return
        held = text[len(shown) : end]
        assert not held or any(s.startswith(held) for s in stops)


def test_a_stop_string_across_tokens_cuts_the_token_it_begins_in() -> None:
    table = table_of([b"Hello", b" wor", b"ld<", b"|en", b"d|>", b"more"])
    detokenizer = Detokenizer(table, ["<|end|>"])
    assert [detokenizer.push([i]) for i in range(6)] == ["Hello", " wor", "ld", "", "", ""]
    assert detokenizer.stopped
    assert detokenizer.kept_tokens == 3  # "ld<" starts before the stop string
    assert detokenizer.finish() == ""


def test_tokens_after_a_stop_in_the_same_push_are_not_kept() -> None:
    table = table_of([b"a", b"STOP", b"b", b"c"])
    detokenizer = Detokenizer(table, ["STOP"])
    assert detokenizer.push([0, 1, 2, 3]) == "a"
    assert detokenizer.kept_tokens == 1


def test_control_tokens_show_nothing_and_do_not_break_characters() -> None:
    detokenizer = Detokenizer(BYTES)
    assert detokenizer.push([0xE2, 256, 0x82]) == ""
    assert detokenizer.push([257, 0xAC]) == "€"


def test_a_held_prefix_is_given_back_when_it_was_no_stop_string() -> None:
    detokenizer = Detokenizer(BYTES, ["</s>"])
    assert detokenizer.push(list(b"x</")) == "x"
    assert detokenizer.push(list(b"b>")) == "</b>"
    assert detokenizer.push(list(b"</")) == ""
    assert detokenizer.finish() == "</"


@pytest.mark.parametrize("token", [-1, 258, 2**31 - 1])
def test_an_id_outside_the_vocabulary_is_an_error(token: int) -> None:
    with pytest.raises(IndexError):
        Detokenizer(BYTES).push([token])


def test_packed_ids_round_trip_and_a_broken_length_is_an_error() -> None:
    assert pack_ids([1, 258]) == b"\x01\x00\x00\x00\x02\x01\x00\x00"
    assert pack_ids(b"ab") == pack_ids([97, 98])
    assert list(unpack_ids(pack_ids([0, 5, 49151]))) == [0, 5, 49151]
    with pytest.raises(ValueError, match="multiple"):
        unpack_ids(b"abc")


def test_whole_texts_lose_the_tokenisers_own_leading_space_only() -> None:
    table = PieceTable([6, 6], b" Hello world", space_prefix=True)
    assert table.decode([0, 1]) == "Hello world"
    assert Detokenizer(table).push([1]) == " world"


def test_a_table_whose_lengths_do_not_add_up_is_refused() -> None:
    with pytest.raises(ValueError, match="blob"):
        PieceTable([1, 2], b"ab")


def test_stop_strings_do_not_count_in_the_first_tokens() -> None:
    table = table_of([bytes([byte]) for byte in range(256)])
    data = "END é END tail".encode()
    for size in (1, 2, 5, 64):
        detokenizer = Detokenizer(table, ["END"], after=6)
        shown = [detokenizer.push([*data[at : at + size]]) for at in range(0, len(data), size)]
        assert "".join(shown) + detokenizer.finish() == "END é "
        assert detokenizer.kept_tokens == len("END é ".encode())
