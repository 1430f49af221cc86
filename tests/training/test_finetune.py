"""The three recipes end to end: every family of models, every kind of adapter, heads, refusals, exact resume."""

import json
import shutil
from dataclasses import replace

import peft
import pytest
import torch
from safetensors.torch import load_file

import smidgen
from smidgen.adapters.methods import Rates, learning_rates
from smidgen.bases.packaged import debug
from smidgen.bases.transformers import Head, load_classifier
from smidgen.errors import CheckpointError, ConfigError, DataError, TargetError, TrainingError
from smidgen.tasks.finetune import course
from smidgen.tasks.finetune.course import _settled
from smidgen.tasks.finetune.settings import Adapter, FinetuneConfig, rates, setup
from smidgen.tasks.image_classification import recipe as image_classification
from smidgen.tasks.instruction import recipe as instruction
from smidgen.tasks.text_classification import recipe as text_classification
from smidgen.tasks.text_classification.settings import TextData
from smidgen.training import engine
from smidgen.training.loop import LoopConfig
from tests.training import tiny_models

RECIPES = {
    "text": (text_classification, text_classification.text_classification),
    "image": (image_classification, image_classification.image_classification),
    "chat": (instruction, instruction.instruction),
}
ADAPTER = ["README.md", "adapter_config.json", "adapter_model.safetensors"]
FILES = [*ADAPTER, "checkpoint-2", "checkpoint-4", "config.yaml", "loss.png", "report.json"]


def config(kind, out, method="svfit", **changes):
    made = replace(RECIPES[kind][0].PRESETS["debug"], out=out)
    options = {"rank": 2} if method in ("lora", "peft:lora") else {}
    adapter = replace(made.adapter, method=method, **({"rank": None} | options))
    train = replace(made.train, eval_steps=0)
    return replace(made, adapter=adapter, train=train, **changes)


def run(kind, made):
    return RECIPES[kind][1](made, progress=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return lambda kind, causal=False: str(tiny_models.folder(kind, root, causal))


# ---- every family ----------------------------------------------------------------------------------------------------

HEADS = {
    "bert": {"classifier"},
    "roberta": {"classifier"},
    "distilbert": {"pre_classifier", "classifier"},
    "deberta": {"pooler", "classifier"},
    "mpnet": {"classifier"},
    "gpt2": {"score"},
    "llama": {"score"},
    "vit": {"classifier"},
    "dinov2": {"classifier"},
    "resnet": {"classifier"},
}


@pytest.mark.parametrize("family", tiny_models.TEXT)
def test_text_families_and_both_ways_back(models, tmp_path, family):
    made = config("text", tmp_path / "out", model=models(family))
    report = run("text", made)
    prepared = text_classification.prepare(made)
    assert set(prepared.heads) == HEADS[family]
    _comes_back(prepared, tmp_path / "out", report)


@pytest.mark.parametrize("family, method", [("vit", "svfit"), ("dinov2", "loldu"), ("resnet", "lora")])
def test_image_families_and_both_ways_back(models, tmp_path, family, method):
    made = config("image", tmp_path / "out", method, model=models(family))
    if family == "resnet":
        made = replace(made, adapter=replace(made.adapter, target_modules=("convolution",)))
    report = run("image", made)
    prepared = image_classification.prepare(made)
    assert set(prepared.heads) == HEADS[family]
    _comes_back(prepared, tmp_path / "out", report)


def _comes_back(prepared, out, report):
    """The file gives the same test scores through smidgen and through peft, and another model than the base."""
    base = prepared.task.predict(prepared.model, "test")
    ours, theirs = prepared.fresh(), prepared.fresh()
    smidgen.load(ours, out)
    theirs = peft.PeftModel.from_pretrained(theirs, str(out))
    for model in (ours, theirs):
        found = prepared.task.predict(model, "test")
        assert prepared.task.scores(found, "test") == pytest.approx(report.scores["test"], rel=1e-4)
        assert not torch.allclose(found, base)
    assert prepared.task.scores(base, "test") == pytest.approx(report.scores["base"], rel=1e-4)


@pytest.mark.parametrize("family", tiny_models.CHAT)
def test_chat_families(models, tmp_path, family):
    report = run("chat", config("chat", tmp_path / "out", model=models(family, causal=True)))
    assert report.head_numbers == 0 and report.scores["test"]["nll"] < report.scores["base"]["nll"]


def test_other_resolutions(models, tmp_path):
    for family, interpolate in (("vit", True), ("dinov2", False)):
        made = config("image", tmp_path / family, model=models(family))
        prepared = image_classification.prepare(replace(made, data=replace(made.data, resolution=40)))
        assert prepared.task.interpolate is interpolate
        assert prepared.task.predict(prepared.model, "test").shape == (7, 3)


# ---- every kind of adapter -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("method", ["tlora", "peft:lora", "linear_probe", "full"])
def test_adapters_and_controls(tmp_path, kind, method):
    made = config(kind, tmp_path / "out", method)
    if (kind, method) == ("chat", "linear_probe"):
        with pytest.raises(ConfigError, match="linear_probe trains a head"):
            run(kind, made)
        return
    report = run(kind, made)
    files = {"linear_probe": ["control.json", "head.safetensors"], "full": ["control.json", "model.safetensors"]}
    written = [tmp_path / "out" / name for name in files.get(method, ADAPTER[1:])]
    extra = [p for name in ("config.json", "generation_config.json") if (p := tmp_path / "out" / name).exists()]
    assert report.bytes_on_disk == sum(path.stat().st_size for path in [*written, *extra])
    stored = sum(tensor.numel() for tensor in load_file(written[1]).values())
    if method != "full":  # a model's file may hold numbers that are not trained, and tied ones once
        assert report.trained_numbers + report.head_numbers == stored
    assert report.head_bytes == 4 * report.head_numbers and (report.head_numbers == 0) == (kind == "chat")
    assert not json.loads((tmp_path / "out" / "report.json").read_text()).get("adapter")


def test_peft_lora_with_a_head_comes_back_through_peft_alone(tmp_path):
    made = config("text", tmp_path / "out", "peft:lora")
    report = run("text", made)
    prepared = text_classification.prepare(made)
    model = peft.PeftModel.from_pretrained(prepared.fresh(), str(tmp_path / "out"))
    found = prepared.task.evaluate_split(model, "test")
    assert found == pytest.approx(report.scores["test"], rel=1e-4)


def test_any_transform_with_any_residual_and_output_transform(tmp_path):
    made = config("text", tmp_path / "out")
    members = {"transform": "rotation", "residual": "low_rank", "output": "scale"}
    run("text", replace(made, adapter=Adapter("svfit", **members, learning_rate=0.01)))
    stored = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert {side: stored[side] for side in members} == members


def test_an_output_transform_is_known_or_refused():
    assert rates(Adapter("lora", output="scale"), "encoder").output == learning_rates("ia3", "encoder").residual
    with pytest.raises(ConfigError, match=r"Did you mean 'magnitude'\? Known: .*--out"):
        Adapter("lora", output="magnitud")
    with pytest.raises(ConfigError, match="output is for smidgen's own methods, peft:lora has none"):
        setup(Adapter("peft:lora", output="scale"), ["q"], 0)
    with pytest.raises(ConfigError, match="leave out output, or the budget"):
        _settled(FinetuneConfig(adapter=Adapter(budget="5kB", output="scale")))


def test_a_budget_decides_ranks_and_targets(tmp_path):
    made = config("text", tmp_path / "out")
    report = run("text", replace(made, adapter=Adapter(budget="1500")))
    stored = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert report.trained_numbers > 0 and report.bytes_on_disk - report.head_bytes <= 1500 + 300  # the head's names
    assert stored["modules_to_save"] == ["classifier"] and report.method == stored["method"] == "seeded"
    with pytest.raises(ConfigError, match="leave out rank, or the budget"):
        run("text", replace(made, adapter=Adapter(budget="1500", rank=3)))
    with pytest.raises(ConfigError, match="leave out method tlora"):
        run("text", replace(made, adapter=Adapter("tlora", budget="1500")))


@pytest.mark.parametrize(
    "changed, error, said",
    [
        ({"budget": "300"}, ConfigError, "Give at least"),
        ({"target_modules": ("nowhere",)}, TargetError, "nowhere"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_head_is_probed(changed, error, said, tmp_path, monkeypatch):
    monkeypatch.setattr(course, "fit_probe", lambda *_: pytest.fail("minutes went into the head"))
    made = config("text", tmp_path / "out")
    with pytest.raises(error, match=said):
        run("text", replace(made, adapter=replace(Adapter(), **changed)))
    assert not made.out.exists()


def test_few_bits_are_scored_as_their_file_has_them(tmp_path):
    first = config("text", tmp_path / "first")
    first = replace(first, adapter=replace(first.adapter, store_dtype="int4"))
    report = run("text", first)
    stored = load_file(first.out / "adapter_model.safetensors")
    assert stored["residual_delta"].dtype == torch.uint8
    heads = [value for name, value in stored.items() if name != "residual_delta"]
    assert report.head_bytes == sum(value.numel() * 2 for value in heads) and heads[0].dtype == torch.float16
    assert any("differ from the trained model's by" in note and "0.0e+00" in note for note in report.notes), (
        report.notes
    )
    then = run("text", config("text", tmp_path / "then", from_adapter=first.out))
    assert then.head_bytes == report.head_bytes
    assert json.loads((tmp_path / "then" / "adapter_config.json").read_text())["store_dtype"] == "int4"
    for method in ("linear_probe", "peft:lora"):
        made = config("text", tmp_path / "not", method)
        with pytest.raises(ConfigError, match="store_dtype is for smidgen's own methods"):
            run("text", replace(made, adapter=replace(made.adapter, store_dtype="int8")))
    budgeted = config("text", tmp_path / "budget")
    adapter = replace(Adapter(), budget="3kB", store_dtype="int8")
    run("text", replace(budgeted, adapter=adapter))
    assert load_file(budgeted.out / "adapter_model.safetensors")["residual_delta"].dtype == torch.uint8


def test_numbers_are_predicted(tmp_path):
    rows = "".join(f"the {thing} was {n},{n / 4}\n" for n, thing in enumerate(debug.THINGS * 2))
    (tmp_path / "data.csv").write_text("sentence1,label\n" + rows)
    data = TextData(str(tmp_path / "data.csv"), text_column="sentence1", regression=True, max_length=16)
    report = run("text", config("text", tmp_path / "out", data=data))
    assert report.metric == "pearson" and -1 <= report.scores["test"]["pearson"] <= 1 and report.labels == ()


def several(tmp_path):
    """Texts, each with none, one or both of two labels."""
    rows = [
        {"text": f"the {thing} was {n}", "label": ["warm"] * (n % 2) + ["wet"] * (n % 3 == 0)}
        for n, thing in enumerate(debug.THINGS * 3)
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return TextData(str(tmp_path / "data.jsonl"), max_length=16)


@pytest.mark.parametrize("method", ["svfit", "full"])
def test_several_labels_are_predicted_reported_and_reloaded(tmp_path, method):
    made = config("text", tmp_path / "out", method, data=several(tmp_path))
    report = run("text", made)
    assert report.metric == "f1_micro" and report.problem == "multi_label_classification"
    assert {"f1_micro", "f1_macro", "subset_accuracy", "loss"} == set(report.scores["test"])
    rows = {split: len(part) for split, part in text_classification.prepare(made).task.splits.items()}
    held = f"measured on {rows['validation']} of validation, {rows['test']} of test."
    assert report.notes[0] == f"Trained on {rows['train']} texts of 2 labels; {held}"  # rows, not labels
    assert "always the commonest" in report.table() and "subset_accuracy" in report.table()
    prepared = text_classification.prepare(made)
    assert prepared.model.config.problem_type == "multi_label_classification"
    batch = prepared.task.batch(0)
    logits = prepared.model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    by_hand = torch.nn.functional.binary_cross_entropy(logits.sigmoid(), batch["labels"])
    torch.testing.assert_close(prepared.task.loss(prepared.model, batch), by_hand)
    if method == "svfit":
        _comes_back(prepared, tmp_path / "out", report)
    else:
        stored = json.loads((tmp_path / "out" / "config.json").read_text())
        assert stored["problem_type"] == "multi_label_classification" and stored["id2label"] == {
            "0": "warm",
            "1": "wet",
        }


def test_several_labels_of_pictures(tmp_path):
    rows = []
    for number, (_, name, content) in enumerate(debug.squares()):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{name}.png").write_bytes(content)
        rows.append({"file_name": f"{name}.png", "label": ["warm"] * (number % 2) + ["wet"] * (number % 3 == 0)})
    (tmp_path / "data" / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    made = config("image", tmp_path / "out")
    made = replace(made, data=replace(made.data, path=str(tmp_path / "data"), class_weights="balanced"))
    report = run("image", made)
    assert report.problem == "multi_label_classification" and report.labels == ("warm", "wet")
    prepared = image_classification.prepare(made)
    assert prepared.task.batch(0)["labels"].shape == (8, 2) and prepared.task.weights.shape == (2,)
    _comes_back(prepared, tmp_path / "out", report)


def test_balanced_classes_change_what_is_learnt_but_not_the_scores_meaning(tmp_path):
    made = config("text", tmp_path / "out")
    plain, balanced = (
        text_classification.prepare(replace(made, data=replace(made.data, class_weights=how)))
        for how in ("none", "balanced")
    )
    batch = balanced.task.batch(0)
    counts = torch.bincount(balanced.task.splits["train"].labels)
    torch.testing.assert_close(balanced.task.weights, counts.sum() / (len(counts) * counts))
    assert batch["weight"] == pytest.approx(float(balanced.task.weights[batch["labels"]].sum()))
    assert plain.task.weights is None and plain.task.batch(0)["weight"] == float(len(batch["labels"]))
    scores = plain.task.evaluate_split(plain.model, "test")
    assert balanced.task.evaluate_split(balanced.model, "test") == pytest.approx(scores)


def test_the_commonest_answer_stands_beside_the_scores(tmp_path):
    report = run("text", config("text", tmp_path / "out"))
    told = [note for note in report.notes if "the commonest of train, would score accuracy" in note]
    assert len(told) == 1 and told[0] in (tmp_path / "out" / "README.md").read_text()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["scores"]["majority"] == report.scores["majority"]


def test_glue_names_set_columns_and_metric():
    resolved = text_classification.resolved(TextData(glue_task="mrpc"))
    assert (resolved.text_column, resolved.text_pair_column, resolved.metric) == ("sentence1", "sentence2", "f1")
    assert text_classification.resolved(TextData(glue_task="stsb", metric="spearman")).metric == "spearman"
    with pytest.raises(ConfigError, match="glue_task 'cola' sets text_column to 'sentence'"):
        text_classification.resolved(TextData(glue_task="cola", text_column="words"))


# ---- heads -----------------------------------------------------------------------------------------------------------


def test_a_heads_start_follows_from_the_seed_alone(models):
    def head(seed):
        torch.manual_seed(torch.seed() % 2**31)
        base = load_classifier(
            "AutoModelForSequenceClassification", models("roberta"), Head(("a", "b")), seed, "no", None
        )
        return {name: p for name, p in base.model.named_parameters() if name.startswith("classifier")}

    first, again, other = head(3), head(3), head(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["classifier.dense.weight"], other["classifier.dense.weight"])
    assert not first["classifier.dense.bias"].any()


def test_a_trained_head_of_the_right_size_keeps_its_numbers(models, tmp_path):
    def load(name, labels):
        return load_classifier("AutoModelForSequenceClassification", name, Head(labels), 0, "no", None)

    first = load(models("bert"), ("a", "b"))
    with torch.no_grad():
        first.model.classifier.weight.fill_(0.25)
    first.model.save_pretrained(tmp_path / "trained")
    shutil.copy(tmp_path / "trained" / "config.json", tmp_path / "config.json")
    same, other = load(str(tmp_path / "trained"), ("x", "y")), load(str(tmp_path / "trained"), ("x", "y", "z"))
    assert bool((same.model.classifier.weight == 0.25).all()) and same.heads == ("classifier",)
    assert same.model.config.id2label == {0: "x", 1: "y"}
    assert other.model.classifier.weight.shape[0] == 3 and other.heads == ("classifier",)


def test_a_pooler_the_folder_lacks_is_a_head_too(models, tmp_path):
    shutil.copytree(models("bert"), tmp_path / "bert")
    tensors = load_file(tmp_path / "bert" / "model.safetensors")
    from safetensors.torch import save_file

    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("pooler")}
    save_file(kept, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    made = config("text", tmp_path / "out", model=str(tmp_path / "bert"))
    report = run("text", made)
    prepared = text_classification.prepare(made)
    assert set(prepared.heads) == {"bert.pooler", "classifier"}
    _comes_back(prepared, tmp_path / "out", report)
    del kept["encoder.layer.0.output.dense.weight"]
    save_file(kept, tmp_path / "bert" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks 'bert\.encoder\.layer\.0\.output\.dense\.weight'.*part of the base"):
        text_classification.prepare(made)


def test_the_head_has_a_learning_rate_of_its_own(tmp_path):
    made = config("text", tmp_path / "out")
    prepared = text_classification.prepare(made)
    setup = smidgen.config("tlora", target_modules=["query"])
    engine.adapt(prepared.model, setup, prepared.heads)
    groups = engine.groups(prepared.model, Rates(0.1, 0.2, 0.3), 0.0, prepared.heads)
    assert {group["name"]: group["lr"] for group in groups} == {"residual": 0.1, "transform": 0.2, "head": 0.3}
    head = {id(p) for p in groups[-1]["params"]}
    trained = [p for p in prepared.model.parameters() if p.requires_grad]
    assert head == {id(p) for p in engine.head_parameters(prepared.model, prepared.heads)} and len(head) == 2
    assert sum(len(group["params"]) for group in groups) == len(trained)


# ---- exact resume ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", RECIPES)
def test_resume_gives_the_same_files(tmp_path, kind):
    whole = replace(config(kind, tmp_path / "whole"), adapter=replace(config(kind, tmp_path).adapter, method="tlora"))
    whole = replace(whole, train=replace(whole.train, eval_steps=2))
    run(kind, whole)
    broken = replace(whole, out=tmp_path / "broken")
    run(kind, broken)
    shutil.rmtree(tmp_path / "broken" / "checkpoint-4")
    (tmp_path / "broken" / "adapter_model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"already holds checkpoint-2.*--overwrite"):
        run(kind, broken)
    other = replace(broken, adapter=replace(broken.adapter, transform_rank=3), resume_from_checkpoint="latest")
    with pytest.raises(CheckpointError, match=r"adapter\.transform_rank: None then, 3 now"):
        run(kind, other)
    again = run(kind, replace(broken, resume_from_checkpoint="latest"))
    for name in ADAPTER[1:]:
        assert (tmp_path / "broken" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [entry["step"] for entry in again.evaluations] == [0, 2, 4]


def test_resume_refuses_other_data(tmp_path):
    shutil.copytree(debug.data_folder("debug-text"), tmp_path / "data")
    made = config("text", tmp_path / "out")
    made = replace(made, data=replace(made.data, path=str(tmp_path / "data")))
    run("text", made)
    (tmp_path / "data" / "validation.parquet").unlink()
    with pytest.raises(CheckpointError, match="data: "):
        run("text", replace(made, resume_from_checkpoint="latest"))
    run("text", replace(made, overwrite=True))


# ---- what is left behind, what is refused ----------------------------------------------------------------------------


def test_what_is_left_behind_can_be_read(tmp_path):
    made = config("text", tmp_path / "out")
    report = run("text", replace(made, train=replace(made.train, eval_steps=2)))
    assert sorted(p.name for p in (tmp_path / "out").iterdir() if p.name != "checkpoint-0") == sorted(FILES)
    saved = json.loads((tmp_path / "out" / "report.json").read_text())
    assert saved["verified"] and saved["labels"] == ["bad", "good"] and saved["counts"]["test"] == {"bad": 6, "good": 6}
    assert [entry["step"] for entry in saved["evaluations"]] == [0, 2, 4] and saved["best_step"] in (0, 2, 4)
    assert set(saved["scores"]) == {"base", "majority", "head", "test", "validation"} and saved["coverage"]["entries"]
    text = (tmp_path / "out" / "README.md").read_text() + (tmp_path / "out" / "adapter_config.json").read_text()
    assert (
        str(tmp_path) not in text and "/root" not in text and report.figures() in text and "## What it covers" in text
    )


@pytest.mark.parametrize("kind", RECIPES)
@pytest.mark.parametrize("why", ["no such layer", "not reached"])
def test_nothing_is_left_of_a_run_refused_before_its_first_step(tmp_path, monkeypatch, kind, why):
    made = config(kind, tmp_path / "above" / "out")
    made = replace(made, train=replace(made.train, eval_steps=2))  # which writes checkpoint-0
    if why == "no such layer":
        made = replace(made, adapter=replace(made.adapter, target_modules=("nothing",)))
    else:

        def refuse(self):
            raise TrainingError("not reached")

        monkeypatch.setattr("smidgen.training.reach.Reach.check", refuse)
    with pytest.raises((TrainingError, TargetError)):
        run(kind, made)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "above" / "out").mkdir(parents=True)
    (tmp_path / "above" / "out" / "mine.txt").write_text("mine")
    with pytest.raises((TrainingError, TargetError)):
        run(kind, made)
    assert [path.name for path in (tmp_path / "above" / "out").iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    "kind, method", [("text", "svfit"), ("chat", "peft:lora"), ("image", "linear_probe"), ("text", "full")]
)
def test_the_cards_code_runs(tmp_path, capsys, kind, method):
    run(kind, config(kind, tmp_path / "out", method))
    card = (tmp_path / "out" / "README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    name = f"debug-{kind}"
    code = code.replace("path/of/this/folder", str(tmp_path / "out")).replace(
        repr(name), repr(str(debug.model_folder(name)))
    )
    found = {}
    exec(code, found)
    assert not found["model"].training
    if kind == "text":
        assert capsys.readouterr().out.strip() in ("good", "bad")


def test_the_cards_code_runs_for_several_labels(tmp_path, capsys):
    run("text", config("text", tmp_path / "out", data=several(tmp_path)))
    code = (tmp_path / "out" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace("path/of/this/folder", str(tmp_path / "out"))
    found = {}
    exec(code.replace("'debug-text'", repr(str(debug.model_folder("debug-text")))), found)
    assert capsys.readouterr().out.strip() in ("[]", "['warm']", "['wet']", "['warm', 'wet']")
    assert found["model"].config.problem_type == "multi_label_classification"


def test_an_adapter_that_is_best_untrained_is_refused(tmp_path, monkeypatch):
    made = config("text", tmp_path / "out")
    made = replace(made, train=replace(made.train, eval_steps=2, load_best=True))
    seen = iter([0.9, 0.5, 0.5])
    task = text_classification.TextClassificationTask
    monkeypatch.setattr(task, "evaluate", lambda self, model: {"accuracy": next(seen)})
    with pytest.raises(TrainingError, match=r"accuracy: 0\.9000 at step 0, 0\.5000 at step 2.*--no-load-best"):
        run("text", made)
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


def test_a_diverging_run_names_its_rows(tmp_path, monkeypatch):
    task = text_classification.TextClassificationTask
    monkeypatch.setattr(task, "loss", lambda self, model, batch: model.classifier.weight.sum() * float("nan"))
    with pytest.raises(TrainingError, match=r"loss of step 1 is nan.*train\.parquet row"):
        run("text", config("text", tmp_path / "out"))
    assert not (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("kind, section, change, error, message", [
    ("text", "data", {"path": None}, DataError, r"Which data\? Give a file, a folder, or a packaged name \(tweets"),
    ("text", "data", {"path": "twets"}, DataError, "There is no data at twets"),
    ("text", "data", {"max_length": 65}, ConfigError, "max_length must be from 4 to 64 .* not 65"),
    ("text", "data", {"metric": "pearson"}, ConfigError, "'pearson' is for numbers"),
    ("text", "", {"model": "/nowhere/model"}, ConfigError, "There is no model folder '/nowhere/model'"),
    ("text", "", {"model": "minilmm"}, ConfigError, "'minilmm' cannot be loaded.*Did you mean 'minilm'"),
    ("text", "", {"dropout": 1.5}, ConfigError, "dropout must be at least 0 and below 1, not 1.5"),
    ("text", "adapter", {"method": "svift"}, ConfigError, "No learning rate is known for 'svift'|Did you mean 'svfit'"),
    ("text", "adapter", {"method": "peft:loar"}, ConfigError, "Did you mean 'lora'"),
    ("text", "adapter", {"target_modules": ("qeury",)}, smidgen.TargetError, "Did you mean 'query'"),
    ("text", "adapter", {"residual": "spectrall"}, ConfigError, "Did you mean 'spectral'"),
    ("image", "data", {"resolution": 50}, ConfigError, "multiple of the model's patch"),
    ("image", "data", {"max_train_examples": 0}, ConfigError, "max_train_examples must be from 1 to"),
    ("chat", "", {"model": "debug-text"}, ConfigError, "does not hold a whole language model|cannot be loaded"),
])  # fmt: skip
def test_refusals_come_before_any_training(tmp_path, kind, section, change, error, message):
    made = config(kind, tmp_path / "out")
    with pytest.raises(error, match=message):
        run(kind, replace(made, **({section: replace(getattr(made, section), **change)} if section else change)))
    assert not list((tmp_path / "out").glob("checkpoint-*")) and not (tmp_path / "out" / ADAPTER[2]).exists()


def test_dropout_is_the_models_own_unless_set(tmp_path):
    own = text_classification.prepare(config("text", tmp_path)).model
    none = text_classification.prepare(config("text", tmp_path, dropout=0.0)).model
    rates = [{m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} for model in (own, none)]
    assert rates == [{0.1}, {0.0}]


def test_bf16_bases_train_fp32_numbers(tmp_path):
    made = config("text", tmp_path / "out")
    run("text", replace(made, train=LoopConfig(4, lr_warmup_steps=1, checkpointing_steps=2, mixed_precision="bf16")))
    stored = load_file(tmp_path / "out" / "checkpoint-4" / "trained.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}


# ---- the head and what it can do alone -------------------------------------------------------------------------------


def test_the_head_starts_from_a_probe_where_asked(tmp_path):
    made = config("text", tmp_path / "out")
    made = replace(made, train=replace(made.train, eval_steps=2, load_best=False))
    starts = {}
    for head in ("auto", "probe", "fresh"):
        report = run("text", replace(made, head=head, out=tmp_path / head))
        starts[head] = report.evaluations[0]["loss"]
        assert "head" in report.scores and "| head alone" in report.table()
    assert starts["auto"] == starts["probe"] < starts["fresh"]


def test_an_adapter_worse_than_the_head_alone_says_so_first(tmp_path):
    made = config("text", tmp_path / "out", "lora")
    made = replace(made, adapter=replace(made.adapter, learning_rate=20.0), train=replace(made.train, load_best=False))
    report = run("text", made)
    assert report.scores["validation"]["accuracy"] < 0.95
    assert (
        report.table().startswith("**Worse than the head alone**: accuracy 0.")
        and "--method linear_probe" in report.headline
    )


def test_a_probe_needs_a_head(tmp_path):
    with pytest.raises(ConfigError, match="no linear head"):
        run("chat", config("chat", tmp_path / "out", head="probe"))


def test_states_from_memory_and_bf16_change_no_answer_that_matters(tmp_path):
    made = config("text", tmp_path / "out", "lora", dropout=0.0)
    made = replace(made, adapter=replace(made.adapter, target_modules=("layer.1.attention.self.value",)))
    made = replace(made, train=replace(made.train, max_train_steps=12))
    first = run("text", made)
    again = run("text", replace(made, cache_mb=0, out=tmp_path / "again"))
    assert again.scores["test"]["loss"] == pytest.approx(first.scores["test"]["loss"], rel=1e-3)
    half = run("text", replace(made, frozen_matmuls="bf16", out=tmp_path / "half"))
    assert half.scores["test"]["loss"] == pytest.approx(first.scores["test"]["loss"], abs=0.05)
