"""Pages of the site that lie outside of ``docs/``: the README is its front page, and the examples can be downloaded.

Links are written as GitHub reads them (``docs/peft.md`` in the README, ``../examples/x.py`` in a page of ``docs/``) and
turned into the site's own here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the root's pages, the licence and the examples."""
    for source, target in (*PAGES.items(), ("LICENSE", "LICENSE")):
        text = (ROOT / source).read_text()
        files.append(File.generated(config, target, content=_from_root(text) if source in PAGES else text))
    for script in sorted((ROOT / "examples").glob("*.py")):
        files.append(File.generated(config, f"examples/{script.name}", abs_src_path=str(script)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links of a page in ``docs/`` that lead out of it."""
    for source, target in PAGES.items():
        markdown = markdown.replace(f"](../{source}", f"]({target}")
    return markdown.replace("](../examples/", "](examples/").replace("](../LICENSE", "](LICENSE")


def on_page_content(html: str, **_: Any) -> str:
    """Docstrings name functions as Sphinx does, ``:func:`attach```; the site shows the name alone."""
    html = re.sub(r":(?:func|class|meth|mod):<code>~?", "<code>", html)
    return html.replace("::</p>", ":</p>")


def _from_root(text: str) -> str:
    """A page of the root as one of ``docs/``."""
    for source, target in PAGES.items():
        text = text.replace(f"]({source}", f"]({target}")
    return text.replace("](docs/", "](")
