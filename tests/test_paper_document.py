"""`docs/paper.md` says what the committed results say."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

from benchmarks.paper.document import DOCUMENT, FIGURES, render


def test_the_document_and_its_figures_are_those_of_the_committed_results() -> None:
    files = render()
    assert DOCUMENT in files
    for path, text in files.items():
        assert path.read_text(encoding="utf-8") == text, (
            f"{path.name} is out of date: python -m benchmarks.paper.document"
        )
    assert {path for path in files if path.parent == FIGURES} == set(FIGURES.iterdir())


def test_every_figure_is_well_formed_and_shown() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    shown = set(re.findall(r"\]\(paper/([\w-]+\.svg)\)", text))
    assert shown == {path.name for path in FIGURES.iterdir()}
    for path in FIGURES.iterdir():
        ElementTree.fromstring(path.read_text(encoding="utf-8"))


def test_no_placeholder_is_left() -> None:
    assert not re.search(r"\{\w+\}", DOCUMENT.read_text(encoding="utf-8"))
