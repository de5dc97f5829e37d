// Asks the service about a prompt and a completion, and shows the attribution; a saved page only shows one.
const FIELDS = ["prompt", "completion", "contrast", "only", "blocks"];
let answered = data.answer;

function question() {
  const value = (id) => byId(id).value;
  const asked = { prompt: value("prompt"), completion: value("completion"), blocks: Number(value("blocks")) || 8 };
  if (value("contrast").trim()) asked.contrast = value("contrast");
  const only = value("only").split("\n").map((line) => line.trim()).filter(Boolean);
  if (only.length) asked.sources = only;
  return asked;
}

function say(text, wrong) {
  byId("state").textContent = text;
  byId("state").className = wrong ? "wrong" : "soft";
}

// Sends a request, and again while the service is busy.
async function ask(asked) {
  const headers = { "Content-Type": "application/json" };
  if (data.needs_token) headers.Authorization = `Bearer ${byId("token").value}`;
  for (let tries = 0; ; tries += 1) {
    const response = await fetch("attribute", { method: "POST", headers, body: JSON.stringify(asked) })
      .catch(() => { throw new Error("the service cannot be reached; is it still running?"); });
    if (response.status === 429 && tries < 12) {
      say("server busy, retrying …");
      await new Promise((resume) => setTimeout(resume, 1000 * Number(response.headers.get("Retry-After") || 5)));
      continue;
    }
    const body = await response.json().catch(() => ({ error: `the service answered ${response.status}` }));
    if (!response.ok) throw new Error(body.error);
    return body;
  }
}

async function submit() {
  if (byId("ask").disabled) return; // a request is under way
  const asked = question();
  const link = new URLSearchParams(FIELDS.map((id) => [id, byId(id).value]).filter((pair) => pair[1]));
  byId("ask").disabled = true;
  say("attributing …");
  try {
    answered = await ask(asked);
    history.replaceState(null, "", `#${link}`);
    say(`${answered.seconds.toFixed(1)} s · ${answered.exact} of ${answered.blocks} influences are exact`);
    show();
  } catch (error) {
    say(error.message, true);
  } finally {
    byId("ask").disabled = false;
  }
}

// The query's tokens: those that carry loss, coloured by how far the helping blocks lower it.
function leaning(tokens) {
  const node = make("span");
  const said = tokens.filter((token) => token[1] !== null);
  const first = tokens.findIndex((token) => token[1] !== null);
  node.append(make("span", "prompt", tokens.slice(0, Math.max(0, first)).map((token) => token[0]).join("")));
  return coloured(node, said);
}

function side(title, name, rows, text, largest, open = true) {
  const column = make("div", name);
  if (title) column.append(make("h3", "", title));
  rows.forEach((row, i) => {
    const how = row.exact ? "exact" : "estimate";
    const about = `${named(row.document_id, row.source) === row.document_id ? "" : `${row.source} · `}block ${row.ordinal} · ${row.rank ? `rank ${row.rank}` : "not ranked"} · ${how}`;
    const details = entry(signed(row.influence), Math.abs(row.influence) / largest, row.document_id, about, open && i === 0);
    if (row.span) details.firstChild.append(make("span", "said", row.span.text.replace(/\s+/g, " ").trim()));
    const tokens = row.tokens || [[row.text, 0]];
    details.append(coloured(make("pre"), tokens, verbatim(row.text, text)));
    column.append(details);
  });
  if (!rows.length) column.append(make("p", "soft", "none"));
  return column;
}

function documents(list) {
  const table = make("table");
  const head = make("tr");
  for (const [title, kind] of [["rank", "number"], ["document", ""], ["source", ""], ["blocks", "number"], ["influence", "number"]]) {
    head.append(make("th", kind, title));
  }
  table.append(holding("thead", "", head));
  table.append(holding("tbody", "", ...list.map((row) => holding("tr", "",
    make("td", "number", String(row.rank)), make("td", "", row.document_id), make("td", "", row.source),
    make("td", "number", String(row.blocks)), make("td", "number", signed(row.influence))))));
  const scroll = holding("div", "scroll", table);
  scroll.tabIndex = 0;
  scroll.setAttribute("role", "region");
  scroll.setAttribute("aria-label", "documents");
  return scroll;
}

// Restricts the answer to a source, or to all again.
function only(source) {
  byId("only").value = source;
  byId("more").open = true;
  submit();
}

function show() {
  const section = byId("answer");
  const text = answered.query.map((token) => token[0]).join("");
  const words = make("pre");
  words.append(leaning(answered.query));
  if (answered.contrast) words.append(make("b", "", "  rather than  "), leaning(answered.contrast));
  const rows = [...answered.helping, ...answered.harming, ...answered.matches];
  const largest = Math.max(...rows.map((row) => Math.abs(row.influence)), 1e-30);
  const sides = make("div", "sides");
  sides.append(side("Helping blocks", "helping", answered.helping, text, largest),
    side("Harming blocks", "harming", answered.harming, text, largest));
  const matches = make("div", "matches");
  for (const row of answered.matches) {
    matches.append(side("", row.influence < 0 ? "harming" : "helping", [row], text, largest, false));
  }
  const listed = shares(answered.sources);
  listed.querySelectorAll(".share").forEach((row, i) => {
    if (data.answer) return;
    const button = make("button", "plain", answered.sources[i][0]);
    button.type = "button";
    button.title = "show this source only";
    button.addEventListener("click", () => only(answered.sources[i][0]));
    row.firstChild.replaceWith(button);
  });
  const tools = make("div", "tools");
  if (!data.answer) tools.append(...sharing());
  section.replaceChildren(
    make("h2", "", answered.contrast ? "Why this rather than that" : "Why this"),
    make("p", "soft", `loss ${number(answered.loss)} nats a token${answered.contrast ? ", minus that of the other completion" : ""} · ${answered.run.blocks} blocks · ${answered.run.model}`),
    words,
    make("p", "soft", "A word is green where the helping blocks below lower its loss, red where they raise it. In blocks, green words make the block more helpful, red ones more harmful; beside a block stand the words that hold half of its influence; underlined is what the query says word for word, which is not the same thing."),
    tools, sides, ...(answered.matches.length ? [make("h2", "", "Nearest in words"),
      make("p", "soft", "The blocks that share the rarest words with the query (BM25). Their influence says whether the model learnt this from them."),
      matches] : []), make("h2", "", "Documents"), documents(answered.documents),
    make("h2", "", "Sources"), listed);
}

// Buttons that copy a link, which asks the same again, and save a page that needs no service.
function sharing() {
  const link = make("button", "", "Copy link");
  const save = make("button", "", "Save as a page");
  link.type = save.type = "button";
  link.addEventListener("click", async () => {
    // Browsers have a clipboard for https and localhost only.
    const copied = navigator.clipboard && await navigator.clipboard.writeText(location.href).then(() => true, () => false);
    say(copied ? "link copied; it asks the same query again" : "copy the address of this page; it asks the same query again");
  });
  save.addEventListener("click", async () => {
    const source = await (await fetch("./")).text();
    const json = JSON.stringify({ needs_token: false, answer: answered }).replace(/[<>&\u2028\u2029]/g,
      (each) => `\\u${each.charCodeAt(0).toString(16).padStart(4, "0")}`);
    const page = source.replace(/(<script type="application\/json" id="data">)[^]*?(<\/script>)/, (_, open, close) => open + json + close);
    download("attribution.html", new Blob([page], { type: "text/html" }));
  });
  return [link, save];
}

function fill(values) {
  for (const id of FIELDS) if (values.has(id) || id !== "blocks") byId(id).value = values.get(id) || "";
  byId("more").open = Boolean(byId("contrast").value || byId("only").value);
}

if (data.answer) {
  byId("form").remove();
  byId("about").textContent = `Saved from ${data.answer.run.run}.`;
  show();
} else {
  byId("access").hidden = !data.needs_token;
  byId("form").addEventListener("submit", (event) => { event.preventDefault(); submit(); });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId("form").requestSubmit();
    else if (event.key === "/" && document.activeElement === document.body) { byId("prompt").focus(); event.preventDefault(); }
  });
  const follow = () => {
    fill(new URLSearchParams(location.hash.slice(1)));
    if (byId("completion").value && !data.needs_token) submit();
  };
  window.addEventListener("hashchange", follow);
  follow();
}
