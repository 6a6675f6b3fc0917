"""Every error that mlxarch raises on purpose. Each message says what was found, what is allowed and what to do.

    MlxArchError
    ├── InvalidInput            an argument out of range (also a ValueError)
    ├── ConfigError             config.json: a key is missing, malformed or not understood
    │   └── UnsupportedArchitecture
    ├── CheckpointError         weights: a file, a header, an index or a tensor is not what it must be
    ├── TokenizerError          tokenizer files
    │   └── ChatTemplateError
    ├── QuantizationError       settings, or weights that cannot be quantized
    ├── OutputError             the target exists, is locked, or cannot be written
    │   └── DiskSpaceError
    ├── ModelNotFound           no such name, repository or file                        exit 3
    │   └── GatedModel          it exists, and its owner asks for an agreement first    exit 3
    ├── MemoryBudgetError       it does not fit                                         exit 4
    ├── OfflineError            it would need the network, and there is none            exit 5
    ├── DownloadError           a download broke off or brought other bytes than promised
    ├── Declined                a person was asked and said no
    ├── BackendMissing          the array library or an optional package is not installed
    └── GenerationError         generation had to stop
        ├── ContextLengthError
        ├── StreamError         what is read from the disk while a model runs could not be
        │   ├── EmbeddingReadError
        │   └── ExpertReadError
        └── NonFiniteLogits

``exit_code`` is what the command line returns for each.
"""


class MlxArchError(Exception):
    """The root: catch this to catch all of them."""

    exit_code = 1


class InvalidInput(MlxArchError, ValueError):
    """An argument is out of its range; the message names the argument, the value and the range."""

    exit_code = 2


class ConfigError(MlxArchError):
    """config.json lacks a key, or holds one whose value is malformed or not understood."""


class UnsupportedArchitecture(ConfigError):
    """The config's ``model_type`` is none that mlxarch runs."""


class CheckpointError(MlxArchError):
    """A weight file, its header, the shard index or a tensor breaks a rule; the message names file, tensor and rule."""


class TokenizerError(MlxArchError):
    """Tokenizer files are missing or broken, or a text cannot be tokenized."""


class ChatTemplateError(TokenizerError):
    """A chat template is missing, refuses the messages, or exceeds the limits it is rendered under."""


class QuantizationError(MlxArchError):
    """Quantization settings that do not exist, or weights that cannot be quantized (NaN, infinity)."""


class OutputError(MlxArchError):
    """The output exists already, another process writes it, or it cannot be written."""


class DiskSpaceError(OutputError):
    """The disk has less room than the work needs; the message gives both numbers."""


class ModelNotFound(MlxArchError):
    """No model of that name, repository or path."""

    exit_code = 3


class GatedModel(ModelNotFound):
    """The repository asks for an agreement or a token first."""


class MemoryBudgetError(MlxArchError):
    """The model does not fit into the memory it may use; the message holds the arithmetic."""

    exit_code = 4


class OfflineError(MlxArchError):
    """The network is needed and cannot be reached, or offline mode is on."""

    exit_code = 5


class DownloadError(MlxArchError):
    """A download broke off, or its bytes are not the promised ones."""


class Declined(MlxArchError):
    """A person was asked before something large and said no; nothing was changed."""


class BackendMissing(MlxArchError):
    """A package that this machine needs is not installed; the message holds the command that installs it."""


class GenerationError(MlxArchError):
    """Generation had to stop."""


class ContextLengthError(GenerationError):
    """Prompt and answer do not fit into the context; the message gives the numbers."""


class StreamError(GenerationError):
    """What a model reads from the disk while it runs could not be read, or is not what it was."""


class EmbeddingReadError(StreamError):
    """A row of a table of embeddings could not be read from its file; the message names table, row and file."""


class ExpertReadError(StreamError):
    """An expert could not be read from its file while the model ran; the message names layer, expert and file."""


class NonFiniteLogits(GenerationError):
    """The model produced NaN or infinity: its weights, or the precision it runs in, are at fault."""
