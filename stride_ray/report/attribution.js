// Shows the most helpful and most harmful blocks of each query.
const { queries, texts, pieces, timeline } = data;
const best = (query) => (query.helping.length ? named(query.helping[0][4], query.helping[0][5]) : "");

// Words that occur in most blocks; not highlighted, since they do not indicate a match.
const common = new Set();
{
  const counts = new Map();
  const all = Object.values(texts);
  for (const text of all) for (const word of new Set(wordsOf(text))) counts.set(word, (counts.get(word) || 0) + 1);
  for (const [word, count] of counts) if (all.length >= 8 && count > all.length / 2) common.add(word);
}

const COLUMNS = [
  { title: "query", of: (q) => q.query_id },
  { title: "text", of: (q) => (q.prompt + q.completion + (q.contrast && ` rather than ${q.contrast}`)).replace(/\s+/g, " "), kind: "text" },
  { title: "loss, nats", of: (q) => q.base_loss, show: number, kind: "number" },
  { title: "blocks", of: (q) => q.nonzeros, show: (v) => v ?? "failed", kind: "number" },
  { title: "half held by", of: (q) => (q.error ? null : q.half), show: (v) => v ?? "", kind: "number" },
  { title: "most helpful", of: best, kind: "text" },
];
const searched = (q) =>
  [q.query_id, q.prompt, q.completion, q.contrast, ...[...q.helping, ...q.harming].map((row) => `${row[4]} ${row[5]}`)].join("\n");

function side(query, name, words) {
  const column = make("div", name);
  column.append(make("h3", "", name === "helping" ? "Helping blocks" : "Harming blocks"));
  query[name].forEach(([rank, influence, share, ordinal, documentId, source, exact, tokens], i) => {
    const how = exact ? "exact" : "estimate";
    const about = `${source === documentId ? "" : source + " · "}block ${ordinal} · rank ${rank} · ${how}`;
    const details = entry(signed(influence), share, documentId, about, i === 0);
    // A list of values may end where its query's blocks end.
    const split = tokens && pieces[ordinal].map((piece, at) => [piece, tokens[at] || 0]);
    details.append(split ? coloured(make("pre"), split) : shared(make("pre"), texts[ordinal], words));
    column.append(details);
  });
  if (!query[name].length) column.append(make("p", "soft", "none"));
  return column;
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

// A small curve of values by checkpoint, with a dot where it was learnt.
function sparkline(values, what, at = -1) {
  const [W, H] = [150, 34];
  const names = timeline.checkpoints;
  const told = values.map((value, i) => `${names[i]}: ${number(value)}`).join(", ");
  const svg = drawn("svg", { viewBox: `0 0 ${W} ${H}`, class: "spark", role: "img", "aria-label": `${what} by checkpoint: ${told}` });
  svg.append(drawn("title", {}, told));
  const known = values.filter((value) => value !== null);
  const [high, low] = [Math.max(0, ...known), Math.min(0, ...known)];
  const x = (i) => 5 + (W - 10) * (i / (values.length - 1));
  const y = (value) => 5 + (H - 10) * (1 - (value - low) / (high - low || 1));
  svg.append(drawn("line", { class: "axis", x1: 5, x2: W - 5, y1: y(0), y2: y(0) }));
  const points = values.map((value, i) => (value === null ? "" : `${x(i)},${y(value)}`)).join(" ");
  svg.append(drawn("polyline", { class: "line", points }));
  if (at >= 0 && values[at] !== null) svg.append(drawn("circle", { cx: x(at), cy: y(values[at]), r: 4 }));
  return svg;
}

// When a query and its most helpful blocks were learnt, a row each.
function overTraining(query) {
  const told = timeline.queries[query.query_id];
  const table = make("table");
  const head = make("tr");
  for (const title of ["text", "learnt at", "loss", "influence on the query"]) head.append(make("th", "", title));
  table.append(holding("thead", "", head));
  const body = make("tbody");
  const followed = told.blocks.map((block) => ({ ...block, title: named(block.document_id, block.source) }));
  for (const each of [{ ...told, title: "the query" }, ...followed]) {
    const row = make("tr");
    row.append(make("td", "", each.title), make("td", "", timeline.checkpoints[each.at]));
    row.append(holding("td", "", sparkline(each.losses, "loss", each.at)));
    row.append(each.influences ? holding("td", "", sparkline(each.influences, "influence")) : make("td"));
    body.append(row);
  }
  table.append(body);
  const scroll = holding("div", "scroll", table);
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "losses and influence by checkpoint");
  return scroll;
}

function show(query, section) {
  section.append(make("h2", "", query.query_id));
  if (query.error) {
    section.append(make("p", "warning", `Failed: ${query.error}`));
  } else {
    section.append(make("p", "soft",
      `loss ${number(query.base_loss)} nats a token${query.contrast ? ", minus that of the other completion" : ""} · ${query.nonzeros} blocks with influence, ${query.half} of them hold half`));
    const named = [...query.helping, ...query.harming].flatMap((row) => wordsOf(texts[row[3]]));
    const theirs = new Set(named.filter((word) => !common.has(word)));
    const mine = new Set(wordsOf(query.prompt + query.completion).filter((word) => !common.has(word)));
    const text = make("pre");
    text.append(shared(make("span", "prompt"), query.prompt, theirs), shared(make("span"), query.completion, theirs));
    if (query.contrast) text.append(make("b", "", "  rather than  "), make("span", "", query.contrast));
    const sides = make("div", "sides");
    sides.append(side(query, "helping", mine), side(query, "harming", mine));
    const plots = make("div", "plots");
    const [left, right] = [make("div"), make("div")];
    left.append(make("h3", "", "Its sources"), shares(query.sources));
    right.append(make("h3", "", "Influence by rank"));
    if (query.curve.length) right.append(curve(query.curve));
    plots.append(left, right);
    section.append(text, make("h3", "", ""), sides, make("h3", "", ""), plots);
    if (timeline && timeline.queries[query.query_id]) {
      section.append(make("h3", "", "Over training"), overTraining(query));
      section.append(make("p", "soft", "Learnt at: the checkpoint at which the loss fell most steeply, beside that of other blocks. Curves begin at zero."));
    }
  }
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

browse({ items: queries, columns: COLUMNS, words: searched, section: byId("query"), show, noun: "query" });
overview();
