"""The table of records: whoever reads it after a crash at any byte sees right pages or none."""

from __future__ import annotations

import fcntl
import os
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpager.types import PageName
from pagedd_daemon.engine.tiers.ram import RamStore
from pagedd_daemon.engine.tiers.ranges import UNIT, Ranges
from pagedd_daemon.engine.tiers.records import (
    RECORD_BYTES,
    TABLE_OFFSET,
    Record,
    RecordTable,
    Shape,
    TierFormatError,
    bind,
)
from pagedd_daemon.memory_file import create_memory, memory_size

SLOTS, PAGE = 6, 64
SHAPE = Shape(bind("test"), SLOTS, TABLE_OFFSET + SLOTS * RECORD_BYTES + 4096 + SLOTS * PAGE)


class Killed(Exception):  # noqa: N818
    """The writer is no more."""


class Mortal(bytearray):
    """Memory whose writer is killed after so many bytes."""

    left = 1 << 60

    def __setitem__(self, where: slice, data: bytes) -> None:  # type: ignore[override]
        assert where.stop - where.start == len(data)
        allowed = min(len(data), self.left)
        self.left -= allowed
        super().__setitem__(slice(where.start, where.start + allowed), data[:allowed])
        if allowed < len(data):
            raise Killed


def name(number: int, before: int = -1) -> PageName:
    return PageName(digest(number), digest(before) if before >= 0 else None)


def digest(number: int) -> bytes:
    return bytes([1 + number]) * 32


def content(number: int) -> bytes:
    return bytes([number % 251]) * PAGE


def store(memory: Mortal, table: RecordTable, slot: int, number: int) -> None:
    """What a backend does: clear, write, commit."""
    table.clear((slot,))
    at = SHAPE.data_offset + slot * PAGE
    memory[at : at + PAGE] = content(number)
    table.commit(Record(slot, name(number), 16, slot * PAGE, PAGE))


def check_pages(memory: Mortal) -> dict[int, int]:
    """Slot and number of what a reader without help finds, each with its right bytes."""
    found = {}
    for record in RecordTable(memory, SHAPE).committed():
        at = SHAPE.data_offset + record.offset
        number = next(n for n in range(20) if name(n).digest == record.name.digest)
        assert bytes(memory[at : at + PAGE]) == content(number), "a wrong page"
        found[record.slot] = number
    return found


@settings(max_examples=60, deadline=None)
@given(
    history=st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=12),
    killed_at=st.integers(0, 12 * (PAGE + RECORD_BYTES + 2)),
    makes=st.booleans(),
)
def test_a_writer_killed_at_any_byte_leaves_no_wrong_page(
    history: list[int], killed_at: int, makes: bool
) -> None:
    memory = Mortal(SHAPE.total_bytes)
    # What was there before is another model's, or the rubbish of one that was killed.
    memory[TABLE_OFFSET : TABLE_OFFSET + 3 * RECORD_BYTES] = b"\x02" * 3 * RECORD_BYTES
    table = None
    if not makes:
        table = RecordTable(memory, SHAPE)
    memory.left = killed_at
    done: dict[int, int] = {}
    at = -1
    try:
        table = table or RecordTable(memory, SHAPE)
        for at, slot in enumerate(history):
            store(memory, table, slot, at)
            done[slot] = at
    except Killed:
        done.pop(history[at], None)
    memory.left = 1 << 60
    found = check_pages(memory)
    interrupted = history[at] if at >= 0 else -1
    assert {s: n for s, n in found.items() if s != interrupted} == {
        s: n for s, n in done.items() if s != interrupted
    }


def test_every_flipped_bit_of_a_record_loses_it_and_no_other() -> None:
    memory = Mortal(SHAPE.total_bytes)
    table = RecordTable(memory, SHAPE)
    for slot in range(3):
        store(memory, table, slot, slot)
    for bit in range(8 * RECORD_BYTES):
        at = TABLE_OFFSET + RECORD_BYTES + bit // 8
        memory[at : at + 1] = bytes([memory[at] ^ 1 << bit % 8])
        assert check_pages(memory) == {0: 0, 2: 2}
        memory[at : at + 1] = bytes([memory[at] ^ 1 << bit % 8])
    assert check_pages(memory) == {0: 0, 1: 1, 2: 2}


def test_records_come_back_as_they_were_and_newer_ones_get_higher_generations() -> None:
    memory = Mortal(SHAPE.total_bytes)
    table = RecordTable(memory, SHAPE)
    assert not table.found
    table.commit(Record(3, name(1), 16, 128, 64, start=32, whole=48, crc=77))
    table.commit(Record(1, name(2, before=1), 9, 64, 64))
    again = RecordTable(memory, SHAPE)
    assert again.found
    first, second = again.committed()
    assert first == Record(3, name(1), 16, 128, 64, 32, 48, 77, generation=1)
    assert second == Record(1, name(2, before=1), 9, 64, 64, generation=2)
    again.commit(Record(0, name(3), 16, 0, 64))
    assert [r.generation for r in RecordTable(memory, SHAPE).committed()] == [1, 2, 3]


@pytest.mark.parametrize("other", ["binding", "slots", "size"])
def test_a_table_of_another_shape_is_made_anew(other: str) -> None:
    memory = Mortal(SHAPE.total_bytes)
    store(memory, RecordTable(memory, SHAPE), 0, 0)
    shape = {
        "binding": Shape(bind("another model"), SLOTS, SHAPE.total_bytes),
        "slots": Shape(SHAPE.binding, SLOTS - 1, SHAPE.total_bytes),
        "size": Shape(SHAPE.binding, SLOTS, SHAPE.total_bytes - 8),
    }[other]
    table = RecordTable(memory, shape)
    assert not table.found
    assert table.committed() == []
    # The first one's pages must not be found when it comes back either.
    assert check_pages(memory) == {}


def test_figures_out_of_bounds_are_no_records() -> None:
    memory = Mortal(SHAPE.total_bytes)
    table = RecordTable(memory, SHAPE)
    end = SHAPE.data_bytes
    for slot, (offset, length, tokens) in enumerate(
        [(end - 10, 11, 16), (1 << 63, 1 << 63, 16), (0, 0, 16), (0, 8, 0), (end - 11, 11, 16)]
    ):
        table.commit(Record(slot, name(slot), tokens, offset, length))
    assert [record.slot for record in RecordTable(memory, SHAPE).committed()] == [4]


def test_a_record_in_the_wrong_place_is_none() -> None:
    memory = Mortal(SHAPE.total_bytes)
    table = RecordTable(memory, SHAPE)
    store(memory, table, 0, 0)
    at = TABLE_OFFSET
    memory[at + RECORD_BYTES : at + 2 * RECORD_BYTES] = bytes(memory[at : at + RECORD_BYTES])
    assert check_pages(memory) == {0: 0}


def test_a_file_without_room_for_its_table_is_refused() -> None:
    with pytest.raises(TierFormatError, match="no room for 100 records"):
        RecordTable(bytearray(8192), Shape(bind("x"), 100, 8192))


def test_bindings_differ_where_their_parts_do() -> None:
    digests = {bind(), bind("ab"), bind("a", "b"), bind(b"a", "b"), bind("a", 1), bind("a", "1")}
    assert len(digests) == 4
    assert all(len(digest) == 32 for digest in digests)


# ------------------------------------------------------------------------------------ memory file


def test_the_memory_file_is_sealed_against_resizing_and_not_inherited_by_itself() -> None:
    descriptor = create_memory(1 << 20)
    try:
        size = os.fstat(descriptor).st_size
        assert size == memory_size(1 << 20)
        for other in (size - 4096, size + 4096):
            with pytest.raises(PermissionError):
                os.ftruncate(descriptor, other)
        seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        assert seals == fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        assert not os.get_inheritable(descriptor)
        assert os.fstat(descriptor).st_blocks == 0, "memory nobody asked for"
    finally:
        os.close(descriptor)


def test_the_next_engine_finds_what_the_last_one_committed_in_memory() -> None:
    descriptor = create_memory(1 << 20)
    try:
        first = RamStore(descriptor, 1 << 20, bind("m"), 8)
        assert first.found == []
        first.data[4096:4106] = np.arange(10)
        first.commit(Record(5, name(1), 16, 4096, 10))
        first.data[8192:8202] = 9
        second = RamStore(descriptor, 1 << 20, bind("m"), 8)  # while the first is still mapped
        (record,) = second.found
        assert (record.slot, record.name) == (5, name(1))
        assert second.data[record.offset : record.offset + record.length].tolist() == list(
            range(10)
        )
        assert RamStore(descriptor, 1 << 20, bind("another"), 8).found == []
    finally:
        os.close(descriptor)


def test_memory_that_is_forgotten_goes_back_to_the_system() -> None:
    descriptor = create_memory(1 << 20)
    try:
        ram = RamStore(descriptor, 1 << 20, bind("m"), 8)
        ram.data[: 64 * 4096] = 1
        used = os.fstat(descriptor).st_blocks
        ram.forget(4096 * 16, 4096 * 32)
        assert used - os.fstat(descriptor).st_blocks == 32 * 4096 // 512
        assert ram.data[4096 * 16] == 0
        assert ram.data[4096 * 15] == 1
        ram.close()
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------------------- ranges


def test_ranges_never_overlap_and_come_back_whole() -> None:
    for seed in range(30):
        dice = random.Random(seed)
        total = dice.randint(1, 60) * UNIT
        ranges = Ranges(total + dice.randrange(UNIT))
        taken: dict[int, int] = {}
        for _ in range(200):
            if dice.random() < 0.55:
                size = dice.randint(1, 8 * UNIT)
                at = ranges.take(size)
                if at >= 0:
                    taken[at] = size
                else:
                    largest = max((b - a for a, b in ranges.holes()), default=0)
                    assert largest < size
            elif taken:
                at = dice.choice(list(taken))
                ranges.give(at, taken.pop(at))
            units = [
                unit
                for at, size in taken.items()
                for unit in range(at // UNIT, -(-(at + size) // UNIT))
            ]
            assert len(units) == len(set(units))
            assert ranges.used == len(units) * UNIT
            assert all(0 <= unit < total // UNIT for unit in units)
        for at, size in taken.items():
            ranges.give(at, size)
        assert ranges.holes() == [(0, total)]


def test_a_range_that_is_taken_cannot_be_reserved() -> None:
    ranges = Ranges(10 * UNIT)
    assert ranges.reserve(2 * UNIT, 100)
    assert not ranges.reserve(2 * UNIT, 100)
    assert not ranges.reserve(UNIT, 2 * UNIT)
    assert not ranges.reserve(9 * UNIT, 2 * UNIT)
    assert not ranges.reserve(100, 100)
    assert not ranges.reserve(3 * UNIT, 0)
    assert not ranges.reserve(-UNIT, UNIT)
    assert ranges.reserve(3 * UNIT, 7 * UNIT)
    assert ranges.holes() == [(0, 2 * UNIT)]
