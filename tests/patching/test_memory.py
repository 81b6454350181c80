"""Memory of a patched model at inference: pages stay mapped between operations, and packed weights are given up."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from fastvit import backends

pytestmark = [
    pytest.mark.skipif(bool(backends.cpp_reasons()), reason="; ".join(backends.cpp_reasons())),
    pytest.mark.skipif(sys.platform != "linux", reason="counts page faults as Linux does"),
]

PROGRAM = """
import json, resource, sys
import torch
import fastvit
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils import _pytree as pytree

class Outputs(TorchDispatchMode):
    bytes = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [leaf for leaf in pytree.tree_leaves(out) if isinstance(leaf, torch.Tensor)]
            self.bytes += sum(tensor.nbytes for tensor in tensors)
        return out

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

torch.set_grad_enabled(False)
before = faults()
touched = torch.ones(64 << 18)  # 64 MiB of fresh pages
moved = faults() - before
del touched
model, x = fastvit.create_model(sys.argv[1]).eval(), torch.randn(4, 3, 224, 224)
for _ in range(12):  # glibc finds blocks of the right sizes within about ten
    model(x)
before = faults()
for _ in range(4):
    model(x)
during = (faults() - before) / 4
with Outputs() as outputs:
    model(x)
print(json.dumps([moved, during, outputs.bytes / 2**20]))
"""


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "cait_xxs24_224", "cvt_13"])
def test_few_page_faults_after_the_first_runs(name):
    run = subprocess.run([sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    moved, during, megabytes = json.loads(run.stdout)
    assert moved >= 64 << 18 >> 18  # the counter counts: 64 MiB take at least one fault per MiB
    assert megabytes > 10
    assert during <= 2 * megabytes
