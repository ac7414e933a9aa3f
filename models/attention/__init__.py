"""Attention of the decoder: dense, gated, sparse and gated sparse, behind one module."""

from models.attention.modules import Attention, RunningVariance

__all__ = ["Attention", "RunningVariance"]
