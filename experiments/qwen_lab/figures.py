"""Pictures and tables of SAE runs; matplotlib draws where it is installed, and one line says so where it is not."""

import io
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from qwen_lab import files

HOW_TO_GET_IT = "not drawn: pip install 'qwen-eqx[plots]' for matplotlib"
COLUMNS = {  # metric: what the table calls it and how it is written
    "fvu": ("FVU", ".3g"),
    "l0": ("L0", ".1f"),
    "dead_fraction": ("dead", ".1%"),
    "dense_fraction": ("dense", ".1%"),
    "cosine": ("cosine", ".3f"),
    "norm_ratio": ("norm", ".3f"),
    "ce_recovered": ("CE rec.", ".3f"),
    "kl_recovered": ("KL rec.", ".3f"),
}
INK, GRID = "#333333", "#dddddd"
COLOURS = ("#1b6ca8", "#d1495b", "#2e8b57", "#e08e1b", "#7a5195", "#5f6b6d", "#00a6a6", "#a05a2c")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")


def metrics_table(results: Mapping[str, Mapping[str, Any]], title: str = "on held-out tasks") -> Table:
    """One row per SAE; lower fvu is better, cosine, norm (‖ŷ‖/‖y‖) and what is recovered are best at 1."""
    columns = [name for name in COLUMNS if name in next(iter(results.values()))]
    numbers = [Column(COLUMNS[name][0], justify="right", no_wrap=True) for name in columns]
    table = Table(Column("", overflow="fold"), *numbers, title=title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name, row in results.items():
        table.add_row(name, *written(row).values())
    return table


def written(row: Mapping[str, Any]) -> dict[str, str]:
    """The metrics of a row as a table shows them, by column."""
    return {label: format(row[name], spec) for name, (label, spec) in COLUMNS.items() if name in row}


def loss_curves(path: Path, history: Sequence[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Loss, FVU, L0 and dead latents of each member against the step."""
    steps = [entry["step"] for entry in history]
    panels = {"loss": "loss", "fvu": "FVU of the batch", "l0": "L0", "dead": "dead latents"}
    with _figure(path, columns=len(panels)) as axes:
        for ax, (field, label) in zip(axes, panels.items(), strict=True):
            for member, name in enumerate(names):
                values = [entry[field][member] for entry in history]
                style = "-" if member < len(COLOURS) else "--" if member < 2 * len(COLOURS) else ":"
                ax.plot(steps, values, style, color=COLOURS[member % len(COLOURS)], linewidth=1.3, label=name)
            ax.set(xlabel="step", ylabel=label)
            if field in ("loss", "fvu"):
                ax.set_yscale("log")
            else:
                ax.set_ylim(bottom=0)
        if len(names) > 1:
            axes[0].legend(fontsize=7, frameon=False)
    return _said(path)


def learning_curves(path: Path, history: Sequence[Mapping[str, Any]]) -> str:
    """A model's loss and its exact answers, on the tasks it trains on and on held-out ones, against the step."""
    trained = [line for line in history if "loss" in line]
    measured = [line for line in history if "families" in line]
    with _figure(path, columns=3) as (loss, exact, families):
        loss.plot([line["step"] for line in trained], [line["loss"] for line in trained], color=COLOURS[0], linewidth=1)
        loss.set(xlabel="step", ylabel="loss, nats per token")
        exact.plot([line["step"] for line in trained], [line["exact"] for line in trained], color=GRID, linewidth=1)
        for part, label in (("seen", "held out"), ("unseen", "families never trained on")):
            points = [(line["step"], line[part]) for line in measured if line[part] is not None]
            exact.plot([x for x, _ in points], [y for _, y in points], label=label)
        exact.set(xlabel="step", ylabel="exact answers", ylim=(0, 1))
        exact.legend(fontsize=7, frameon=False)
        last = sorted(measured[-1]["families"].items(), key=lambda item: item[1]) if measured else []
        families.barh([name for name, _ in last], [rate for _, rate in last], color=COLOURS[0])
        families.tick_params(axis="y", labelsize=4)
        families.set(xlabel="exact answers, held out", xlim=(0, 1))
    return _said(path)


def exact_by_family(path: Path, results: Mapping[str, Mapping[str, float]], order: Sequence[str]) -> str:
    """The share of exact answers of each family, one mark for each way of answering."""
    with _figure(path, columns=1) as (ax,):
        rows = np.arange(len(order))[::-1]
        for number, (how, rates) in enumerate(results.items()):
            colour, mark = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
            ax.plot([rates[name] for name in order], rows, mark, color=colour, markersize=3, label=how)
        ax.set(yticks=rows, xlabel="exact answers", xlim=(-0.02, 1.02))
        ax.set_yticklabels(order, fontsize=4)
        ax.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return _said(path)


def features(path: Path, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Of the best pairs of latent and property of the first dictionary, the F1 beside each control's best."""
    pairs = next(iter(results.values()))["pairs"] if results else []
    with _figure(path, columns=1) as (ax,):
        rows = np.arange(len(pairs))[::-1]
        ways = {"latent": [line["f1"] for line in pairs]}
        for control in pairs[0]["controls"] if pairs else ():
            ways[control] = [line["controls"][control] for line in pairs]
        for number, (way, values) in enumerate(ways.items()):
            colour, mark = COLOURS[number % len(COLOURS)], MARKS[number % len(MARKS)]
            ax.plot(values, rows, mark, color=colour, markersize=3, label=way)
        ax.set(yticks=rows, xlabel="F1 on held-out tasks", xlim=(0, 1.02))
        ax.set_yticklabels([line["property"] for line in pairs], fontsize=4)
        ax.legend(fontsize=7, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    return _said(path)


def rules(
    path: Path, results: Mapping[str, Sequence[Mapping[str, Any]]], whens: Sequence[str], sites: Sequence[str]
) -> str:
    """How well a probe reads a task's variant: by depth, means over families, and for each family at the last place."""
    flat = [line for lines in results.values() for line in lines]

    def means(value: str, when: str) -> list[float]:
        at = [[line[value] for line in flat if line["when"] == when and line["site"] == site] for site in sites]
        return [float(np.mean(each)) for each in at]

    depth = np.arange(len(sites))
    with _figure(path, columns=2) as (lines, each):
        for number, when in enumerate(whens):
            lines.plot(
                depth, means("probe", when), MARKS[number] + "-", color=COLOURS[number], label=when, markersize=3
            )
        for style, control in (("--", "random weights"), ("-.", "shuffled"), (":", "commonest")):
            lines.plot(depth, means(control, whens[-1]), style, color=INK, linewidth=1, label=control)
        lines.set(xlabel="blocks read", ylabel="variant read by a linear probe", ylim=(0, 1.02))
        lines.legend(fontsize=6, frameon=False)
        chosen = {name: [line for line in found if line["when"] == whens[-1]] for name, found in results.items()}
        shown = np.asarray([[line["probe"] for line in found] for found in chosen.values()])
        each.imshow(shown, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        each.grid(visible=False)
        each.set_yticks(np.arange(len(chosen)), list(chosen), fontsize=5)
        each.set_xlabel("blocks read")
        each.set_title(f"{whens[-1]}: yellow is 100 %", fontsize=7)
    return _said(path)


def densities(path: Path, counts: np.ndarray, edges: np.ndarray, dead: int) -> str:
    """How many latents fire how often."""
    with _figure(path, columns=1) as (ax,):
        ax.bar(edges[:-1], counts, np.diff(edges), align="edge", color=COLOURS[0])
        ax.set(xlabel="log10 of the share of positions on which a latent fires", ylabel="latents")
        ax.set_title(f"{dead} latents never fired", fontsize=9)
    return _said(path)


def breakdown(path: Path, groups: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """FVU (bars) and L0 (dots) by position, and by task."""
    with _figure(path, columns=len(groups)) as axes:
        for ax, (what, rows) in zip(axes, groups.items(), strict=True):
            shown = {name: row for name, row in rows.items() if row["rows"]}
            places = np.arange(len(shown))
            ax.bar(places, [row["fvu"] for row in shown.values()], color=COLOURS[0])
            labels = list(shown) if len(shown) <= 40 else [""] * len(shown)
            ax.set_xticks(places, labels, rotation=90, fontsize=6)
            ax.set(xlabel=what, ylabel="FVU")
            ax.yaxis.label.set_color(COLOURS[0])
            other = ax.twinx()
            other.plot(places, [row["l0"] for row in shown.values()], ".", color=COLOURS[1])
            other.set_ylabel("L0", color=COLOURS[1])
            other.spines[["top"]].set_visible(False)
            other.set_ylim(bottom=0)
    return _said(path)


def frontier(path: Path, results: Mapping[str, Mapping[str, Any]], note: str) -> str:
    """FVU against L0, a line for each form at each site: lower and further left is better."""
    one_site = len({row["site"] for row in results.values()}) == 1
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in results.values():
        label = row["form"] if one_site else f"{row['form']}, {row['site']}"
        lines.setdefault(label, []).append((row["l0"], row["fvu"]))
    if one_site:
        note = f"{next(iter(results.values()))['site']}, {note}"
    with _figure(path, columns=1) as (ax,):
        for number, (label, points) in enumerate(lines.items()):
            l0, fvu = zip(*sorted(points), strict=True)
            ax.plot(l0, fvu, marker=MARKS[number % 8], color=COLOURS[number % 8], label=label, linewidth=1.2)
        ax.set(xlabel="L0: latents that fire per position", ylabel="FVU (lower is better)", yscale="log")
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter("{x:g}")
        ax.set_title(note, fontsize=8)
        ax.legend(frameon=False, fontsize=8)
    return _said(path)


def heat(path: Path, values: np.ndarray, names: Mapping[str, Sequence[str]], title: str) -> str:
    """Rows and columns with a name each; red is above zero, blue below, white is zero."""
    (down, rows), (across, columns) = names.items()
    most = float(np.abs(values).max(initial=0)) or 1.0
    with _figure(path, columns=1, width=1.5 + 0.12 * len(columns)) as (ax,):
        ax.imshow(values, vmin=-most, vmax=most, aspect="auto", cmap="RdBu_r")
        ax.grid(visible=False)
        ax.set_yticks(range(len(rows)), rows, fontsize=6)
        ax.set_xticks(range(len(columns)), columns, fontsize=5, rotation=90)
        ax.set(xlabel=across, ylabel=down)
        ax.set_title(f"{title}: {most:.3g} is full colour" if title else f"{most:.3g} is full colour", fontsize=8)
    return _said(path)


@contextmanager
def _figure(path: Path, columns: int, width: float = 0):
    """Axes to draw on, saved to `path` at the end; without matplotlib nothing is drawn."""
    try:
        import matplotlib
    except ImportError:
        yield [_Nothing() for _ in range(columns)]
        return
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "sae", "svg.fonttype": "none", "font.size": 8, "axes.edgecolor": INK}):
        figure = Figure(figsize=(max(4.8, 3.4 * columns, width), 3.2), layout="constrained")
        axes = [figure.add_subplot(1, columns, column + 1) for column in range(columns)]
        for ax in axes:
            ax.grid(color=GRID, linewidth=0.6)
            ax.set_axisbelow(True)
            ax.spines[["top", "right"]].set_visible(False)
        yield axes
        drawn = io.BytesIO()
        svg = path.suffix == ".svg"
        figure.savefig(drawn, format=path.suffix[1:], metadata={"Date": None} if svg else None)
        files.write_bytes(path, drawn.getvalue())


class _Nothing:
    """Stands for axes where there is no matplotlib: takes every call."""

    def __getattr__(self, name: str) -> "_Nothing":
        return self

    def __call__(self, *_: Any, **__: Any) -> "_Nothing":
        return self

    def __getitem__(self, _: Any) -> "_Nothing":
        return self


def _said(path: Path) -> str:
    return str(path) if path.exists() else HOW_TO_GET_IT
