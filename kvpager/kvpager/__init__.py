"""kvpager: a paged key-value pool as a deterministic state machine."""
