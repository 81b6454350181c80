"""What README.md and the documentation link to is there: files, headings, pictures."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.docs.pages import DOCS, PAGES, ROOT, prose, text_of

LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and mkdocs make them."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in LINK.findall(prose(page)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert page.parent != DOCS or target.is_relative_to(DOCS), f"{link} is not on the site"
        assert not anchor or anchor in anchors(target), link


def test_broken_links_would_be_found():
    assert len(LINK.findall(prose(DOCS / "index.md"))) > 10
    assert "predicted-for-a-gpu-not-measured" in anchors(DOCS / "results.md")
    assert "predicted" not in anchors(DOCS / "results.md")


def test_the_navigation_names_every_page():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r": (\S+\.md)$", text, re.MULTILINE))
    assert named == {page.name for page in DOCS.glob("*.md")}
