"""Install pip into this interpreter's environment from its wheel on PyPI, checked against the digest that PyPI gives."""

import hashlib
import json
import subprocess
import sys
import tempfile
import urllib.request
from pathlib import Path
from urllib.parse import urljoin

INDEX = "https://pypi.org/pypi/pip/json"

with urllib.request.urlopen(INDEX, timeout=60) as answer:
    wheel = next(url for url in json.load(answer)["urls"] if url["packagetype"] == "bdist_wheel")
with urllib.request.urlopen(urljoin(INDEX, wheel["url"]), timeout=60) as answer:
    content = answer.read()
if hashlib.sha256(content).hexdigest() != wheel["digests"]["sha256"]:
    sys.exit("the pip wheel does not match its digest")
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / wheel["filename"]
    path.write_bytes(content)
    subprocess.run([sys.executable, f"{path}/pip", "install", "--quiet", "--no-index", str(path)], check=True)
