"""Machines: names, sizes, and what this one has left."""

from pathlib import Path

import pytest

from mlxarch.errors import InvalidInput
from mlxarch.system import machines
from mlxarch.system.machines import (
    GIB,
    available_memory,
    find_machine,
    parse_size,
    recommended_working_set,
    this_machine,
)


def test_a_machine_is_a_chip_and_its_memory() -> None:
    small, large = find_machine("m4-16gb"), find_machine("M4 Pro 48GB")
    assert (
        small.memory == pytest.approx(11.45e9, rel=0.001)
        and small.bandwidth == 120e9
        and small.ssd == 2.8e9
    )
    assert large.memory == 36 * GIB and large.name == "m4-pro-48gb"
    assert (small.backend, small.float_bytes) == ("metal", 2)


def test_two_thirds_of_little_memory_and_three_quarters_of_much() -> None:
    assert (
        recommended_working_set(36 * GIB) == 24 * GIB
        and recommended_working_set(48 * GIB) == 36 * GIB
    )


@pytest.mark.parametrize("name", ["m4", "m9-16gb", "m4-17gb", "16gb", "m4-16gb-x", ""])
def test_a_machine_that_is_not_is_refused_with_those_that_are(name: str) -> None:
    with pytest.raises(InvalidInput, match="m4-pro|16, 24, 32"):
        find_machine(name)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("16GB", 16 * 10**9),
        ("16 GiB", 16 * GIB),
        ("900mb", 9 * 10**8),
        ("1.5g", 15 * 10**8),
        ("9000000", 9 * 10**6),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "-1GB", "16 bytes", "1e9", "0", "16XB", "16i", "16", "9" * 400 + "GB"]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="write 16GB"):
        parse_size(text)


def test_this_machine_says_what_it_has() -> None:
    found = this_machine()
    assert 10**8 < found.memory < 10**13 and found.backend in ("cpu", "cuda", "metal")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_control_group_limits_what_is_available(tmp_path: Path) -> None:
    write(tmp_path / "proc/meminfo", "MemTotal: 100 kB\nMemAvailable: 8000000 kB\n")
    assert available_memory(tmp_path) == 8_000_000 * 1024
    write(tmp_path / "proc/self/cgroup", "0::/a/b\n")
    write(tmp_path / "sys/fs/cgroup/a/b/memory.max", "max\n")
    assert available_memory(tmp_path) == 8_000_000 * 1024, "no limit"
    write(tmp_path / "sys/fs/cgroup/a/memory.max", "4000000000\n")
    write(tmp_path / "sys/fs/cgroup/a/memory.current", "1000000000\n")
    write(tmp_path / "sys/fs/cgroup/a/memory.stat", "anon 5\ninactive_file 500000000\n")
    assert available_memory(tmp_path) == 3_500_000_000, (
        "what a file left in the memory is given back"
    )


def test_a_control_group_of_the_first_version_limits_too(tmp_path: Path) -> None:
    write(tmp_path / "proc/meminfo", "MemAvailable: 8000000 kB\n")
    write(tmp_path / "proc/self/cgroup", "9:name=systemd:/\n4:memory,cpu:/x\n")
    for name, value in (("limit_in_bytes", 10**9), ("usage_in_bytes", 10**8)):
        write(tmp_path / f"sys/fs/cgroup/memory/x/memory.{name}", f"{value}\n")
    write(tmp_path / "sys/fs/cgroup/memory/x/memory.stat", "total_inactive_file 1\n")
    assert available_memory(tmp_path) == 9 * 10**8 + 1


def test_every_chip_of_the_table_can_be_named() -> None:
    for name, chip in machines.chips().items():
        for size in chip.sizes:
            assert find_machine(f"{name}-{size}gb").memory > 0.6 * size * GIB
