// Shows the findings of a nightly scan by set and night, its items, and the evidence for each.
const { columns: names, rows, evidence, trend, asked, since, options } = data;
const items = rows.map((row, i) => ({ ...Object.fromEntries(names.map((name, k) => [name, row[k]])), ...evidence[i] }));
const CHANNELS = ["lexical", "influence"];
// Reviews made on this page, by item; the browser keeps them until they are saved.
const STORED = `reviews ${data.night} ${location.pathname}`;
const reviews = new Map(stored());
// Plots (one per set) shown without expanding the rest.
const PLOTS = 6;

function number(value) {
  if (value === null) return "";
  return value && Math.abs(value) < 1e-3 ? value.toExponential(1) : String(Number(value.toPrecision(3)));
}
const percent = (value) => `${Math.round(100 * value)} %`;
const spoken = (value) => (value === null ? "" : value ? "yes" : "no");

const COLUMNS = [
  { title: "set", of: (x) => x.set, kind: "text name" },
  { title: "item", of: (x) => x.item, kind: "text name" },
  { title: "verdict", of: (x) => x.verdict, tag: (x) => `tag ${x.verdict}` },
  { title: "change", of: (x) => x.mark, tag: (x) => `change ${x.mark}` },
  { title: "review", of: (x) => SAID[x.review] ? x.review : "" },
  { title: "leaked", of: (x) => x.leaked || "", kind: "text" },
  { title: "overlap", of: (x) => x.overlap, show: percent, kind: "number" },
  { title: "documents", of: (x) => x.documents, kind: "number" },
  { title: "contrast", of: (x) => x.contrast, show: number, kind: "number" },
  { title: "q", of: (x) => x.q, show: number, kind: "number" },
  { title: "memorised", of: (x) => x.memorised, show: spoken },
  { title: "question", of: (x) => x.question, kind: "text brief" },
];
const searched = (x) => [x.set, x.item, x.verdict, x.mark, x.note, x.question, x.first_source, x.first_document, x.tied_source,
  x.tied_document, x.error, ...(x.texts || []).map(([, text]) => text), ...(x.copies || []).map((each) => `${each.source} ${each.document}`)].join("\n");

function stored() {
  try {
    return JSON.parse(localStorage.getItem(STORED)) || [];
  } catch {
    return []; // no storage for pages of files
  }
}

const reviewOf = (item) => (reviews.has(item.key) ? reviews.get(item.key).review : item.review);
const SAID = { true: "reviewed: a leak", false: "reviewed: a false alarm" };

function review(item, said) {
  const { set, item: item_id, key, question, alarm: verdict, leaked, overlap } = item;
  const at = new Date().toISOString();
  const about = { night: data.night, verdict, leaked: leaked || "", overlap };
  reviews.set(key, { set, item_id, key, question, ...about, review: said, at });
  try {
    localStorage.setItem(STORED, JSON.stringify([...reviews]));
  } catch { /* the page holds them */ }
  tell();
}

function tell() {
  byId("reviews").hidden = !reviews.size;
  byId("reviews").textContent = `Save ${reviews.size} review${reviews.size === 1 ? "" : "s"}`;
}

function save() {
  const lines = [...reviews.values()].map((row) => `${JSON.stringify(row)}\n`);
  download("reviews.jsonl", new Blob(lines, { type: "application/x-ndjson" }));
}

// Buttons for an alarm, or for one that was reviewed.
function judging(item) {
  const tools = make("div", "tools");
  if (item.verdict === "gone" || item.alarm === "clean") return tools;
  const state = make("span", "soft", SAID[reviewOf(item)] || "");
  for (const [said, title] of [["false", "False alarm"], ["true", "Leak"]]) {
    const button = make("button", "", title);
    button.type = "button";
    button.addEventListener("click", () => {
      review(item, said);
      state.textContent = SAID[said];
    });
    tools.append(button);
  }
  tools.append(state);
  return tools;
}

function plot(set) {
  const [W, H, left, right, top, bottom] = [360, 120, 28, 8, 10, 20];
  const nights = trend.nights;
  const last = nights.length - 1;
  const most = Math.max(1, ...CHANNELS.flatMap((channel) => set[channel].map((value) => value || 0)));
  const x = (i) => (last ? left + (W - left - right) * (i / last) : (left + W - right) / 2);
  const y = (value) => top + (H - top - bottom) * (1 - value / most);
  const now = CHANNELS.filter((channel) => set[channel][last] !== null).map((channel) => `${set[channel][last]} ${channel}`);
  const told = `${set.name}: findings by night, ${now.join(", ")} in ${nights[last]}`;
  const svg = drawn("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": told });
  for (const value of [0, most]) {
    svg.append(drawn("line", { class: "axis", x1: left, x2: W - right, y1: y(value), y2: y(value) }));
    svg.append(drawn("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, String(value)));
  }
  for (const channel of CHANNELS) {
    const known = set[channel].map((value, i) => [i, value]).filter(([, value]) => value !== null);
    // A night on which the channel did not run is a gap in the line.
    const path = known.map(([i, value], k) => {
      const joins = k && known[k - 1][0] === i - 1;
      return `${joins ? `L${x(i)},${y(known[k - 1][1])} L` : "M"}${x(i)},${y(value)}`;
    });
    svg.append(drawn("path", { class: `line ${channel}`, d: path.join(" ") || "M0,0" }));
    for (const [i, value] of known) {
      const radius = i === last ? 3.5 : last < 30 ? 2.5 : 1.5;
      const dot = drawn("circle", { class: channel, cx: x(i), cy: y(value), r: radius });
      dot.append(drawn("title", {}, `${nights[i]}: ${value} ${channel}`));
      svg.append(dot);
    }
  }
  const short = (name) => (name.length > 22 ? `${name.slice(0, 21)}…` : name);
  if (last) svg.append(drawn("text", { x: left, y: H - 4 }, short(nights[0])));
  const end = { x: last ? W - right : x(0), y: H - 4, "text-anchor": last ? "end" : "middle" };
  svg.append(drawn("text", end, short(nights[last])));
  const keys = CHANNELS.map((channel) => {
    const value = set[channel][last];
    return make("span", `key ${channel}`, `${channel} ${value === null ? "not asked" : value}`);
  });
  return holding("figure", "", holding("figcaption", "", make("b", "", set.name), ...keys), svg);
}

function trends() {
  const total = (set) => CHANNELS.reduce((sum, channel) => sum + (set[channel].at(-1) || 0), 0);
  const many = trend.sets.length > PLOTS;
  const sets = many ? [...trend.sets].sort((a, b) => total(b) - total(a)) : trend.sets;
  byId("trends").append(...sets.slice(0, PLOTS).map(plot));
  if (!many) return;
  const rest = holding("details", "", make("summary", "", `${sets.length - PLOTS} more sets`));
  rest.addEventListener("toggle", () => {
    if (rest.children.length === 1) rest.append(holding("div", "trends", ...sets.slice(PLOTS).map(plot)));
  });
  byId("trends").after(rest);
}

// The full text of an item, field by field.
function whole(item, open) {
  const details = holding("details", "", make("summary", "", "the item's text"));
  details.open = open;
  const text = make("pre");
  for (const [name, field] of item.texts || []) {
    if (name !== "whole") text.append(make("span", "prompt", `${name}: `), field, "\n");
  }
  if (!item.texts) text.append(item.question, " …");
  details.append(text);
  return details;
}

// A field of an item beside the matching passages of a document.
function sideBySide(item, held) {
  const text = (item.texts.find(([name]) => name === held.field) || ["", ""])[1];
  const left = make("div");
  left.append(make("h3", "", `${held.field}, ${percent(held.overlap)} of it held: a ${held.kind}`), marked(make("pre"), text, held.spans));
  const right = make("div");
  for (const { part, text: excerpt, spans } of held.passages) {
    right.append(make("h3", "", `the document's ${part}`), marked(make("pre"), excerpt, spans));
  }
  return holding("div", "sides", left, right);
}

function lexical(item) {
  const node = holding("div", "lexical", make("h3", "", "Lexical: copies in the corpus"));
  const copies = item.copies || [];
  if (item.short) node.append(make("p", "soft", "Not searched for: the item has too few words."));
  else if (item.verdict === "gone") node.append(make("p", "soft", "Not searched for: the item is no longer evaluated."));
  else if (!item.overlap) node.append(make("p", "soft", "No document of the corpus shares a run of words with it."));
  else if (!item.documents) {
    node.append(make("p", "soft",
      item.leaked ? `No document is a copy: ${item.leaked === "phrase" ? "the question is a common phrase" : "the item quotes a text"}, which the corpus has too.`
        : `No document reaches the threshold of ${percent(options.overlap)}; the nearest has ${percent(item.overlap)}.`));
  } else {
    const rest = item.documents - copies.length;
    node.append(make("p", "soft", `${item.documents} document(s) hold at least ${percent(options.overlap)} of a field` +
      (rest > 0 ? `; the best ${copies.length} are here, all in matches.parquet.` : ".")));
  }
  copies.forEach((each, i) => {
    const where = new Set([each.source, each.file].filter((name) => name && name !== each.document));
    const details = entry(percent(each.overlap), each.overlap, each.document, [...where].join(" · "), i === 0);
    details.append(...each.fields.map((held) => sideBySide(item, held)));
    node.append(details);
  });
  return node;
}

function influence(item) {
  const node = holding("div", "influence", make("h3", "", "Influence: a suspicion, never proof"));
  if (!asked) return holding("div", "", node.firstChild, make("p", "soft", "Not asked (scan.influence = false)."));
  if (item.error) node.append(make("p", "warning", `Could not be measured: ${item.error}`));
  if (item.contrast === null) {
    if (!item.error) node.append(make("p", "soft", "Not asked."));
    return node;
  }
  const suspected = ["influence", "both"].includes(item.verdict);
  const rate = `at a false-discovery rate of ${percent(options.false_discovery)}`;
  node.append(make("p", "soft", suspected
    ? `Suspected ${rate}: the model predicts it better than control items, and one training block has more influence on it than on them.`
    : `Not suspected ${rate}: some control items are predicted as well, or lean on a block as much.`));
  const facts = [
    ["tied document", named(item.tied_document, item.tied_source)], ["block", item.ordinal], ["contrast", number(item.contrast)],
    ["p", number(item.p)], ["q", number(item.q)],
    ["share of all influence", item.share === null ? "" : percent(item.share)],
    ["loss, nats a token", number(item.loss)], ["memorised", spoken(item.memorised)],
  ];
  const list = make("dl", "facts");
  for (const [name, value] of facts) list.append(holding("div", "", make("dt", "", name), make("dd", "", value ?? "")));
  node.append(list);
  return node;
}

function show(item, section) {
  section.append(make("h2", "", `${item.set} / ${item.item}`));
  const line = holding("p", "", make("span", `tag ${item.verdict}`, item.verdict), " ");
  const told = {
    new: since ? `New since ${since}.` : "New: this is the first scan.",
    changed: `Changed; it was ${item.note}.`,
    resolved: `Resolved; it was ${item.note}.`,
  };
  line.append(make("span", "soft", item.mark ? told[item.mark] : ""));
  section.append(line, judging(item), whole(item, !(item.copies || []).length), lexical(item), influence(item));
  if (!item.texts && item.verdict !== "gone") {
    section.append(make("p", "soft", "Its texts are left out to keep this page small."));
  }
  reveal(section);
}

// Scrolls long texts to their first mark.
function reveal(node) {
  for (const text of node.querySelectorAll("pre")) {
    const mark = text.querySelector("mark");
    if (mark) text.scrollTop = mark.offsetTop - text.offsetTop - 24;
  }
}

// A closed element has no size and cannot be scrolled; scroll it once it is opened.
byId("item").addEventListener("toggle", (event) => reveal(event.target), { capture: true });
trends();
tell();
byId("reviews").addEventListener("click", save);
const clean = byId("clean");
const keep = (item) => item.verdict !== "clean" || item.mark !== null || Boolean(clean && clean.checked);
const refresh = browse({ items, columns: COLUMNS, words: searched, section: byId("item"), show, noun: "item", keep });
if (clean) clean.addEventListener("change", refresh);
