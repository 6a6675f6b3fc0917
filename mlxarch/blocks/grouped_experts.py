"""Many small experts beside shared ones, as DeepSeek introduced them: what a config says of them, and the block."""

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from mlxarch.blocks.config import DecoderConfig, Positive, Size
from mlxarch.blocks.feedforward import GatedMLP, swiglu
from mlxarch.blocks.moe import Experts, MoE
from mlxarch.blocks.routers import GroupLimitedSigmoid, GroupLimitedSoftmax
from mlxarch.errors import ConfigError

Count = Annotated[int, Meta(ge=0, lt=2**31)]


@dataclass(frozen=True, kw_only=True)
class GroupedExpertsConfig(DecoderConfig):
    """The first layers are dense, all others have experts. ``intermediate_size`` is that of the dense ones."""

    moe_intermediate_size: Size
    n_routed_experts: Size
    n_shared_experts: Count | None
    num_experts_per_tok: Size
    first_k_dense_replace: Count
    n_group: Size | None = None
    topk_group: Size | None = None
    norm_topk_prob: bool
    routed_scaling_factor: Positive

    @property
    def groups(self) -> tuple[int, int]:
        """Groups of experts, and how many of them are open to a token."""
        return self.n_group or 1, self.topk_group or self.n_group or 1

    def check(self) -> None:
        """See DecoderConfig."""
        super().check()
        groups, kept = self.groups
        size = self.n_routed_experts // groups
        if self.n_routed_experts % groups or kept > groups or not self.num_experts_per_tok <= kept * size:
            raise ConfigError(
                f"config.json: n_routed_experts = {self.n_routed_experts} must be n_group = {groups} equal groups, of "
                f"which topk_group = {kept} must hold num_experts_per_tok = {self.num_experts_per_tok}"
            )
        if groups > kept and size < 2:
            raise ConfigError(
                f"config.json: n_group = {groups} leaves one expert in a group; groups are rated by their best two"
            )


def grouped_experts(
    c: GroupedExpertsConfig, router: type[GroupLimitedSigmoid | GroupLimitedSoftmax] = GroupLimitedSigmoid
) -> MoE:
    """The experts of a layer, their router, and the shared ones as one that is as wide as all of them."""
    (groups, kept), width, experts = c.groups, c.moe_intermediate_size, c.n_routed_experts
    gate = router(
        c.hidden_size,
        experts,
        c.num_experts_per_tok,
        groups=groups,
        kept=kept,
        renormalise=c.norm_topk_prob,
        scale=c.routed_scaling_factor,
    )
    shared = GatedMLP(c.hidden_size, width * c.n_shared_experts, swiglu) if c.n_shared_experts else None
    return MoE(gate, Experts(c.hidden_size, width, experts, swiglu), shared)
