"use strict";
// Elements and pictures. Every text is set as text, and every colour comes from the index or the style sheet.

const SVG = "http://www.w3.org/2000/svg";
const LEVELS = 8; // steps of the heat scale

function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key === "class") made.className = value;
    else if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

function drawn(name, attributes = {}, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

/** A number of three digits that count, never in powers of ten. */
function number(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0 || Math.abs(value) >= 1000) return String(Math.round(value));
  const digits = Math.max(0, 2 - Math.floor(Math.log10(Math.abs(value))));
  return value.toFixed(Math.min(digits, 8));
}

function percent(share) {
  return share === 0 ? "dead" : `${number(100 * share)} %`;
}

/** A token as it is read: line ends, tabs, spaces at its ends and control characters are spelled out. */
function readable(token) {
  let text = "";
  for (const each of token) {
    const code = each.codePointAt(0);
    if (each === "\n") text += "↵";
    else if (each === "\t") text += "→";
    else if (code < 32 || (code >= 127 && code < 160)) text += `\\x${code.toString(16).padStart(2, "0")}`;
    else if (code >= 0xd800 && code < 0xe000) text += `\\u${code.toString(16)}`;
    else if (code === 0xfffd) text += "\\ufffd";
    else text += each;
  }
  return text.replace(/^ +| +$/g, (spaces) => "·".repeat(spaces.length));
}

function facts(pairs) {
  return pairs.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value)));
}

function chips(pairs) {
  if (!pairs.length) return element("span", { class: "soft" }, "none");
  const list = element("ul", { class: "chips" });
  for (const [token, logit] of pairs) {
    const sign = logit < 0 ? "−" : "+";
    const value = element("small", {}, ` ${sign}${number(Math.abs(logit))}`);
    list.append(element("li", {}, element("code", {}, readable(token) || "␀"), value));
  }
  return list;
}

/** Bars with the ends of their axis; `said` is what a screen reader says. */
function bars(counts, low, high, said, width = 300, height = 70) {
  const most = Math.max(1, ...counts), step = width / Math.max(1, counts.length), floor = height - 16;
  const picture = drawn("svg", {
    class: "bars", viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": said,
  });
  counts.forEach((count, place) => {
    if (!count) return;
    const tall = Math.max(1, (floor * count) / most);
    const bar = drawn("rect", { x: place * step, y: floor - tall, width: Math.max(step - 1, 0.5), height: tall });
    bar.append(drawn("title", {}, String(count)));
    picture.append(bar);
  });
  picture.append(
    drawn("text", { x: 0, y: height - 3 }, low),
    drawn("text", { x: width, y: height - 3, "text-anchor": "end" }, high),
  );
  return picture;
}

/** The step of the heat scale that a value stands on, 1 to LEVELS; 0 where the latent is silent. */
function level(value, peak) {
  return value > 0 ? Math.max(1, Math.min(LEVELS, Math.ceil((LEVELS * value) / (peak || 1)))) : 0;
}

function heat(col, row, step) {
  const side = 0.34 + (0.36 * step) / LEVELS;
  return drawn("rect", {
    class: `heat h${step}`, x: col + (1 - side) / 2, y: row + (1 - side) / 2, width: side, height: side,
  });
}

/** Cells in the puzzle's colours; where the latent fires an inner square, darker and larger the stronger. */
function picture(cells, colours, said, values = null, peak = 1) {
  const rows = cells.length, cols = rows ? cells[0].length : 0;
  const size = Math.max(9, Math.min(26, Math.floor(230 / Math.max(rows, cols, 1))));
  const made = drawn("svg", {
    class: "grid", viewBox: `0 0 ${cols} ${rows}`, width: cols * size, height: rows * size, role: "img",
    "aria-label": said,
  });
  const runs = new Map();
  cells.forEach((line, row) => {
    for (let start = 0; start < cols; ) {
      let end = start + 1;
      while (end < cols && line[end] === line[start]) end += 1;
      const run = `M${start} ${row}h${end - start}v1h-${end - start}z`;
      runs.set(line[start], (runs.get(line[start]) || "") + run);
      start = end;
    }
  });
  for (const [colour, path] of runs) made.append(drawn("path", { fill: colours[colour], d: path }));
  let lines = "";
  for (let row = 1; row < rows; row += 1) lines += `M0 ${row}h${cols}`;
  for (let col = 1; col < cols; col += 1) lines += `M${col} 0v${rows}`;
  made.append(drawn("path", { class: "lines", d: lines }));
  (values || []).forEach((value, at) => {
    if (!(value > 0)) return;
    const square = heat(at % cols, Math.floor(at / cols), level(value, peak));
    square.append(drawn("title", {}, number(value)));
    made.append(square);
  });
  return made;
}

/** The heat scale with its numbers. */
function legend(peak) {
  const made = drawn("svg", {
    class: "legend", viewBox: `0 0 ${LEVELS} 1`, width: LEVELS * 22, height: 22, role: "img",
    "aria-label": `heat scale: from a small pale square near 0 to a large dark one at ${number(peak)}`,
  });
  for (let step = 1; step <= LEVELS; step += 1) made.append(heat(step - 1, 0, step));
  const ends = [element("span", {}, "weak, above 0"), made, element("span", {}, `${number(peak)}, its peak`)];
  return element("p", { class: "scale" }, ...ends, element("span", { class: "soft" }, "no square: silent"));
}
