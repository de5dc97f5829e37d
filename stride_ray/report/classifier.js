// Shows a classifier's queries with the training examples that help and harm them most, as pictures or tables.
const { methods, classes, queries, labels, image, pictures, features } = data;
const SIDES = [["helping", "Helping examples", "most helpful"], ["harming", "Harming examples", "most harmful"]];
// Pictures of each side in the list of queries.
const STRIP = 3;
// Methods whose examples are unfolded, also for the next query.
const unfolded = new Set(methods.slice(0, 1));
const percent = (value) => `${(100 * value).toFixed(1)} %`;
const sign = (value) => (value < 0 ? "−" : "+");
const short = (size) => (size < 1e-3 ? size.toExponential(2) : size.toPrecision(3));
const signed = (value) => sign(value) + short(Math.abs(value));
const deviations = (value) => `${sign(value)}${Math.abs(value).toFixed(2)} sd`;
const classOf = (row) => classes[labels[row]];
const verdict = (q) => (q.predicted === labels[q.example] ? "right" : "wrong");

function picture(row) {
  const node = make("img", "picture");
  [node.height, node.width] = image;
  node.alt = node.title = `example ${row}, class ${classOf(row)}`;
  node.src = `data:image/png;base64,${pictures[row]}`;
  return node;
}

// A table of features: number, value, difference from `origin`.
function table(rows, origin) {
  const line = (tag, name, value, difference) =>
    holding("tr", "", make(tag, "name", name), make(tag, "number", value), make(tag, "number", difference));
  const head = holding("thead", "", line("th", "feature", "value", `from ${origin}`));
  const body = rows.map(([feature, value, difference]) => line("td", features[feature], value, deviations(difference)));
  return holding("table", "features", head, holding("tbody", "", ...body));
}

function tile([row, influence, rows], largest) {
  const number = make("span", "value", signed(influence));
  const bar = make("span", "bar");
  bar.style.width = `${(100 * Math.abs(influence)) / largest}%`;
  number.append(bar);
  const caption = holding("figcaption", "", make("b", "", classOf(row)), number);
  if (image) return holding("figure", "", picture(row), caption);
  caption.append(make("span", "soft", `example ${row}`));
  return holding("figure", "", caption, table(rows, "query"));
}

function side(found, [name, title]) {
  const tiles = make("div", image ? "tiles" : "tiles wide");
  const largest = Math.max(...[...found.helping, ...found.harming].map((each) => Math.abs(each[1])));
  tiles.append(...found[name].map((each) => tile(each, largest)));
  return holding("div", name, make("h3", "", title), found[name].length ? tiles : make("p", "soft", "none"));
}

function method(name, found) {
  const summary = holding("summary", "", make("b", "", name));
  const details = holding("details", "", summary, holding("div", "sides", ...SIDES.map((each) => side(found, each))));
  details.open = unfolded.has(name);
  // Not on toggle, which comes later, perhaps after the next query. A click, or a key, finds the state before it.
  summary.addEventListener("click", () => (details.open ? unfolded.delete(name) : unfolded.add(name)));
  return details;
}

function show(query, section) {
  const facts = make("dl", "facts");
  const told = [
    ["class", classOf(query.example)], ["predicted", `${classes[query.predicted]} (${verdict(query)})`],
    ["probability", percent(query.probability)], ["probability of its class", percent(query.own)],
  ];
  for (const [name, value] of told) facts.append(holding("div", "", make("dt", "", name), make("dd", "", value)));
  section.append(make("h2", "", `Example ${query.example}`));
  section.append(holding("div", "asked", image ? picture(query.example) : table(query.features, "mean"), facts));
  section.append(...methods.map((name, i) => method(name, query.found[i])));
}

const strip = (rows) => holding("span", "strip", ...rows.slice(0, STRIP).map(([row]) => picture(row)));
const first = (rows) => (rows.length ? rows[0][1] : null);
const COLUMNS = [
  ...(image ? [{ title: "query", of: (q) => q.example, draw: (q) => picture(q.example) }]
    : [{ title: "example", of: (q) => q.example, kind: "number" }]),
  { title: "class", of: (q) => classOf(q.example), kind: "text name" },
  { title: "predicted", of: (q) => classes[q.predicted], tag: (q) => `tag ${verdict(q)}` },
  { title: "probability", of: (q) => q.probability, show: percent, kind: "number" },
  ...(image ? SIDES.map(([name, , title]) => (
    { title, of: (q) => first(q.found[0][name]), draw: (q) => strip(q.found[0][name]) })) : []),
];
const searched = (q) => `example ${q.example} class ${classOf(q.example)} predicted ${classes[q.predicted]} ${verdict(q)}`;

browse({ items: queries, columns: COLUMNS, words: searched, section: byId("query"), show, noun: "query" });
