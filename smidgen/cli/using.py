"""Commands that use adapters and draw subjects."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from smidgen.errors import SmidgenError


def generate(
    adapters: list[Path],
    /,
    prompt: list[str],
    weights: str | None = None,
    base: str | None = None,
    base_config: str | None = None,
    out: Path = Path("generated"),
    num_images: int = 1,
    seed: int = 0,
    steps: int | None = None,
    guidance: float | None = None,
    strength: float = 1.0,
    negative_prompt: str = "",
    control: Path | None = None,
    edges_of: Path | None = None,
    control_scale: float = 1.0,
    mixed_precision: Literal["no", "fp16", "bf16"] = "no",
    overwrite: bool = False,
) -> None:
    """Draw pictures with ADAPTERS, folders that personalize, predict or train control wrote; several add up.

    Args:
        adapters: one folder, or several of one base.
        prompt: one or more prompts.
        weights: one number for each adapter, such as 0.7,0.5 (none: all of each).
        base: another place of the base (none: as the adapter's folder says).
        base_config: of a base in one file, folder or hub name of a pipeline of the same model.
        out: a folder, not one to train on, or a .png for a single picture.
        num_images: pictures for each prompt, with seeds seed, seed + 1, ...
        seed: fixes the noise.
        steps: denoising steps (default: as the base needs).
        guidance: classifier-free guidance (default: as the base needs).
        strength: 0 is the base, 1 the adapter, more exaggerates.
        negative_prompt: what to keep away from.
        control: the control picture to follow, for an adapter that was trained with one.
        edges_of: a picture whose edges are the control picture, for a canny adapter.
        control_scale: 0 leaves the control out, more than 1 exaggerates.
        mixed_precision: precision of the base's weights.
        overwrite: draw over pictures of the same name.
    """
    from smidgen.tasks.drawing import generate as run

    values = {name: value for name, value in locals().items() if name != "run"}
    values |= {"adapter": values.pop("adapters"), "weights": None if weights is None else _numbers(weights)}
    for path in run(**values):
        print(path)


def verify(adapter: Path, /, base: str | None = None, base_config: str | None = None) -> None:
    """Prove that ADAPTER is on in its base: its file, the base lock, and a forward pass. Prints the verdict ON, OFF or
    NOT PROVEN; the exit status is 2 unless it is ON.

    Args:
        adapter: the adapter's folder.
        base: another base: a packaged name, a folder, a hub name, or one .safetensors file (none: as the adapter's folder says).
        base_config: of a base in one file, folder or hub name of a pipeline of the same model.
    """
    from smidgen.tasks.drawing import verify as run

    ok, text = run(adapter, base, base_config)
    print(text)
    if not ok:
        raise SmidgenError(f"{adapter} does not verify on {base or 'its base'}.")


def classify(
    adapter: Path,
    given: list[str],
    /,
    out: Path | None = None,
    base: str | None = None,
    text_column: str | None = None,
    text_pair_column: str | None = None,
    batch_size: int = 64,
    logits: bool = False,
    overwrite: bool = False,
) -> None:
    """Classify with ADAPTER, a folder that train text-classification or image-classification wrote: texts, tables of texts,
    images, folders of images. Prints the predictions with their probabilities, or writes them.

    Args:
        adapter: the adapter's folder.
        given: texts as they are, tables (csv, tsv, jsonl, json, parquet), images, or folders of images.
        out: a .csv or .jsonl file (none: printed, as the tables are).
        base: another place of the base (none: as the adapter's folder says).
        text_column: of the tables (none: as in training).
        text_pair_column: of the tables (none: as in training).
        batch_size: how many are read at once.
        logits: say the logits too.
        overwrite: write over a file that is there.
    """
    from smidgen.tasks.classifying import classify as run

    for line in run(**{name: value for name, value in locals().items() if name != "run"}):
        print(line)


def chat(
    adapter: Path,
    /,
    prompt: list[str] | None = None,
    system: str | None = None,
    base: str | None = None,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> None:
    """Talk to the language model that ADAPTER was trained on by train instruction. Answers appear as they are made; /reset
    forgets what was said, Ctrl-C stops an answer, Ctrl-D ends. What a pipe says is answered line by line.

    Args:
        adapter: the adapter's folder.
        prompt: say this and end; several are turns of one conversation.
        system: what the conversation begins with.
        base: another place of the base (none: as the adapter's folder says).
        max_new_tokens: the longest answer.
        temperature: 0 says the likeliest; more draws answers.
        top_p: draw from the likeliest tokens that have this share together.
        seed: fixes what is drawn.
    """
    from smidgen.tasks.chatting import Chat, talk

    talk(Chat(adapter, base, system, max_new_tokens, temperature, top_p, seed), prompt)


def merge(adapter: Path, /, out: Path, base: str | None = None, overwrite: bool = False) -> None:
    """Write ADAPTER and its base as one plain transformers or diffusers model, which needs nothing of Smidgen any more.

    Args:
        adapter: the adapter's folder.
        out: the model's folder.
        base: another place of the base (none: as the adapter's folder says).
        overwrite: write over files that are there.
    """
    from smidgen.tasks.exporting import export_folder as run

    print(run(adapter, "merged", out, base, overwrite=overwrite)[1])


def export(
    adapter: Path,
    /,
    to: Literal["peft", "diffusers", "kohya", "gguf", "mlx", "peft-oft", "peft-ia3", "full-diff", "merged"],
    out: Path,
    base: str | None = None,
    strength: float = 1.0,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
    rank: int | str | None = None,
    max_error: float | None = None,
    max_loss: float | None = None,
    calibration: str | None = None,
    allow_loss: bool = False,
    overwrite: bool = False,
) -> None:
    """Write ADAPTER for other programs, and read it back by their rules. What is no LoRA is cut to one, and what that loses is
    measured and said.

    Args:
        adapter: the adapter's folder.
        to: peft: a folder of a peft LoRA; diffusers: pytorch_lora_weights.safetensors; kohya: for ComfyUI and A1111; gguf: for
            llama.cpp; mlx: for mlx-lm; peft-oft: of the method oft; peft-ia3: of ia3 and diagonal; full-diff: whole
            differences, for ComfyUI and LyCORIS; merged: the model with the adapter in it.
        out: a folder, or the name of a .safetensors (.gguf) file where the format is one file.
        base: another place of the base (none: as the adapter's folder says).
        strength: what the adapter is multiplied with in the file.
        dtype: number format of a merged model.
        rank: of what has to be cut to a LoRA: a number, or auto, the least that loses no more than max_loss (default: auto).
        max_error: in place of a rank, what each layer may lose, a share.
        max_loss: of rank auto, what the whole may lose (default: 0.05).
        calibration: what decides which directions are kept: data such as it was trained on, a folder of pictures, or none (default: what it
            was trained on, or what the base draws with it).
        allow_loss: write it although more than 15 % of the adapter is lost, by the cut or by rounding a merged model.
        overwrite: write over what is in OUT.
    """
    from smidgen.tasks.exporting import Cut
    from smidgen.tasks.exporting import export_folder as run

    if isinstance(rank, str) and rank.isdigit():
        rank = int(rank)
    print(
        run(
            adapter, to, out, base, strength, dtype, allow_loss, overwrite, Cut(rank, max_error, max_loss, calibration)
        )[1]
    )


def combine(
    adapters: list[Path],
    /,
    out: Path,
    weights: str | None = None,
    by: Literal["sum", "ties", "dare_linear", "dare_ties", "magnitude_prune"] = "sum",
    density: float = 0.5,
    seed: int = 0,
    average_heads: bool = False,
    overwrite: bool = False,
) -> None:
    """Write the weighted sum of ADAPTERS as one adapter: svfit, loldu, seeded, lora and diagonal ones of one base. It does
    exactly what they do together; what has no exact sum is refused. No base is needed.

    Args:
        adapters: two or more folders.
        out: folder of the new adapter.
        weights: one number for each, such as 0.5,0.5 (none: their mean).
        by: sum, or one of peft's merges of updates that disagree, on the trained vectors, or on lora's products.
        density: share of the numbers that these keep of each adapter.
        seed: which ones, where that is drawn (dare).
        average_heads: average trained heads that differ, which is no sum.
        overwrite: write over an adapter that is there.
    """
    from smidgen.adapters.combine import combine as run
    from smidgen.tasks.drawing import inspect as told

    _check_free(out, overwrite)
    numbers = None if weights is None else _numbers(weights)
    options = {"by": by, "density": density, "seed": seed, "average_heads": average_heads}
    print(told(run(adapters, numbers, out=out, **options)))  # type: ignore[arg-type]


def extract(
    base: str,
    finetuned: str,
    /,
    out: Path | None = None,
    methods: str = "",
    least_explained: float = 0.5,
    data: Path | None = None,
    distill: Path | None = None,
    distill_steps: int = 200,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Make an adapter of what FINETUNED has changed in BASE. A change that an adapter made is recovered to rounding; of a real
    fine-tune every family's share is told, and the smallest file that holds enough is written, or none (status 2).

    Args:
        base: a transformers folder, a pipeline folder, a safetensors file, or a packaged name.
        finetuned: the same, tuned; also a file that export --to full-diff wrote.
        out: folder of the adapter (none: only look).
        methods: families with commas between them, such as svfit,lora:16,oft (none: all).
        least_explained: share of the squared change from which on a file is worth writing.
        data: a table with a column text, and label for a score: what the adapter keeps of the tuned model's answers.
        distill: a table with a column text: train the adapter on it to answer as the tuned model.
        distill_steps: optimizer steps of that.
        seed: of an adapter whose directions follow from it (seeded).
        overwrite: write over an adapter that is there.
    """
    from smidgen.tasks.extraction import extract as run
    from smidgen.tasks.extraction import told

    if out is not None:
        _check_free(out, overwrite)
    chosen = tuple(method.strip() for method in methods.split(",") if method.strip())
    options: dict[str, Any] = {"data": data, "distill": distill, "distill_steps": distill_steps, "seed": seed}
    with _bar("extract") as options["progress"]:
        found = run(base, finetuned, out, methods=chosen, least=least_explained, **options)
    print(told(found, least_explained))
    if out is not None and not any(one.chosen for one in found.values()):
        raise SmidgenError(f"No family holds enough of the change, so nothing was written to {out}.")


def resize(
    adapter: Path,
    /,
    out: Path,
    rank: int | None = None,
    energy: float | None = None,
    overwrite: bool = False,
) -> None:
    """Write ADAPTER, a lora, svfit or loldu one, with another rank, and say what that loses. No base is needed.

    Args:
        adapter: the adapter's folder.
        out: folder of the new adapter.
        rank: the rank of every layer; more than now leaves room to train.
        energy: instead, the least rank of each layer that holds this share of its squared update.
        overwrite: write over an adapter that is there.
    """
    from smidgen.adapters.resize import resize as run

    _check_free(out, overwrite)
    print(run(adapter, out=out, rank=rank, energy=energy))


@contextmanager
def _bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar, gone at its end, for a function that is told how many are done of how many; it may count anew."""
    from tqdm.auto import tqdm

    with tqdm(desc=what, delay=0.5, leave=False, dynamic_ncols=True) as bar:

        def show(at: int, of: int) -> None:
            if at <= bar.n or of != bar.total:
                bar.reset(of)
            bar.update(at - bar.n)

        yield show


def _check_free(out: Path, overwrite: bool) -> None:
    if (out / "adapter_config.json").exists() and not overwrite:
        raise SmidgenError(f"{out} holds an adapter already; choose another --out, or write over it with --overwrite.")


def inspect(adapter: Path, /, plot: Path | None = None) -> None:
    """Say what ADAPTER holds: method, settings, bytes, the base it is locked to, each layer's norm, and what it is exported
    to without loss; also of LoRA files of peft, diffusers, kohya, llama.cpp and mlx-lm. Of a picture that Smidgen drew, say
    how: prompt, seed, adapter, base and versions.

    Args:
        adapter: the adapter's folder, a LoRA's safetensors file, or a PNG.
        plot: a PNG to draw each layer's norm into.
    """
    from smidgen.tasks.drawing import inspect as run

    print(run(adapter, plot))


def pairs(
    folder: Path,
    /,
    control: Literal["canny", "segmentation", "landmarks"] = "segmentation",
    seed: int = 0,
    num_pictures: int = 1000,
) -> None:
    """Draw people of the embedded base's world in many poses into FOLDER, with control pictures, to train control with.

    Args:
        folder: where the pictures, the folder control and metadata.jsonl go.
        control: what the control pictures show.
        seed: which people, scenes and poses.
        num_pictures: how many; the last tenth are people the base has never seen.
    """
    from smidgen.tasks.control.pairs import write_pairs as run

    print(run(folder, control, num_pictures, seed))


def subject(
    folder: Path, /, seed: int = 0, num_pictures: int = 12, world: Literal["embedded", "wide"] = "embedded"
) -> None:
    """Draw a person the embedded bases have never seen into FOLDER: pictures and captions to personalize with.

    Args:
        folder: where the pictures and metadata.jsonl go.
        seed: which person, and which scenes.
        num_pictures: how many pictures.
        world: that of the embedded bases, or the wide one, which the base embedded-wide knows.
    """
    from smidgen.tasks.drawing import draw_subject as run

    print(run(folder, seed, num_pictures, world))


def _numbers(weights: str) -> list[float]:
    try:
        return [float(number) for number in weights.split(",")]
    except ValueError as error:
        raise SmidgenError(
            f"--weights takes numbers with commas between them, such as 0.5,0.5; got {weights!r}."
        ) from error
