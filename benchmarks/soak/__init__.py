"""`make soak`: the desktop mix with faults, and what of the daemon grows meanwhile."""
