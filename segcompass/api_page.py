"""The page that describes the API of `segcompass serve`, made of its OpenAPI description; needs nothing but itself."""

import html
import json
from typing import Any

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 60em; margin: 2em auto; padding: 0 1em }}
h2 {{ border-top: 1px solid #8886; padding-top: 1em }} h2 code {{ font-size: 1em }}
table {{ border-collapse: collapse }}
td {{ border-top: 1px solid #8884; padding: .25em .8em .25em 0; vertical-align: top }}
pre {{ background: #8882; padding: .8em; overflow-x: auto; border-radius: 4px }}
</style></head><body><h1>{title} {version}</h1><p>{about}</p>
<pre>curl -F image=@photo.jpg -F instruction="the mug nearest the sink" <span class="here">http://HOST</span>/segment
curl -N -F image=@photo.jpg -F instruction="the mug" -F stream=true <span class="here">http://HOST</span>/segment</pre>
{body}
<p>For programs: <a href="openapi.json">openapi.json</a>. State and limits: <a href="health">health</a>.</p>
<script>for (const here of document.querySelectorAll(".here")) here.textContent = location.origin</script>
</body></html>
"""


def api_page(description: dict[str, Any]) -> str:
    """The API as a page that needs nothing but itself.

    Args:
        description: of `FastAPI.openapi`.

    Returns:
        The text of an HTML file.
    """
    parts = []
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{operation['summary']}</p>")
            body = operation.get("requestBody", {}).get("content", {})
            if body:
                parts.append(f"<h3>{' or '.join(body)}</h3>{_table(body['application/json']['schema'])}")
                parts.append("<p>In a form, image is the file, and what is no text is written as JSON.</p>")
            answers = {status: answer["description"] for status, answer in operation["responses"].items()}
            if body:
                parts.append("<h3>The answer</h3>")
                for name in ("Answer", "Instance", "Concept", "Nearest", "ErrorContent"):
                    schema = description["components"]["schemas"][name]
                    parts.append(f"<p><b>{name}</b>: {html.escape(schema['description'])}</p>{_table(schema)}")
                rows = "".join(f"<tr><td>{status}<td>{html.escape(text)}" for status, text in answers.items())
                parts.append(f"<h3>Statuses</h3><table>{rows}</table>")
                parts.append(f"<h3>Events of a stream</h3><p>{html.escape(EVENTS)}</p>")
    return PAGE.format(
        title=description["info"]["title"],
        version=description["info"]["version"],
        about=html.escape(description["info"]["description"]),
        body="\n".join(parts),
    )


EVENTS = (
    'waiting {"before": how many wait before you}, begun {}, text {"text": what was added}, and last answer or error, '
    "whose data is what comes without a stream."
)


def _table(schema: dict[str, Any]) -> str:
    """A schema's fields as an HTML table."""
    needed = schema.get("required", [])
    rows = []
    for name, entry in schema["properties"].items():
        kinds = [kind.get("type", "object") for kind in entry.get("anyOf", [entry])]
        text = html.escape(entry.get("description", ""))
        default = f"; default: {json.dumps(entry['default'])}" if entry.get("default") is not None else ""
        star = "" if name in needed else " (optional)"
        rows.append(f"<tr><td><code>{name}</code>{star}<td>{' or '.join(kinds)}<td>{text}{default}")
    return f"<table>{''.join(rows)}</table>"
