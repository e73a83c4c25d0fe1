"""Links of the documentation to other files of the repository, for mkdocs.

In a checkout they are relative paths, which work on disk and where the repository is hosted. On the
site they become addresses of the repository; one that names no file is a warning, so a strict
build fails.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

log = logging.getLogger("mkdocs.pagedd")

_LINK = re.compile(r"\]\((\.\./[^)#\s]*)(#[^)\s]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs with each page."""
    docs = Path(config["docs_dir"])
    folder = (docs / page.file.src_uri).parent

    def address(match: re.Match[str]) -> str:
        target = (folder / match[1]).resolve()
        if target.is_relative_to(docs):
            return match[0]
        if not target.exists():
            log.warning("%s links to %s, which does not exist", page.file.src_uri, match[1])
        kind = "tree" if target.is_dir() else "blob"
        path = target.relative_to(docs.parent)
        return f"]({config['repo_url']}/{kind}/main/{path}{match[2] or ''})"

    return _LINK.sub(address, markdown)
