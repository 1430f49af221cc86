"""The command that says what a run would need: ``plan personalize``, with the flags of the run."""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from smidgen.cli.build import Section


def personalize(
    data: Path | None = None,
    /,
    *,
    settings: Annotated[Any, Section("tasks.personalize.settings:PersonalizeConfig", "tasks.personalize.settings")],
    memory: str | None = None,
    json: bool = False,
) -> None:
    """Say what `smidgen personalize` with the same flags would need: parameters, coverage, memory, disk, seconds a step.

    --base may also be a published base: flux2-dev, flux2-klein-4b, flux2-klein-9b, z-image, qwen-image, sd3.5-medium,
    sd3.5-large, chroma, krea2, wan2.1-14b, wan2.1-1.3b, sdxl or sd15. No weights are read, but for a small base that is here.

    Args:
        data: the folder of pictures, for their number alone.
        settings: all that can be set of the run.
        memory: what there is, such as 12GB; the nearest settings that fit are said, and the preset of a published base.
        json: print everything as JSON.
    """
    from smidgen.tasks.personalize.plan import fitting, make_plan
    from smidgen.tasks.personalize.plan_text import parse_memory, to_json, to_markdown
    from smidgen.tasks.personalize.presets import for_memory

    room = None if memory is None else parse_memory(memory)
    if data is not None:
        settings = replace(settings, data=replace(settings.data, folder=data))
    plan = make_plan(settings)
    fits = None
    if room is not None:
        fits = settings if plan.peak <= room else fitting(settings, room - (plan.process or 0.0), plan.card)
    preset = None if room is None else for_memory(settings, room / 1e9)
    print((to_json if json else to_markdown)(plan, room, fits, preset))
