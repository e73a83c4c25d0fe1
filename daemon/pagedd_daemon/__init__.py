"""The pagedd daemon: front, engine and helper processes. See docs/architecture.md."""
