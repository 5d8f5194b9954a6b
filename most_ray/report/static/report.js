"use strict";
(function () {
  const options = {
    responsive: true, displaylogo: false, showTips: false, modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"],
    showSendToCloud: false, plotlyServerURL: "",  // no button that uploads a figure to plotly's cloud
    toImageButtonOptions: {format: "svg"}  // other formats are drawn by an image whose URL the page's policy forbids
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
  document.querySelectorAll(".choice").forEach(function (choice) {
    const select = choice.querySelector("select"), options = Array.from(choice.querySelectorAll(".option"));
    function show() { options.forEach(function (each, index) { each.hidden = index !== select.selectedIndex; }); }
    select.addEventListener("change", show);
    show();
    window.addEventListener("beforeprint", function () { options.forEach(function (each) { each.hidden = false; }); });
    window.addEventListener("afterprint", show);
  });
  window.addEventListener("beforeprint", function () {
    document.querySelectorAll("details").forEach(function (each) { each.open = true; });
    plots.forEach(function (plot) { Plotly.relayout(plot, {width: 660, autosize: false}); });
  });
  window.addEventListener("afterprint", function () {
    plots.forEach(function (plot) { Plotly.relayout(plot, {width: null, autosize: true}); });
  });
})();
