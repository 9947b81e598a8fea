"""What a process that a test starts has of its own: a port that nobody listens at, a number of devices."""

import os
import socket


def free_port() -> int:
    """One that was free a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def with_devices(count: int) -> str:
    """XLA_FLAGS as the suite has them, but for the number of devices."""
    return os.environ["XLA_FLAGS"].replace("device_count=8", f"device_count={count}")
