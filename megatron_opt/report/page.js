"use strict";
// Draws every <figure data-plot> as SVG: hover reads a point, the legend hides a series, a drag zooms, a double click resets.
(() => {
  const NS = "http://www.w3.org/2000/svg";
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const tip = document.getElementById("tip");

  const make = (name, attributes, parent) => {
    const element = document.createElementNS(NS, name);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    if (parent) parent.appendChild(element);
    return element;
  };

  const show = value => {
    const size = Math.abs(value);
    if (value === 0) return "0";
    if (size >= 1e5 || size < 1e-3) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
    return String(+value.toPrecision(5));
  };

  const linearTicks = (low, high, count) => {
    const raw = (high - low) / count, power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].map(factor => factor * power).find(size => size >= raw * 0.999);
    const ticks = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(+(i * step).toPrecision(12));
    return ticks;
  };

  const logTicks = (low, high, count) => {
    const all = factors => {
      const ticks = [];
      for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
        for (const factor of factors) {
          const value = factor * 10 ** power;
          if (value >= low * 0.999 && value <= high * 1.001) ticks.push(value);
        }
      return ticks;
    };
    for (const factors of [[1, 2, 3, 4, 5, 6, 7, 8, 9], [1, 2, 5], [1, 3], [1]]) {
      const ticks = all(factors);
      if (ticks.length >= 2 && ticks.length <= count + 2) return ticks;
    }
    const decades = all([1]);
    return decades.length >= 2 ? decades.filter((_, i) => i % Math.ceil(decades.length / count) === 0) : linearTicks(low, high, count);
  };

  const axis = (low, high, log, from, to) => {
    const f = log ? Math.log : x => x;
    const [a, b] = [f(low), f(high)];
    const position = value => from + (f(value) - a) / (b - a) * (to - from);
    const inverse = place => {
      const value = a + (place - from) / (to - from) * (b - a);
      return log ? Math.exp(value) : value;
    };
    return { position, inverse, ticks: log ? logTicks(low, high, Math.abs(to - from) / 70) : linearTicks(low, high, Math.max(3, Math.abs(to - from) / 70)) };
  };

  const extent = (values, log) => {
    const good = values.filter(v => Number.isFinite(v) && (!log || v > 0));
    if (!good.length) return log ? [1, 10] : [0, 1];
    let low = Math.min(...good), high = Math.max(...good);
    if (log) { const pad = Math.max((high / low) ** 0.06, 1.02); return [low / pad, high * pad]; }
    const pad = (high - low) * 0.06 || Math.abs(high) * 0.05 || 1;
    return [low - pad, high + pad];
  };

  const folded = (text, room) => text.split(" ").reduce((lines, word) => {
    const last = lines.length - 1;
    return last >= 0 && lines[last].length + word.length < room ? [...lines.slice(0, last), `${lines[last]} ${word}`] : [...lines, word];
  }, []);

  const draw = figure => {
    const plot = plots[figure.dataset.plot];
    const state = figure.state ||= { hidden: new Set(), view: null };
    const width = Math.max(280, Math.min(figure.clientWidth || 600, 900)), height = Math.round(width * 0.62);
    const room = Math.max(8, (width - 90) / 6 / plot.x_names.length), names = plot.x_names.map(name => folded(name, room));
    const below = 12 * Math.max(0, ...names.map(lines => lines.length - 1));
    const box = { left: 62, right: width - 14, top: 12, bottom: height - 40 - below };
    const shown = plot.series.filter((_, i) => !state.hidden.has(i));
    const solid = shown.filter(s => !s.crosses);
    const xs = shown.flatMap(s => s.x);
    const ys = solid.flatMap(s => s.y.concat(s.low || [], s.high || [])).concat(plot.horizontal.map(h => h[0]));
    let [x0, x1] = extent(xs.concat(plot.vertical.map(v => v[0])), plot.x_log);
    let [y0, y1] = plot.y_range || extent(ys, plot.y_log);
    if (names.length) [x0, x1] = [-0.5, names.length - 0.5];
    if (state.view) [x0, x1, y0, y1] = state.view;
    const marked = [...new Set(solid.filter(s => s.points).flatMap(s => s.x))].sort((a, b) => a - b);
    const X = axis(x0, x1, plot.x_log, box.left, box.right), Y = axis(y0, y1, plot.y_log, box.bottom, box.top);

    if (plot.x_log && !state.view && marked.length > 1 && marked.length <= 10) {
      let last = -Infinity;
      X.ticks = marked.filter(value => X.position(value) - last > 36 && (last = X.position(value)));
    }

    if (names.length) X.ticks = [...names.keys()].filter(i => i >= x0 && i <= x1);

    const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": plot.title });
    const clip = `clip-${figure.dataset.plot}`;
    make("rect", { x: box.left, y: box.top - 8, width: box.right - box.left, height: box.bottom - box.top + 8 },
      make("clipPath", { id: clip }, svg));
    for (const value of X.ticks) {
      const x = X.position(value);
      if (!names.length) make("line", { x1: x, x2: x, y1: box.top, y2: box.bottom, stroke: "var(--rule)" }, svg);
      (names.length ? names[value] : [show(value)]).forEach((text, i) =>
        make("text", { x, y: box.bottom + 15 + 12 * i, "text-anchor": "middle" }, svg).textContent = text);
    }
    for (const value of Y.ticks) {
      const y = Y.position(value);
      make("line", { x1: box.left, x2: box.right, y1: y, y2: y, stroke: "var(--rule)" }, svg);
      make("text", { x: box.left - 6, y: y + 4, "text-anchor": "end" }, svg).textContent = show(value);
    }
    make("path", { d: `M${box.left},${box.top}V${box.bottom}H${box.right}`, fill: "none", stroke: "var(--soft)" }, svg);
    make("text", { x: (box.left + box.right) / 2, y: height - 6, "text-anchor": "middle" }, svg).textContent = plot.x_label;
    const middle = (box.top + box.bottom) / 2;
    make("text", { x: 13, y: middle, "text-anchor": "middle", transform: `rotate(-90 13 ${middle})` }, svg).textContent = plot.y_label;

    const inner = make("g", { "clip-path": `url(#${clip})` }, svg);
    for (const [value, label] of plot.vertical) {
      const x = X.position(value);
      make("line", { x1: x, x2: x, y1: box.top, y2: box.bottom, stroke: "var(--soft)", "stroke-dasharray": "2 3" }, inner);
      make("text", { x: x - 4, y: box.top + 4, "text-anchor": "end", transform: `rotate(-90 ${x - 4} ${box.top + 4})` }, inner).textContent = label;
    }
    for (const [value, label] of plot.horizontal) {
      const y = Y.position(value);
      make("line", { x1: box.left, x2: box.right, y1: y, y2: y, stroke: "var(--soft)", "stroke-dasharray": "2 3" }, inner);
      make("text", { x: box.left + 4, y: y - 4 }, inner).textContent = label;
    }
    const targets = [];
    for (const series of shown) {
      const place = series.x.map((x, i) => [X.position(x), series.crosses ? box.top + 4 : Y.position(series.y[i])]);
      if (series.bars) series.x.forEach((x, i) => make("rect", {
        x: X.position(x - 0.3), width: X.position(x + 0.3) - X.position(x - 0.3), y: Y.position(series.high[i]),
        height: Math.max(0, Y.position(series.low[i]) - Y.position(series.high[i])), fill: series.color }, inner));
      const path = points => points.length ? "M" + points.map(p => p.map(v => v.toFixed(1)).join(",")).join("L") : "";
      if (series.low && series.line && !series.bars) {
        const up = series.x.map((x, i) => [X.position(x), Y.position(series.high[i])]);
        const down = series.x.map((x, i) => [X.position(x), Y.position(series.low[i])]).reverse();
        make("path", { d: path(up.concat(down)) + "Z", fill: series.color, opacity: 0.15 }, inner);
      } else if (series.low && !series.bars) {
        place.forEach(([x], i) => make("line", { x1: x, x2: x, y1: Y.position(series.low[i]), y2: Y.position(series.high[i]), stroke: series.color }, inner));
      }
      if (series.line) make("path", {
        d: path(place), fill: "none", stroke: series.color, "stroke-width": series.dash ? 1.1 : 1.8,
        "stroke-dasharray": series.dash ? "5 4" : "none", "stroke-linejoin": "round" }, inner);
      place.forEach(([x, y], i) => {
        if (series.crosses) make("path", { d: `M${x - 4},${y - 4}l8,8m0,-8l-8,8`, stroke: series.color, "stroke-width": 2 }, inner);
        else if (series.beyond && series.beyond[i]) {
          const id = `${clip}-${shown.indexOf(series)}`;
          if (!svg.querySelector(`#${id}`)) {
            const hatch = make("pattern", { id, width: 5, height: 5, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" }, svg);
            make("rect", { width: 1.6, height: 5, fill: series.color }, hatch);
          }
          if (series.low) {
            const top = Y.position(series.high[i]), bottom = Y.position(series.low[i]);
            make("rect", { x: x - 5, width: 10, y: top, height: Math.max(0, bottom - top), fill: `url(#${id})`, opacity: 0.55 }, inner);
          }
          make("circle", { cx: x, cy: y, r: 3.4, fill: "var(--paper)", stroke: series.color, "stroke-width": 1.6 }, inner);
        }
        else if (series.points) make("circle", { cx: x, cy: y, r: 3.2, fill: series.color }, inner);
        if (x >= box.left - 1 && x <= box.right + 1) targets.push({ x, y, series, i });
      });
    }
    const cursor = make("circle", { r: 5.5, fill: "none", stroke: "var(--ink)", visibility: "hidden" }, svg);
    const frame = make("rect", { fill: "#0072b2", opacity: 0.12, visibility: "hidden" }, svg);
    interact(figure, svg, { width, box, X, Y, targets, cursor, frame, state, plot });

    const old = figure.querySelector("svg");
    if (old) old.replaceWith(svg); else figure.querySelector(".legend").before(svg);
  };

  const interact = (figure, svg, { width, box, X, Y, targets, cursor, frame, state, plot }) => {
    const at = event => {
      const area = svg.getBoundingClientRect(), scale = width / area.width;
      return [(event.clientX - area.left) * scale, (event.clientY - area.top) * scale];
    };
    let start = null;
    svg.addEventListener("pointerdown", event => { if (event.pointerType === "mouse") { start = at(event); svg.setPointerCapture(event.pointerId); } });
    svg.addEventListener("pointermove", event => {
      const [x, y] = at(event);
      if (start) {
        for (const [key, value] of Object.entries({ x: Math.min(x, start[0]), y: Math.min(y, start[1]), width: Math.abs(x - start[0]), height: Math.abs(y - start[1]), visibility: "visible" }))
          frame.setAttribute(key, value);
        return;
      }
      let near = null, least = 900;
      for (const target of targets) {
        const distance = (target.x - x) ** 2 + (target.y - y) ** 2;
        if (distance < least) { least = distance; near = target; }
      }
      cursor.setAttribute("visibility", near ? "visible" : "hidden");
      tip.style.display = near ? "block" : "none";
      if (!near) return;
      cursor.setAttribute("cx", near.x); cursor.setAttribute("cy", near.y);
      const { series, i } = near;
      const range = series.low && !series.bars ? ` (${show(series.low[i])} … ${show(series.high[i])})` : "";
      const where = plot.x_names.length ? plot.x_names[Math.round(series.x[i])] : `${plot.x_label} ${show(series.x[i])}`;
      const value = series.bars ? series.high[i] - series.low[i] : series.y[i];
      tip.textContent = [series.label, where].filter(Boolean).join(": ") + ", " +
        (series.crosses ? "diverged" : `${plot.y_label} ${show(value)}${range}`) + (series.beyond && series.beyond[i] ? ", extrapolated" : "") + (series.runs ? `, run ${series.runs[i]}` : "");
      tip.style.left = Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 8) + "px";
      tip.style.top = Math.min(event.clientY + 12, innerHeight - tip.offsetHeight - 8) + "px";
    });
    svg.addEventListener("pointerup", event => {
      if (!start) return;
      const [x, y] = at(event), clamp = (v, a, b) => Math.max(a, Math.min(b, v));
      const [left, right] = [x, start[0]].sort((a, b) => a - b).map(v => clamp(v, box.left, box.right));
      const [top, bottom] = [y, start[1]].sort((a, b) => a - b).map(v => clamp(v, box.top, box.bottom));
      start = null;
      frame.setAttribute("visibility", "hidden");
      if (right - left > 8 && bottom - top > 8) {
        state.view = [X.inverse(left), X.inverse(right), Y.inverse(bottom), Y.inverse(top)];
        draw(figure);
      }
    });
    svg.addEventListener("pointerleave", () => { tip.style.display = "none"; cursor.setAttribute("visibility", "hidden"); });
    svg.addEventListener("dblclick", () => { state.view = null; draw(figure); });
  };

  const legend = figure => {
    const plot = plots[figure.dataset.plot], row = figure.querySelector(".legend");
    plot.series.forEach((series, i) => {
      if (!series.label) return;
      const button = document.createElement("button"), mark = document.createElement("i");
      button.setAttribute("aria-pressed", "true");
      mark.style.borderColor = series.color;
      if (series.dash) mark.className = "dash";
      button.append(mark, (series.crosses ? "× " : "") + series.label);
      button.addEventListener("click", () => {
        const hidden = figure.state.hidden;
        if (!hidden.delete(i)) hidden.add(i);
        button.setAttribute("aria-pressed", String(!hidden.has(i)));
        draw(figure);
      });
      row.append(button);
    });
  };

  const figures = [...document.querySelectorAll("figure[data-plot]")];
  const all = () => figures.forEach(draw);
  figures.forEach(legend);
  all();
  let wait;
  addEventListener("resize", () => { clearTimeout(wait); wait = setTimeout(all, 60); });
  document.documentElement.dataset.drawn = String(document.querySelectorAll("figure svg").length);
})();
