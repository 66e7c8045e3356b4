"use strict";
(() => {
  const kept = JSON.parse(document.getElementById("data").textContent);
  const make = (tag, text, attributes = {}) => {
    const one = document.createElement(tag);
    if (text !== undefined && text !== null) one.textContent = text;
    for (const [name, value] of Object.entries(attributes)) one.setAttribute(name, value);
    return one;
  };

  // ---- tables: sorted by a head's button, filtered by text and by choice, rows that open

  const valueOf = (row, place) => {
    const cell = row.cells[place];
    if (cell.dataset.value !== undefined) return Number(cell.dataset.value);
    const text = cell.textContent.trim();
    if (text === "-" || text === "") return null;
    const number = Number.parseFloat(text.replace("−", "-"));
    return cell.classList.contains("number") && !Number.isNaN(number) ? number : text;
  };
  const compare = (a, b) => {
    if (a === null || b === null) return (a === null) - (b === null);
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), "en", { numeric: true });
  };
  const closeDetails = (body) => {
    for (const row of [...body.rows]) {
      if (row.classList.contains("detail")) row.remove();
      row.querySelector("button.opens")?.setAttribute("aria-expanded", "false");
    }
  };

  for (const section of document.querySelectorAll("section")) {
    const table = section.querySelector("table");
    if (!table) continue;
    const body = table.tBodies[0];
    const heads = [...table.tHead.rows[0].cells];
    if (table.classList.contains("sorts")) {
      heads.forEach((head, place) => {
        const button = make("button", null, { type: "button" });
        button.append(...head.childNodes);
        head.append(button);
        button.addEventListener("click", () => {
          const down = head.getAttribute("aria-sort") === "ascending";
          heads.forEach((other) => other.removeAttribute("aria-sort"));
          head.setAttribute("aria-sort", down ? "descending" : "ascending");
          closeDetails(body);
          const rows = [...body.rows].map((row) => [valueOf(row, place), row]);
          rows.sort(([a], [b]) => (a === null || b === null ? compare(a, b) : (down ? -1 : 1) * compare(a, b)));
          body.append(...rows.map(([, row]) => row));
        });
      });
    }
    const tools = section.querySelector(".tools");
    if (tools) {
      const text = tools.querySelector("input");
      const choices = [...tools.querySelectorAll("select")];
      const count = tools.querySelector(".count");
      const filter = () => {
        closeDetails(body);
        const words = text.value.toLowerCase().split(/\s+/).filter(Boolean);
        let shown = 0;
        for (const row of body.rows) {
          const all = row.textContent.toLowerCase();
          const fits = words.every((word) => all.includes(word)) && choices.every(
            (one) => one.selectedIndex === 0 || row.cells[one.dataset.column].textContent === one.value);
          row.hidden = !fits;
          shown += fits;
        }
        count.textContent = `${shown} of ${body.rows.length} rows`;
      };
      text.addEventListener("input", filter);
      choices.forEach((one) => one.addEventListener("change", filter));
      filter();
      tools.hidden = false;
    }
    for (const row of body.querySelectorAll("tr[data-row]")) {
      const button = make("button", null, { type: "button", class: "opens", "aria-expanded": "false" });
      button.append(...row.cells[0].childNodes);
      row.cells[0].append(button);
      button.addEventListener("click", () => {
        if (button.getAttribute("aria-expanded") === "true") {
          row.nextElementSibling.remove();
          button.setAttribute("aria-expanded", "false");
          return;
        }
        button.setAttribute("aria-expanded", "true");
        const items = make("div", null, { class: "items" });
        for (const item of kept.details[section.id][row.dataset.row]) {
          const list = make("dl");
          for (const [name, value] of Object.entries(item)) list.append(make("dt", name), make("dd", value));
          items.append(list);
        }
        const cell = make("td", null, { colspan: row.cells.length });
        cell.append(items);
        const detail = make("tr", null, { class: "detail" });
        detail.append(cell);
        row.after(detail);
      });
    }
  }

  for (const button of document.querySelectorAll(".copy")) {
    const text = button.nextElementSibling;
    button.hidden = false;
    button.addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText(text.textContent);
        button.textContent = "copied";
      } catch {
        getSelection().selectAllChildren(text);
        button.textContent = "selected: press Ctrl-C";
      }
    });
  }

  // ---- pictures

  const SIGNS = { worse: "triangle", better: "star", same: "circle", open: "diamond", void: "square", good: "circle", bad: "times" };
  const WORDS = { worse: "WORSE", better: "BETTER", same: "EQUIVALENT", open: "INCONCLUSIVE", void: "baseline, or not tested" };
  const SYMBOLS = ["circle", "square", "triangle", "diamond", "star", "wye", "cross", "hexagon"];
  const short = (d) => (d >= 1e4 || d < 1e-3 ? d.toExponential(0).replace("e+", "e") : String(Number(d.toPrecision(3))));
  const axis = (one) => ({ label: one.label, type: one.log ? "log" : undefined, grid: true, nice: !one.log,
    tickFormat: one.log ? (d) => (/^[125]/.test(d.toExponential()) ? short(d) : "") : undefined });
  // sizes and lengths go by doubling
  const across = (one, points) => {
    if (!one.log) return axis(one);
    const all = points.map((d) => d.x);
    const few = [...new Set(all)].sort((a, b) => a - b);
    const [low, high] = [few[0], few[few.length - 1]];
    const steps = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32].filter((d) => d >= low * 0.9 && d <= high * 1.1);
    return { ...axis(one), ticks: high > 64 && few.length <= 8 ? few : steps, tickFormat: (d) => (d >= 1024 && d % 1024 === 0 ? `${d / 1024}k` : short(d)) };
  };

  const draw = (kind, view, width) => {
    const { points, x, y } = view;
    const names = [...new Set(points.map((d) => d.series).filter((name) => name !== undefined))];
    const colour = (d) => (d.series !== undefined ? `var(--c${names.indexOf(d.series) % 8})` : `var(--${d.mark || "c0"})`);
    const symbol = (d) => (d.series !== undefined ? SYMBOLS[names.indexOf(d.series) % 8] : SIGNS[d.mark] || "circle");
    const ink = { value: colour, scale: null };
    const spot = { stroke: ink, fill: ink, fillOpacity: 0.35, symbol, r: 5,
      strokeWidth: 1.6, ariaLabel: "text", title: "text" };
    const common = { width, style: { fontSize: "13px", background: "none", color: "var(--ink)" } };
    const marked = (values, rule) => values.map((v) => rule([v], { stroke: "var(--soft)", strokeDasharray: "4 3" }));
    if (kind === "grid") {
      const order = (name) => [...new Set(points.map((d) => d[name]))];
      return Plot.plot({ ...common, width: Math.min(width, 640), height: 60 + 44 * new Set(points.map((d) => d.y)).size,
        marginLeft: 90, marginBottom: 45, padding: 0.04,
        x: { label: x.label, type: "band", domain: order("x") }, y: { label: y.label, type: "band", domain: order("y") },
        marks: [
          Plot.cell(points, { x: "x", y: "y", fill: "var(--c0)", fillOpacity: { value: (d) => 0.06 + 0.6 * d.value, scale: null },
            stroke: "var(--rule)", title: "text", ariaLabel: "text" }),
          Plot.text(points, { x: "x", y: "y", text: "label", fill: "var(--ink)", fontSize: 13 }),
        ] });
    }
    if (kind === "intervals") {
      const order = [...new Set(points.map((d) => d.y))];
      const longest = Math.max(...order.map((name) => name.length));
      const left = Math.min(14 + 7.4 * longest, width * 0.48);
      const cut = Math.floor((left - 14) / 7.4);
      return Plot.plot({ ...common, height: 70 + 24 * order.length, marginLeft: left, marginRight: 25, marginBottom: 40,
        x: { ...axis(x), type: "linear" },
        y: { label: null, domain: order, tickFormat: (d) => (d.length > cut ? `${d.slice(0, cut - 1)}…` : d) },
        marks: [
          Plot.ruleX([0], { stroke: "var(--ink)" }), ...marked(x.lines, Plot.ruleX),
          Plot.ruleY(points.filter((d) => d.low !== null && d.low !== undefined), { y: "y", x1: "low", x2: "high", stroke: ink, strokeWidth: 2 }),
          Plot.dot(points, { ...spot, x: "x", y: "y", tip: true }),
        ] });
    }
    const reach = points.filter((d) => d.low !== undefined && d.low !== null && !(y.log && d.low <= 0));
    const front = points.filter((d) => d.front).sort((a, b) => a.x - b.x);
    const narrow = width < 560;
    const [left, right] = [62, narrow ? 20 : 60];
    const scaled = (d) => (x.log ? Math.log(d.x) : d.x);
    const [low, high] = [Math.min(...points.map(scaled)), Math.max(...points.map(scaled))];
    const place = (d) => left + (high > low ? (scaled(d) - low) / (high - low) : 0) * (width - left - right);
    const long = (d) => 12 + 6.6 * (d.label || "").length;
    // a frontier falls to the right, so it is free above right and below left; the caption has what fits nowhere
    const sides = [
      [front.filter((d) => place(d) + long(d) <= width), { textAnchor: "start", dx: 7, dy: -5, lineAnchor: "bottom" }],
      [front.filter((d) => place(d) + long(d) > width && place(d) - long(d) >= left), { textAnchor: "end", dx: -7, dy: 5, lineAnchor: "top" }],
    ];
    return Plot.plot({ ...common, height: narrow ? 340 : 420, marginLeft: left, marginRight: right, marginBottom: 45,
      insetTop: 18, insetBottom: 14, x: across(x, points), y: { ...axis(y), zero: kind === "lines" && !y.log },
      marks: [
        ...marked(y.lines, Plot.ruleY),
        kind === "points"
          ? Plot.line(front, { x: "x", y: "y", curve: "linear", stroke: "var(--soft)", strokeWidth: 1.5 })
          : Plot.line(points, { x: "x", y: "y", z: "series", stroke: ink, strokeWidth: 2 }),
        Plot.link(reach, { x1: "x", x2: "x", y1: "low", y2: "high", stroke: ink, strokeOpacity: 0.8, strokeWidth: 1.5 }),
        Plot.dot(points, { ...spot, x: "x", y: "y", tip: true }),
        ...sides.map(([few, side]) => Plot.text(few, { ...side, x: "x", y: "y", text: "label", fill: "var(--ink)",
          stroke: "var(--paper)", strokeWidth: 4, fontSize: 12, lineWidth: 20 })),
      ] });
  };

  const legend = (view) => {
    const list = make("ul", null, { class: "keys" });
    const names = [...new Set(view.points.map((d) => d.series).filter((name) => name !== undefined))];
    const marks = names.length ? [] : [...new Set(view.points.map((d) => d.mark).filter(Boolean))];
    const item = (colour, symbol, text) => {
      const sign = Plot.plot({ width: 14, height: 14, margin: 0, axis: null, x: { domain: [0, 1] }, y: { domain: [0, 1] },
        marks: [Plot.dot([0], { x: [0.5], y: [0.5], r: 5, symbol, stroke: colour, fill: colour, fillOpacity: 0.35 })] });
      sign.setAttribute("aria-hidden", "true");
      sign.style.display = "inline-block";
      const one = make("li");
      one.append(sign, text);
      list.append(one);
    };
    names.forEach((name, place) => item(`var(--c${place % 8})`, SYMBOLS[place % 8], name));
    marks.forEach((mark) => item(`var(--${mark})`, SIGNS[mark], WORDS[mark] || mark));
    return list;
  };

  for (const figure of document.querySelectorAll("figure")) {
    const views = kept.plots[figure.closest("section").id];
    const kind = figure.dataset.kind;
    const place = figure.querySelector(".picture");
    const point = figure.querySelector("output");
    const numbers = figure.querySelector(".numbers");
    const selects = [...figure.querySelectorAll("select")];
    let view = views[0];
    let width = 0;
    const show = () => {
      place.replaceChildren(draw(kind, view, width), ...(kind === "grid" ? [] : [legend(view)]));
      const svg = place.querySelector("svg");
      svg.setAttribute("role", "group");
      svg.setAttribute("aria-label", view.says);
      // one stop for the whole picture, arrows from point to point
      const spots = [...svg.querySelectorAll("g[aria-label=dot] > *, g[aria-label=cell] > *")];
      spots.forEach((spot, index) => {
        spot.setAttribute("role", "img");
        spot.setAttribute("tabindex", index ? "-1" : "0");
        spot.addEventListener("focus", () => { point.textContent = spot.getAttribute("aria-label"); });
        spot.addEventListener("keydown", (event) => {
          const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
          if (!step) return;
          event.preventDefault();
          const next = spots[(index + step + spots.length) % spots.length];
          spots.forEach((other) => other.setAttribute("tabindex", other === next ? "0" : "-1"));
          next.focus();
        });
      });
    };
    const fill = () => {
      const rows = numbers.querySelector("div");
      rows.replaceChildren();
      if (!numbers.open) return;
      const list = make("ul");
      for (const one of view.points) list.append(make("li", one.text));
      rows.append(list);
    };
    const choose = (changed) => {
      const wanted = Object.fromEntries(selects.map((one) => [one.dataset.choice, one.value]));
      const fits = (one) => Object.entries(wanted).every(([name, value]) => one.choice[name] === value);
      const key = changed.dataset.choice;
      view = views.find(fits) || views.find((one) => one.choice[key] === changed.value);
      for (const one of selects) one.value = view.choice[one.dataset.choice];
      figure.querySelector("figcaption").textContent = view.says;
      point.textContent = "";
      show();
      fill();
    };
    selects.forEach((one) => one.addEventListener("change", () => choose(one)));
    numbers.addEventListener("toggle", fill);
    const tools = figure.querySelector(".tools");
    if (tools) tools.hidden = false;
    new ResizeObserver(() => {
      const now = Math.max(280, Math.min(place.clientWidth, 1150));
      if (now !== width) {
        width = now;
        show();
      }
    }).observe(place);
  }
})();
