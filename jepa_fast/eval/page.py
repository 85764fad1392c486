"""The page of a run: one index.html beside its pictures, readable offline and on a phone, without scripts."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from .table import Table

_CSS = """
:root { color-scheme: light; --ink: #1f2328; --muted: #656d76; --line: #d8dee4; --paper: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.25rem 4rem; color: var(--ink); background: #fff;
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { margin: 0 0 1.5rem; font-size: 1.7rem; line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin: 2.5rem 0 .75rem; font-size: 1.15rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .4rem 1.25rem .4rem 0; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
thead th { color: var(--muted); font-weight: 600; font-size: .875rem; }
tbody th { font-weight: 400; }
figure { margin: 0 0 2rem; }
img { display: block; max-width: 100%; height: auto; border: 1px solid var(--line); border-radius: 6px; }
figcaption { margin-top: .5rem; color: var(--muted); font-size: .925rem; }
pre { margin: 0; padding: 1rem; overflow-x: auto; background: var(--paper); border-radius: 6px;
      font: .84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1.5rem; margin: 0; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
"""


def write_page(run_dir: Path | str, title: str, recipe_yaml: str, tables: Sequence[Table],
               pictures: Sequence[tuple[str, str]], *, versions: Mapping[str, str] | None = None) -> Path:
    """Write run_dir/index.html: tables, pictures as (file name under run_dir, caption), recipe, versions; its path.

    `versions` is what made the run, such as {"commit": ..., "torch": ..., "device": ...}. All text is escaped; links
    are relative, so the folder can be moved or served. A page already there is replaced in one step. Raises ValueError
    for a picture that is not a file under run_dir.
    """
    run_dir = Path(run_dir)
    body = [f"<h1>{escape(title)}</h1>", *map(_table, tables)]
    if pictures:
        body += ["<h2>Pictures</h2>", *(_picture(run_dir, name, caption) for name, caption in pictures)]
    body += ["<h2>Recipe</h2>", f"<pre>{escape(recipe_yaml)}</pre>"]
    if versions:
        facts = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in versions.items())
        body += ["<h2>Versions</h2>", f"<dl>\n{facts}\n</dl>"]
    page = "\n".join(["<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
                      '<meta name="viewport" content="width=device-width, initial-scale=1">',
                      f"<title>{escape(title)}</title>", f"<style>{_CSS}</style>", "</head>", "<body>", *body,
                      "</body>", "</html>", ""])
    path, unfinished = run_dir / "index.html", run_dir / "index.html.tmp"
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in table.header)
    rows = "\n".join(f'<tr><th scope="row">{escape(row[0])}</th>' +
                     "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>" for row in table.rows)
    return (f'<h2>{escape(table.title)}</h2>\n<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{rows}\n</tbody>\n</table></div>")


def _picture(run_dir: Path, name: str, caption: str) -> str:
    path = run_dir / name
    if not path.is_file() or not path.resolve().is_relative_to(run_dir.resolve()):
        raise ValueError(f"pictures must be files under {run_dir}, got {name!r}")
    link = quote(Path(name).as_posix())
    return (f'<figure><a href="{link}"><img src="{link}" alt="{escape(caption)}"></a>'
            f"<figcaption>{escape(caption)}</figcaption></figure>")
