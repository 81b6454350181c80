"""Patched models under torch.compile, torch.export, ONNX and TorchScript."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from fastvit import ops
from fastvit.patching import explain, is_patched, patch, report, unpatch
from fastvit.patching.fusion import Fused
from fastvit.patching.rows import reference as table
from tests.helpers import assert_as_accurate
from tests.tiny import FAMILIES, build, images

SEVEN = tuple(name for name in FAMILIES if name != "twins_pcpvt")  # whose blocks are those of cpvt and vit


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs(list):
    """A backend of torch.compile that keeps every graph it is given, and runs it as it is."""

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]):
        self.append(graph)
        return graph.forward

    def operators(self) -> list[str]:
        """The calls to operators of fastvit's, and to torch's own attention, which is a way to compute two of them."""
        found = []
        for node in (node for graph in self for node in graph.graph.nodes if node.op == "call_function"):
            if node.target is torch.nn.functional.scaled_dot_product_attention:
                found.append("sdpa")
            elif str(node.target).startswith("fastvit."):
                name = str(node.target).split(".")[1]  # "masked_attention_cpp": several may compute an operator
                found += [op for op in ops.OPERATORS if name.startswith(op)]
        return found


def _with_dynamic(x: Tensor, *axes: int) -> Tensor:
    for axis in axes:
        torch._dynamo.mark_dynamic(x, axis)
    return x


@pytest.mark.parametrize("name", [*SEVEN, "timm_vit", "timm_cait"])
def test_compile_whole_with_dynamic_batch(name):
    """One graph for every batch size, with the fused operators in it."""
    model, graphs = patch(build(name)), Graphs()
    fused = [row.op for row in report(model).rows if row.status == "patched"]
    torch._dynamo.utils.counters.clear()  # of the tests before
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=graphs)
        for batch in (2, 3, 5):
            x = images(name, batch)
            torch.testing.assert_close(compiled(_with_dynamic(x.clone(), 0)), model(x))
    assert len(graphs) == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    called = graphs.operators()
    # The other operators consist of several.
    for group in (("head_mixed_attention",), ("masked_attention", "class_attention")):
        found = (*group, "sdpa") if "masked_attention" in group else group
        assert sum(map(called.count, found)) == sum(map(fused.count, group))


@pytest.mark.parametrize(("name", "backend"), [("vit", "aot_eager"), ("cait", "eager"), ("ceit", "eager")])
def test_compile_in_training(name, backend):
    plain = build(name).train()
    model = patch(copy.deepcopy(plain))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for batch in (2, 3):
        x = images(name, batch)
        for each in (plain, model):
            each.zero_grad()
        compiled(_with_dynamic(x.clone(), 0)).sum().backward()
        plain(x).sum().backward()
        got = {key: value.grad for key, value in model.named_parameters()}
        expected = {key: value.grad for key, value in plain.named_parameters()}
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(dict(model.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("name", ["vit", "deepvit", "cait", "timm_vit", "timm_cait"])
def test_compile_a_block_with_dynamic_tokens(name):
    attention, graphs = patch(build(name)).blocks[0].attn, Graphs()
    assert isinstance(attention, Fused)
    compiled = torch.compile(attention, fullgraph=True, backend=graphs)
    with torch.no_grad():
        for batch, tokens in ((2, 17), (3, 10), (4, 25)):
            x = torch.randn(batch, tokens, 48)
            torch.testing.assert_close(compiled(_with_dynamic(x.clone(), 0, 1)), attention(x))
    assert len(graphs) == 1


@pytest.mark.parametrize("name", ["cpvt", "cvt"])
def test_compile_with_dynamic_image_sizes(name):
    """One graph for every size, also where the plain model (CvT) is compiled anew for each."""
    model, graphs = patch(build(name)), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=True)
    with torch.no_grad():
        for size in ((48, 64), (64, 48), (48, 80)):
            x = torch.randn(2, 3, *size)
            torch.testing.assert_close(compiled(x), model(x))
    assert len(graphs) == 1


class _Kernels(nn.Module):
    """A block of each operator that is a kernel of fastvit's, alone: Inductor takes its time."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = build("deepvit").blocks[0].attn
        self.peg = build("cpvt").pos_block[0]

    def forward(self, x: Tensor) -> Tensor:
        return self.peg(self.attn(x), (4, 4), 1)


def test_compile_by_inductor():
    plain, x = _Kernels().eval(), torch.randn(2, 17, 48)
    with torch.no_grad():
        oracle, expected = copy.deepcopy(plain).double()(x.double()), plain(x)
        fused = patch(plain, strict=True)
        compiled = torch.compile(fused, fullgraph=True)
        assert_as_accurate(compiled(x), expected, oracle)


@pytest.mark.parametrize("name", ["vit", "cpvt", "timm_cait"])
def test_a_compiled_model_follows_patch_and_unpatch(name):
    model, x, graphs = build(name), images(name), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.no_grad():
        plain = compiled(x)
        before = graphs.operators()
        graphs.clear()
        patch(compiled)
        assert is_patched(model)
        torch.testing.assert_close(compiled(x), plain)
        assert graphs.operators() != before
        unpatch(compiled)
        assert torch.equal(compiled(x), plain)
        assert len(graphs) == 1  # that of the plain model is still known


def test_a_compiled_model_runs_what_patch_put_there(monkeypatch):
    model, x = build("vit"), images("vit")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        plain = compiled(x)
        monkeypatch.setattr(table.AttentionOverride, "attend", lambda self, q, k, v, mask: q)
        patch(compiled)
        assert not torch.allclose(compiled(x), plain)


def test_a_compiled_model_can_be_verified_and_explained():
    model, x = build("vit"), images("vit")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    patch(compiled, verify=x)
    assert report(compiled).error is not None
    called = {row.name for row in explain(compiled, x).rows}
    # A block that runs whole calls its MLP's operator itself.
    assert called == {row.name for row in report(compiled).rows if row.op != "mlp"}


@pytest.mark.parametrize("name", [*SEVEN, "timm_cait"])
def test_export_takes_the_reference_path(name):
    model, x = patch(build(name)), images(name)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    assert not [node for node in exported.graph.nodes if "fastvit" in str(node.target)]
    assert exported.state_dict.keys() == model.state_dict().keys()
    more = images(name, batch=3)
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(more), unpatch(model)(more))


@pytest.mark.filterwarnings("ignore")  # the exporter's own
@pytest.mark.parametrize("name", [name for name in SEVEN if name != "deit"])  # which is vit with a token more
def test_onnx_takes_the_reference_path(name):
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    model, x = patch(build(name)), images(name)
    program = torch.onnx.export(model, (x,), dynamo=True, optimize=False, verbose=False)
    domains = {entry.domain for entry in program.model_proto.opset_import}
    assert not [domain for domain in domains if "fastvit" in domain]
    session = runtime.InferenceSession(program.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(got), unpatch(model)(x), rtol=1e-4, atol=1e-5)


def test_torchscript_is_refused_with_a_way_out():
    pytest.importorskip("timm")
    model = patch(build("timm_vit"))
    with pytest.raises(RuntimeError, match=r"TorchScript cannot compile FusedBlock: call fastvit\.unpatch"):
        torch.jit.script(model)
    torch.jit.script(unpatch(model))


@pytest.mark.filterwarnings("ignore")  # torch deprecates tracing, and warns of sizes it takes as constants
@pytest.mark.parametrize("name", ["vit", "deepvit", "cpvt", "timm_cait"])
def test_torchscript_traces_take_the_reference_path(name):
    model, x = patch(build(name)), images(name)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        assert "fastvit::" not in str(traced.inlined_graph)
        torch.testing.assert_close(traced(x), unpatch(model)(x))
