"""The ``quantization`` section of config.json, as MLX's tools write and read it.

The section gives bits, group size and mode of all quantized matrices. A matrix quantized
differently has an entry of its own in the section, under its path.
"""

from collections.abc import Mapping
from typing import Any

from mlxarch.errors import ConfigError
from mlxarch.quantization.formats import MODES
from mlxarch.quantization.scheme import Quantization


def quantization_to_config(quantization: Quantization) -> dict[str, int | str]:
    """Bits, group size and mode under the keys of config.json."""
    return {
        "group_size": quantization.group_size,
        "bits": quantization.bits,
        "mode": quantization.mode,
    }


def quantization_from_config(config: Mapping[str, Any], path: str) -> Quantization:
    """Read the quantization of the matrix at ``path``: its own entry, else the common one.

    Raises:
        ConfigError: there is no entry, or it has bits, a group size or a mode unknown to MLX.
    """
    common = config.get("quantization") or config.get("quantization_config")
    own = common.get(path) if isinstance(common, dict) else None
    entry = own if isinstance(own, dict) else common
    if not isinstance(entry, dict):
        raise ConfigError(
            f"config.json: {path} is quantized, but `quantization` gives no bits and group_size "
            "for it"
        )
    mode = entry.get("mode", "affine")
    if not isinstance(mode, str) or mode not in MODES:
        raise ConfigError(
            f"config.json: quantization mode {mode!r} of {path} is unknown; known: "
            f"{', '.join(MODES)}"
        )
    bits_allowed, groups_allowed = MODES[mode]
    bits = entry.get("bits", bits_allowed[-1])
    group = entry.get("group_size", groups_allowed[0])
    if (
        type(bits) is not int
        or bits not in bits_allowed
        or type(group) is not int
        or group not in groups_allowed
    ):
        raise ConfigError(
            f"config.json: {path} has {bits!r} bits in groups of {group!r}; mode {mode} allows "
            f"bits {', '.join(map(str, bits_allowed))} in groups of "
            f"{', '.join(map(str, groups_allowed))}"
        )
    return Quantization(bits, group, mode)
