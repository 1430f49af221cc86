"""How a zoo stands: what is done, rejected and missing, how large it is, how long an adapter takes."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from smidgen.difflora.zoo.queue import Queue
from smidgen.difflora.zoo.store import Zoo
from smidgen.difflora.zoo.subjects import TABLE, read_subjects


@dataclass(frozen=True)
class Status:
    """Figures of a zoo; scores are means over kept adapters, None when nobody judged."""

    folder: Path
    done: int
    kept: int
    rejected: dict[str, str]
    missing: int
    working: int
    by_split: dict[str, int]
    numbers: int
    bytes: int
    seconds_per_adapter: float | None
    identity: float | None
    base_identity: float | None

    def __str__(self) -> str:
        lines = [
            f"{self.folder}: {self.kept} adapters of {self.numbers:,} numbers kept ("
            + ", ".join(f"{count} {split}" for split, count in sorted(self.by_split.items()))
            + f"), {len(self.rejected)} rejected, {self.missing} missing"
            + (f", {self.working} groups in work" if self.working else "")
        ]
        size = f"  {self.bytes:,} bytes"
        if self.seconds_per_adapter is not None:
            size += f", {self.seconds_per_adapter:.2f} s an adapter in its group"
        lines.append(size)
        if self.identity is not None and self.base_identity is not None:
            lines.append(f"  identity {self.identity:.3f}, the base {self.base_identity:.3f}")
        lines += [f"  rejected {name}: {reason}" for name, reason in sorted(self.rejected.items())[:10]]
        return "\n".join(lines)


def status(folder: Path) -> Status:
    """The figures of the zoo in ``folder``; DataError when there is none."""
    zoo = Zoo(folder)
    lines = [line for line in zoo.records() if line.last]
    kept = [line for line in lines if line.state == "kept"]
    wanted = {s.id for s in read_subjects(zoo.folder)} if (zoo.folder / TABLE).exists() else {line.id for line in lines}
    sizes = [p.stat().st_size for name in ("shards", "manifest") for p in (zoo.folder / name).glob("[0-9]*")]
    members = Counter(line.group for line in lines)
    times = {
        int(path.stem): json.loads(path.read_text())["seconds"] for path in (zoo.folder / "seconds").glob("[0-9]*")
    }
    judged = [line for line in kept if line.identity is not None and line.base_identity is not None]
    return Status(
        folder=zoo.folder,
        done=len(lines),
        kept=len(kept),
        rejected={line.id: line.reason for line in lines if line.state != "kept"},
        missing=len(wanted - {line.id for line in lines}),
        working=len(Queue(zoo.folder / "locks").busy()) if (zoo.folder / "locks").is_dir() else 0,
        by_split=dict(Counter(line.split for line in kept)),
        numbers=zoo.layout.size,
        bytes=sum(sizes),
        seconds_per_adapter=median(s / members[g] for g, s in times.items() if members[g]) if times else None,
        identity=sum(line.identity or 0 for line in judged) / len(judged) if judged else None,
        base_identity=sum(line.base_identity or 0 for line in judged) / len(judged) if judged else None,
    )
