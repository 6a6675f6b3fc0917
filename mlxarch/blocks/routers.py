"""Routers: which experts a token goes to, and how much each of them counts."""

import mlx.core as mx

from mlxarch.blocks.linear import Matrix


class Router(Matrix):
    """Rates the experts for every token, in float32 whatever the model computes in. A subclass chooses ``k`` of them.

    Shape:
        x: (B, L, dim) -> experts (B, L, k), their weights (B, L, k) in float32; logits: (B, L, dim) -> (B, L, E)
    """

    quantizable = False
    k: int

    def __init__(self, dim: int, experts: int, bias: bool = False) -> None:
        super().__init__(experts, dim)
        if bias:
            self.bias = mx.zeros((experts,))

    def logits(self, x: mx.array) -> mx.array:
        x = x.astype(mx.float32)
        y = x @ self["weight"].astype(mx.float32).T if self.quantization is None else self.product(x)
        return y + self["bias"].astype(mx.float32) if "bias" in self else y


def top(scores: mx.array, k: int) -> mx.array:
    """Indices of the k largest on the last axis, in no order; a choice has no gradient."""
    return mx.stop_gradient(mx.argpartition(-scores, kth=k - 1, axis=-1)[..., :k])


class SoftmaxTopK(Router):
    """Softmax over all experts, then the k largest (arXiv:2101.03961, with k > 1).

    Args:
        renormalise: the weights of the k sum to one.
        scale: multiplies them.
    """

    def __init__(self, dim: int, experts: int, k: int, *, renormalise: bool, scale: float = 1.0) -> None:
        super().__init__(dim, experts)
        self.k, self.renormalise, self.scale = k, renormalise, scale

    def choose(self, chances: mx.array) -> mx.array:
        """Chances (B, L, E) -> the chosen experts (B, L, k)."""
        return top(chances, self.k)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        chances = mx.softmax(self.logits(x), axis=-1)
        chosen = self.choose(chances)
        weights = mx.take_along_axis(chances, chosen, axis=-1)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdims=True)
        return chosen, weights * self.scale if self.scale != 1 else weights


def limited(scores: mx.array, groups: int, kept: int, best: int) -> mx.array:
    """Scores (B, L, E) with -inf for the experts outside of each token's ``kept`` groups.

    Neighbouring experts form a group, rated by the sum of its ``best`` largest scores; a deployment spreads the groups
    over its nodes, so that a token visits few of them (arXiv:2405.04434 section 2.2.2).
    """
    if kept == groups:
        return scores
    grouped = mx.unflatten(scores, -1, (groups, -1))  # (B, L, groups, E / groups)
    ratings = mx.topk(grouped, best, axis=-1).sum(-1)  # (B, L, groups)
    left_out = mx.argpartition(ratings, kth=groups - kept - 1, axis=-1)[..., : groups - kept]
    return mx.put_along_axis(grouped, left_out[..., None], mx.array(-mx.inf), axis=-2).flatten(-2)


class GroupLimitedSoftmax(SoftmaxTopK):
    """Softmax over all experts, then the k largest of the best groups; a group is as good as its best expert.

    Source: arXiv:2405.04434 (``topk_method`` group_limited_greedy of DeepSeek-V2).
    """

    def __init__(
        self, dim: int, experts: int, k: int, *, groups: int, kept: int, renormalise: bool, scale: float = 1.0
    ) -> None:
        super().__init__(dim, experts, k, renormalise=renormalise, scale=scale)
        self.groups, self.kept = groups, kept

    def choose(self, chances: mx.array) -> mx.array:
        return top(limited(chances, self.groups, self.kept, best=1), self.k)


class GroupLimitedSigmoid(Router):
    """Sigmoid scores; a bias that balances the load enters the choice of experts and not their weights.

    A group is as good as its two best experts together.
    Source: arXiv:2412.19437 section 2.1.2 (``topk_method`` noaux_tc of DeepSeek-V3); transformers' DeepseekV3TopkRouter
    for the 1e-20.

    Args:
        groups: of neighbouring experts; ``kept`` of them are open to a token. With one group all experts are.
        renormalise: the weights of the k sum to one.
        scale: multiplies them.
    """

    float32 = ("e_score_correction_bias",)  # parameters of this type whatever the model computes in

    def __init__(
        self, dim: int, experts: int, k: int, *, groups: int, kept: int, renormalise: bool, scale: float = 1.0
    ) -> None:
        super().__init__(dim, experts)
        self.e_score_correction_bias = mx.zeros((experts,))
        self.k, self.groups, self.kept = k, groups, kept
        self.renormalise, self.scale = renormalise, scale

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        scores = mx.sigmoid(self.logits(x))
        chosen = top(limited(scores + self["e_score_correction_bias"], self.groups, self.kept, best=2), self.k)
        weights = mx.take_along_axis(scores, chosen, axis=-1)
        if self.renormalise:
            weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
        return chosen, weights * self.scale
