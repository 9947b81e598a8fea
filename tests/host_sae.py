"""One of several processes that train a dictionary together: python host_sae.py PORT PROCESS PROCESSES DIRECTORY."""

import sys

import jax

port, process, processes, directory = sys.argv[1:]
jax.distributed.initialize(f"localhost:{port}", int(processes), int(process))

from sae import training  # noqa: E402  # after the processes have met, before anything is computed
from sae.training import checkpoint  # noqa: E402
from test_sae_sharding import CONFIG, mesh_of, start  # noqa: E402

state, x = start("relu")
state, _ = training.run(training.place(state, mesh_of(2, 2)), x[:1], CONFIG)
checkpoint.save(directory, 1, state)
again, _, _ = checkpoint.load(directory, state)
state, _ = training.run(again, x[1:2], CONFIG)
checkpoint.save(directory, 2, state)
