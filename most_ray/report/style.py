"""The page's style and script."""

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --panel: #ffffff; --ink: #1f252b; --soft: #5d6670; --line: #dfe3e8; --grid: #e8ebef;
  --accent: #35618e; --good: #2c7a4b; --going: #a8690c; --sub: #fbeecb; --gone: #fbdcd8; --added: #d7efdf; --tint: #f6f7f9; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171a; --panel: #1a1e22; --ink: #dfe3e7; --soft: #98a1ab; --line: #2f353c;
  --grid: #2a3037; --accent: #8ab4dd; --good: #6cc08d; --going: #e0ab58; --sub: #4a3d17; --gone: #542a27; --added: #1f4530;
  --tint: #20252a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 14px/1.5 system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; }
header, main, footer { max-width: 1500px; margin: 0 auto; padding: 0 28px; }
header { padding-top: 26px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 6px; font-weight: 650; overflow-wrap: anywhere; }
.key { display: inline-block; width: .66em; height: .66em; border-radius: 2px; margin: 0 .4em 0 0; }
h1 .run + .run { margin-left: .9em; }
h1 .run { display: inline-block; }
h2 { font-size: 18px; margin: 34px 0 12px; padding-bottom: 5px; border-bottom: 1px solid var(--line); font-weight: 650; }
h3 { font-size: 14px; margin: 0; font-weight: 650; }
h4 { font-size: 13px; margin: 18px 0 5px; font-weight: 650; }
h4 small { color: var(--soft); font-weight: 400; margin-left: 6px; font-size: 12px; }
nav { margin-top: 10px; display: flex; flex-wrap: wrap; gap: 2px 16px; font-size: 13px; }
a { color: var(--accent); text-decoration: none; } a:hover { text-decoration: underline; }
.states span { display: inline-block; margin-right: 8px; padding: 1px 9px; border-radius: 10px; border: 1px solid currentColor;
  font-size: 12px; }
.states .complete { color: var(--good); } .states .going { color: var(--going); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(168px, 1fr)); gap: 12px; margin: 18px 0 14px; }
.tile { border: 1px solid var(--line); border-radius: 6px; padding: 10px 14px; background: var(--panel); min-width: 0; }
.tile .what { color: var(--soft); font-size: 12px; overflow-wrap: anywhere; }
.tile .value { font-size: 22px; line-height: 1.3; font-weight: 600; }
.tile .more { color: var(--soft); font-size: 12px; min-height: 1.5em; }
.grid { display: grid; grid-template-columns: minmax(0, 1fr); gap: 16px; }
.grid > section, .card { border: 1px solid var(--line); border-radius: 6px; background: var(--panel); padding: 12px 16px 10px;
  min-width: 0; }
.card { margin-top: 16px; }
.figure .top { display: flex; align-items: baseline; gap: 12px; }
.figure button { margin-left: auto; font: inherit; font-size: 12px; color: var(--soft); background: none; border: 1px solid var(--line);
  border-radius: 4px; padding: 0 8px; cursor: pointer; }
.figure button[aria-pressed=true] { color: var(--accent); border-color: currentColor; }
.note { color: var(--soft); font-size: 12px; margin: 2px 0 0; max-width: 130ch; }
.note .swatch { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin: 0 5px 0 10px; }
.note .entry { white-space: nowrap; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; }
th, td { text-align: left; vertical-align: top; padding: 4px 18px 4px 0; border-bottom: 1px solid var(--line); font-weight: 400; }
tr:last-child > * { border-bottom: 0; }
thead th { color: var(--soft); font-size: 12px; white-space: nowrap; }
tbody th { white-space: nowrap; color: var(--soft); }
.figures td, .summary td { white-space: nowrap; }
.interval, .counts, .none { color: var(--soft); } .counts { font-size: 12px; }
td b { font-weight: 600; }
.columns { display: grid; grid-template-columns: repeat(auto-fill, minmax(290px, 1fr)); gap: 0 32px; align-items: start; }
.confusions td:last-child { white-space: nowrap; } .confusions th { color: inherit; } .confusions { min-width: 60%; }
.bar { display: inline-block; height: 8px; margin-left: 8px; background: var(--accent); opacity: .55; border-radius: 1px; }
.samples th { font-size: 12px; max-width: 260px; overflow: hidden; text-overflow: ellipsis; } .samples td { min-width: 260px;
  overflow-wrap: anywhere; }
.speech tbody th { color: inherit; white-space: normal; min-width: 140px; } .speech th, .speech td { overflow-wrap: anywhere; }
code { white-space: nowrap; }
audio { width: 240px; max-width: 100%; height: 32px; vertical-align: top; }
ins, del { text-decoration-thickness: 1px; border-radius: 2px; padding: 0 2px; }
del { text-decoration: line-through; } ins { text-decoration: underline; }
.sub del, .sub ins { background: var(--sub); } .gone { background: var(--gone); } .added { background: var(--added); }
details { margin-top: 8px; } summary { cursor: pointer; color: var(--soft); font-size: 13px; margin-bottom: 4px; }
.keys td { overflow-wrap: anywhere; min-width: 90px; } .marked th, .mark { color: var(--ink); font-weight: 600; }
.pairs { columns: 330px; column-gap: 36px; margin: 0; font-size: 13px; }
.pairs div { display: flex; gap: 14px; padding: 4px 0; border-bottom: 1px solid var(--line); break-inside: avoid; }
.pairs dt { color: var(--soft); flex: 1 1 45%; overflow-wrap: anywhere; } .pairs dd { margin: 0; flex: 1 1 55%; overflow-wrap: anywhere;
  min-width: 0; } .pairs code { white-space: normal; }
.pairs.marked dt { color: var(--ink); font-weight: 600; }
.halves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr)); gap: 0 36px; align-items: start; }
footer { color: var(--soft); font-size: 12px; padding-top: 30px; padding-bottom: 40px; }
/* Figures take the page's colours: plotly writes its own into style attributes, which only !important outdoes. */
.plot .infolayer text { fill: var(--ink) !important; }
#fig-mix .scatterlayer path.point, #fig-mix path.scatterpts { stroke: var(--ink) !important; }
.plot .gridlayer path { stroke: var(--grid) !important; }
.plot .xlines-above, .plot .ylines-above, .plot path[class$="tick"] { stroke: var(--soft) !important; }
.plot g[class$="tick"] text { fill: var(--soft) !important; }
/* Of a sweep: many trials in a table, small figures in a row, texts as they were written. */
:root { --bad: #b03a2e; } @media (prefers-color-scheme: dark) { :root { --bad: #ee9186; } }
.states .failed { color: var(--bad); }
.tall > .scroll { max-height: 620px; overflow: auto; border: 1px solid var(--line); border-radius: 6px; padding: 0 14px;
  background: var(--panel); }
.tall thead th { position: sticky; top: 0; background: var(--panel); padding-top: 8px; box-shadow: 0 1px 0 var(--line); }
.trials td { white-space: nowrap; } .trials td .counts { display: inline-block; max-width: 320px; white-space: normal; }
.trials { min-width: 100%; } .trials tbody th { color: inherit; }
.between { margin: 16px 0; } .effects > div { min-width: 0; }
.effects { margin-top: 4px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 400px), 1fr)); }
pre { font: 12px/1.5 ui-monospace, "SF Mono", "DejaVu Sans Mono", monospace; margin: 6px 0 8px; padding: 10px 12px; border-radius: 4px;
  background: var(--tint); white-space: pre-wrap; overflow-wrap: anywhere; }
.stretch .figure { overflow-x: auto; } .stretch .plot { min-width: var(--least); }
.stretch .top, .stretch .note { position: sticky; left: 0; }
#fig-parallel .annotation .bg { fill: var(--panel) !important; fill-opacity: .8 !important; }
@media (min-width: 1180px) { .grid { grid-template-columns: repeat(2, minmax(0, 1fr)); } .grid > .wide { grid-column: 1 / -1; }
}
.grid.small { grid-template-columns: repeat(auto-fit, minmax(min(100%, 290px), 1fr)); }
@media (max-width: 640px) { header, main, footer { padding-left: 12px; padding-right: 12px; } th, td { padding-right: 10px; } }
@media print { :root { color-scheme: light; --paper: #fff; --panel: #fff; --ink: #111; --soft: #555; --line: #ccc; --grid: #ddd;
  --accent: #35618e;
    --good: #2c7a4b; --going: #a8690c; --sub: #fbeecb; --gone: #fbdcd8; --added: #d7efdf; }
  body { font-size: 11px; -webkit-print-color-adjust: exact; print-color-adjust: exact; } header, main, footer { padding: 0; }
  nav, .figure button, .modebar, audio { display: none !important; } .grid { display: block; } .grid > section { margin-bottom: 12px; }
  .figure, tr { break-inside: avoid; } h2, h3, h4 { break-after: avoid; } .scroll { overflow: visible; }
  td, .figures td { white-space: normal; } :root { --bad: #b03a2e; } .tall > .scroll { max-height: none; overflow: visible; }
  .trials td { white-space: normal; } .stretch .plot { min-width: 0; } }
"""

SCRIPT = """
"use strict";
(function () {
  const options = {
    responsive: true, displaylogo: false, showTips: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    showSendToCloud: false, plotlyServerURL: "",  // a button of plotly's own would carry a figure to its makers in a new window
    toImageButtonOptions: {format: "svg"}  // any other goes by way of an image that the page's policy does not let in
  };
  const plots = Array.from(document.querySelectorAll(".plot"));
  const drawn = plots.map(function (plot) {
    const spec = JSON.parse(document.getElementById("data-" + plot.dataset.figure).textContent);
    return Plotly.newPlot(plot, spec.data, spec.layout, options);
  });
  Promise.all(drawn).then(function () { document.documentElement.dataset.drawn = plots.length; });
  document.querySelectorAll("button[data-log]").forEach(function (button) {
    button.addEventListener("click", function () {
      const plot = document.querySelector('.plot[data-figure="' + button.dataset.log + '"]');
      const log = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", log);
      const change = {};
      Object.keys(plot.layout).filter(function (key) { return key.startsWith("yaxis"); }).forEach(function (key) {
        change[key + ".type"] = log ? "log" : "linear";
        change[key + ".autorange"] = true;
      });
      Plotly.relayout(plot, change);
    });
  });
  const widths = new Map();
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (each) { each.open = true; });
    plots.forEach(function (plot) { Plotly.relayout(plot, {width: 660, autosize: false}); });
  });
  window.addEventListener("afterprint", function () {
    plots.forEach(function (plot) { Plotly.relayout(plot, {width: null, autosize: true}); });
  });
})();
"""
