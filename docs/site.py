"""What mkdocs does not do alone: pages from outside docs/, links that work here as on GitHub, and formulas without a script."""

from __future__ import annotations

import html
import os
import re
from pathlib import Path

from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
DOCS = Path(__file__).parent
PAGES = {
    ROOT / "README.md": "index.md",
    ROOT / "CONTRIBUTING.md": "contributing.md",
    ROOT / "SECURITY.md": "security.md",
    ROOT / "CHANGELOG.md": "changelog.md",
    ROOT / "mulki_plugins/models/tiny/MODEL_CARD.md": "model-card.md",
}
"""Files that GitHub expects elsewhere, and the site's pages of them."""


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside docs/."""
    for source, uri in PAGES.items():
        files.append(File.generated(config, uri, content=relink(source.read_text("utf-8"), source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make a page's links to files outside docs/ fit the site."""
    source = page.file.abs_src_path
    return relink(markdown, Path(source)) if source else markdown


def relink(markdown: str, source: Path) -> str:
    """Point links to PAGES at their site pages. A link to any other file outside docs/ becomes plain text."""

    def replace(match: re.Match[str]) -> str:
        text, path, anchor = match.groups(default="")
        target = (source.parent / path).resolve()
        if target in PAGES:
            return f"[{text}]({PAGES[target]}{anchor})"
        if target.is_relative_to(DOCS):
            return f"[{text}]({os.path.relpath(target, DOCS)}{anchor})"
        return text

    return re.sub(r"\[([^\]]+)\]\((?!\w+:)([^)#\s]+)(#[^)\s]*)?\)", replace, markdown)


def on_page_content(content: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the formulas of a page into MathML, which browsers show without a script."""

    def replace(match: re.Match[str]) -> str:
        inline = match[1] == "span"
        formula = html.unescape(match[2]).strip()[2:-2]
        return convert(formula, display="inline" if inline else "block")

    return re.sub(r'<(span|div) class="arithmatex">(.*?)</\1>', replace, content, flags=re.S)
