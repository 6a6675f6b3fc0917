"""Machines: how much of their memory a model may use, and how fast memory and disk are."""

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

from mlxarch.backend import require_backend
from mlxarch.errors import InvalidInput

GIB = 2**30
UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
UNITS |= {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}
_SIZE = re.compile(r"(\d{1,20}(?:\.\d+)?)\s*((?:[kmgt]i?)?)b?", re.IGNORECASE | re.ASCII)
LEAST = 2**20  # bytes that somebody means who writes no unit
_NAME = re.compile(r"([a-z0-9-]+?)-(\d{1,6})gb?", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Machine:
    """What a plan needs to know of a machine.

    Attributes:
        name: as a person reads it.
        memory: bytes that the process may use.
        backend: which of MLX's back ends runs there.
        bandwidth, ssd: bytes a second out of memory and out of the disk; None where nobody said.
    """

    name: str
    memory: int
    backend: Literal["metal", "cuda", "cpu"]
    bandwidth: float | None = None
    ssd: float | None = None

    @property
    def float_bytes(self) -> int:
        """Of a number that is computed with: a CPU has nothing smaller than float32 in hardware."""
        return 4 if self.backend == "cpu" else 2


class Chip(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A line of machines.toml: GB/s, GB/s and GB."""

    bandwidth: float
    ssd: float
    sizes: list[int]


@functools.cache
def chips() -> Mapping[str, Chip]:
    """By name, in the order of the file."""
    text = Path(__file__).with_name("machines.toml").read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text), dict[str, Chip])


def working_set(ram: int) -> int:
    """Bytes that Metal recommends to use at most of ``ram`` bytes: 2/3, and 3/4 beyond 36 GB.

    Source: as macOS reports it on Macs of 16, 24, 32, 48 and 64 GB (llama.cpp's logs of recommendedMaxWorkingSetSize).
    """
    return ram * 2 // 3 if ram <= 36 * GIB else ram * 3 // 4


def named(name: str) -> Machine:
    """The Mac called ``name``: a chip and its gigabytes, m4-pro-24gb.

    Raises:
        InvalidInput: there is no such chip, or none with so much memory.
    """
    found, known = _NAME.fullmatch(name.strip().replace(" ", "-")), chips()
    chip = known.get(found[1].lower()) if found else None
    if found is None or chip is None:
        raise InvalidInput(f"machine {name!r} is unknown; write a chip and its memory, m4-24gb; chips: {_list(known)}")
    if int(found[2]) not in chip.sizes:
        raise InvalidInput(f"there is no {found[1]} with {found[2]} GB; there are {_list(map(str, chip.sizes))} GB")
    return _mac(f"{found[1].lower()}-{found[2]}gb", working_set(int(found[2]) * GIB), chip)


def _mac(name: str, memory: int, chip: Chip | None) -> Machine:
    if chip is None:
        return Machine(name, memory, "metal")
    return Machine(name, memory, "metal", chip.bandwidth * 1e9, chip.ssd * 1e9)


def here() -> Machine:
    """This machine: on Metal the recommended working set, else the free memory of the GPU, or what is available."""
    require_backend()
    import mlx.core as mx

    if mx.default_device() != mx.Device(mx.gpu, 0):
        return Machine(f"this CPU ({platform.machine()})", available(), "cpu")
    info = mx.device_info()
    title = str(info.get("device_name", "this GPU"))
    if platform.system() == "Darwin":
        chip = chips().get(title.removeprefix("Apple ").lower().replace(" ", "-"))
        return _mac(title, int(info["max_recommended_working_set_size"]) - mx.get_active_memory(), chip)
    for key in ("free_memory", "total_memory", "memory_size"):
        if isinstance(size := info.get(key), int) and size > 0:
            return Machine(title, size, "cuda")
    return Machine(title, available(), "cuda")


def available(root: Path = Path("/")) -> int:
    """Bytes of memory that a new program can have, by the kernel and by the limits of the control group we are in."""
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError, IndexError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([free, *_group_limits(root)])


def _group_limits(root: Path) -> list[int]:
    """What each control group above this process leaves, version 2 and version 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    found, names = [], {"": ("", "memory.max", "memory.current")}
    names["memory"] = ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for controller in names.keys() & set(controllers.split(",")):
            folder, limit, used = names[controller]
            top = root / "sys/fs/cgroup" / folder
            group = top / path.strip("/")
            for place in (group, *group.parents):
                try:
                    most, now = int((place / limit).read_text()), int((place / used).read_text())
                    stat = dict(line.split() for line in (place / "memory.stat").read_text().splitlines())
                except (OSError, ValueError):  # no such group here, or "max": no limit
                    pass
                else:  # what files were read lately is given back when it is needed
                    found.append(most - now + int(stat.get("total_inactive_file", stat.get("inactive_file", 0))))
                if place == top:
                    break
    return [max(left, 0) for left in found]


def parse_size(text: str) -> int:
    """Bytes in ``16GB``, ``16 GiB``, ``900MB`` or ``17179869184``.

    Raises:
        InvalidInput: it is no size, or nothing, or a number without a unit that hardly means bytes.
    """
    found = _SIZE.fullmatch(text.strip())
    if found is None or (count := int(float(found[1]) * UNITS[found[2].lower()])) < 1:
        raise InvalidInput(f"{text!r} is no size of memory; write 16GB, 16GiB, 900MB or a number of bytes")
    if not found[2] and count < LEAST:
        raise InvalidInput(f"{text.strip()} without a unit is a number of bytes, and too few; write 16GB or 900MB")
    return count


def _list(names: Iterable[str]) -> str:
    return ", ".join(names)
