"""Routers of a mixture of experts: choose the experts of each token, and their weights."""

import mlx.core as mx

from mlxarch.blocks.linear import Matrix


class Router(Matrix):
    """Linear router, always computed in float32; a subclass chooses the experts.

    Attributes:
        k: number of experts per token.

    Shape:
        x: (B, L, dim) -> experts (B, L, k), their weights (B, L, k) in float32
    """

    quantizable = False
    k: int

    def __init__(self, dim: int, experts: int, bias: bool = False) -> None:
        super().__init__(experts, dim)
        if bias:
            self.bias = mx.zeros((experts,))

    def logits(self, x: mx.array) -> mx.array:
        """Score of each expert in float32: (B, L, dim) -> (B, L, E)."""
        x = x.astype(mx.float32)
        quantized = self.quantization is not None
        y = self.matmul(x) if quantized else x @ self["weight"].astype(mx.float32).T
        return y + self["bias"].astype(mx.float32) if "bias" in self else y


def top_k_indices(scores: mx.array, k: int) -> mx.array:
    """Indices of the k largest scores on the last axis, in no particular order; no gradient."""
    return mx.stop_gradient(mx.argpartition(-scores, kth=k - 1, axis=-1)[..., :k])


class SoftmaxTopK(Router):
    """Softmax over all experts, then the k largest (arXiv:2101.03961, with k > 1).

    Args:
        renormalise: divide the weights of the k experts by their sum.
        scale: factor of the weights.
    """

    def __init__(
        self, dim: int, experts: int, k: int, *, renormalise: bool, scale: float = 1.0
    ) -> None:
        super().__init__(dim, experts)
        self.k = k
        self.renormalise = renormalise
        self.scale = scale

    def choose(self, probabilities: mx.array) -> mx.array:
        """Choose experts by their probabilities: (B, L, E) -> (B, L, k)."""
        return top_k_indices(probabilities, self.k)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        probabilities = mx.softmax(self.logits(x), axis=-1)
        chosen = self.choose(probabilities)
        weights = mx.take_along_axis(probabilities, chosen, axis=-1)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdims=True)
        return chosen, weights * self.scale if self.scale != 1 else weights


class ScaledSoftmaxTopK(SoftmaxTopK):
    """``SoftmaxTopK`` with a norm and a scale of its input, and a factor for every expert.

    Source: transformers' Gemma4TextRouter.

    Args:
        eps: of the norm.
    """

    def __init__(self, dim: int, experts: int, k: int, eps: float) -> None:
        super().__init__(dim, experts, k, renormalise=True)
        self.input_scale = mx.ones((dim,))
        self.per_expert_scale = mx.ones((experts,))
        self.eps = eps

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        x = mx.fast.rms_norm(x, self["input_scale"], self.eps) * x.shape[-1] ** -0.5
        chosen, weights = super().__call__(x)
        return chosen, weights * self["per_expert_scale"][chosen]


def limit_to_top_groups(scores: mx.array, groups: int, kept: int, best: int) -> mx.array:
    """Set the scores (B, L, E) of experts outside of each token's ``kept`` best groups to -inf.

    Neighbouring experts form a group, rated by the sum of its ``best`` largest scores. A deployment
    places each group on one node, so that a token is sent to few nodes (arXiv:2405.04434 section
    2.2.2).
    """
    if kept == groups:
        return scores
    grouped = mx.unflatten(scores, -1, (groups, -1))  # (B, L, groups, E / groups)
    ratings = mx.topk(grouped, best, axis=-1).sum(-1)  # (B, L, groups)
    dropped = mx.argpartition(ratings, kth=groups - kept - 1, axis=-1)[..., : groups - kept]
    return mx.put_along_axis(grouped, dropped[..., None], mx.array(-mx.inf), axis=-2).flatten(-2)


class GroupLimitedSoftmax(SoftmaxTopK):
    """Softmax over all experts, then the k largest within the best groups of experts.

    A group is rated by its best expert. Source: arXiv:2405.04434 (``topk_method``
    group_limited_greedy of DeepSeek-V2).

    Args:
        groups: number of groups of neighbouring experts.
        kept: groups per token from which experts are chosen.
        renormalise: divide the weights of the k experts by their sum.
        scale: factor of the weights.
    """

    def __init__(
        self,
        dim: int,
        experts: int,
        k: int,
        *,
        groups: int,
        kept: int,
        renormalise: bool,
        scale: float = 1.0,
    ) -> None:
        super().__init__(dim, experts, k, renormalise=renormalise, scale=scale)
        self.groups = groups
        self.kept = kept

    def choose(self, probabilities: mx.array) -> mx.array:
        limited = limit_to_top_groups(probabilities, self.groups, self.kept, best=1)
        return top_k_indices(limited, self.k)


class GroupLimitedSigmoid(Router):
    """Sigmoid scores, and the k largest within the best groups, with a bias that balances load.

    The bias affects which experts are chosen, not their weights. A group is rated by the sum of its
    two best experts. Source: arXiv:2412.19437 section 2.1.2 (``topk_method`` noaux_tc of
    DeepSeek-V3); transformers' DeepseekV3TopkRouter for the 1e-20.

    Args:
        groups: number of groups of neighbouring experts.
        kept: groups per token from which experts are chosen.
        renormalise: divide the weights of the k experts by their sum.
        scale: factor of the weights.
        eps: added to the sum by which weights are divided.

    Attributes:
        float32: parameters that stay in float32 whatever the type of the model.
    """

    float32 = ("e_score_correction_bias",)

    def __init__(
        self,
        dim: int,
        experts: int,
        k: int,
        *,
        groups: int = 1,
        kept: int = 1,
        renormalise: bool = True,
        scale: float = 1.0,
        eps: float = 1e-20,
    ) -> None:
        super().__init__(dim, experts)
        self.e_score_correction_bias = mx.zeros((experts,))
        self.k = k
        self.groups = groups
        self.kept = kept
        self.renormalise = renormalise
        self.scale = scale
        self.eps = eps

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        scores = mx.sigmoid(self.logits(x))
        biased = scores + self["e_score_correction_bias"]
        limited = limit_to_top_groups(biased, self.groups, self.kept, best=2)
        chosen = top_k_indices(limited, self.k)
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdims=True) + self.eps)
        return chosen, weights * self.scale
