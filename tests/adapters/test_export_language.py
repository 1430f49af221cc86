"""LoRAs of language models as llama.cpp and mlx-lm take them: read back by their rules, by names and rows that are not ours alone."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import smidgen
from smidgen.adapters.checkpoint.formats import FORMATS, Lora, Place, Source, read_lora
from smidgen.adapters.checkpoint.formats.gguf import ARCHITECTURES, in_order, tensor_name
from smidgen.adapters.checkpoint.formats.mlx import ADAPTERS_NAME
from smidgen.adapters.export import export, layers
from smidgen.errors import AdapterFileError, MissingExtraError, SmidgenError
from smidgen.tasks.drawing import inspect
from tests.adapters.exported import FACTORED, MODELS, adapted, as_ours, changes, moved, same

gguf = pytest.importorskip("gguf", reason="gguf is not installed: pip install 'smidgen[gguf]'")
WRITTEN = {"gguf": "x.gguf", "mlx": "x"}


def by_layer(model: torch.nn.Module, path: Path) -> dict[str, Lora]:
    """What is in a file by the layers' names in the model."""
    found = read_lora(path)
    if path.suffix != ".gguf":
        return found
    source = Source(model=model)
    return {p.layer: in_order(found.pop(str(tensor_name(p, source))), p, source, back=True) for p in layers(model)}


@pytest.mark.parametrize("to", WRITTEN)
@pytest.mark.parametrize("method", FACTORED)
def test_a_file_comes_back_as_an_adapter_of_ours(to, method, tmp_path):
    model = adapted("llama", FACTORED[method], strength=0.5)
    found = export(model, tmp_path / WRITTEN[to], to, about={"step": 3})
    assert found.layers == len(changes(model)) == 6
    same(changes(as_ours(MODELS["llama"][0](), by_layer(model, tmp_path / WRITTEN[to]))), changes(model))


def everywhere(**options) -> torch.nn.Module:
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = smidgen.adapt(MODELS["llama"][0](), smidgen.config("svfit", target_modules=targets, **options))
    moved(model, by=0.5)
    return model


@pytest.mark.parametrize("to", WRITTEN)
def test_ranks_that_differ_have_one_alpha_and_one_rank(to, tmp_path):
    model = everywhere(r=5, rank_pattern={"layers.0.self_attn.k_proj": 2, "layers.1.mlp.up_proj": 7})
    export(model, tmp_path / WRITTEN[to], to)
    found = by_layer(model, tmp_path / WRITTEN[to])
    assert {one.r for one in found.values()} == ({2, 5, 7} if to == "gguf" else {7})
    same({name: one.scale * one.b @ one.a for name, one in found.items()}, changes(model))


def test_a_gguf_file_has_the_rows_and_the_words_that_llama_cpp_looks_for(tmp_path):
    """transformers reads llama.cpp's files too, and puts the rows of q and k back by a rule of its own."""
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    model = everywhere(r=4)
    export(model, tmp_path / "x.gguf", "gguf")
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    assert (
        said["general.type"] == "adapter" and said["adapter.type"] == "lora" and said["general.architecture"] == "llama"
    )
    assert json.loads(said["smidgen"])["method"] == "smidgen svfit r=4"
    tensors = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
    assert len(tensors) == 28 and all(value.dtype == torch.float32 for value in tensors.values())
    assert {name.split(".")[0] for name in tensors} == {"blk"}
    backwards = LlamaTensorProcessor(config=model.config.to_dict())._reverse_permute_weights
    for layer, theirs, heads in (("q", "attn_q", (4, 4)), ("k", "attn_k", (4, 2))):
        pair = (tensors[f"blk.1.{theirs}.weight.{side}"] for side in ("lora_b", "lora_a"))
        b, a = pair
        found = torch.as_tensor(backwards((b @ a).numpy(), *heads)) * said["adapter.lora.alpha"] / len(a)
        same({"x": found}, {"x": changes(model)[f"model.layers.1.self_attn.{layer}_proj"]})


def test_mlx_is_told_the_blocks_and_the_layers_in_them(tmp_path):
    config = smidgen.config("lora", r=2, target_modules=r"model\.layers\.1\.(self_attn\.q_proj|mlp\.up_proj)")
    model = smidgen.adapt(MODELS["llama"][0](), config)
    moved(model)
    export(model, tmp_path / "x", "mlx", base="some/base")
    said = json.loads((tmp_path / "x" / "adapter_config.json").read_text())
    assert said["num_layers"] == 1 and said["fine_tune_type"] == "lora" and said["model"] == "some/base"
    own = {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": ["mlp.up_proj", "self_attn.q_proj"]}
    assert said["lora_parameters"] == own
    shapes = {name: tuple(value.shape) for name, value in load_file(tmp_path / "x" / ADAPTERS_NAME).items()}
    assert shapes["model.layers.1.mlp.up_proj.lora_a"] == (24, 2) and shapes["model.layers.1.mlp.up_proj.lora_b"] == (
        2,
        36,
    )


TENSORS = {
    "prefix": lambda t: {"base_model." + k: v for k, v in t.items()},
    "missing layer": lambda t: {k: v for k, v in t.items() if not k.startswith(min(t).removesuffix(".lora_a"))},
    "missing factor": lambda t: {k: v for k, v in t.items() if k != max(t)},
    "transposed": lambda t: {k: v.T.contiguous() for k, v in t.items()},
    "other naming": lambda t: {k.replace("lora_a", "lora_A").replace("lora_b", "lora_B"): v for k, v in t.items()},
    "names of the other": lambda t: {k.replace("blk.", "model.layers.").replace("model.layers.0.", "blk.0."): v for k, v in t.items()},
    "wrong rank": lambda t: {k: v[:2] if v.shape[0] == 5 else v[:, :2].contiguous() for k, v in t.items()},
    "extra layer": lambda t: t | {f"{max(t).removesuffix('.lora_b')}x.{side}": torch.zeros(2, 2) for side in ("lora_a", "lora_b")},
    "NaN": lambda t: {k: v * float("nan") if k == max(t) else v for k, v in t.items()},
    "twice as strong": lambda t: {k: v * 2 if k == max(t) else v for k, v in t.items()},
    "rows of q as transformers has them": lambda t: {k: unpaired(v) if "attn_q" in k and "lora_b" in k else v for k, v in t.items()},
}  # fmt: skip
FACTS = {  # of the format, what it says otherwise, and what the error says
    "gguf": [
        ({"general.type": "model"}, "is no LoRA for llama.cpp"),
        ({"adapter.type": "control_vector"}, "is no LoRA for llama.cpp"),
        ({"general.architecture": "qwen2"}, "is for 'qwen2', the model is 'llama'"),
        ({"adapter.lora.alpha": 9.0}, "another than the adapter's"),
        (
            {"adapter.lora.alpha": None},
            None,
        ),  # without one llama.cpp multiplies with nothing: alpha = rank says the same
    ],
    "mlx": [
        ({"scale": 20.0}, "another than the adapter's"),
        ({"rank": 8}, "has rank 5, the config says 8"),
        ({"keys": ["self_attn.q_proj"]}, "makes no LoRA at"),
        ({"num_layers": 1}, "makes no LoRA at"),
        ({"fine_tune_type": "dora"}, "only a plain LoRA"),
        ({"dropout": None}, "wants num_layers and lora_parameters"),
    ],
}


def unpaired(b: Tensor) -> Tensor:
    return b.reshape(4, -1, 2, b.shape[1]).transpose(1, 2).reshape(b.shape)


def rewrite(path: Path, tensors=lambda t: t, facts=None) -> bool:
    """Writes a file anew with other tensors and facts; whether anything is another than before."""
    facts = facts or {}
    if path.suffix != ".gguf":
        old = load_file(path / ADAPTERS_NAME)
        save_file(new := {k: v.clone() for k, v in tensors(old).items()}, path / ADAPTERS_NAME)
        config = json.loads((path / "adapter_config.json").read_text())
        for name, value in facts.items():
            (config if name in config else config["lora_parameters"])[name] = value
        (path / "adapter_config.json").write_text(json.dumps(config))
    else:
        reader = gguf.GGUFReader(path)
        said = {k: f.contents() for k, f in reader.fields.items() if not k.startswith("GGUF.")} | facts
        old = {one.name: torch.from_numpy(one.data.copy()) for one in reader.tensors}
        writer = gguf.GGUFWriter(path.with_suffix(".new"), said.pop("general.architecture"))
        for name, value in said.items():
            if value is not None:
                (writer.add_float32 if isinstance(value, float) else writer.add_string)(name, value)
        for name, value in (new := tensors(old)).items():
            writer.add_tensor(name, value.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        path.with_suffix(".new").rename(path)
    return bool(facts) or new.keys() != old.keys() or any(not torch.equal(new[k], old[k]) for k in old)


def tampering(monkeypatch, to: str, **how) -> None:
    own = type(FORMATS[to]).write

    def write(self, content, source, path: Path) -> None:
        own(self, content, source, path)
        if not rewrite(path, **how):
            pytest.skip(f"{to} has no such thing")

    monkeypatch.setattr(type(FORMATS[to]), "write", write)


@pytest.mark.parametrize("how", TENSORS)
@pytest.mark.parametrize("to", WRITTEN)
def test_whatever_its_reader_would_not_find_is_an_error_and_the_file_is_gone(to, how, tmp_path, monkeypatch):
    model = adapted("llama", FACTORED["svfit"])
    tampering(monkeypatch, to, tensors=TENSORS[how])
    with pytest.raises(AdapterFileError):
        export(model, tmp_path / WRITTEN[to], to)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("to", "facts", "match"), [(to, *case) for to, own in FACTS.items() for case in own])
def test_a_file_that_says_something_else_is_an_error(to, facts, match, tmp_path, monkeypatch):
    model = adapted("llama", FACTORED["svfit"])
    tampering(monkeypatch, to, facts=facts)
    if match is None:
        assert export(model, tmp_path / WRITTEN[to], to).layers == 6
        return
    with pytest.raises(AdapterFileError, match=match):
        export(model, tmp_path / WRITTEN[to], to)
    assert not list(tmp_path.iterdir())


def test_what_they_do_not_read_is_refused(tmp_path):
    def refuse(match: str, model: torch.nn.Module, to: str) -> None:
        with pytest.raises(SmidgenError, match=match):
            export(model, tmp_path / WRITTEN[to], to)
        assert not list(tmp_path.iterdir())

    for to, reader in (("gguf", "llama.cpp"), ("mlx", "mlx-lm")):
        refuse(
            rf"is of a bert; known to be the same layer for layer in {reader}: llama, ",
            adapted("bert", FACTORED["svfit"]),
            to,
        )
        refuse("is of a gpt2", adapted("gpt2", FACTORED["svfit"]), to)
        refuse("is of no language model", adapted("convolutions", FACTORED["svfit"]), to)
        refuse("transform of full rank", adapted("llama", smidgen.config("tlora")), to)
    head = smidgen.adapt(MODELS["llama"][0](), smidgen.config("svfit", r=2, target_modules=["lm_head"]))
    moved(head)
    refuse("in the blocks alone", head, "mlx")
    assert export(head, tmp_path / "x.gguf", "gguf").layers == 1
    (tmp_path / "x.gguf").unlink()
    head.config.tie_word_embeddings = True
    refuse("its weight is the embedding's", head, "gguf")


def test_every_architecture_has_a_name_for_the_layers_of_its_model():
    from transformers import AutoConfig, AutoModelForCausalLM

    for kind in ARCHITECTURES:
        config = AutoConfig.for_model(kind, num_hidden_layers=2)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        source = Source(model=model)
        linear = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
        names = {tensor_name(Place("", n, ()), source) for n in linear}
        assert len(linear) >= 8 and None not in names and len(names) == len(linear), kind
        assert all(n.startswith("model.layers.") for n in linear), kind


def test_damage_and_other_files_are_errors(tmp_path):
    model = adapted("llama", FACTORED["svfit"])
    export(model, tmp_path / "x.gguf", "gguf")
    whole = (tmp_path / "x.gguf").read_bytes()
    for cut in (0, 3, 40, len(whole) // 2, len(whole) - 4):
        (tmp_path / "x.gguf").write_bytes(whole[:cut])
        with pytest.raises(AdapterFileError, match="truncated or no GGUF file"):
            read_lora(tmp_path / "x.gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_type("model")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(AdapterFileError, match=r"general\.type is 'model'"):
        read_lora(tmp_path / "model.gguf")


def test_without_the_package_a_sentence_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'smidgen\[gguf\]'"):
        export(adapted("llama", FACTORED["svfit"]), tmp_path / "x.gguf", "gguf")
    assert not list(tmp_path.iterdir())


def test_inspect_reads_both(tmp_path):
    model = adapted("llama", FACTORED["svfit"])
    for to, whose in (("gguf", "llama.cpp's"), ("mlx", "mlx-lm's")):
        export(model, tmp_path / WRITTEN[to], to)
        said = inspect(tmp_path / WRITTEN[to])
        assert f"a LoRA with {whose} keys" in said and "6 layers, rank 5" in said
    folder = smidgen.save(model, tmp_path / "own")
    assert "gguf" not in inspect(folder)
    model.peft_config["default"].task_type = "CAUSAL_LM"
    assert "kohya, gguf, mlx, full-diff" in inspect(smidgen.save(model, tmp_path / "own"))
