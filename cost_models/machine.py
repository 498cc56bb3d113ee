"""What this machine, or a board, is called."""

from __future__ import annotations

import contextlib
import os
import platform
from pathlib import Path


def cpu_model() -> str:
    """Name of this machine's CPU, with family and model where Linux tells: virtual machines shorten the name."""
    text = ""
    with contextlib.suppress(OSError):  # not Linux
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    return cpu_of(text) or platform.processor() or platform.machine()


def cpu_of(cpuinfo: str) -> str:
    """The CPU that a text of Linux's /proc/cpuinfo describes (its first core); empty if it does not say."""
    fields: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), " ".join(filter(str.isprintable, value.split())))
    if "model name" in fields and "cpu family" in fields:
        return f"{fields['model name']} (family {fields['cpu family']} model {fields.get('model', '?')})"
    if "CPU part" in fields:  # ARM Linux
        return arm_cpu(fields.get("CPU implementer", "?"), fields["CPU part"])
    return fields.get("model name", "")


def board_cpu(cpuinfo: str, machine: str) -> str:
    """The CPU of a board from its /proc/cpuinfo and machine name; says so if it is emulated. Empty if unknown."""
    cpu = cpu_of(cpuinfo)
    emulated = machine.startswith(("aarch64", "arm")) and "cpu family" in cpuinfo
    return f"{machine} emulated on {cpu}" if emulated else cpu


def arm_cpu(implementer: str, part: str) -> str:
    """The name of an ARM core from two fields of its main identification register, such as 0x41 and 0xd08."""
    return f"ARM implementer {implementer} part {part}"


def host() -> dict[str, str | int]:
    """The section "machine" of a table that is measured here, but for the CPU."""
    return {"cores": os.cpu_count() or 1, "system": f"{platform.system()} {platform.machine()}"}
