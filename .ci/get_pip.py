"""Install the pip of .ci/locks/pip.txt into this interpreter's environment from its wheel: from PyPI, or what PIP_INDEX_URL names."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from urllib.parse import urljoin

lock = (Path(__file__).parent / "locks" / "pip.txt").read_text(encoding="utf-8")
name = f"pip-{re.search(r'^pip==([^ ;]+)', lock, re.MULTILINE)[1]}-py3-none-any.whl"
index = os.environ.get("PIP_INDEX_URL", "https://pypi.org/simple").rstrip("/") + "/pip/"

with urllib.request.urlopen(index, timeout=60) as answer:
    links = re.findall(r'href="([^"]+)"', answer.read().decode())
link = next((link for link in links if f"/{name}" in f"/{link}"), None)
if link is None:
    sys.exit(f"{index} has no {name}")
with urllib.request.urlopen(urljoin(index, link), timeout=60) as answer:
    content = answer.read()
if f"sha256:{hashlib.sha256(content).hexdigest()}" not in lock:
    sys.exit(f"{name} does not match the hash in .ci/locks/pip.txt")
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / name
    path.write_bytes(content)
    subprocess.run([sys.executable, f"{path}/pip", "install", "-qq", "--no-index", "--no-user", str(path)], check=True)
