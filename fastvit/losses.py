"""DeiT's distillation losses (Touvron et al. 2021, section 3; official ``losses.py``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["DistillationLoss"]

KINDS = ("none", "soft", "hard")
REDUCTIONS = ("official", "batchmean")


class DistillationLoss(nn.Module):
    """A classification loss combined with a distillation loss from a teacher.

    With Zs the class head's logits, Zd the distillation head's, Zt the teacher's, y the labels, a = ``alpha``,
    T = ``tau`` and N the batch:

    - ``"none"``: base(Zs, y)
    - ``"soft"``: (1 - a) base(Zs, y) + a T^2 / R sum(pt (log pt - log pd)), pt = softmax(Zt / T), pd = softmax(Zd / T)
    - ``"hard"``: (1 - a) base(Zs, y) + a CE(Zd, argmax Zt), without label smoothing

    Args:
        kind: ``"none"``, ``"soft"`` or ``"hard"``.
        alpha: weight of the teacher's term, 0 to 1 (the paper's lambda).
        tau: temperature of the soft loss, > 0.
        teacher: a module, or any callable, from images to logits (B, C); an output with a ``.logits`` attribute is
            read through it. A module is put into eval mode here and always runs without gradients. It is **not**
            registered as a sub-module (the official class does): it appears neither in ``parameters()`` nor in
            ``state_dict()``, and ``train()`` leaves it in eval mode; ``to()`` and its like do move it. May be left
            out where every call passes ``teacher_logits``.
        reduction: what R is. ``"official"``: N x classes, as the official code divides (for ImageNet 1000 times
            smaller than the paper's formula). ``"batchmean"``: N, the Kullback-Leibler divergence per image.
        base_criterion: (logits, labels) to a loss; cross entropy by default. Give a soft-target criterion for labels
            mixed by mixup or cutmix.

    Raises:
        TypeError, ValueError: an argument outside the values given above.
    """

    def __init__(
        self,
        kind: str = "none",
        alpha: float = 0.5,
        tau: float = 1.0,
        teacher: Callable[[Any], Any] | None = None,
        reduction: str = "official",
        base_criterion: Callable[[Tensor, Tensor], Tensor] | None = None,
    ):
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction: expected one of {REDUCTIONS}, got {reduction!r}")
        if not 0.0 <= alpha <= 1.0:
            raise ValueError(f"alpha: expected a weight from 0 to 1, got {alpha}")
        if not (tau > 0.0 and math.isfinite(tau)):
            raise ValueError(f"tau: expected a finite temperature above 0, got {tau}")
        if teacher is not None and not callable(teacher):
            raise TypeError(f"teacher: expected a module, another callable or None, got {type(teacher).__name__}")
        self.kind, self.alpha, self.tau, self.reduction = kind, float(alpha), float(tau), reduction
        self.base_criterion = nn.CrossEntropyLoss() if base_criterion is None else base_criterion
        self._teacher = (teacher,)  # inside a tuple nn.Module does not register it
        if isinstance(teacher, nn.Module):
            teacher.eval()

    @classmethod
    def paper_soft(cls, teacher: Callable[[Any], Any] | None = None, **options: Any) -> DistillationLoss:
        """Soft distillation as the paper writes it: lambda = 0.1, tau = 3, divergence per image.

        The paper trains one head with it: pass ``outputs=(logits, logits)`` for a model without distillation head.
        """
        return cls(
            **{"kind": "soft", "alpha": 0.1, "tau": 3.0, "reduction": "batchmean", "teacher": teacher, **options}
        )

    @classmethod
    def paper_hard(cls, teacher: Callable[[Any], Any] | None = None, **options: Any) -> DistillationLoss:
        """Hard-label distillation as the paper writes it: half the labels' cross entropy, half the teacher's."""
        return cls(**{"kind": "hard", "alpha": 0.5, "teacher": teacher, **options})

    @property
    def teacher(self) -> Callable[[Any], Any] | None:
        """The teacher, or None."""
        return self._teacher[0]

    def forward(
        self,
        inputs: Any,
        outputs: Tensor | Sequence[Tensor],
        labels: Tensor,
        teacher_logits: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch, a float32 scalar (float64 for float64 logits; half precisions are widened first).

        Args:
            inputs: what the teacher is called with: the same augmented images (B, 3, H, W) the student saw.
            outputs: the student's logits (B, C), or a pair (class logits, distillation logits) of them.
            labels: what ``base_criterion`` takes; class indices (B,) by default.
            teacher_logits: (B, C), instead of a run of the teacher.

        Raises:
            ValueError: ``outputs`` is one tensor (or not a pair) and ``kind`` is not ``"none"``; no teacher and no
                teacher logits; teacher logits of another shape than the student's.
        """
        logits, distilled = _split_heads(outputs)
        base = self.base_criterion(_widen(logits), labels)
        if self.kind == "none":
            return base
        if distilled is None:
            raise ValueError(
                "outputs: expected a pair (class logits, distillation logits), as a distilled model returns in "
                f"training mode, for kind={self.kind!r}, got one tensor"
            )
        distilled = _widen(distilled)
        wanted = self._ask_teacher(inputs) if teacher_logits is None else teacher_logits.detach()
        if wanted.shape != distilled.shape:
            raise ValueError(
                f"teacher: expected logits of the student's shape {tuple(distilled.shape)}, got {tuple(wanted.shape)}"
            )
        return (1.0 - self.alpha) * base + self.alpha * self._teacher_term(distilled, wanted.to(distilled.dtype))

    def _teacher_term(self, distilled: Tensor, wanted: Tensor) -> Tensor:
        if self.kind == "hard":
            return F.cross_entropy(distilled, wanted.argmax(dim=1))
        divergence = F.kl_div(
            F.log_softmax(distilled / self.tau, dim=1),
            F.log_softmax(wanted / self.tau, dim=1),
            reduction="sum",
            log_target=True,
        )
        return divergence * self.tau**2 / (distilled.numel() if self.reduction == "official" else len(distilled))

    def _ask_teacher(self, inputs: Any) -> Tensor:
        if self.teacher is None:
            raise ValueError(
                f"teacher: expected a teacher, or teacher_logits in the call, for kind={self.kind!r}, got None"
            )
        with torch.no_grad():
            answer = self.teacher(inputs)
        answer = getattr(answer, "logits", answer)
        if not isinstance(answer, Tensor):
            raise TypeError(
                f"teacher: expected it to return logits or an output with .logits, got {type(answer).__name__}"
            )
        return answer.detach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> DistillationLoss:
        if isinstance(self.teacher, nn.Module):
            self.teacher._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"kind={self.kind!r}, alpha={self.alpha:g}, tau={self.tau:g}, reduction={self.reduction!r}"


def _split_heads(outputs: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Class logits and, where there are any, distillation logits."""
    if isinstance(outputs, Tensor):
        return outputs, None
    if not isinstance(outputs, (tuple, list)) or len(outputs) != 2:
        raise ValueError(
            f"outputs: expected a tensor of logits or a pair (class, distillation), got {type(outputs).__name__}"
        )
    return outputs[0], outputs[1]


def _widen(logits: Tensor) -> Tensor:
    """float16 and bfloat16 to float32; wider types stay."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
