// The table and the charts. Texts of the run reach the page through textContent alone.
const read = (id) => JSON.parse(document.getElementById(id).textContent);
const table = read("data");
const specs = read("charts");
const $ = (id) => document.getElementById(id);
const element = (name, className, text) => {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
};

// --- table of all ops ---
const SIZE = 100;
const columns = table.columns;
const at = Object.fromEntries(columns.map((column, index) => [column.key, index]));
const NUMBERS = new Set(["score", "decibel", "ratio", "count", "share"]);
const total = table.total ? table.rows.pop() : null;
const found = table.rows.map((row) => columns.map((c, i) => (typeof row[i] === "string" ? row[i] : "")).join(" ").toLowerCase());
const state = { column: at[table.order] ?? 0, down: table.order !== null, start: 0 };

const minus = (text) => text.replace(/-/g, "\u2212");
const score = (value) => (value === 0 ? "0" : minus(value.toExponential(2)));
const shown = {
  score, ratio: (v) => `\u00d7${v >= 100 ? v.toExponential(1) : v.toFixed(2)}`, decibel: (v) => minus(v.toFixed(1)),
  share: (v) => v.toFixed(3), count: (v) => v.toLocaleString("en"),
};

function order(value) { // what a cell is sorted by; null is last in both directions
  if (Array.isArray(value)) return value[0];
  if (value === "\u221e") return Infinity;
  return value === "" ? null : value;
}

function compare(a, b) {
  const one = order(a[state.column]), other = order(b[state.column]);
  if (one === null || other === null) return (one === null) - (other === null);
  const sign = state.down ? -1 : 1;
  if (typeof one === "string") return sign * one.localeCompare(other, "en", { numeric: true });
  return sign * (one - other || 0);
}

function cell(column, value) {
  const { kind } = column;
  if (NUMBERS.has(kind)) {
    const made = element("td", "number");
    if (value === null) return made;
    if (Array.isArray(value)) {
      made.append(`\u2248 ${score(value[0])}`, element("span", "bounds", `${score(value[1])} \u2026 ${score(value[2])}`));
    } else made.textContent = typeof value === "string" ? value : shown[kind](value);
    if (kind === "ratio") made.classList.add(value > 1.005 ? "bad" : value < 0.995 ? "good" : "quiet");
    return made;
  }
  const made = element("td", { name: "name", note: "why" }[kind] ?? "");
  if (kind === "status" && value) made.append(element("span", `status ${value}`, value));
  else if (kind === "name") value.split(/(?<=[.:/])/).forEach((part, i) => made.append(...(i ? [element("wbr")] : []), part));
  else made.textContent = value ?? "";
  if (column.key === "change" && value === table.same) made.classList.add("quiet");
  return made;
}

function line(row, className) {
  const made = element("tr", className);
  made.append(...columns.map((column, i) => cell(column, row[i])));
  return made;
}

function chosen() {
  const words = $("words").value.toLowerCase().split(/\s+/).filter(Boolean);
  const by = ["status", "type", "change"].map((key) => [at[key], $(`by-${key}`).value]).filter(([, value]) => value);
  return table.rows.filter((row, i) => words.every((w) => found[i].includes(w)) && by.every(([c, value]) => row[c] === value));
}

function draw() {
  const rows = chosen().sort(compare);
  state.start = Math.min(state.start, Math.max(0, Math.floor((rows.length - 1) / SIZE) * SIZE));
  const end = Math.min(rows.length, state.start + SIZE);
  const lines = rows.slice(state.start, end).map((row) => line(row));
  if (total) lines.unshift(line(total, "total"));
  $("ops").tBodies[0].replaceChildren(...lines);
  $("count").textContent = `${rows.length.toLocaleString("en")} of ${table.rows.length.toLocaleString("en")} ${table.unit}s`;
  document.querySelectorAll("#ops th").forEach((head, i) => {
    if (i === state.column) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
  const pages = $("pages");
  pages.replaceChildren();
  if (rows.length > SIZE) {
    const button = (text, start, able) => {
      const made = element("button", "", text);
      made.type = "button";
      made.disabled = !able;
      made.addEventListener("click", () => { state.start = start; draw(); });
      return made;
    };
    pages.append(
      button("\u2190 previous", state.start - SIZE, state.start > 0),
      `${state.start + 1} to ${end} of ${rows.length.toLocaleString("en")}`,
      button("next \u2192", state.start + SIZE, end < rows.length),
    );
  }
}

function head() {
  const row = element("tr");
  columns.forEach((column, i) => {
    const th = element("th", NUMBERS.has(column.kind) ? "number" : "");
    th.scope = "col";
    const button = element("button", "", column.title);
    button.type = "button";
    button.addEventListener("click", () => {
      state.down = state.column === i ? !state.down : NUMBERS.has(column.kind);
      state.column = i;
      state.start = 0;
      draw();
    });
    th.append(button);
    row.append(th);
  });
  $("ops").tHead.append(row);
}

function filters() {
  for (const key of ["status", "type", "change"]) {
    const select = $(`by-${key}`);
    const values = key in at ? [...new Set(table.rows.map((row) => row[at[key]]))].filter(Boolean).sort() : [];
    if (values.length < 2) select.parentElement.hidden = true;
    values.forEach((value) => select.append(new Option(value, value)));
  }
  $("filters").addEventListener("submit", (event) => event.preventDefault());
  $("filters").addEventListener("input", () => { state.start = 0; draw(); });
}

head();
filters();
draw();
document.documentElement.dataset.table = String(Math.round(performance.now()));

// --- charts: each is drawn when it comes near the window, and again when the theme changes ---
const dark = matchMedia("(prefers-color-scheme: dark)");

function theme() {
  const style = getComputedStyle(document.documentElement);
  const [ink, muted, rule] = ["--ink", "--muted", "--line"].map((name) => style.getPropertyValue(name).trim());
  return {
    background: null, font: getComputedStyle(document.body).fontFamily, view: { stroke: null },
    axis: { labelColor: muted, titleColor: muted, titleFontWeight: "normal", gridColor: rule, domainColor: rule, tickColor: rule, labelFontSize: 11, titleFontSize: 11.5 },
    legend: { labelColor: muted, titleColor: muted, titleFontWeight: "normal", labelFontSize: 11, titleFontSize: 11.5 },
    style: { reference: { stroke: muted, fill: null } }, rule: { color: ink },
  };
}

function themed(spec) { // more is what stands out from the ground: dark on light, light on dark
  const made = structuredClone(spec);
  const scale = made.encoding?.color?.condition?.scale;
  if (scale) scale.reverse = !dark.matches;
  return made;
}

async function show(place) {
  const spec = themed(specs[place.dataset.chart]);
  const narrow = place.clientWidth < 520;
  if (narrow && spec.encoding?.y?.axis) spec.encoding.y.axis.labelLimit = Math.round(place.clientWidth * 0.36);
  place.view?.finalize();
  const { view } = await window.vegaEmbed(place, spec, {
    mode: "vega-lite", ast: true, actions: false, defaultStyle: false, renderer: "canvas", config: theme(), tooltip: { disableDefaultStyle: true },
  });
  place.view = view;
  place.dataset.drawn = "yes";
}

const watch = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { watch.unobserve(entry.target); show(entry.target); }
}, { rootMargin: "300px" });
const places = document.querySelectorAll(".chart");
dark.addEventListener("change", () => places.forEach((place) => { if (place.dataset.drawn) show(place); }));
addEventListener("load", () => { // the library is there; the table does not wait for it
  places.forEach((place) => watch.observe(place));
  document.documentElement.dataset.ready = String(Math.round(performance.now()));
});
