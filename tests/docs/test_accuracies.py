"""README's sentence on accuracies is that of the table in docs/training.md."""

from __future__ import annotations

import re

from tests.docs.pages import DOCS, ROOT
from tests.training.steps import SEVEN

ROW = re.compile(r"^\| (\w+) \| [\d,]+ \| ([\d.]+) \| \d+ \|$", re.MULTILINE)


def test_readme_has_the_least_and_the_greatest():
    found = dict(ROW.findall((DOCS / "training.md").read_text(encoding="utf-8")))
    assert found.keys() == set(SEVEN)
    least, greatest = min(found.values(), key=float), max(found.values(), key=float)
    assert float(least) >= 97.0
    assert f"reach {least} to {greatest} % of the held-out images" in (ROOT / "README.md").read_text(encoding="utf-8")
