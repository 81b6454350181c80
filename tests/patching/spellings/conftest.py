"""Every spelling, and a module of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.patching.spellings.mlps import MLPS
from tests.patching.spellings.modules import SPELLINGS, Spelling

ALL = {**SPELLINGS, **MLPS}


@pytest.fixture(params=ALL)
def spelling(request) -> Spelling:
    return ALL[request.param]


@pytest.fixture
def module(spelling, kernels_first) -> nn.Module:
    torch.manual_seed(2)
    return spelling.cls().eval()
