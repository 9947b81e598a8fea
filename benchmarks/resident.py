"""The most memory that this process has held, for a script and the peers that it asks; needs nothing."""

from pathlib import Path


def reset_peak() -> None:
    """Lets the kernel forget the most memory that was resident; elsewhere than on Linux nothing."""
    forget = Path("/proc/self/clear_refs")
    if forget.exists():
        forget.write_text("5")  # man proc_pid_clear_refs


def peak_bytes() -> int:
    """The most memory that was resident since then; 0 where no one says."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
