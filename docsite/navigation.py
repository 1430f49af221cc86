"""Which page stands where. A folder's name stands for all its pages; a page that is in no section is an error, as is a name
without a page."""

from pathlib import Path
from typing import Any

from smidgen.errors import SmidgenError

LATER = ("serving.md",)  # pages that have a place here before they are written

SECTIONS: dict[str, list[str]] = {
    "Start": ["index.md", "tutorial.md", "install.md", "afternoon.md"],
    "How to": [
        "personalize.md",
        "flux2.md",
        "sdxl.md",
        "chat.md",
        "train.md",
        "control.md",
        "difflora_generator.md",
        "difflora_zoo.md",
        "difflora_sdxl.md",
        "serving.md",
        "ui.md",
        "export.md",
        "extract.md",
        "plan.md",
        "budget.md",
        "compare.md",
        "multi_gpu.md",
        "new_method.md",
        "new_base.md",
    ],
    "Methods": ["methods.md", "methods/"],
    "How it works": [
        "architecture.md",
        "files.md",
        "verify.md",
        "bank.md",
        "flow_bases.md",
        "embedded_base.md",
        "embedded_world.md",
        "packaged.md",
    ],
    "Measured": [
        "claims.md",
        "comparisons.md",
        "counts.md",
        "coverage.md",
        "speed.md",
        "ring_init.md",
        "difflora_audit.md",
        "results/",
    ],
    "Command line": ["cli.md", "commands/"],
    "API": ["api/"],
    "Decisions": ["decisions/"],
    "Changelog": ["changelog.md"],
}


def navigation(pages: Path) -> list[dict[str, Any]]:
    """The sections with what lies in ``pages``.

    Raises:
        SmidgenError: a name without a page, or a page without a place.
    """
    named: list[str] = []
    found = []
    for title, names in SECTIONS.items():
        inside: list[str] = []
        for name in names:
            if name.endswith("/"):
                inside += _inside(pages, name)
            elif name not in LATER or (pages / name).exists():
                inside.append(name)
        named += inside
        found.append({title: inside[0] if inside == ["changelog.md"] else inside})
    there = {str(path.relative_to(pages)) for path in pages.rglob("*.md")}
    if lacking := sorted(set(named) - there):
        raise SmidgenError(
            f"The navigation (docsite/navigation.py) names pages that are not there: {', '.join(lacking)}."
        )
    if lost := sorted(there - set(named)):
        raise SmidgenError(f"Pages without a place in the navigation (docsite/navigation.py): {', '.join(lost)}.")
    return found


def _inside(pages: Path, folder: str) -> list[str]:
    """The pages of a folder, an index first; METHODS keep the order of their table."""
    found = sorted(pages.joinpath(folder).glob("*.md"), key=lambda path: (path.stem != "index", path.stem))
    if folder == "methods/":
        from smidgen.adapters.methods import known_methods

        order = [m.name for m in known_methods()]
        found.sort(key=lambda path: order.index(path.stem))
    return [str(path.relative_to(pages)) for path in found]
