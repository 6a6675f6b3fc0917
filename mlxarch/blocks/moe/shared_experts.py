"""Many small routed experts beside shared experts that every token passes (arXiv:2401.06066)."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn

from mlxarch.blocks.config import Count, DecoderConfig, Positive, Size
from mlxarch.blocks.feed_forward import GatedActivation, GatedMLP, swiglu
from mlxarch.blocks.linear import ExactLinear, Linear
from mlxarch.blocks.moe.moe import Experts, MoE
from mlxarch.blocks.moe.routers import GroupLimitedSigmoid, GroupLimitedSoftmax, Router
from mlxarch.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GroupedExpertsConfig(DecoderConfig):
    """Config with routed experts in groups and shared experts.

    The first layers are dense, all others have experts; ``intermediate_size`` is the width of the
    dense ones.
    """

    moe_intermediate_size: Size
    n_routed_experts: Size
    n_shared_experts: Count | None
    num_experts_per_tok: Size
    first_k_dense_replace: Count
    n_group: Size | None = None
    topk_group: Size | None = None
    norm_topk_prob: bool
    routed_scaling_factor: Positive

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Self:
        """Read the keys; transformers 5 may write ``mlp_layer_types`` for the dense layers' number.

        Raises:
            ConfigError: the dense layers are not the first ones, or the two keys disagree.
        """
        kinds = config.get("mlp_layer_types")
        if not isinstance(kinds, list) or any(f.name == "mlp_layer_types" for f in fields(cls)):
            return super().from_dict(config)  # the architecture reads them itself
        dense = kinds.count("dense")
        written = config.get("first_k_dense_replace", dense)
        if kinds != ["dense"] * dense + ["sparse"] * (len(kinds) - dense) or written != dense:
            raise ConfigError(
                "config.json: mlp_layer_types must be 'dense' for the first layers, as many as "
                f"first_k_dense_replace says, and 'sparse' for the others; found {kinds} and "
                f"first_k_dense_replace = {config.get('first_k_dense_replace')}"
            )
        return super().from_dict({**config, "first_k_dense_replace": dense})

    @property
    def groups(self) -> tuple[int, int]:
        """Number of groups of experts, and groups per token from which experts are chosen."""
        return self.n_group or 1, self.topk_group or self.n_group or 1

    def check(self) -> None:
        """Check that the groups are equal and large enough.

        Raises:
            ConfigError: they are not.
        """
        super().check()
        groups, kept = self.groups
        size = self.n_routed_experts // groups
        if (
            self.n_routed_experts % groups
            or kept > groups
            or not self.num_experts_per_tok <= kept * size
        ):
            raise ConfigError(
                f"config.json: n_routed_experts = {self.n_routed_experts} must be n_group = "
                f"{groups} equal groups, of which topk_group = {kept} must hold "
                f"num_experts_per_tok = {self.num_experts_per_tok}"
            )
        if groups > kept and size < 2:
            raise ConfigError(
                f"config.json: n_group = {groups} leaves one expert in a group; groups are rated "
                "by their best two"
            )


def make_grouped_moe(
    c: GroupedExpertsConfig,
    router: type[GroupLimitedSigmoid | GroupLimitedSoftmax] = GroupLimitedSigmoid,
    *,
    activation: GatedActivation = swiglu,
) -> MoE:
    """Create the experts of a layer and their router; all shared experts become one wide one."""
    width = c.moe_intermediate_size
    experts = Experts(c.hidden_size, width, c.n_routed_experts, activation)
    shared = None
    if c.n_shared_experts:
        shared = GatedMLP(c.hidden_size, width * c.n_shared_experts, activation)
    return MoE(make_grouped_router(c, router), experts, shared)


def make_grouped_router(
    c: GroupedExpertsConfig,
    router: type[GroupLimitedSigmoid | GroupLimitedSoftmax] = GroupLimitedSigmoid,
) -> Router:
    """Create the router of a layer."""
    groups, kept = c.groups
    return router(
        c.hidden_size,
        c.n_routed_experts,
        c.num_experts_per_tok,
        groups=groups,
        kept=kept,
        renormalise=c.norm_topk_prob,
        scale=c.routed_scaling_factor,
    )


class LatentMoE(MoE):
    """Experts on a latent of the inputs, and a shared expert on the inputs themselves.

    Args:
        dim: hidden size of the model.
        latent: features of the latent; None for experts on the inputs.
    """

    def __init__(
        self,
        gate: Router,
        switch_mlp: Experts,
        shared_experts: nn.Module | None,
        dim: int,
        latent: int | None,
    ) -> None:
        super().__init__(gate, switch_mlp, shared_experts)
        if latent is not None:
            self.fc1_latent_proj = Linear(dim, latent)
            self.fc2_latent_proj = Linear(latent, dim)

    def __call__(self, x: mx.array) -> mx.array:
        chosen, weights = self.gate(x)
        latent = self.fc1_latent_proj(x) if "fc1_latent_proj" in self else x
        y = (self.switch_mlp(latent, chosen) * weights[..., None].astype(x.dtype)).sum(-2)
        y = self.fc2_latent_proj(y) if "fc2_latent_proj" in self else y
        return y + self.shared_experts(x) if "shared_experts" in self else y


class GatedSharedMoE(MoE):
    """Experts beside a shared expert, whose output is scaled by a sigmoid gate per token."""

    weighted_shared_expert = True

    def __init__(self, gate: Router, switch_mlp: Experts, shared_expert: GatedMLP) -> None:
        super().__init__(gate, switch_mlp)
        self.shared_expert = shared_expert
        self.shared_expert_gate = ExactLinear(shared_expert.gate_proj.weight.shape[-1], 1)

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) + mx.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
