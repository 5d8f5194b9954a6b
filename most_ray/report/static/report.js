"use strict";
(function () {
  const options = {
    responsive: true, displaylogo: false, showTips: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    showSendToCloud: false, plotlyServerURL: "",  // no button that uploads a figure to plotly's cloud
    toImageButtonOptions: {format: "svg"}  // other formats are drawn by an image whose URL the page's policy forbids
  };
  const NARROW = 560, PANEL = 230;  // pixels: a narrower figure has small margins, and narrower panels are below one another
  const TITLES = {step: "step", tokens: "tokens", hours: "hours of training"}, CHANGED = "#c07a12", RESUMED = "#8a939d";
  const root = document.documentElement, plots = Array.from(document.querySelectorAll(".plot"));
  const touch = window.matchMedia("(pointer: coarse)").matches;
  const runs = document.getElementById("runs") ? JSON.parse(document.getElementById("runs").textContent).runs : [];
  let axis = "step", waiting = [], busy = false;

  // A step of a run on the chosen axis: linear between the steps whose tokens and hours are known.
  function along(run, step) {
    const steps = run.step, values = run[axis];
    if (axis === "step" || step === null) return step;
    let low = 0, high = steps.length - 1;
    if (step >= steps[high]) return values[high];
    while (high - low > 1) {
      const middle = (low + high) >> 1;
      if (steps[middle] <= step) low = middle; else high = middle;
    }
    return values[low] + (values[high] - values[low]) * (step - steps[low]) / (steps[high] - steps[low]);
  }

  // A figure as its width and the chosen axis make it, from what the page holds.
  function arranged(plot) {
    const spec = JSON.parse(document.getElementById("data-" + plot.dataset.figure).textContent), layout = spec.layout;
    // What plotly.js appends to the names of the panels' axes.
    const panels = Object.keys(layout).filter(function (key) { return /^xaxis\d*$/.test(key); }).map(function (key) { return key.slice(5); });
    const width = plot.dataset.print ? 660 : plot.clientWidth;
    plot.dataset.width = width;
    if (plot.dataset.print) layout.width = width;
    layout.autosize = !plot.dataset.print;
    layout.uirevision = axis;  // a zoom stays until the axis is another
    if (touch) layout.dragmode = false;  // a finger scrolls the page rather than zooming
    if (width < NARROW) {
      Object.assign(layout.margin, {l: Math.min(layout.margin.l, 50), r: 8});
      layout.font.size = 11;
    }
    stack(layout, panels, width);
    if (layout.meta && layout.meta.over) {
      move(spec, panels);
      mark(layout, panels, width);
    }
    if (plot.dataset.log) panels.forEach(function (name) { Object.assign(layout["yaxis" + name], {type: "log", autorange: true}); });
    plot.style.height = layout.height + "px";
    return spec;
  }

  // Panels below one another where they would be too narrow side by side.
  function stack(layout, panels, width) {
    if (panels.length < 2) return;
    const rows = new Set(panels.map(function (name) { return layout["yaxis" + name].domain[0]; })).size;
    if (width * rows >= PANEL * panels.length || rows === panels.length) return;
    const outer = layout.margin.t + layout.margin.b, gap = 56;
    const heights = panels.map(function (name) {
      const extent = layout["yaxis" + name].domain;
      return Math.max(170, (extent[1] - extent[0]) * (layout.height - outer));
    });
    const inner = heights.reduce(function (sum, height) { return sum + height + gap; }, -gap);
    let top = inner;
    panels.forEach(function (name, index) {
      layout["xaxis" + name].domain = [0, 1];
      layout["yaxis" + name].title.text = layout["yaxis" + panels[0]].title.text;
      layout["xaxis" + name].title.text = index + 1 < panels.length ? "" : layout["xaxis" + name].title.text;
      layout["yaxis" + name].domain = [Math.max(0, (top - heights[index]) / inner), top / inner];
      top -= heights[index] + gap;
    });
    layout.height = inner + outer;
    if (layout.legend && layout.legend.y > 1.02) layout.legend.y = 1 + 24 / inner;
  }

  // Curves and their axes over what is chosen, with one range for all runs.
  function move(spec, panels) {
    let reach = 0;
    spec.data.forEach(function (trace) {
      const steps = trace.x || trace.y.map(function (_, index) { return trace.x0 + index * trace.dx; });
      trace.x = steps.map(function (step) { return along(runs[trace.meta], step); });
      trace.x.forEach(function (x) { reach = Math.max(reach, x); });
    });
    panels.forEach(function (name) {
      const each = spec.layout["xaxis" + name];
      if (each.title.text) each.title.text = TITLES[axis];
      Object.assign(each, {range: [0, 1.02 * reach || 1], hoverformat: axis === "hours" ? ".4~g" : ",.0f"});
    });
  }

  // Lines where attempts resumed, with their numbers where there is room for them.
  function mark(layout, panels, width) {
    layout.shapes = layout.shapes || [];
    layout.annotations = layout.annotations || [];
    panels.forEach(function (name) {
      const x = layout["xaxis" + name], place = {xref: "x" + name, yref: "y" + name + " domain"};
      const pixels = (x.domain[1] - x.domain[0]) * (width - layout.margin.l - layout.margin.r) / x.range[1];
      let free = -Infinity;
      runs.forEach(function (run) {
        run.marks.forEach(function (each) {
          const at = along(run, each.step), colour = each.changed ? CHANGED : runs.length > 1 ? run.colour : RESUMED;
          const line = {color: colour, width: each.changed ? 1.6 : 1.2, dash: each.changed ? "dash" : "dot"};
          layout.shapes.push(Object.assign({type: "line", x0: at, x1: at, y0: 0, y1: 1, layer: "below", line: line}, place));
          if (at * pixels < free && !each.changed) return;
          free = at * pixels + 16;
          const number = {text: String(each.attempt), font: {size: 10, color: colour}, hovertext: each.text, captureevents: true};
          const corner = {x: at, y: 1, xanchor: "left", yanchor: "top", showarrow: false, borderpad: 1, name: "attempt"};
          layout.annotations.push(Object.assign(number, corner, place));
        });
      });
    });
  }

  // Figures are drawn one at a time, those in sight first, so that the page can be read and scrolled meanwhile.
  function draw(some) {
    const seen = function (plot) { const box = plot.getBoundingClientRect(); return box.bottom > 0 && box.top < window.innerHeight ? 0 : 1; };
    const places = new Map(some.map(function (plot) { return [plot, seen(plot)]; }));
    waiting = waiting.filter(function (plot) { return !places.has(plot); })
      .concat(some.slice().sort(function (a, b) { return places.get(a) - places.get(b); }));
    if (!busy) next();
  }
  function next() {
    busy = waiting.length > 0;
    if (!busy) {
      root.dataset.drawn = plots.length;
      root.dataset.axis = axis;
      return;
    }
    const after = function () { setTimeout(next); };
    one(waiting.shift()).then(after, function (error) { console.error(error); after(); });
  }
  async function one(plot) {
    const spec = arranged(plot);
    return plot.classList.contains("js-plotly-plot") ? Plotly.react(plot, spec.data, spec.layout, options)
      : Plotly.newPlot(plot, spec.data, spec.layout, options);
  }

  setTimeout(function () { draw(plots); });  // after the first paint

  document.querySelectorAll("button[data-log]").forEach(function (button) {
    button.addEventListener("click", function () {
      const plot = document.querySelector('.plot[data-figure="' + button.dataset.log + '"]');
      plot.dataset.log = plot.dataset.log ? "" : "yes";
      button.setAttribute("aria-pressed", Boolean(plot.dataset.log));
      draw([plot]);
    });
  });
  document.querySelectorAll(".choice").forEach(function (choice) {
    const select = choice.querySelector("select"), options = Array.from(choice.querySelectorAll(".option"));
    function show() { options.forEach(function (each, index) { each.hidden = index !== select.selectedIndex; }); }
    select.addEventListener("change", show);
    show();
    window.addEventListener("beforeprint", function () { options.forEach(function (each) { each.hidden = false; }); });
    window.addEventListener("afterprint", show);
  });
  document.querySelectorAll("button[data-axis]").forEach(function (button) {
    button.addEventListener("click", function () {
      axis = button.dataset.axis;
      delete root.dataset.axis;
      document.querySelectorAll("button[data-axis]").forEach(function (each) { each.setAttribute("aria-pressed", each === button); });
      draw(plots.filter(function (plot) { return plot.dataset.over; }));
    });
  });
  let settled = 0;  // a timer: figures are drawn again once a window that is being resized rests
  window.addEventListener("resize", function () {
    clearTimeout(settled);
    settled = setTimeout(function () {
      draw(plots.filter(function (plot) { return plot.clientWidth > 0 && Math.abs(plot.clientWidth - plot.dataset.width) > 20; }));
    }, 150);
  });

  let folded = [];
  window.addEventListener("beforeprint", function () {
    folded = Array.from(document.querySelectorAll("details:not([open])"));
    folded.forEach(function (each) { each.open = true; });
    waiting = [];
    plots.forEach(function (plot) { plot.dataset.print = "yes"; one(plot); });
  });
  window.addEventListener("afterprint", function () {
    folded.forEach(function (each) { each.open = false; });
    plots.forEach(function (plot) { plot.dataset.print = ""; });
    draw(plots);
  });
})();
