"""The page: one HTML file with its style and script in it, and no address outside it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from mulki_plugins import __version__
from mulki_plugins.characters import printable
from mulki_plugins.report.page import charts, view
from mulki_plugins.report.page.experiment import LEVEL, Experiment
from mulki_plugins.report.page.scales import scale_css
from mulki_plugins.report.page.svg import shorten, swatch
from mulki_plugins.report.result import Result
from mulki_plugins.report.significance import CONFIDENCE, ENOUGH_STRATEGIES, ENOUGH_STREAMS, HIGHER_IS_BETTER

MARK = "<!-- a report of MulKI -->"
"""What a report begins with, after its document type: only such a file is overwritten."""


def render_page(results: Sequence[Result], compared: Sequence[Experiment], resamples: int, title: str) -> str:
    """The whole page. Names are escaped; the page's policy allows no script but its own, and no request."""
    script = _read("page.js")
    style = _read("page.css").replace("/*light*/", scale_css("light")).replace("/*dark*/", scale_css("dark"))
    policy = f"default-src 'none'; style-src {_source(style)}; script-src {_source(script)}; base-uri 'none'"
    environment = Environment(
        loader=PackageLoader("mulki_plugins.report.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_harmless,
    )
    environment.filters |= {
        "short": shorten, "name": _isolate, "closed": _close, "signed": _signed, "p": format_p, "lines": escape,
    }  # fmt: skip
    return environment.get_template("page.html").render(
        mark=Markup(MARK), title=title, version=__version__, results=results, experiments=compared,
        style=Markup(style), script=Markup(script), policy=Markup(policy), charts=charts, view=view, swatch=swatch,
        rankings=view.rankings(compared), better=HIGHER_IS_BETTER,
        confidence=round(100 * CONFIDENCE), level=LEVEL, resamples=resamples, enough=(ENOUGH_STREAMS, ENOUGH_STRATEGIES),
        now=view.now(),
    )  # fmt: skip


def _read(name: str) -> str:
    return (files("mulki_plugins.report.page") / "templates" / name).read_text("utf-8")


def _source(text: str) -> str:
    """The only style or script that the page's policy allows: the one with this hash."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _harmless(value: object) -> object:
    """Text without control characters; what is markup already stays as it is."""
    return printable(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _isolate(text: str) -> Markup:
    """A name, kept from changing the direction of the text around it."""
    return Markup("<bdi>{}</bdi>").format(printable(text))


def _close(text: str) -> str:
    """The same where no markup is possible."""
    return f"\N{FIRST STRONG ISOLATE}{printable(text)}\N{POP DIRECTIONAL ISOLATE}"


def _signed(value: float, digits: int = 1) -> str:
    """A number with its sign, a true minus among them; 0 without a sign."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "\N{MINUS SIGN}")


def format_p(p: float) -> str:
    """A p-value: `< 0.001`, else three digits."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
