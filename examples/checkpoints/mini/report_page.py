"""The one look of all reports: a page that needs nothing but itself, in the light, in the dark and on paper.

Explanations, an evaluation's gallery, the concept dictionary, the criteria and training curves are bodies of this page.
A body is markup: whoever writes it escapes every text in it, by `text`. Its classes are those of `STYLE`. Knows nothing
about what is reported.
"""

import html
from typing import Any

from .palette import PAGE_COLOURS


def _colours(number: int) -> str:
    return "; ".join(f"--{name}: {colours[number]}" for name, colours in PAGE_COLOURS.items())


STYLE = f"""
:root {{ color-scheme: light dark; {_colours(0)} }}
@media (prefers-color-scheme: dark) {{ :root {{ {_colours(1)} }} }}
@media print {{ :root {{ color-scheme: light; {_colours(0)} }} }}
* {{ box-sizing: border-box }}
body {{ font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 76rem;
  margin: 0 auto; padding: 1.5rem 1.25rem 3rem; overflow-wrap: anywhere }}
h1 {{ font-size: 1.6rem; line-height: 1.25; margin: 0 0 .5rem }}
h2 {{ font-size: 1.2rem; margin: 2.2rem 0 .8rem; padding-top: .8rem; border-top: 1px solid var(--line) }}
h3 {{ font-size: 1rem; margin: 0 }}
p {{ max-width: 48rem; margin: .5rem 0 }}
a {{ color: var(--accent) }}
img, svg {{ max-width: 100% }}
figure {{ margin: 0 }}
figcaption, .soft {{ color: var(--soft); font-weight: 400 }}
code {{ color: var(--soft); font-size: .92em }}
.grid {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(17rem, 100%), 1fr)); gap: 1.5rem }}
.grid img, .grid svg {{ display: block; width: 100%; margin-bottom: .4rem }}
.item {{ display: flex; gap: 1rem; padding: .9rem 0; border-top: 1px solid var(--line) }}
.item > div {{ flex: 1; min-width: 0 }}
.swatch {{ display: inline-block; width: .8em; height: .8em; border-radius: 2px }}
.bar {{ display: block; height: .5em; margin: .35em 0; border-radius: 2px; print-color-adjust: exact }}
.scroll {{ overflow-x: auto; overflow-wrap: normal }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ border-top: 1px solid var(--line); padding: .35rem .7rem; text-align: left; vertical-align: top }}
th {{ color: var(--soft); font-weight: 600; white-space: nowrap }}
tr:target {{ background: var(--panel) }}
svg text {{ font: 12px system-ui, sans-serif; fill: var(--ink) }} svg text.soft {{ fill: var(--soft) }}
@media print {{ body {{ max-width: none; padding: 0 }} figure, .item, tr {{ break-inside: avoid }}
  h2, h3 {{ break-after: avoid }} .swatch, .word, svg {{ print-color-adjust: exact }} }}
"""


def page(title: str, body: str, lead: str = "", style: str = "") -> str:
    """A whole page.

    Args:
        title: the heading, as plain text.
        body: markup below it, whose texts are escaped.
        lead: markup of one paragraph below the heading, likewise; "" for none.
        style: CSS of this kind of page alone.

    Returns:
        The text of an HTML file without scripts or links to anything outside.

    Example:
        >>> "<h1>a &lt; b</h1>" in page("a < b", "<p>true</p>")
        True
    """
    heading = f"<h1>{text(title)}</h1>" + (f"\n<p>{lead}</p>" if lead else "")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(title)}</title><style>{STYLE}{style}</style></head><body>\n{heading}\n{body}\n</body></html>\n"
    )


def text(value: Any) -> str:
    """A value as text in markup or in a quoted attribute.

    Args:
        value: anything.

    Returns:
        Its `str`, escaped.
    """
    return html.escape(str(value))
