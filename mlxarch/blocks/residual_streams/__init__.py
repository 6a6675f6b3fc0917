"""Several residual streams in place of one: how a block reads and writes them (hyper-connections).

low_rank    gates of low rank for every feature
sinkhorn    mixing by nearly doubly stochastic matrices
"""
