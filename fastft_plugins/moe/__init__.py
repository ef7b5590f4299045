"""Mixture of experts: routing in one pass, and the experts' forward and backward near the cost of their products."""

from fastft_plugins.moe.experts import experts_forward
from fastft_plugins.moe.routing import Routing, route

__all__ = ["Routing", "experts_forward", "route"]
