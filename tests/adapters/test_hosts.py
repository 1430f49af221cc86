"""Adapters through transformers' own calls, its Trainer and sentence-transformers: saved, resumed, the best kept, reloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

import smidgen
from smidgen import testing
from smidgen.adapters.hosts import METHODS, RELOADED
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.errors import TargetError

IDS = torch.arange(3, 11)[None]


def bert(where: Path | None = None) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_labels=2
    )
    model = transformers.BertForSequenceClassification(config).eval()
    if where is not None:
        model.save_pretrained(where)
        model = transformers.BertForSequenceClassification.from_pretrained(where).eval()
    return model


def config(**options: Any) -> Any:
    return smidgen.config("svfit", r=4, target_modules=["query", "value"], **options)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(IDS).logits  # type: ignore[no-any-return]


def close(found: Tensor, wanted: Tensor, what: str) -> None:
    testing.close(found, wanted, what, factor=5)


# ---- transformers' own methods ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("put", ["add_adapter", "smidgen.adapt"])
def test_saved_and_read_by_transformers_own_calls(put: str, tmp_path: Path) -> None:
    model, own = bert(tmp_path / "base"), config(modules_to_save=["classifier"])
    plain = logits(model)
    model.add_adapter(own, "mine") if put == "add_adapter" else smidgen.adapt(model, own, "mine")
    testing.same(logits(model), plain, "at the start")
    testing.perturb(model)
    with torch.no_grad():
        model.classifier.modules_to_save["mine"].weight += 0.1
    wanted = logits(model)
    assert model.active_adapters() == ["mine"]
    model.disable_adapters()
    testing.same(logits(model), plain, "disable_adapters")
    model.enable_adapters()
    testing.same(logits(model), wanted, "enable_adapters, head included")
    model.save_pretrained(tmp_path / "adapter")
    assert smidgen.verify(model, tmp_path / "adapter").ok

    fresh = bert()
    info = fresh.load_adapter(str(tmp_path / "adapter"), "other")
    close(logits(fresh), wanted, "load_adapter")
    assert not any(p.requires_grad for p in fresh.parameters()) and fresh.active_adapters() == ["other"]
    assert info is None or not (info.missing_keys or info.unexpected_keys or info.error_msgs)
    trained = bert()
    trained.load_adapter(tmp_path / "adapter", is_trainable=True)
    assert smidgen.trained_numbers(trained) == sum(p.numel() for n, p in trained.named_parameters() if p.requires_grad and "smidgen" in n)  # fmt: skip
    whole = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    close(logits(whole), wanted, "from_pretrained of the adapter's folder")
    model.delete_adapter("mine")
    if transformers.__version__ >= "5":  # before, transformers leaves heads in place
        testing.same(logits(model), plain, "delete_adapter")


def test_where_the_base_lies_is_in_checkpoints_of_transformers_alone(tmp_path: Path) -> None:
    model = smidgen.adapt(bert(tmp_path / "base"), config())
    smidgen.save(model, tmp_path / "ours")
    model.save_pretrained(tmp_path / "hosts")
    named = [json.loads((tmp_path / d / "adapter_config.json").read_text()).get("base_model_name_or_path") for d in ("ours", "hosts")]  # fmt: skip
    assert named == ["base", str(tmp_path / "base")]


def test_a_damaged_file_is_refused_by_load_adapter_and_leaves_the_model(tmp_path: Path) -> None:
    from damage import rewrite

    model = testing.perturb(smidgen.adapt(bert(), config()))
    model.save_pretrained(tmp_path)
    content = (tmp_path / "adapter_model.safetensors").read_bytes()
    rewrite(tmp_path / "adapter_model.safetensors", content[:-4])
    fresh = bert()
    before = testing.snapshot(fresh)
    with pytest.raises(smidgen.SmidgenError, match="truncated"):
        fresh.load_adapter(str(tmp_path))
    testing.unchanged(before, fresh, "a refused file")


def test_adapters_of_pefts_own_go_through_transformers_own_code(tmp_path: Path) -> None:
    from transformers.integrations.peft import PeftAdapterMixin

    assert all(hasattr(getattr(PeftAdapterMixin, name), "__wrapped__") for name in (*METHODS, "load_adapter"))
    lora = get_peft_model(bert(), LoraConfig(target_modules=["query"], init_lora_weights=False))
    lora.save_pretrained(tmp_path)
    fresh = bert()
    try:
        fresh.load_adapter(str(tmp_path))
    except ValueError as error:  # transformers wants another peft for its own adapters, and says so as ever
        assert "PEFT" in str(error) or "peft" in str(error)
    else:
        close(logits(fresh), logits(lora), "peft's LoRA")
    with pytest.raises((ValueError, OSError)):
        bert().load_adapter(str(tmp_path / "nowhere"))


def test_factors_made_in_inference_mode_train_later() -> None:
    model = bert()
    model.add_adapter(config())
    with torch.inference_mode():
        model(IDS)
    model.train()(IDS, labels=torch.tensor([1])).loss.backward()
    assert all(p.grad is not None for layer in adapted_layers(model).values() for p in layer.smidgen_slots.parameters())


# ---- Trainer ---------------------------------------------------------------------------------------------------------

DATA = [{"input_ids": (torch.arange(8) * (i + 3)) % 37 + 3, "labels": torch.tensor(i % 2)} for i in range(8)]


def trainer(model: nn.Module, folder: Path, **options: Any) -> Any:
    arguments = transformers.TrainingArguments(
        str(folder), max_steps=4, save_steps=2, eval_steps=2, eval_strategy="steps", per_device_train_batch_size=4,
        learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True, **options,
    )  # fmt: skip
    return transformers.Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA)


PUTS: dict[str, Any] = {
    "smidgen": lambda: smidgen.adapt(bert(), config(modules_to_save=["classifier"])),
    "peft": lambda: get_peft_model(bert(), config(modules_to_save=["classifier"])),
    "LoRA by smidgen": lambda: smidgen.adapt(bert(), LoraConfig(target_modules=["query"], init_lora_weights=False)),
}


def put(kind: str) -> Any:
    torch.manual_seed(0)
    return PUTS[kind]()


@pytest.mark.parametrize("kind", ["smidgen", "peft"])
def test_trainer_resumes_keeps_the_best_and_reloads(kind: str, tmp_path: Path) -> None:
    model = put(kind)
    run = trainer(model, tmp_path, load_best_model_at_end=True)
    run.train()
    best = Path(run.state.best_model_checkpoint)
    assert (best / RELOADED).exists() == (kind == "smidgen")
    close(logits(smidgen.load(bert(), best)), logits(model), "the best checkpoint")
    assert smidgen.verify(bert(), best).ok
    last = put(kind)
    trainer(last, tmp_path / "again").train()
    resumed = put(kind)
    trainer(resumed, tmp_path / "again").train(resume_from_checkpoint=str(tmp_path / "again" / "checkpoint-2"))
    testing.same(logits(resumed), logits(last), "resumed at the second step against never stopped")
    run.save_model(str(tmp_path / "final"))
    close(logits(smidgen.load(bert(), tmp_path / "final")), logits(model), "save_model")


def test_what_trainer_reloads_holds_the_adapter_alone(tmp_path: Path) -> None:
    model = put("smidgen")
    trainer(model, tmp_path, save_only_model=True).train()
    held = load_file(tmp_path / "checkpoint-4" / RELOADED)
    assert held and all(".smidgen_slots.default." in name or "modules_to_save.default" in name for name in held)
    bases = {id(module.original_module) for module in model.modules() if hasattr(module, "original_module")}
    assert len(bases) == 1 and not any("original_module" in name for name in held)
    fresh = put("smidgen")
    fresh.load_state_dict(held, strict=False)
    close(logits(fresh), logits(model), "read by load_state_dict")


def test_trainer_leaves_models_without_adapters_alone(tmp_path: Path) -> None:
    smidgen.adapt(bert(), config())  # Trainer knows of us from here on
    trainer(bert(), tmp_path, save_only_model=True).train()
    assert "bert.encoder.layer.0.attention.self.query.weight" in load_file(tmp_path / "checkpoint-4" / RELOADED)


# ---- hosts around a transformers model -------------------------------------------------------------------------------


class Host(nn.Sequential):
    """As a SentenceTransformer: it saves the transformers model that it holds by that model's own call."""

    def save_pretrained(self, folder: Path) -> None:
        self[0].save_pretrained(folder)


def test_a_host_that_saves_the_model_in_it_is_refused_before_training(tmp_path: Path) -> None:
    host = Host(bert())
    before = testing.snapshot(host)
    with pytest.raises(
        TargetError, match=r"A Host saves the BertForSequenceClassification in it.*smidgen.adapt\(model.get_sub"
    ):
        smidgen.adapt(host, config())
    testing.unchanged(before, host, "a refused host")
    smidgen.adapt(host[0], config())
    wanted = logits(testing.perturb(host)[0])
    host.save_pretrained(tmp_path)
    close(logits(smidgen.load(bert(), tmp_path)), wanted, "the model inside, adapted and saved by its host")
    assert smidgen.names(smidgen.adapt(nn.Sequential(bert()), config())) == ["default"]  # anybody's own module


def test_sentence_transformers(tmp_path: Path) -> None:
    st = pytest.importorskip("sentence_transformers")
    models = pytest.importorskip("sentence_transformers.models")
    letters = list("abcdefghijklmnopqrstuvwxyz")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    transformers.BertTokenizer(str(tmp_path / "base" / "vocab.txt")).save_pretrained(tmp_path / "base")
    bert().bert.save_pretrained(tmp_path / "base")

    def base() -> Any:
        words = models.Transformer(str(tmp_path / "base"))
        return st.SentenceTransformer(modules=[words, models.Pooling(16)], device="cpu")

    texts, model = ["a b", "c d e"], base()
    model.add_adapter(config())
    wanted = testing.perturb(model).encode(texts, convert_to_tensor=True)
    model.save_pretrained(str(tmp_path / "saved"))
    again = st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")
    close(again.encode(texts, convert_to_tensor=True), wanted, "SentenceTransformer of the saved folder")
    fresh = base()
    fresh.load_adapter(str(tmp_path / "saved"))
    close(fresh.encode(texts, convert_to_tensor=True), wanted, "load_adapter")
    with pytest.raises(TargetError, match="add_adapter"):
        smidgen.adapt(base(), config())
