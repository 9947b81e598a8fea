"""extract.py --mode forward, and what both modes promise: bytes that are the item's own, identity, shares, repairs."""

import dataclasses
import json
import shutil
from pathlib import Path
from unittest import mock

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import arc
import extract
import qwen_eqx
import running
import sae
import tolerances
from edge import at_edge
from qwen_lab import InputError, RunError, completions, extraction, files, jobs, locks, settings, sources
from qwen_lab.choosing import Choice
from qwen_lab.extraction import Extraction
from qwen_lab.meter import Meter
from qwen_lab.reading import Reader
from qwen_lab.writing import Shards
from sae import storage

TEXTS = ["one two three", "a longer text of several words, all of them plain", "x", "four five six seven", "eight nine"]
FORWARD = extract.Config(mode="forward", layers="1,3", dtype="float32", items_per_shard=2, batch_tokens=64)


def texts(where: Path, lines: list[str]) -> tuple[str]:
    path = where / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return (str(path),)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((directory / "shards").iterdir())}


def run(config: extract.Config) -> sae.ActivationStore:
    running.run(extract, config)
    return sae.ActivationStore.open(config.out)


def by_item(store: sae.ActivationStore, item: int) -> sae.Rows:
    return store[np.flatnonzero(store.column("item") == item)]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> extract.Config:
    """A store of short texts."""
    where = tmp_path_factory.mktemp("forward")
    config = dataclasses.replace(FORWARD, data=texts(where, TEXTS), out=where / "store")
    run(config)
    return config


def test_rows_are_what_a_plain_pass_computes(plain: extract.Config):
    store = sae.ActivationStore.open(plain.out)
    assert store.complete
    model, tokenizer = qwen_eqx.from_pretrained("tiny-random", dtype=jnp.float32)
    assert len(store.items) == len(TEXTS)
    for number, text in enumerate(TEXTS):
        rows, ids = by_item(store, number), tokenizer.encode(text)
        assert store.items[number]["text"] == text
        np.testing.assert_array_equal(rows.token_ids, ids)
        np.testing.assert_array_equal(rows.positions, np.arange(len(ids)))
        assert not np.asarray(rows.generated).any()
        _, acts = running.forward(model, ids, list(store.sites), room=64)
        np.testing.assert_allclose(np.asarray(rows.activations).transpose(1, 0, 2), acts, **tolerances.LOGITS_F32)
    assert store.manifest.columns == ()


def test_an_items_bytes_do_not_depend_on_the_others(plain: extract.Config, tmp_path: Path):
    """Read alone, and in another order."""
    store = sae.ActivationStore.open(plain.out)
    order = [3, 1, 4, 0, 2]
    shuffled = run(
        dataclasses.replace(plain, data=texts(tmp_path, [TEXTS[number] for number in order]), out=tmp_path / "other")
    )
    alone = run(dataclasses.replace(plain, data=texts(tmp_path, [TEXTS[1]]), out=tmp_path / "alone"))
    for place, number in enumerate(order):
        ours, theirs = by_item(store, number), by_item(shuffled, place)
        assert np.asarray(ours.activations).tobytes() == np.asarray(theirs.activations).tobytes()
    assert np.asarray(by_item(store, 1).activations).tobytes() == np.asarray(alone[:].activations).tobytes()


def test_it_says_where_the_time_goes(plain: extract.Config):
    line = json.loads((plain.out / "metrics.jsonl").read_text().splitlines()[-1])
    store = sae.ActivationStore.open(plain.out)
    assert (line["items"], line["rows"], line["tokens"]) == (len(TEXTS), len(store), len(store))
    assert line["shards"] == 3
    assert line["bytes"] == store[:].activations.nbytes
    shares = [line[f"share_{name}"] for name in ("computing", "waiting_for_data", "waiting_for_writing")]
    assert 0 < sum(shares) <= 1


def test_shares_of_a_plan_make_the_same_store(plain: extract.Config, tmp_path: Path):
    out = tmp_path / "shared"
    for number in (2, 1):
        said = running.run(extract, dataclasses.replace(plain, workers_of=f"{number}/2", out=out))
        assert f"{1 if number == 2 else 3} of 3 shards" in said
        assert (out / f"metrics-{number}-of-2.jsonl").exists()
    assert contents(out) == contents(plain.out)


@pytest.mark.parametrize("damage", ["a bit", "the end", "the mark", "the tensors"])
def test_a_damaged_shard_is_made_again(plain: extract.Config, damage: str, tmp_path: Path):
    out = tmp_path / "damaged"
    shutil.copytree(plain.out, out)
    path = out / "shards" / "000001.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    match damage:
        case "a bit":
            path.write_bytes(data)
        case "the end":
            path.write_bytes(data[:-1])
        case "the mark":
            path.with_suffix(".json").write_text("{")
        case "the tensors":
            path.unlink()
    said = running.run(extract, dataclasses.replace(plain, verify=True, out=out))
    assert "shard 1 is made again: " in said
    assert "digests verified" in said
    assert contents(out) == contents(plain.out)


def test_other_data_in_the_same_place_are_refused(plain: extract.Config, tmp_path: Path):
    out = tmp_path / "out"
    shutil.copytree(plain.out, out)
    source = Path(plain.data[0])
    before = source.read_text()
    try:
        for line, part in [(1, "record 1, from_token 0 with other tokens as item 1"), (4, "items_digest is")]:
            changed = [*TEXTS]
            changed[line] = "another text"
            if line == 4:  # of a shard that is not there yet
                (out / "shards" / "000002.json").unlink()
            texts(source.parent, changed)
            with pytest.raises((InputError, sae.InputError), match=part) as caught:
                extract.main(dataclasses.replace(plain, out=out))
            assert "\n" not in str(caught.value)
    finally:
        source.write_text(before)


def changed(change):
    """`from_pretrained` of a model in which something is different."""
    load = qwen_eqx.from_pretrained

    def loaded(*arguments, **named):
        model, tokenizer = load(*arguments, **named)
        return change(model), tokenizer

    return mock.patch.object(qwen_eqx, "from_pretrained", loaded)


def test_other_weights_are_refused(plain: extract.Config):
    def nudged(model):
        return eqx.tree_at(lambda m: m.norm.weight, model, model.norm.weight * 1.01)

    with changed(nudged), pytest.raises(sae.InputError, match="weights_digest is 'sha256") as caught:
        extract.main(plain)
    assert "\n" not in str(caught.value)


def test_activations_that_are_no_numbers_stop_the_run(plain: extract.Config, tmp_path: Path):
    _, tokenizer = qwen_eqx.from_pretrained("tiny-random")
    bad = next(iter(set(tokenizer.encode(TEXTS[3])) - set(tokenizer.encode("".join(TEXTS[:3])))))

    def poisoned(model):
        return eqx.tree_at(lambda m: m.embed.table, model, model.embed.table.at[bad].set(jnp.nan))

    config = dataclasses.replace(plain, items_per_shard=1, out=tmp_path / "out")
    with (
        changed(poisoned),
        pytest.raises(
            RunError, match=r"item 3 \(record 3, from_token 0\): found NaN or infinity at blocks.1.hook_resid_post, pos"
        ),
    ):
        extract.main(config)
    kept = sae.ActivationStore.open(config.out)
    assert 0 in kept.items
    assert 3 not in kept.items
    theirs = by_item(sae.ActivationStore.open(plain.out), 0)
    assert np.array_equal(by_item(kept, 0).activations, theirs.activations)


def test_too_little_disk_is_said_before_anything_is_computed(plain: extract.Config, tmp_path: Path):
    flags = ["--mode", "forward", "--data", *plain.data, "--out", str(tmp_path / "out")]
    with mock.patch("shutil.disk_usage", return_value=mock.Mock(free=1000)), mock.patch.object(Extraction, "forward"):
        code, said = at_edge("extract", *flags)
    assert code == 1
    assert said.startswith(f"error: {tmp_path / 'out'}: found 1,000 bytes free, expected room for ")
    assert said.count("\n") == 1


def test_rows_of_a_sample_are_among_all(plain: extract.Config, tmp_path: Path):
    store = sae.ActivationStore.open(plain.out)
    config = dataclasses.replace(
        plain, sample_rows=0.4, exclude_tokens=(str(int(store[0].token_ids)),), out=tmp_path / "some"
    )
    some = run(config)
    assert 0 < len(some) < len(store) / 2
    assert int(store[0].token_ids) not in some.column("token_ids")
    for row in range(len(some)):
        mine = some[row]
        theirs = by_item(store, int(mine.item))
        assert np.array_equal(np.asarray(theirs.activations)[int(mine.positions)], mine.activations)


def test_arc_tasks_with_answers_know_their_cells(tmp_path: Path):
    tasks = running.short_tasks(tmp_path)
    shared = {"tasks": str(tasks), "encoder": "minimal", "prompt": "compact", "limit": 2, "items_per_shard": 1}
    whole = run(dataclasses.replace(FORWARD, **shared, out=tmp_path / "whole"))
    known = {task.id: task for task in arc.load_tasks(tasks)}
    rows = whole[:]
    assert {item["outcome"] for item in whole.items.values()} == {"correct"}
    for at in np.flatnonzero(rows.part):
        task = known[whole.items[int(rows.item[at])]["task"]]
        pair = [*task.train, *task.test][rows.pair[at]]
        grid = pair.input if rows.part[at] == 1 else pair.output
        assert grid is not None
        assert grid[rows.row[at], rows.col[at]] == rows.colour[at]
    for item, said in whole.items.items():
        mine = np.asarray(rows.item) == item
        assert np.asarray(rows.generated)[mine].sum() == said["tokens"] + 1
    inputs = run(dataclasses.replace(FORWARD, **shared, positions="test-input", out=tmp_path / "inputs"))
    pairs = [len(known[inputs.items[int(item)]["task"]].train) for item in inputs.column("item")]
    assert len(inputs)
    assert (inputs.column("part") == 1).all()
    assert (inputs.column("pair") >= np.asarray(pairs)).all()
    assert len(inputs) == sum((whole.column("part") == 1) & (whole.column("pair") >= _pairs(whole, known)))


def _pairs(store: sae.ActivationStore, known: dict[str, arc.Task]) -> np.ndarray:
    return np.asarray([len(known[store.items[int(item)]["task"]].train) for item in store.column("item")])


def test_items_that_never_fit_are_recorded(tmp_path: Path):
    tasks = running.short_tasks(tmp_path)
    shared = {"tasks": str(tasks), "encoder": "minimal", "prompt": "compact", "limit": 3, "items_per_shard": 1}
    index = extract.plan(dataclasses.replace(FORWARD, **shared, out=tmp_path / "none")).index
    longest = index.longest
    config = dataclasses.replace(FORWARD, **shared, answers="none", context_length=longest // 3, out=tmp_path / "out")
    store = run(config)
    assert store.complete
    skipped = [item for item in store.items.values() if item["outcome"] == "too long"]
    assert 0 < len(skipped) < len(store.items)
    assert all("with one pair, expected" in item["detail"] for item in skipped)
    assert not set(store.column("item")) & {item["item"] for item in skipped}


def test_whatever_was_drafted_the_pass_that_stores_decides():
    """Tokens that another batch rounded otherwise are those of the model alone, and so is all that is stored."""
    model, tokenizer = qwen_eqx.from_pretrained("tiny-random", dtype=jnp.float32)
    prompt, most = tokenizer.encode("I\n12\n34\n\nO\n"), 6
    out = completions.generate(model, tokenizer, [prompt], most)
    own = completions.tokens_of(out, 0).tolist()
    reader = Reader(model, qwen_eqx.Capture(layers=[1]).resolve(model.config), 1)
    job = Extraction(reader, tokenizer, Choice(), mock.Mock(spec=Shards), Meter(1), lambda *_: None)
    tokens, whole = job._settled(prompt, list(own), most)
    assert tokens == own
    for at in range(len(own)):
        wrong = [*own[:at], (own[at] + 1) % 300, *[5] * (most - at - 1)]
        again, values = job._settled(prompt, wrong, most)
        assert again == own
        length = len(prompt) + len(own) - 1
        assert values.values[0][0, :length].tobytes() == whole.values[0][0, :length].tobytes()
    np.testing.assert_allclose(whole.log_probs[0, : len(own)], out.log_probs[0, : len(own)], **tolerances.LOGITS_F32)


def test_slots_change_no_byte(tmp_path: Path):
    tasks = running.short_tasks(tmp_path)
    shared = {"tasks": str(tasks), "encoder": "minimal", "prompt": "compact", "limit": 3, "max_new_tokens": 5}
    config = extract.Config(**shared, layers="1,3", items_per_shard=1, batch_size=3, out=tmp_path / "three")
    run(config)
    run(dataclasses.replace(config, batch_size=1, out=tmp_path / "one"))
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    for path in list((tmp_path / "one" / "shards").glob("000001*")):
        path.unlink()
    run(dataclasses.replace(config, batch_size=2, out=tmp_path / "one"))
    assert contents(tmp_path / "one") == contents(tmp_path / "three")


def test_two_different_shares_may_run_at_once_and_equal_ones_not(plain: extract.Config, tmp_path: Path):
    out = tmp_path / "out"
    with locks.claimed(out, locks.Share(1, 2)):
        run(dataclasses.replace(plain, workers_of="2/2", out=out))
        with pytest.raises(InputError, match="with --workers-of 1/2 pid"):
            extract.main(dataclasses.replace(plain, workers_of="1/2", out=out))


def test_shards_in_flight_are_few(plain: extract.Config, tmp_path: Path, monkeypatch):
    """A width that no other item has does not keep its shard waiting for ever."""
    lines = ["a long one of its own width, wider than all the others are"] + ["x"] * 30
    config = dataclasses.replace(plain, data=texts(tmp_path, lines), items_per_shard=1, out=tmp_path / "out")
    order, write = [], sae.StoreWriter.write_shard

    def noted(self: sae.StoreWriter, shard: int, *rest) -> None:
        order.append(shard)
        write(self, shard, *rest)

    monkeypatch.setattr(
        sae.StoreWriter, "write_shard", lambda self, shard, *rest: (order.append(shard), write(self, shard, *rest))
    )
    run(config)
    assert sorted(order) == list(range(31))
    assert order.index(0) <= 2 * extraction.IN_FLIGHT


def test_dictionaries_train_live_on_texts(tmp_path: Path):
    lines = [f"text number {number}, of words" for number in range(9)]
    config = running.small(
        tmp_path / "sae",
        mode="forward",
        data=texts(tmp_path, lines),
        limit=settings.TASKS,
        context_length=12,
        prompts=2,
    )
    job = jobs.open_job(config)
    source = job.source
    assert isinstance(source, sources.Forward)
    assert (source.tasks_read, source.held_out_tasks) == (9, ("7", "8"))
    _, tokenizer = qwen_eqx.from_pretrained("tiny-random")
    lengths = [len(tokenizer.encode(line)) for line in lines]
    groups = [source.group(number) for number in range(source.training + source.held_out)]
    counts = [int(group.valid.sum()) for group in groups]
    assert sum(counts[: source.training]) == sum(lengths[:7])
    assert sum(counts) == sum(lengths)
    assert all(group.rows.shape[0] <= source.largest for group in groups)
    again = source.group(1)  # a run that goes on begins anywhere
    assert np.array_equal(again.rows, groups[1].rows)
    results = jobs.train(config)
    assert np.isfinite(results["sae"].metrics["fvu"])
    saved = json.loads((results["sae"].saved / "cfg.json").read_text())
    assert str(config.data[0]) in json.dumps(saved)
    said = [json.loads(line) for line in (config.out / "metrics.jsonl").read_text().splitlines()]
    assert all(0 < line["share_waiting"] < 1 for line in said)
    texts(tmp_path, [*lines, "one more"])
    jobs.train(config)  # it begins with what was there
    texts(tmp_path, [lines[0], "another", *lines[2:]])
    with pytest.raises(
        InputError, match="--data, --tasks: found other items than this run began with, expected the same 18"
    ):
        jobs.train(config)


def test_a_store_at_a_url_is_the_same(plain: extract.Config, tmp_path: Path, monkeypatch):
    pytest.importorskip("fsspec")
    monkeypatch.chdir(tmp_path)  # what stays on this machine goes to runs/
    url = "memory://extract/forward"
    config = dataclasses.replace(plain, out=Path(url))
    said = running.run(extract, config)
    assert url in said
    there, here = sae.ActivationStore.open(url), sae.ActivationStore.open(plain.out)
    assert [shard.digest for shard in there.shards] == [shard.digest for shard in here.shards]
    assert json.loads((storage.place(url) / "run.json").read())["config"]["mode"] == "forward"
    assert len(list((tmp_path / "runs").glob("forward-*/metrics.jsonl"))) == 1
    monkeypatch.setattr(Extraction, "forward", lambda *_: pytest.fail("a committed shard was made again"))
    running.run(extract, config)


@pytest.mark.parametrize("name", ["s3://bucket/a/b", "gs://x/y", "memory://a", "runs/extract", "/abs/s3:/x", "c:/x"])
def test_a_flag_names_a_path_or_a_url(name: str):
    found = files.location(Path(name))
    assert str(found) == name
    assert isinstance(found, str) == ("://" in name)
