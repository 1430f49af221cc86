"""The plan as Markdown tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict

from smidgen.lab.planning.bases import base_shape
from smidgen.lab.planning.plan import FACE_FLOPS, FIXED, Plan, passes
from smidgen.tasks.cards import table
from smidgen.training.cost import ADAM, CARDS


def to_json(plan: Plan) -> str:
    """Everything of the plan."""
    known = asdict(plan) | {"hours": plan.hours, "fixed": FIXED, "passes_of_pca": _passes(plan)}
    known["cards"] = [asdict(card) for card in CARDS]
    return json.dumps(known, indent=1)


def to_markdown(plan: Plan) -> str:
    """Tables: what was counted, hours, memory, disk; then every assumption."""
    shape, found, chosen = base_shape(plan.base), plan.counted, plan.assumptions
    rows = [("without", found.plain), ("with", found.checkpointed)]
    step = [[how, tera(c.forward), tera(c.training), giga(c.bytes)] for how, c in rows]
    hours = [
        [stage, f"{f:.3g}", *(hour(plan.hours[card.name][stage]) for card in CARDS)] for stage, f in plan.flops.items()
    ]
    total = ["**all**", f"{sum(plan.flops.values()):.3g}"]
    total += [f"**{hour(sum(plan.hours[card.name].values()))}**" for card in CARDS]
    visits = chosen.end_to_end_steps * chosen.end_to_end_people / chosen.people
    cpu = [[stage, f"{f:.3g}", hour(f / chosen.cpu_flops / 3600)] for stage, f in plan.cpu_flops.items()]
    fits = [[what, *(f"{plan.fits[card.name][what]:,}" for card in CARDS)] for what in plan.fits[CARDS[0].name]]
    cards = [card.name for card in CARDS]
    parts = [
        f"### {shape.title}, {shape.pixels} pixels, {chosen.people:,} people",
        f"An adapter has {found.adapter:,} numbers. One row of a training step, counted on the meta device:",
        table(["gradient checkpointing", "forward, TFLOP", "the rest of training, TFLOP", "peak bytes, GB"], step),
        f"GPU hours at {chosen.utilisation:.0%} of the peak (each person is seen {visits:.3g} times end to end):",
        table(["stage", "FLOP", *cards], [*hours, total]),
        f"Processor hours at {chosen.cpu_flops:.3g} FLOP/s (PCA reads the zoo {_passes(plan)} times):",
        table(["stage", "FLOP", "hours"], cpu),
        "What fits on a card:",
        table(["with gradient checkpointing", *cards], fits),
        "Disk, reading, and main memory:",
        table(["what", "GB"], [[k, giga(v)] for k, v in (plan.disk | plan.memory).items()]),
        "Assumed: " + "; ".join(assumptions(plan)) + ".",
    ]
    return "\n\n".join(parts)


def assumptions(plan: Plan) -> Iterable[str]:
    """Every number that was chosen, a phrase each."""
    yield from (f"{name} {value:g}" for name, value in asdict(plan.assumptions).items())
    yield from (f"{name} {value:g}" for name, value in FIXED.items())
    yield from (f"{c.name} {c.peak / 1e12:g} TFLOP/s dense in bf16, {c.single / 1e12:g} in fp32" for c in CARDS)
    yield "LoRA on to_q, to_k, to_v, to_out.0 of the whole UNet, one picture of each person in a step of the zoo"
    yield f"{ADAM} bytes of a card for a trained number (value, gradient, two moments), 4 more for the moving average"
    yield f"face detector and encoder {FACE_FLOPS / 1e9:.1f} GFLOP a picture as published; CLIP ViT-L/14 counted"
    yield "the UNet and text encoders in bf16, the VAE in fp32, fused attention, norms in fp32 as autocast has them"


def tera(value: float) -> str:
    """In units of 10^12."""
    return f"{value / 1e12:.2f}"


def giga(value: float) -> str:
    """In units of 10^9."""
    return f"{value / 1e9:,.2f}"


def hour(value: float) -> str:
    """Hours, with as many digits as mean something."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.2g}" if value >= 0.01 else "< 0.01"


def _passes(plan: Plan) -> int:
    return passes(plan.assumptions, plan.counted.adapter)
