"""Figures 6, 8 and 9 of the PagedAttention paper (arXiv 2309.06180), to the letter.

The paper's blocks hold four tokens. It numbers physical blocks as it likes; here they are named by
what they hold.
"""

from __future__ import annotations

import numpy as np

from kvpager import (
    Admit,
    Admitted,
    Attach,
    CopyBlock,
    Fork,
    Free,
    Instruction,
    Pager,
    PagerConfig,
    Release,
    Reserve,
    Reserved,
    StepLaunched,
    StepRetired,
    Tokens,
)

ROOT = bytes(32)


def ids(*tokens: int) -> Tokens:
    return np.array(tokens, dtype=np.int32)


class Server:
    """Just enough of a caller: one step at a time, everything at once."""

    def __init__(self, blocks: int) -> None:
        config = PagerConfig(gpu_blocks=blocks, block_tokens=4, growth_margin=0.0)
        self.pager = Pager(config)
        self.epoch = 0

    def step(self, work: dict[int, Tokens]) -> list[Instruction]:
        """Compute tokens of some sequences; what the pager asked for in `Reserve`."""
        seqs = tuple(work)
        counts = tuple(len(tokens) for tokens in work.values())
        *copies, reserved = self.pager.handle(Reserve(seqs, counts))
        assert reserved == Reserved(())
        self.pager.handle(StepLaunched(self.epoch, seqs, counts))
        self.pager.handle(StepRetired(self.epoch, tuple(work.values())))
        self.epoch += 1
        self.pager.validate()
        return copies

    def table(self, seq: int) -> list[int]:
        return [int(block) for block in self.pager.block_table(seq)]


def test_figure_6_a_block_table_grows_one_block_at_a_time() -> None:
    """ "Four score and seven years ago our" + "fathers", "brought", …: section 4.3."""
    server = Server(blocks=9)
    prompt = ids(4, 20, 0, 7, 30, 31, 32)
    assert server.pager.handle(Admit(0, prompt, ROOT)) == [Admitted(0, 0, False)]
    # 1. Seven prompt tokens: blocks 0 and 1 are mapped, the last slot of block 1 is free.
    server.step({0: prompt})
    first, second = server.table(0)
    assert server.pager.stats().split.internal == 1
    # 2. "fathers" fills that slot; no block is needed.
    server.step({0: ids(33)})
    assert server.table(0) == [first, second]
    assert server.pager.stats().split.internal == 0
    # 3. "brought" does not fit any more: a third block is mapped, and only now.
    server.step({0: ids(34)})
    *before, third = server.table(0)
    assert before == [first, second]
    assert third not in before
    # The waste is within one block (section 4.2).
    split = server.pager.stats().split
    assert (split.token_state, split.internal, split.external) == (9, 3, 0)


def test_figure_8_samples_share_the_prompt_and_copy_its_last_block_when_they_part() -> None:
    """Parallel sampling of two outputs: section 4.4."""
    server = Server(blocks=16)
    prompt = ids(4, 20, 0, 7, 30, 31, 32)
    server.pager.handle(Admit(1, prompt, ROOT, width=2))
    server.step({1: prompt})
    shared = server.table(1)
    # Both samples map the same two physical blocks, and only two are in use.
    assert server.pager.handle(Fork(1, (2,))) == [Attach(2, 0, tuple(shared), 7)]
    assert server.table(2) == shared
    assert server.pager.stats().gpu.used == 2
    # Sample A1 writes first: block 1 has two references, so it is copied and remapped.
    copies = server.step({1: ids(33)})
    assert copies == [CopyBlock(1, 1, shared[1], server.table(1)[1], 3)]
    assert server.table(1)[0] == server.table(2)[0] == shared[0]
    assert server.table(1)[1] != server.table(2)[1] == shared[1]
    # Sample A2 writes next: its reference is the only one left, so it writes in place.
    assert server.step({2: ids(55)}) == []
    assert server.pager.stats().gpu.used == 3
    # When both have ended, nothing is in use.
    assert server.pager.handle(Free(1, cache=False)) == [Release(1)]
    assert server.pager.handle(Free(2, cache=False)) == [Release(2)]
    assert server.pager.stats().gpu.used == 0


def test_figure_9_beams_share_as_a_tree_and_free_what_no_candidate_needs() -> None:
    """Beam search of width four, at the dotted line and past it: section 4.4.

    Before the step, candidates 0 to 2 share the first three blocks (0, 1, 3) and candidate 3 leaves
    them after the first (0, 2); each has a last block of its own (5, 6, 7, 8). Then the best four
    candidates all come from 1 and 2, so 0 and 3 go, and blocks 2, 4, 5 and 8 with them.
    """
    server = Server(blocks=32)
    prompt = ids(1, 2, 3, 4)
    server.pager.handle(Admit(0, prompt, ROOT, width=4))
    server.step({0: prompt})
    (block0,) = server.table(0)
    server.pager.handle(Fork(0, (3,)))
    # Candidate 3 goes its own way from the second block on, the others share blocks 1 and 3.
    server.step({0: ids(10, 11, 12, 13), 3: ids(20, 21, 22, 23)})
    server.step({0: ids(14, 15, 16, 17), 3: ids(24, 25, 26, 27)})
    block1, block3 = server.table(0)[1:]
    block2, block4 = server.table(3)[1:]
    server.pager.handle(Fork(0, (1, 2)))
    copies = server.step({seq: ids(30 + seq, 40 + seq, 50 + seq, 60 + seq) for seq in (0, 1, 2, 3)})
    assert copies == []  # they part at the edge of a block, so nothing is copied
    block5, block6, block7, block8 = (server.table(seq)[3] for seq in (0, 1, 2, 3))
    assert server.table(0) == [block0, block1, block3, block5]
    assert server.table(1) == [block0, block1, block3, block6]
    assert server.table(2) == [block0, block1, block3, block7]
    assert server.table(3) == [block0, block2, block4, block8]
    assert server.pager.stats().gpu.used == 9

    # The next four come from candidates 1 and 2, two each; 0 and 3 are dropped.
    for dropped in (0, 3):
        server.pager.handle(Free(dropped, cache=False))
    assert server.pager.handle(Fork(1, (4,))) == [
        Attach(4, 0, (block0, block1, block3, block6), 16)
    ]
    server.pager.handle(Fork(2, (5,)))
    server.pager.validate()
    stats = server.pager.stats()
    assert stats.gpu.used == 5  # 0, 1, 3, 6, 7; blocks 2, 4, 5 and 8 are in nobody's table
    assert stats.copied_blocks == 0
    # New blocks, one for each: 9 to 12 of the figure.
    server.step({seq: ids(70 + seq) for seq in (1, 4, 2, 5)})
    last = [server.table(seq)[4] for seq in (1, 4, 2, 5)]
    assert len(set(last)) == 4
    assert server.pager.stats().gpu.used == 9
    assert server.table(4)[:4] == [block0, block1, block3, block6]
    assert server.table(5)[:4] == [block0, block1, block3, block7]
