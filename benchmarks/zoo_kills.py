"""A zoo build that is killed again and again: is anything lost, made twice or changed?

    python -m benchmarks.zoo_kills --out work/zoo                 # the default zoo, ten SIGKILLs on the way
    python -m benchmarks.zoo_kills --people 1000 --steps 4 --whole  # a short zoo, compared with an unkilled build of all of it

The build is ``smidgen zoo build`` as a user runs it. Afterwards groups are built once more by a process that nobody
kills, and their shards and manifests are compared byte for byte: ``--check`` of them, or all with ``--whole``.
"""

from __future__ import annotations

import argparse
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from benchmarks._harness import write_result
from smidgen.difflora.zoo.build import build, job_of
from smidgen.difflora.zoo.group import build_group
from smidgen.difflora.zoo.settings import ZooConfig
from smidgen.difflora.zoo.store import Zoo
from smidgen.difflora.zoo.subjects import read_subjects
from smidgen.training.settings import from_dict


def killed_build(command: list[str], kills: int, pauses: tuple[float, float], rng: random.Random) -> list[float]:
    """Runs ``command``, kills it ``kills`` times after random pauses, then lets it finish; seconds of each start."""
    lived = []
    for number in range(kills + 1):
        started = time.time()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            code = process.wait(None if number == kills else rng.uniform(*pauses))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            code = process.wait()
        lived.append(round(time.time() - started, 1))
        print(f"start {number + 1}: exit status {code} after {lived[-1]} s", flush=True)
        if code == 0 and number < kills:
            print("It finished before all kills were used; lower --pause.", flush=True)
            break
        if code not in (0, -signal.SIGKILL):
            raise SystemExit(f"The build ended with status {code}.")
    return lived


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=Path("work/zoo"))
    parser.add_argument("--people", type=int, default=1000)
    parser.add_argument("--held-out", type=int, default=100)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--pause", type=float, nargs=2, default=(20.0, 120.0))
    parser.add_argument("--check", type=int, default=4)
    parser.add_argument("--whole", action="store_true")
    parser.add_argument("--workers", type=int, default=1)
    given = parser.parse_args()
    rng = random.Random(0)

    options = ["--people", str(given.people), "--held-out", str(given.held_out), "--workers", str(given.workers)]
    options += ["--max-train-steps", str(given.steps)] if given.steps else []
    command = [sys.executable, "-m", "smidgen.cli", "zoo", "build", "--out", str(given.out), *options]
    lived = killed_build(command, given.kills, tuple(given.pause), rng)

    zoo = Zoo(given.out)
    config = from_dict(ZooConfig, zoo.settings | {"out": given.out})
    people = read_subjects(given.out)
    records = zoo.records()  # raises when an adapter is there twice
    missing = sorted({person.id for person in people} - {record.id for record in records})
    rows = zoo.verify()
    figures = {
        "people": len(people), "kills": len(lived) - 1, "rows": rows, "missing": len(missing),
        "kept": sum(record.state == "kept" for record in records), "seconds": round(sum(lived), 1),
    }  # fmt: skip
    print(f"digest {zoo.digest()}", flush=True)
    if given.whole:
        with tempfile.TemporaryDirectory() as folder:
            started = time.time()
            build(replace(config, out=Path(folder)), workers=given.workers)
            figures["unkilled_seconds"] = round(time.time() - started, 1)
            figures["same_bytes"] = int(zoo.digest() == Zoo(folder).digest())
    else:
        groups = rng.sample(zoo.groups(), given.check)
        made = [build_group(job_of(config, zoo, people, group, keep_work=False)) for group in groups]
        same = [
            zoo.shard_path(g.group).read_bytes() == g.shard and zoo.manifest_path(g.group).read_bytes() == g.manifest
            for g in made
        ]
        figures |= {"groups_checked": len(groups), "same_bytes": int(all(same))}
    print(figures, flush=True)
    write_result("zoo_kills", figures, "python -m benchmarks.zoo_kills " + " ".join(sys.argv[1:]))
    if missing or not figures["same_bytes"]:
        raise SystemExit("Something was lost or changed.")


if __name__ == "__main__":
    main()
