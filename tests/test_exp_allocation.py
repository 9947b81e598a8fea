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
if sys.argv[1] != "plain":
    allocation.begin()
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
COMMAND = """
import dataclasses, resource
import jax, jax.numpy as jnp
from qwen_lab import allocation, cli
@dataclasses.dataclass(frozen=True)
class Config:
    kept: bool = False
    '''Whether the command keeps its memory.'''
def main(config):
    if config.kept:
        allocation.keep()
    call = jax.jit(lambda x: x + 1)
    def faults(x):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(4):
            call(x).block_until_ready()  # a thread of XLA's asks for it: more than a heap of its own may hold
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    small, large = jnp.ones(2**25), jnp.ones(5 * 2**23)  # 128 and 160 MiB
    faults(large)
    print(faults(small))
cli.run(main, Config)
"""
linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the system gives pages out in another way")


def faults(script: str, *arguments: str, **variables: str) -> int:
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables, check=True)
    return int(done.stdout)


@linux
def test_pages_are_fetched_once():
    if (usual := faults(SCRIPT, "plain")) < 1000:
        pytest.skip("this C library keeps pages by itself, or they are huge")
    assert faults(SCRIPT, "keep") < usual / 100
    assert faults(SCRIPT, "plain", **allocation.ENVIRONMENT) < usual / 100
    assert faults(SCRIPT, "begin") > usual / 2, "what was begun is not kept yet: weights are still mapped"


@linux
def test_threads_of_a_command_keep_their_pages():
    """They are older than the command's model, and must not have taken heaps of their own by then."""
    if (usual := faults(COMMAND)) < 1000:
        pytest.skip("this C library keeps pages by itself, or they are huge")
    assert faults(COMMAND, "--kept") < usual / 20
