"""Pages that show an answer being computed: token by token, the grid that fills up and the latents that are strongest.

One file for each answer and an index, opened from a directory. Step t is the pass whose logits chose token t.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

import arc
from arc import drawing
from arc.grid import COLOUR_NAMES
from arc.render import Panel, prediction_row
from qwen_lab import files, sheets
from qwen_lab.errors import InputError
from qwen_lab.sheets import plain

KEPT = 12  # latents of a step
LANES = 24  # latents that have a column


@dataclass(frozen=True)
class Timeline:
    """What a model wrote after one prompt, and which latents fired while it did."""

    task: arc.Task
    test: int
    outcome: str
    answer: arc.Grid | None
    """What it wrote, read as a grid."""
    pieces: Sequence[str]
    """The text of each token."""
    cells: Sequence[tuple[int, int] | None]
    """The row and column of the answer that each token writes."""
    probabilities: Float[np.ndarray, " steps"]
    latents: Int[np.ndarray, "steps kept"]
    """The strongest of each step, strongest first."""
    values: Float[np.ndarray, "steps kept"]
    """Their activations, 0 where fewer fired."""

    def __post_init__(self) -> None:
        steps = {
            len(self.pieces),
            len(self.cells),
            *(len(each) for each in (self.probabilities, self.latents, self.values)),
        }
        if len(steps) != 1:
            raise InputError(f"timeline of {self.task.id}: found {sorted(steps)} steps, expected one number of them")

    @property
    def name(self) -> str:
        return f"{self.task.id}, test {self.test}"


def strongest(
    codes: Float[np.ndarray, "steps d_sae"], count: int = KEPT
) -> tuple[Int[np.ndarray, "steps kept"], Float[np.ndarray, "steps kept"]]:
    """The latents of each step with the largest activations, and these; the lower number first among equals."""
    order = np.argsort(-codes, axis=1, kind="stable")[:, :count]
    return order, np.take_along_axis(codes, order, axis=1)


def lanes(timeline: Timeline, count: int = LANES) -> list[int]:
    """Latents whose peak stands out most over their mean, in the order of their peaks: what is always on says little."""
    table = _table(timeline)
    peak = {latent: max(column) - sum(column) / len(column) for latent, column in table.items()}
    chosen = sorted(peak, key=lambda latent: (-peak[latent], latent))[:count]
    return sorted(chosen, key=lambda latent: (int(np.argmax(table[latent])), latent))


def _table(timeline: Timeline) -> dict[int, list[float]]:
    """Of each latent that fired its activation at every step; 0 where it was not among the strongest."""
    table: dict[int, list[float]] = {}
    values = np.nan_to_num(np.asarray(timeline.values, np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    for step, (row, strength) in enumerate(zip(timeline.latents.tolist(), values.tolist(), strict=True)):
        for latent, value in zip(row, strength, strict=True):
            if value > 0:
                table.setdefault(latent, [0.0] * len(timeline.pieces))[step] = value
    return table


def write(
    directory: Path,
    timelines: Sequence[Timeline],
    *,
    title: str,
    facts: Mapping[str, str] | None = None,
    links: Mapping[str, str] | None = None,
    latent_page: str | None = None,
    names: Mapping[int, str] | None = None,
) -> Path:
    """A page for each timeline, named after its task, and index.html, whose path is returned.

    `links` are shown above the index, by what they are called. `latent_page` is the address of a latent's page as seen
    from `directory`, with {latent} in it; `names` says of some latents what they are.
    """
    files.fresh_directory(directory)
    paths = _file_names(timelines)
    for number, (path, timeline) in enumerate(zip(paths, timelines, strict=True)):
        around = _around(paths, number)
        files.write_text(directory / path, render(timeline, facts or {}, around, latent_page, names or {}))
    files.write_text(directory / "index.html", _index(title, timelines, paths, facts or {}, links or {}))
    return directory / "index.html"


def _file_names(timelines: Sequence[Timeline]) -> list[str]:
    """TASK.html, TASK-test1.html for a second test input; a number where that is no file's name."""
    names: list[str] = []
    for number, each in enumerate(timelines):
        plainly = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}", each.task.id) and each.task.id != "index"
        stem = (each.task.id if plainly else f"answer-{number}") + (f"-test{each.test}" if each.test else "")
        while f"{stem}.html" in names:
            stem += "-again"
        names.append(f"{stem}.html")
    return names


def _around(paths: Sequence[str], number: int) -> str:
    links = ['<a href="index.html">all answers</a>']
    links += [f'<a rel="prev" href="{paths[number - 1]}">previous</a>'] if number else []
    links += [f'<a rel="next" href="{paths[number + 1]}">next</a>'] if number + 1 < len(paths) else []
    return f'<nav aria-label="answers">{" · ".join(links)}</nav>'


def _index(
    title: str,
    timelines: Sequence[Timeline],
    paths: Sequence[str],
    facts: Mapping[str, str],
    links: Mapping[str, str],
) -> str:
    rows = []
    for path, each in zip(paths, timelines, strict=True):
        picture = (
            "" if each.answer is None else drawing.svg(each.answer, "answer", cell=max(2, 60 // max(each.answer.shape)))
        )
        rows.append(
            f'<tr><td>{picture}</td><th scope="row"><a href="{path}">{plain(each.name)}</a></th>'
            f'<td class="{"good" if each.outcome == "correct" else "bad"}">{plain(each.outcome)}</td>'
            f'<td class="n">{len(each.pieces)}</td><td class="n">{len(_table(each))}</td></tr>'
        )
    heads = "".join(
        f'<th scope="col">{name}</th>' for name in ("answer", "outcome", "tokens", "latents among the strongest")
    )
    table = f"<table><thead><tr><td></td>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    said = sheets.facts({name: plain(value) for name, value in facts.items()})
    others = " · ".join(f'<a href="{plain(address)}">{plain(name)}</a>' for name, address in links.items())
    nav = f'<nav aria-label="pages">{others}</nav>' if links else ""
    return sheets.page(title, f'{nav}<h1>{plain(title)}</h1>{said}<div class="wide">{table}</div>')


def render(
    timeline: Timeline,
    facts: Mapping[str, str],
    around: str = "",
    latent_page: str | None = None,
    names: Mapping[int, str] | None = None,
) -> str:
    """The page of one answer; `around` is HTML that leads to others."""
    columns, table = lanes(timeline), _table(timeline)
    said = {"outcome": timeline.outcome, "tokens": str(len(timeline.pieces)), **facts}
    body = (
        f"{around}<h1>{plain(timeline.name)}</h1>{sheets.facts({name: plain(value) for name, value in said.items()})}"
        f"{_puzzle(timeline)}<h2>The answer being computed</h2>{STAGE}"
        f'<p class="soft">A row is a token, a column a latent: the {len(columns)} whose peak stands out most over their '
        "mean, in the order of their peaks. Full colour is a latent's own peak; blank is not among the "
        f"{timeline.latents.shape[1]} strongest.</p>{_rows(timeline, columns, table)}"
    )
    data = {
        "shape": None if timeline.answer is None else list(timeline.answer.shape),
        "truth": _nested(timeline.task.test[timeline.test].output),
        "answer": _nested(timeline.answer),
        "steps": [_step(timeline, step) for step in range(len(timeline.pieces))],
        "lanes": {str(latent): [round(value, 4) for value in table[latent]] for latent in columns},
        "colours": drawing.PALETTE,
        "colourNames": COLOUR_NAMES,
        "page": latent_page,
        "names": {str(latent): name for latent, name in (names or {}).items()},
    }
    return sheets.page(timeline.name, body, style=STYLE, script=sheets.SAVING + SCRIPT, data=data)


def _nested(grid: arc.Grid | None) -> list[list[int]] | None:
    return None if grid is None else grid.tolist()


def _step(timeline: Timeline, step: int) -> dict[str, Any]:
    values = np.nan_to_num(timeline.values[step].astype(np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    fired = [(int(n), round(float(v), 4)) for n, v in zip(timeline.latents[step], values, strict=True) if v > 0]
    probability = float(np.nan_to_num(timeline.probabilities[step]))
    return {"piece": timeline.pieces[step], "cell": timeline.cells[step], "p": round(probability, 4), "top": fired}


def _puzzle(timeline: Timeline) -> str:
    task = timeline.task
    asked, truth = task.test[timeline.test].input, task.test[timeline.test].output
    pairs = [
        f'<div class="row">{drawing.figure(pair.input, f"train {n}, input")}{drawing.figure(pair.output, "output")}</div>'
        for n, pair in enumerate(task.train)
    ]
    panels: list[Panel] = prediction_row("test input", asked, timeline.answer, truth)
    titles = ("test input", f"what it wrote: {timeline.outcome}", "right answer")
    shown = (drawing.figure(panel.grid, title, panel.marks) for panel, title in zip(panels, titles, strict=True))
    return f'<h2>The puzzle</h2><div class="row pairs">{"".join(pairs)}</div><div class="row">{"".join(shown)}</div>'


def _rows(timeline: Timeline, columns: Sequence[int], table: Mapping[int, Sequence[float]]) -> str:
    """The table, complete without the script; it holds all that the stage shows but the weaker latents."""
    heads = "".join(
        f'<th scope="col"><button type="button" data-lane="{n}" aria-pressed="false">{n}</button></th>' for n in columns
    )
    peaks = {latent: max(table[latent]) for latent in columns}
    rows = []
    for step, (piece, cell) in enumerate(zip(timeline.pieces, timeline.cells, strict=True)):
        lit = "".join(_lane(table[latent][step], peaks[latent]) for latent in columns)
        where = "" if cell is None else f"{cell[0]}, {cell[1]}"
        text = plain(piece.replace("\n", "↵").replace(" ", "·"))
        rows.append(
            f'<tr data-step="{step}"><th scope="row">{step}</th><td><code>{text}</code></td><td>{where}</td>{lit}</tr>'
        )
    names = "".join(f'<th scope="col">{name}</th>' for name in ("step", "token", "cell"))
    return (
        '<div class="wide" tabindex="0" role="region" aria-label="latents of every step"><table id="steps">'
        f"<thead><tr>{names}{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def _lane(value: float, peak: float) -> str:
    return "<td></td>" if value <= 0 else f'<td style="--a:{max(0.08, value / peak):.2f}">{value:.2g}</td>'


STAGE = """<div id="stage" hidden><div class="row"><figure><svg id="grid" role="img" aria-label="the answer so far"></svg>
<figcaption id="painted">the answer so far</figcaption></figure><pre id="text" aria-hidden="true"></pre><div id="now">
<p><output id="said" aria-live="polite"></output></p><ol id="top"></ol></div></div><p class="controls">
<button type="button" id="back">previous</button> <label>step <input type="range" id="step" min="0" value="0"></label>
<button type="button" id="on">next</button> <button type="button" data-save="svg">save as SVG</button>
<button type="button" data-save="png">as PNG</button>
<span class="soft">or the arrow keys; a row or a latent can be clicked</span></p>
</div>"""

STYLE = """
.pairs{margin:4px 0 12px}h2{margin:18px 0 6px}
#stage{position:sticky;top:0;background:var(--paper);border-bottom:1px solid var(--line);padding:8px 0;z-index:1}
#stage[hidden]{display:none}#grid{width:min(38vw,16rem);height:auto;display:block}
#now{min-width:min(100%,17rem);flex:1}#now p{margin:0 0 4px;min-height:3em}
#text{max-width:18rem;max-height:14rem;margin:0;font-size:.8rem}
#top{margin:0;padding:0;list-style:none;max-height:13rem;overflow:auto;columns:2 11rem}
#top li{display:grid;grid-template-columns:4.5rem 1fr 3.5rem;gap:6px;align-items:center;break-inside:avoid}
#top .bar{height:8px;background:var(--up);border-radius:4px;min-width:1px}
.controls{display:flex;flex-wrap:wrap;gap:8px;align-items:center;margin:8px 0 0}
#step{width:min(60vw,26rem);vertical-align:middle}
#steps{font-size:.78rem}#steps td,#steps th{padding:1px 5px;text-align:right;white-space:nowrap;background-clip:padding-box}
#steps td[style]{background:rgba(var(--heat),calc(.75*var(--a)))}
#steps tr.now{outline:2px solid var(--up);outline-offset:-1px}#steps tbody tr{cursor:pointer;scroll-margin-top:22rem}
#steps button{font-size:.72rem;padding:0 4px}#steps button[aria-pressed=true]{background:var(--up);color:var(--paper)}
@media (max-width:640px){#stage{position:static}#text{display:none}}
"""

SCRIPT = """
const D=JSON.parse(document.getElementById('data').textContent),$=id=>document.getElementById(id),S=D.steps;
const NS='http://www.w3.org/2000/svg',rows=[...document.querySelectorAll('#steps tbody tr')];
const lanes=[...document.querySelectorAll('#steps button')];let at=S.length-1,lane=null;
const el=(name,given)=>{const e=document.createElementNS(NS,name);for(const k in given)e.setAttribute(k,given[k]);return e};
const named=n=>'latent '+n+(D.names[n]?', '+D.names[n]:'');
function grid(){
 const svg=$('grid');svg.replaceChildren();if(!D.shape){svg.parentNode.hidden=true;return}
 const[h,w]=D.shape,most=lane?Math.max(...D.lanes[lane]):1;svg.setAttribute('viewBox',`-.1 -.1 ${w+.2} ${h+.2}`);
 for(let r=0;r<h;r++)for(let c=0;c<w;c++)svg.append(el('rect',{x:c,y:r,width:1,height:1,fill:'none',stroke:'#8888',
  'stroke-width':.04}));
 S.slice(0,at+1).forEach((s,i)=>{if(!s.cell)return;const[r,c]=s.cell,wrong=D.truth&&(D.truth[r]||[])[c]!==D.answer[r][c];
  svg.append(el('rect',{x:c,y:r,width:1,height:1,fill:D.colours[D.answer[r][c]],stroke:'#555','stroke-width':.05}));
  if(wrong)for(const[ink,wide]of[['#000',.2],['#fff',.1]])svg.append(el('rect',{x:c+.14,y:r+.14,width:.72,height:.72,fill:'none',
   stroke:ink,'stroke-width':wide}));
  const a=lane?D.lanes[lane][i]/most:0;
  if(a>0)svg.append(el('circle',{cx:c+.5,cy:r+.5,r:.4*Math.sqrt(a),fill:'#fff',stroke:'#000','stroke-width':.08}));
  if(i==at)svg.append(el('rect',{x:c,y:r,width:1,height:1,fill:'none',stroke:'#e08e1b','stroke-width':.16}))});
 $('painted').textContent=lane?'the answer so far, dots: '+named(lane):'the answer so far'}
function top_(s){
 const most=Math.max(...s.top.map(t=>t[1]),1e-9);
 $('top').replaceChildren(...s.top.map(([n,v])=>{const li=document.createElement('li'),bar=document.createElement('span');
  const name=document.createElement(D.page?'a':'span'),value=document.createElement('span');
  if(D.page)name.href=D.page.replace('{latent}',n);name.textContent=n;name.title=named(n);
  if(!D.page)name.tabIndex=0;name.setAttribute('aria-label',named(n)+', '+v.toPrecision(3));
  bar.className='bar';bar.style.width=100*v/most+'%';value.textContent=v.toPrecision(3);
  value.setAttribute('aria-hidden','true');li.append(name,bar,value);return li}))}
function show(){
 const s=S[at];let told=`step ${at} of ${S.length-1}: ${JSON.stringify(s.piece)}, probability ${s.p}`;
 if(s.cell)told+=`; row ${s.cell[0]}, column ${s.cell[1]}: ${D.colourNames[D.answer[s.cell[0]][s.cell[1]]]}`;
 $('said').textContent=told;$('step').value=at;$('step').setAttribute('aria-valuetext',told);
 $('text').textContent=S.slice(0,at+1).map(t=>t.piece).join('');
 rows.forEach((r,i)=>r.classList.toggle('now',i==at));grid();top_(s)}
function to(i){at=Math.max(0,Math.min(S.length-1,i));show()}
if(S.length){
 $('stage').hidden=false;$('step').max=S.length-1;
 $('step').addEventListener('input',()=>to(+$('step').value));
 $('back').addEventListener('click',()=>to(at-1));$('on').addEventListener('click',()=>to(at+1));
 document.querySelectorAll('[data-save]').forEach(b=>b.addEventListener('click',()=>
  savePicture($('grid'),'answer-step-'+at,b.dataset.save)));
 rows.forEach((r,i)=>r.addEventListener('click',()=>to(i)));
 lanes.forEach(b=>{b.title=named(b.dataset.lane)+': paint it on the answer';b.addEventListener('click',()=>{
  lane=lane==b.dataset.lane?null:b.dataset.lane;lanes.forEach(o=>o.setAttribute('aria-pressed',o.dataset.lane==lane));show()})});
 document.addEventListener('keydown',e=>{const by={ArrowRight:1,ArrowLeft:-1}[e.key];
  if(by&&e.target.tagName!='INPUT'&&!e.altKey&&!e.ctrlKey&&!e.metaKey){to(at+by);e.preventDefault()}});show()}
"""
