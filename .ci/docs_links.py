"""What MkDocs needs beside the pages: links to files outside of docs/, which work on a code host, become links there or plain text.

MkDocs calls `on_page_markdown` (see `hooks` in mkdocs.yml). Where mkdocs.yml has a `repo_url`, such a link leads to the file there.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)")


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """A page's text with its links out of docs/ replaced."""
    folder = posixpath.dirname(page.file.src_uri)

    def outside(match: re.Match[str]) -> str:
        text, target = match.groups()
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path = posixpath.normpath(posixpath.join("docs", folder, target.split("#", 1)[0]))
        if path.startswith("docs/") or path == "docs":
            return match[0]
        return f"[{text}]({config.repo_url.rstrip('/')}/blob/main/{path})" if config.repo_url else text

    return _LINK.sub(outside, markdown)
