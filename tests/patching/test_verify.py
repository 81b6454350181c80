"""patch(verify=...): errors in the report, nothing touched, and a wrong fused class caught."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fastvit import accuracy
from fastvit.patching import is_patched, patch, report, verification
from fastvit.patching.rows import reference as table
from fastvit.patching.verification import Error, compare
from tests.tiny import build, images


def test_errors_reach_the_report():
    model = patch(build("deit"), verify=images("deit"))
    shown = report(model)
    assert [row.error is not None for row in shown.rows] == [True] * len(shown.rows)
    assert 0 < shown.error < 1e-5
    assert 0 < shown.plain_error < 1e-5
    assert "end to end: relative error" in str(shown)


def test_bfloat16_is_held_to_its_own_error():
    model = patch(build("deit").bfloat16(), verify=images("deit").bfloat16())
    assert 1e-5 < report(model).plain_error < 1e-1


@pytest.mark.parametrize("example", [lambda x: x, lambda x: (x,), lambda x: {"x": x}], ids=["tensor", "tuple", "dict"])
def test_an_example_is_a_tensor_a_tuple_or_a_dict(example):
    assert is_patched(patch(build("vit"), verify=example(images("vit"))))


def test_another_example_is_refused():
    model = build("vit")
    with pytest.raises(TypeError, match="verify: expected a tensor, .* got str"):
        patch(model, verify="vit")
    assert not is_patched(model)


@pytest.mark.parametrize("wrong_by", [1e-3, float("nan")])
def test_a_wrong_fused_class_is_caught_and_the_model_untouched(monkeypatch, wrong_by):
    right = table.AttentionOverride.attend

    def wrong(self: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return right(self, q, k, v, mask) * (1 + wrong_by)

    monkeypatch.setattr(table.AttentionOverride, "attend", wrong)
    model = build("vit")
    before = [type(module) for module in model.modules()]
    with pytest.raises(RuntimeError, match=r"verify: less accurate.*\n  blocks.0.attn: relative error") as error:
        patch(model, verify=images("vit"))
    assert "the whole model: relative error" in str(error.value)
    assert [type(module) for module in model.modules()] == before
    assert not any(module._forward_hooks for module in model.modules())


def test_an_error_that_was_bad_luck_is_drawn_again(monkeypatch):
    """As where the plain model is exact by chance: judged with further draws, as if they were one batch."""
    plain = iter([1e-9, 1.0, 1.0, 1.0])

    def lucky(*tensors: Tensor) -> accuracy.Deviation:
        found = accuracy.deviation(*tensors, ulps=0.0)
        return found._replace(plain_error=found.plain_error * (next(plain) if tensors[0].shape[-1] == 2 else 1.0))

    monkeypatch.setattr(verification, "deviation", lucky)
    model = build("vit")
    model.head = nn.Linear(48, 2)
    assert is_patched(patch(model, ops="masked_attention", verify=images("vit")))
    assert next(plain, None) is None  # all draws were made


def test_a_wrong_kernel_is_refused_at_two_logits_too(monkeypatch):
    right = table.AttentionOverride.attend
    monkeypatch.setattr(table.AttentionOverride, "attend", lambda self, *qkv: right(self, *qkv) * (1 + 2e-5))
    model = build("vit")
    model.head = nn.Linear(48, 2)
    with pytest.raises(RuntimeError, match=r"blocks.1.attn: relative error [\s\S]*the whole model: relative error"):
        patch(model, verify=images("vit"))
    assert not is_patched(model)


def test_a_block_inside_a_block_is_measured_once_and_in_its_own_dtype():
    """A layer of transformers' CvT, which is fused for its MLP, holds an attention, which is one of its own."""
    transformers = pytest.importorskip("transformers")
    sizes = {"embed_dim": [16, 32, 48], "depth": [1, 2, 3], "num_heads": [1, 2, 3]}
    model = transformers.CvtForImageClassification(transformers.CvtConfig(**sizes)).eval()
    with torch.no_grad():
        patch(model, verify={"pixel_values": torch.randn(2, 3, 48, 48)})
    rows = {row.cls: row for row in report(model).rows}
    assert rows["CvtLayer"].error > 1e-9 and rows["CvtSelfAttention"].plain_error > 1e-9


def test_a_fused_class_of_another_shape_is_caught(monkeypatch):
    monkeypatch.setattr(table.AttentionOverride, "forward", lambda self, x, mask=None: x[:, :1], raising=False)
    with pytest.raises(RuntimeError, match="blocks.0.attn: relative error inf"):
        patch(build("vit"), verify=images("vit"))


def test_modes_statistics_and_random_numbers_are_left_alone():
    model = build("cvt").train()
    model.norm.eval()
    modes = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    patch(model, verify=images("cvt"))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


def test_hooks_of_the_user_do_not_reach_the_comparison():
    """A hook that changes what a block gives out changes both models alike."""
    model = build("vit")
    model.blocks[0].attn.register_forward_hook(lambda module, args, output: output * 2)
    patch(model, verify=images("vit"))


def _double(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_compare_is_twice_the_plain_error_and_a_few_ulp():
    exact, plain = _double(1.0, 2.0), torch.tensor([1.0, 2.0 + 1e-4])
    assert compare(torch.tensor([1.0, 2.0 + 1.9e-4]), plain, exact).within_budget
    assert not compare(torch.tensor([1.0, 2.0 + 2.2e-4]), plain, exact).within_budget
    assert compare(torch.tensor([1.0 + 2e-7, 2.0]), exact.float(), exact).within_budget
    assert compare(exact.float(), plain, exact) == Error(0.0, pytest.approx(0.5e-4, rel=1e-2), True)


def test_compare_wants_infinities_and_nan_where_the_plain_model_has_them():
    exact = _double(float("inf"), float("nan"), 1.0)
    assert compare(exact.float(), exact.float(), exact).within_budget
    assert not compare(torch.tensor([1.0, float("nan"), 1.0]), exact.float(), exact).within_budget
    assert not compare(torch.tensor([float("inf"), float("nan"), float("nan")]), exact.float(), exact).within_budget
    assert compare(torch.ones(0), torch.ones(0), _double()).within_budget
    assert not compare(torch.ones(2), torch.ones(3), _double(1.0, 1.0, 1.0)).within_budget
