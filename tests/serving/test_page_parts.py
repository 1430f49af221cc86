"""What the page says of pictures and tables, what it makes of settings, and how it shows them; without a browser."""

import io
import shutil
import zipfile
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'smidgen[ui]'")

from smidgen.difflora.use.folders import read_recipe
from smidgen.errors import ConfigError, DataError
from smidgen.serving.page import html, making, pictures, runs, texts
from smidgen.serving.page.making import Wanted

# ---- pictures


def picture(path, size=(64, 64), seed=0):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3)).astype("uint8")
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize("name, content, verdict, words", [
    ("ok.png", lambda p: picture(p), "good", "64 x 64 pixels."),
    ("tiny.png", lambda p: picture(p, (8, 8)), "bad", "Left out: 8x8 is smaller than 16 pixels."),
    ("small.png", lambda p: picture(p, (40, 50)), "note", "40 x 50 pixels, fewer than the base's 64"),
    ("wide.png", lambda p: picture(p, (640, 80)), "note", "keeps 12%"),
    ("broken.png", lambda p: p.write_bytes(b"no picture"), "bad", "Left out: it is no picture that can be read."),
    ("empty.jpg", lambda p: p.write_bytes(b""), "bad", "Left out: it is empty."),
    ("raw.nef", lambda p: p.write_bytes(b"x"), "bad", "a camera's raw file"),
    ("flat.png", lambda p: Image.new("RGB", (64, 64), "red").save(p), "bad", "one colour throughout"),
    ("clear.png", lambda p: Image.new("RGBA", (64, 64), (0, 0, 0, 0)).save(p), "bad", "transparent throughout"),
    ("grey.png", lambda p: Image.open(picture(p)).convert("L").save(p), "note", "No colour in it"),
    ("ok.txt", lambda p: p.write_text("a portrait"), "text", "Words about the pictures"),
])  # fmt: skip
def test_what_is_found_of_a_file(tmp_path, name, content, verdict, words):
    content(tmp_path / name)
    (found,) = pictures.look([tmp_path / name], 64)
    assert (found.verdict, found.used) == (verdict, verdict in ("good", "note")) and words in found.words


def test_copies_are_left_out_and_counted(tmp_path):
    paths = [picture(tmp_path / "a.png"), picture(tmp_path / "b.png"), picture(tmp_path / "c.png", seed=1)]
    found = pictures.look(paths)
    assert [one.used for one in found] == [True, False, True] and found[1].words == "Left out: a copy of a.png."
    verdict, words = pictures.summary(found)
    assert verdict == "note" and words.startswith("2 pictures: enough to predict") and "1 left out" in words
    kept = pictures.keep(found, tmp_path / "kept")
    assert [path.name for path in kept] == ["a.png", "c.png"] and not (tmp_path / "kept" / "b.png").exists()


def test_files_of_one_name_from_two_folders(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    paths = [picture(tmp_path / "one" / "a.png"), picture(tmp_path / "two" / "a.png", seed=1)]
    kept = pictures.keep(pictures.look(paths), tmp_path / "kept")
    assert len(kept) == 2 and len({path.read_bytes() for path in kept}) == 2


# ---- settings


def test_a_training_is_the_command_lines_own(tmp_path):
    config = Wanted("Ann", "dog", "ohwx", "lora", 100, prompts=("a dog",)).config()
    assert (config.data.class_word, config.data.placeholder_token, config.adapter.method) == ("dog", "ohwx", "lora")
    assert (config.train.max_train_steps, config.train.preview_steps) == (100, 20)
    assert config.data.instance_prompt == "a portrait of a dog" and config.show.compare_lora is False


@pytest.mark.parametrize("wanted, words", [
    (Wanted("Ann", method="nope"), "nope"),
    (Wanted("Ann", steps=0), "max_train_steps must be at least 1"),
    (Wanted("Ann", base="/no/base"), "There is no base '/no/base'"),
    (Wanted("Ann", kind="dog", word="sks"), "do not hold the class word"),
    (Wanted("!!"), "Give it a name first"),
])  # fmt: skip
def test_refused_before_anything_is_started(tmp_path, wanted, words):
    found = pictures.look([picture(tmp_path / "a.png")])
    (tmp_path / "a.txt").write_text("a cat")
    found += pictures.look([tmp_path / "a.txt"])
    with pytest.raises((ConfigError, DataError), match=words):
        making.train(tmp_path / "runs", wanted, found)
    assert not any((tmp_path / "runs").iterdir()) if (tmp_path / "runs").is_dir() else True


def test_nothing_to_work_with(tmp_path):
    with pytest.raises(ConfigError, match="Drop pictures first"):
        making.train(tmp_path, Wanted("Ann"), [])
    with pytest.raises(ConfigError, match="Drop a picture first"):
        making.predict(tmp_path, "Ann", [])
    with pytest.raises(ConfigError, match="Say what to draw"):
        making.check_prompts(["", " "])
    with pytest.raises(ConfigError, match="20 pictures at once are too many"):
        making.check_prompts(["a"] * 5, 4)
    with pytest.raises(ConfigError, match="Nothing is to change"):
        making.edit(None, tmp_path, {"skin=dark": 0.0})
    with pytest.raises(ConfigError, match="nothing to keep"):
        making.keep_try(tmp_path, None, "edit", "Ann", "")
    assert list(tmp_path.iterdir()) == []


# ---- a person, from a picture to files of other programs


@pytest.fixture(scope="module")
def ann(tmp_path_factory):
    """A predicted person, and the folder of runs she is in."""
    from smidgen.tasks.drawing import draw_subject

    folder = tmp_path_factory.mktemp("page")
    draw_subject(folder / "ann", 7, 2)
    found = pictures.look(sorted((folder / "ann").glob("*.png")), 64)
    run, _ = making.predict(folder / "runs", "Ann", found[:1])
    return folder / "runs", run


def test_a_prediction_is_a_run(ann):
    folder, run = ann
    assert run.finished and run.status().state == runs.DONE and run.about == "from one picture"
    assert [one.name for one in making.drawable(folder)] == [one.name for one in making.people(folder)] == ["ann"]


def test_a_person_of_the_wide_world_is_predicted_edited_and_blended(ann, tmp_path):
    """The base that was chosen predicts, and everything after it is that base's."""
    folder = tmp_path / "runs"
    found = pictures.look(making.example(tmp_path / "photos", 3, "embedded-wide"), 64)
    run, made = making.predict(folder, "Wide", found[:1], "embedded-wide")
    assert read_recipe(run.folder)["base"] == "embedded-wide" and any("skin #" in note for note in made.notes)
    assert "hair=bald" in making.sliders(run) and "hair=bald" not in making.sliders(None)
    for out in (
        making.edit(run, tmp_path / "edited", {"hair=bald": 1.0}),
        making.blend(
            run, making.predict(folder, "Other", found[1:2], "embedded-wide")[0], tmp_path / "blend", 0.5
        ).folder,
    ):
        assert read_recipe(out)["base"] == "embedded-wide"
    assert "a " in making.scenes(making.Bases(), run.folder, 1)[0]
    with pytest.raises(
        ConfigError, match="Wide is for embedded-wide, and Ann for embedded: adapters of one base add up"
    ):
        making.blend(run, ann[1], tmp_path / "two bases", 0.5)
    assert not (tmp_path / "two bases").exists()


@pytest.mark.parametrize("base", ["embedded-flow", "/some/pipeline"])
def test_no_prediction_for_another_base_than_was_chosen(tmp_path, base):
    """Rather than an adapter for the embedded base, without a word."""
    found = pictures.look([picture(tmp_path / "a.png")])
    with pytest.raises(
        ConfigError, match=f"predict adapters for '{base}': choose the base embedded or embedded-wide, or train"
    ):
        making.predict(tmp_path / "runs", "Ann", found, base)
    assert not (tmp_path / "runs").exists()


def test_a_prediction_is_trained_further(ann, monkeypatch):
    """Up to the child, which is not started: its settings are the adapter's own."""
    folder, run = ann
    asked = []
    monkeypatch.setattr(runs, "start", lambda *given: asked.append(given) or runs.note(*given[1:4]))
    made = making.train_on(folder, run, 10)
    try:
        config = asked[0][4]
        assert (config.from_adapter, config.adapter.method, config.train.max_train_steps) == (run.folder, "lora", 10)
        assert config.data.folder == made.pictures and [path.name for path in made.pictures.iterdir()] == ["000.png"]
    finally:
        runs.discard(made.folder)


def test_what_peft_made_is_not_trained_further(ann, tmp_path):
    _, run = ann
    shutil.copytree(run.folder, tmp_path / "runs" / "plain")
    file = tmp_path / "runs" / "plain" / "adapter_model.safetensors"
    save_file(load_file(run.folder / file.name), file)  # without the header that says it is ours
    plain = runs.read_run(file.parent)
    assert making.trainable(tmp_path / "runs") == []
    with pytest.raises(ConfigError, match="Ann was made by peft"):
        making.train_on(tmp_path / "runs", plain, 10)
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["plain"]


def test_a_picture_without_a_person_leaves_nothing(ann, tmp_path):
    blank = tmp_path / "blank.png"
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(blank)
    with pytest.raises(DataError):
        making.predict(tmp_path / "runs", "Blank", pictures.look([blank]))
    assert list((tmp_path / "runs").iterdir()) == []


def test_drawn_on_a_base_that_stays_as_it_was(ann):
    _, run = ann
    bases = making.Bases()
    prompt = ["a portrait of a person, smiling"]

    def drawn(weight):
        ((path, said),) = making.draw(bases, run.folder, weight, prompt)
        assert said == prompt[0]
        return np.asarray(Image.open(path))

    base, own = drawn(0.0), drawn(1.0)
    assert (base != own).any() and (drawn(0.0) == base).all()
    with bases.using("embedded") as held:
        assert not any("lora" in name or "residual" in name for name, _ in held.model.named_parameters())


def test_files_for_other_programs(ann):
    _, run = ann
    path, words = making.download(run, "Smidgen")
    with zipfile.ZipFile(io.BytesIO(path.read_bytes())) as archive:
        assert {"ann/adapter_config.json", "ann/adapter_model.safetensors", "ann/recipe.json"} <= set(
            archive.namelist()
        )
        assert not any("pictures" in name or "page.json" in name for name in archive.namelist())
    assert "kB" in words
    for wanted, name in (("diffusers", "pytorch_lora_weights.safetensors"), ("ComfyUI", "ann.safetensors")):
        path, words = making.download(run, wanted)
        assert path.name == name and str(run.folder) not in words
        assert making.download(run, wanted)[0] == path  # again
    with pytest.raises(ConfigError, match="Choose what the file is for"):
        making.download(run, "Photoshop")


def test_edit_blend_and_keep(ann, tmp_path):
    folder, run = ann
    place = making.edit(run, runs.scratch(folder), {"skin=dark": 1.0, "": 2.0})
    kept = making.keep_try(folder, place, "edit", "Ann, dark", "Ann, skin dark 1")
    try:
        assert kept.finished and kept.kind == "edit"
        with pytest.raises(ConfigError, match="two different ones"):
            making.blend(run, run, tmp_path / "x", 0.5)
        between = making.blend(run, kept, tmp_path / "blend", 0.5)
        assert between.folder == tmp_path / "blend" and (tmp_path / "blend" / "recipe.json").is_file()
    finally:
        runs.discard(kept.folder)


def test_any_two_that_draw_are_blended(tmp_path):
    """Of one method: one adapter, which draws what both draw together; of two: both are drawn with, and nothing is to be kept."""
    import smidgen
    from smidgen import testing
    from smidgen.adapters.tuner.injection import remove

    bases, prompt, made = making.Bases(), ["a portrait of a person"], {}
    with bases.using("embedded") as base:
        for seed, (name, method) in enumerate((("ann", "svfit"), ("bob", "svfit"), ("style", "lora"))):
            smidgen.adapt(base.model, method)
            smidgen.save(testing.perturb(base.model, seed, size=0.5), tmp_path / "runs" / name)
            remove(base.model, "default")
            (tmp_path / "runs" / name / "report.json").write_text('{"base": "embedded"}')
            made[name] = runs.note(tmp_path / "runs" / name, "personalize", name.title())
    assert {run.name for run in making.drawable(tmp_path / "runs")} == set(made) and making.people(
        tmp_path / "runs"
    ) == []
    one = making.blend(made["ann"], made["bob"], tmp_path / "one", 0.25)
    assert one.folder == tmp_path / "one" and one.parts == {tmp_path / "one": 1.0}
    both = {made["ann"].folder: 0.75, made["bob"].folder: 0.25}
    pair = [making.draw(bases, parts, 1.0, prompt)[0][0] for parts in (one.parts, both)]
    mixed, beside = (np.asarray(Image.open(path)).astype(int) for path in pair)
    assert abs(mixed - beside).max() <= 1
    kept = making.keep_try(tmp_path / "runs", one.folder, "blend", "Ann and Bob", "")
    assert kept in making.drawable(tmp_path / "runs")
    two = making.blend(made["ann"], made["style"], tmp_path / "two", 0.5)
    assert two.folder is None and not (tmp_path / "two").exists() and "make no one file" in two.words
    assert two.parts == {made["ann"].folder: 0.5, made["style"].folder: 0.5}
    (made["bob"].folder / "report.json").write_text('{"base": "embedded-flow"}')
    with pytest.raises(ConfigError, match="and Bob for embedded-flow: adapters of one base"):
        making.blend(made["ann"], made["bob"], tmp_path / "three", 0.5)


# ---- texts


def table(path, rows, head="text,label"):
    path.write_text("\n".join([head, *rows]) + "\n")
    return path


def test_columns_are_guessed(tmp_path):
    rows = [f"{n},{'good' if n % 2 else 'bad'},what a day number {n}" for n in range(60)]
    found = texts.look(table(tmp_path / "a.csv", rows, "id,mood,said"))
    assert (found.text, found.label, found.rows) == ("said", "mood", 60)
    counts, wrong, notes = texts.judge(found, "said", "mood")
    assert counts == {"good": 30, "bad": 30} and wrong == [] and notes == []


@pytest.mark.parametrize("rows, head, words", [
    (["a"], "text", "has one column"), ([], "text,label", "no rows"),
])  # fmt: skip
def test_tables_that_cannot_be_read(tmp_path, rows, head, words):
    with pytest.raises(DataError, match=words):
        texts.look(table(tmp_path / "a.csv", rows, head))
    with pytest.raises(DataError, match="is no table"):
        texts.look(tmp_path / "a.docx")


@pytest.mark.parametrize("rows, words", [
    (["good,a"] * 60, "holds 1 label"), (["good,a", "bad,b"], "2 labelled texts are too few"),
    ([f"good,{n}" for n in range(60)], "60 different values"),
])  # fmt: skip
def test_tables_that_teach_nothing(tmp_path, rows, words):
    found = texts.look(table(tmp_path / "a.csv", rows))
    assert words in texts.judge(found, "text", "label")[1][0]
    with pytest.raises(DataError, match=words):
        texts.train(tmp_path / "runs", "Mood", found, "text", "label", 10, "debug-text")
    assert not (tmp_path / "runs").exists()


def test_remarks_about_a_table(tmp_path):
    rows = ["good,a"] * 40 + ["bad,b"] * 2 + [",a", "what,"]
    _, wrong, notes = texts.judge(texts.look(table(tmp_path / "a.csv", rows)), "text", "label")
    assert not wrong and notes == [
        "Few texts of b (2): they will hardly be learnt.",
        "2 rows without a text or a label are left out.",
    ]
    assert texts.judge(texts.look(table(tmp_path / "a.csv", rows)), "text", "text")[1][0].startswith(
        "Texts and labels cannot both"
    )


# ---- how it is shown


class Strict(HTMLParser):
    """Refuses markup whose tags do not close in order."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag not in ("img", "br", "polyline"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("polyline",):
            assert self.open.pop() == tag


def test_nothing_that_a_user_writes_becomes_markup(tmp_path):
    nasty = "<img src=x onerror=alert(1)>\"'&"
    run = runs.note(runs.new_run(tmp_path, "x"), "personalize", nasty, nasty, 10)
    now = runs.Status(runs.FAILED, nasty, 2, 10, (1.0, 0.5, 0.2))
    found = [pictures.Finding(tmp_path, nasty, "bad", nasty)]
    pieces = [
        html.bad(nasty), html.good(nasty), html.status(run, now), html.run_list([(run, now)]), html.findings(found),
        html.shares(nasty, [(nasty, 0.5)]), html.counts({nasty: 3}), html.table([(nasty, nasty)], nasty), html.empty(nasty, nasty),
        html.heading("1", nasty, nasty),
    ]  # fmt: skip
    for piece in pieces:
        assert "<img src=x" not in piece and "onerror=alert(1)&gt;" in piece
        parser = Strict()
        parser.feed(piece)
        parser.close()
        assert parser.open == []


def test_flags_are_called_as_the_page_calls_them():
    said = html.bad("Name the word they share with --class-word. Or give another --out, not --outline.")
    assert "What it is" in said and "--class-word" not in said and "another name" in said and "--outline" in said


def test_a_loss_that_does_not_move_is_a_line_too():
    assert "points=" in html.sparkline([0.5] * 5) and "nan" not in html.sparkline([0.5] * 5)


# ---- mounted


def test_the_page_forbids_everything_from_elsewhere(tmp_path):
    """The example of docs/ui.md."""
    from fastapi import FastAPI
    from starlette.testclient import TestClient

    from smidgen.serving.page import mount

    app = FastAPI()
    app.get("/health")(lambda: "ok")
    client = TestClient(mount(app, tmp_path / "runs", "/ui"))
    answer = client.get("/ui/")
    assert answer.status_code == 200 and "Smidgen" in answer.text
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert not any(place in answer.text for place in ("googleapis", "gstatic", "cdn.", "unpkg", "jsdelivr"))
    assert "content-security-policy" not in client.get("/health").headers
    (tmp_path / "secret.txt").write_text("mine")
    assert client.get(f"/ui/gradio_api/file={tmp_path / 'secret.txt'}").status_code in (403, 404)
