"use strict";
// Shows the page's data. Text goes into the page as text alone (textContent), never as markup.
const { queries, texts } = JSON.parse(document.getElementById("data").textContent);
const ROWS = 25;
const byId = (id) => document.getElementById(id);

function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}

function drawn(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

const number = (value) => (value === null ? "" : value.toPrecision(4));
const signed = (value) => (value > 0 ? "+" : "−") + Math.abs(value).toPrecision(4);
const wordsOf = (text) => text.toLowerCase().match(/[\p{L}\p{N}_]{2,}/gu) || [];
const best = (query) => (query.helping.length ? query.helping[0][4] : "");

// Words of most blocks say nothing about a match.
const common = new Set();
{
  const counts = new Map();
  const all = Object.values(texts);
  for (const text of all) for (const word of new Set(wordsOf(text))) counts.set(word, (counts.get(word) || 0) + 1);
  for (const [word, count] of counts) if (all.length >= 8 && count > all.length / 2) common.add(word);
}

const COLUMNS = [
  { title: "query", of: (q) => q.query_id },
  { title: "text", of: (q) => (q.prompt + q.completion).replace(/\s+/g, " "), kind: "text" },
  { title: "loss, nats", of: (q) => q.base_loss, show: number, kind: "number" },
  { title: "blocks", of: (q) => q.nonzeros, show: (v) => v ?? "failed", kind: "number" },
  { title: "half held by", of: (q) => (q.error ? null : q.half), show: (v) => v ?? "", kind: "number" },
  { title: "most helpful", of: best, kind: "text" },
];
const haystack = queries.map((q) =>
  [q.query_id, q.prompt, q.completion, ...[...q.helping, ...q.harming].map((row) => `${row[4]} ${row[5]}`)]
    .join("\n").toLowerCase());

let order = queries.map((_, i) => i);
let sorted = { column: -1, up: true };
let page = 0;
let chosen = -1;

function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "number" ? a - b : a.localeCompare(b);
}

function found() {
  const asked = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const list = queries.map((_, i) => i).filter((i) => asked.every((word) => haystack[i].includes(word)));
  if (sorted.column >= 0) {
    const of = COLUMNS[sorted.column].of;
    list.sort((i, j) => (sorted.up ? 1 : -1) * compare(of(queries[i]), of(queries[j])) || i - j);
  }
  return list;
}

function header() {
  const row = document.querySelector("#table thead tr");
  COLUMNS.forEach((column, i) => {
    const cell = make("th", column.kind || "");
    const button = make("button", "", column.title);
    button.type = "button";
    button.addEventListener("click", () => {
      sorted = { column: i, up: sorted.column === i ? !sorted.up : true };
      document.querySelectorAll("#table th").forEach((each) => each.removeAttribute("aria-sort"));
      cell.setAttribute("aria-sort", sorted.up ? "ascending" : "descending");
      refresh();
    });
    cell.append(button);
    row.append(cell);
  });
}

function refresh() {
  order = found();
  page = 0;
  table();
}

function table() {
  const body = document.querySelector("#table tbody");
  const first = page * ROWS;
  body.replaceChildren(...order.slice(first, first + ROWS).map((i) => {
    const row = make("tr", "row");
    row.dataset.query = i;
    row.setAttribute("aria-selected", String(i === chosen));
    for (const column of COLUMNS) {
      const value = column.of(queries[i]);
      const cell = make("td", column.kind || "", column.show ? column.show(value) : value);
      if (column.kind === "text") cell.title = value;
      row.append(cell);
    }
    row.addEventListener("click", () => choose(i, true));
    return row;
  }));
  const last = Math.min(first + ROWS, order.length);
  byId("count").textContent = order.length ? `${first + 1}–${last} of ${order.length}` : "no query";
  byId("before").disabled = page === 0;
  byId("after").disabled = last >= order.length;
}

// A text with the words that another has, too, in marks.
function marked(node, text, others) {
  let at = 0;
  for (const match of text.matchAll(/[\p{L}\p{N}_]{2,}/gu)) {
    if (!others.has(match[0].toLowerCase())) continue;
    node.append(text.slice(at, match.index), make("mark", "", match[0]));
    at = match.index + match[0].length;
  }
  node.append(text.slice(at));
  return node;
}

function side(query, name, words) {
  const column = make("div", name);
  column.append(make("h3", "", name === "helping" ? "Helping blocks" : "Harming blocks"));
  query[name].forEach(([rank, influence, share, ordinal, documentId, source], i) => {
    const details = make("details");
    details.open = i === 0;
    const line = make("span", "block");
    const value = make("span", "value", signed(influence));
    const bar = make("span", "bar");
    bar.style.width = `${100 * share}%`;
    value.append(bar);
    const where = make("span", "", documentId + " ");
    where.append(make("span", "soft", `${source === documentId ? "" : source + " · "}block ${ordinal} · rank ${rank}`));
    line.append(value, where);
    const summary = make("summary");
    summary.append(line);
    details.append(summary, marked(make("pre"), texts[ordinal], words));
    column.append(details);
  });
  if (!query[name].length) column.append(make("p", "soft", "none"));
  return column;
}

function shares(list) {
  const node = make("div");
  for (const [source, share] of list) {
    const row = make("div", "share");
    const bar = make("span");
    const inside = make("span", "bar");
    inside.style.width = `${100 * share}%`;
    bar.append(inside);
    row.append(make("span", "", source), bar, make("span", "soft", `${(100 * share).toFixed(0)} %`));
    node.append(row);
  }
  if (!list.length) node.append(make("p", "soft", "no positive influence"));
  return node;
}

function curve(points) {
  const [W, H, left, bottom] = [360, 130, 4, 18];
  const svg = drawn("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": "influence by rank" });
  const values = points.map((p) => p[1]);
  const [high, low] = [Math.max(0, ...values), Math.min(0, ...values)];
  const last = points[points.length - 1][0] || 1;
  const x = (rank) => left + (W - 2 * left) * (rank / last);
  const y = (value) => (H - bottom) * (1 - (value - low) / (high - low || 1));
  for (const [name, keep] of [["up", (v) => Math.max(0, v)], ["down", (v) => Math.min(0, v)]]) {
    const line = points.map(([rank, value]) => `${x(rank)},${y(keep(value))}`).join(" ");
    svg.append(drawn("polygon", { class: name, points: `${x(points[0][0])},${y(0)} ${line} ${x(last)},${y(0)}` }));
  }
  svg.append(drawn("line", { class: "axis", x1: left, x2: W - left, y1: y(0), y2: y(0) }));
  svg.append(drawn("text", { x: left, y: H - 4 }, "rank 1"));
  svg.append(drawn("text", { x: W - left, y: H - 4, "text-anchor": "end" }, `rank ${last + 1}`));
  svg.append(drawn("text", { x: W - left, y: 12, "text-anchor": "end" }, `largest ${signed(high || low)}`));
  return svg;
}

function choose(i, scroll) {
  chosen = i;
  const query = queries[i];
  const section = byId("query");
  section.replaceChildren(make("h2", "", query.query_id));
  if (query.error) {
    section.append(make("p", "warning", `Failed: ${query.error}`));
  } else {
    section.append(make("p", "soft",
      `loss ${number(query.base_loss)} nats a token · ${query.nonzeros} blocks with influence, ${query.half} of them hold half`));
    const named = [...query.helping, ...query.harming].flatMap((row) => wordsOf(texts[row[3]]));
    const theirs = new Set(named.filter((word) => !common.has(word)));
    const mine = new Set(wordsOf(query.prompt + query.completion).filter((word) => !common.has(word)));
    const text = make("pre");
    text.append(marked(make("span", "prompt"), query.prompt, theirs), marked(make("span"), query.completion, theirs));
    const sides = make("div", "sides");
    sides.append(side(query, "helping", mine), side(query, "harming", mine));
    const plots = make("div", "plots");
    const [left, right] = [make("div"), make("div")];
    left.append(make("h3", "", "Its sources"), shares(query.sources));
    right.append(make("h3", "", "Influence by rank"));
    if (query.curve.length) right.append(curve(query.curve));
    plots.append(left, right);
    section.append(text, make("h3", "", ""), sides, make("h3", "", ""), plots);
  }
  document.querySelectorAll("#table tr.row").forEach((row) =>
    row.setAttribute("aria-selected", String(Number(row.dataset.query) === chosen)));
  if (scroll) section.scrollIntoView({ block: "nearest" });
}

function overview() {
  const sums = new Map();
  const good = queries.filter((q) => q.sources.length);
  for (const q of good) for (const [source, share] of q.sources) sums.set(source, (sums.get(source) || 0) + share);
  const list = [...sums].map(([source, sum]) => [source, sum / good.length]).sort((a, b) => b[1] - a[1]);
  byId("sources").append(shares(list.slice(0, 8)));
  const edges = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, Infinity];
  const counts = edges.slice(1).map((end, i) => good.filter((q) => q.half >= edges[i] && q.half < end).length);
  const most = Math.max(1, ...counts);
  const svg = drawn("svg", { viewBox: "0 0 360 130", role: "img", "aria-label": "histogram of blocks" });
  counts.forEach((count, i) => {
    const height = 95 * (count / most);
    svg.append(drawn("rect", { class: "up", x: 4 + 35.5 * i, y: 110 - height, width: 31, height }));
    svg.append(drawn("text", { x: 4 + 35.5 * i, y: 124 }, i + 2 < edges.length ? `${edges[i]}–` : `${edges[i]}+`));
    if (count) svg.append(drawn("text", { x: 19 + 35.5 * i, y: 106 - height, "text-anchor": "middle" }, String(count)));
  });
  byId("halves").append(svg);
}

function step(by) {
  if (!order.length) return;
  const at = order.indexOf(chosen);
  const next = Math.min(order.length - 1, Math.max(0, at + by));
  page = Math.floor(next / ROWS);
  table();
  choose(order[next], true);
}

byId("search").addEventListener("input", refresh);
byId("before").addEventListener("click", () => { page -= 1; table(); });
byId("after").addEventListener("click", () => { page += 1; table(); });
document.addEventListener("keydown", (event) => {
  const typing = document.activeElement === byId("search");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/" && !typing) { byId("search").focus(); event.preventDefault(); }
  else if (event.key === "Escape" && typing) { byId("search").blur(); }
  else if (!typing && ["ArrowDown", "j"].includes(event.key)) { step(1); event.preventDefault(); }
  else if (!typing && ["ArrowUp", "k"].includes(event.key)) { step(-1); event.preventDefault(); }
});
header();
refresh();
overview();
if (queries.length) choose(order[0], false);
