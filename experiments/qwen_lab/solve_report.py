"""A page to look at: a card for each task, what was answered beside the truth and who voted for it; one file.

Without scripts everything is there; with them cards can be chosen by verdict, size and name, and put in order.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

import arc
from arc import drawing
from arc.render import prediction_row
from arc.score import Report, Row
from arc.task import same
from qwen_lab import sheets
from qwen_lab.predictions import Line
from qwen_lab.sheets import plain

SHOWN = 6  # candidates of a test input in the table
SIDES = (5, 10, 15, 20, 30)  # of the largest grid, to choose by
VERDICTS = {"solved": "solved", "part": "partly solved", "unsolved": "not solved", "unknown": "answer not known"}
ORDERS = {
    "asked": "as asked",
    "sure": "most agreed on first",
    "unsure": "least agreed on first",
    "small": "smallest first",
}


def page(
    title: str,
    tasks: Sequence[arc.Task],
    chosen: Mapping[str, Sequence[Sequence[arc.vote.Candidate]]],
    lines: Sequence[Sequence[Line]],
    report: Report | None,
    pictures: int,
) -> str:
    """The whole HTML page; tasks after the first `pictures` have no pictures on their cards."""
    scored = {} if report is None else {row.task_id: row for row in report.rows}
    cards, counts = [], Counter()
    for number, (task, several) in enumerate(zip(tasks, lines, strict=True)):
        state = _state(scored.get(task.id))
        counts[state] += 1
        cards.append(_card(task, chosen[task.id], several, scored.get(task.id), number, number < pictures))
    head = f"<header><h1>{plain(title)}</h1>{_summary(report, lines)}{_filters(counts)}</header>"
    return sheets.page(title, f'{head}<main id="cards">{"".join(cards)}</main>', style=STYLE, script=SCRIPT)


def _state(row: Row | None) -> str:
    return "unknown" if row is None else "solved" if row.solved == 1 else "part" if row.solved else "unsolved"


def _summary(report: Report | None, lines: Sequence[Sequence[Line]]) -> str:
    outcomes = Counter(fields["outcome"] for several in lines for fields in several)
    said = {"completions": plain(", ".join(f"{number} {name}" for name, number in outcomes.most_common()))}
    if report is not None:
        passes = ", ".join(f"pass@{n} {value:.1%}" for n, value in report.pass_at.items())
        said = {
            "score": f"{report.score:.1%} of {len(report.rows)} tasks; {report.per_output:.1%} of their test inputs",
            "one of n": passes,
            "parsed, right size": f"{report.parse_rate:.1%}, {report.right_size_rate:.1%}",
            **said,
        }
    return sheets.facts(said)


def _filters(counts: Mapping[str, int]) -> str:
    """Shown by the script, which they need."""
    states = {"": "all"} | {state: f"{name} ({counts[state]})" for state, name in VERDICTS.items() if counts[state]}
    radios = "".join(
        f'<label><input type="radio" name="state" value="{state}"{" checked" * (not state)}> {name}</label>'
        for state, name in states.items()
    )
    sides = "".join(f'<option value="{side}">at most {side}</option>' for side in SIDES[:-1])
    orders = "".join(f'<option value="{order}">{name}</option>' for order, name in ORDERS.items())
    return (
        '<form id="filters" role="search" aria-label="choose tasks" hidden>'
        f"<fieldset><legend>verdict</legend>{radios}</fieldset>"
        f'<label>longest side <select id="side"><option value="{SIDES[-1]}">any</option>{sides}</select></label>'
        f'<label>order <select id="order">{orders}</select></label>'
        '<label>name <input type="search" id="name" size="14"></label> '
        '<output id="count" aria-live="polite"></output></form>'
    )


def _card(
    task: arc.Task,
    ranked: Sequence[Sequence[arc.vote.Candidate]],
    lines: Sequence[Line],
    row: Row | None,
    number: int,
    pictured: bool,
) -> str:
    """A task: its verdict, its training pairs, and each of its test inputs."""
    tests = [[fields for fields in lines if fields["test"] == test] for test in range(len(task.test))]
    sure = min(_agreed(*each) for each in zip(ranked, tests, strict=True))
    state, side = _state(row), _longest_side(task)
    name, said = plain(task.id), f'<span class="soft">{_said(row, sure, side)}</span>'
    parts = [
        f'<article id="task-{name}" class="card" tabindex="-1" data-state="{state}" data-side="{side}" '
        f'data-sure="{sure:.4f}" data-number="{number}" data-name="{plain(task.id.lower())}" '
        f'aria-label="task {name}, {VERDICTS[state]}">',
        f'<header><h2><a href="#task-{name}">{name}</a></h2>{_verdict(row)}{said}</header>',
    ]
    if pictured:
        for index, pair in enumerate(task.train):
            titles = (f"train {index}, input", f"train {index}, output")
            grids = zip((pair.input, pair.output), titles, strict=True)
            parts.append(
                f'<div class="pair">{"".join(drawing.figure(grid, each, cell=_cell(side)) for grid, each in grids)}</div>'
            )
        parts += [_test(task, test, *each, side) for test, each in enumerate(zip(ranked, tests, strict=True))]
    return "".join([*parts, "</article>"])


def _longest_side(task: arc.Task) -> int:
    grids = (grid for pair in (*task.train, *task.test) for grid in (pair.input, pair.output))
    return max(max(grid.shape) for grid in grids if grid is not None)


def _cell(side: int) -> int:
    """Pixels of a cell: one scale for all grids of a task."""
    return min(16, max(4, 130 // side))


def _agreed(ranked: Sequence[arc.vote.Candidate], lines: Sequence[Line]) -> float:
    """The share of a test input's completions that say the first candidate."""
    return len(ranked[0].samples) / max(1, len(lines)) if ranked else 0.0


def _verdict(row: Row | None) -> str:
    state = _state(row)
    sign, look = {"solved": ("✓", "good"), "unknown": ("?", "soft")}.get(state, ("✗", "bad"))
    return f'<span class="{look}"><span aria-hidden="true">{sign} </span>{VERDICTS[state]}</span>'


def _said(row: Row | None, sure: float, side: int) -> str:
    said = [f"{sure:.0%} agree", f"longest side {side}"]
    if row is not None:
        said.append(
            f"{row.right} of {row.samples} completions right, {row.parsed} parsed, {row.right_size} of the right size"
        )
        said += [f"{number} × {plain(reason)}" for reason, number in row.reasons.items()]
    return " · ".join(said)


def _test(task: arc.Task, test: int, ranked: Sequence[arc.vote.Candidate], lines: Sequence[Line], side: int) -> str:
    asked, truth = task.test[test].input, task.test[test].output
    rows = [prediction_row("input", asked, each.grid, truth) for each in ranked[:2]] or [
        prediction_row("input", asked, None, truth)
    ]
    attempts = [(f"attempt {n}: {said.title}", said) for n, (_, said, _) in enumerate(rows, 1)]
    panels = [("input", rows[0][0]), *attempts, ("truth", rows[0][2])]
    figures = (drawing.figure(panel.grid, title, panel.marks, _cell(side)) for title, panel in panels)
    said = "".join(map(_completion, lines))
    return (
        f'<section><h3>test {test}</h3><div class="row">{"".join(figures)}</div>{_votes(ranked, lines, truth)}'
        f"<details><summary>{len(lines)} completions</summary>{said}</details></section>"
    )


def _votes(ranked: Sequence[arc.vote.Candidate], lines: Sequence[Line], truth: arc.Grid | None) -> str:
    """Which augmentations answered what: a line for each answer, and one for those that gave none."""
    scored = any(candidate.score is not None for candidate in ranked)
    names = ("votes", "log-prob", *(["score"] if scored else []))
    heads = "".join(f'<th scope="col" class="n">{name}</th>' for name in names)
    rows = []
    for number, candidate in enumerate(ranked[:SHOWN], 1):
        right = truth is not None and same(candidate.grid, truth)
        picture = drawing.svg(candidate.grid, f"answer {number}", cell=max(2, 60 // max(candidate.grid.shape)))
        values = [f"{candidate.votes}", f"{candidate.mean_log_prob:.2f}"]
        values += ["" if candidate.score is None else f"{candidate.score:.2f}"] if scored else []
        share = len(candidate.samples) / max(1, len(lines))
        bar = f'<div class="bar" style="width:{share:.0%}"></div>'
        rows.append(
            f'<tr><td>{picture}</td><th scope="row">answer {number}{", right" * right}</th>'
            + "".join(f'<td class="n">{value}</td>' for value in values)
            + f"<td>{bar}{_views(Counter(str(sample.augmentation) for sample in candidate.samples))}</td></tr>"
        )
    if len(ranked) > SHOWN:
        rows.append(f'<tr><td></td><td colspan="{len(names) + 2}">and {len(ranked) - SHOWN} more answers</td></tr>')
    none = Counter(f"{fields['augmentation']}: {fields['outcome']}" for fields in lines if fields.get("grid") is None)
    if none:
        rows.append(f'<tr><td></td><th scope="row">no grid</th>{"<td></td>" * len(names)}<td>{_views(none)}</td></tr>')
    head = f'<tr><td></td><th scope="col">answer</th>{heads}<th scope="col">given under</th></tr>'
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table></div>'


def _views(counted: Mapping[str, int]) -> str:
    """Augmentations, each once; how often where it is more."""
    each = (f"<li>{plain(view)}{f' × {number}' if number > 1 else ''}</li>" for view, number in counted.items())
    return f'<ul class="views">{"".join(each)}</ul>'


def _completion(fields: Line) -> str:
    head = f"{fields['augmentation']} · {fields['outcome']}"
    if fields.get("detail"):
        head += f" ({fields['detail']})"
    if fields["text"] is None:
        return f"<p>{plain(head)}</p>"
    head += f" · {fields['tokens']} tokens · log-prob {fields['log_prob']:.2f}"
    if fields["dropped_pairs"]:
        head += f" · without training pairs {fields['dropped_pairs']}"
    return f'<p>{plain(head)}</p><pre tabindex="0">{plain(fields["text"])}</pre>'


STYLE = """
#filters{display:flex;flex-wrap:wrap;gap:8px 18px;align-items:center;margin:10px 0}#filters[hidden]{display:none}
#filters fieldset{border:1px solid var(--line);border-radius:6px;padding:0 10px 4px;display:flex;flex-wrap:wrap;gap:2px 14px}
#filters legend{color:var(--soft);font-size:.85rem}
#cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,34rem),1fr));gap:14px;align-items:start}
.card{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;overflow:hidden;
content-visibility:auto;contain-intrinsic-size:auto 34rem}
.card[hidden]{display:none}
.card>header{display:flex;flex-wrap:wrap;gap:2px 12px;align-items:baseline;margin-bottom:6px}
.card h2 a{color:inherit;text-decoration:none}.card h2 a:hover{text-decoration:underline}
.card:target{border-color:var(--up)}
.pair{display:inline-flex;flex-wrap:wrap;gap:8px;margin:0 18px 8px 0;vertical-align:top}
section{border-top:1px solid var(--line);margin-top:8px}
.bar{height:5px;background:var(--up);border-radius:3px;margin:9px 0 3px;min-width:1px}
.views{list-style:none;margin:0;padding:0;display:flex;flex-wrap:wrap;gap:2px 10px;font-size:.85rem;color:var(--soft)}
td:last-child{min-width:11rem}td svg{max-width:none!important;display:block}
"""

SCRIPT = """
const $=id=>document.getElementById(id),box=$('cards'),cards=[...box.children],form=$('filters');
const KEYS={asked:c=>+c.dataset.number,sure:c=>-c.dataset.sure,unsure:c=>+c.dataset.sure,small:c=>+c.dataset.side};
function choose(){
 const state=form.elements.state.value,side=+$('side').value,name=$('name').value.trim().toLowerCase();let shown=0;
 for(const c of cards){const d=c.dataset;
  c.hidden=!((!state||d.state==state)&&+d.side<=side&&d.name.includes(name));shown+=!c.hidden}
 $('count').textContent=`${shown} of ${cards.length} tasks`}
$('order').addEventListener('change',()=>{const key=KEYS[$('order').value];
 cards.sort((a,b)=>key(a)-key(b)||a.dataset.number-b.dataset.number);box.append(...cards)});
form.addEventListener('input',choose);form.addEventListener('submit',e=>e.preventDefault());
form.hidden=false;choose();
"""
