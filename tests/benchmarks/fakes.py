"""A tiny suite for the runner's tests, whose contenders do all that contenders may do."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.worker import Absent, Case, Form


class Tiny:
    """A product with a trained weight."""

    input_gradients = True
    few = None

    def __init__(self, case: Case) -> None:
        self.case = case
        self.weight = torch.zeros(8, 8)

    def state(self) -> dict[str, Tensor]:
        return {"weight": torch.randn(8, 8, generator=torch.Generator().manual_seed(5))}

    def load(self, state: dict[str, Tensor]) -> None:
        self.weight = state["weight"]

    def inputs(self, draw: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(draw)
        return (torch.randn(self.case.batch, 8, generator=generator).to(self.case.torch_dtype),)

    def form(self, provider: str, example: tuple[Tensor, ...]) -> Form:
        if provider in ("plain", "exact"):
            self.weight = self.state()["weight"]
        if provider == "absent":
            raise Absent("it is not there")
        if provider == "broken":
            raise RuntimeError("cannot be built\nfor many reasons")
        weight = self.weight.to(torch.float64 if provider == "exact" else self.case.torch_dtype)
        weight = weight.clone().requires_grad_(self.case.training)

        def call(x: Tensor) -> Tensor:
            if provider == "wrong gradient":
                return x @ (1.01 * weight - 0.01 * weight.detach())
            return x @ weight + (1e-3 if provider == "wrong" else 0.0)

        return Form(call, [weight], floor=provider == "floor")


def open_case(case: Case) -> Tiny:
    return Tiny(case)
