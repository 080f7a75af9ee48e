"""Weights → factors: pure functions on tensors. No modules, no names of layers."""
