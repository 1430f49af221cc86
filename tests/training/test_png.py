"""Every PNG that Smidgen writes carries its mark, and no text of others breaks one."""

from matplotlib.figure import Figure
from PIL import Image

from smidgen.tasks.contact_sheet import loss_plot
from smidgen.tasks.png import is_ours, write_figure, write_png


def test_pictures_and_figures_carry_the_mark(tmp_path):
    write_png(Image.new("RGB", (8, 8), "red"), tmp_path / "drawn.png")
    write_figure(Figure(), tmp_path / "figure.png")
    loss_plot({"svfit": [1.0, 0.5]}, tmp_path / "loss.png")
    Image.new("RGB", (8, 8), "red").save(tmp_path / "mine.png")
    for name, ours in {"drawn.png": True, "figure.png": True, "loss.png": True, "mine.png": False}.items():
        with Image.open(tmp_path / name) as image:
            assert is_ours(image) is ours, name


def test_any_text_can_be_kept_beside_the_mark(tmp_path):
    said = {"prompt": "ein Porträt, 肖像 \ud83d", "seed": "7"}
    with Image.open(write_png(Image.new("L", (8, 8)), tmp_path / "sub" / "a.png", said)) as image:
        assert image.text["prompt"] == "ein Porträt, 肖像 ?" and image.text["seed"] == "7" and is_ours(image)
