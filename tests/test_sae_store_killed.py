"""Writers that die anywhere: the bytes in the end are an uninterrupted run's, on a disk and at a URL that fails too."""

import json
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import sae
from flaky import Flaky
from sae import storage
from sae.data.writer import find_damaged
from stores import MANIFEST, same, shard_rows, write

HERE = Path(__file__).parent


@pytest.mark.parametrize("how", ["boundary", "signal"])
@pytest.mark.parametrize("where", ["", "flaky://"])
def test_killed_processes_leave_what_an_uninterrupted_run_would(tmp_path, where, how):
    command = [sys.executable, str(HERE / "kill_writer.py"), f"{where}{tmp_path}/killed", how, "1"]
    environment = {"PATH": "", "PYTHONPATH": f"{HERE.parent}:{HERE}", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) > (24 if how == "boundary" else 0)


class Killed(BaseException):
    """Stands for SIGKILL: no handler may catch it."""


class Store(RuleBasedStateMachine):
    """Writing, dying, resuming, reading, damage and its repair, in any order, at a URL; the model is a set of shards."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.url = f"flaky://{self.folder.name}/store"
        self.committed: set[int] = set()
        self.damaged: set[int] = set()

    def teardown(self) -> None:
        Flaky.fault = staticmethod(lambda moment: None)
        self.folder.cleanup()

    @initialize()
    def begin(self) -> None:
        self.writer = sae.StoreWriter.create(self.url, MANIFEST)

    @rule(shard=st.integers(0, 2))
    def write(self, shard: int) -> None:
        if shard in self.committed:
            with pytest.raises(sae.InputError, match="written once"):
                write(self.url, shards=[shard])
        elif not self.damaged:
            write(self.url, shards=[shard])
            self.committed.add(shard)

    @precondition(lambda self: not self.damaged)
    @rule(moments=st.integers(0, 40))
    def die(self, moments: int) -> None:
        left = iter(range(moments))

        def fault(moment: str) -> None:
            if next(left, None) is None:
                raise Killed

        Flaky.fault = staticmethod(fault)
        with suppress(Killed):
            write(self.url)
        Flaky.fault = staticmethod(lambda moment: None)
        left_behind = set(sae.ActivationStore.open(self.url).missing)
        assert left_behind <= {0, 1, 2} - self.committed  # nothing that was committed is lost
        self.committed = {0, 1, 2} - left_behind

    @precondition(lambda self: self.committed - self.damaged)
    @rule(data=st.data())
    def damage(self, data: st.DataObject) -> None:
        shard = data.draw(st.sampled_from(sorted(self.committed - self.damaged)))
        tensors = storage.place(self.url) / f"shards/{shard:06d}.safetensors"
        spoiled = bytearray(tensors.read())
        spoiled[-1] ^= 1
        tensors.put(bytes(spoiled))
        self.damaged.add(shard)

    @rule()
    def take_back(self) -> None:
        assert sae.StoreWriter.take_back_damaged(self.url).keys() == self.damaged
        self.committed -= self.damaged
        self.damaged = set()

    @rule()
    def read(self) -> None:
        store = sae.ActivationStore.open(self.url)
        for place, shard in enumerate(sorted(self.committed)):
            rows = store.shards[place].rows
            begin = sum(each.rows for each in store.shards[:place])
            if shard not in self.damaged:
                same(store[begin : begin + rows], shard_rows(MANIFEST, shard))

    @invariant()
    def what_is_missing_is_known(self) -> None:
        assert set(sae.ActivationStore.open(self.url).missing) == {0, 1, 2} - self.committed
        assert set(self.writer.missing) == {0, 1, 2} - self.committed

    @invariant()
    def what_is_damaged_is_known(self) -> None:
        assert find_damaged(self.url).keys() == self.damaged


TestStore = Store.TestCase
TestStore.settings = settings(max_examples=10, stateful_step_count=12, deadline=None)
