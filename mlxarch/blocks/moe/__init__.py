"""Mixture of experts: routers, routed experts and shared experts."""
