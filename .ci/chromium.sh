#!/bin/sh
# Chromium for tests/browser, where it can be installed; never a reason to stop.
for program in chromium chromium-browser google-chrome; do
    if command -v "$program" >/dev/null 2>&1; then exit 0; fi
done
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    echo "installing Chromium for tests/browser"
    { apt-get update && apt-get install --yes --no-install-recommends chromium fonts-dejavu-core; } >/dev/null 2>&1 && exit 0
fi
echo "tests/browser needs Chromium: apt-get install chromium" >&2
exit 0
