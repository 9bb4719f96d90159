"use strict";
const charts = JSON.parse(document.getElementById("charts").textContent);
const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
const looks = {
  infeasible: { mode: "markers", symbol: "x-thin-open", size: 8 },
  dominated: { mode: "markers", symbol: "circle", size: 8 },
  front: { mode: "markers", symbol: "circle", size: 10 },
  baseline: { mode: "markers", symbol: "diamond", size: 12 },
  teacher: { mode: "markers", symbol: "star", size: 16 },
  recommended: { mode: "markers", symbol: "circle-open", size: 20 },
  volume: { mode: "lines", symbol: "circle", size: 6, shape: "hv", color: "front" },
};

function bars(sides, tint) {
  if (!sides) return undefined;
  const [arrayminus, array] = [0, 1].map((side) => sides.map((pair) => pair[side]));
  return { type: "data", symmetric: false, array, arrayminus, color: tint, thickness: 1, width: 3 };
}

function trace(data) {
  const look = looks[data.role];
  const tint = color(look.color || data.role);
  const quiet = data.role === "recommended" || data.role === "dominated" || data.role === "infeasible";
  return {
    name: data.name, x: data.x, y: data.y, text: data.text, mode: look.mode, type: "scatter",
    hovertemplate: data.text ? "%{text}<extra></extra>" : "trial %{x}: %{y:.4g}<extra></extra>",
    hoverinfo: data.role === "recommended" ? "skip" : undefined,
    error_x: quiet ? undefined : bars(data.dx, tint), error_y: quiet ? undefined : bars(data.dy, tint),
    line: { color: tint, width: 2, shape: look.shape || "linear" },
    marker: { color: tint, symbol: look.symbol, size: look.size, line: { color: tint, width: 2 } },
  };
}

function line(data) {
  return { ...data, mode: "lines", type: "scatter", hoverinfo: "skip", showlegend: false, line: { color: color("front"), width: 1, dash: "dot" } };
}

function layout(chart) {
  const narrow = document.body.clientWidth < 600; // then the legend takes several lines, which fit below
  const legend = narrow ? { y: -0.22, yanchor: "top", font: { size: 11 } } : { y: 1.02, yanchor: "bottom" };
  const axis = (title, type) => ({ title: { text: title, standoff: 10 }, type, gridcolor: color("line"), zeroline: false, automargin: true });
  return {
    xaxis: axis(chart.x, chart.log ? "log" : "linear"), yaxis: axis(chart.y, "linear"),
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: color("ink"), family: "system-ui, sans-serif", size: 13 },
    margin: { l: 50, r: 15, t: 10, b: 45 }, showlegend: chart.traces.length > 1,
    legend: { orientation: "h", x: 0, ...legend }, hoverlabel: { align: "left" },
  };
}

function draw() {
  for (const chart of charts) {
    const lines = chart.line ? [line(chart.line)] : [];
    Plotly.react(chart.id, [...lines, ...chart.traces.map(trace)], layout(chart), { responsive: true, displaylogo: false, displayModeBar: false });
  }
}

function sortable(table) {
  const heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
  const compare = (a, b) => (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const rows = [...table.tBodies[0].rows].sort((one, two) => {
        const [a, b] = [value(one, column), value(two, column)];
        if (a === "" || b === "") return (a === "") - (b === ""); // what has no value stands last, either way
        return down ? compare(b, a) : compare(a, b);
      });
      table.tBodies[0].append(...rows);
    });
  });
}

document.querySelectorAll("table.sortable").forEach(sortable);
draw();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
