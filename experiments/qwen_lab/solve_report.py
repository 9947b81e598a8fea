"""A page to look at: what was asked, what was answered beside the truth, and who voted for it; one file, no scripts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape

import arc
from arc.render import Panel, canvas, prediction_row, task_page
from arc.score import Report
from qwen_lab.predictions import Line

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: #222; }
table { border-collapse: collapse; margin: 0.7em 0; }
td, th { padding: 0.15em 0.9em 0.15em 0; text-align: left; vertical-align: top; font-variant-numeric: tabular-nums; }
th { border-bottom: 1px solid #999; } tr + tr td { border-top: 1px solid #eee; }
td.n, th.n { text-align: right; } .right { color: #17702a; font-weight: 600; } .wrong { color: #a11; }
pre { background: #f4f4f4; padding: 0.6em; overflow-x: auto; white-space: pre-wrap; max-height: 24em; }
svg { max-width: 100%; height: auto; } summary { cursor: pointer; color: #345; } h2 { margin-top: 2em; }
"""
SHOWN = 6  # candidates of a test input in the table


def page(
    title: str,
    tasks: Sequence[arc.Task],
    chosen: Mapping[str, Sequence[Sequence[arc.vote.Candidate]]],
    lines: Sequence[Sequence[Line]],
    report: Report | None,
    pictures: int,
) -> str:
    """The whole HTML page; tasks after the first `pictures` are in its table only."""
    parts = [f"<h1>{escape(title)}</h1>", _summary(report, lines)]
    if report is not None:
        parts.append(_table(report, {task.id for task in tasks[:pictures]}))
    for task, several in list(zip(tasks, lines, strict=True))[:pictures]:
        parts.append(f'<h2 id="{escape(task.id, quote=True)}">{escape(task.id)}</h2>')
        parts.append(_details("training pairs", _svg(task_page(task)[: len(task.train)])))
        for test, ranked in enumerate(chosen[task.id]):
            mine = [fields for fields in several if fields["test"] == test]
            parts.append(_test(task, test, ranked, mine))
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>\n{"".join(parts)}</body></html>\n'


def _summary(report: Report | None, lines: Sequence[Sequence[Line]]) -> str:
    outcomes = Counter(fields["outcome"] for several in lines for fields in several)
    said = ", ".join(f"{number} {escape(name)}" for name, number in outcomes.most_common())
    rows = [("completions", said)]
    if report is not None:
        passes = ", ".join(f"pass@{n} {value:.1%}" for n, value in report.pass_at.items())
        rows = [
            ("score", f"{report.score:.1%} of {len(report.rows)} tasks; {report.per_output:.1%} of their test inputs"),
            ("one of n", passes),
            ("parsed, right size", f"{report.parse_rate:.1%}, {report.right_size_rate:.1%}"),
            *rows,
        ]
    return "<table>" + "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows) + "</table>"


def _table(report: Report, pictured: set[str]) -> str:
    names = ("task", "solved", "completions", "parsed", "right size", "right", "not parsed because")
    first, *numeric, last = names
    heads = [f"<th>{first}</th>", *(f'<th class="n">{name}</th>' for name in numeric), f"<th>{last}</th>"]
    rows = ["<tr>" + "".join(heads) + "</tr>"]
    for row in report.rows:
        name = escape(row.task_id)
        link = f'<a href="#{escape(row.task_id, quote=True)}">{name}</a>' if row.task_id in pictured else name
        mark = f'<span class="{"right" if row.solved == 1 else "wrong"}">{row.solved:.0%}</span>'
        numbers = (mark, row.samples, row.parsed, row.right_size, row.right)
        why = ", ".join(f"{escape(reason)} {number}" for reason, number in row.reasons.items())
        cells = "".join(f'<td class="n">{value}</td>' for value in numbers)
        rows.append(f"<tr><td>{link}</td>{cells}<td>{why}</td></tr>")
    return "<table>" + "".join(rows) + "</table>"


def _test(task: arc.Task, test: int, ranked: Sequence[arc.vote.Candidate], lines: Sequence[Line]) -> str:
    asked, truth = task.test[test].input, task.test[test].output
    attempts = [candidate.grid for candidate in ranked[:2]] or [None]
    pictures: list[list[Panel]] = [
        prediction_row(f"test {test}, attempt {number}", asked, grid, truth) for number, grid in enumerate(attempts, 1)
    ]
    parts = [f"<h3>test {test}</h3>", _svg(pictures)]
    if ranked:
        parts.append(_candidates(ranked))
    said = "".join(_completion(fields) for fields in lines)
    return "".join([*parts, _details(f"{len(lines)} completions", said)])


def _candidates(ranked: Sequence[arc.vote.Candidate]) -> str:
    scored = any(candidate.score is not None for candidate in ranked)
    names = ("votes", "mean log-prob", *(["score"] if scored else []))
    heads = "".join(f'<th class="n">{name}</th>' for name in names)
    rows = [f"<tr><th>candidate</th>{heads}<th>seen under</th></tr>"]
    for number, candidate in enumerate(ranked[:SHOWN], 1):
        height, width = candidate.grid.shape
        score = "" if candidate.score is None else f"{candidate.score:.2f}"
        numbers = (candidate.votes, f"{candidate.mean_log_prob:.2f}", *([score] if scored else []))
        under = "; ".join(escape(str(sample.augmentation)) for sample in candidate.samples)
        rows.append(
            f"<tr><td>{number}: {height} × {width}</td>"
            + "".join(f'<td class="n">{value}</td>' for value in numbers)
            + f"<td>{under}</td></tr>"
        )
    more = f"<p>and {len(ranked) - SHOWN} more</p>" if len(ranked) > SHOWN else ""
    return "<table>" + "".join(rows) + "</table>" + more


def _completion(fields: Line) -> str:
    head = f"{fields['augmentation']} · {fields['outcome']}"
    if fields.get("detail"):
        head += f" ({fields['detail']})"
    if fields["text"] is None:
        return f"<p>{escape(head)}</p>"
    head += f" · {fields['tokens']} tokens · log-prob {fields['log_prob']:.2f}"
    if fields["dropped_pairs"]:
        head += f" · without training pairs {fields['dropped_pairs']}"
    return f"<p>{escape(head)}</p><pre>{escape(fields['text'])}</pre>"


def _details(title: str, inside: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def _svg(panels: Sequence[Sequence[Panel]]) -> str:
    return canvas(panels, cell=14).svg()
