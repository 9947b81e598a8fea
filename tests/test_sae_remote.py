"""Stores, checkpoints and dictionaries at URLs: the same bytes as on a disk, through every failure that passes."""

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from http import HTTPStatus
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sae
from flaky import Busy, Flaky, seeded
from ports import free_port
from sae import storage
from sae.errors import StorageFailed
from sae.training import checkpoint
from stores import DIGESTED, MANIFEST, contents, same, shard_rows, write

STATE = {"a": jnp.arange(3.0), "b": jnp.ones(2, jnp.bfloat16), "key": jax.random.key(3), "n": jnp.int32(7)}


@pytest.fixture(autouse=True)
def no_faults(monkeypatch):
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.0)
    monkeypatch.setattr(Flaky, "fault", staticmethod(lambda moment: None))


@pytest.fixture
def memory(tmp_path):
    import fsspec

    yield f"memory://{tmp_path.name}"
    fsspec.filesystem("memory").store.clear()


def everything(home: str, tmp_path: Path) -> None:
    """A store, checkpoints and a dictionary, written, resumed, extended, damaged, read: as on a disk."""
    url, path = f"{home}/store", tmp_path / "local"
    write(url, DIGESTED, shards=[2])
    assert sae.ActivationStore.open(url).missing == sae.StoreWriter.create(url, DIGESTED).missing == (0, 1)
    with pytest.raises(sae.InputError, match=f"{url}: found 1 of 3 shards, missing 0, 1, expected all"):
        sae.ActivationStore.open(url).expect_complete()
    write(url, DIGESTED)
    write(path, DIGESTED)
    store, ours = sae.ActivationStore.open(url), sae.ActivationStore.open(path)
    store.verify()
    store.expect_complete()
    same(store[:], ours[:])
    same(store.select("b")[np.array([3, 0])], ours.select("b")[np.array([3, 0])])
    assert store.items == ours.items
    there = storage.place(url)
    for name, data in contents(path).items():
        assert (there / name).read() == data
    with pytest.raises(sae.InputError, match="seed is 0 there and 7"):
        sae.StoreWriter.create(url, dataclasses.replace(DIGESTED, seed=7))
    with pytest.raises(sae.InputError, match="and no manifest"):
        sae.StoreWriter.create(home, DIGESTED)
    (there / "shards/000001.safetensors").put(b"\0" * store.shards[1].bytes)
    with pytest.raises(sae.InputError, match=f"{url}/shards/000001.safetensors"):
        sae.ActivationStore.open(url).verify()
    assert list(sae.StoreWriter.take_back_damaged(url)) == [1]
    write(url, DIGESTED)
    assert sae.statistics(sae.ActivationStore.open(url)).rows == len(store)
    wider = dataclasses.replace(DIGESTED, plan=sae.Plan(7, 2))
    assert sae.StoreWriter.extend(url, wider, items_digest=DIGESTED.items_digest).missing == (2, 3)
    for step in (1, 2, 3):
        checkpoint.save(f"{home}/checkpoints", step, STATE, {"row": step}, keep=2)
    assert checkpoint.steps(f"{home}/checkpoints") == [2, 3]
    state, cursor, step = checkpoint.load(
        f"{home}/checkpoints", jax.tree.map(jnp.zeros_like, STATE | {"key": 0}) | STATE
    )
    assert (cursor, step) == ({"row": 3}, 3)
    np.testing.assert_array_equal(state["b"], STATE["b"])
    module = sae.ReLU.init(d_model=4, d_sae=8, key=jax.random.key(0))
    sae.save(module, f"{home}/sae", {"hook_name": "x"}, density=np.ones(8, np.float32))
    loaded = sae.load_with_metadata(f"{home}/sae")
    np.testing.assert_array_equal(loaded.module.encoder, module.encoder)
    assert loaded.metadata["hook_name"] == "x"
    assert loaded.density is not None
    sae.save(module, f"{home}/sae")
    assert sae.load_with_metadata(f"{home}/sae").density is None


def test_memory(memory, tmp_path):
    everything(memory, tmp_path)


@pytest.mark.parametrize("seed", range(3))
def test_a_network_that_fails_now_and_then(tmp_path, seed, monkeypatch):
    monkeypatch.setattr(Flaky, "fault", staticmethod(seeded(seed, 0.15)))
    everything(f"flaky://{tmp_path}/there", tmp_path)


def test_a_lost_reply_to_the_commit_is_our_own_write(tmp_path, monkeypatch):
    lost = iter([True])

    def fault(moment: str) -> None:
        if moment == "after pipe create" and next(lost, False):
            raise TimeoutError

    write(f"flaky://{tmp_path}/there", shards=[])
    monkeypatch.setattr(Flaky, "fault", staticmethod(fault))
    write(f"flaky://{tmp_path}/there", shards=[0])
    assert next(lost, None) is None
    assert sae.ActivationStore.open(f"flaky://{tmp_path}/there").missing == (1, 2)


def test_another_writers_sidecar_is_never_written_over(tmp_path):
    mark = storage.place(f"flaky://{tmp_path}/there") / "mark.json"
    mark.create(b"one")
    mark.create(b"one")
    with pytest.raises(sae.InputError, match=r"mark.json: found other bytes, expected none or the same"):
        mark.create(b"two")
    assert mark.read() == b"one"


@pytest.mark.parametrize("error", [Busy(503), Busy(429), TimeoutError("slow"), ConnectionResetError(104, "reset")])
def test_what_does_not_pass_is_said_in_one_line(tmp_path, monkeypatch, error):
    pauses = []
    monkeypatch.setattr(storage, "FIRST_PAUSE", 0.25)
    monkeypatch.setattr(storage.time, "sleep", pauses.append)

    def fault(moment: str) -> None:
        raise error

    monkeypatch.setattr(Flaky, "fault", staticmethod(fault))
    with pytest.raises(StorageFailed, match=r"there/x: found 8 failures \(.*\), expected it written") as raised:
        (storage.place(f"flaky://{tmp_path}/there") / "x").put(b"")
    assert "\n" not in str(raised.value)
    assert len(pauses) == 7
    assert 10 < sum(pauses) < 40
    assert max(pauses[:2]) < min(pauses[-2:])


@pytest.mark.parametrize("error", [Busy(403), Busy(400), PermissionError(13, "no"), ValueError("odd")])
def test_what_is_wrong_for_good_is_not_tried_again(tmp_path, monkeypatch, error):
    def fault(moment: str) -> None:
        raise error

    monkeypatch.setattr(storage.time, "sleep", pytest.fail)
    monkeypatch.setattr(Flaky, "fault", staticmethod(fault))
    with pytest.raises(type(error)):
        (storage.place(f"flaky://{tmp_path}/there") / "x").put(b"")


def test_a_url_without_fsspec_or_of_no_known_kind_is_one_clear_line(monkeypatch):
    with pytest.raises(sae.InputError, match=r"nowhere://x: .*expected s3://, gs://"):
        sae.ActivationStore.open("nowhere://x")
    monkeypatch.setitem(sys.modules, "fsspec", None)
    with pytest.raises(sae.InputError, match=r"s3://b/x: found no fsspec, .* pip install 'qwen-eqx\[remote\]'"):
        sae.load("s3://b/x")


def test_urls_cost_nothing_until_they_are_used():
    code = "import sys, sae; sae.storage.place('runs'); assert 's3fs' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parent.parent
    )
    assert done.returncode == 0, done.stderr


def test_copies_of_remote_shards_leave_the_disk_with_their_arrays(memory, monkeypatch, tmp_path):
    monkeypatch.setattr("sae.data.shards.COPIED_BYTES", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    write(f"{memory}/store")
    store = sae.ActivationStore.open(f"{memory}/store")
    for _ in range(2):
        same(store[:], sae.Rows.concatenate([shard_rows(MANIFEST, shard) for shard in range(3)]))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore")
def test_s3(bucket, tmp_path):
    everything(bucket, tmp_path)


@pytest.fixture
def google(monkeypatch) -> Iterator[str]:
    """The URL of an empty prefix in a Google bucket of this process' own, where what is created once is kept, as there."""
    pytest.importorskip("gcsfs").GCSFileSystem.clear_instance_cache()
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    objects = pytest.importorskip("gcp_storage_emulator.handlers.objects")
    upload = objects._multipart_upload

    def multipart_upload(request, response, kept):
        where = request.params["bucket_name"], request.data["meta"]["name"]
        if request.query.get("ifGenerationMatch") == ["0"]:  # cloud.google.com/storage/docs/request-preconditions
            with contextlib.suppress(objects.NotFound):
                kept.get_file_obj(*where)
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
        upload(request, response, kept)

    monkeypatch.setattr(objects, "_multipart_upload", multipart_upload)
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # no question to Google about the bucket
    port = free_port()
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    yield "gs://bucket/prefix"
    server.stop()


@pytest.mark.filterwarnings("ignore")
def test_gs(google, tmp_path):
    everything(google, tmp_path)
    mark = storage.place(google) / "mark.json"
    mark.create(b"one")
    mark.create(b"one")
    with pytest.raises(sae.InputError, match=r"mark.json: found other bytes, expected none or the same"):
        mark.create(b"two")
    assert mark.read() == b"one"
