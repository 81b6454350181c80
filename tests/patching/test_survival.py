"""What the ecosystem does to a module, done to patched ones."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from tiny import FAMILIES, TIMM, build, images
from torch import Tensor, nn

from fastvit.patching import explain, is_patched, patch, report, unpatch
from fastvit.patching.fusion import Fused
from fastvit.reference.layers import Attention

EVERY = (*FAMILIES, *TIMM)


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _pickled_by_the_oldest_protocol(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model, protocol=0))


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [copy.deepcopy, _pickled, _saved]


@pytest.mark.parametrize("name", EVERY)
def test_copies_are_patched_and_can_be_unpatched(name):
    plain, x = build(name), images(name)
    classes = [type(module) for module in plain.modules()]
    with torch.no_grad():
        before = plain(x)
        patch(plain, backend="reference")
        expected = plain(x)
        for function in COPIES:
            clone = function(plain)
            assert [type(module) for module in clone.modules()] == [type(module) for module in plain.modules()]
            assert [row.backend for row in report(clone).rows] == [row.backend for row in report(plain).rows]
            assert torch.equal(clone(x), expected), function
            unpatch(clone)
            assert [type(module) for module in clone.modules()] == classes
            assert torch.equal(clone(x), before)
        assert is_patched(plain)


@pytest.mark.parametrize("name", EVERY)
def test_state_dict_keeps_keys_and_tensors(name):
    model = build(name)
    before = model.state_dict()
    after = patch(model).state_dict()
    assert list(after) == list(before)
    assert all(after[key].data_ptr() == before[key].data_ptr() for key in before)
    plain = build(name)
    plain.load_state_dict(after, strict=True)
    model.load_state_dict(plain.state_dict(), strict=True)


def test_a_block_on_its_own_and_of_a_users_class():
    block = patch(_Scaled(8, 2, 3.0), strict=True)
    x = torch.randn(1, 4, 8)
    for function in (*COPIES, _pickled_by_the_oldest_protocol):
        clone = function(block)
        assert isinstance(clone, _Scaled)
        assert clone.factor == 3.0
        assert torch.equal(clone(x), block(x))
        assert type(unpatch(clone)) is _Scaled
    assert isinstance(block, Attention)


class _Scaled(Attention):
    """A user's subclass with a constructor and state of its own."""

    def __init__(self, dim: int, num_heads: int, factor: float):
        super().__init__(dim, num_heads)
        self.factor = factor

    def extra_repr(self) -> str:
        return f"factor={self.factor}"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return super().forward(x, mask) * self.factor


class _OwnReduce(Attention):
    def __reduce_ex__(self, protocol):
        return _OwnReduce, (8, 2), self.state_dict()

    def __setstate__(self, state):
        self.load_state_dict(state)


def test_a_class_that_pickles_in_its_own_way_still_does():
    block = patch(_OwnReduce(8, 2))
    clone = _pickled(block)
    assert isinstance(clone, _OwnReduce)
    x = torch.randn(1, 4, 8)
    torch.testing.assert_close(clone(x), block(x))


def test_hooks_are_kept_and_called():
    model, x = build("vit"), images("vit")
    called: list[str] = []
    block = model.blocks[0].attn
    block.register_forward_pre_hook(lambda module, args: called.append("pre"))
    block.register_forward_hook(lambda module, args, output: called.append("forward"))
    block.qkv.register_forward_hook(lambda module, args, output: called.append("qkv"))
    block.register_full_backward_hook(lambda module, grads, outputs: called.append("backward"))
    patch(model)
    model(x).sum().backward()
    assert called == ["pre", "qkv", "forward", "backward"]
    unpatch(model)(x)
    assert called[4:] == ["pre", "qkv", "forward"]


def test_a_hook_that_wants_the_attention_map_keeps_it():
    pytest.importorskip("timm")
    model, x = build("timm_vit"), images("timm_vit")
    maps: list[Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
    handle = model.blocks[0].attn.attn_drop.register_forward_hook(lambda module, args, output: maps.append(output))
    patch(model)
    assert report(model).rows[0].reasons == ("attn_drop has forward hooks, which the fused path would not call",)
    assert report(model).rows[1].status == "patched"
    # One that comes after patch is served as well: the block then runs its own forward.
    model.blocks[1].attn.attn_drop.register_forward_hook(lambda module, args, output: maps.append(output))
    expected = model(x)
    assert [tuple(attention.shape) for attention in maps] == [(2, 4, 17, 17)] * 2
    handle.remove()
    torch.testing.assert_close(patch(model, filter_fn=lambda module, name: "0" in name)(x), expected)


class _LowRank(nn.Linear):
    """A linear with an adapter, as LoRA makes them."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features)
        self.load_state_dict(base.state_dict())
        self.down = nn.Linear(base.in_features, 2, bias=False)
        self.up = nn.Linear(2, base.out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


@pytest.mark.parametrize("first", ["adapter", "patch"])
@pytest.mark.parametrize(("name", "part"), [("timm_vit", "qkv"), ("timm_cait", "qkv"), ("timm_cait", "proj_l")])
def test_adapters_are_called_whichever_comes_first(name, part, first):
    pytest.importorskip("timm")
    model, x = build(name), images(name)
    if first == "patch":
        patch(model)
    attention = model.blocks[0].attn
    setattr(attention, part, _LowRank(getattr(attention, part)))
    if first == "adapter":
        patch(model)
    expected_patched = part == "qkv" or first == "patch"
    assert isinstance(attention, Fused) == expected_patched
    got = model(x)
    torch.testing.assert_close(got, unpatch(model)(x))
    model.zero_grad()
    model(x).sum().backward()
    assert getattr(attention, part).up.weight.grad.abs().sum() > 0


def test_parametrisations_on_what_the_fused_path_reads_take_the_plain_path():
    pytest.importorskip("timm")
    model, x = build("timm_cait"), images("timm_cait")
    patch(model)
    nn.utils.parametrize.register_parametrization(model.blocks[0].attn.proj_l, "weight", _Doubled())
    got = model(x)
    torch.testing.assert_close(got, unpatch(model)(x))
    patch(model)
    assert report(model).rows[0].reasons == ("proj_l is ParametrizedLinear, expected is exactly Linear",)


class _Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight * 2


def test_other_dtypes_devices_and_memory_formats_after_patch():
    model, x = patch(build("cpvt")), images("cpvt")
    for change in (nn.Module.double, nn.Module.bfloat16, nn.Module.float):
        change(model)
        dtype = next(model.parameters()).dtype
        assert model(x.to(dtype)).dtype == dtype
    expected = unpatch(copy.deepcopy(model))(x)
    torch.testing.assert_close(model(x.to(memory_format=torch.channels_last)), expected)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), expected)
    meta = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    meta.load_state_dict(model.state_dict())
    torch.testing.assert_close(meta(x), expected)


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        ("vit", "aot_eager"),
        ("deepvit", "eager"),
        ("cait", "eager"),
        ("cpvt", "aot_eager"),
        ("cvt", "eager"),
        ("ceit", "eager"),
        ("timm_vit", "eager"),
        ("timm_cait", "aot_eager"),
        ("timm_twins", "eager"),
    ],
)
def test_compile_without_graph_breaks(name, backend):
    model, x = patch(build(name)), images(name)
    with torch.no_grad():
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        torch.testing.assert_close(compiled(x), model(x))
    torch._dynamo.reset()


def test_compile_in_training_and_with_dynamic_batch():
    model = patch(build("vit")).train()
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=True)
    for batch in (2, 3):
        x = images("vit", batch)
        model.zero_grad()
        compiled(x).sum().backward()
        got = [parameter.grad.clone() for parameter in model.parameters()]
        model.zero_grad()
        model(x).sum().backward()
        torch.testing.assert_close(got, [parameter.grad for parameter in model.parameters()])
    torch._dynamo.reset()


def test_a_compiled_model_can_be_verified_and_explained():
    model, x = build("vit"), images("vit")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    patch(compiled, verify=x)
    assert report(compiled).error is not None
    assert [row.backend for row in explain(compiled, x).rows] == ["sdpa", "sdpa"]
    torch._dynamo.reset()


def test_torchscript_is_refused_with_a_way_out():
    pytest.importorskip("timm")
    model = patch(build("timm_vit"))
    with pytest.raises(RuntimeError, match=r"TorchScript cannot compile FusedAttention: call fastvit\.unpatch"):
        torch.jit.script(model)
    torch.jit.script(unpatch(model))


def test_a_class_put_over_a_fused_one_is_not_dropped():
    model = patch(build("vit"))
    attention = model.blocks[1].attn
    attention.__class__ = type("FSDPFusedAttention", (type(attention),), {})  # as fully_shard does
    before = [type(module) for module in model.modules()]
    for function in (unpatch, patch):
        with pytest.raises(RuntimeError, match=r"since patch.*: blocks\.1\.attn \(FSDPFusedAttention\)"):
            function(model)
        assert [type(module) for module in model.modules()] == before
    attention.__class__ = type(attention).__bases__[0]
    assert not is_patched(unpatch(model))


def test_a_class_put_over_a_plain_one_is_fused_and_given_back():
    model = build("vit")
    attention = model.blocks[1].attn
    sharded = type("FSDPAttention", (Attention,), {})
    attention.__class__ = sharded
    assert isinstance(patch(model).blocks[1].attn, Fused)
    assert type(unpatch(model).blocks[1].attn) is sharded


def test_a_compiled_model_follows_patch_and_unpatch(monkeypatch):
    from fastvit.patching import reference as table

    model, x = build("vit"), images("vit")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        plain = compiled(x)
        monkeypatch.setattr(table.AttentionSeam, "attend", lambda self, q, k, v, mask: v)
        patch(compiled)
        assert is_patched(model)
        assert not torch.allclose(compiled(x), plain)
        unpatch(compiled)
        assert torch.equal(compiled(x), plain)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["vit", "deepvit", "cpvt", "timm_cait"])
def test_export_takes_the_reference_path(name):
    model, x = patch(build(name)), images(name)
    exported = torch.export.export(model, (x,))
    assert not [node for node in exported.graph.nodes if "fastvit" in str(node.target)]
    with torch.no_grad():
        torch.testing.assert_close(exported.module()(x), unpatch(model)(x))


@pytest.mark.parametrize("name", ["vit", "cpvt", "timm_cait"])
def test_transforms_of_torch_func(name):
    model, x = patch(build(name)), images(name)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(model, parameters, (x,)).square().sum()

    per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x[:, None])
    loss(parameters, x).backward()
    for key, parameter in parameters.items():
        torch.testing.assert_close(per_sample[key].sum(0), parameter.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["vit", "deepvit", "cvt"])
def test_gradient_checkpointing(name):
    model, x = patch(build(name)).train(), images(name)
    gradients = []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(x).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_frozen_parts_get_no_gradient():
    model, x = patch(build("timm_vit")), images("timm_vit")
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    model(x).sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is not None] == [
        "head.weight",
        "head.bias",
    ]


@pytest.mark.parametrize("name", ["vit", "cait"])
def test_threads_in_inference(name):
    from concurrent.futures import ThreadPoolExecutor

    model = patch(build(name))
    batches = [images(name, seed=seed) for seed in range(8)]

    def run(x: Tensor) -> Tensor:
        with torch.inference_mode():
            return model(x)

    expected = [run(x) for x in batches]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(run, batches))
    torch.testing.assert_close(got, expected)


def test_weights_shared_between_blocks_stay_shared():
    model: Callable = build("vit")
    model.blocks[1].attn = model.blocks[0].attn
    x = images("vit")
    expected = model(x)
    patch(model, verify=x)
    assert model.blocks[1].attn is model.blocks[0].attn
    torch.testing.assert_close(model(x), expected)
