"""The version, without reading package metadata (which costs more than the rest of the import)."""

from __future__ import annotations

__version__ = "0.1.0"

CLIENT = f"pagedd-python/{__version__}"
"""How this client introduces itself."""
