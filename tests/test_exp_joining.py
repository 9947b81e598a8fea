"""Training in several processes: the results of one, a stop at one step, and an end where one is lost."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import qwen_eqx
import sae
import stores
import train_sae
from ports import free_port, with_devices
from qwen_lab import InputError, RunConfig, flags, hosts, joining
from qwen_lab import jobs as lab_jobs
from qwen_lab.hosts import Hosts
from qwen_lab.lm_runs import LMRun
from qwen_lab.lm_settings import LMConfig
from qwen_lab.runs import Run
from running import ROOT, run, short_tasks
from sae.training import checkpoint
from tolerances import SAME_F32

FIELDS: dict[str, Any] = {
    "source": "store", "held_out": 4, "sweep": ("k=2,4",), "d_sae": 16, "steps": 12, "batch_size": 16,
    "steps_per_call": 2, "checkpoint_every": 4, "buffer_rows": 512,
}  # fmt: skip
ITEMS, ROWS = 24, 16
SECONDS = 240  # until a process is ended that ought to have ended


def write_store(where: Path) -> Path:
    """Of one site, 16 rows an item."""
    manifest = dataclasses.replace(
        stores.MANIFEST, sites=("blocks.0.hook_resid_post",), d_model=4, dtype="float32",
        plan=sae.Plan(ITEMS, ITEMS), config={"limit": ITEMS},
    )  # fmt: skip
    item = np.repeat(np.arange(ITEMS, dtype=np.int32), ROWS)
    rows = np.random.default_rng(0).normal(size=(len(item), 1, 4)).astype(np.float32)
    numbers = np.arange(len(item), dtype=np.int32)
    sae.StoreWriter.create(where, manifest).write_shard(
        0, sae.Rows(rows, numbers, numbers, item, item >= 0), [{"text": "", "outcome": {}}] * ITEMS
    )
    return where


@contextmanager
def two(config: RunConfig, cache: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Two processes of two devices each that train what a config says, over all four; ended in any case."""
    named = {name: getattr(config, name) for name in (*FIELDS, "store", "out")} | {"sweep": config.sweep[0]}
    flags = [word for name, value in named.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    flags += ["--mesh", "data=2,model=2", "--coordinator", f"127.0.0.1:{free_port()}", "--processes", "2"]
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": with_devices(2)}
    own |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    own |= {"PYTHONPATH": f"{ROOT}:{ROOT}/experiments"}
    command = [sys.executable, str(ROOT / "experiments" / "train_sae.py"), *flags, "--process-id"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen([*command, str(number)], env=os.environ | own, **pipes) for number in range(2)]
    try:
        yield both
    finally:
        for process in both:
            process.kill()
            process.communicate()


def ended(both: list[subprocess.Popen[str]]) -> tuple[list[int], list[str], list[str]]:
    """Exit codes, and what was said on either stream."""
    said = [process.communicate(timeout=SECONDS) for process in both]
    return [process.returncode for process in both], [out for out, _ in said], [err for _, err in said]


def wait_for_checkpoint(both: list[subprocess.Popen[str]], where: Path, after: int) -> None:
    end = time.monotonic() + SECONDS
    while checkpoint.steps(where)[-1:] <= [after]:
        if time.monotonic() > end or any(process.poll() is not None for process in both):
            pytest.fail(f"no further step was saved: {ended(both)}")
        time.sleep(0.1)


def test_two_processes_train_what_one_does_stop_at_one_step_and_end_with_one(tmp_path: Path):
    """All of it in one directory: the start of each process is what costs."""
    store, cache = write_store(tmp_path / "store"), tmp_path / "xla"
    alone, config = (RunConfig(**FIELDS, store=store, out=tmp_path / name) for name in ("alone", "together"))
    saved = config.out / "checkpoints"
    with two(config, cache) as both:
        codes, said, errors = ended(both)
    assert codes == [0, 0], errors
    assert "saved: " in said[0]
    assert re.sub(r"\[Gloo\].*\n", "", said[1]).splitlines()[1:] == []
    run(train_sae, alone)
    for member in ("k2", "k4"):
        found, expected = (load_file(each.out / "sae" / member / "sae_weights.safetensors") for each in (config, alone))
        for name in expected:
            np.testing.assert_allclose(found[name], expected[name], **SAME_F32)  # pyright: ignore[reportArgumentType, reportCallIssue]
    assert len((config.out / "metrics.jsonl").read_text().splitlines()) == 6
    slices = {path.name for path in (saved / "00000012").glob("*.safetensors")}
    assert slices == {f"state-0000{number}-of-00002.safetensors" for number in range(2)}

    longer = dataclasses.replace(config, steps=10**6)
    with two(longer, cache) as both:
        wait_for_checkpoint(both, saved, 12)
        both[1].send_signal(signal.SIGTERM)
        codes, said, errors = ended(both)
    assert codes == [75, 75], errors
    assert "going on from step 12 of 1000000" in said[0]
    assert all("stopped: what was finished is saved" in error for error in errors)
    job = lab_jobs.open_job(longer)
    going_on = Run.start(longer, job.members, job.source)  # in one process
    assert going_on.step == checkpoint.steps(saved)[-1] > 12
    assert int(going_on.state.step[0]) == going_on.step

    with two(longer, cache) as both:
        wait_for_checkpoint(both, saved, going_on.step)
        both[1].kill()
        codes, _, errors = ended(both)
    assert codes == [1, -signal.SIGKILL], errors
    assert "error: process 0 of 2 lost another one (" in errors[0]


LM = (
    "--blocks 1 --d-model 16 --heads 2 --kv-heads 2 --d-ff 16 --batch-size 4 --steps-per-call 2 --sides 3 4 "
    "--families mirror --held-out-families frame --context-length 260 --encoder padded(4) --eval-tasks 1 --workers 0 "
    "--warmup 2 --checkpoint-every 4 --eval-every 1000000 --optimizer adamw --steps 1000000"
)
LIVE = (
    "--limit 5 --held-out 1 --prompts 4 --max-new-tokens 2 --d-sae 16 --k 2 --steps 4 --batch-size 16 "
    "--steps-per-call 2 --buffer-rows 8192 --model tiny-random --dtype float32"
)


class Enough(Exception):
    """Ends a run whose first steps were enough."""


def test_models_and_dictionaries_of_a_running_model_train_so_too(tmp_path: Path):
    """All of it in one harness, whose processes are forks: the start of each is what costs."""
    own = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": with_devices(2)}
    own |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    own |= {"PYTHONPATH": f"{ROOT}:{ROOT}/experiments"}
    live = f"{LIVE} --tasks {short_tasks(tmp_path, 5)}"  # of one shape all
    told = f"{LM} --mesh data=2,model=2", f"{live} --mesh data=4"
    command = [sys.executable, str(ROOT / "tests" / "host_train.py"), str(tmp_path), *told]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | own, timeout=10 * SECONDS)
    said = {path.name: path.read_text() for path in tmp_path.glob("*.[01]")}
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    steps = [ends.pop(f"after {name}")[-1] for name in ("SIGTERM", "SIGINT", "SIGKILL")]
    assert ends == {
        "live": [0, 0], "SIGTERM": [75, 75], "SIGINT": [130, 75], "SIGKILL": [1, -signal.SIGKILL],
    }, said  # fmt: skip
    assert 0 < steps[0] < steps[1] < steps[2]  # what was saved was gone on with
    assert "interrupted: what was finished is saved" in said["lm.0"]
    assert said["lm.1"].count("stopped: what was finished is saved") == 2
    assert "error: process 0 of 2 lost another one (" in said["lm.0"]
    model, _ = qwen_eqx.from_pretrained(tmp_path / "lm" / "model")
    assert model.config.layers == 1

    config = flags.parse(LMConfig, None, [*LM.split(), "--out", str(tmp_path / "lm-alone")])
    alone = LMRun(config)
    alone.open()

    def advance(taken: int, note: str = "") -> None:
        if alone.step >= 4:
            raise Enough

    with pytest.raises(Enough):
        alone.proceed(advance)
    found = [json.loads(line) for line in (tmp_path / "lm" / "metrics.jsonl").read_text().splitlines()]
    for name in ("loss", "gradient_norm"):
        # of two calls before the first stop: from then on they hold other steps
        first = [[line[name] for line in lines[:2]] for lines in (found, alone.history)]
        np.testing.assert_allclose(*first, **SAME_F32)
    going_on = LMRun(dataclasses.replace(config, out=tmp_path / "lm"))  # one process, with what two saved
    going_on.open()
    assert going_on.step == int(going_on.state.step) == steps[2]
    run(train_sae, flags.parse(RunConfig, None, [*live.split(), "--out", str(tmp_path / "live-alone")]))
    found, expected = (
        load_file(tmp_path / name / "sae" / "sae_weights.safetensors") for name in ("live", "live-alone")
    )
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], **SAME_F32)  # pyright: ignore[reportArgumentType, reportCallIssue]


def test_who_has_used_a_device_cannot_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hosts, "WAIT", 20.0)
    port = free_port()

    def join(number: int) -> str:
        with pytest.raises(InputError) as caught, joining.together(Hosts(f"localhost:{port}", 2, number), {}, tmp_path):
            pytest.fail("joined")
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(join, range(2)))
    for number, end in enumerate(ends):
        assert f"--processes: found process {number} of 2 that cannot join (" in end
        assert end.endswith("expected one that has used no device yet")
    assert not joining.joined()
