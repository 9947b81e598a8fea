"use strict";
// The page of one latent. `site` is what data/index.js holds; documents come when an example is drawn.

const KINDS = { turned: "turned or mirrored", recoloured: "recoloured", reordered: "training pairs in another order" };

/** The whole article, once the documents of its examples are there. */
async function article(site, dictionary, latent, around) {
  const used = new Set();
  for (const one of latent.examples) {
    used.add(one.document);
    if (one.own) used.add(one.own.document);
  }
  if (latent.steered) used.add(latent.steered.document);
  const names = [...used].map((at) => `documents/${String(at).padStart(4, "0")}`);
  const documents = new Map();
  const loaded = await Promise.all(names.map(load));
  [...used].forEach((at, place) => documents.set(at, loaded[place]));
  const heading = element("h1", { tabindex: "-1" }, `Latent ${latent.latent} `);
  heading.append(element("small", {}, `${dictionary.name}${dictionary.layer ? `, layer ${dictionary.layer}` : ""}`));
  const notes = new Map(dictionary.notes);
  const peak = latent.peak;
  return [
    around, heading,
    element("dl", {}, ...facts([
      ["density", percent(latent.density)], ["mean where it fires", number(latent.mean)], ["peak", number(peak)],
    ])),
    element("div", { class: "figures" },
      element("div", { class: "stack" }, histogram(site, latent), invariance(latent, notes)),
      matched(latent, notes), logits(latent, notes),
      others(dictionary, "Nearest decoder rows", "cosine", latent.near, notes.get("near")),
      others(dictionary, "Fires together with", "share of positions", latent.together, notes.get("together"))),
    steering(site, latent, documents, notes),
    examples(site, latent, documents, notes),
  ];
}

function panel(title, note, ...children) {
  const made = element("section", { class: "panel" }, element("h2", {}, title), ...children);
  if (note) made.append(element("p", { class: "note" }, note));
  return made;
}

function missing(notes, name) {
  return element("p", { class: "soft" }, notes.get(name) || "It was not computed.");
}

function histogram(site, latent) {
  const { first, counts } = latent.histogram;
  const low = number(site.edges[first]), high = number(site.edges[first + counts.length]);
  const total = counts.reduce((sum, count) => sum + count, 0);
  const said = `histogram of ${total} values where it fires, from ${low} to ${high}, logarithmic`;
  const shown = total ? bars(counts, low, high, said) : element("p", { class: "soft" }, "It never fired.");
  return panel("Values where it fires", "", shown);
}

function logits(latent, notes) {
  const none = !latent.promoted.length && !latent.suppressed.length;
  if (none) return panel("Logit effect", "", missing(notes, "promoted"));
  return panel("Logit effect", notes.get("promoted"), element("h3", {}, "promotes"), chips(latent.promoted),
    element("h3", {}, "suppresses"), chips(latent.suppressed));
}

function matched(latent, notes) {
  if (!latent.matches.length) return panel("Plain properties", "", missing(notes, "matches"));
  const controls = latent.matches[0][2].map(([name]) => name);
  const head = ["property", "F1", ...controls].map((name) => element("th", { scope: "col" }, name));
  const body = latent.matches.map(([name, f1, beside]) => element("tr", {},
    element("th", { scope: "row" }, name), element("td", { class: "n" }, number(f1)),
    ...beside.map(([, value]) => element("td", { class: "n" }, number(value)))));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody", {}, ...body));
  const wide = element("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Plain properties" }, table);
  const made = panel("Plain properties", notes.get("matches"), wide);
  made.classList.add("broad");
  return made;
}

function others(dictionary, title, unit, pairs, note) {
  if (!pairs.length) return panel(title, "", element("p", { class: "soft" }, note || "None."));
  const list = element("ol", { class: "others" });
  for (const [latent, value] of pairs) {
    const link = element("a", { href: `#/${dictionary.key}/${latent}` }, `latent ${latent}`);
    list.append(element("li", {}, link, element("span", { class: "n" }, ` ${number(value)}`)));
  }
  return panel(`${title} (${unit})`, note, list);
}

function invariance(latent, notes) {
  if (!latent.invariance.length) return panel("Invariance", "", missing(notes, "invariance"));
  const rows = latent.invariance.map(([kind, value]) => [KINDS[kind] || kind, value === null ? "silent" : number(value)]);
  return panel("Invariance", notes.get("invariance"), element("dl", { class: "list" }, ...facts(rows)));
}

function verdict(answer) {
  const kind = { right: "right", wrong: "wrong" }[answer.verdict] || "none";
  return element("span", { class: `verdict ${kind}` }, answer.verdict);
}

/** A model's answer as a grid, or as text where it is none. */
function answered(site, title, answer) {
  const caption = element("figcaption", {}, `${title} `, verdict(answer));
  const grid = answer.grid && answer.grid.length
    ? picture(answer.grid.map((row) => row.join("")), site.colours, `${title}: ${spelled(answer.grid)}`)
    : element("code", { class: "text" }, answer.text.split("\n").map(readable).join("\n") || "nothing");
  return element("figure", {}, grid, caption);
}

function spelled(grid) {
  return `${grid.length} by ${grid[0].length} cells, rows ${grid.map((row) => row.join("")).join(", ")}`;
}

function steering(site, latent, documents, notes) {
  if (!latent.steered) return panel("Steering", "", missing(notes, "steered"));
  const { document: at, value, after } = latent.steered;
  const text = documents.get(at), same = text.answer && text.answer.text === after.text;
  const said = `${text.title}, with ${number(value)} times its direction added at every position` +
    (same ? ": the answer stays the same." : ": the answer changes.");
  const grids = [text.answer && answered(site, "before", text.answer), answered(site, "after", after)];
  const shown = element("div", { class: "grids" }, ...grids.filter(Boolean));
  return panel("Steering", notes.get("steered"), element("p", {}, said), shown);
}

function examples(site, latent, documents, notes) {
  const made = element("section", { class: "examples" }, element("h2", {}, "What it fires on"), legend(latent.peak));
  if (!latent.examples.length) made.append(element("p", { class: "soft" }, notes.get("examples") || "It never fired."));
  for (const one of latent.examples) made.append(example(site, one, documents, latent.peak));
  return made;
}

function example(site, one, documents, peak) {
  const text = documents.get(one.document), values = dense(one, text);
  const top = Math.max(0, ...one.values);
  const title = element("h3", {}, `${text.title} `, element("small", {}, `${one.why}, up to ${number(top)}`));
  if (text.link) title.append(" ", element("a", { href: text.link }, "the task"));
  const made = element("section", { class: "example" }, title);
  const row = element("div", { class: "grids" });
  for (const [group, grids] of grouped(text.grids)) {
    const shown = grids.map((grid) => painted(site, text, grid, values, peak));
    row.append(element("div", { class: "pair", role: "group", "aria-label": group },
      element("p", { class: "group" }, group), element("div", { class: "grids" }, ...shown)));
  }
  if (text.answer) row.append(own(site, one, text, documents, peak));
  made.append(row, folded(text, values, peak));
  return made;
}

/** What the model itself wrote for this document, with what the latent does when that is read. */
function own(site, one, text, documents, peak) {
  const group = element("div", { class: "pair", role: "group", "aria-label": "the model's answer" },
    element("p", { class: "group" }, "the model's answer"));
  const same = text.answer.read === one.document, fired = same ? one : one.own;
  const read = same ? text : one.own && documents.get(one.own.document);
  if (!read) group.append(element("div", { class: "grids" }, answered(site, "written", text.answer)));
  else {
    const last = read.grids[read.grids.length - 1];
    const figure = painted(site, read, { ...last, title: "written" }, dense(fired, read), peak);
    figure.querySelector("figcaption").append(" ", verdict(text.answer));
    group.append(element("div", { class: "grids" }, figure));
  }
  return group;
}

function dense(fired, text) {
  const values = new Float32Array(text.tokens.length);
  fired.tokens.forEach((token, at) => { values[token] = fired.values[at]; });
  return values;
}

function grouped(grids) {
  const groups = new Map();
  for (const grid of grids) {
    if (!groups.has(grid.group)) groups.set(grid.group, []);
    groups.get(grid.group).push(grid);
  }
  return groups;
}

/** A grid with the largest activation among the tokens of each cell; one of the answer has a frame. */
function painted(site, text, grid, values, peak) {
  const cols = grid.cells.length ? grid.cells[0].length : 0, cells = [];
  let first = text.tokens.length, best = 0, where = 0;
  for (let at = 0; at < grid.tokens.length / 2; at += 1) {
    let value = 0;
    for (let token = grid.tokens[2 * at]; token < grid.tokens[2 * at + 1]; token += 1) value = Math.max(value, values[token]);
    first = Math.min(first, grid.tokens[2 * at]);
    if (value > best) [best, where] = [value, at];
    cells.push(value);
  }
  const fires = cells.filter((value) => value > 0).length;
  const place = `row ${Math.floor(where / cols) + 1}, column ${(where % cols) + 1}`;
  const said = `${grid.group}, ${grid.title}, ${grid.cells.length} by ${cols} cells: ` +
    (fires ? `fires on ${fires}, most on ${place} with ${number(best)}` : "silent");
  const answer = first >= text.prompt;
  const caption = element("figcaption", {}, grid.title, answer ? element("small", {}, " · generated") : "");
  return element("figure", { class: answer ? "generated" : "" },
    picture(grid.cells, site.colours, said, cells, peak), caption);
}

/** The text below, made when it is opened; where the answer begins is marked. */
function folded(text, values, peak) {
  const box = element("details", {}, element("summary", {}, `Text, ${text.tokens.length} tokens`));
  box.addEventListener("toggle", () => {
    if (!box.open || box.querySelector("p")) return;
    const shown = element("p", { class: "text" });
    text.tokens.forEach((token, at) => {
      if (at === text.prompt) shown.append(element("span", { class: "begin" }, "generated from here"), "\n");
      const said = readable(token).replaceAll("↵", "↵\n");
      if (values[at] > 0) {
        const step = level(values[at], peak);
        shown.append(element("mark", { class: `h${step}`, title: number(values[at]) }, said));
      } else shown.append(said);
    });
    box.append(shown);
  });
  return box;
}
