"""A graph as one HTML file that needs nothing else: the model's layers over the tokens, and the grids below.

Nodes are pinned and put into groups by clicking, edges are listed by weight, a slider prunes. Groups are kept by the
browser, and by the graph's own file where they were given. Every text is data: the page's script only sets it as text.
"""

import html
import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from qwen_lab import sheets
from qwen_lab.circuits.nodes import Features
from sae.evaluation.gallery import COLOURS


class Grid(TypedDict):
    """A grid of the prompt: colours, and of each cell the position of its token (−1: after the prompt)."""

    title: str
    cells: list[list[int]]
    positions: list[list[int]]


FACTS = (
    "model",
    "transcoders",
    "what",
    "active_features",
    "traced_features",
    "replacement_score",
    "completeness_score",
)


def render(
    title: str,
    described: Mapping[str, Any],
    fired: Features,
    facts: Mapping[str, Any],
    grids: Sequence[Grid],
) -> str:
    """The page of a graph in Neuronpedia's JSON, painted on its text and grids.

    Painted is by how much the logits are reached from each token (`facts["reach"]`), or where a chosen feature fires, or
    the positions that a chosen node is fed from. `facts["pages"]` is the address of a feature's page, with {layer} and
    {latent} in it.
    """
    shown = {(int(layer), int(index)) for layer, index, _ in map(_parts, described["nodes"]) if layer.isdigit()}
    fires: dict[str, list[list[float]]] = {}
    for layer, position, latent, value in zip(fired.layer, fired.position, fired.latent, fired.value, strict=True):
        if (int(layer), int(latent)) in shown:
            fires.setdefault(f"{layer}_{latent}", []).append([int(position), round(float(value), 3)])
    more = {"fires": fires, "reach": facts.get("reach", {}), "pages": facts.get("pages")}
    data = {**described, **more, "grids": list(grids), "colours": COLOURS}
    told = {name: facts[name] for name in FACTS if facts.get(name) is not None}
    spelled = "".join(
        f"<div><dt>{html.escape(name.replace('_', ' '))}</dt><dd>{html.escape(_said(value))}</dd></div>"
        for name, value in told.items()
    )
    embedded = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c")  # no text can end the script
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{sheets.POLICY}">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>"
        f"<header><h1>{html.escape(title)}</h1><dl>{spelled}</dl>{CONTROLS}</header>"
        f'<main><div id="stage"></div><aside id="side"></aside></main><div id="grids"></div><p id="text"></p>'
        f'<script type="application/json" id="data">{embedded}</script>'
        f"<script>{sheets.SAVING}{SCRIPT}</script></body></html>\n"
    )


def _parts(node: Mapping[str, Any]) -> list[str]:
    return str(node["node_id"]).split("_")


def _said(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


CONTROLS = """<p class="controls"><label>nodes that make up <input type="range" id="share" min="0.05" max="1"
 step="0.01" value="0.6"> <output id="said"></output> of the influence</label> <input id="label"
 placeholder="name of a group" size="18"><button id="group">group the pinned nodes</button><button id="clear">unpin
 all</button> <button data-save="svg">save as SVG</button><button data-save="png">as PNG</button>
 <span id="groups"></span></p>"""

STYLE = """
:root{--ink:#1c1b19;--soft:#6d6a64;--paper:#faf9f6;--card:#fff;--line:#e4e1da;--up:#1b6ca8;--down:#d1495b;--pin:#e08e1b}
*{box-sizing:border-box}
body{margin:0;padding:20px 24px 60px;background:var(--paper);color:var(--ink);font:14px/1.45 system-ui,sans-serif}
h1{font-size:22px;margin:0 0 8px}h2{font-size:15px;margin:12px 0 4px}dl{display:flex;flex-wrap:wrap;gap:4px 24px;margin:0}
dt{color:var(--soft);font-size:12px}dd{margin:0;font-weight:600}
main{display:flex;gap:16px;align-items:flex-start;margin-top:8px}
#stage,aside{background:var(--card);border:1px solid var(--line);border-radius:8px;overflow:auto}
#stage{flex:1;min-width:0}aside{width:340px;max-height:72vh;padding:10px 14px;flex:none}
aside div.row{display:flex;gap:8px;cursor:pointer;border-top:1px solid var(--line)}aside div.row:hover{background:#f4f1ea}
aside .w{width:64px;text-align:right;font-variant-numeric:tabular-nums}
.up{color:var(--up)}.down{color:var(--down)}
svg{display:block}svg text{font:11px ui-monospace,Menlo,monospace;fill:var(--soft)}
.node{fill:#cfcabf;stroke:#fff;cursor:pointer}.node.error{fill:#fff;stroke:#b5b0a6}.node.lit{fill:var(--up)}
.node.pinned{stroke:var(--pin);stroke-width:2.5}.node.chosen{fill:var(--ink)}
line{stroke:var(--up);pointer-events:none}line.minus{stroke:var(--down)}line.faint{opacity:.18}
#grids{display:flex;flex-wrap:wrap;gap:16px;align-items:flex-end;margin-top:14px}
figure{margin:0}figcaption{color:var(--soft);font-size:12px}#grids rect{cursor:pointer}
#text{font:13px/1.7 ui-monospace,Menlo,monospace;white-space:pre-wrap;overflow-wrap:anywhere}#text span{cursor:pointer}
button.chip{border:1px solid var(--pin);background:none;border-radius:10px;margin-right:4px;cursor:pointer}
"""

SCRIPT = """
const G=JSON.parse(document.getElementById('data').textContent),$=i=>document.getElementById(i);
const NS='http://www.w3.org/2000/svg',byId={},ins={},outs={};
const el=(n,a={},t)=>{const e=n in{svg:1,circle:1,rect:1,line:1,text:1,title:1,path:1}?document.createElementNS(NS,n):
 document.createElement(n);for(const k in a)k=='on'?e.addEventListener('click',a[k]):e.setAttribute(k,a[k]);
 if(t!==undefined)e.textContent=t;return e};
const depth=n=>n.layer=='E'?-1:+n.layer,tok=p=>JSON.stringify(G.metadata.prompt_tokens[p]);
const top_=Math.max(...G.nodes.map(depth));
for(const n of G.nodes){byId[n.node_id]=n;ins[n.node_id]=[];outs[n.node_id]=[]}
for(const l of G.links){ins[l.target].push(l);outs[l.source].push(l)}
const big=ls=>ls.sort((a,b)=>Math.abs(b.weight)-Math.abs(a.weight));
const kept='circuit '+G.metadata.slug+' '+G.nodes.length+' '+G.links.length;
let pins=new Set(G.qParams.pinnedIds),chosen=null,groups=G.qParams.supernodes.slice();
try{groups=JSON.parse(localStorage.getItem(kept))||groups}catch(e){}
const name=n=>n.feature_type=='logit'?n.clerp:n.feature_type=='embedding'?'token '+tok(n.ctx_idx):
 (n.feature==-1?'error':'feature '+n.node_id.split('_')[1])+', layer '+n.layer+', at '+n.ctx_idx+' '+tok(n.ctx_idx);
const shown=n=>n.feature_type=='logit'||n.node_id==chosen||pins.has(n.node_id)||(n.influence!==null&&
 n.influence<=+$('share').value&&(n.feature_type!='embedding'||outs[n.node_id].length));
function values(){const v={},n=byId[chosen];
 if(n&&n.activation!==null)for(const[p,x]of G.fires[n.node_id.split('_').slice(0,2).join('_')]||[])v[p]=x;
 else if(n)for(const l of ins[chosen])v[byId[l.source].ctx_idx]=(v[byId[l.source].ctx_idx]||0)+Math.abs(l.weight);
 return n?v:G.reach}
function draw(){
 $('said').textContent=Math.round(100*$('share').value)+' %';
 const ns=G.nodes.filter(shown),cells={},cols=[...new Set(ns.map(n=>n.ctx_idx))].sort((a,b)=>a-b);
 for(const n of ns)(cells[n.ctx_idx+' '+depth(n)]??=[]).push(n);
 const width={},xs={},H=34,gap=13;let x=46;
 for(const p of cols){let w=1;for(let d=-1;d<=top_;d++)w=Math.max(w,(cells[p+' '+d]||[]).length);
  width[p]=Math.min(w,6);xs[p]=x;x+=width[p]*gap+10}
 const rowsOf={};let y=10;const ys={};
 for(let d=top_;d>=-1;d--)if(d!=top_-1){let r=1;for(const p of cols)r=Math.max(r,Math.ceil((cells[p+' '+d]||[]).length/6));
  ys[d]=y;y+=r*gap+H-gap}
 const at=n=>{const i=cells[n.ctx_idx+' '+depth(n)].indexOf(n);
  return[xs[n.ctx_idx]+(i%6)*gap+6,ys[depth(n)]+Math.floor(i/6)*gap+8]};
 const svg=el('svg',{width:x+10,height:y+56});
 for(const d in ys)svg.append(el('text',{x:4,y:ys[d]+12},d<0?'tokens':d==top_?'logits':'MLP '+d));
 for(const p of cols)svg.append(el('text',{x:xs[p]+4,y:y+4,transform:`rotate(55 ${xs[p]+4} ${y+4})`},p+' '+tok(p)));
 const mine=chosen&&byId[chosen]?[...ins[chosen],...outs[chosen]]:G.links,vis=new Set(ns.map(n=>n.node_id));
 const ls=big(mine.filter(l=>vis.has(l.source)&&vis.has(l.target))).slice(0,chosen?80:160);
 const most=ls.length?Math.abs(ls[0].weight):1;
 for(const l of ls.reverse()){const[a,b]=at(byId[l.source]),[c,d]=at(byId[l.target]);
  svg.append(el('line',{x1:a,y1:b,x2:c,y2:d,'stroke-width':.4+3*Math.abs(l.weight)/most,
   class:(l.weight<0?'minus ':'')+(chosen?'':'faint')}))}
 const lit=new Set(chosen?mine.flatMap(l=>[l.source,l.target]):[]);
 for(const n of ns){const[a,b]=at(n),c='node'+(n.feature==-1?' error':'')+(lit.has(n.node_id)?' lit':'')+
   (pins.has(n.node_id)?' pinned':'')+(n.node_id==chosen?' chosen':'');
  const sq=n.feature_type=='embedding'||n.feature_type=='logit';
  const e=sq?el('rect',{x:a-4.5,y:b-4.5,width:9,height:9,class:c}):el('circle',{cx:a,cy:b,r:5,class:c});
  e.append(el('title',{},name(n)));e.addEventListener('click',v=>pick(n.node_id,v.shiftKey));svg.append(e)}
 $('stage').replaceChildren(svg);side();paint()}
function row(l,id){const n=byId[id],r=el('div',{class:'row',on:v=>pick(id,v.shiftKey)});
 r.append(el('span',{class:'w '+(l.weight<0?'down':'up')},l.weight.toPrecision(3)),el('span',{},name(n)));return r}
function side(){const s=$('side'),n=byId[chosen];s.replaceChildren();
 if(!n){s.append(el('h2',{},'Click a node, a cell or a token; with shift it is pinned.'));
  for(const t of G.nodes)if(t.feature_type=='logit'){s.append(el('h2',{},t.clerp));
   big(ins[t.node_id]).slice(0,25).forEach(l=>s.append(row(l,l.source)))}return}
 s.append(el('h2',{},name(n)));
 if(n.activation!==null){s.append(el('div',{},'fires with '+n.activation.toPrecision(4)+' here'));
  if(G.pages){const[a,b]=n.node_id.split('_');
   s.append(el('a',{href:G.pages.replace('{layer}',a).replace('{latent}',b)},'its page'))}}
 s.append(el('button',{on:()=>pick(chosen,true)},pins.has(chosen)?'unpin':'pin'));
 for(const[t,ls,k]of[['from',ins[chosen],'source'],['to',outs[chosen],'target']])if(ls.length){
  s.append(el('h2',{},t+' ('+ls.length+')'));big(ls).slice(0,60).forEach(l=>s.append(row(l,l[k])))}}
function paint(){const v=values(),most=Math.max(1e-9,...Object.values(v)),g=$('grids');g.replaceChildren();
 for(const{title,cells,positions}of G.grids){const f=el('figure'),h=cells.length,w=cells[0].length,
   s=el('svg',{width:w*22,height:h*22,viewBox:`0 0 ${w} ${h}`});
  cells.forEach((r,i)=>r.forEach((c,j)=>{const p=positions[i][j],a=p<0?0:(v[p]||0)/most;
   s.append(el('rect',{x:j,y:i,width:1,height:1,fill:G.colours[c],stroke:'#fff','stroke-width':.05,'fill-opacity':
    p<0?.15:1,on:()=>atPosition(p)}));
   if(a>.02)s.append(el('circle',{cx:j+.5,cy:i+.5,r:.38*Math.sqrt(a),fill:'#fff',stroke:'#111','stroke-width':.08,
    'pointer-events':'none'}))}));
  f.append(s,el('figcaption',{},title));g.append(f)}
 const t=$('text');t.replaceChildren();G.metadata.prompt_tokens.forEach((x,p)=>{const a=(v[p]||0)/most;
  t.append(el('span',{style:a>.02?`background:rgba(27,108,168,${(.15+.6*a).toFixed(2)})`:'',title:p,on:()=>atPosition(p)},x))})}
function atPosition(p){const n=G.nodes.find(n=>n.feature_type=='embedding'&&n.ctx_idx==p);if(n)pick(n.node_id,false)}
function pick(id,pin){if(pin)pins.has(id)?pins.delete(id):pins.add(id);else chosen=chosen==id?null:id;draw()}
function chips(){$('groups').replaceChildren(...groups.map((g,i)=>{const b=el('button',{class:'chip',title:
  'pins its nodes; with shift it is dissolved',on:v=>{if(v.shiftKey){groups.splice(i,1);keep()}
  else{pins=new Set(g.slice(1).filter(x=>x in byId));draw()}chips()}},g[0]+' ('+(g.length-1)+')');return b}))}
function keep(){try{localStorage.setItem(kept,JSON.stringify(groups))}catch(e){}}
$('group').addEventListener('click',()=>{if(pins.size){groups.push([$('label').value||'group '+(groups.length+1),...pins]);
 keep();chips()}});
document.querySelectorAll('[data-save]').forEach(b=>b.addEventListener('click',()=>
 savePicture($('stage').firstChild,'circuit',b.dataset.save)));
$('clear').addEventListener('click',()=>{pins.clear();draw()});
$('share').addEventListener('input',draw);chips();draw();
$('stage').scrollLeft=1e9;  // the last tokens stand beside the answer
"""
