"""The prefix index: which page is resident where.

A page is named by a SHA-256 chain over the raw little-endian int32 token ids of its block and all
blocks before it, rooted in a secret of 32 bytes (`Admit.root`), so that equal names mean equal
content, and nobody without the root can guess one. Pages are nodes in flat arrays with a chained
hash table over them; a node costs 76 bytes and no Python object.
"""

from __future__ import annotations

import hashlib
from array import array

import numpy as np
import numpy.typing as npt

from kvpager.blocks import zeros
from kvpager.types import Tier, Tokens

DIGEST = 32
_NOWHERE = -1


def extend_chain(chain: bytearray, root: bytes, tokens: Tokens, block_tokens: int) -> None:
    """Append to ``chain`` the digest of each further full block of ``tokens``.

    Args:
        chain: Digests of the first ``len(chain) // 32`` blocks of ``tokens``.
        root: 32 bytes the chain starts from.
        tokens: int32, shape ``(n,)``: all tokens from position 0 on.
        block_tokens: Tokens per block.
    """
    done = len(chain) // DIGEST
    full = len(tokens) // block_tokens
    if done >= full:
        return
    data = np.ascontiguousarray(
        tokens[done * block_tokens : full * block_tokens], dtype="<i4"
    ).tobytes()
    sha256 = hashlib.sha256
    digest = bytes(chain[-DIGEST:]) if done else root
    stride = 4 * block_tokens
    for start in range(0, len(data), stride):
        digest = sha256(digest + data[start : start + stride]).digest()
        chain += digest


class PageIndex:
    """Pages by name. A node exists while its page is resident in at least one tier."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        buckets = 1
        while buckets < capacity:
            buckets *= 2
        self._mask = buckets - 1
        self._heads = zeros("i", buckets, -1)
        self._following = zeros("i", capacity, -1)
        self._digests = bytearray(DIGEST * max(1, capacity))
        self._free = array("i", range(capacity - 1, -1, -1))
        self.parent = zeros("i", capacity, -1)
        """Node of the page before this one, -1 at the start of a chain or for an orphan."""
        self._owner = zeros("i", capacity)
        """Of each node, where in `_owners` it stands whose page it is: there are few owners, and
        the number of one would take twice the bytes."""
        self._owners = [0]
        self._owner_at = {0: 0}
        self.where = tuple(zeros("i", capacity, _NOWHERE) for _ in Tier)
        """By tier: the block or slot that holds the page, -1 for none."""
        self.children = tuple(zeros("i", capacity) for _ in Tier)
        """By tier: pages resident there that continue this one, for leaf-first eviction."""
        self.wheres: tuple[npt.NDArray[np.int32], ...] = tuple(
            np.frombuffer(item, dtype=np.int32) for item in self.where
        )
        self._children_views: tuple[npt.NDArray[np.int32], ...] = tuple(
            np.frombuffer(item, dtype=np.int32) for item in self.children
        )
        self._heads_view: npt.NDArray[np.int32] = np.frombuffer(self._heads, dtype=np.int32)
        self._following_view: npt.NDArray[np.int32] = np.frombuffer(self._following, dtype=np.int32)
        self._parents_view: npt.NDArray[np.int32] = np.frombuffer(self.parent, dtype=np.int32)
        self._words: npt.NDArray[np.uint64] = np.frombuffer(self._digests, dtype="<u8").reshape(
            -1, 4
        )

    def __len__(self) -> int:
        return self.capacity - len(self._free)

    @property
    def nbytes(self) -> int:
        """Bytes of bookkeeping."""
        per_node = DIGEST + 4 * (4 + 2 * len(Tier))
        return per_node * self.capacity + 4 * len(self._heads)

    def digest(self, node: int) -> bytes:
        """The page's name."""
        return bytes(self._digests[node * DIGEST : (node + 1) * DIGEST])

    def find(self, digest: bytes) -> int:
        """The node of a page, -1 if it is resident nowhere."""
        node = self._heads[int.from_bytes(digest[:8], "little") & self._mask]
        digests = self._digests
        while node >= 0 and digests[node * DIGEST : (node + 1) * DIGEST] != digest:
            node = self._following[node]
        return node

    def find_all(self, chain: bytearray, count: int) -> npt.NDArray[np.int32]:
        """Nodes of the first ``count`` digests in ``chain``, -1 where resident nowhere.

        Returns:
            int32, shape ``(count,)``.
        """
        words = np.frombuffer(bytes(chain[: count * DIGEST]), dtype="<u8").reshape(-1, 4)
        found = np.full(len(words), -1, dtype=np.int32)
        pending = np.arange(len(words))
        at = self._heads_view[(words[:, 0] & np.uint64(self._mask)).astype(np.intp)]
        while True:
            alive = at >= 0
            pending, at = pending[alive], at[alive]
            if not len(pending):
                return found
            same = (self._words[at] == words[pending]).all(axis=1)
            found[pending[same]] = at[same]
            pending, at = pending[~same], self._following_view[at[~same]]

    def add(self, digest: bytes, parent: int, owner: int = 0) -> int:
        """A node for a page that is about to be placed in a tier."""
        # One node per block of all tiers suffices: a node lives only while its page is resident.
        node = self._free.pop()
        self._digests[node * DIGEST : (node + 1) * DIGEST] = digest
        bucket = int.from_bytes(digest[:8], "little") & self._mask
        self._following[node] = self._heads[bucket]
        self._heads[bucket] = node
        self.parent[node] = parent
        self._owner[node] = self._number(owner)
        return node

    def owner(self, node: int) -> int:
        """Whose page it is: `Admit.owner`."""
        return self._owners[self._owner[node]]

    def _number(self, owner: int) -> int:
        at = self._owner_at.get(owner)
        if at is None:
            at = self._owner_at[owner] = len(self._owners)
            self._owners.append(owner)
        return at

    def add_after(self, digest: bytes, before: bytes | None, owner: int) -> int:
        """A node for a page that continues the page ``before``, None for the first of a chain."""
        return self.add(digest, -1 if before is None else self.find(before), owner)

    def place(self, node: int, tier: Tier, slot: int) -> None:
        """The page is resident in ``tier`` from now on."""
        assert self.where[tier][node] == _NOWHERE
        self.where[tier][node] = slot
        parent = self.parent[node]
        if parent >= 0:
            self.children[tier][parent] += 1

    def place_all(
        self, nodes: npt.NDArray[np.int32], tier: Tier, slots: npt.NDArray[np.int32]
    ) -> None:
        """`place` for many distinct pages at once."""
        self.wheres[tier][nodes] = slots
        parents = self._parents_view[nodes]
        np.add.at(self._children_views[tier], parents[parents >= 0], 1)

    def move(self, node: int, tier: Tier, slot: int) -> None:
        """Another block or slot of the same tier holds the page from now on."""
        assert self.where[tier][node] != _NOWHERE
        self.where[tier][node] = slot

    def drop(self, node: int, tier: Tier) -> None:
        """The page is no longer resident in ``tier``."""
        assert self.where[tier][node] != _NOWHERE
        self.where[tier][node] = _NOWHERE
        parent = self.parent[node]
        if parent >= 0:
            self.children[tier][parent] -= 1
        for item in self.where:
            if item[node] != _NOWHERE:
                return
        self._delete(node)

    def nodes(self) -> list[int]:
        """All nodes in use, ascending."""
        used = np.ones(self.capacity, dtype=bool)
        used[np.asarray(self._free, dtype=np.intp)] = False
        return [int(node) for node in np.flatnonzero(used)]

    def _delete(self, node: int) -> None:
        bucket = (
            int.from_bytes(self._digests[node * DIGEST : node * DIGEST + 8], "little") & self._mask
        )
        at, before = self._heads[bucket], -1
        while at != node:
            before, at = at, self._following[at]
        if before < 0:
            self._heads[bucket] = self._following[node]
        else:
            self._following[before] = self._following[node]
        if any(item[node] for item in self.children):
            # Only a last resort evicts a page that still has children; they become orphans, and
            # are found again when the page in front of them is.
            self._parents_view[self._parents_view == node] = -1
            for item in self.children:
                item[node] = 0
        self.parent[node] = -1
        self._free.append(node)
