#!/bin/sh
# Builds most_ray/report/static/plotly.min.js: plotly.js with the trace types that the report draws and no others. Needs Node.js and npm.
# For another trace type add it to TRACES, for another release change PLOTLY; then run `sh .ci/plotly.sh` and the tests of the report.
set -eu
PLOTLY=4.1.1
ESBUILD=0.28.1
TRACES="bar heatmap" # scatter is part of plotly.js's core

target=$(cd "$(dirname "$0")/.." && pwd)/most_ray/report/static/plotly.min.js
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
echo '{"private": true}' > package.json
npm install --silent --ignore-scripts --no-audit --no-fund "plotly.js@$PLOTLY" "esbuild@$ESBUILD"
{
    echo 'const Plotly = require("plotly.js/lib/core");'
    for trace in $TRACES; do echo "Plotly.register(require(\"plotly.js/lib/$trace\"));"; done
    echo 'module.exports = Plotly;'
} > entry.js
# The options are those of plotly.js's own esbuild-config.js. The only CSS that is left out is that of maps.
npx esbuild entry.js --bundle --minify --format=iife --global-name=Plotly --define:global=window --define:define.amd=false --target=es2016 --loader:.css=empty \
    --legal-comments=none --log-level=warning --metafile=meta.json --outfile=plotly.js
node - "$PLOTLY" "scatter $TRACES" > "$target" << 'SCRIPT'
const fs = require("fs");
const [version, traces] = process.argv.slice(2);
const inputs = Object.values(JSON.parse(fs.readFileSync("meta.json")).outputs)[0].inputs;
const used = Object.keys(inputs).filter(path => !path.endsWith(".css")).map(path => path.match(/^node_modules\/(@[^/]+\/)?[^/]+/));
const packages = [...new Set(used.filter(Boolean).map(found => found[0]))].sort().map(folder => {
  const about = JSON.parse(fs.readFileSync(`${folder}/package.json`));
  const licence = fs.readdirSync(folder).find(name => /^licen[sc]e/i.test(name));
  const holder = licence && (fs.readFileSync(`${folder}/${licence}`, "utf8").match(/copyright .*\d{4}.*/i) || [])[0];
  return ` * ${about.name} ${about.version}, ${about.license}${holder ? `, ${holder.replace(/<.*>/, "").trim()}` : ""}`;
});
const head = ["/**", ` * plotly.js v${version}, reduced to the traces: ${traces.split(" ").join(", ")}`, " * Built by .ci/plotly.sh from:", ...packages, " */"];
process.stdout.write(`${head.join("\n")}\n${fs.readFileSync("plotly.js", "utf8")}`);
SCRIPT
ls -l "$target"
