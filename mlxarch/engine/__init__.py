"""Many requests at once on one model: token ids in, token ids out.

request     a request, and the outputs that it gets
engine      the thread that owns the model, and its interface to other threads
batch       several requests run to their ends
scheduler   which rows run in the next step, and which part of a prompt is read
row         state of one running request
probe       numbers of rows for which a row does not depend on its neighbours
prefix      caches of earlier prompts, in memory and on the disk
steps       one decoding step for all rows, and one chunk of a prompt
"""

from mlxarch.engine.batch import run_batch
from mlxarch.engine.engine import Engine
from mlxarch.engine.request import (
    EngineStatus,
    GenerationRequest,
    PromptReport,
    RequestHandle,
    RequestTimings,
    RowOutput,
    TokenMatcher,
)
from mlxarch.generation.logprobs import TokenLogprobs

__all__ = [
    "Engine",
    "EngineStatus",
    "GenerationRequest",
    "PromptReport",
    "RequestHandle",
    "RequestTimings",
    "RowOutput",
    "TokenLogprobs",
    "TokenMatcher",
    "run_batch",
]
