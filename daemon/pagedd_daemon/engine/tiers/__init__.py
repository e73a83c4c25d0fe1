"""Memory below the first tier: RAM that outlives the engine, and a file behind it."""
