"""Several processes as one program: they join before JAX looks for devices, stop at one step, and leave together."""

import functools
import hashlib
import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from qwen_eqx import sharding
from qwen_eqx.weights import hub
from qwen_lab import files, provenance, stopping
from qwen_lab.errors import InputError, RunError
from qwen_lab.hosts import WAIT, Hosts

OWN = ("store", "out", "process_id", "coordinator")  # flags that processes may be told differently

HEARTBEAT = 60  # seconds without a word until JAX ends all others of one that is gone
LAST_WORDS = 3.0  # seconds that process 0, whose end ends all, leaves the others to say why they end
LOST = ("gloo", "nccl", "connection", "heartbeat", "coordination", "unavailable", "socket", "peer")  # of JAX's errors


@contextmanager
def together(hosts: Hosts, said: Mapping[str, Any], home: Path | str) -> Iterator[None]:
    """Inside the with block JAX's devices are those of all processes, which said the same; raises before otherwise."""
    hosts.agree({**said, "git_revision": provenance.git_revision()}, home)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            hosts.coordinator, hosts.processes, hosts.number,
            cluster_detection_method="deactivate", initialization_timeout=int(WAIT), heartbeat_timeout_seconds=HEARTBEAT,
        )  # fmt: skip
    except RuntimeError as error:
        found = f"process {hosts.number} of {hosts.processes} that cannot join ({str(error).splitlines()[0]:.200})"
        raise InputError(f"--processes: found {found}, expected one that has used no device yet") from None
    try:
        yield
    except (stopping.Stopped, KeyboardInterrupt):
        jax.distributed.shutdown()  # waits for all: the end of process 0 would end those that still write
        raise
    except Exception as error:
        if hosts.number == 0:
            time.sleep(LAST_WORDS)
        if isinstance(error, jax.errors.JaxRuntimeError) and any(word in str(error).lower() for word in LOST):
            line = str(error).splitlines()[0]
            gone = f"process {hosts.number} of {hosts.processes} lost another one ({line:.200})"
            raise RunError(f"{gone}; what is saved stays: run all again to go on") from error
        raise
    jax.distributed.shutdown()


def joined() -> bool:
    """Whether this process is one of several that compute as one."""
    return jax.distributed.is_initialized()


def first() -> bool:
    """Whether this process writes what one of them has to."""
    return not joined() or jax.process_index() == 0


def flags_of(config: Any) -> dict[str, Any]:
    """What processes have to be told alike."""
    return {f"config.{name}": value for name, value in files.jsonable(config).items() if name not in OWN}


def files_of(model: str, revision: str | None = None) -> dict[str, int]:
    """Names and sizes of a model's files, by which processes see that they read the same."""
    return {path.name: path.stat().st_size for path in sorted(hub.locate(model, revision).iterdir()) if path.is_file()}


def expect_same(what: str, digest: str) -> None:
    """Of processes that have joined: raises in all of them unless they found the same."""
    if joined():
        said = hashlib.sha256(digest.encode()).digest()
        everybody = np.asarray(multihost_utils.process_allgather(np.frombuffer(said, np.uint8)))
        other = np.flatnonzero((everybody != everybody[0]).any(axis=1))
        if other.size:
            found = f"other {what} in process {other[0]} than in process 0"
            raise InputError(f"--processes: found {found}, expected the same in all")


def on_host(tree: Any) -> Any:
    """Its arrays, one after another, on the host of the first process, which alone gets them; all call this."""
    if not joined():
        return tree

    def fetched(leaf: Any) -> Any:
        whole = sharding.here(leaf)
        return np.asarray(whole) if first() else None

    return jax.tree.map(fetched, tree)


def stops(call: int) -> bool:
    """Whether to stop at this call, the same one in all processes, each of which counts its calls."""
    return all_stop(call) if joined() else stopping.asked()


def all_stop(call: int) -> bool:
    """Whether all stop at this call, which each of them counts from 0: after SIGTERM or Ctrl-C in any of them."""
    if not joined():
        return False
    if stopping.asked():  # JAX looks for SIGTERM alone, and took it over
        _tell_all()
    return multihost_utils.reached_preemption_sync_point(call)


@functools.cache
def _tell_all() -> None:
    """Once: a second signal would end this process."""
    os.kill(os.getpid(), signal.SIGTERM)
