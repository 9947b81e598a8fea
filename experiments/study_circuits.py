"""Study which features and heads carry the rule of a family: what silencing and patching them does, beside controls.

Each puzzle is traced up to one cell of its answer. The features of most influence are silenced at once, and so are random
ones of equal influence and random ones as strong in the same layers. Heads are patched one at a time: a prompt with the
pairs of another variant gets, from the right prompt, what one head puts out.
"""

if __name__ == "__main__":
    import qwen_lab.stopping

    qwen_lab.stopping.install()  # before anything heavy is imported

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int
from rich.table import Column, Table

import arc
import qwen_eqx
import sae
from qwen_lab import bounds, circuits, cli, corpus, figures, files, flags, locks, meshes, provenance, rules, wording
from qwen_lab.bounds import Count, CountOrNone, Seed
from qwen_lab.circuits.nodes import FEATURE, Nodes
from qwen_lab.circuits.puzzles import question, solved
from qwen_lab.errors import InputError

TRANSCODERS = "tiny-arc"
NEAREST = 16  # features of the same layer among which one as strong is drawn


@dataclasses.dataclass(frozen=True)
class Config(meshes.OnMesh):
    transcoders: str = TRANSCODERS
    """Embedded model's name, or a directory with a transcoder for each MLP."""
    encoder: str = wording.AUTO
    """How grids become text: a name of arc.ENCODERS or a nesting such as shape(rows(minimal)). auto: as trained."""
    prompt: str = wording.AUTO
    """Prompt format: a name of arc.PROMPTS. auto: as trained."""
    families: flags.Words = ("mirror", "rotate", "gravity")
    """Families of procedural tasks. Their rules have two to eight variants."""
    sides: flags.Sides = (4, 4)
    """Smallest and largest side of the procedural grids."""
    puzzles: Count = 4
    """Held-out puzzles of each family that the model solves."""
    silenced: Count = 8
    """Features of most influence that are silenced together."""
    draws: Count = 3
    """Random sets of features for each control."""
    max_features: CountOrNone = 512
    """Features whose inputs are traced, those of most influence first; None traces all that have any."""
    seed: Seed = 0
    """Of the run. It draws the controls."""
    out: Path = Path("runs/study_circuits")
    """Directory of what is written. It is study.json."""


def main(config: Config) -> None:
    bounds.check(config)
    for name in config.families:
        if name not in rules.families():
            raise InputError(f"--families: found {name!r}, expected some of {', '.join(rules.families())}")
    transcoders = sae.load_transcoders(config.transcoders)
    name = str(transcoders.metadata.get("model_name", wording.MODEL))
    model, tokenizer = config.open_model(name, "float32")
    config = wording.filled(config, tokenizer, transcoders.metadata)
    with locks.claimed(config.out):
        files.expect_files(config.out, "run.json", "study.json")
        provenance.record_run(config.out, config)
        lab = Lab(config, model, tokenizer, transcoders)
        total = len(config.families) * config.puzzles
        asked = (pair for each in zip(*map(lab.puzzles, config.families), strict=True) for pair in each)
        found: dict[str, list[dict[str, Any]]] = {family: [] for family in config.families}
        for family, puzzle in cli.progress(asked, total, "tracing", "puzzles"):
            found[family].append(lab.studied(puzzle))
            files.write_json(config.out / "study.json", found)  # what is done stays if it is cut off
    report(found)


class LogProbability(eqx.Module):
    """log p(token) of the last position: a metric with the token as data, so that all puzzles share one compilation."""

    token: Int[Array, ""]

    def __call__(self, logits: Float32[Array, " vocab"]) -> Float32[Array, ""]:
        return jax.nn.log_softmax(logits)[self.token]


@dataclasses.dataclass(frozen=True)
class Puzzle:
    """A prompt up to a cell of its answer, and the same with the pairs of another variant."""

    document: corpus.Document
    tokens: list[int]
    answer: int
    otherwise: list[int]


@dataclasses.dataclass(frozen=True)
class Lab:
    """A model, its transcoders and what is asked of them."""

    config: Config
    model: qwen_eqx.Qwen
    tokenizer: qwen_eqx.Tokenizer
    transcoders: sae.Transcoders

    def puzzles(self, family: str) -> list[tuple[str, Puzzle]]:
        """Those that the model solves, for which there are as long pairs of another variant."""
        pool = rules.tasks(family, 16 * self.config.puzzles, self.config.sides)
        found = []
        for number, (task, variant) in enumerate(pool):
            document = self._document(task)
            if document is None or solved(self.model, [document]) is None:
                continue
            asked = question(document, None, None)
            length = len(asked.tokens)
            for other, its in pool[number + 1 :] + pool[:number]:
                swapped = None if its == variant else self._document(dataclasses.replace(task, train=other.train))
                if swapped is not None and len(swapped.tokens) == len(document.tokens):
                    puzzle = Puzzle(document, asked.tokens, document.tokens[length], swapped.tokens[:length])
                    found.append((family, puzzle))
                    break
            if len(found) == self.config.puzzles:
                return found
        raise InputError(f"--families: found {len(found)} of {family} that are solved, expected {self.config.puzzles}")

    def _document(self, task: arc.Task) -> corpus.Document | None:
        most, config = self.model.config.max_seq, self.config
        found = corpus.documents([task], self.tokenizer, max_tokens=most, encoder=config.encoder, format=config.prompt)
        return next(iter(found), None)

    def studied(self, puzzle: Puzzle) -> dict[str, Any]:
        """The strongest features, what silencing them and controls does, and what each head brings back."""
        config, options = self.config, circuits.Options(max_features=self.config.max_features)
        graph = circuits.trace(self.model, self.tokenizer, self.transcoders, puzzle.tokens, options)
        nodes = graph.nodes
        features = np.flatnonzero(nodes.kind == FEATURE)
        ranked = features[np.argsort(-nodes.influence[features], kind="stable")]
        top, rest = ranked[: config.silenced], ranked[config.silenced :]
        rng = np.random.default_rng([config.seed, *puzzle.tokens])
        sets = {"strongest": [top]}
        sets["equal influence"] = [equal(top, rest, nodes.influence, rng) for _ in range(config.draws)]
        sizes = self._written(nodes)
        sets["as strong"] = [alike(top, rest, nodes.layer, sizes, rng) for _ in range(config.draws)]
        return {
            "task": puzzle.document.task,
            "replacement": graph.facts["replacement_score"],
            "features": [
                [int(nodes.layer[n]), int(nodes.index[n]), parts(puzzle, int(nodes.position[n]))] for n in top
            ],
            "influence": float(nodes.influence[top].sum()),
            "silenced": {
                name: [self._silenced(graph, puzzle.answer, each) for each in drawn] for name, drawn in sets.items()
            },
            "heads": self._heads(puzzle),
        }

    def _written(self, nodes: Nodes) -> Float[np.ndarray, " nodes"]:
        """|activation| · ‖decoder rows‖ of features, 0 of other nodes."""
        sizes = np.zeros(len(nodes))
        for layer in range(self.transcoders.n_layers):
            here = np.flatnonzero((nodes.kind == FEATURE) & (nodes.layer == layer))
            rows = np.asarray(self.transcoders.decoder_rows(layer, nodes.index[here]))
            sizes[here] = np.abs(nodes.activation[here]) * np.linalg.norm(rows.reshape(len(here), -1), axis=1)
        return sizes

    def _silenced(self, graph: circuits.Graph, answer: int, chosen: Int[np.ndarray, " chosen"]) -> dict[str, Any]:
        names = [graph.nodes.ids[n] for n in chosen]
        outcome = circuits.intervene(self.model, self.transcoders, graph, dict.fromkeys(names, 0.0))
        before, frozen, free = (
            float(jax.nn.log_softmax(jnp.asarray(logits))[answer])
            for logits in (outcome.plain, outcome.frozen, outcome.free)
        )
        lost = {"frozen": before - frozen, "free": before - free}
        return lost | {"features": len(names), "changed": outcome.answers[2] != answer}

    def _heads(self, puzzle: Puzzle) -> dict[str, Any]:
        """The share of the log-probability that each head alone brings back; layers by heads."""
        metric = LogProbability(jnp.asarray(puzzle.answer, jnp.int32))
        places = qwen_eqx.Places("z", by="head")
        found = qwen_eqx.patch_effects(self.model, puzzle.tokens, puzzle.otherwise, metric, places, at_once=8)
        return {
            "clean": found.clean,
            "corrupted": found.corrupted,
            "recovered": np.asarray(found.recovered.values).tolist(),
        }


def equal(
    top: Int[np.ndarray, " top"],
    rest: Int[np.ndarray, " rest"],
    influence: Float[np.ndarray, " nodes"],
    rng: np.random.Generator,
) -> Int[np.ndarray, " chosen"]:
    """Random ones of the rest, as many as have at least the influence of the top together, or all."""
    drawn = rng.permutation(rest)
    enough = int(np.searchsorted(np.cumsum(influence[drawn], dtype=np.float64), influence[top].sum())) + 1
    return drawn[:enough]


def alike(
    top: Int[np.ndarray, " top"],
    rest: Int[np.ndarray, " rest"],
    layer: Int[np.ndarray, " nodes"],
    size: Float[np.ndarray, " nodes"],
    rng: np.random.Generator,
) -> Int[np.ndarray, " chosen"]:
    """For each of the top another of its layer, drawn from the `NEAREST` in size; fewer where a layer has no more."""
    left, chosen = rest, []
    for n in top:
        same = left[layer[left] == layer[n]]
        if len(same):
            near = same[np.argsort(np.abs(size[same] - size[n]), kind="stable")[:NEAREST]]
            chosen.append(rng.choice(near))
            left = left[left != chosen[-1]]
    return np.asarray(chosen, np.int64)


def parts(puzzle: Puzzle, position: int) -> str:
    """Which part of the prompt a token stands in."""
    cell = corpus.cells_of_tokens(puzzle.document.cells, puzzle.document.offsets)[position]
    if position == len(puzzle.tokens) - 1:
        return "last token"
    if cell is None:
        return "between cells"
    return ("test " if cell.pair >= puzzle.document.pairs else "pairs' ") + cell.part


def report(found: dict[str, list[dict[str, Any]]]) -> None:
    """A table of what silencing does, and a line on features and heads, for each family."""
    columns = ("puzzles", "silenced", "features", "nats lost, frozen", "nats lost", "other answer")
    table = Table("family", *(Column(name, justify="right") for name in columns), box=figures.SIMPLE_HEAD)
    for family, puzzles in found.items():
        for name in puzzles[0]["silenced"]:
            each = [draw for puzzle in puzzles for draw in puzzle["silenced"][name]]
            mean = {key: float(np.mean([draw[key] for draw in each])) for key in each[0]}
            numbers = (
                f"{mean['features']:.0f}",
                f"{mean['frozen']:.2f}",
                f"{mean['free']:.2f}",
                f"{mean['changed']:.0%}",
            )
            table.add_row(family, str(len(puzzles)), name, *numbers)
    cli.console.print(table, soft_wrap=False)
    for family, puzzles in found.items():
        for line in lines(puzzles):
            cli.console.print(f"{family}: {line}", markup=False)


def lines(puzzles: Sequence[dict[str, Any]]) -> list[str]:
    """Where the strongest features stand, which of them recur, and which heads bring most back."""
    strongest = [feature for puzzle in puzzles for feature in puzzle["features"]]
    where = collections.Counter(part for _, _, part in strongest)
    recur = collections.Counter(
        each for puzzle in puzzles for each in {(layer, latent) for layer, latent, _ in puzzle["features"]}
    )
    often = [f"{layer}_{latent} ({count})" for (layer, latent), count in recur.most_common(5) if count > 1]
    heads = np.asarray([puzzle["heads"]["recovered"] for puzzle in puzzles])
    mean = np.median(heads, axis=0)
    best = sorted(np.ndindex(mean.shape), key=lambda at: -mean[at])[:3]
    drop = np.mean([puzzle["heads"]["clean"] - puzzle["heads"]["corrupted"] for puzzle in puzzles])
    return [
        "strongest features stand at " + ", ".join(f"{part} {count}" for part, count in where.most_common()),
        "among the strongest of several puzzles: " + (", ".join(often) or "none"),
        f"the other pairs cost {drop:.2f} nats; heads that bring most back: "
        + ", ".join(f"{layer}.{head} {mean[layer, head]:.0%}" for layer, head in best)
        + f" (median head {np.median(mean):.0%})",
    ]


if __name__ == "__main__":
    cli.run(main, Config)
