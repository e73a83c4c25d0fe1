"""The PagedAttention paper's memory experiments (arXiv 2309.06180), repeated with this pager.

``make bench-paper`` runs them; `docs/paper.md` is written from the results by
``python -m benchmarks.paper.document``.
"""
