"""A shard as any other program reads it."""

import subprocess
import sys

import ml_dtypes
import numpy as np
import safetensors.numpy

READ = "import ml_dtypes, safetensors.numpy, sys; print(safetensors.numpy.load_file(sys.argv[1])['activations'].sum())"


def test_numpy_reads_bfloat16_once_ml_dtypes_is_imported(tmp_path):
    path = tmp_path / "000000.safetensors"
    safetensors.numpy.save_file({"activations": np.ones((3, 1, 4), ml_dtypes.bfloat16)}, path)
    done = subprocess.run([sys.executable, "-c", READ, str(path)], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "12")
