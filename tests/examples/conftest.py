from __future__ import annotations

from pathlib import Path

import pytest

from tests.examples.pictures import make_folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pictures for training, 6 for validation."""
    return make_folder(tmp_path_factory.mktemp("pictures"))
