"use strict";
// Without this script the page shows everything; the script adds choosing, sorting and reading off.

// one heat map at a time, and what its cells show
for (const box of document.querySelectorAll(".matrices")) {
  const runs = [...box.querySelectorAll(".run")];
  const select = box.querySelector("select");
  const show = () => runs.forEach((run, i) => { run.hidden = i !== select.selectedIndex; });
  select.addEventListener("change", show);
  select.parentElement.hidden = runs.length < 2;
  show();
  const views = box.querySelector(".views");
  views.hidden = false;
  views.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    for (const other of views.children) other.setAttribute("aria-pressed", String(other === button));
    for (const table of box.querySelectorAll(".heat")) {
      table.dataset.view = button.dataset.view;
      table.classList.toggle("change", button.dataset.view === "change");
      table.classList.toggle("level", button.dataset.view !== "change");
    }
  });
}

// a line below each heat map says what a cell holds: point at it, tap it, or move there with the arrow keys
for (const table of document.querySelectorAll(".heat")) {
  const readout = table.closest("figure").querySelector(".readout");
  const rows = [...table.tBodies[0].rows].map((row) => [...row.querySelectorAll("td:not(.mean)")]);
  let at = null;
  const read = (cell) => {
    if (at) at.classList.remove("at");
    at = cell;
    cell.classList.add("at");
    const head = table.tHead.rows[0].cells[cell.cellIndex];
    const [accuracy, interval, change] = ["b", "i", "u"].map((part) => cell.querySelector(part).textContent);
    const after = cell.parentElement.cells[0].title;
    const parts = [`${after === "zero-shot" ? "zero-shot" : `after ${after}`}, on ${head.title}: ${accuracy} %`];
    if (interval !== "–") parts.push(`95 % interval ${interval}`);
    if (change !== "–") parts.push(`${change} against zero-shot`);
    if (head.dataset.images) parts.push(`${head.dataset.images} test images`);
    readout.textContent = parts.join("; ");
  };
  for (const kind of ["pointerover", "click"]) {
    table.addEventListener(kind, (event) => {
      const cell = event.target.closest("td:not(.mean)");
      if (cell) read(cell);
    });
  }
  table.addEventListener("keydown", (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    const i = rows.findIndex((cells) => cells.includes(at));
    const next = i < 0 ? [0, 0] : [i + step[0], rows[i].indexOf(at) + step[1]];
    const cell = (rows[next[0]] || [])[next[1]];
    if (cell) {
      read(cell);
      cell.scrollIntoView({ block: "nearest", inline: "nearest" });
    }
  });
}

// a click on a column's head sorts a table
for (const table of document.querySelectorAll(".sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, i) => row.cells[i].dataset.value || row.cells[i].textContent.trim();
  heads.forEach((head, i) => {
    const sort = () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const rows = [...table.tBodies[0].rows].sort((a, b) => {
        const [x, y] = [value(a, i), value(b, i)];
        const order = x - y;
        return (Number.isNaN(order) ? x.localeCompare(y) : order) * (up ? 1 : -1);
      });
      table.tBodies[0].append(...rows);
    };
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
  });
}

// a strategy in a legend or table brings out its lines in the charts of its section
for (const section of document.querySelectorAll(".experiment")) {
  const bring = (name) => {
    section.classList.toggle("faded", name !== null);
    for (const line of section.querySelectorAll("[data-series]")) line.classList.toggle("shown", line.dataset.series === name);
  };
  for (const item of section.querySelectorAll("[data-for]")) {
    for (const kind of ["pointerenter", "focus"]) item.addEventListener(kind, () => bring(item.dataset.for));
    for (const kind of ["pointerleave", "blur"]) item.addEventListener(kind, () => bring(null));
  }
}

// paper shows what is folded on the screen
const folded = new Set();
addEventListener("beforeprint", () => {
  for (const box of document.querySelectorAll("details:not([open])")) { folded.add(box); box.open = true; }
});
addEventListener("afterprint", () => {
  for (const box of folded) box.open = false;
  folded.clear();
});
