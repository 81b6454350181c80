"""Every spelling, and a module of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.patching.spellings.modules import SPELLINGS, Spelling


@pytest.fixture(params=SPELLINGS)
def spelling(request) -> Spelling:
    return SPELLINGS[request.param]


@pytest.fixture
def module(spelling) -> nn.Module:
    torch.manual_seed(2)
    return spelling.cls().eval()
