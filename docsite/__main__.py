"""``python -m docsite``: stage, build, check. Ends with status 1 where anything is wrong."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from docsite import ROOT
from docsite.checks import faults
from docsite.navigation import navigation
from docsite.staging import configure, stage


def main(work: Path = ROOT / "build" / "docs") -> int:
    """Build the site into ``work/site``; the number of faults."""
    shutil.rmtree(work, ignore_errors=True)
    stage(work / "pages")
    configure(work, navigation(work / "pages"))
    build = [sys.executable, "-m", "zensical", "build", "--strict", "--clean", "-f", str(work / "mkdocs.yml")]
    done = subprocess.run(
        build, cwd=work, env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}, capture_output=True, text=True
    )
    said = done.stdout + done.stderr
    print(said, end="")
    found = faults(work / "site")
    if done.returncode or "No issues found" not in said or "griffe: " in said:
        found.insert(0, "it was not built without a warning")
    print(*found, f"{len(found)} faults; {work / 'site' / 'index.html'}", sep="\n")
    return len(found)


if __name__ == "__main__":
    sys.exit(bool(main()))
