"use strict";
// Makes the page of the data in #data. All text goes through textContent: it is never markup.
const data = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");
const tip = element(document.body, "div");
tip.id = "tip";
const pending = [];

function element(parent, tag, text, className) {
  const made = document.createElement(tag);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  parent.append(made);
  return made;
}

function section(id, title) {
  const heading = element(main, "h2", title);
  heading.id = id;
  const link = element(document.getElementById("nav"), "a", title);
  link.href = "#" + id;
  return element(main, "div");
}

// Rows of a table: of a grid (names, shape, values) or of columns.
function rowsOf(table) {
  if (table.columns) {
    const names = Object.keys(table.columns);
    return table.columns[names[0]].map((_, i) =>
      Object.fromEntries(names.map((name) => [name, table.columns[name][i]])));
  }
  return table.values.map((value, flat) => {
    const row = { value };
    for (let d = table.shape.length - 1; d >= 0; d--) {
      const place = flat % table.shape[d];
      flat = (flat - place) / table.shape[d];
      const labels = table.labels[table.names[d]];
      row[table.names[d]] = labels ? labels[place] : place;
    }
    if (table.partner) row["expert of the other run"] = table.partner[row.layer][row.matched];
    return row;
  });
}

function drawChart(parent, chart) {
  const card = element(parent, "div", undefined, "card");
  element(card, "h3", chart.title);
  element(card, "p", chart.about, "about");
  const place = element(card, "div");
  const spec = { ...chart.spec, data: { values: rowsOf(chart.table) }, background: "white" };
  const done = vegaEmbed(place, spec, { actions: false, renderer: "canvas", ast: false })
    .catch((error) => {
      element(card, "p", "This chart cannot be drawn: " + error.message, "note error");
    });
  pending.push(done);
}

function hue(expert) {
  // The golden angle: neighbours in number are far apart in colour.
  return `hsl(${(expert * 137.508) % 360} 75% ${expert % 2 ? 72 : 82}%)`;
}

function select(parent, label, options, change) {
  const wrap = element(parent, "label", label + " ");
  const made = element(wrap, "select");
  options.forEach((text, i) => { element(made, "option", text).value = i; });
  made.addEventListener("change", () => change(Number(made.value)));
  return made;
}

function layersOf(number) {
  return [...Array(number).keys()].map((layer) => "layer " + layer);
}

function drawFacts(parent, run) {
  const card = element(parent, "div", undefined, "card");
  element(card, "h3", run.name);
  const table = element(card, "table");
  for (const [name, value] of Object.entries(run.facts)) {
    const row = element(table, "tr");
    element(row, "th", name);
    element(row, "td", value);
  }
  for (const note of run.notes) element(card, "p", note, "note");
  if (run.dead) {
    const dead = run.dead.map(([layer, expert]) => `${layer}/${expert}`).join(", ");
    const text = `Dead experts at the end (layer/expert, less than 1 % of the even load): `;
    element(card, "p", text + (dead || "none"), "dead");
    const percent = (100 * run.dropped).toFixed(2);
    element(card, "p", `Dropped held-out assignments: ${percent} %`, "drops");
  }
}

function drawTypical(parent, run) {
  const card = element(parent, "div", undefined, "card typical");
  element(card, "h3", "Most typical tokens of each expert");
  element(card, "p", "Tokens by how much more often they go to the expert than tokens in general " +
    "(the number behind them), of those that occur often enough.", "about");
  const table = element(card, "table");
  function fill(layer) {
    table.replaceChildren();
    run.typical[layer].forEach((tokens, expert) => {
      const row = element(table, "tr");
      element(row, "th", "expert " + expert).style.background = hue(expert);
      const cell = element(row, "td");
      for (const [text, lift, count] of tokens) {
        const shown = element(cell, "code", visible(text), "piece");
        shown.title = `${count} times`;
        element(cell, "small", `${lift} `);
      }
      if (!tokens.length) element(cell, "small", "no frequent token");
    });
  }
  card.insertBefore(select(card, "", layersOf(run.typical.length), fill).parentNode, table);
  fill(0);
}

function visible(text) {
  return text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "␣");
}

function drawPaths(parent, run) {
  const card = element(parent, "div", undefined, "card paths");
  element(card, "h3", "Most frequent paths through the layers");
  element(card, "p", "First choices from the first layer to the last; the share of tokens, and how " +
    "many times more than if layers chose independently.", "about");
  const table = element(card, "table");
  for (const [experts, share, expected] of run.paths) {
    const row = element(table, "tr");
    const cell = element(row, "td");
    experts.forEach((expert, i) => {
      if (i) element(cell, "span", " → ");
      element(cell, "span", expert, "piece").style.background = hue(expert);
    });
    element(row, "td", (100 * share).toFixed(2) + " %");
    element(row, "td", expected > 0 ? "× " + (share / expected).toPrecision(3) : "");
  }
}

function drawText(parent, run) {
  const card = element(parent, "div", undefined, "card text");
  element(card, "h3", "Text by expert");
  element(card, "p", "Each token has the colour of its first choice. The pointer on a token shows " +
    "its gates; a click on an expert shows its tokens alone; struck out = dropped.", "about");
  const controls = element(card, "div");
  const key = element(card, "div", undefined, "key");
  const body = element(card, "div", undefined, "tokens");
  let layer = 0, part = 0, only = -1;
  function fill() {
    const shown = run.text[part];
    body.replaceChildren();
    const used = new Set();
    shown.tokens.forEach((text, i) => {
      const experts = shown.expert[layer][i], gates = shown.gate[layer][i];
      const first = experts[0];
      used.add(first);
      const span = element(body, "span", text.replaceAll("\n", "⏎\n"));
      if (first < run.num_experts) span.style.background = hue(first);
      if (shown.dropped[layer][i]) span.classList.add("dropped");
      if (only >= 0 && !experts.includes(only)) span.classList.add("faded");
      span.addEventListener("mouseenter", (event) => {
        const lines = experts.map((expert, k) => expert < run.num_experts
          ? `${k + 1}. expert ${expert}, gate ${gates[k]}` : null).filter((line) => line);
        tip.textContent = `"${visible(text)}", layer ${layer}\n` + (lines.join("\n") || "nowhere");
        tip.style.display = "block";
        tip.style.left = Math.min(event.clientX + 12, innerWidth - 200) + "px";
        tip.style.top = event.clientY + 14 + "px";
      });
      span.addEventListener("mouseleave", () => { tip.style.display = "none"; });
    });
    key.replaceChildren();
    for (const expert of [...used].filter((e) => e < run.num_experts).sort((a, b) => a - b)) {
      const entry = element(key, "span", expert);
      entry.style.background = hue(expert);
      if (expert === only) entry.classList.add("chosen");
      entry.addEventListener("click", () => { only = only === expert ? -1 : expert; fill(); });
    }
  }
  select(controls, "", layersOf(run.text[0].expert.length), (i) => { layer = i; only = -1; fill(); });
  select(controls, " ", run.text.map((each) => each.domain), (i) => { part = i; fill(); });
  fill();
}

// A section in which every run has a column.
function sides(id, title, draw, has) {
  const runs = data.runs.filter(has);
  if (!runs.length) return;
  const place = section(id, title);
  const row = element(place, "div", undefined, "sides");
  for (const run of runs) {
    const side = element(row, "div", undefined, "side");
    if (data.runs.length > 1) element(side, "h3", run.name);
    draw(side, run);
  }
}

sides("runs", "Runs", drawFacts, () => true);
if (data.curves.length) {
  const row = element(section("curves", "Curves"), "div", undefined, "row");
  for (const chart of data.curves) drawChart(row, chart);
}
sides("routing", "Routing", (side, run) => {
  const row = element(side, "div", undefined, "row");
  for (const chart of run.charts) drawChart(row, chart);
}, (run) => run.charts.length);
sides("tokens", "Tokens and paths", (side, run) => {
  const row = element(side, "div", undefined, "row");
  drawTypical(row, run);
  drawPaths(row, run);
}, (run) => run.typical);
sides("text", "Text", drawText, (run) => run.text && run.text.length);
if (data.matches) {
  const place = section("matched", "Experts matched across runs");
  for (const note of data.matches.notes) element(place, "p", note, "note");
  const row = element(place, "div", undefined, "row");
  for (const chart of data.matches.charts) drawChart(row, chart);
}
// A test waits for this.
Promise.all(pending).then(() => { document.body.dataset.drawn = String(pending.length); });
