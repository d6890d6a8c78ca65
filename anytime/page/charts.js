"use strict";
// The charts: recorded points only. The slider picks among them, it never interpolates.
(async () => {
  // Points and Bokeh are packed in the page, to a fraction of their size, and unpacked after everything else can be read.
  async function unpacked(id) {
    const bytes = Uint8Array.from(atob(document.getElementById(id).textContent), (c) => c.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).text();
  }
  const data = JSON.parse(await unpacked("data"));
  const by = (id) => document.getElementById(id);
  const unique = (values) => [...new Set(values)];
  const [AT, MACS, ACCURACY, LO, HI, LABEL, MS, SHARES] = [0, 1, 2, 3, 4, 5, 6, 7];
  const MARKERS = ["circle", "square", "triangle", "diamond", "inverted_triangle", "hex", "star", "plus", "x", "cross"];
  const GLYPHS = ["●", "■", "▲", "◆", "▼", "⬢", "★", "+", "×", "✛"];
  const DASHES = [[], [6, 3], [2, 2], [8, 3, 2, 3]];
  const columns = unique(data.series.map((s) => s.column)), networks = unique(data.series.map((s) => s.network));
  const executions = unique(data.series.map((s) => s.execution));
  const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const colour = (column) => css(`--c${columns.indexOf(column) % 8}`);
  const hidden = new Set();

  function options(id, values, said = (value) => value) {
    by(id).replaceChildren(...values.map((value) => new Option(said(value), value)));
    by(id).closest("label").hidden = values.length < 2;
  }

  function boxes(id, values, mark) {
    for (const value of values) {
      const label = document.createElement("label"), box = document.createElement("input"), sign = document.createElement("span");
      box.type = "checkbox";
      box.checked = true;
      mark(sign, value);
      box.addEventListener("change", () => { hidden[box.checked ? "delete" : "add"](`${id} ${value}`); draw(); });
      label.dataset.value = value;
      label.append(box, sign, value);
      by(id).append(label);
    }
  }

  options("dataset", unique(data.series.map((s) => s.dataset)));
  options("board", data.boards);
  const policies = unique(data.series.map((s) => s.policy).filter(Boolean));
  options("policy", policies.length > 1 ? ["", ...policies] : policies, (value) => value || "all");
  const arms = unique(data.series.map((s) => s.arm).filter(Boolean));
  options("arm", arms.includes("refitted") ? ["refitted", ...arms.filter((arm) => arm !== "refitted")] : arms);
  boxes("columns", columns, (sign, value) => { sign.className = "chip"; sign.style.background = `var(--c${columns.indexOf(value) % 8})`; });
  boxes("networks", networks, (sign, value) => { sign.textContent = GLYPHS[networks.indexOf(value) % GLYPHS.length]; });

  // What the reader has chosen.
  const own = () => data.series.filter((s) => s.dataset === by("dataset").value);
  const shown = (s) => !hidden.has(`columns ${s.column}`) && !hidden.has(`networks ${s.network}`)
    && (!s.policy || !by("policy").value || s.policy === by("policy").value);
  const who = (s) => JSON.stringify([s.network, s.backend, s.policy]);
  // The policies under the thresholds asked for, and where none are recorded, as in the reference, under its own.
  function visible() {
    const found = own().filter(shown), arm = by("arm").value, there = new Set(found.filter((s) => s.arm === arm).map(who));
    return found.filter((s) => !s.policy || s.arm === arm || (s.arm === "refitted" && !there.has(who(s))));
  }
  const budget = () => Number(by("budget").value);
  // The dearest recorded point within the budget, of those that this chart can place.
  const within = (series, x) => series.points.filter((p) => p[AT] <= budget() + 1e-9 && x(p) != null).at(-1);

  const AXES = {
    "by-macs": { x: (p) => p[MACS] / 1e6, label: () => "MACs (M)" },
    "by-ms": { x: (p) => p[MS][by("board").value], label: () => `mean latency on ${by("board").value} (ms)` },
  };
  const charts = {};

  function build(id) {
    const { Plotting } = Bokeh, axis = AXES[id];
    const xs = own().flatMap((s) => s.points.map(axis.x)).filter((x) => x > 0);
    by(id).closest("figure").hidden = !xs.length;
    if (charts[id]) {
      const old = charts[id].plot.document;
      for (const view of [...Bokeh.index.roots].filter((v) => v.model.document === old)) {
        view.remove();
        Bokeh.index.delete(view);
      }
      Bokeh.documents.splice(Bokeh.documents.indexOf(old), 1);
      delete charts[id];
    }
    if (!xs.length) return;
    const wide = Math.max(...xs) / Math.min(...xs) > 30;
    const plot = Plotting.figure({
      height: 400, sizing_mode: "stretch_width", tools: "pan,box_zoom,wheel_zoom,reset,save", x_axis_type: wide ? "log" : "linear",
      x_axis_label: axis.label(), y_axis_label: "accuracy (%)", background_fill_color: null, border_fill_color: null, outline_line_color: null,
    });
    plot.toolbar.logo = null;
    plot.toolbar.active_drag = null; // a drag scrolls the page until a tool is picked
    for (const a of [...plot.xaxis, ...plot.yaxis]) {
      Object.assign(a, {
        axis_line_color: css("--faint"), major_tick_line_color: css("--faint"), minor_tick_line_color: null, axis_label_text_font_style: "normal",
        major_label_text_color: css("--soft"), axis_label_text_color: css("--soft"), axis_label_text_font_size: "12px", major_label_text_font_size: "12px",
      });
    }
    for (const grid of [...plot.xgrid, ...plot.ygrid]) grid.grid_line_color = css("--line");
    const source = (name, names) => new Bokeh.ColumnDataSource({ name: `${id} ${name}`, data: Object.fromEntries(names.map((n) => [n, []])) });
    const about = ["x", "y", "color", "marker", "who", "what", "said"];
    const lines = source("lines", ["xs", "ys", "color", "dash"]), exits = source("exits", about), trail = source("trail", about);
    const now = source("now", [...about, "lo", "hi"]);
    plot.multi_line({ field: "xs" }, { field: "ys" }, { source: lines, line_color: { field: "color" }, line_dash: { field: "dash" }, line_alpha: 0.6, line_width: 1.5 });
    const dots = (from, size, fill, alpha) => plot.scatter({ field: "x" }, { field: "y" }, {
      source: from, size, marker: { field: "marker" }, line_color: { field: "color" }, fill_color: fill || { field: "color" }, line_alpha: alpha, fill_alpha: alpha,
      line_width: fill ? 2.5 : 1,
    });
    const few = dots(trail, 4, null, 0.45), filled = dots(exits, 8, null, 0.9);
    plot.segment({ field: "x" }, { field: "lo" }, { field: "x" }, { field: "hi" }, { source: now, line_color: { field: "color" }, line_alpha: 0.6, line_width: 1.5 });
    const hollow = dots(now, 13, "transparent", 1);
    plot.add_tools(new Bokeh.HoverTool({ renderers: [few, filled, hollow], limit: 4, tooltips: [["", "@who"], ["", "@what"], ["", "@said"]] }));
    charts[id] = { axis, plot, sources: { lines, exits, trail, now } };
    Plotting.show(plot, by(id));
  }

  function rows(series, points, x) {
    const i = networks.indexOf(series.network);
    return points.filter((p) => x(p) != null).map((p) => ({
      x: x(p), y: 100 * p[ACCURACY], lo: 100 * (p[LO] ?? p[ACCURACY]), hi: 100 * (p[HI] ?? p[ACCURACY]),
      color: colour(series.column), marker: MARKERS[i % MARKERS.length],
      who: `${series.network}, ${series.column}, ${series.execution}`,
      what: [series.policy, series.arm, p[LABEL]].filter(Boolean).join(", "),
      said: `${(100 * p[ACCURACY]).toFixed(2)} % at ${(p[MACS] / 1e6).toFixed(3)} M MACs`
        + Object.entries(p[MS]).map(([board, ms]) => `, ${ms.toFixed(3)} ms on ${board}`).join(""),
    }));
  }

  const fill = (source, found) => {
    source.data = Object.fromEntries(Object.keys(source.data).map((name) => [name, found.map((row) => row[name])]));
  };

  function move() {
    const policies = visible().filter((s) => s.policy), { x } = AXES["by-macs"];
    for (const { axis, sources } of Object.values(charts)) {
      fill(sources.now, policies.flatMap((s) => { const p = within(s, axis.x); return p ? rows(s, [p], axis.x) : []; }));
    }
    by("budget-said").textContent = budget().toFixed(2);
    by("budget").setAttribute("aria-valuetext", `${budget().toFixed(2)} of the reference`);
    by("now").tBodies[0].replaceChildren(...policies.map((s) => {
      const p = within(s, x), tr = document.createElement("tr"), ms = p && p[MS][by("board").value];
      const cells = [s.network, `${s.column}, ${s.execution}`, `${s.policy}, ${s.arm}`, p ? p[LABEL] : "none recorded within the budget"];
      if (p) cells.push((100 * p[ACCURACY]).toFixed(2), (p[MACS] / 1e6).toFixed(3), ms == null ? "–" : ms.toFixed(3), p[SHARES] || "–");
      while (cells.length < 8) cells.push("–");
      tr.append(...cells.map((text) => { const td = document.createElement("td"); td.textContent = text; return td; }));
      return tr;
    }));
  }

  function draw() {
    const series = visible(), exits = series.filter((s) => !s.policy), policies = series.filter((s) => s.policy);
    for (const { axis, sources } of Object.values(charts)) {
      const joined = exits.map((s) => [s, rows(s, s.points, axis.x)]).filter(([, found]) => found.length);
      fill(sources.lines, joined.map(([s, found]) => ({
        xs: found.map((r) => r.x), ys: found.map((r) => r.y), color: colour(s.column), dash: DASHES[executions.indexOf(s.execution) % DASHES.length],
      })));
      fill(sources.exits, joined.flatMap(([, found]) => found));
      fill(sources.trail, policies.flatMap((s) => rows(s, s.points, axis.x)));
    }
    move();
  }

  function rebuild() {
    const points = own().filter((s) => s.policy).flatMap((s) => s.points), asked = unique(points.filter((p) => p[LABEL].startsWith("budget")).map((p) => p[AT]));
    const slider = by("budget"), value = slider.value;
    slider.min = 0;
    slider.max = Math.ceil(100 * Math.max(1, ...points.map((p) => p[AT])) - 1e-9) / 100;
    slider.step = 0.01;
    const middle = asked.sort((a, b) => a - b)[Math.floor((asked.length - 1) / 2)] ?? 1;
    slider.value = slider.dataset.moved ? value : Math.ceil(100 * middle - 1e-9) / 100; // the step that reaches it
    by("asked").replaceChildren(...asked.map((at) => new Option("", at)));
    by("whole").textContent = data.first[by("dataset").value] || "the dearest network";
    document.querySelector(".budget").hidden = !points.length;
    by("now").parentElement.hidden = !points.length;
    for (const [id, key] of [["columns", "column"], ["networks", "network"]]) {
      const there = new Set(own().map((s) => s[key]));
      for (const label of by(id).querySelectorAll("label")) label.hidden = !there.has(label.dataset.value);
    }
    Object.keys(AXES).forEach(build);
    draw();
  }

  by("budget").addEventListener("input", () => { by("budget").dataset.moved = "yes"; move(); });
  for (const id of ["dataset", "board"]) by(id).addEventListener("change", rebuild);
  for (const id of ["policy", "arm"]) by(id).addEventListener("change", draw);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", rebuild);

  const script = document.createElement("script");
  script.textContent = await unpacked("bokeh");
  document.head.append(script);
  rebuild();
})().catch((error) => {
  document.documentElement.classList.remove("script"); // the page as it is without a script
  throw error;
});
