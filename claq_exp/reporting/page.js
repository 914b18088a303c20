"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);

  function make(tag, properties = {}, ...children) {
    const element = document.createElement(tag);
    for (const [key, value] of Object.entries(properties)) {
      if (key === "dataset") Object.assign(element.dataset, value);
      else if (key in element) element[key] = value;
      else element.setAttribute(key, value);
    }
    element.append(...children);
    return element;
  }

  /* Tables: a button in each heading sorts, a box above filters. */

  function keyOf(row, column) {
    const cell = row.cells[column];
    if (cell === undefined) return null;
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    const text = cell.textContent.trim();
    return text === "" ? null : text;
  }

  function compare(one, other) {
    if (typeof one === "number" && typeof other === "number") return one - other;
    return String(one).localeCompare(String(other), "en", { numeric: true });
  }

  function sortTable(table, column, descending) {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const pinned = rows.filter((row) => row.classList.contains("original"));
    const free = rows.filter((row) => !row.classList.contains("original"));
    const keys = new Map(free.map((row) => [row, keyOf(row, column)]));
    free.sort((one, other) => {
      const [a, b] = [keys.get(one), keys.get(other)];
      if (a === null || b === null) return (a === null) - (b === null);
      return descending ? compare(b, a) : compare(a, b);
    });
    body.append(...pinned, ...free);
  }

  function makeSortable(table) {
    const headings = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
    headings.forEach((heading, column) => {
      const button = make("button", { type: "button", title: "Sort by this column" });
      button.append(...heading.childNodes);
      heading.append(button);
      button.addEventListener("click", () => {
        const descending = heading.getAttribute("aria-sort") === "ascending";
        headings.forEach((other) => other.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sortTable(table, column, descending);
      });
    });
  }

  function makeSearchable(table, place, name) {
    const input = make("input", { type: "search", placeholder: "Filter rows" });
    input.setAttribute("aria-label", `Filter the rows of: ${name}`);
    const count = make("span", { className: "faint" });
    count.setAttribute("role", "status");
    const update = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      const rows = [...table.tBodies[0].rows].filter((row) => !row.classList.contains("original"));
      let shown = 0;
      for (const row of rows) {
        const text = `${row.textContent} ${row.dataset.run ?? ""}`.toLowerCase();
        row.hidden = !words.every((word) => text.includes(word));
        shown += !row.hidden;
      }
      count.textContent = words.length ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
    };
    input.addEventListener("input", update);
    place.append(input, count);
    update();
  }

  function furnish(table, name) {
    const tools = make("div", { className: "tools" });
    const holder = table.closest(".scroll") ?? table;
    holder.before(tools);
    makeSearchable(table, tools, name);
    makeSortable(table);
  }

  /* Details of a run, drawn when they are asked for. */

  function show(value) {
    if (value === null) return "null";
    return typeof value === "string" ? value : JSON.stringify(value);
  }

  function tree(config, differing, prefix) {
    const parts = [];
    for (const [key, value] of Object.entries(config)) {
      const path = prefix + key;
      if (value !== null && typeof value === "object" && !Array.isArray(value) && Object.keys(value).length) {
        const differs = Object.keys(differing).some((other) => other.startsWith(`${path}.`));
        const group = make("details", { open: differs, className: differs ? "differs" : "" });
        group.append(make("summary", {}, key), ...tree(value, differing, `${path}.`));
        parts.push(group);
      } else {
        const differs = Object.hasOwn(differing, path);
        const leaf = make("div", { className: differs ? "leaf differs" : "leaf" }, `${key}: `);
        const text = show(value);
        leaf.append(differs ? make("mark", { title: `Others: ${differing[path]}` }, text) : text);
        parts.push(leaf);
      }
    }
    return parts;
  }

  function configPart(run) {
    const box = make("div", { className: "tree" }, ...tree(run.config, data.differing, ""));
    const open = make("button", { type: "button" }, "Open all");
    open.addEventListener("click", () => {
      const groups = [...box.querySelectorAll("details")];
      const closed = groups.some((group) => !group.open);
      groups.forEach((group) => { group.open = closed; });
      open.textContent = closed ? "Close all" : "Open all";
    });
    const only = make("input", { type: "checkbox" });
    only.addEventListener("change", () => box.classList.toggle("only-differing", only.checked));
    const label = make("label", {}, only, " only what differs between runs");
    return [make("h4", {}, "Settings"), make("div", { className: "tools" }, open, label), box];
  }

  const RAMP = [[0, 34, 78], [53, 69, 108], [102, 105, 112], [148, 142, 119], [200, 184, 102], [254, 232, 56]];

  function colour(share) {
    const place = Math.min(Math.max(share, 0), 1) * (RAMP.length - 1);
    const low = Math.min(Math.floor(place), RAMP.length - 2);
    const mix = RAMP[low].map((part, i) => Math.round(part + (RAMP[low + 1][i] - part) * (place - low)));
    return `rgb(${mix.join(", ")})`;
  }

  function nameInside(name, block) {
    const parts = String(name).split(`.${block}.`);
    return parts.length > 1 ? parts.slice(1).join(`.${block}.`) : String(name);
  }

  function heatMap(layers, column, readout) {
    const blockAt = layers.columns.indexOf("block");
    const nameAt = layers.columns.indexOf("name");
    const at = layers.columns.indexOf(column);
    const values = new Map();
    const names = new Map();
    const blocks = new Set();
    for (const row of layers.rows) {
      const name = nameInside(row[nameAt], row[blockAt]);
      names.set(name, true);
      blocks.add(row[blockAt]);
      if (typeof row[at] === "number") values.set(`${row[blockAt]} ${name}`, row[at]);
    }
    const numbers = [...values.values()];
    const least = Math.min(...numbers);
    const most = Math.max(...numbers);
    const log = least > 0 && most > 10 * least;
    const scale = (value) => {
      if (most === least) return 0.5;
      return log ? Math.log(value / least) / Math.log(most / least) : (value - least) / (most - least);
    };
    const ordered = [...blocks].sort((a, b) => a - b);
    const head = make("tr", {}, make("th", { scope: "col" }, "layer"));
    ordered.forEach((block) => head.append(make("th", { scope: "col" }, String(block))));
    const body = make("tbody");
    for (const name of names.keys()) {
      const row = make("tr", {}, make("th", { scope: "row" }, name));
      for (const block of ordered) {
        const value = values.get(`${block} ${name}`);
        const told = `block ${block}, ${name}: ${column} ${value ?? "no value"}`;
        const cell = make("td", { tabIndex: -1, title: told });
        cell.setAttribute("aria-label", told);
        if (value === undefined) cell.className = "empty";
        else cell.style.backgroundColor = colour(scale(value));
        row.append(cell);
      }
      body.append(row);
    }
    const caption = make("caption", {}, `${column}, block by layer`);
    const table = make("table", {}, caption, make("thead", {}, head), body);
    const tell = (cell) => { if (cell) readout.textContent = cell.title; };
    table.addEventListener("pointerover", (event) => tell(event.target.closest("td")));
    table.addEventListener("focusin", (event) => tell(event.target.closest("td")));
    walkable(body);
    const ramp = make("span", { className: "ramp" });
    const stops = RAMP.map((_, i) => colour(i / (RAMP.length - 1))).join(", ");
    ramp.style.backgroundImage = `linear-gradient(to right, ${stops})`;
    const range = make("p", { className: "faint" }, `${least} `, ramp, ` ${most}${log ? " (logarithmic)" : ""}`);
    return numbers.length ? [make("div", { className: "scroll" }, table), range] : [make("p", {}, "No values.")];
  }

  function walkable(body) {
    const first = body.querySelector("td");
    if (first) first.tabIndex = 0;
    const steps = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] };
    body.addEventListener("keydown", (event) => {
      const cell = event.target.closest("td");
      const step = steps[event.key];
      if (!cell || !step) return;
      event.preventDefault();
      const next = body.rows[cell.parentNode.sectionRowIndex + step[0]]?.cells[cell.cellIndex + step[1]];
      if (!next || next.tagName !== "TD") return;
      cell.tabIndex = -1;
      next.tabIndex = 0;
      next.focus();
    });
  }

  function layersPart(run) {
    if (!run.layers) return [];
    const layers = unpack(run.layers);
    const measured = layers.columns.filter(
      (column, at) => column !== "block" && layers.rows.some((row) => typeof row[at] === "number"),
    );
    const readout = make("p", { className: "readout" }, "Point at a field, or walk with the arrow keys.");
    readout.setAttribute("aria-live", "polite");
    const map = make("div", { className: "map" });
    const select = make("select", {}, ...measured.map((column) => make("option", { value: column }, column)));
    select.value = measured.includes("output_error") ? "output_error" : measured[0];
    const draw = () => map.replaceChildren(...heatMap(layers, select.value, readout));
    select.addEventListener("change", draw);
    draw();
    const head = make("tr", {}, ...layers.columns.map((column) => make("th", { scope: "col", className: column === "name" ? "" : "number" }, column)));
    const body = make("tbody", {}, ...layers.rows.map((row) => make("tr", {}, ...row.map((value) => {
      const number = typeof value === "number";
      const cell = make("td", { className: number ? "number" : "" }, value === null ? "" : String(value));
      if (number) cell.dataset.value = value;
      return cell;
    }))));
    const table = make("table", { className: "layers" }, make("caption", {}, "All layers"), make("thead", {}, head), body);
    const scroll = make("div", { className: "scroll" }, table);
    const rows = make("details", {}, make("summary", {}, `All ${layers.rows.length} layers as a table`), scroll);
    furnish(table, `layers of ${run.name}`);
    const tools = make("div", { className: "tools" }, make("label", {}, "Colours show ", select));
    return [make("h4", {}, "Layers"), tools, map, readout, rows];
  }

  function unpack(stored) {
    const shared = data.shared[stored.shared];
    const columns = [...Object.keys(shared), ...Object.keys(stored.columns)];
    const lists = [...Object.values(shared), ...Object.values(stored.columns)];
    const order = data.layerColumns.filter((column) => columns.includes(column));
    const rows = lists.length ? lists[0].map((_, i) => order.map((column) => lists[columns.indexOf(column)][i])) : [];
    return { columns: order, rows };
  }

  function factsPart(run) {
    const rows = run.facts.map(([key, value]) => make("tr", {}, make("th", { scope: "row" }, key), make("td", { className: "wide" }, String(value))));
    const parts = [make("div", { className: "scroll" }, make("table", {}, make("tbody", {}, ...rows)))];
    if (!run.measures.length) return parts;
    const head = make("tr", {}, ...["measure", "original", "quantized", "standard error"].map((name, i) => make("th", { scope: "col", className: i ? "number" : "" }, name)));
    const body = make("tbody", {}, ...run.measures.map((row) => make("tr", {}, ...row.map((value, i) => {
      const cell = make("td", { className: i ? "number" : "" }, value === null ? "" : String(value));
      if (i && value !== null) cell.dataset.value = value;
      return cell;
    }))));
    const table = make("table", {}, make("caption", {}, "All that was measured"), make("thead", {}, head), body);
    parts.push(make("div", { className: "scroll" }, table));
    makeSortable(table);
    return parts;
  }

  function openRun(number, focus) {
    const id = `run-${number}`;
    let box = document.getElementById(id);
    if (!box) {
      const run = data.runs[number];
      const close = make("button", { type: "button" }, "Close");
      box = make("article", { className: "run", id, tabIndex: -1 }, make("h3", {}, run.name), close);
      box.setAttribute("aria-label", `Run ${run.name}`);
      close.addEventListener("click", () => {
        box.remove();
        document.querySelector(`#runs [data-open="${number}"]`)?.focus();
      });
      box.append(...factsPart(run));
      if (Object.keys(run.config).length) box.append(...configPart(run));
      box.append(...layersPart(run));
      document.getElementById("details").prepend(box);
    }
    if (focus) {
      box.scrollIntoView({ block: "start" });
      box.focus({ preventScroll: true });
    }
  }

  function linkRuns() {
    const numbers = new Map();
    data.runs.forEach((run, number) => numbers.set(run.name, numbers.has(run.name) ? null : number));
    const button = (text, number) => {
      const element = make("button", { type: "button", title: "Settings and layers of this run", dataset: { open: number } }, text);
      element.addEventListener("click", () => openRun(number, true));
      return element;
    };
    for (const row of document.querySelectorAll("#tables tr[data-run]")) {
      const number = numbers.get(row.dataset.run);
      if (number === undefined || number === null) continue; // none, or one of several of that name
      const named = [...row.cells].find((cell) => cell.textContent === row.dataset.run);
      if (named) named.replaceChildren(button(row.dataset.run, number));
    }
    document.querySelectorAll("#runs tbody tr").forEach((row) => {
      const cell = row.cells[0];
      cell.replaceChildren(button(cell.textContent, Number(row.dataset.number)));
    });
  }

  function enlargePictures() {
    for (const figure of document.querySelectorAll("#pictures figure")) {
      const button = make("button", { type: "button" }, "Enlarge");
      button.addEventListener("click", () => {
        const full = figure.classList.toggle("full");
        button.textContent = full ? "Shrink" : "Enlarge";
        figure.scrollIntoView({ block: "nearest" });
      });
      figure.querySelector("figcaption").append(button);
    }
  }

  function followFragment() {
    const found = /^#run-(\d+)$/.exec(location.hash);
    if (found && Number(found[1]) < data.runs.length) openRun(Number(found[1]), true);
  }

  /* Colours: as the system, light, dark. */

  function themeButton() {
    const names = { "": "as the system", light: "light", dark: "dark" };
    const button = document.getElementById("theme");
    let chosen = "";
    try { chosen = localStorage.getItem("theme") ?? ""; } catch { /* a page from a file may have no store */ }
    const apply = () => {
      if (chosen) document.documentElement.dataset.theme = chosen;
      else delete document.documentElement.dataset.theme;
      button.textContent = `Colours: ${names[chosen] ?? chosen}`;
      try { localStorage.setItem("theme", chosen); } catch { /* as above */ }
    };
    button.addEventListener("click", () => {
      const order = Object.keys(names);
      chosen = order[(order.indexOf(chosen) + 1) % order.length];
      apply();
    });
    if (!(chosen in names)) chosen = "";
    button.hidden = false;
    apply();
  }

  themeButton();
  linkRuns();
  enlargePictures();
  document.querySelectorAll("main table").forEach((table) => {
    if (table.tHead) furnish(table, table.caption?.textContent ?? "runs");
  });
  window.addEventListener("hashchange", followFragment);
  followFragment();
})();
