"""The exception tree of mlxarch. Each message states the problem, allowed values and the remedy.

    MlxArchError
    ├── InvalidInput            an argument out of range (also a ValueError)
    │   └── InvalidSchema       a JSON schema, regular expression or grammar that is refused
    │       └── UnsupportedSchema
    ├── ConfigError             config.json: a key is missing, malformed or not understood
    │   └── UnsupportedArchitecture
    ├── CheckpointError         weights: a file, a header, an index or a tensor breaks a rule
    ├── TokenizerError          tokenizer files
    │   └── ChatTemplateError
    ├── QuantizationError       unknown quantization, or weights that cannot be quantized
    ├── OutputError             the target exists, is locked, or cannot be written
    │   └── DiskSpaceError
    ├── ModelNotFound           no such name, repository or file                        exit 3
    │   └── GatedModel          it exists, and its owner requires an agreement first    exit 3
    ├── MemoryBudgetError       the model does not fit into memory                      exit 4
    ├── OfflineError            the network is needed and unavailable                   exit 5
    ├── DownloadError           a download broke off or brought other bytes than promised
    ├── Declined                the user declined a confirmation
    ├── BackendMissing          MLX or an optional package is not installed
    ├── ForkedProcess           MLX was used before this process was forked
    └── GenerationError         generation failed
        ├── ContextLengthError
        ├── ConstraintError     a grammar can not be continued
        ├── StreamError         reading offloaded weights from the disk failed
        │   ├── EmbeddingReadError
        │   └── ExpertReadError
        ├── NonFiniteLogits
        ├── SessionInUse        two threads use one session at the same time
        ├── QueueFull           the engine has as many requests as it accepts
        ├── DoesNotFit          a request needs more memory than the engine has for all
        └── EngineStopped       the engine was closed, or a failure ended it

``exit_code`` is the exit status of the command line for each.
"""


class MlxArchError(Exception):
    """Base class of all errors of mlxarch."""

    exit_code = 1


class InvalidInput(MlxArchError, ValueError):
    """An argument is out of its range; the message names the argument, the value and the range."""

    exit_code = 2


class InvalidSchema(InvalidInput):
    """A JSON schema, a regular expression or a grammar is not understood, or contradicts itself."""


class UnsupportedSchema(InvalidSchema):
    """A JSON schema has a keyword that no grammar can hold.

    Attributes:
        path: place of the keyword in the schema, such as "#/properties/tags/uniqueItems".
        keyword: the keyword.
    """

    def __init__(self, path: str, keyword: str) -> None:
        self.path = path
        self.keyword = keyword
        super().__init__(
            f"the schema's {keyword} at {path} cannot be enforced while the model writes; remove "
            "it, or compile the schema with strict=False, which checks the finished answer"
        )


class ConfigError(MlxArchError):
    """config.json lacks a key, or holds one whose value is malformed or not understood."""


class UnsupportedArchitecture(ConfigError):
    """The config's ``model_type`` is none that mlxarch runs."""


class CheckpointError(MlxArchError):
    """A weight file, header, shard index or tensor breaks a rule that the message names."""


class TokenizerError(MlxArchError):
    """Tokenizer files are missing or broken, or a text cannot be tokenized."""


class ChatTemplateError(TokenizerError):
    """A chat template is missing, refuses the messages, or exceeds the limits of rendering."""


class QuantizationError(MlxArchError):
    """A quantization that does not exist, or weights that cannot be quantized (NaN, infinity)."""


class OutputError(MlxArchError):
    """The output exists already, another process writes it, or it cannot be written."""


class DiskSpaceError(OutputError):
    """The disk has less free space than needed; the message gives both numbers."""


class ModelNotFound(MlxArchError):
    """No model of that name, repository or path."""

    exit_code = 3


class GatedModel(ModelNotFound):
    """The repository requires an agreement or a token first."""


class MemoryBudgetError(MlxArchError):
    """The model does not fit into its memory budget; the message shows the calculation."""

    exit_code = 4


class OfflineError(MlxArchError):
    """The network is needed and cannot be reached, or offline mode is on."""

    exit_code = 5


class DownloadError(MlxArchError):
    """A download broke off, or its bytes are not the promised ones."""


class Declined(MlxArchError):
    """The user declined a confirmation before a large operation; nothing was changed."""


class BackendMissing(MlxArchError):
    """A required package is not installed; the message has the command to install it."""


class ForkedProcess(MlxArchError):
    """The process was forked from one that had used MLX, whose threads do not survive a fork."""


class GenerationError(MlxArchError):
    """Generation failed."""


class ContextLengthError(GenerationError):
    """Prompt and answer exceed the context window; the message gives the numbers."""


class ConstraintError(GenerationError):
    """The grammar of an answer exceeds its limits, or no token can continue it."""


class StreamError(GenerationError):
    """Weights offloaded to the disk could not be read, or changed, while the model ran."""


class EmbeddingReadError(StreamError):
    """A row of an embedding table could not be read; the message names table, row and file."""


class ExpertReadError(StreamError):
    """An expert could not be read; the message names layer, expert and file."""


class SessionInUse(GenerationError):
    """A session is used by two threads at the same time."""


class NonFiniteLogits(GenerationError):
    """The logits contain NaN or infinity, because of damaged weights or insufficient precision."""


class QueueFull(GenerationError):
    """The engine has as many waiting requests as it accepts.

    Args:
        message: text of the error.
        retry_after: estimated seconds until a place is free.
    """

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DoesNotFit(GenerationError):
    """A request can never run: it needs more memory than there is; the message has the arithmetic."""


class EngineStopped(GenerationError):
    """The engine does not run: it was closed, or a failure ended it."""
