// The charts of a run's page, drawn by uPlot from the JSON in #curves:
// [{stage, figure, x: [iteration], runs: [{name, y: [value or null]}]}], one per <div class="chart">.
"use strict";

const charts = JSON.parse(document.getElementById("curves").textContent);
const colours = ["#4269d0", "#e8862e", "#3ca951", "#c2449b", "#97712f", "#6cc5d0"];
const style = getComputedStyle(document.documentElement);
const quiet = style.getPropertyValue("--quiet").trim();
const rule = style.getPropertyValue("--rule").trim();
const HEIGHT = 190;

// Six digits tell neighbouring values apart at any size.
const digits = (value) => (value == null ? "" : String(Number(value.toPrecision(6))));
const short = (value) => (value == null ? "" : String(Number(value.toPrecision(3))));

function draw(place, chart, logarithmic, plot) {
  const positive = (value) => (logarithmic && value <= 0 ? null : value);
  const data = [chart.x, ...chart.runs.map((run) => run.y.map(positive))];
  const zoom = plot && { min: plot.scales.x.min, max: plot.scales.x.max };
  if (plot) plot.destroy();
  const axis = { stroke: quiet, grid: { stroke: rule, width: 1 }, ticks: { stroke: rule, width: 1 } };
  const options = {
    width: place.clientWidth,
    height: HEIGHT,
    scales: { x: { time: false }, y: { distr: logarithmic ? 3 : 1 } },
    cursor: { sync: { key: chart.stage }, drag: { x: true, y: false } },
    axes: [
      { ...axis, label: "iteration", labelSize: 16, size: 34 },
      { ...axis, size: 62, values: (plot, ticks) => ticks.map(short) },
    ],
    series: [
      { label: "iteration" },
      ...chart.runs.map((run, i) => ({
        label: chart.runs.length > 1 ? run.name : chart.figure,
        stroke: colours[i % colours.length],
        width: 1.5,
        spanGaps: true,
        value: (plot, value) => digits(value),
      })),
    ],
  };
  const drawn = new uPlot(options, data, place);
  if (zoom) drawn.setScale("x", zoom);
  return drawn;
}

document.querySelectorAll(".chart").forEach((place, i) => {
  const box = place.parentElement.querySelector("input");
  let plot = draw(place, charts[i], false, null);
  place.plot = plot;
  box.addEventListener("change", () => {
    plot = draw(place, charts[i], box.checked, plot);
    place.plot = plot;
  });
  new ResizeObserver(() => {
    if (place.clientWidth !== plot.width) plot.setSize({ width: place.clientWidth, height: HEIGHT });
  }).observe(place.parentElement);
});
