"use strict";
// Shared by all pages: element creation, highlighting, downloads, and a table with search, sorting, paging and selection.
// Text is inserted only as text (textContent, append of strings), never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const ROWS = 25;
const byId = (id) => document.getElementById(id);
// A document's id, after its source if the id does not begin with that.
const named = (id, source) => (!source || id === source || id.startsWith(`${source}#`) ? id : `${source}: ${id}`);

function make(tag, name, text) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  if (text !== undefined) node.textContent = text;
  return node;
}

// An element with children, texts or nodes.
function holding(tag, name, ...children) {
  const node = make(tag, name);
  node.append(...children);
  return node;
}

// Saves a file that the page has made.
function download(name, blob) {
  const anchor = make("a");
  anchor.href = URL.createObjectURL(blob);
  anchor.download = name;
  anchor.click();
  URL.revokeObjectURL(anchor.href);
}

function drawn(tag, attributes, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Appends a text to a node, with the given spans ([start, stop], in order) highlighted.
function marked(node, text, spans) {
  let at = 0;
  for (const [start, stop] of spans) {
    node.append(text.slice(at, start), make("mark", "", text.slice(start, stop)));
    at = stop;
  }
  node.append(text.slice(at));
  return node;
}

// A collapsible entry: a number over a bar of width `share`, a title and a description in small type.
function entry(value, share, title, about, open) {
  const details = make("details");
  details.open = open;
  const line = make("span", "block");
  const number = make("span", "value", value);
  const bar = make("span", "bar");
  bar.style.width = `${100 * share}%`;
  number.append(bar);
  const where = make("span", "", title + " ");
  where.append(make("span", "soft", about));
  line.append(number, where);
  const summary = make("summary");
  summary.append(line);
  details.append(summary);
  return details;
}

// Orders null last.
function compare(a, b) {
  if (a === null || b === null) return (a === null) - (b === null);
  return typeof a === "number" ? a - b : a.localeCompare(b);
}

// Fills #table with items, and `section` with the output of `show` for the selected item.
//   columns: title, of (item to value), show (value to text), kind (class of its cells), tag (item to class of a label),
//     draw (item to the node that is shown instead of text)
//   words: item to its searchable text; keep: whether to list an item; noun: name of an item
function browse({ items, columns, words, section, show, noun, keep = () => true }) {
  const haystack = items.map((item) => words(item).toLowerCase());
  const body = document.querySelector("#table tbody");
  let order = [];
  let sorted = { column: -1, up: true };
  let page = 0;
  let chosen = -1;

  function found() {
    const asked = byId("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const list = items.map((_, i) => i)
      .filter((i) => keep(items[i]) && asked.every((word) => haystack[i].includes(word)));
    if (sorted.column >= 0) {
      const of = columns[sorted.column].of;
      list.sort((i, j) => (sorted.up ? 1 : -1) * compare(of(items[i]), of(items[j])) || i - j);
    }
    return list;
  }

  function header() {
    const row = document.querySelector("#table thead tr");
    columns.forEach((column, i) => {
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

  function cellOf(item, column) {
    const value = column.of(item);
    const text = column.show ? column.show(value) : value;
    const cell = make("td", column.kind || "", column.tag || column.draw ? undefined : text);
    if (column.draw) cell.append(column.draw(item));
    if (column.tag && text) cell.append(make("span", column.tag(item), text));
    if (cell.classList.contains("text")) cell.title = value;
    return cell;
  }

  function draw() {
    const first = page * ROWS;
    body.replaceChildren(...order.slice(first, first + ROWS).map((i) => {
      const row = make("tr", "row");
      row.dataset.item = i;
      row.setAttribute("aria-selected", String(i === chosen));
      row.append(...columns.map((column) => cellOf(items[i], column)));
      row.addEventListener("click", () => choose(i, true));
      return row;
    }));
    const last = Math.min(first + ROWS, order.length);
    byId("count").textContent = order.length ? `${first + 1}–${last} of ${order.length}` : `no ${noun}`;
    byId("before").disabled = page === 0;
    byId("after").disabled = last >= order.length;
  }

  function refresh() {
    order = found();
    page = 0;
    draw();
  }

  function choose(i, scroll) {
    chosen = i;
    section.replaceChildren();
    show(items[i], section);
    body.querySelectorAll("tr.row").forEach((row) =>
      row.setAttribute("aria-selected", String(Number(row.dataset.item) === chosen)));
    if (scroll) section.scrollIntoView({ block: "nearest" });
  }

  function step(by) {
    if (!order.length) return;
    const at = order.indexOf(chosen);
    const next = Math.min(order.length - 1, Math.max(0, at + by));
    page = Math.floor(next / ROWS);
    draw();
    choose(order[next], true);
  }

  byId("search").addEventListener("input", refresh);
  byId("before").addEventListener("click", () => { page -= 1; draw(); });
  byId("after").addEventListener("click", () => { page += 1; draw(); });
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
  if (order.length) choose(order[0], false);
  return refresh;
}
