"""What a command does to the process's memory: pages are fetched once, not at every call."""

import os
import subprocess
import sys

import pytest

from qwen_lab import allocation

SCRIPT = """
import resource, sys
import numpy as np
from qwen_lab import allocation
if sys.argv[1] == "keep":
    allocation.keep()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(8):
        np.ones(2**25, np.uint8)  # 32 MiB: 8,192 pages
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def faults(*arguments: str, **variables: str) -> int:
    command = [sys.executable, "-c", SCRIPT, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system gives pages out in another way")
def test_pages_are_fetched_once():
    if (usual := faults("plain")) < 1000:
        pytest.skip("this C library keeps pages by itself, or they are huge")
    assert faults("keep") < usual / 100
    assert faults("plain", **allocation.ENVIRONMENT) < usual / 100
