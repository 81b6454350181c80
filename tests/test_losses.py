"""The distillation losses against their formulae written out in float64, and what happens on bad use."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastvit.losses import DistillationLoss
from fastvit.reference import DeiT


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = [3 * torch.randn(6, 10, generator=generator, dtype=torch.float64) for _ in range(3)]
    labels = torch.randint(10, (6,), generator=generator)
    return *logits, labels


def cross_entropy(logits, labels):
    """Mean over the batch of log sum exp minus the label's logit, spelled out."""
    rows = [
        math.log(sum(math.exp(z) for z in row)) - row[y]
        for row, y in zip(logits.tolist(), labels.tolist(), strict=True)
    ]
    return sum(rows) / len(rows)


def divergence(student, teacher, tau):
    """Sum over batch and classes of KL(teacher || student) at a temperature, spelled out."""
    total = 0.0
    for s_row, t_row in zip(student.tolist(), teacher.tolist(), strict=True):
        s_norm = math.log(sum(math.exp(z / tau) for z in s_row))
        t_norm = math.log(sum(math.exp(z / tau) for z in t_row))
        for s, t in zip(s_row, t_row, strict=True):
            log_pt, log_pd = t / tau - t_norm, s / tau - s_norm
            total += math.exp(log_pt) * (log_pt - log_pd)
    return total


class TestFormula:
    def test_none_is_the_base_criterion_on_the_class_head(self, batch):
        class_logits, distilled, _, labels = batch
        expected = cross_entropy(class_logits, labels)
        loss = DistillationLoss()
        assert loss(None, class_logits, labels).item() == pytest.approx(expected, rel=1e-12)
        assert loss(None, (class_logits, distilled), labels).item() == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize(("reduction", "divisor"), [("official", 60), ("batchmean", 6)])
    @pytest.mark.parametrize(("alpha", "tau"), [(0.5, 1.0), (0.1, 3.0), (1.0, 0.7), (0.0, 2.0)])
    def test_soft(self, batch, alpha, tau, reduction, divisor):
        class_logits, distilled, taught, labels = batch
        loss = DistillationLoss("soft", alpha, tau, lambda images: taught, reduction)
        expected = (1 - alpha) * cross_entropy(class_logits, labels)
        expected += alpha * tau**2 * divergence(distilled, taught, tau) / divisor
        assert loss(None, (class_logits, distilled), labels).item() == pytest.approx(expected, rel=1e-12)

    def test_hard(self, batch):
        class_logits, distilled, taught, labels = batch
        loss = DistillationLoss("hard", 0.3, teacher=lambda images: taught)
        taught_labels = torch.tensor([max(range(10), key=row.__getitem__) for row in taught.tolist()])
        expected = 0.7 * cross_entropy(class_logits, labels) + 0.3 * cross_entropy(distilled, taught_labels)
        assert loss(None, (class_logits, distilled), labels).item() == pytest.approx(expected, rel=1e-12)

    def test_a_student_that_agrees_with_its_teacher_pays_nothing(self, batch):
        class_logits, _, taught, labels = batch
        loss = DistillationLoss("soft", 1.0, 2.0, reduction="batchmean")
        value = loss(None, (class_logits, taught + 5.0), labels, teacher_logits=taught)  # softmax ignores a shift
        assert value.item() == pytest.approx(0.0, abs=1e-12)

    def test_defaults_are_the_official_ones(self):
        loss = DistillationLoss()
        assert (loss.kind, loss.alpha, loss.tau, loss.reduction) == ("none", 0.5, 1.0, "official")
        assert type(loss.base_criterion) is nn.CrossEntropyLoss

    def test_paper_presets(self, batch):
        class_logits, distilled, taught, labels = batch
        soft, hard = DistillationLoss.paper_soft(lambda x: taught), DistillationLoss.paper_hard(lambda x: taught)
        base = cross_entropy(class_logits, labels)
        expected = 0.9 * base + 0.1 * 9 * divergence(distilled, taught, 3.0) / 6
        assert soft(None, (class_logits, distilled), labels).item() == pytest.approx(expected, rel=1e-12)
        expected = 0.5 * base + 0.5 * cross_entropy(distilled, taught.argmax(1))
        assert hard(None, (class_logits, distilled), labels).item() == pytest.approx(expected, rel=1e-12)
        assert DistillationLoss.paper_soft(alpha=0.2).alpha == 0.2

    def test_base_criterion_takes_mixed_labels(self, batch):
        class_logits, distilled, taught, _ = batch
        targets = torch.rand(6, 10, dtype=torch.float64).softmax(1)

        def soft_targets(logits, y):
            return -(y * logits.log_softmax(1)).sum(1).mean()

        loss = DistillationLoss("hard", 0.25, teacher=lambda x: taught, base_criterion=soft_targets)
        expected = 0.75 * soft_targets(class_logits, targets).item() + 0.25 * cross_entropy(distilled, taught.argmax(1))
        assert loss(None, (class_logits, distilled), targets).item() == pytest.approx(expected, rel=1e-12)


class TestGradients:
    @pytest.mark.parametrize("kind", ["soft", "hard"])
    def test_gradcheck(self, batch, kind):
        class_logits, distilled, taught, labels = batch
        loss = DistillationLoss(kind, 0.4, 1.5)
        heads = (class_logits[:2].requires_grad_(), distilled[:2].requires_grad_())
        assert torch.autograd.gradcheck(lambda a, b: loss(None, (a, b), labels[:2], teacher_logits=taught[:2]), heads)

    @pytest.mark.parametrize("as_argument", [False, True])
    def test_nothing_flows_into_the_teacher(self, batch, as_argument):
        class_logits, distilled, _, labels = batch
        teacher = nn.Linear(4, 10, dtype=torch.float64)
        images = torch.randn(6, 4, dtype=torch.float64)
        distilled.requires_grad_()
        loss = DistillationLoss("soft", teacher=teacher)
        extra = {"teacher_logits": teacher(images)} if as_argument else {}
        loss(images, (class_logits, distilled), labels, **extra).backward()
        assert distilled.grad is not None
        assert all(p.grad is None for p in teacher.parameters())


class TestPrecision:
    @pytest.mark.parametrize("kind", ["none", "soft", "hard"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_logits_are_widened(self, batch, kind, dtype):
        *logits, labels = batch
        class_logits, distilled, taught = (z.to(dtype) for z in logits)
        loss = DistillationLoss(kind, 0.5, 2.0)
        low = loss(None, (class_logits, distilled), labels, teacher_logits=taught)
        exact = loss(None, (class_logits.double(), distilled.double()), labels, teacher_logits=taught.double())
        assert low.dtype == torch.float32
        assert low.item() == pytest.approx(exact.item(), rel=1e-6)

    def test_teacher_of_another_dtype(self, batch):
        class_logits, distilled, taught, labels = batch
        loss = DistillationLoss("soft")
        outputs = (class_logits.float(), distilled.float())
        low = loss(None, outputs, labels, teacher_logits=taught.bfloat16())
        high = loss(None, outputs, labels, teacher_logits=taught.bfloat16().double())
        assert low.item() == pytest.approx(high.item(), rel=1e-6)

    def test_under_autocast(self):
        torch.manual_seed(0)
        student, teacher = nn.Linear(8, 5), nn.Linear(8, 5)
        images, labels = torch.randn(4, 8), torch.tensor([0, 1, 2, 3])
        loss = DistillationLoss("soft", teacher=teacher)
        with torch.autocast("cpu", torch.bfloat16):
            logits = student(images)
            value = loss(images, (logits, logits), labels)
        assert logits.dtype == torch.bfloat16 and value.dtype == torch.float32
        value.backward()
        assert student.weight.grad.isfinite().all()

    def test_compiles_without_graph_break(self, batch):
        class_logits, distilled, taught, labels = batch
        loss = DistillationLoss("soft", 0.1, 3.0)
        compiled = torch.compile(loss, fullgraph=True, backend="eager")
        outputs = (class_logits, distilled)
        assert torch.equal(
            compiled(None, outputs, labels, teacher_logits=taught), loss(None, outputs, labels, teacher_logits=taught)
        )


class TestTeacher:
    def test_stays_in_eval_mode_and_outside_of_parameters_and_state(self):
        teacher = nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5)).train()
        loss = DistillationLoss("hard", teacher=teacher).train()
        assert not teacher.training and not teacher[1].training
        assert list(loss.parameters()) == [] and dict(loss.state_dict()) == {}
        assert loss.teacher is teacher

    def test_moves_with_the_loss(self):
        teacher = nn.Linear(4, 3)
        DistillationLoss("hard", teacher=teacher).to(torch.float64)
        assert teacher.weight.dtype == torch.float64

    def test_deepcopy_is_independent(self):
        loss = DistillationLoss("hard", teacher=nn.Linear(4, 3))
        twin = copy.deepcopy(loss)
        assert twin.teacher is not loss.teacher and torch.equal(twin.teacher.weight, loss.teacher.weight)

    def test_outputs_with_a_logits_attribute(self, batch):
        class_logits, distilled, taught, labels = batch

        class Output:
            logits = taught

        outputs = (class_logits, distilled)
        wrapped = DistillationLoss("soft", teacher=lambda x: Output())(None, outputs, labels)
        assert torch.equal(wrapped, DistillationLoss("soft", teacher=lambda x: taught)(None, outputs, labels))

    def test_given_logits_spare_the_teacher(self, batch):
        class_logits, distilled, taught, labels = batch
        calls = []
        loss = DistillationLoss("hard", teacher=calls.append)
        loss(None, (class_logits, distilled), labels, teacher_logits=taught)
        assert calls == []

    def test_none_never_asks(self, batch):
        class_logits, distilled, _, labels = batch
        calls = []
        DistillationLoss("none", teacher=calls.append)(None, (class_logits, distilled), labels)
        assert calls == []


@pytest.mark.parametrize("kind", ["soft", "hard"])
def test_trains_a_distilled_model(kind):
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    student, teacher = DeiT(distilled=True, **sizes), DeiT(**sizes)
    images, labels = torch.randn(2, 3, 16, 16), torch.tensor([0, 2])
    loss = DistillationLoss(kind, teacher=teacher)
    loss(images, student.train()(images), labels).backward()
    assert all(p.grad is not None for p in student.parameters())
    assert all(p.grad is None for p in teacher.parameters())
    with pytest.raises(ValueError, match="one tensor"):
        loss(images, student.eval()(images), labels)


class TestBadUse:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"kind": "medium"}, "kind: expected .*none.*soft.*hard.*, got 'medium'"),
            ({"reduction": "mean"}, "reduction: expected .*official.*batchmean.*, got 'mean'"),
            ({"alpha": 1.5}, "alpha: expected .*got 1.5"),
            ({"alpha": -0.1}, "alpha"),
            ({"alpha": float("nan")}, "alpha"),
            ({"tau": 0}, "tau: expected .*got 0"),
            ({"tau": float("inf")}, "tau"),
        ],
    )
    def test_values(self, options, words):
        with pytest.raises(ValueError, match=words):
            DistillationLoss(**options)

    def test_teacher_that_cannot_be_called(self):
        with pytest.raises(TypeError, match="teacher: expected .*got str"):
            DistillationLoss("hard", teacher="regnety_160")

    @pytest.mark.parametrize("kind", ["soft", "hard"])
    def test_one_tensor_from_the_student(self, batch, kind):
        class_logits, _, taught, labels = batch
        with pytest.raises(ValueError, match=f"outputs: expected a pair .*{kind}.*, got one tensor"):
            DistillationLoss(kind, teacher=lambda x: taught)(None, class_logits, labels)

    def test_three_heads(self, batch):
        *logits, labels = batch
        with pytest.raises(ValueError, match="outputs: expected .*got tuple"):
            DistillationLoss()(None, tuple(logits), labels)

    def test_no_teacher(self, batch):
        class_logits, distilled, _, labels = batch
        with pytest.raises(ValueError, match="teacher: expected .*teacher_logits.*, got None"):
            DistillationLoss("soft")(None, (class_logits, distilled), labels)

    def test_teacher_with_other_classes(self, batch):
        class_logits, distilled, taught, labels = batch
        with pytest.raises(
            ValueError, match=r"teacher: expected logits of the student's shape \(6, 10\), got \(6, 9\)"
        ):
            DistillationLoss("hard", teacher=lambda x: taught[:, :9])(None, (class_logits, distilled), labels)

    def test_teacher_that_returns_a_pair(self, batch):
        class_logits, distilled, taught, labels = batch
        with pytest.raises(TypeError, match="teacher: expected it to return logits"):
            DistillationLoss("hard", teacher=lambda x: (taught, taught))(None, (class_logits, distilled), labels)


def test_agrees_with_a_formula_of_torch(batch):
    """An independent way to the same number: PyTorch's own batchmean divergence."""
    class_logits, distilled, taught, labels = batch
    loss = DistillationLoss("soft", 0.5, 2.0, reduction="batchmean")(
        None, (class_logits, distilled), labels, teacher_logits=taught
    )
    student, teacher = (distilled / 2).log_softmax(1), (taught / 2).softmax(1)
    expected = 0.5 * F.cross_entropy(class_logits, labels) + 0.5 * 4 * F.kl_div(student, teacher, reduction="batchmean")
    assert torch.allclose(loss, expected, rtol=1e-12)
