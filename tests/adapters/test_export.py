"""Adapters as other programs' files: exact through each reader, read back by its rules, and refused where there is no exact form."""

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import smidgen
from smidgen.adapters.checkpoint.files import WEIGHTS_NAME
from smidgen.adapters.checkpoint.formats import FORMATS, PeftOft, read_lora
from smidgen.adapters.export import MOST_LOST, export, lost, size
from smidgen.adapters.methods import METHODS
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.adapters.tuner.injection import remove
from smidgen.errors import AdapterFileError, ConfigError, SmidgenError
from tests.adapters.exported import (
    FACTORED,
    MODELS,
    TOLERANCE,
    WEIGHT,
    adapted,
    answer,
    as_ours,
    changes,
    moved,
    off,
    same,
    same_changes,
)  # fmt: skip
from tests.training.tiny import sd_folder

OFT = smidgen.config("oft", block_size=4)


def through_peft(folder: Path, name: str) -> nn.Module:
    return peft.PeftModel.from_pretrained(MODELS[name][0](), folder).eval()


def peft_layers(model: nn.Module) -> dict:
    return {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", FACTORED)
def test_peft_alone_reads_a_factored_adapter(name, method, tmp_path):
    model = adapted(name, FACTORED[method], strength=0.5)
    found = export(model, tmp_path, "peft")
    theirs = through_peft(tmp_path, name)
    assert found.layers == len(peft_layers(theirs)) == len(changes(model))
    assert off(answer(theirs, name), answer(model, name), answer(MODELS[name][0](), name)) <= TOLERANCE
    if name != "convolutions":  # peft tells no change of a grouped convolution
        same_changes(model, peft_layers(theirs))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["inference_mode"]


@pytest.mark.parametrize("name", ["bert", "llama", "vit"])
def test_pefts_oft_is_ours(name, tmp_path):
    model = adapted(name, OFT)
    export(model, tmp_path, "peft-oft")
    theirs = through_peft(tmp_path, name)
    assert off(answer(theirs, name), answer(model, name), answer(MODELS[name][0](), name)) <= TOLERANCE
    again = smidgen.adapt(MODELS[name][0](), replace(OFT, target_modules=set(changes(model))))
    slots = {layer: own.slot("default") for layer, own in adapted_layers(again).items()}
    for layer, rotation in PeftOft.read(tmp_path).items():  # and back into an adapter of ours
        slots[layer].transform_q.data = rotation.q
    for layer, change in changes(again).items():
        assert (change - changes(model)[layer]).norm() <= WEIGHT * change.norm()


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2", "vit"])
@pytest.mark.parametrize("method", ["dora", "spectral+magnitude"])
def test_pefts_dora_is_ours(name, method, tmp_path):
    model = adapted(name, smidgen.config(method, r=3, alpha=7.0))
    export(model, tmp_path, "peft")
    theirs = through_peft(tmp_path, name)
    assert off(answer(theirs, name), answer(model, name), answer(MODELS[name][0](), name)) <= TOLERANCE
    assert json.loads((tmp_path / "adapter_config.json").read_text())["use_dora"]


@pytest.mark.parametrize(("name", "method"), [("llama", "ia3"), ("llama", "diagonal"), ("bert", "diagonal"), ("gpt2", "diagonal"), ("convolutions", "diagonal")])  # fmt: skip
def test_pefts_ia3_is_ours(name, method, tmp_path):
    model = adapted(name, smidgen.config(method), strength=0.5)
    if name == "convolutions":
        model = smidgen.adapt(MODELS[name][0](), smidgen.config(method, target_modules=["first", "point"]))
        moved(model)
    export(model, tmp_path, "peft-ia3")
    theirs = through_peft(tmp_path, name)
    assert off(answer(theirs, name), answer(model, name), answer(MODELS[name][0](), name)) <= TOLERANCE
    of_input = json.loads((tmp_path / "adapter_config.json").read_text())["feedforward_modules"]
    assert bool(of_input) == (method == "diagonal")


def test_blocks_of_many_sizes_find_room_in_pefts_one(tmp_path):
    model = smidgen.adapt(MODELS["convolutions"][0](), smidgen.config("oft", target_modules=["point", "head"]))
    moved(model)
    export(model, tmp_path, "peft-oft")  # a 1 x 1 convolution of 12 channels, a layer of 6 features
    theirs = through_peft(tmp_path, "convolutions")
    ours = answer(model, "convolutions")
    assert off(answer(theirs, "convolutions"), ours, answer(MODELS["convolutions"][0](), "convolutions")) <= TOLERANCE


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "config", [FACTORED["svfit"], OFT, smidgen.config("tlora"), smidgen.config("tlora_star")], ids=lambda c: c.method
)
def test_anything_is_merged_and_a_difference(name, config, tmp_path):
    model, before = adapted(name, config, strength=0.5), answer(MODELS[name][0](), name)
    wanted = answer(model, name)
    found = export(model, tmp_path / "merged", "merged")
    assert found.layers == len(changes(model)) and "rounding the weights takes: bf16" in str(found)
    if hasattr(model, "save_pretrained"):
        theirs = type(model).from_pretrained(tmp_path / "merged").eval()
    else:
        theirs = MODELS[name][0]()
        theirs.load_state_dict(load_file(tmp_path / "merged" / "model.safetensors"))
    assert off(answer(theirs, name), wanted, before) <= TOLERANCE
    assert torch.equal(answer(model, name), wanted) and smidgen.names(model) == ["default"]  # the model is as it was
    export(model, tmp_path / "full", "full-diff")
    read = FORMATS["full-diff"].read(tmp_path / "full" / "full.safetensors")
    for layer, change in changes(model).items():
        there = read.pop("lycoris_" + layer.replace(".", "_"))
        assert (there - change).norm() <= WEIGHT * change.norm()
    assert not read


def test_ranks_and_widths_that_differ(tmp_path):
    config = smidgen.config("svfit", r=64, rank_pattern={"layer.1.attention.self.query": 3})
    model = adapted("bert", config)  # 64 directions of a matrix of 24: all that there are
    export(model, tmp_path, "peft")
    ranks = {name: len(lora.a) for name, lora in read_lora(tmp_path).items()}
    assert set(ranks.values()) == {3, 24} and sum(r == 3 for r in ranks.values()) == 1
    theirs = through_peft(tmp_path, "bert")
    same_changes(model, peft_layers(theirs))


def test_a_name_that_ends_another_is_not_meant(tmp_path):
    """peft takes the end of a name: "value" alone would be "other.value" too."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.value, self.other = nn.Linear(4, 4), nn.ModuleDict({"value": nn.Linear(4, 4)})

        def forward(self, x):
            return self.other["value"](torch.tanh(self.value(x)))

    torch.manual_seed(0)
    plain = Twice()
    model = smidgen.adapt(Twice(), smidgen.config("svfit", r=2, target_modules="value"))
    model.load_state_dict(
        {
            k.replace("value.", "value.base_layer.", 1) if k.startswith("value") else k: v
            for k, v in plain.state_dict().items()
        },
        strict=False,
    )
    moved(model)
    export(model, tmp_path, "peft")
    assert list(peft_layers(peft.PeftModel.from_pretrained(plain, tmp_path))) == ["base_model.model.value"]


def test_a_head_goes_to_peft_and_into_a_merged_model(tmp_path):
    make = MODELS["bert"][0]
    model = smidgen.adapt(
        make(), smidgen.config("svfit", r=4, target_modules=["query"], modules_to_save=["classifier"])
    )
    moved(model)
    with torch.no_grad():
        model.classifier.modules_to_save["default"].weight.add_(0.3)
    wanted = answer(model, "bert")
    export(model, tmp_path / "peft", "peft")
    export(model, tmp_path / "merged", "merged")
    for theirs in (through_peft(tmp_path / "peft", "bert"), type(make()).from_pretrained(tmp_path / "merged").eval()):
        assert off(answer(theirs, "bert"), wanted, answer(make(), "bert")) <= TOLERANCE
    with pytest.raises(
        SmidgenError, match=r"trained the head 'classifier' too, and a kohya file holds no heads: take --to peft"
    ):
        export(model, tmp_path / "kohya", "kohya")


def test_what_has_no_exact_form_is_refused_and_leaves_nothing(tmp_path):
    def refuse(match: str, model: nn.Module, to: str, out: str = "out") -> None:
        with pytest.raises(SmidgenError, match=match):
            export(model, tmp_path / out, to)
        assert not list(tmp_path.iterdir())

    refuse(
        r"smidgen tlora .*transform of full rank.*--to full-diff.*--to merged hold it exactly\.",
        adapted("bert", smidgen.config("tlora")),
        "peft",
    )
    refuse(r"smidgen oft.*--to peft-oft too", adapted("bert", OFT), "kohya")
    refuse(r"is no rotation alone; --to merged or full-diff", adapted("bert", FACTORED["svfit"]), "peft-oft")
    refuse(r"is not at strength 1, and peft's OFT has no strength", adapted("bert", OFT, 0.5), "peft-oft")
    refuse(
        r"the layer of no pipeline|is of no pipeline; peft reads a folder",
        adapted("bert", FACTORED["svfit"]),
        "diffusers",
    )
    refuse(
        r"grouped cannot go into a kohya file: .*--to full-diff", adapted("convolutions", FACTORED["svfit"]), "kohya"
    )
    refuse(r"cannot go into a kohya file: .*no conv1d layers", adapted("gpt2", FACTORED["svfit"]), "kohya")
    refuse(r"a linear layer's input", adapted("convolutions", OFT), "peft-oft")
    refuse(r"a layer that has a bias, and peft's \(IA\)\^3 would", adapted("bert", smidgen.config("ia3")), "peft-ia3")
    refuse(r"is no factor for each feature alone", adapted("llama", FACTORED["svfit"]), "peft-ia3")
    dora = smidgen.config("dora", r=2)
    refuse(r"has a magnitude, and a kohya file holds none that its readers agree on", adapted("bert", dora), "kohya")
    refuse(r"has a magnitude, and peft's DoRA has no strength", adapted("bert", dora, 0.5), "peft")
    dilated = smidgen.adapt(nn.Sequential(nn.Conv2d(3, 4, 3, dilation=2)), "svfit", r=2, target_modules=["0"])
    refuse(r"knows no dilation|know no dilation", dilated, "peft")
    broken = adapted("bert", FACTORED["svfit"])
    next(p for p in broken.parameters() if p.requires_grad).data[0] = float("nan")
    refuse(r"not finite; nothing was written", broken, "peft")
    with pytest.raises(ConfigError, match=r"no format 'kohia'. Did you mean 'kohya'"):
        export(broken, tmp_path, "kohia")
    with pytest.raises(SmidgenError, match="carries no adapter 'other'"):
        export(broken, tmp_path, "peft", "other")


def test_a_file_says_where_it_comes_from_and_never_calls_itself_tlora(tmp_path):
    model = adapted("bert", FACTORED["svfit"])
    smidgen.save(model, tmp_path / "own")
    fresh = smidgen.load(MODELS["bert"][0](), tmp_path / "own")
    export(fresh, tmp_path / "x.safetensors", "kohya", base=str(tmp_path), about={"step": 3})
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        said = json.loads(file.metadata()["smidgen"])
    assert said["method"] == "smidgen svfit r=5" and said["base"] == tmp_path.name
    assert "sketch" in said["base_lock"] and said["step"] == 3
    export(adapted("bert", smidgen.config("tlora")), tmp_path / "t.safetensors", "full-diff")
    with safe_open(tmp_path / "t.safetensors", "pt") as file:
        assert json.loads(file.metadata()["smidgen"])["method"].startswith("smidgen tlora")


TAMPERED = {
    "prefix": lambda t: {"lora_" + k: v for k, v in t.items()},
    "alpha": lambda t: {k: v * 2 if k.endswith("alpha") else v for k, v in t.items()},
    "no alpha": lambda t: {k: v for k, v in t.items() if not k.endswith("alpha")},
    "missing layer": lambda t: {k: v for k, v in t.items() if not k.startswith(min(t).split(".")[0])},
    "missing factor": lambda t: {k: v for k, v in t.items() if k != max(t)},
    "transposed": lambda t: {k: v.T.contiguous() if v.ndim == 2 else v for k, v in t.items()},
    "other naming": lambda t: {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for k, v in t.items()},
    "dots": lambda t: {k.replace("_", ".", 3): v for k, v in t.items()},
    "wrong rank": lambda t: {k: v[:2] if "down" in k else v[:, :2].contiguous() if "up" in k else v for k, v in t.items()},
    "extra key": lambda t: t | {"lycoris_nobody.diff_b": torch.zeros(2)},
    "extra layer": lambda t: t | {f"lycoris_nobody.{side}": torch.zeros(2, 2) for side in ("lora_down.weight", "lora_up.weight")},
    "NaN": lambda t: {k: v * float("nan") if k == max(t) else v for k, v in t.items()},
    "swapped": lambda t: dict(zip(t, [*list(t.values())[3:], *list(t.values())[:3]], strict=True)),
}  # fmt: skip


@pytest.mark.parametrize("how", TAMPERED)
@pytest.mark.parametrize("to", ["kohya", "peft", "full-diff"])
def test_whatever_its_reader_would_not_find_is_an_error_and_the_file_is_gone(to, how, tmp_path, monkeypatch):
    model = adapted("bert", FACTORED["svfit"])
    own = type(FORMATS[to]).write

    def tampering(self, content, source, path: Path) -> None:
        own(self, content, source, path)
        file = path if path.is_file() else path / WEIGHTS_NAME
        tensors = load_file(file)
        changed = TAMPERED[how](tensors)
        same = changed.keys() == tensors.keys() and all(torch.equal(changed[k], tensors[k]) for k in tensors)
        if same:
            pytest.skip(f"{to} has no {how}")
        save_file({k: v.clone() for k, v in changed.items()}, file)

    monkeypatch.setattr(type(FORMATS[to]), "write", tampering)
    with pytest.raises(AdapterFileError):
        export(model, tmp_path / "out", to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"r": 9}, "lora_A at"),
        ({"lora_alpha": 9}, "another than the adapter's"),
        ({"target_modules": ["query"]}, "peft's config finds"),
        ({"target_modules": ["query", "value", "dense", "LayerNorm"]}, "nobody looks for"),
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA'"),
        ({"use_rslora": True}, "another than the adapter's"),
    ],
)
def test_a_config_that_means_something_else_is_an_error(change, match, tmp_path, monkeypatch):
    model, own = adapted("bert", FACTORED["svfit"]), type(FORMATS["peft"]).write

    def tampering(self, content, source, path: Path) -> None:
        own(self, content, source, path)
        file = path / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | change))

    monkeypatch.setattr(type(FORMATS["peft"]), "write", tampering)
    with pytest.raises(AdapterFileError, match=match):
        export(model, tmp_path / "out", "peft")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["peft", "kohya"])
@pytest.mark.parametrize("method", FACTORED)
def test_a_file_comes_back_as_an_adapter_of_ours(to, method, tmp_path):
    model = adapted("llama", FACTORED[method])
    export(model, tmp_path / "x", to)
    path = tmp_path / "x" if to == "peft" else tmp_path / "x" / "x.safetensors"
    named = {name.replace(".", "_"): name for name in changes(model)}
    loras = {named[n.removeprefix("lycoris_").replace(".", "_")]: lora for n, lora in read_lora(path).items()}
    same(changes(as_ours(MODELS["llama"][0](), loras)), changes(model))


def test_rounding_that_takes_the_adapter_is_refused_unless_allowed(tmp_path):
    model = smidgen.adapt(MODELS["bert"][0](), smidgen.config("svfit", r=24, target_modules=["query"]))
    moved(model, by=2e-4)
    with pytest.raises(SmidgenError, match=r"to bf16 would take \d+% of the adapter, more than 15%.*--allow-loss"):
        export(model, tmp_path / "out", "merged", dtype=torch.bfloat16)
    assert not list(tmp_path.iterdir())
    found = export(model, tmp_path / "out", "merged", dtype=torch.bfloat16, allow_loss=True)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {torch.bfloat16}
    weight = MODELS["bert"][0]().bert.encoder.layer[0].attention.self.query.weight
    change = changes(model)["bert.encoder.layer.0.attention.self.query"]
    shares = {
        kind: (lambda e, s: (e / s) ** 0.5)(*lost(weight, change, kind))
        for kind in (torch.bfloat16, torch.float16, torch.int8)
    }
    assert shares[torch.int8] > shares[torch.bfloat16] > MOST_LOST > shares[torch.float16] > 0
    assert f"bf16 {shares[torch.bfloat16]:.0%}"[:5] in found.notes[0]
    assert lost(weight, change, torch.float32)[0] <= 1e-8 * lost(weight, change, torch.float32)[1] * 1e6


def test_a_lora_of_pefts_own_is_exported_too(tmp_path):
    model = smidgen.adapt(MODELS["bert"][0](), peft.LoraConfig(r=3, lora_alpha=7, target_modules=["query"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_()
    found = export(model, tmp_path / "x.safetensors", "kohya")
    assert found.layers == 2
    lora = read_lora(tmp_path / "x.safetensors")["lycoris_bert_encoder_layer_0_attention_self_query"]
    wanted = model.bert.encoder.layer[0].attention.self.query.get_delta_weight("default")
    assert (lora.scale * lora.b @ lora.a - wanted).norm() <= WEIGHT * wanted.norm()


def test_bytes_are_said_as_people_say_them():
    assert [size(n) for n in (999, 14_400, 2_880_000)] == ["999 bytes", "14 kB", "2.9 MB"]


def test_a_plain_lora_in_pefts_form_is_ours_too(tmp_path):
    """What `smidgen predict` writes: peft alone reads it, and Smidgen finds its lock, canary and checksum in the header."""
    model = adapted("bert", smidgen.config("lora", r=3))
    wanted = answer(model, "bert")
    export(model, tmp_path / "a", "peft")
    export(model, tmp_path / "b", "peft")
    assert (tmp_path / "a" / WEIGHTS_NAME).read_bytes() == (tmp_path / "b" / WEIGHTS_NAME).read_bytes()
    assert isinstance(through_peft(tmp_path / "a", "bert").peft_config["default"], peft.LoraConfig)
    fresh = smidgen.load(MODELS["bert"][0](), tmp_path / "a")
    assert torch.equal(answer(fresh, "bert"), wanted) and fresh.peft_config["default"].residual == "low_rank"
    assert smidgen.verify(fresh, tmp_path / "a", MODELS["bert"][2]).ok
    other = MODELS["bert"][0]()
    for parameter in other.parameters():
        parameter.data.normal_()
    with pytest.raises(smidgen.BaseLockError):
        smidgen.load(other, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS_NAME)
    with safe_open(tmp_path / "a" / WEIGHTS_NAME, "pt") as file:
        header = file.metadata()
    save_file({k: v * 1.5 for k, v in tensors.items()}, tmp_path / "a" / WEIGHTS_NAME, header)
    with pytest.raises(AdapterFileError, match="SHA-256"):
        smidgen.load(MODELS["bert"][0](), tmp_path / "a")


def test_the_table_in_the_docs_is_what_the_code_does(tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    table = text[text.index("| method |") :].partition("\n\n")[0].splitlines()
    head = [cell.strip() for cell in table[0].strip("|").split("|")]
    assert head[1:] == list(FORMATS)
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in table[2:]]
    assert {row[0] for row in rows} == set(METHODS)
    base = StableDiffusionPipeline.from_pretrained(sd_folder(tmp_path / "pipe"), safety_checker=None)
    language = MODELS["llama"][0]()
    for method, *cells in rows:
        smidgen.adapt(base, method, method, target_modules=["to_q"])
        smidgen.adapt(language, method, method, target_modules=["q_proj"])
        moved(base.unet, method)
        for to, said in zip(FORMATS, cells, strict=True):
            try:
                export(language if FORMATS[to].task else base, tmp_path / f"{method}-{to}", to, method)
            except SmidgenError:
                found = "–"
            else:
                found = "exact"
            assert (method, to, found) == (method, to, said)
        remove(base.unet, method)
        remove(language, method)
