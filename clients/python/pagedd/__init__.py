"""Talk to the pagedd daemon: several apps, one model, nobody's work lost."""
