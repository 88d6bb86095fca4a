"""The style sheet and the script of a run's report: no font, no file, no address outside the page."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fcfcfb; --ink: #1b1d21; --quiet: #6d727b; --line: #e4e5e7; --grid: #eeeff0; --panel: #f5f5f4;
  --one: #2f62c9; --two: #c2541b; --good: #2c8a57; --warn: #b7791f; --bad: #c53a3a; --other: #7a5bb5; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #141619; --ink: #e4e6e9; --quiet: #949aa4; --line: #2d3137; --grid: #22262b; --panel: #1b1e22;
  --one: #7ea6f5; --two: #ef9a63; --good: #62c08c; --warn: #dcaa55; --bad: #ef7a7a; --other: #b59ae6; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 44px 28px 72px; max-width: 1120px; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { margin: 0; font-size: 29px; line-height: 1.2; font-weight: 620; letter-spacing: -.015em;
  overflow-wrap: anywhere; }
h2 { margin: 46px 0 12px; font-size: 17px; font-weight: 620; letter-spacing: -.005em; }
.outcome { margin: 9px 0 28px; color: var(--quiet); }
.outcome b { color: var(--ink); font-weight: 560; }
.outcome b::before { content: ""; display: inline-block; width: 9px; height: 9px; margin-right: 8px;
  border-radius: 50%;
  background: var(--warn); }
.outcome b.good::before { background: var(--good); } .outcome b.bad::before { background: var(--bad); }
dl { display: grid; grid-template-columns: repeat(auto-fill, minmax(182px, 1fr)); gap: 0 20px; margin: 0;
  border-bottom: 1px solid var(--line); }
dl div { padding: 12px 0 13px; border-top: 1px solid var(--line); }
dt { color: var(--quiet); font-size: 13px; }
dd { margin: 1px 0 0; font-size: 21px; font-weight: 560; letter-spacing: -.01em;
  font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }
dd small { font-size: 13px; font-weight: 400; letter-spacing: 0; color: var(--quiet); white-space: nowrap; }
dd.words { font-size: 16px; line-height: 1.35; padding-top: 4px; }
.plots { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 30px 36px; }
.plots figure:first-child { grid-column: 1 / -1; }
.plots figure:first-child .area { height: 320px; }
figure { margin: 0; }
figcaption { margin-bottom: 12px; font-size: 13px; }
.what { font-size: 15px; font-weight: 600; } .unit { color: var(--quiet); }
.keys { display: flex; gap: 0 18px; color: var(--quiet); font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.key i { display: inline-block; width: 14px; height: 0; margin-right: 6px; vertical-align: 4px;
  border-top: 2px solid var(--c); } .key.raw i { opacity: .4; }
.key b { display: inline-block; min-width: 3.6em; color: var(--ink); font-weight: 560; }
.at { order: 1; margin-left: auto; color: var(--ink); }
.raw, .main { --c: var(--one); } .second { --c: var(--two); }
.area, .bars { display: block; width: calc(100% - 50px); height: 168px; margin: 0 0 28px 50px;
  overflow: visible; }
.area, .area * { touch-action: pan-y; }
.area text, .bars text { font-size: 12px; fill: var(--quiet); font-variant-numeric: tabular-nums; }
text.y { text-anchor: end; } text.x { text-anchor: middle; }
.bars { --m: var(--bad); } .bars rect { fill: var(--m); }
line { stroke-width: 1; shape-rendering: crispEdges; }
.grid { stroke: var(--grid); } .floor { stroke: var(--line); }
.curve { fill: none; stroke: var(--c); stroke-width: 1.7; stroke-linejoin: round;
  vector-effect: non-scaling-stroke; }
.curve.raw { stroke-width: 1; opacity: .5; }
circle { fill: var(--c); stroke: var(--paper); stroke-width: 1.5; }
line.reference { stroke: var(--quiet); stroke-dasharray: 5 4; } .area text.reference {
  text-anchor: end; paint-order: stroke; stroke: var(--paper); stroke-width: 3px; }
.mark line { stroke: var(--m); opacity: .5; } .mark rect { fill: var(--m);
  transform: translate(-3.5px, -3.5px); }
.mark.checkpoint line, .mark.stop line { display: none; } .mark.resume line { stroke-dasharray: 3 3;
  opacity: .8; }
.checkpoint { --m: var(--quiet); } .resume { --m: var(--other); } .spike { --m: var(--bad); }
.stop { --m: var(--ink); }
.event { --m: var(--warn); }
.plots figure:not(:first-child) .mark.checkpoint { display: none; }
.plots figure:not(:first-child) .mark rect { display: none; }
.cursor { stroke: var(--quiet); opacity: .7; pointer-events: none; }
.legend { margin: 10px 0 4px 50px; display: flex; flex-wrap: wrap; gap: 2px 20px; color: var(--quiet);
  font-size: 13px; }
.legend i { display: inline-block; width: 8px; height: 8px; margin-right: 7px; background: var(--m); }
.bar { display: flex; height: 16px; gap: 1px; overflow: hidden; border-radius: 3px; }
.bar i { background: var(--m); min-width: 1px; }
.cause-productive { --m: var(--good); } .cause-redone_steps { --m: var(--bad); }
.cause-start_up { --m: var(--one); } .cause-compile { --m: var(--other); }
.cause-data_wait { --m: var(--warn); } .cause-checkpoint_stall { --m: var(--two); }
.cause-saving { --m: color-mix(in srgb, var(--two) 50%, var(--paper)); }
.cause-validation { --m: color-mix(in srgb, var(--good) 45%, var(--paper)); }
.cause-other { --m: color-mix(in srgb, var(--quiet) 45%, var(--paper)); } .cause-down { --m: var(--ink); }
.causes { margin: 12px 0 0; }
table { border-collapse: collapse; width: 100%; font-size: 14px; font-variant-numeric: tabular-nums; }
th { text-align: left; white-space: nowrap; font-weight: 500; color: var(--quiet); font-size: 13px; }
th, td { padding: 6px 18px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; }
td:first-child, td.narrow { white-space: nowrap; } td.quiet { color: var(--quiet); }
td:last-child { width: 99%; }
pre { margin: 0; padding: 16px 18px; background: var(--panel); border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; font: 13px/1.55 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
pre .prompt { color: var(--quiet); }
details { border-bottom: 1px solid var(--line); } details:first-of-type { border-top: 1px solid var(--line); }
details > :last-child { margin-bottom: 16px; }
summary { padding: 11px 0; cursor: pointer; font-weight: 560; }
summary span { color: var(--quiet); font-weight: 400; }
.details { margin-top: 46px; }
@media (max-width: 760px) { body { padding: 26px 16px 48px; } .plots { grid-template-columns: minmax(0, 1fr); }
  .plots figure:first-child .area { height: 240px; }
  dl { grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); } }
@media (max-width: 420px) { .key.raw { display: none; } }
@media print { details { display: none; } }
"""

# Hovering over one plot shows the values of all of them at that step; at rest the newest are shown.
SCRIPT = r"""
const data = JSON.parse(document.getElementById("data").textContent);
const areas = [...document.querySelectorAll(".area")];
const svg = (name, style) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  node.setAttribute("class", style);
  return node;
};
const written = value => value === null ? "not finite"
  : value !== 0 && Math.abs(value) < 1e-2 ? value.toExponential(3).replace(/\.?0+e/, "e")
  : Math.abs(value) >= 1e4 ? Math.round(value).toLocaleString("en") : String(+value.toPrecision(5));
const nearest = (steps, step) => {
  let low = 0, high = steps.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (steps[middle] < step) low = middle + 1; else high = middle;
  }
  return low > 0 && step - steps[low - 1] < steps[low] - step ? low - 1 : low;
};
const plots = data.map((plot, i) => {
  const line = svg("line", "cursor"), figure = areas[i].parentNode;
  const keys = figure.querySelectorAll(".key b"), at = figure.querySelector(".at");
  line.setAttribute("y1", 0); line.setAttribute("y2", "100%");
  const dots = plot.curves.map(curve => svg("circle", curve.style));
  dots.forEach(dot => { dot.setAttribute("r", 4); dot.style.pointerEvents = "none"; });
  const share = value => plot.log ? Math.log(value / plot.y[0]) / Math.log(plot.y[1] / plot.y[0])
    : (value - plot.y[0]) / (plot.y[1] - plot.y[0]);
  return { rest() {
    at.textContent = "";
    line.remove(); dots.forEach(dot => dot.remove());
    plot.curves.forEach((curve, j) => keys[j].textContent = written(curve.values.at(-1)));
  }, show(step) {
    areas[i].append(line, ...dots);
    plot.curves.forEach((curve, j) => {
      const near = nearest(curve.steps, step), value = curve.values[near];
      const x = curve.steps[near] / plot.x[1] * 100 + "%";
      if (j === 0) {
        line.setAttribute("x1", x); line.setAttribute("x2", x);
        at.textContent = "step " + curve.steps[near].toLocaleString("en");
      }
      dots[j].setAttribute("cx", x);
      dots[j].setAttribute("cy", value === null ? "-99%" : (1 - share(value)) * 100 + "%");
      keys[j].textContent = written(value);
    });
  } };
});
const rest = () => plots.forEach(plot => plot.rest());
areas.forEach((area, i) => {
  area.addEventListener("pointermove", event => {
    const box = area.getBoundingClientRect(), plot = data[i];
    const step = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)) * plot.x[1];
    const steps = plot.curves[0].steps;
    plots.forEach(each => each.show(steps[nearest(steps, step)]));
  });
  area.addEventListener("pointerleave", rest);
});
rest();
"""
