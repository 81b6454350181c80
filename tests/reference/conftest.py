"""The reference models are tested as they are written: nothing is fused into them while these tests build them."""

from __future__ import annotations

import pytest

from fastvit.reference import base


@pytest.fixture(autouse=True)
def plain_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "on_build", [])
