"""The page in a browser, wide and on a phone: pictures to a download, errors in words, nothing asked of anybody else."""

import re
import zipfile

import numpy as np
import pytest
from PIL import Image

from tests.serving import browser
from tests.serving.browser import WIDTHS, Visit

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chromium():
    browser.needed()
    with browser.browsing() as found:
        yield found


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    browser.needed()
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def people(place):
    """Pictures of two invented people."""
    from smidgen.tasks.drawing import draw_subject

    for seed, name in enumerate(("ann", "bob")):
        draw_subject(place / name, 7 + seed, 6)
    return place


@pytest.fixture(scope="module")
def url(place):
    with browser.served(place / "runs") as found:
        yield found


@pytest.fixture
def visit(chromium, url):
    opened = []

    def go(width):
        opened.append(Visit(chromium, url, width))
        return opened[-1]

    yield go
    for one in opened:
        one.close()


@pytest.mark.parametrize("width", WIDTHS)
def test_first_look(visit, width):
    """Every tab, before anything is made: what to do first, readable by all, no wider than the window."""
    at = visit(width)
    for name, says in (
        ("Make", "Nothing made yet"), ("Draw", "Nothing drawn yet"), ("Change", "Nothing changed yet"), ("Runs", "No runs yet"),
        ("Text", "No classifier yet"),
    ):  # fmt: skip
        at.tab(name)
        at.says(says)
        assert at.accessible() == [] and at.wide() <= 0, name
        at.shot(f"empty-{name.lower()}")


def test_keyboard(visit):
    """The tabs and the first action can be reached and used without a mouse."""
    at = visit(1280)
    at.page.get_by_role("tab", name="Make").focus()
    at.page.keyboard.press("Tab")
    reached = []
    for _ in range(40):
        at.page.keyboard.press("Tab")
        reached.append(
            at.page.evaluate("document.activeElement.textContent.trim() || document.activeElement.ariaLabel")
        )
        if "Predict in a second" in reached:
            break
    assert "Predict in a second" in reached
    at.page.keyboard.press("Enter")
    at.says("Drop pictures first")


def test_what_is_wrong_with_pictures(visit, place, people):
    at, folder = visit(1280), place / "odd"
    folder.mkdir()
    good = Image.open(people / "ann" / "000.png").convert("RGB")
    good.save(folder / "good.png")
    good.save(folder / "copy.png")
    good.resize((8, 8)).save(folder / "tiny.png")
    good.resize((40, 40)).save(folder / "small.png")
    good.convert("L").save(folder / "grey.png")
    Image.new("RGB", (64, 64), "red").save(folder / "flat.png")
    (folder / "broken.png").write_bytes(b"no picture at all")
    at.drop("sm-files", *sorted(folder.iterdir()))
    for words in (
        "Left out: a copy of", "8x8 is smaller than 16 pixels", "fewer than the base's 64", "No colour in it", "one colour throughout",
        "it is no picture that can be read", "3 pictures",
    ):  # fmt: skip
        at.says(words)
    at.shot("findings")
    assert at.accessible() == []


@pytest.mark.parametrize("width", WIDTHS)
def test_errors_in_words(visit, place, people, width):
    at = visit(width)
    at.click("Predict in a second")
    at.says("Drop pictures first", browser.QUIET)
    at.click("Train")
    at.says("Drop pictures first", browser.QUIET)
    broken = place / f"broken-{width}.png"
    broken.write_bytes(b"no picture")
    at.drop("sm-files", broken)
    at.says("None of these can be used")
    at.click("Predict in a second")
    at.says("None of the dropped pictures can be used")
    at.open()
    at.drop("sm-files", people / "ann" / "000.png")
    at.says("One picture: enough to predict")
    at.click("Predict in a second")
    at.says("Give it a name first", browser.QUIET)
    at.fill("Name", "!!!")
    at.click("Predict in a second")
    at.says("letters or digits, such as Ann")
    at.fill("Name", f"Nobody {width}")
    at.unfold("Training settings")
    at.fill("Steps", "0")
    at.click("Train")
    at.says("Steps are a whole number from 1")
    at.fill("Steps", "20")
    at.page.get_by_label("Base", exact=True).fill("/no/such/base")
    at.page.get_by_label("Base", exact=True).press("Tab")
    at.click("Train")
    at.says("There is no base '/no/such/base'")
    at.shot("error")
    at.tab("Draw")
    at.click("Draw")
    at.says("Choose one first")
    at.click("Make the file")
    at.says("Choose one first")
    at.tab("Change")
    at.click("Show the edit")
    at.says("Choose one first")
    at.click("Show the blend")
    at.says("Choose one first")
    at.tab("Text")
    at.click("Train the classifier")
    at.says("Drop a table first")
    words = place / f"words-{width}.txt"
    words.write_text("no table")
    at.drop("sm-table", words)
    at.says("is no table. Drop a file that ends in")
    assert at.accessible() == [] and at.wide() <= 0


@pytest.mark.parametrize("width", WIDTHS)
def test_tables_that_teach_nothing(visit, place, width):
    at = visit(width)
    at.tab("Text")
    for name, content, says in (
        ("one", "text\na\nb\n", "has one column"),
        ("few", "text,label\ngood,a\nbad,b\n", "2 labelled texts are too few"),
        ("same", "text,label\n" + "good,a\n" * 50, "holds 1 label; two are the least"),
        ("many", "text,label\n" + "".join(f"good,{n}\n" for n in range(60)), "60 different values"),
        ("empty", "text,label\n", "has no rows"),
    ):
        table = place / f"{name}-{width}.csv"
        table.write_text(content)
        at.drop("sm-table", table)
        at.says(says)


@pytest.mark.parametrize("width", WIDTHS)
def test_pictures_to_download(visit, place, people, width):
    """Drop a picture, predict, look, draw with it at a weight beside the base, take it along."""
    at = visit(width)
    at.drop("sm-files", people / "ann" / "000.png")
    at.says("One picture: enough to predict")
    at.fill("Name", f"Ann {width}")
    at.click("Predict in a second")
    at.says("Reading the face", browser.QUIET)
    at.says("was predicted in", 120_000)
    at.page.locator(".sm-gallery img").first.wait_for(timeout=180_000)
    at.page.wait_for_timeout(3000)
    at.shot("predicted")
    assert at.accessible() == [] and at.wide() <= 0
    at.click("Draw and download")
    at.says("What to draw")
    at.page.wait_for_timeout(1500)
    assert at.page.get_by_label("Adapter", exact=True).input_value() == f"Ann {width}"
    at.fill("Prompts, one a line", "")
    at.click("Draw")
    at.says("Say what to draw")
    at.fill("Prompts, one a line", "a person\n" * 17)
    at.click("Draw")
    at.says("17 pictures at once are too many")
    at.fill("Prompts, one a line", "a portrait of a person, smiling")
    at.unfold("Beside it")
    at.page.get_by_label("Second adapter", exact=True).click()
    at.page.get_by_role("option", name="the base alone").click()
    at.click("Draw")
    at.says("Drawing 2 pictures", browser.QUIET)
    at.says("Drawn, and kept", 300_000)
    at.page.wait_for_timeout(2000)
    at.shot("drawn")
    assert at.page.locator(".sm-gallery img").locator("visible=true").count() >= 2
    assert at.accessible() == [] and at.wide() <= 0
    at.click("Make the file")
    with at.page.expect_download(timeout=120_000) as arriving:
        at.page.locator("#sm-download").click(timeout=120_000)
    with zipfile.ZipFile(arriving.value.path()) as archive:
        names = {name.rpartition("/")[2] for name in archive.namelist()}
    assert {"adapter_config.json", "adapter_model.safetensors", "recipe.json"} <= names
    at.page.get_by_label("ComfyUI").check()
    at.click("Make the file")
    at.page.get_by_text(".safetensors (").wait_for(timeout=120_000)
    with at.page.expect_download() as arriving:
        at.page.locator("#sm-download").click()
    assert arriving.value.suggested_filename.endswith(".safetensors")
    at.shot("download")
    at.tab("Runs")
    at.says(f"Ann {width}")
    at.shot("runs")
    assert at.accessible() == [] and at.wide() <= 0


def test_no_face(visit, place):
    at = visit(1280)
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype("uint8")
    Image.fromarray(noise).save(place / "noise.png")
    at.drop("sm-files", place / "noise.png")
    at.says("One picture")
    at.fill("Name", "Noise")
    at.click("Predict in a second")
    at.says("face", 120_000)
    at.page.get_by_role("alert").locator("visible=true").first.wait_for(timeout=120_000)
    assert not (place / "runs" / "noise").exists()


def test_edit_and_blend(visit, place, people):
    at = visit(1280)
    at.drop("sm-files", people / "bob" / "000.png")
    at.says("One picture")
    at.fill("Name", "Bob")
    at.click("Predict in a second")
    at.says("Bob was predicted in", 120_000)
    at.tab("Change")
    at.says("Edit a person")
    at.page.wait_for_timeout(4000)
    at.click("Show the edit")
    at.says("Nothing is to change")
    at.page.get_by_label("number input for Amount").first.fill("1")
    at.page.get_by_label("number input for Amount").first.press("Tab")
    at.click("Show the edit")
    at.says("Moving the person", browser.QUIET)
    at.says("Keep it if you like it", 400_000)
    at.shot("edited")
    assert at.accessible() == [] and at.wide() <= 0
    at.click("Keep it")
    at.says("is kept. It is under Draw and Runs now")
    kept = [path for path in (place / "runs").iterdir() if path.name.startswith("bob-")]
    assert len(kept) == 1 and (kept[0] / "recipe.json").is_file()
    for label, name in (("First", "Bob"), ("Second", "Bob, skin dark 1")):
        at.page.get_by_label(label, exact=True).locator("visible=true").click()
        option = at.page.get_by_role("option", name=name, exact=True).locator("visible=true")
        option.click()
        option.wait_for(state="hidden")  # the next list has the same names
    at.page.get_by_label("number input for How much of the second").fill("0.4")
    at.page.get_by_label("number input for How much of the second").press("Tab")
    at.click("Show the blend")
    at.says("Mixing the two", browser.QUIET)
    at.says("The person between the two", 400_000)
    at.says("60% Bob, 40% Bob, skin dark 1")
    at.shot("blended")
    assert at.accessible() == [] and at.wide() <= 0
    at.click("Keep it")
    at.says("Bob and Bob, skin dark 1 is kept")
    assert any(
        (path / "recipe.json").is_file() for path in (place / "runs").iterdir() if path.name.startswith("bob-and")
    )


def test_training_outlives_the_tab(visit, place, people):
    """Train, watch, close the tab, find it again, stop, resume, end; then continue from it."""
    at = visit(1280)
    at.drop("sm-files", *sorted((people / "ann").iterdir()))
    at.says("6 pictures, ready to use")
    at.fill("Name", "Trained")
    at.unfold("Training settings")
    at.fill("Steps", "40")
    at.fill("Prompts to preview, one a line", "a portrait of a person, smiling")
    at.click("What will it need?")
    at.says("Counting", browser.QUIET)
    at.says("Trained parameters", 120_000)
    at.click("Train")
    at.says(
        re.compile("Checking pictures and settings|It trains on its own"), browser.QUIET
    )  # the first may be gone at once
    at.says("It trains on its own")
    at.click("Train")
    at.says("one run at a time has the machine")
    at.page.get_by_text("of 40").wait_for(timeout=60_000)
    at.open()  # a reload
    at.page.locator(".sm-sheet img").locator("visible=true").first.wait_for(timeout=300_000)
    at.page.get_by_text("Time left").locator("visible=true").wait_for(timeout=300_000)
    at.shot("training")
    assert at.accessible() == []
    at.click("Stop")
    at.says("resume goes on from there", 300_000)
    at.shot("stopped")
    at.click("Resume")
    at.says("Trained is ready", 600_000)
    at.page.wait_for_timeout(1500)
    at.shot("trained")
    assert (place / "runs" / "trained" / "report.json").is_file()
    assert at.accessible() == [] and at.wide() <= 0
    at.tab("Runs")
    at.says("Ready")
    at.page.locator("#sm-more").get_by_role("button").first.click()
    at.fill("More steps", "4")
    at.click("Continue training")
    at.says("trains on its own from Trained", 60_000)
    at.says("Trained, continued")
    at.click("Stop")
    at.says("Stopped", 300_000)


def test_a_classifier(visit, place):
    """A table in, a classifier out, and an answer; on a tiny model, so the answer's worth is not looked at."""
    at, table = visit(1280), place / "mood.csv"
    rows = [
        f"{'lovely great day' if n % 2 else 'awful bad night'} {n},{'good' if n % 2 else 'bad'}" for n in range(120)
    ]
    table.write_text("message,mood,id\n" + "\n".join(f"{row},{n}" for n, row in enumerate(rows)) + "\n")
    at.tab("Text")
    at.drop("sm-table", table)
    at.says("120 rows, 2 labels in 'mood'")
    at.shot("table")
    at.fill("Name", "Mood")
    at.page.locator("#sm-text-settings").get_by_role("button").first.click()
    at.page.locator("#sm-text-settings").get_by_label("Steps", exact=True).fill("60")
    at.page.locator("#sm-text-settings").get_by_label("Model").fill("debug-text")
    at.page.get_by_label("Longest text, in tokens").fill("32")
    at.click("Train the classifier")
    at.says("It trains on its own")
    at.says("Mood is ready", 400_000)
    at.click("Sort")
    at.says("Write a text first")
    at.fill("Texts to sort, one a line", "a lovely great day\nan awful bad night")
    at.click("Sort")
    at.page.locator("figure .sm-shares").nth(1).wait_for(timeout=60_000)
    at.shot("sorted")
    assert at.accessible() == [] and at.wide() <= 0
