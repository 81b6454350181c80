"""Attention recognised by what is computed: the operations applied to a map, and the operator that takes them all."""

from fastvit.recognise.chain import BreaksOff, Chain

__all__ = ["BreaksOff", "Chain"]
