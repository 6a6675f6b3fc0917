"""Machines: memory available to a model, and bandwidth of memory and SSD."""

import functools
import os
import platform
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec

from mlxarch.errors import InvalidInput
from mlxarch.system.backend import require_backend

GIB = 2**30
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d{1,20}(?:\.\d+)?)\s*((?:[kmgt]i?)?)b?", re.IGNORECASE | re.ASCII)
MIN_SIZE_WITHOUT_UNIT = 2**20  # a smaller number without a unit is hardly meant as bytes
_NAME = re.compile(r"([a-z0-9-]+?)-(\d{1,6})gb?", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Machine:
    """Properties of a machine that the memory planner uses.

    Attributes:
        name: name for messages.
        memory: bytes that this process may use.
        backend: MLX's back end.
        bandwidth: bytes per second read from memory; None if unknown.
        ssd: bytes per second read from the SSD; None if unknown.
    """

    name: str
    memory: int
    backend: Literal["metal", "cuda", "cpu"]
    bandwidth: float | None = None
    ssd: float | None = None

    @property
    def float_bytes(self) -> int:
        """Bytes of an activation: CPUs have no hardware for floats smaller than float32."""
        return 4 if self.backend == "cpu" else 2


class Chip(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An entry of machines.toml.

    Attributes:
        bandwidth: memory bandwidth, GB/s.
        ssd: bandwidth of the SSD, GB/s.
        sizes: memory sizes sold, GB.
    """

    bandwidth: float
    ssd: float
    sizes: list[int]


@functools.cache
def chips() -> Mapping[str, Chip]:
    """Return the chips of machines.toml by name, in the order of the file."""
    text = Path(__file__).with_name("machines.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), dict[str, Chip])


def recommended_working_set(ram: int) -> int:
    """Return Metal's recommended maximum working set for ``ram`` bytes: 2/3, and 3/4 beyond 36 GB.

    Source: recommendedMaxWorkingSetSize on Macs of 16, 24, 32, 48 and 64 GB, from logs of
    llama.cpp.
    """
    return ram * 2 // 3 if ram <= 36 * GIB else ram * 3 // 4


def find_machine(name: str) -> Machine:
    """Return the Mac named by a chip and its memory, such as m4-pro-24gb.

    Raises:
        InvalidInput: there is no such chip, or it is not sold with this memory.
    """
    found = _NAME.fullmatch(name.strip().replace(" ", "-"))
    known = chips()
    chip = known.get(found[1].lower()) if found else None
    if found is None or chip is None:
        raise InvalidInput(
            f"machine {name!r} is unknown; write a chip and its memory, m4-24gb; chips: "
            f"{_join(known)}"
        )
    if int(found[2]) not in chip.sizes:
        raise InvalidInput(
            f"there is no {found[1]} with {found[2]} GB; there are {_join(map(str, chip.sizes))} GB"
        )
    return _mac(
        f"{found[1].lower()}-{found[2]}gb", recommended_working_set(int(found[2]) * GIB), chip
    )


def _mac(name: str, memory: int, chip: Chip | None) -> Machine:
    if chip is None:
        return Machine(name, memory, "metal")
    return Machine(name, memory, "metal", chip.bandwidth * 1e9, chip.ssd * 1e9)


def this_machine() -> Machine:
    """Describe this machine.

    Its memory is the recommended working set on Metal, the free memory of a CUDA GPU, or the
    available memory of a CPU.
    """
    require_backend()
    import mlx.core as mx

    if mx.default_device() != mx.Device(mx.gpu, 0):
        return Machine(f"this CPU ({platform.machine()})", available_memory(), "cpu")
    info = mx.device_info()
    title = str(info.get("device_name", "this GPU"))
    if platform.system() == "Darwin":
        chip = chips().get(title.removeprefix("Apple ").lower().replace(" ", "-"))
        return _mac(
            title, int(info["max_recommended_working_set_size"]) - mx.get_active_memory(), chip
        )
    for key in ("free_memory", "total_memory", "memory_size"):
        if isinstance(size := info.get(key), int) and size > 0:
            return Machine(title, size, "cuda")
    return Machine(title, available_memory(), "cuda")


def available_memory(root: Path = Path("/")) -> int:
    """Return the bytes of memory available by the kernel and the control groups' limits."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
        )
    except (OSError, StopIteration, ValueError, IndexError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([free, *_group_limits(root)])


def _group_limits(root: Path) -> list[int]:
    """Return the bytes that each control group of this process leaves, versions 1 and 2."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found = []
    files = {  # controller -> folder, limit, usage; the empty one is version 2
        "": ("", "memory.max", "memory.current"),
        "memory": ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    }
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in files.keys() & set(controllers.split(",")):
            folder, limit, used = files[controller]
            top = root / "sys/fs/cgroup" / folder
            group = top / path.strip("/")
            for ancestor in (group, *group.parents):
                left = _bytes_left(ancestor / limit, ancestor / used, ancestor / "memory.stat")
                if left is not None:
                    found.append(left)
                if ancestor == top:
                    break
    return found


def _bytes_left(limit: Path, used: Path, statistics: Path) -> int | None:
    """Return the bytes that a control group leaves; None if it has no limit."""
    try:
        maximum = int(limit.read_text())
        current = int(used.read_text())
        values = dict(line.split() for line in statistics.read_text().splitlines())
    except (OSError, ValueError):  # there is no such group, or the limit is "max"
        return None
    # The page cache of files not in active use is freed when memory is needed.
    cached = int(values.get("total_inactive_file", values.get("inactive_file", 0)))
    return max(maximum - current + cached, 0)


def parse_size(text: str) -> int:
    """Parse a size in bytes: ``16GB``, ``16 GiB``, ``900MB`` or ``17179869184``.

    Raises:
        InvalidInput: it is no size, zero, or a number without a unit too small to be bytes.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or (count := int(float(found[1]) * UNITS[found[2].lower()])) < 1:
        raise InvalidInput(
            f"{text!r} is no size of memory; write 16GB, 16GiB, 900MB or a number of bytes"
        )
    if not found[2] and count < MIN_SIZE_WITHOUT_UNIT:
        raise InvalidInput(
            f"{text.strip()} without a unit is a number of bytes, and too few; write 16GB or 900MB"
        )
    return count


def parse_tokens(text: str) -> int:
    """Parse a positive number of tokens: ``4096``, ``4k`` or ``32K``; k stands for 1024.

    Raises:
        InvalidInput: it is no number of tokens.
    """
    number = text.strip().lower().removesuffix("k")
    if not re.fullmatch(r"[0-9]{1,15}", number, re.ASCII) or not int(number):
        raise InvalidInput(f"{text!r} is no number of tokens; write 4096 or 32k")
    return int(number) * (1024 if text.strip().lower().endswith("k") else 1)


def _join(names: Iterable[str]) -> str:
    return ", ".join(names)
