"""The frame of a page that is opened from a directory: one file, light and dark, nothing fetched, texts only as texts."""

import html
import json
from collections.abc import Mapping
from typing import Any

# texts that are shown come from models and files: none of them may name a place to send anything to
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:"

STYLE = """
:root{color-scheme:light dark;--ink:#1c1b19;--soft:#5f5c56;--paper:#faf9f6;--card:#fff;--line:#dedad2;--up:#1b6ca8;
--good:#17702a;--bad:#a31515;--heat:27,108,168}
@media (prefers-color-scheme:dark){:root{--ink:#eceae6;--soft:#b0aca4;--paper:#181715;--card:#22211e;--line:#403d38;
--up:#7cc0f2;--good:#7bd88f;--bad:#ff9c92;--heat:90,170,235}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:84rem;padding:20px clamp(10px,3vw,28px) 60px;background:var(--paper);color:var(--ink);
font:15px/1.5 system-ui,sans-serif;overflow-wrap:break-word}
h1,h2,dd{overflow-wrap:anywhere}
h1{font-size:1.5rem;margin:0 0 8px}h2{font-size:1.15rem;margin:0}h3{font-size:1rem;margin:14px 0 4px}
a{color:var(--up)}:focus-visible{outline:3px solid var(--up);outline-offset:2px}
dl{display:flex;flex-wrap:wrap;gap:4px 26px;margin:6px 0}dt{color:var(--soft);font-size:.85rem}dd{margin:0;font-weight:600}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:2px 12px 2px 0;text-align:left;vertical-align:top}
thead th{border-bottom:1px solid var(--line);color:var(--soft);font-weight:500}td.n,th.n{text-align:right}
.wide{overflow-x:auto}figure{margin:0}figcaption{color:var(--soft);font-size:.85rem}
.row{display:flex;flex-wrap:wrap;gap:12px 22px;align-items:flex-start}
.good{color:var(--good);font-weight:600}.bad{color:var(--bad);font-weight:600}.soft{color:var(--soft)}
pre{background:var(--card);border:1px solid var(--line);padding:8px;overflow:auto;white-space:pre-wrap;
overflow-wrap:anywhere;max-height:24em;margin:4px 0 10px}
summary{cursor:pointer;color:var(--up)}
input,select,button{font:inherit;color:inherit;background:var(--card);border:1px solid var(--soft);border-radius:6px;
padding:3px 8px}
button{cursor:pointer}
"""

SAVING = """
function savePicture(svg,name,kind){
 const copy=svg.cloneNode(true),{width,height}=svg.getBoundingClientRect();
 const all=e=>[e,...e.querySelectorAll('*')],to=all(copy);
 all(svg).forEach((e,i)=>{const s=getComputedStyle(e);  // what style sheets say does not go with the file
  for(const k of ['fill','stroke','stroke-width','opacity','font-size','font-family'])to[i].style.setProperty(k,
   s.getPropertyValue(k))});
 copy.setAttribute('xmlns','http://www.w3.org/2000/svg');copy.setAttribute('width',width);copy.setAttribute('height',height);
 const text=new XMLSerializer().serializeToString(copy)  // a token may be what XML cannot hold
  .replace(/[\\u0000-\\u0008\\u000b\\u000c\\u000e-\\u001f\\ud800-\\udfff]/gu,'?');
 const give=blob=>{const a=document.createElement('a');
  a.href=URL.createObjectURL(blob);a.download=name+'.'+kind;a.click();setTimeout(()=>URL.revokeObjectURL(a.href),9999)};
 if(kind=='svg')return give(new Blob([text],{type:'image/svg+xml'}));
 const image=new Image();image.onload=()=>{const c=document.createElement('canvas'),pen=c.getContext('2d');
  c.width=2*width;c.height=2*height;pen.fillStyle=getComputedStyle(document.body).backgroundColor;
  pen.fillRect(0,0,c.width,c.height);pen.drawImage(image,0,0,c.width,c.height);c.toBlob(give)};
 image.src='data:image/svg+xml;charset=utf-8,'+encodeURIComponent(text)}
"""  # a picture as it is seen, as a file


def page(title: str, body: str, *, style: str = "", script: str = "", data: Mapping[str, Any] | None = None) -> str:
    """The whole file; `data` is what the script reads from the element `data`, its texts as they are."""
    # no text can end the element that holds it
    told = "" if data is None else json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    embedded = f'<script type="application/json" id="data">{told}</script>' if told else ""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{plain(title)}</title><style>{STYLE}{style}</style></head>\n<body>\n"
        f"{body}{embedded}{f'<script>{script}</script>' if script else ''}\n</body></html>\n"
    )


def facts(pairs: Mapping[str, str]) -> str:
    """A list of names with what is said of each; values are HTML."""
    return "<dl>" + "".join(f"<div><dt>{plain(k)}</dt><dd>{v}</dd></div>" for k, v in pairs.items()) + "</dl>"


def plain(text: object) -> str:
    """A text that may stand in HTML, in an attribute too; what has no look of its own is spelled out."""
    seen = "".join(each if each.isprintable() or each == "\n" else f"\\x{ord(each):02x}" for each in str(text))
    return html.escape(seen, quote=True)
