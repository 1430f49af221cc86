"""Using text and image adapters: their folders say all that is needed; classify, chat, merge, verify; going on from one."""

import csv
import io
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file

import smidgen
from smidgen.bases.origin import read_origin
from smidgen.bases.packaged import debug
from smidgen.bases.transformers import Head, load_classifier, load_language_model, source
from smidgen.errors import AdapterFileError, ConfigError, DataError
from smidgen.tasks import classifying
from smidgen.tasks.chatting import Chat, talk
from smidgen.tasks.classifying import Classifier
from smidgen.tasks.data.tables import read_rows
from smidgen.training import engine
from tests.training.test_cli import call
from tests.training.test_finetune import config, run

FILES = ("adapter_config.json", "adapter_model.safetensors")
TEXTS = ["the film was good", "the meal was cold and the day was warm", "the road was ugly"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """``folder(kind)``: the adapter of a debug run, trained once."""
    root, made = tmp_path_factory.mktemp("adapters"), {}

    def train(kind: str, method: str = "svfit") -> Path:
        if (kind, method) not in made:
            out = root / f"{kind}-{method.replace(':', '-')}"
            run(kind, config(kind, out, method))
            made[kind, method] = out
        return made[kind, method]

    return train


def untrained(folder: Path, labels: tuple[str, ...] = ("bad", "good"), problem: str | None = None, **options) -> Path:
    """A text classifier's adapter of two files, as a training leaves it, without one."""
    head = Head(labels, *([problem] if problem else []))
    model = load_classifier("AutoModelForSequenceClassification", "debug-text", head, 0, "no", None).model
    said = {"task_type": "SEQ_CLS", "labels": list(labels) or None, "problem_type": problem}
    options = {"method": "svfit", "r": 2, "modules_to_save": ["classifier"], **said, **options}
    smidgen.adapt(model, smidgen.config(target_modules=["query", "value"], **options))
    return smidgen.save(smidgen.testing.perturb(model), folder)


def two_files(source: Path, target: Path) -> Path:
    target.mkdir()
    for name in FILES:
        shutil.copy(source / name, target / name)
    return target


# ---- what a folder says ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, task, base", [
    ("text", "text-classification", "debug-text"), ("image", "image-classification", "debug-image"),
    ("chat", "instruction", "debug-chat"),
])  # fmt: skip
def test_two_files_say_task_base_and_classes(folder, tmp_path, kind, task, base) -> None:
    whole, bare = read_origin(folder(kind)), read_origin(two_files(folder(kind), tmp_path / "bare"))
    assert (bare.task, bare.base, bare.head, bare.method) == (task, base, whole.head, "svfit")
    assert whole.settings["data.train_batch_size"] == 8 and not bare.settings
    report = json.loads((folder(kind) / "report.json").read_text())
    assert (list(bare.head.labels) if bare.head else []) == report["labels"]
    told = smidgen.SmidgenConfig.from_pretrained(folder(kind))  # which holds it against its checksum
    assert told.checksum and told.task_type == {"text": "SEQ_CLS", "image": None, "chat": "CAUSAL_LM"}[kind]


def test_labels_are_under_the_checksum(folder, tmp_path) -> None:
    changed = two_files(folder("text"), tmp_path / "changed")
    file = changed / FILES[0]
    file.write_text(file.read_text().replace('["bad","good"]', '["good","bad"]'))
    with pytest.raises(AdapterFileError, match="SHA-256 of its options differs"):
        smidgen.load(torch.nn.Linear(2, 2), changed)


def test_a_local_base_is_found_where_it_lay_and_named_otherwise(tmp_path, capsys) -> None:
    base = tmp_path / "bases" / "my-bert"
    shutil.copytree(debug.model_folder("debug-text"), base)
    run("text", config("text", tmp_path / "out", model=str(base)))
    assert read_origin(tmp_path / "out").base == str(base)
    assert str(tmp_path) not in (tmp_path / "out" / FILES[0]).read_text()
    (tmp_path / "out" / "config.yaml").unlink()
    words = ["classify", tmp_path / "out", TEXTS[0]]
    status, out, err = call(capsys, *words)
    assert status == 2 and "my-bert" in err and out == ""
    assert call(capsys, *words, "--base", base)[0] == 0
    status, _, err = call(capsys, *words, "--base", "debug-chat")
    assert status == 2 and "Traceback" not in err


def test_a_revision_is_read_and_written(tmp_path, monkeypatch) -> None:
    assert source("me/bert@v1") == {"pretrained_model_name_or_path": "me/bert", "revision": "v1"}
    hub, commit = tmp_path / "hub", "0123456789abcdef0123456789abcdef01234567"
    place = hub / "models--me--bert"
    shutil.copytree(debug.model_folder("debug-text"), place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    monkeypatch.setattr("transformers.utils.hub.constants.HF_HUB_CACHE", str(hub))
    run("text", config("text", tmp_path / "out", model="me/bert"))
    told = json.loads((tmp_path / "out" / FILES[0]).read_text())
    assert (told["base_model_name_or_path"], told["revision"]) == ("me/bert", commit)
    assert read_origin(tmp_path / "out").base == f"me/bert@{commit}"
    assert len(Classifier(tmp_path / "out")(TEXTS)) == 3


def test_a_folder_that_says_nothing(tmp_path, capsys) -> None:
    model = smidgen.adapt(torch.nn.Sequential(torch.nn.Linear(4, 4)), "svfit", r=2, target_modules=["0"])
    smidgen.save(model, tmp_path / "adapter")
    for verb in ("classify", "chat"):
        words = [tmp_path / "adapter", *(["a text"] if verb == "classify" else [])]
        status, _, err = call(capsys, verb, *words)
        assert status == 2 and "use smidgen generate" in err
    status, _, err = call(capsys, "chat", tmp_path)
    assert status == 2 and "adapter_config.json" in err


def test_an_adapter_of_a_text_model_without_a_task_is_not_taken_for_a_drawing_one(
    tmp_path, monkeypatch, capsys
) -> None:
    lay = tmp_path / "my-llama"
    shutil.copytree(debug.model_folder("debug-chat"), lay)
    for number, named in enumerate(("debug-chat", "my-llama", "somebody/llama", "")):
        found = load_language_model("debug-chat", "no", None).model
        found.name_or_path = named
        smidgen.save(smidgen.adapt(found, "svfit", r=2, target_modules=["q_proj"]), tmp_path / str(number))
    monkeypatch.chdir(tmp_path)
    for folder in ("0", "1"):
        with pytest.raises(AdapterFileError, match="does not say for which task: its adapter_config"):
            read_origin(folder)
    assert read_origin("2").base == ""
    status, _, err = call(capsys, "generate", "0", "--prompt", "a cat", "--out", tmp_path / "cat.png")
    assert status == 2 and "no task_type" in err


# ---- other programs ----------------------------------------------------------------------------------------------------


def test_peft_and_transformers_find_base_and_classes(folder, tmp_path) -> None:
    for place in (folder("text"), two_files(folder("text"), tmp_path / "bare")):
        classifier = Classifier(place)
        inputs = classifier.tokenizer(TEXTS, padding=True, return_tensors="pt")
        wanted = classifier.logits(TEXTS)
        for kind in (peft.AutoPeftModelForSequenceClassification, transformers.AutoModelForSequenceClassification):
            model = kind.from_pretrained(str(place)).eval()
            assert model.config.id2label == {0: "bad", 1: "good"}
            torch.testing.assert_close(model(**inputs).logits, wanted, atol=1e-5, rtol=0)
        ask = transformers.pipeline("text-classification", model=str(place))
        shares = [one["score"] for one in ask(TEXTS)]
        torch.testing.assert_close(torch.tensor(shares), wanted.softmax(-1).max(-1).values, atol=1e-5, rtol=0)


def test_images_and_conversations_too(folder) -> None:
    picture = next(debug.data_folder("debug-image").glob("test/*/*.png"))
    ask = transformers.pipeline("image-classification", model=str(folder("image")))
    (found,) = Classifier(folder("image"))([picture])
    assert {one["label"] for one in ask(str(picture))} == set(found.probabilities)
    assert ask(str(picture))[0]["score"] == pytest.approx(max(found.probabilities.values()), abs=1e-4)
    assert peft.AutoPeftModel.from_pretrained(folder("image")).config.id2label[0] == "blue"
    model = peft.AutoPeftModelForCausalLM.from_pretrained(str(folder("chat"))).eval()
    write = transformers.pipeline("text-generation", model=str(folder("chat")))
    messages = [{"role": "user", "content": "what is 2 plus 3 ?"}]
    said = write(messages, max_new_tokens=5, do_sample=False)[0]["generated_text"][-1]["content"]
    inputs = write.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    ids = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert said.strip() == write.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_what_is_no_adapter_of_ours_goes_to_their_own_code(tmp_path) -> None:
    base = debug.model_folder("debug-text")
    assert transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=3).num_labels == 3
    with pytest.raises(ValueError, match="Can't find"):
        peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path))


def test_a_chat_template_of_ones_own_travels(tmp_path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(debug.CHATML.replace("assistant", "system"))
    made = config("chat", tmp_path / "out")
    run("chat", replace(made, data=replace(made.data, chat_template=template)))
    assert Chat(tmp_path / "out").tokenizer.chat_template == template.read_text()
    write = transformers.pipeline("text-generation", model=str(tmp_path / "out"))
    assert write.tokenizer.chat_template == template.read_text()


# ---- classify ----------------------------------------------------------------------------------------------------------


def test_texts_tables_and_their_columns(folder, tmp_path, capsys, caplog) -> None:
    table = tmp_path / "in.csv"
    table.write_text('id,text\n7,"the film was good"\n8,\n9,the day was cold\n')
    status, out, _ = call(capsys, "classify", folder("text"), TEXTS[0], table, "--logits")
    assert status == 0 and "1 row without text" in caplog.text
    rows = list(csv.DictReader(io.StringIO(out)))
    assert [row["id"] for row in rows] == ["", "7", "8", "9"] and rows[2]["prediction"] == ""
    assert rows[0]["prediction"] == rows[1]["prediction"] in ("bad", "good")
    (wanted,) = Classifier(folder("text"))(TEXTS[:1])
    for label in ("bad", "good"):
        assert float(rows[0][f"logit_{label}"]) == pytest.approx(wanted.logits[label], rel=1e-5)
        assert float(rows[0][f"probability_{label}"]) == pytest.approx(wanted.probabilities[label], abs=1e-6)
    status, out, _ = call(capsys, "classify", folder("text"), table, "--out", tmp_path / "out.jsonl")
    assert status == 0 and "2 predictions" in out
    first, second, _ = (row.values for row in read_rows(tmp_path / "out.jsonl"))
    assert first["id"] == "7" and sum(first["probabilities"].values()) == pytest.approx(1)
    assert second["prediction"] is None
    status, _, err = call(capsys, "classify", folder("text"), table, "--out", tmp_path / "out.jsonl")
    assert status == 2 and "--overwrite" in err


def test_a_table_is_streamed_and_written_whole_or_not_at_all(folder, tmp_path, monkeypatch) -> None:
    texts, out = [text for text, _ in debug.sentences()][:9], tmp_path / "out.csv"
    (tmp_path / "in.csv").write_text("text,id\n" + "".join(f'"{text}",{n}\n' for n, text in enumerate(texts)))
    wanted = Classifier(folder("text"))(texts)
    asked: list[int] = []
    plain = Classifier.__call__

    def one_batch(self, given, progress=False):
        asked.append(len(given))
        if len(asked) == 4:
            raise DataError("the fourth batch")
        return plain(self, given, progress)

    monkeypatch.setattr(classifying, "SLICE", 1)
    monkeypatch.setattr(Classifier, "__call__", one_batch)
    lines = classifying.classify(folder("text"), [str(tmp_path / "in.csv")], batch_size=2)
    head, first = next(lines), next(lines)
    assert asked == [2], "more than a batch was read for the first line"
    assert head.startswith("text,id,prediction,") and f",0,{wanted[0].answer}," in first
    lines.close()
    asked.clear()
    out.write_text("as it was")
    with pytest.raises(DataError, match="fourth batch"):
        list(classifying.classify(folder("text"), [str(tmp_path / "in.csv")], out, batch_size=2, overwrite=True))
    assert asked == [2] * 4 and out.read_text() == "as it was" and len(list(tmp_path.iterdir())) == 2
    monkeypatch.setattr(Classifier, "__call__", plain)
    list(classifying.classify(folder("text"), [str(tmp_path / "in.csv")], out, batch_size=2, overwrite=True))
    rows = list(csv.DictReader(out.open()))
    assert [row["id"] for row in rows] == [str(n) for n in range(9)]
    assert [row["prediction"] for row in rows] == [one.answer for one in wanted]


def test_batches_do_not_matter(folder) -> None:
    texts = [text for text, _ in debug.sentences()]
    one = Classifier(folder("text"), batch_size=1).logits(texts[:9])
    many = Classifier(folder("text"), batch_size=64).logits(texts)
    torch.testing.assert_close(many[:9], one, atol=1e-5, rtol=0)
    assert Classifier(folder("text")).logits([]).shape == (0, 2)


def test_folders_of_images_and_broken_ones(folder, tmp_path, capsys, caplog) -> None:
    images = tmp_path / "images"
    shutil.copytree(debug.data_folder("debug-image") / "test", images)
    (images / "broken.png").write_bytes(b"no picture")
    status, out, _ = call(capsys, "classify", folder("image"), images)
    rows = list(csv.DictReader(io.StringIO(out)))
    assert status == 0 and "1 image cannot be read" in caplog.text and len(rows) == len(list(images.rglob("*.png")))
    assert [row["prediction"] for row in rows if "broken" in row["file_name"]] == [""]
    one = next(images.glob("*/*.png"))
    status, out, _ = call(capsys, "classify", folder("image"), one)
    (row,) = csv.DictReader(io.StringIO(out))
    same = next(other for other in rows if other["file_name"] == one.as_posix())
    assert status == 0 and row["prediction"] == same["prediction"]
    assert float(row["probability_red"]) == pytest.approx(float(same["probability_red"]), abs=1e-5)


def test_numbers_and_sets_of_labels(tmp_path, capsys) -> None:
    values = untrained(tmp_path / "values", (), "regression")
    (values / "report.json").write_text(
        json.dumps({"kind": "text-classification", "problem": "regression", "settings": {"data.text_column": "words"}})
    )
    (tmp_path / "in.csv").write_text("words,more\nthe film was good,1\n")
    status, out, _ = call(capsys, "classify", values, tmp_path / "in.csv")
    (row,) = csv.DictReader(io.StringIO(out))  # the column's name is the training's
    assert status == 0 and set(row) == {"words", "more", "prediction"} and float(row["prediction"])
    sets = untrained(tmp_path / "sets", ("x", "y"), "multi_label_classification")
    (found,) = Classifier(sets)(TEXTS[:1])
    held = tuple(label for label, share in found.probabilities.items() if share > 0.5)
    assert found.answer == held and set(found.probabilities) == {"x", "y"}
    status, out, _ = call(capsys, "classify", sets, TEXTS[0], "--out", tmp_path / "a.csv")
    (row,) = csv.DictReader((tmp_path / "a.csv").open())
    assert json.loads(row["prediction"]) == list(held)


@pytest.mark.parametrize("words, message", [
    (["nothing.csv"], "There is no table 'nothing.csv'"),
    (["./nothing"], "There is no table './nothing'"),
    (["holds/texts"], "There is no table 'holds/texts'. Did you mean 'text'"),
    (["photo.png"], "There is no table 'photo.png'"),
    (["bare.csv"], "bare.csv holds no rows"),
    ([""], "empty"),
    (["a", "--out", "a.txt"], "ends in .csv or .jsonl"),
    (["table.csv", "--text-column", "txt"], "no column 'txt'. Did you mean 'text'"),
    (["taken.csv"], "a column 'prediction'"),
    (["table.csv", "--batch-size", "0"], "batch_size must be from 1"),
])  # fmt: skip
def test_what_cannot_be_classified_is_a_sentence(folder, tmp_path, monkeypatch, capsys, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    Path("table.csv").write_text("text\nthe film was good\n")
    Path("taken.csv").write_text("text,prediction\nthe film was good,1\n")
    Path("bare.csv").write_text("text,prediction\n")
    Path("holds/text").mkdir(parents=True)
    before = sorted(tmp_path.iterdir())
    status, out, err = call(capsys, "classify", folder("text"), *words)
    assert status == 2 and message in err and out == "" and len(err.strip().splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("text", ["and/or", "https://a.org/b.html", "good", "w/o", "it was 1/2"])
def test_a_text_with_a_slash_is_a_text(folder, capsys, text) -> None:
    status, out, _ = call(capsys, "classify", folder("text"), text)
    assert status == 0 and text in out


def test_controls_and_methods_of_peft(folder, tmp_path, capsys) -> None:
    for method in ("linear_probe", "peft:lora"):
        assert len(Classifier(folder("text", method))(TEXTS)) == 3
    for words in (["verify"], ["export", "--to", "peft", "--out", tmp_path / "model"]):
        status, _, err = call(capsys, words[0], folder("text", "linear_probe"), *words[1:])
        assert status == 2 and "no adapter" in err and not (tmp_path / "model").exists()
    assert "`smidgen merge` writes it as a model" in err
    status, out, _ = call(capsys, "verify", folder("text", "peft:lora"))
    assert status == 0 and "ON" in out


# ---- chat --------------------------------------------------------------------------------------------------------------


def test_turns_of_a_conversation(folder, capsys, monkeypatch) -> None:
    chat = Chat(folder("chat"), max_new_tokens=6)
    pieces: list[str] = []
    first = chat.say("what is 2 plus 3 ?", pieces.append)
    assert "".join(pieces).strip() == first and len(pieces) > 1
    second = chat.say("and 1 ?")
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 2
    said: list[str] = []
    chat.reset()
    talk(chat, ["what is 2 plus 3 ?", "", "and 1 ?", "/reset", "what is 2 plus 3 ?", "/exit", "more"], said.append)
    assert [line.strip() for line in "".join(said).splitlines()] == [first, second, first]
    words = ["chat", folder("chat"), "--max-new-tokens", 6]
    assert call(capsys, *words, "--prompt", "what is 2 plus 3 ?", "and 1 ?")[:2] == (
        0,
        "".join(said[: len(said)]).rsplit(first, 1)[0],
    )
    monkeypatch.setattr("sys.stdin", io.StringIO("what is 2 plus 3 ?\n"))
    assert call(capsys, *words)[1].strip() == first


def test_drawn_answers_follow_the_seed_and_a_system_prompt(folder) -> None:
    make = {"system": "a warm day", "temperature": 1.0, "max_new_tokens": 8}
    same, again, other = (Chat(folder("chat"), seed=seed, **make) for seed in (1, 1, 2))
    question = "what is 2 plus 3 ?"
    assert same.say(question) == again.say(question) != other.say(question)
    assert same.messages[0] == {"role": "system", "content": "a warm day"}
    same.reset()
    assert same.messages == other.messages[:1]


def test_a_stopped_answer_is_forgotten(folder, monkeypatch, capsys) -> None:
    chat = Chat(folder("chat"), max_new_tokens=6)

    def stop(_text: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.say("what is 2 plus 3 ?", stop)
    assert chat.messages == []
    typed = iter(["what is 2 plus 3 ?", ""])
    monkeypatch.setattr("sys.stdin", type("Terminal", (io.StringIO,), {"isatty": lambda self: True})())
    monkeypatch.setattr("builtins.input", lambda _prompt: next(typed))
    with pytest.raises(RuntimeError):  # the generator's end of a script that is over
        talk(chat)
    monkeypatch.setattr("builtins.input", lambda _prompt: (_ for _ in ()).throw(EOFError))
    talk(chat)
    assert "/reset" in capsys.readouterr().out


def test_what_cannot_be_said(folder, capsys) -> None:
    chat = Chat(folder("chat"))
    with pytest.raises(DataError, match="Nothing was said"):
        chat.say(" ")
    with pytest.raises(DataError, match="64: /reset"):
        chat.say("what is " * 40)
    status, _, err = call(capsys, "chat", folder("text"))
    assert status == 2 and "use smidgen classify" in err
    status, _, err = call(capsys, "chat", folder("chat"), "--temperature", "-1")
    assert status == 2 and "temperature must be from 0" in err


# ---- merge -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, method", [
    ("text", "svfit"), ("image", "svfit"), ("chat", "svfit"), ("text", "linear_probe"), ("image", "linear_probe"), ("text", "full"),
])  # fmt: skip
def test_a_merged_model_is_plain_and_answers_the_same(folder, tmp_path, capsys, kind, method) -> None:
    adapter = folder(kind, method)
    status, out, _ = call(capsys, "merge", adapter, "--out", tmp_path / "model")
    assert status == 0 and "model.safetensors" in out
    assert not list((tmp_path / "model").glob("adapter*"))
    assert str(tmp_path) not in (tmp_path / "model" / "config.json").read_text()
    auto = {"text": "SequenceClassification", "image": "ImageClassification", "chat": "CausalLM"}[kind]
    plain = getattr(transformers, f"AutoModelFor{auto}").from_pretrained(tmp_path / "model").eval()
    if kind == "image":
        picture = next(debug.data_folder("debug-image").glob("test/*/*.png"))
        reader = transformers.AutoImageProcessor.from_pretrained(tmp_path / "model")
        inputs = reader(Image.open(picture).convert("RGB"), return_tensors="pt")
        wanted = Classifier(adapter).logits([picture])
    else:
        inputs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")(
            TEXTS, padding=True, return_tensors="pt"
        )
        if kind == "text":
            wanted = Classifier(adapter).logits(TEXTS)
            assert plain.config.id2label == {0: "bad", 1: "good"}
        else:
            wanted = Chat(adapter).model(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).logits, wanted, atol=1e-5, rtol=0)
    status, _, err = call(capsys, "merge", adapter, "--out", tmp_path / "model")
    assert status == 2 and "--overwrite" in err


@pytest.mark.parametrize("to, file", [("gguf", "lora.gguf"), ("mlx", "adapters.safetensors")])
def test_a_language_models_adapter_goes_to_llama_cpp_and_mlx(folder, tmp_path, capsys, to, file) -> None:
    status, out, err = call(capsys, "export", folder("chat"), "--to", to, "--out", tmp_path / "lora")
    assert status == 0, err
    assert file in out and "times as much" in out and (tmp_path / "lora" / file).is_file()
    assert "gguf, mlx" in call(capsys, "inspect", folder("chat"))[1]


@pytest.mark.parametrize("kind", ["image", "chat"])
def test_a_transform_of_images_and_conversations_is_cut_and_judged_on_their_data(
    folder, tmp_path, capsys, kind
) -> None:
    words = ["--to", "peft", "--out", tmp_path / "lora", "--rank", "3", "--allow-loss"]
    status, out, err = call(capsys, "export", folder(kind, "oft"), *words)
    assert status == 0, err
    assert "layers cut to rank 3, weighted by" in out and "rows of train" in out
    assert re.search(r"end to end +\S+ of the adapter's effect \(\S+ to \S+\), on \d+ rows of validation", out)


def test_a_pipeline_is_merged_too(sd, tmp_path, capsys) -> None:
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(sd)
    adapter = smidgen.save(smidgen.testing.perturb(smidgen.adapt(pipe.unet, "svfit", r=2)), tmp_path / "adapter")
    inputs = {"sample": torch.randn(1, 4, 8, 8), "timestep": 3, "encoder_hidden_states": torch.randn(1, 5, 32)}
    inputs["encoder_hidden_states"] = torch.randn(1, 5, pipe.unet.config.cross_attention_dim)
    inputs["sample"] = torch.randn(1, pipe.unet.config.in_channels, 8, 8)
    status, _, err = call(capsys, "merge", adapter, "--base", sd, "--out", tmp_path / "model")
    assert status == 0, err
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "model").unet
    with torch.no_grad():
        torch.testing.assert_close(plain(**inputs).sample, pipe.unet(**inputs).sample, atol=1e-5, rtol=1e-4)


# ---- going on ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svfit", "lora", "peft:lora", pytest.param("tlora", marks=pytest.mark.slow)])
def test_going_on_begins_where_the_adapter_ended(folder, tmp_path, method) -> None:
    start = folder("text", method) if method != "lora" else untrained(tmp_path / "start", method="lora")
    made = config("text", tmp_path / "out", method, from_adapter=start)
    still = {"learning_rate": 1e-12, "transform_learning_rate": 1e-12, "head_learning_rate": 1e-12, "rank": None}
    run("text", replace(made, adapter=replace(made.adapter, **still)))
    before, after = (load_file(place / FILES[1]) for place in (start, tmp_path / "out"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)


def test_going_on_moves_the_adapter(folder, tmp_path) -> None:
    made = config("text", tmp_path / "out", from_adapter=folder("text"))
    run("text", made)
    before, after = (load_file(place / FILES[1])["residual_delta"] for place in (folder("text"), tmp_path / "out"))
    assert not torch.equal(before, after)
    assert json.loads((tmp_path / "out" / "report.json").read_text())["settings"]["from_adapter"]


def test_flags_begin_with_the_adapters_own(tmp_path, capsys) -> None:
    words = [
        "train",
        "text-classification",
        "debug-text",
        "--from-adapter",
        untrained(tmp_path / "start", method="lora"),
        "--max-length",
        16,
    ]
    words += ["--num-train-epochs", 3, "--train-batch-size", 8, "--lr-warmup-steps", 0, "--no-load-best"]
    status, out, _ = call(capsys, *words, "--out", tmp_path / "out")
    assert status == 0 and "| lora " in out
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["base"], report["settings"]["train.max_train_steps"]) == ("debug-text", 3 * 56 // 8)


REFUSED = [
    (["--method", "svfit"], "is a lora adapter, and the settings ask for svfit"),
    (["--rank", "3"], "has rank 2, and the settings ask for 3"),
    (["--target-modules", "query"], "say otherwise: leave them out"),
    (["--budget", "5kB"], "leave out --budget"),
    (["--method", "full"], "leave out --method full"),
    (["--model", "debug-chat"], "no module is named 'query'"),
]


def test_what_differs_is_refused_in_words(tmp_path, capsys) -> None:
    start = untrained(tmp_path / "start", method="lora")
    begin = ["train", "text-classification", "debug-text", "--from-adapter", start, "--max-length", 16]
    for words, message in REFUSED:
        status, _, err = call(capsys, *begin, *words, "--out", tmp_path / "out")
        assert status == 2 and message in err and not (tmp_path / "out").exists(), words


def test_other_classes_tasks_and_places_are_refused(folder, tmp_path) -> None:
    start = untrained(tmp_path / "start", method="lora")
    (tmp_path / "sets.jsonl").write_text(
        "\n".join(
            json.dumps({"text": f"the {thing} was {word}", "label": word}) for thing in debug.THINGS for word in "xy"
        )
    )
    made = config("text", tmp_path / "out", "lora", from_adapter=start)
    with pytest.raises(ConfigError, match=r"sorts into bad, good, and the data has x, y"):
        run("text", replace(made, data=replace(made.data, path=str(tmp_path / "sets.jsonl"))))
    with pytest.raises(ConfigError, match=r"is an adapter for text-classification, and this is image-classification"):
        run("image", config("image", tmp_path / "out", "lora", from_adapter=start))
    with pytest.raises(ConfigError, match="is --out too"):
        run("text", replace(made, out=start, overwrite=True))
    with pytest.raises(ConfigError, match="no adapter to go on from"):
        run("text", replace(made, from_adapter=folder("text", "linear_probe")))
    assert all((start / name).is_file() for name in FILES) and not (tmp_path / "out").exists()


def test_only_the_adapter_and_its_head_train_on(folder) -> None:
    model = Classifier(folder("text", "linear_probe")).model
    engine.go_on(model, folder("text"))
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trained) == 4 + 2
    assert all(".smidgen_slots.default." in name or ".modules_to_save.default." in name for name in trained)


# ---- adapters that draw --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(sd, tmp_path_factory):
    """Two folders as a prediction leaves them, of one tiny base."""
    from diffusers import StableDiffusionPipeline

    root = tmp_path_factory.mktemp("drawn")
    for at, name in enumerate(("ann", "bob")):
        unet = smidgen.adapt(StableDiffusionPipeline.from_pretrained(sd).unet, "lora", r=2, target_modules=["to_q"])
        smidgen.save(smidgen.testing.perturb(unet, at, 0.3), root / name)
        (root / name / "recipe.json").write_text(json.dumps({"format": 1, "base": str(sd)}))
    return root / "ann", root / "bob"


def test_several_adapters_draw_with_their_weights(drawn, sd, tmp_path, capsys) -> None:
    def draw(name: str, *words: object) -> bytes:
        out = tmp_path / f"{name}.png"
        status, _, err = call(capsys, "generate", *words, "--prompt", "a person", "--steps", 2, "--out", out)
        assert status == 0, err
        with Image.open(out) as image:
            return image.tobytes()

    ann, bob = drawn
    alone = draw("alone", ann)  # which finds its base by itself
    assert alone == draw("named", ann, "--base", sd) == draw("first", ann, bob, "--weights", "1,0")
    both = draw("both", ann, bob, "--weights", "0.7,0.5")
    summed = smidgen.combine([ann, bob], [0.7, 0.5], out=tmp_path / "sum")
    wanted = draw("sum", summed, "--base", sd)
    assert both != alone and max(abs(a - b) for a, b in zip(both, wanted, strict=True)) <= 1
    with Image.open(tmp_path / "both.png") as image:
        facts = json.loads(image.info["smidgen"])
    assert [(one["name"], one["weight"]) for one in facts["adapters"]] == [("ann", 0.7), ("bob", 0.5)]


@pytest.mark.parametrize("words, message", [
    (["--weights", "1"], "2 adapters take 2 weights, got 1"),
    (["--weights", "1,x"], "numbers with commas"),
    (["--weights", "1,99"], "strength must be from -10 to 10"),
])  # fmt: skip
def test_weights_that_cannot_be_meant(drawn, tmp_path, capsys, words, message) -> None:
    status, _, err = call(capsys, "generate", *drawn, *words, "--prompt", "a", "--out", tmp_path / "out")
    assert status == 2 and message in err and not (tmp_path / "out").exists()


def test_adapters_of_two_bases_or_of_texts_do_not_draw(drawn, folder, tmp_path, capsys) -> None:
    other = tmp_path / "other"
    shutil.copytree(drawn[1], other)
    (other / "recipe.json").write_text(json.dumps({"base": "embedded"}))
    for pair, message in (((drawn[0], other), "adapters of one base add up"), ((folder("text"),), "does not draw")):
        status, _, err = call(capsys, "generate", *pair, "--prompt", "a", "--out", tmp_path / "out")
        assert status == 2 and message in err


def test_personalize_goes_on_from_a_predicted_adapter(drawn, pictures, tmp_path, capsys) -> None:
    words = ["personalize", pictures, "--preset", "debug", "--from-adapter", drawn[0], "--no-compare-lora"]
    status, out, err = call(capsys, *words, "--learning-rate", "1e-12", "--out", tmp_path / "out")
    assert status == 0 and "| lora " in out, err
    before, after = (load_file(place / FILES[1]) for place in (drawn[0], tmp_path / "out"))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, atol=1e-6, rtol=0)
    for more, message in (
        (["--target-modules", "to_v"], "say otherwise"),
        (["--train-text-encoder"], "leave out --train-text-encoder"),
    ):
        status, _, err = call(capsys, *words, *more, "--out", tmp_path / "refused")
        assert status == 2 and message in err and not (tmp_path / "refused").exists(), err
