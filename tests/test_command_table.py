"""A command is a row of the table and a function: the rows lead somewhere, the builder makes their flags."""

import inspect
from pathlib import Path
from typing import Annotated, Any

import pytest

from smidgen.cli import build, table, telling
from smidgen.cli.build import Section, resolve, sections
from smidgen.errors import ConfigError
from smidgen.training.settings import dump_yaml

PRESET = [name for name in table.COMMANDS if any(section.presets for section in sections(name).values())]


@pytest.mark.parametrize("name", table.COMMANDS)
def test_a_row_leads_to_a_function_that_explains_its_flags(name):
    function = resolve(f"cli.{table.COMMANDS[name].function}")
    said = inspect.getdoc(function)
    assert all(f"\n    {flag}: " in said for flag in inspect.signature(function).parameters)
    assert all(inspect.isclass(section.load()) for section in sections(name).values())


def test_every_preset_command_is_found():
    assert set(PRESET) == {
        "personalize", "plan personalize", "zoo build", "zoo evaluate", "generator train",
        *(name for name in table.COMMANDS if name.startswith("train ")),
    }  # fmt: skip


@pytest.mark.parametrize("name", PRESET)
def test_a_preset_comes_back_from_its_file(name, tmp_path):
    settings = sections(name)["settings"]
    for preset, made in settings.names().items():
        (tmp_path / "config.yaml").write_text(dump_yaml(made))
        found = inspect.signature(build.build(name, ["--config", str(tmp_path / "config.yaml")])).parameters
        assert found["settings"].default == made == settings.start(None, preset)
        assert found["preset"].default == "default" and found["config"].default is None
    with pytest.raises(ConfigError, match="Give --config or --preset, not both"):
        build.build(name, ["--config", "a.yaml", "--preset", "default"])
    with pytest.raises(ConfigError, match=r"There is no preset 'defalt'. Did you mean 'default'"):
        build.build(name, ["--preset=defalt"])


def test_a_new_command_is_a_row_and_a_function(monkeypatch, capsys):
    def greet(who: str, /, drawing: Annotated[Any, Section("lab.audit.settings:Drawing")], times: int = 1) -> None:
        """Greet WHO.

        Args:
            who: somebody.
            drawing: how.
            times: how often.
        """
        print(who, times, type(drawing).__name__, drawing.scenes)

    monkeypatch.setattr(telling, "greet", greet, raising=False)
    monkeypatch.setitem(table.COMMANDS, "greet", table.Command("say hello", "telling:greet"))
    build.run("greet", ["you", "--times", "3", "--scenes", "5"])
    assert capsys.readouterr().out == "you 3 Drawing 5\n"
    assert "  greet " in table.overview() and table.find("greet") == "greet"


def test_the_setting_of_the_data_is_a_flag_too(monkeypatch, tmp_path):
    from smidgen.tasks.text_classification import recipe

    seen = []
    monkeypatch.setattr(recipe, "text_classification", lambda config: seen.append(config.data.path))
    config = tmp_path / "config.yaml"
    config.write_text("data: {path: a.csv}\n")
    for words in ([], ["--path", "b.csv"], ["--train-file", "c.csv"], ["d.csv"]):
        build.run("train text-classification", [*words, "--config", str(config)])
    assert seen == ["a.csv", "b.csv", "c.csv", "d.csv"]


@pytest.mark.parametrize("word, group, said", [
    ("zo", "", "There is no command 'zo'. Did you mean 'zoo'?"),
    ("bild", "zoo", "There is no command 'zoo bild'. Did you mean 'build'? Known: build, status,"),
    ("xyzzyx", "", "There is no command 'xyzzyx'. Known: train, "),
])  # fmt: skip
def test_a_mistyped_command(word, group, said):
    with pytest.raises(ConfigError) as error:
        table.find(word, group)
    assert said in str(error.value)


def test_every_file_of_the_command_line_is_used():
    files = {path.stem for path in Path(table.__file__).parent.glob("*.py")} - {"__init__", "__main__"}
    rows = {row.function.partition(":")[0] for row in table.COMMANDS.values()}
    assert files == rows | {"build", "dispatch", "ends", "extras", "flags", "parsing", "table"}
