"""The documentation site: docs/ as it lies in the repository, and the pages that are made from the program itself.

``make docs`` stages all of it in build/docs, has Zensical build it strictly, and checks what came out.

* navigation.py  which page stands where; staging.py: pages are copied, their ``<!-- build: ... -->`` marks filled
* commands.py    a page for each command, from its own ``--help``
* api.py         a page for each package, from its docstrings; docstrings.py: how these are read
* members.py     what a method's page says of formula, options and rates; measured.py: tables from benchmarks/results
* claims.py     docs/claims.md, which lies in the repository: the papers' claims beside our figures, from claims.toml
* text.py        prose that is not to become markup
* checks.py      links, anchors, requests, tags and figures of the finished pages
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
