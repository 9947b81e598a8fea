"use strict";
// The index, and the way to a latent: `#/` is the list, `#/dictionary/latent` one page. Data come when asked for.

const ROWS = 100; // of the table at once
const waiting = new Map();
const at = (id) => document.getElementById(id);
let site = null, shown = [], total = 0, page = 0, like = null, latest = 0;

/** Every file of data is one call of this with its own name. */
function receive(name, value) {
  waiting.get(name)?.done(value);
}

/** What data/NAME.js holds, read once: a page from the file system may add scripts, and may not fetch. */
function load(name) {
  if (!waiting.has(name)) {
    const entry = {};
    entry.promise = new Promise((done, failed) => {
      entry.done = done;
      const script = element("script", { src: `data/${name}.js` });
      script.addEventListener("error", () => {
        waiting.delete(name);
        failed(new Error(`data/${name}.js could not be read: it was not written to its end, or was moved in parts`));
      });
      script.addEventListener("load", () => script.remove());
      document.head.append(script);
    });
    waiting.set(name, entry);
  }
  return waiting.get(name).promise;
}

function complain(error) {
  at("wrong").textContent = error.message;
  at("wrong").hidden = false;
}

/** The rows of the chosen layer, or of all: each an object that knows its dictionary and its place there. */
async function rowsOf(key) {
  const chosen = site.dictionaries.filter((one) => key === "*" || one.key === key);
  const columns = await Promise.all(chosen.map((one) => load(`${one.key}/index`)));
  return chosen.flatMap((dictionary, which) => {
    const of = columns[which];
    dictionary.rows ??= of.latent.map((latent, place) => ({
      dictionary, place, latent, density: of.density[place], peak: of.peak[place], f1: of.f1[place],
      twin: of.twin[place], invariance: of.invariance[place], steered: of.steered[place],
      property: of.properties[of.property[place]] ?? "", promotes: of.promotes[place],
    }));
    return dictionary.rows;
  });
}

function filters() {
  const value = (id, otherwise) => (at(id).value === "" ? otherwise : Number(at(id).value));
  const words = at("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const low = value("low", 0) / 100, high = value("high", 100) / 100, f1 = value("f1", 0), twin = value("twin", -1);
  const property = at("property").value, steered = at("steered").checked;
  const found = (row) => words.every((word) => (/^\d+$/.test(word) && String(row.latent) === word) ||
    row.property.toLowerCase().includes(word) || row.promotes.some((token) => token.toLowerCase().includes(word)));
  return (row) => row.density >= low && row.density <= high && row.f1 >= f1 && row.twin >= twin &&
    (!property || row.property === property) && (!steered || row.steered) &&
    (!like || (row.dictionary.key === like.key && like.cosines.has(row.latent))) && found(row);
}

async function list() {
  const turn = ++latest;
  at("wrong").hidden = true;
  try {
    const rows = await rowsOf(at("layer").value);
    const near = await similar(rows);
    if (turn !== latest) return; // something else was asked for meanwhile
    like = near;
    shown = rows.filter(filters());
    const order = at("order").value, falls = !order.startsWith("-"), name = order.replace("-", "");
    const key = like ? (row) => like.cosines.get(row.latent) : (row) => row[name] ?? -2;
    shown.sort((a, b) => (falls || like ? key(b) - key(a) : key(a) - key(b)) || a.latent - b.latent);
    page = 0;
    total = rows.length;
    const one = site.dictionaries.find((each) => each.key === at("layer").value);
    at("facts").replaceChildren(...facts([...site.facts, ...(one ? one.facts : [])]));
    offer(rows);
    table();
  } catch (error) {
    complain(error);
  }
}

/** The nearest rows of the latent asked for, which its own page names. */
async function similar(rows) {
  const asked = at("like").value;
  const row = asked === "" ? null : rows.find((one) => one.latent === Number(asked));
  if (!row) return asked === "" ? null : { key: null, cosines: new Map() };
  const latent = await latentAt(row);
  return { key: row.dictionary.key, cosines: new Map([[latent.latent, 2], ...latent.near]) };
}

async function latentAt(row) {
  const file = String(Math.floor(row.place / site.per_page)).padStart(4, "0");
  return (await load(`${row.dictionary.key}/${file}`)).latents[row.place % site.per_page];
}

/** The properties that some latent here fires with best; the choice stays. */
function offer(rows) {
  const names = [...new Set(rows.map((row) => row.property).filter(Boolean))].sort(), select = at("property");
  const chosen = select.value;
  if (chosen && !names.includes(chosen)) names.push(chosen);
  select.replaceChildren(element("option", { value: "" }, "any"), ...names.map((name) => element("option", { value: name }, name)));
  select.value = chosen;
}

function table() {
  const pages = Math.max(1, Math.ceil(shown.length / ROWS));
  page = Math.max(0, Math.min(page, pages - 1));
  at("rows").replaceChildren(...shown.slice(page * ROWS, (page + 1) * ROWS).map(line));
  at("count").textContent = `${shown.length.toLocaleString("en")} of ${total.toLocaleString("en")} latents`;
  at("where").textContent = `page ${page + 1} of ${pages}`;
  at("before").disabled = page === 0;
  at("after").disabled = page === pages - 1;
  densities();
}

function line(row) {
  const name = element("a", { href: `#/${row.dictionary.key}/${row.latent}` }, String(row.latent));
  const cell = (...what) => element("td", {}, ...what), count = (what) => element("td", { class: "n" }, what);
  return element("tr", {}, element("th", { scope: "row", class: "n" }, name),
    cell(row.dictionary.layer || row.dictionary.name), count(percent(row.density)), count(number(row.peak)),
    cell(row.property), count(row.property ? number(row.f1) : "–"), count(row.twin ? number(row.twin) : "–"),
    count(row.invariance === null ? "–" : number(row.invariance)),
    cell(...row.promotes.flatMap((token) => [element("code", {}, readable(token) || "␀"), " "])));
}

/** How many of the latents listed fire how often. */
function densities() {
  const live = shown.filter((row) => row.density > 0).map((row) => Math.log10(row.density));
  const low = Math.floor(Math.min(-1, ...(live.length ? [live.reduce((a, b) => Math.min(a, b))] : [])));
  const counts = new Array(40).fill(0);
  for (const value of live) counts[Math.min(39, Math.floor((40 * (value - low)) / -low))] += 1;
  const ends = [`${number(100 * 10 ** low)} %`, "100 %"];
  const said = `density of the ${shown.length} latents listed, from ${ends[0]} to 100 % of tokens, logarithmic`;
  const dead = shown.length - live.length;
  const caption = `density of those listed${dead ? `; ${dead} dead` : ""}`;
  at("densities").replaceChildren(bars(counts, ...ends, said, 520, 70), element("figcaption", {}, caption));
}

async function open(key, latent) {
  const rows = await rowsOf(key);
  const row = rows.find((one) => one.latent === latent);
  if (!row) throw new Error(`There is no latent ${latent} in ${key || "this gallery"}.`);
  const place = shown.indexOf(row);
  const way = (other, name, rel) => (other ? [element("a", { rel, href: `#/${other.dictionary.key}/${other.latent}` }, name)] : []);
  const links = [element("a", { href: "#/", rel: "up" }, "All latents"),
    ...way(place > 0 ? shown[place - 1] : null, "Previous", "prev"), ...way(place >= 0 ? shown[place + 1] : null, "Next", "next")];
  const around = element("nav", { class: "around", "aria-label": "Latents" }, ...links);
  at("latent").replaceChildren(...await article(site, row.dictionary, await latentAt(row), around));
  document.title = `Latent ${latent} – ${site.title}`;
}

async function go() {
  at("wrong").hidden = true;
  const parts = location.hash.split("/"), one = parts.length === 3;
  if (location.hash === "#main") return;
  try {
    if (one) await open(decodeURIComponent(parts[1]), Number(parts[2]));
    else document.title = site.title;
    at("index").hidden = one;
    at("latent").hidden = !one;
    if (one) {
      scrollTo(0, 0);
      at("latent").querySelector("h1").focus();
    }
  } catch (error) {
    at("latent").hidden = at("index").hidden = true;
    complain(error);
  }
}

function keys(event) {
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.target.matches("input, select, textarea")) return;
  const follow = (rel) => at("latent").hidden || at("latent").querySelector(`a[rel=${rel}]`)?.click();
  if (event.key === "/") {
    event.preventDefault();
    location.hash = "#/";
    setTimeout(() => at("search").focus());
  } else if (event.key === "n") follow("next");
  else if (event.key === "p") follow("prev");
  else if (event.key === "u") follow("up");
}

async function start() {
  try {
    site = await load("index");
    at("home").textContent = at("title").textContent = site.title;
    at("links").replaceChildren(...site.links.map(([name, address]) => element("a", { href: address }, name)));
    const layers = site.dictionaries.map((one) => element("option", { value: one.key }, one.name));
    if (layers.length > 1) layers.push(element("option", { value: "*" }, "all"));
    at("layer").replaceChildren(...layers);
    let timer = 0;
    at("filters").addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(list, 120); });
    at("filters").addEventListener("reset", () => setTimeout(list));
    at("filters").addEventListener("submit", (event) => event.preventDefault());
    for (const [id, step] of [["before", -1], ["after", 1]]) {
      at(id).addEventListener("click", () => { page += step; table(); at("count").scrollIntoView(); });
    }
    document.addEventListener("keydown", keys);
    addEventListener("hashchange", go);
    const asked = location.hash.split("/")[1];
    if (site.dictionaries.some((one) => one.key === asked)) at("layer").value = asked;
    if (site.dictionaries.length) await list();
    await go();
  } catch (error) {
    complain(error);
  }
}

start();
