"use strict";
(() => {
  const byId = (id) => document.getElementById(id);

  // The theme follows the reader's system until the button is pressed.
  const button = byId("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (document.documentElement.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const name = () => { button.textContent = dark() ? "Light" : "Dark"; };
  button.hidden = false;
  button.addEventListener("click", () => { document.documentElement.dataset.theme = dark() ? "light" : "dark"; name(); });
  system.addEventListener("change", name);
  name();

  // A printed page shows everything behind the folds, except the search.
  addEventListener("beforeprint", () => {
    for (const fold of document.querySelectorAll("details:not(#all)")) fold.open = true;
  });

  const more = byId("more");
  if (!more) return;

  // The examples. Their texts are not trusted, so they are only inserted as text nodes.
  const { models, rows } = JSON.parse(byId("data").textContent);
  const STEP = 20;
  const WORDS = 400;
  let found = rows;
  let shown = 0;

  const element = (tag, className, ...children) => {
    const made = document.createElement(tag);
    if (className) made.className = className;
    made.append(...children);
    return made;
  };

  // Splits a text into nodes in which the searched words are marked.
  const marked = (text, query) => {
    if (!query) return [text];
    const lower = text.toLowerCase();
    if (lower.length !== text.length) return [text]; // the lower case of a letter is longer, so positions differ
    const pieces = [];
    let at = 0;
    for (let next = lower.indexOf(query); next >= 0; next = lower.indexOf(query, at)) {
      pieces.push(text.slice(at, next), element("mark", "", text.slice(next, next + query.length)));
      at = next + query.length;
    }
    pieces.push(text.slice(at));
    return pieces;
  };

  // Indices of the words of `generated` in the longest common subsequence with `truth`: what ROUGE-L counts, except
  // for stemming.
  const common = (truth, generated) => {
    const a = truth.map((word) => word.toLowerCase());
    const b = generated.map((word) => word.toLowerCase());
    const width = b.length + 1;
    const table = new Uint16Array((a.length + 1) * width);
    for (let i = a.length - 1; i >= 0; i -= 1) {
      for (let j = b.length - 1; j >= 0; j -= 1) {
        table[i * width + j] = a[i] === b[j]
          ? table[(i + 1) * width + j + 1] + 1
          : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
      }
    }
    const shared = new Set();
    for (let i = 0, j = 0; i < a.length && j < b.length;) {
      if (a[i] === b[j]) { shared.add(j); i += 1; j += 1; }
      else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i += 1;
      else j += 1;
    }
    return shared;
  };

  const WORD = /[\p{L}\p{N}]+/gu;
  const underlined = (truth, generated, query) => {
    const matches = [...generated.matchAll(WORD)].slice(0, WORDS);
    const shared = common([...truth.matchAll(WORD)].slice(0, WORDS).map((m) => m[0]), matches.map((m) => m[0]));
    const pieces = [];
    let at = 0;
    for (let n = 0; n < matches.length; n += 1) {
      if (!shared.has(n)) continue;
      const first = n;
      while (shared.has(n + 1)) n += 1;
      const end = matches[n].index + matches[n][0].length;
      pieces.push(...marked(generated.slice(at, matches[first].index), query));
      pieces.push(element("u", "", ...marked(generated.slice(matches[first].index, end), query)));
      at = end;
    }
    pieces.push(...marked(generated.slice(at), query));
    return pieces;
  };

  const side = (className, label, note, pieces) => {
    const heading = element("h4", "", element("bdi", "", label));
    if (note) heading.append(element("span", "", note));
    const text = element("p", "said", ...pieces);
    text.dir = "auto";
    return element("div", `side ${className}`, heading, text);
  };

  // Long texts are cut off behind a button.
  const shorten = (row, length) => {
    if (length <= 190) return;
    row.classList.add("short");
    const open = element("button", "", "Show in full");
    open.type = "button";
    open.addEventListener("click", () => {
      open.textContent = row.classList.toggle("short") ? "Show in full" : "Show less";
    });
    row.append(open);
  };

  const card = (row, query) => {
    const heading = element("h3", "", row.name, element("bdi", "", ...marked(row.id, query)));
    const prompt = element("p", "prompt", ...marked(row.input, query));
    prompt.dir = "auto";
    const sides = element("div", "sides", side("truth", "true answer", "", marked(row.output, query)));
    models.forEach((model, index) => {
      const [text, note] = row.said[index] || ["", "not scored"];
      const pieces = text ? underlined(row.output, text, query) : [row.said[index] ? "(empty)" : ""];
      sides.append(side(`m${model.slot}`, model.label, note, pieces));
    });
    const made = element("article", "row", heading, prompt, sides);
    const texts = row.said.map((answer) => (answer ? answer[0].length : 0));
    shorten(made, Math.max(row.input.length / 2, row.output.length, ...texts));
    return made;
  };

  for (const row of document.querySelectorAll("#first .row")) {
    const lengths = [...row.querySelectorAll(".said")].map((text) => text.textContent.length);
    shorten(row, Math.max(row.querySelector(".prompt").textContent.length / 2, ...lengths));
  }

  const show = () => {
    const query = byId("search").value.trim().toLowerCase();
    byId("rows").append(...found.slice(shown, shown + STEP).map((row) => card(row, query)));
    shown = Math.min(shown + STEP, found.length);
    more.hidden = shown >= found.length;
    byId("count").textContent = found.length === rows.length
      ? `${rows.length} rows` : `${found.length} of ${rows.length} rows`;
  };

  const texts = new Map();
  const haystack = (row) => {
    if (!texts.has(row)) {
      const all = [row.id, row.input, row.output, ...row.said.map((answer) => (answer ? answer[0] : ""))];
      texts.set(row, all.join("\n").toLowerCase());
    }
    return texts.get(row);
  };

  const filter = () => {
    const query = byId("search").value.trim().toLowerCase();
    const wanted = ["split", "task", "kind"].map((key) => [key, byId(key).value]).filter(([, value]) => value);
    found = rows.filter((row) => wanted.every(([key, value]) => row[key] === value) && (!query || haystack(row).includes(query)));
    shown = 0;
    byId("rows").replaceChildren();
    show();
  };

  const NAMES = { forget: "forget set", retain: "retain set", knowledge: "questions", regurgitation: "texts" };
  for (const key of ["split", "task", "kind"]) {
    const values = [...new Set(rows.map((row) => row[key]))].filter(Boolean).sort();
    for (const value of values) byId(key).append(new Option((key !== "task" && NAMES[value]) || value, value));
    byId(key).addEventListener("change", filter);
  }
  let waiting = 0;
  byId("search").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, 150); });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").hidden = false;
  more.addEventListener("click", show);
  show();
})();
