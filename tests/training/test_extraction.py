"""From two folders to an adapter that does what the fine-tuned model does, by the command line."""

import copy
import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import smidgen
from smidgen import testing
from smidgen.adapters.export import export
from smidgen.bases.checkpoints import named_alike, read_checkpoint
from smidgen.bases.families import load_base
from smidgen.cli import main
from smidgen.errors import ConfigError, SmidgenError
from smidgen.tasks.extraction import extract
from tests.adapters.exported import changes

TARGETS = ["query", "value"]


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """Folders of the debug BERT with a head, after an svfit adapter was merged, and after every number was moved."""
    transformers = pytest.importorskip("transformers")
    from smidgen.bases.packaged import debug

    folder, base = tmp_path_factory.mktemp("tuned"), str(debug.model_folder("debug-text"))
    torch.manual_seed(0)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    made = smidgen.merge(
        testing.perturb(smidgen.adapt(copy.deepcopy(model), "svfit", r=4, target_modules=TARGETS), 1, 0.3)
    )
    made.save_pretrained(folder / "svfit")
    with torch.no_grad():
        for p in model.parameters():
            p += 0.02 * torch.randn_like(p)
    model.save_pretrained(folder / "full")
    transformers.AutoTokenizer.from_pretrained(base).save_pretrained(folder / "full")
    texts = [
        {"text": f"the {thing} was {word}", "label": at % 2}
        for at, thing in enumerate(("film", "book", "song", "day"))
        for word in ("good", "bad")
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return folder


def test_a_merged_adapter_is_found_in_folders_and_works_on_the_base(tuned, tmp_path):
    import transformers

    found = extract("debug-text", str(tuned / "svfit"), tmp_path / "out", methods=["svfit", "lora", "oft"])[""]
    assert (
        found.chosen.label == "svfit r=4" and found.new and all("classifier" in n or "pooler" in n for n in found.new)
    )
    assert next(iter(found.score.values())) < 1e-4
    base = read_checkpoint("debug-text")[""].path
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    smidgen.load(model, tmp_path / "out")
    wanted = transformers.AutoModelForSequenceClassification.from_pretrained(tuned / "svfit")
    ids = torch.arange(5, 17)[None]
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, wanted.eval()(ids).logits, rtol=1e-4, atol=1e-5)


def test_the_classes_of_a_classifier_go_into_the_adapter(tuned, tmp_path, capsys):
    shutil.copytree(tuned / "svfit", tmp_path / "named")
    config = json.loads((tmp_path / "named" / "config.json").read_text())
    config |= {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    (tmp_path / "named" / "config.json").write_text(json.dumps(config))
    extract("debug-text", str(tmp_path / "named"), tmp_path / "out", methods=["svfit:4"])
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["labels"] == ["bad", "good"]
    assert main(["classify", str(tmp_path / "out"), "the film was good"]) == 0
    assert "probability_bad" in capsys.readouterr().out


def test_of_a_fine_tune_the_command_tells_shares_and_scores_or_that_none_fits(tuned, tmp_path, capsys):
    command = [
        "extract",
        "debug-text",
        str(tuned / "full"),
        "--methods",
        "svfit,lora:2",
        "--out",
        str(tmp_path / "out"),
    ]
    assert main(command) == 2
    said = capsys.readouterr()
    assert "None fits" in said.out and "nothing was written" in said.err and not (tmp_path / "out").exists()
    rows = str(tuned / "rows.jsonl")
    more = ["--least-explained", "0.01", "--data", rows, "--distill", rows, "--distill-steps", "60"]
    assert not main([*command, *more])
    said = capsys.readouterr().out
    first, last = (float(re.search(rf"f_{word} - .*: ([\d.e-]+)", said)[1]) for word in ("extracted", "distilled"))
    assert last < first and "accuracy, finetuned" in said and "norms and biases" in said
    assert main([*command, "--least-explained", "0.01"]) == 2 and "--overwrite" in capsys.readouterr().err


def test_the_command_shows_how_far_it_is(tuned, tmp_path, monkeypatch, capsys):
    import tqdm.auto

    told: list[tuple[int, int]] = []

    class Bar(tqdm.auto.tqdm):
        def update(self, n=1):
            super().update(n)
            told.append((self.n, self.total))

    monkeypatch.setattr(tqdm.auto, "tqdm", Bar)
    rows = str(tuned / "rows.jsonl")
    words = ["extract", "debug-text", str(tuned / "full"), "--methods", "lora:2", "--least-explained", "0.01"]
    assert not main([*words, "--out", str(tmp_path / "out"), "--distill", rows, "--distill-steps", "7"])
    layers = int(re.search(r"(\d+) layers changed", capsys.readouterr().out)[1])
    assert told == [(n, layers) for n in range(1, layers + 1)] + [(n, 7) for n in range(1, 8)]


def test_a_component_of_a_pipeline_is_compared_by_itself(tmp_path):
    pytest.importorskip("diffusers")
    unet = read_checkpoint("embedded")["unet"].load()[0]
    made = testing.perturb(smidgen.adapt(unet, "lora", r=1, target_modules=["to_q"]), 1, 0.05)
    smidgen.merge(made).save_pretrained(tmp_path / "unet")
    found = extract("embedded", str(tmp_path / "unet"), tmp_path / "out", methods=["lora:1", "svfit:16"])
    assert list(found) == ["unet"] and found["unet"].chosen.label == "lora r=1"
    assert (tmp_path / "out" / "adapter_config.json").is_file()


@pytest.mark.parametrize("to", ["full-diff", "merged"])
@pytest.mark.parametrize(
    "method",
    ["svfit", "lora", "loldu", "oft", *(pytest.param(m, marks=pytest.mark.slow) for m in ("tlora", "tlora_star"))],
)
def test_what_an_export_holds_comes_back_as_an_adapter(to, method, tmp_path):
    transformers = pytest.importorskip("transformers")
    base = read_checkpoint("debug-text")[""].path
    options = {"r": 4} if method in ("svfit", "lora", "loldu") else {}
    names = ["encoder.layer.0.attention.self.query", "encoder.layer.1.attention.self.value"]
    model = smidgen.adapt(transformers.AutoModel.from_pretrained(base), method, target_modules=names, **options)
    out = tmp_path / ("x.safetensors" if to == "full-diff" else "x")
    export(testing.perturb(model, 1, 0.3), out, to)
    found = extract("debug-text", str(out), tmp_path / "back", methods=[method])[""]
    assert found.chosen.recovered and found.layers == names
    again = smidgen.load(transformers.AutoModel.from_pretrained(base), tmp_path / "back")
    wanted, there = changes(model), changes(again)
    assert wanted.keys() == there.keys()
    for name, change in wanted.items():
        assert (there[name] - change).norm() <= 1e-5 * change.norm(), name


def test_differences_of_a_pipeline_and_of_a_model_with_a_head_find_their_layers(tmp_path):
    pytest.importorskip("diffusers")
    import transformers

    pipe, name = load_base("embedded").pipe, "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    smidgen.adapt(pipe, "lora", r=1, target_modules=[name])
    smidgen.adapt(pipe.text_encoder, "lora", r=2, target_modules=["layers.0.self_attn.q_proj"])
    for part in (pipe.unet, pipe.text_encoder):
        testing.perturb(part, 1, 0.05)
    export(pipe, tmp_path / "x.safetensors", "full-diff")
    found = extract("embedded", str(tmp_path / "x.safetensors"), methods=["lora:1", "lora:2"])
    assert {part: one.chosen.label for part, one in found.items()} == {"unet": "lora r=1", "text_encoder": "lora r=2"}
    assert found["unet"].layers == [name]

    base = read_checkpoint("debug-text")[""].path
    head = transformers.AutoModelForSequenceClassification.from_pretrained(base, num_labels=2)
    testing.perturb(smidgen.adapt(head, "lora", r=1, target_modules=["layer.0.attention.self.query"]), 1, 0.3)
    export(head, tmp_path / "y.safetensors", "full-diff")
    assert extract("debug-text", str(tmp_path / "y.safetensors"), methods=["lora:1"])[""].chosen.label == "lora r=1"
    with pytest.raises(SmidgenError, match=r"changes 'lycoris_bert_.*', which the base does not have"):
        extract("embedded", str(tmp_path / "y.safetensors"))
    tensors = load_file(tmp_path / "y.safetensors")
    for change in (lambda t: t[:-1], lambda t: t * float("nan")):
        save_file({key: change(value).contiguous() for key, value in tensors.items()}, tmp_path / "y.safetensors")
        with pytest.raises(SmidgenError, match=r"The difference of .* numbers must be finite"):
            extract("debug-text", str(tmp_path / "y.safetensors"), methods=["lora:1"])


def test_what_cannot_be_compared_is_said(tuned, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pickle.bin").write_text("")
    for base, other, words in [
        ("debug-text", str(tmp_path), "holds no safetensors file"),
        ("debug-text", str(tmp_path / "nothing"), "There is no model at"),
        ("debug-text", str(tmp_path / "pickle.bin"), "pickles are never read"),
        ("debug-text", "debug-text", "they hold the same numbers"),
        ("embedded", str(tuned / "svfit"), "none of the base's components"),
    ]:
        with pytest.raises(SmidgenError, match=words):
            extract(base, other, tmp_path / "out", methods=["svfit"])
    with pytest.raises(ConfigError, match="give --out"):
        extract("debug-text", str(tuned / "full"), distill=tuned / "rows.jsonl")
    assert not (tmp_path / "out").exists()


def test_names_follow_a_prefix_that_one_of_them_has():
    tensors = {"encoder.w": torch.ones(1), "encoder.b": torch.ones(2)}
    found = named_alike(tensors, dict.fromkeys(["bert.encoder.w", "bert.encoder.b", "head.w"]))
    assert set(found) == {"bert.encoder.w", "bert.encoder.b"} and found["bert.encoder.b"].shape == (2,)
    back = named_alike({f"bert.{k}": v for k, v in tensors.items()}, dict.fromkeys(tensors))
    assert set(back) == set(tensors)
