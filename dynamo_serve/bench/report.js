// Readouts under the pointer, and lines that can be switched off. The charts can be read without.
"use strict";
for (const figure of document.querySelectorAll("figure.chart")) {
  const told = figure.querySelector('script[type="application/json"]');
  if (!told) continue;
  const { x, y, xLabel, kind, lines } = JSON.parse(told.textContent);
  const svg = figure.querySelector("svg.plot");
  const cursor = svg.querySelector("line.cursor");
  const readout = figure.appendChild(document.createElement("div"));
  readout.className = "readout";
  readout.hidden = true;
  const hidden = new Set();
  const digits = (value) => Number(value.toPrecision(4)).toLocaleString("en");

  for (const button of figure.querySelectorAll("button[data-line]")) {
    button.addEventListener("click", () => {
      const number = Number(button.dataset.line);
      const shows = hidden.has(number);
      shows ? hidden.delete(number) : hidden.add(number);
      button.setAttribute("aria-pressed", String(shows));
      svg.querySelector(`g[data-line="${number}"]`).style.display = shows ? "" : "none";
    });
  }

  const place = (point) => x[0] + (point[0] / x[1]) * x[2];
  const nearest = (points, at) =>
    points.reduce((best, point) => Math.abs(place(point) - at) < Math.abs(place(best) - at) ? point : best);

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const at = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    const shown = lines.filter((_, number) => !hidden.has(number));
    if (!shown.length) return;
    const points = shown.map((line) => nearest(line.points, at));
    const snap = nearest(points, at);
    cursor.setAttribute("x1", place(snap));
    cursor.setAttribute("x2", place(snap));
    cursor.setAttribute("visibility", "visible");
    const rows = shown
      .map((line, number) => [line.name, points[number]])
      .filter(([, point]) => kind !== "areas" || point[0] === snap[0])
      .map(([name, point]) => `${name}: ${digits(point[1])}${point[0] === snap[0] ? "" : ` (at ${digits(point[0])})`}`);
    readout.textContent = [`${xLabel}: ${digits(snap[0])}`, ...rows].join("\n");
    readout.hidden = false;
    const px = event.clientX - figure.getBoundingClientRect().left;
    readout.style.left = `${px > box.width / 2 ? px - readout.offsetWidth - 14 : px + 14}px`;
    readout.style.top = `${event.clientY - figure.getBoundingClientRect().top + 10}px`;
  });
  svg.addEventListener("pointerleave", () => {
    readout.hidden = true;
    cursor.setAttribute("visibility", "hidden");
  });
}
