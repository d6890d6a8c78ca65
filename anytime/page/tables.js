"use strict";
// Sorting and filtering of the tables that are in the page; without this script they are all there, in their own order.
(() => {
  const FIRST = 200; // rows shown before "show all": sorting thousands must not lay out thousands
  document.documentElement.classList.add("script");

  const number = (text) => {
    const found = text.replace(/^[~+≤\s]+/, "").match(/^-?\d+(\.\d+)?(e[-+]?\d+)?/i);
    return found ? Number(found[0]) : NaN;
  };
  const words = new Intl.Collator("en", { numeric: true });

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function control(table) {
    const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells], title = table.caption.textContent;
    const rows = [...body.rows].map((tr) => ({ tr, text: tr.textContent.toLowerCase() }));
    let shown = rows, order = null, all = rows.length <= FIRST;
    const cell = (row, column) => row.tr.cells[column].textContent;

    const search = element("input", { type: "search", placeholder: "filter rows", "aria-label": `filter rows of ${title}` });
    const said = element("output", { "aria-live": "polite" });
    const more = element("button", { type: "button" });
    const bar = element("div", { class: "bar-of-table" }, search);
    const selects = new Map();
    heads.forEach((head, column) => {
      if (!("f" in head.dataset)) return;
      const values = new Set(rows.map((row) => cell(row, column)));
      if (values.size < 2) return;
      const select = element("select", { "aria-label": `${head.textContent} of ${title}` });
      select.append(element("option", { value: "" }, `${head.textContent}: all`));
      for (const value of [...values].sort(words.compare)) select.append(element("option", { value: `=${value}` }, value || "(none)"));
      select.addEventListener("change", draw);
      selects.set(column, select);
      bar.append(select);
    });
    bar.append(said, more);
    table.parentElement.before(bar);

    function draw() {
      const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean);
      const picked = [...selects].filter(([, select]) => select.value);
      shown = rows.filter((row) => wanted.every((word) => row.text.includes(word))
        && picked.every(([column, select]) => `=${cell(row, column)}` === select.value));
      if (order) {
        const numeric = "n" in heads[order.column].dataset, sign = order.down ? -1 : 1;
        const keyed = shown.map((row, i) => ({ row, i, key: cell(row, order.column) }));
        if (numeric) keyed.forEach((one) => { one.key = number(one.key); });
        const empty = (key) => (numeric ? Number.isNaN(key) : key === "");
        keyed.sort((a, b) => (empty(a.key) - empty(b.key)) // what says nothing comes last, whichever way
          || (empty(a.key) ? 0 : sign * (numeric ? a.key - b.key : words.compare(a.key, b.key))) || a.i - b.i);
        shown = keyed.map((one) => one.row);
      }
      body.replaceChildren(...shown.slice(0, all ? undefined : FIRST).map((row) => row.tr));
      const cut = !all && shown.length > FIRST;
      said.textContent = cut ? `the first ${FIRST} of ${shown.length} rows` : `${shown.length} of ${rows.length} rows`;
      more.hidden = rows.length <= FIRST;
      more.textContent = all ? `show the first ${FIRST}` : "show all";
    }

    heads.forEach((head, column) => {
      if (head.querySelector(".sr")) return;
      const button = element("button", { type: "button" }, head.textContent);
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        order = order && order.column === column ? (order.down ? { column, down: false } : null) : { column, down: "n" in head.dataset };
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        if (order) head.setAttribute("aria-sort", order.down ? "descending" : "ascending");
        draw();
      });
    });
    let soon = 0;
    search.addEventListener("input", () => { clearTimeout(soon); soon = setTimeout(draw, 80); });
    more.addEventListener("click", () => { all = !all; draw(); });
    draw();
  }

  document.querySelectorAll("table[data-sort]").forEach(control);
  document.addEventListener("focusin", ({ target }) => { // names of thousands of links, given when they are needed
    if (target.matches("td > a[href^='#n']")) target.setAttribute("aria-label", "spec, facts and records of this row");
  });

  // A link to what is folded away opens it.
  const open = () => {
    const target = location.hash.length > 1 && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target && target.tagName === "DETAILS") {
      target.open = true;
      target.scrollIntoView();
    }
  };
  addEventListener("hashchange", open);
  open();
})();
