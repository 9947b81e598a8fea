"""How much memory is free, asked before anything is allocated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from qwen_eqx.errors import InputError


def check_room(what: str, needed: int, free: int | None, lower: str) -> None:
    """Raises `InputError` saying what to lower if more bytes are needed than free (None: not known)."""
    if free is not None and needed > free:
        raise InputError(f"memory: {what} do not fit in the {free / 1e6:,.1f} MB that are free; lower {lower}")


def free_device_bytes(devices: Sequence[Any] | None = None) -> int | None:
    """Free memory of the first device, or of the fullest of several; None where the platform does not say."""
    devices = jax.local_devices()[:1] if devices is None else devices
    if not devices:
        return None
    if devices[0].platform == "cpu":  # they share the host's
        free = _free_host_bytes()
        return None if free is None else free // len(devices)
    stats = [device.memory_stats() or {} for device in devices]
    if any(not {"bytes_limit", "bytes_in_use"} <= each.keys() for each in stats):
        return None
    return min(each["bytes_limit"] - each["bytes_in_use"] for each in stats)


def _free_host_bytes() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
