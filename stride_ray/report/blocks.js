// Shared by the pages of attributions: numbers, words, tokens coloured by influence, and shares of sources.
const number = (value) => (value === null ? "" : value.toPrecision(4));
const signed = (value) => (value > 0 ? "+" : "−") + Math.abs(value).toPrecision(4);
const WORD = /[\p{L}\p{N}_]{2,}/gu;
const wordsOf = (text) => text.toLowerCase().match(WORD) || [];

// Appends a text to a node and marks the words that are also in `others`.
function shared(node, text, others) {
  const matches = [...text.matchAll(WORD)].filter((match) => others.has(match[0].toLowerCase()));
  return marked(node, text, matches.map((match) => [match.index, match.index + match[0].length]));
}

// Appends tokens, [text, value] each, to a node, coloured by their share of the largest value, and underlined where they
// lie in `spans`, [start, stop] in the joined text.
function coloured(node, tokens, spans = []) {
  const largest = Math.max(...tokens.map((token) => Math.abs(token[1]))) || 1;
  let at = 0;
  for (const [text, value] of tokens) {
    const [share, stop] = [Math.abs(value) / largest, at + text.length];
    const said = spans.some(([first, last]) => first < stop && at < last);
    const names = [share < 0.05 ? "" : value > 0 ? "toward" : "against", said ? "verbatim" : ""].filter(Boolean);
    const span = names.length ? make("span", names.join(" "), text) : text;
    if (share >= 0.05) {
      span.style.setProperty("--share", `${Math.round(50 * share)}%`);
      span.title = signed(value);
    }
    node.append(span);
    at = stop;
  }
  return node;
}

// Where a text has runs of at least RUN words that `other` has too: [start, stop] each, in order.
const RUN = 4;
function verbatim(text, other) {
  const theirs = wordsOf(other);
  const runs = new Set(theirs.slice(RUN - 1).map((_, i) => theirs.slice(i, i + RUN).join(" ")));
  const mine = [...text.matchAll(WORD)];
  const spans = [];
  for (let i = 0; i + RUN <= mine.length; i += 1) {
    if (!runs.has(mine.slice(i, i + RUN).map((match) => match[0].toLowerCase()).join(" "))) continue;
    const [start, last] = [mine[i].index, mine[i + RUN - 1]];
    const stop = last.index + last[0].length;
    if (spans.length && start <= spans[spans.length - 1][1]) spans[spans.length - 1][1] = stop;
    else spans.push([start, stop]);
  }
  return spans;
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
