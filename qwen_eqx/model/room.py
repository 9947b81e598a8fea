"""How much memory is free, asked before anything is allocated."""

from pathlib import Path

import jax

from qwen_eqx.errors import InputError


def check_room(what: str, needed: int, free: int | None, lower: str) -> None:
    """Raises `InputError` saying what to lower if more bytes are needed than free (None: not known)."""
    if free is not None and needed > free:
        raise InputError(f"memory: {what} do not fit in the {free / 1e6:,.1f} MB that are free; lower {lower}")


def free_device_bytes() -> int | None:
    """Free memory of the first device; None where the platform does not say."""
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        return _free_host_bytes()
    stats = device.memory_stats() or {}
    return stats["bytes_limit"] - stats["bytes_in_use"] if {"bytes_limit", "bytes_in_use"} <= stats.keys() else None


def _free_host_bytes() -> int | None:
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():  # not Linux
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None
