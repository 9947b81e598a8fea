"""Every test runs with live shape checks, strict promotion, several CPU devices and no network."""

import os
import subprocess
import sys
import time
import urllib.request

os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
        # eight devices on two busy cores may meet late: XLA ends the process after 40 s
        "--xla_cpu_collective_call_terminate_timeout_seconds=600",
        "--xla_cpu_collective_timeout_seconds=600",
    ]
)
# threads that devices share: collectives that wait for one another may hold as many as devices times collectives
os.environ["NPROC"] = "32"
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["QWEN_LAB_MODEL"] = "tiny-random"  # no test depends on the weights of the model that commands default to
os.environ["HF_HUB_OFFLINE"] = "1"  # the suite must never reach for a model hub

from collections.abc import Iterator
from pathlib import Path

import hypothesis
import jax
import pytest

from browsing import browse as browse  # a fixture
from ports import free_port
from running import trained as trained  # a fixture

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

hypothesis.settings.register_profile(
    "default",
    deadline=None,  # the first example of a shape pays for a compilation
    max_examples=20,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("default")


@pytest.fixture(scope="module", autouse=True)
def few_programs() -> Iterator[None]:
    """Forgets compiled programs when they are many: each holds memory maps, of which a process may have 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The URL of an empty prefix in a real S3 of this machine's own."""
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()  # those of another server
    pytest.importorskip("moto.server")
    for name, value in {"ACCESS_KEY_ID": "x", "SECRET_ACCESS_KEY": "x", "DEFAULT_REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    try:
        for _ in range(600):
            try:
                urllib.request.urlopen(urllib.request.Request(f"{address}/bucket", method="PUT"), timeout=5).close()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.1)
        yield "s3://bucket/prefix"
    finally:
        server.kill()
        server.wait()
