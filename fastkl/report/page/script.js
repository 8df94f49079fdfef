"use strict";
addEventListener("error", (event) => { document.documentElement.dataset.error = event.message; });

const SVG = "http://www.w3.org/2000/svg";
const make = (name, attributes) => {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
};

// Every chart answers the pointer and the arrow keys with the values at one step (or, in the frontier, of one dot).
function explain(plot) {
  const data = JSON.parse(plot.dataset.points);
  const stops = data.nearest
    ? data.lines.flatMap((line) => line.points.map((point) => ({ x: point[0], y: point[1], rows: [[line.label, point[2]]], dots: [point] })))
    : stepsOf(data.lines);
  if (!stops.length) return;
  const figure = plot.closest("figure");
  const tip = document.createElement("div");
  tip.className = "tip";
  tip.setAttribute("role", "status");
  tip.hidden = true;
  figure.append(tip);
  const layer = plot.appendChild(make("g", { "aria-hidden": "true" }));
  let current = -1;

  const show = (index) => {
    current = Math.max(0, Math.min(stops.length - 1, index));
    const stop = stops[current];
    layer.replaceChildren();
    if (!data.nearest) layer.append(make("line", { class: "cursor", x1: stop.x, x2: stop.x, y1: data.top, y2: data.bottom }));
    for (const dot of stop.dots) layer.append(make("circle", { class: "ring", cx: dot[0], cy: dot[1], r: data.nearest ? 7 : 4 }));
    tip.replaceChildren(...[stop.title, ...stop.rows.map(([label, text]) => (stop.rows.length > 1 || data.lines.length > 1 ? `${label}: ${text}` : text))]
      .filter(Boolean).map((text) => Object.assign(document.createElement("div"), { textContent: text })));
    tip.hidden = false;
    const scale = plot.getBoundingClientRect().width / plot.viewBox.baseVal.width;
    const left = plot.offsetLeft || figure.querySelector(".plot").getBoundingClientRect().left - figure.getBoundingClientRect().left;
    const top = plot.getBoundingClientRect().top - figure.getBoundingClientRect().top;
    const x = plot.getBoundingClientRect().left - figure.getBoundingClientRect().left + stop.x * scale;
    tip.style.left = `${Math.max(4, Math.min(figure.clientWidth - tip.offsetWidth - 4, x + (x > figure.clientWidth / 2 ? -tip.offsetWidth - 12 : 12)))}px`;
    tip.style.top = `${Math.max(4, top + stop.y * scale - tip.offsetHeight - 8)}px`;
  };
  const hide = () => { tip.hidden = true; layer.replaceChildren(); };
  plot.addEventListener("pointermove", (event) => {
    const box = plot.getBoundingClientRect();
    const x = (event.clientX - box.left) * plot.viewBox.baseVal.width / box.width;
    const y = (event.clientY - box.top) * plot.viewBox.baseVal.height / box.height;
    const far = (stop) => (stop.x - x) ** 2 + (data.nearest ? (stop.y - y) ** 2 : 0);
    show(stops.reduce((best, stop, index) => (far(stop) < far(stops[best]) ? index : best), 0));
  });
  plot.addEventListener("pointerleave", hide);
  plot.addEventListener("blur", hide);
  plot.addEventListener("keydown", (event) => {
    const move = { ArrowRight: current + 1, ArrowLeft: current - 1, Home: 0, End: stops.length - 1 }[event.key];
    if (move !== undefined) { event.preventDefault(); show(move); }
    if (event.key === "Escape") hide();
  });
}

function stepsOf(lines) {
  const steps = new Map();
  for (const line of lines) for (const point of line.points) {
    if (!steps.has(point[3])) steps.set(point[3], { x: point[0], y: point[1], title: `step ${point[3]}`, rows: [], dots: [] });
    const stop = steps.get(point[3]);
    stop.rows.push([line.label, point[2]]);
    stop.dots.push(point);
    stop.y = Math.min(stop.y, point[1]);
  }
  return [...steps.keys()].sort((a, b) => a - b).map((step) => steps.get(step));
}

// "SVG" and "PNG" save a chart as it looks on white paper, with every style written into the file.
function standalone(plot) {
  const root = document.documentElement;
  root.dataset.theme = "light";
  const copy = plot.cloneNode(true);
  const sources = [plot, ...plot.querySelectorAll("*")];
  [copy, ...copy.querySelectorAll("*")].forEach((element, index) => {
    const style = getComputedStyle(sources[index]);
    for (const key of ["fill", "stroke", "stroke-width", "stroke-dasharray", "stroke-linejoin", "stroke-linecap", "opacity", "paint-order", "font-family", "font-size", "font-weight"])
      element.style.setProperty(key, style.getPropertyValue(key));
    element.removeAttribute("class");
  });
  delete root.dataset.theme;
  const { width, height } = plot.viewBox.baseVal;
  copy.removeAttribute("data-points");
  for (const [key, value] of Object.entries({ xmlns: SVG, width, height })) copy.setAttribute(key, value);
  return new Blob([new XMLSerializer().serializeToString(copy)], { type: "image/svg+xml" });
}

function download(blob, name) {
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

async function picture(plot) {
  const image = new Image();
  image.src = URL.createObjectURL(standalone(plot));
  await image.decode();
  const canvas = Object.assign(document.createElement("canvas"), { width: plot.viewBox.baseVal.width * 3, height: plot.viewBox.baseVal.height * 3 });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob(done, "image/png"));
}

for (const figure of document.querySelectorAll("figure")) {
  figure.querySelectorAll(".plot").forEach(explain);
  const shown = () => [...figure.querySelectorAll(".plot")].find((plot) => plot.getBoundingClientRect().width) ?? figure.querySelector(".plot");
  const bar = Object.assign(document.createElement("div"), { className: "save" });
  const title = figure.querySelector("h3").textContent;
  const file = title.toLowerCase().replace(/[^a-z0-9]+/g, "-");
  for (const [kind, render] of [["SVG", async (plot) => standalone(plot)], ["PNG", picture]]) {
    const button = Object.assign(document.createElement("button"), { type: "button", textContent: kind, ariaLabel: `Save ${title} as ${kind}` });
    button.addEventListener("click", async () => download(await render(shown()), `${file}.${kind.toLowerCase()}`));
    bar.append(button);
  }
  figure.append(bar);
}
document.documentElement.dataset.ready = "true";
