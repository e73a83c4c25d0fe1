"""From what the host sent of a step to the tensors of a `StepBatch`."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor


def resolve_tokens(tokens: Tensor, sources: Tensor, drawn: Tensor) -> Tensor:
    """Input tokens, those put in that the step before has drawn and the host does not know yet.

    Args:
        tokens: int32 [T].
        sources: int32 [T]: -1, or which of ``drawn`` the token is.
        drawn: int32 [D]: tokens of the step before. A failed draw (-1) becomes token 0: whatever
            follows from it is thrown away, but must not be read outside the embedding.

    Returns:
        int32 [T].
    """
    if tokens.is_cuda:
        from pagedd_kernels.gpu.inputs import launch_resolve

        return launch_resolve(tokens, sources, drawn)
    known = drawn[sources.clamp(min=0).long()].clamp(min=0)
    return known.where(sources >= 0, tokens)


def unpack_tables(flat: Tensor, starts: Tensor, tables: Tensor) -> Tensor:
    """Ragged block tables as a padded matrix.

    Args:
        flat: int32: the blocks of all sequences, one after the other.
        starts: int32 [S + 1]: where those of each begin; the last is their number.
        tables: int32 [S, W]: written, 0 behind the blocks of each sequence.

    Returns:
        ``tables``.
    """
    if flat.is_cuda:
        from pagedd_kernels.gpu.inputs import launch_unpack

        return launch_unpack(flat, starts, tables)
    tables.zero_()
    bounds = starts.tolist()
    for row, (begin, end) in enumerate(pairwise(bounds)):
        tables[row, : end - begin] = flat[begin:end]
    return tables
