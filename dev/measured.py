"""The tables of measurements: runs a table's command, keeps what it printed, and writes it into its page.

    python dev/measured.py versions criteria    # run the commands of these entries and renew records and pages
    python dev/measured.py                      # write the pages again from the records; runs nothing

dev/measured.yaml has one entry for each measurement: what it is, the page where it stands, the command, the day of its
last run, what that ran with, and the first Markdown table that the command printed. The page has this table between
`<!-- measured: NAME -->` and `<!-- end -->`. docs/measured.md lists all entries, also those without a table here. A
command that ends with another status than 0 or prints no table changes nothing. Knows nothing about what is measured.
"""

import argparse
import re
import subprocess
import sys
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "dev" / "measured.yaml"
LIST = "measured.md"
TABLE = re.compile(r"^\|.*\|\n\|(?:[ :]*-+[ :]*\|)+\n(?:\|.*\|\n)+", re.M)
BEGIN, END = "<!-- measured: {} -->", "<!-- end -->"


def table_of(printed: str) -> str:
    """The first Markdown table of a text.

    Args:
        printed: what a command printed.

    Returns:
        The table's lines, at least one below the header.

    Raises:
        ValueError: there is none.
    """
    found = TABLE.search(printed.rstrip("\n") + "\n")
    if found is None:
        raise ValueError(f"no Markdown table in what was printed; its end: {printed[-300:]!r}")
    return found[0].rstrip("\n")


def run(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """An entry as its command finds it today.

    Args:
        name: of the entry.
        entry: of dev/measured.yaml, with a table.

    Returns:
        The entry with another table, today's date and the installed versions.

    Raises:
        ValueError: the entry has no table, or the command fails or prints none.
    """
    if "table" not in entry:
        raise ValueError(
            f"{name!r} has no table of its own: run `{entry['command']}` and renew {entry['page']} by hand."
        )
    print(f"$ {entry['command']}", flush=True)
    command = subprocess.Popen(entry["command"], shell=True, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    lines = []
    assert command.stdout is not None
    for line in command.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if command.wait():
        raise ValueError(f"{name!r}: the command ended with status {command.returncode}; nothing was recorded.")
    used = ", ".join(f"{package} {metadata.version(package).split('+')[0]}" for package in ("transformers", "torch"))
    return {**entry, "day": date.today(), "with": used, "table": table_of("".join(lines))}


def body(entry: dict[str, Any]) -> str:
    """What stands in the page: the day, what it ran with where that was kept, and the table."""
    used = f", {entry['with']}" if "with" in entry else ""
    return f"{entry['day']}{used}:\n\n{entry['table'].rstrip()}"


def listed(records: dict[str, dict[str, Any]]) -> str:
    """The list of all entries."""
    lines = ["| what | command | last run |", "|---|---|---|"]
    lines += [
        f"| [{each['what']}]({each['page']}) | `{each['command']}` | {each['day']} |" for each in records.values()
    ]
    return "\n".join(lines)


def filled(text: str, name: str, content: str, page: str) -> str:
    """A page's text with other content between the marks of a name.

    Args:
        text: of the page.
        name: in the mark.
        content: Markdown.
        page: its file, for the error.

    Returns:
        The text.

    Raises:
        ValueError: the page does not have the mark exactly once, or not its end.
    """
    begin = BEGIN.format(name)
    before, *rest = text.split(begin)
    if len(rest) != 1 or END not in rest[0]:
        raise ValueError(f"{page} must have one {begin!r} with {END!r} below it.")
    return f"{before}{begin}\n{content}\n\n{END}{rest[0].split(END, 1)[1]}"


def pages(records: dict[str, dict[str, Any]]) -> dict[Path, str]:
    """Each page that has a table, with the text that the records give it."""
    contents = [
        (entry["page"].partition("#")[0], name, body(entry)) for name, entry in records.items() if "table" in entry
    ]
    texts: dict[Path, str] = {}
    for page, name, content in [*contents, (LIST, "list", listed(records))]:
        path = (ROOT / "docs" / page).resolve()
        text = texts.get(path) or path.read_text(encoding="utf-8")
        texts[path] = filled(text, name, content, page)
    return texts


def read() -> dict[str, dict[str, Any]]:
    """The entries of dev/measured.yaml, by name, in the order of the list."""
    return yaml.safe_load(RECORDS.read_text(encoding="utf-8"))


class _Dumper(yaml.SafeDumper):
    """Tables as blocks of lines, and each day written out."""

    def ignore_aliases(self, data: Any) -> bool:
        """Whether a value that occurs again is written again."""
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)


def write(records: dict[str, dict[str, Any]]) -> None:
    """Write dev/measured.yaml."""
    head = "# Written by dev/measured.py. Add an entry by hand, with the table `|a|` until its command was run.\n"
    content = yaml.dump(records, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)
    RECORDS.write_text(head + content, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Renew what was asked for, and write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="entries whose commands are run")
    args = parser.parse_args(argv)
    records = read()
    unknown = [name for name in args.names if name not in records]
    if unknown:
        parser.error(f"no entry {', '.join(unknown)} in {RECORDS.name}; it has {', '.join(records)}.")
    for name in args.names:
        try:
            records[name] = run(name, records[name])
        except ValueError as error:
            sys.exit(str(error))
        write(records)
    for path, text in pages(records).items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
