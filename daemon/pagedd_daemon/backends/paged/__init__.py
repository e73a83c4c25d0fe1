"""The paged engine: the project's own kernels and models over a paged KV pool, on CUDA or the CPU.

One step goes through these rooms: `layout` says how large its arrays are and which bucket it is
padded to, `staging` writes them where the device can fetch them in one copy, `runner` computes the
logits (as a CUDA graph where there is one for the bucket), `sampling` draws, and `backend` strings
them together and hands the results back. `arena` owns the pool's memory, `transfers` moves pages
between it and RAM, `load` makes all of it from a model file.
"""

from __future__ import annotations

import os

# Before torch is imported. On the CPU its threads would spin for milliseconds between two parallel
# regions; where another process wants the core a step of 46 ms then takes 600.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
