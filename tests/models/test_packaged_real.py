"""The real packages: fetched or found in the user's cache, converted, and known for what they are."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from smidgen.bases.packaged import DATASETS, dataset_folder, model_folder
from smidgen.bases.packaged.fetch import contents

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("users_cache")]
SENTENCES = ["A man is playing a guitar.", "Someone strums an instrument.", "The stock market fell sharply."]


def embed(texts: list[str], name: str = "minilm", batch: int = 32, length: int = 96) -> torch.Tensor:
    """Mean of an encoder's last states, one row a text."""
    from transformers import AutoModel, AutoTokenizer

    folder = model_folder(name)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows = torch.empty(len(texts), model.config.hidden_size)
    for start in range(0, len(order), batch):
        some = order[start : start + batch]
        tokens = tokenizer(
            [texts[i] for i in some], padding=True, truncation=True, max_length=length, return_tensors="pt"
        )
        with torch.no_grad():
            states = model(**tokens).last_hidden_state
        mask = tokens["attention_mask"][..., None].float()
        rows[some] = (states * mask).sum(1) / mask.sum(1)
    return rows


def probe(train: torch.Tensor, train_labels: list[str], test: torch.Tensor, test_labels: list[str]) -> float:
    """Test accuracy of a logistic regression on standardised features (weight decay 0.01, L-BFGS)."""
    names = sorted(set(train_labels))
    mean, spread = train.mean(0), train.std(0) + 1e-6
    x, y = (train - mean) / spread, torch.tensor([names.index(label) for label in train_labels])
    head = torch.nn.Linear(x.shape[1], len(names))
    torch.nn.init.zeros_(head.weight)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(head(x), y) + 0.01 * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    read = [names[i] for i in head((test - mean) / spread).argmax(1)]
    return float(np.mean([a == b for a, b in zip(read, test_labels, strict=True)]))


def text_rows(name: str, split: str) -> tuple[list[str], list[str]]:
    import pyarrow.parquet as pq

    table = pq.read_table(dataset_folder(name) / f"{split}.parquet")
    return table["text"].to_pylist(), table["label"].to_pylist()


@pytest.mark.parametrize("name, near, far", [("minilm", 0.564, -0.064), ("mpnet", 0.639, -0.028)])
def test_an_encoder_says_what_it_is_known_to_say(name, near, far):
    rows = torch.nn.functional.normalize(embed(SENTENCES, name), dim=-1)
    alike = rows @ rows.T
    assert alike[0, 1].item() == pytest.approx(near, abs=2e-3)
    assert alike[0, 2].item() == pytest.approx(far, abs=2e-3)


def test_mpnet_is_whole_and_has_the_papers_count():
    from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

    import smidgen

    folder = model_folder("mpnet")
    model, loaded = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(loaded.values()) and sum(p.numel() for p in model.parameters()) == 109_486_464
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.pad_token_id == model.config.pad_token_id == model.embeddings.padding_idx == 1
    assert tokenizer.model_max_length == 512 == model.config.max_position_embeddings - 2
    assert tokenizer("Hello", "World")["input_ids"] == tokenizer.convert_tokens_to_ids(
        ["<s>", "hello", "</s>", "</s>", "world", "</s>"]
    )
    classifier, loaded = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=3, output_loading_info=True
    )
    assert {name.partition(".")[0] for name in loaded["missing_keys"]} == {"classifier"}
    for method, base in (("svfit", classifier), ("loldu", model)):
        adapted = smidgen.adapt(base, method, r="full", target_modules=["q", "v"])
        assert smidgen.trained_numbers(adapted) == 12 * 2 * 768 == 18_432


def test_vit_is_the_onnx_graph_to_rounding():
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    from transformers import AutoImageProcessor, AutoModel

    from smidgen.bases.packaged import vit_s14

    folder = model_folder("vit-s14")
    model = AutoModel.from_pretrained(folder).eval()
    assert sum(p.numel() for p in model.parameters()) == 22_056_576
    graph = onnx.load_from_string(contents(vit_s14.SOURCE, vit_s14.ONNX)[vit_s14.ONNX])
    last = next(n for n in graph.graph.node if n.op_type == "Add" and "backbone.layernorm.bias" in n.input).output[0]
    graph.graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None))
    session = runtime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    pixels = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    expected = torch.tensor(session.run([last], {"input_image": pixels.numpy()})[0])
    with torch.no_grad():
        states = model(pixels).last_hidden_state
        assert (states - expected).abs().max() < 1e-4
        for side in (56, 112, 518):
            assert model(torch.zeros(1, 3, side, side)).last_hidden_state.shape == (1, 1 + (side // 14) ** 2, 384)
    assert list(AutoImageProcessor.from_pretrained(folder).image_mean) == [0.485, 0.456, 0.406]


def test_vit_positions_at_their_own_size_are_the_table():
    from transformers import AutoModel

    folder = model_folder("vit-s14")
    embeddings = AutoModel.from_pretrained(folder).embeddings
    table = load_file(folder / "model.safetensors")["embeddings.position_embeddings"]
    patches = torch.zeros(1, 1370, 384)
    assert torch.equal(embeddings.interpolate_pos_encoding(patches, 518, 518), table)
    grid = table[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, size=(8, 8), mode="bicubic", align_corners=False)
    found = embeddings.interpolate_pos_encoding(torch.zeros(1, 65, 384), 112, 112)[:, 1:]
    torch.testing.assert_close(found, wanted.flatten(2).transpose(1, 2))


def test_smollm_knows_the_capital_of_france():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = model_folder("smollm2")
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder).eval()
    assert model.dtype == torch.float32 and sum(p.numel() for p in model.parameters()) == 134_515_008
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    said = model.generate(**asked, max_new_tokens=20, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(said) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.parametrize(
    "name, sizes, labels",
    [("tweets", (6000, 2000, 8000), 3), ("foods", (3400, 500, 1000), 2), ("spam", (3500, 500, 1000), 2)],
)
def test_text_splits(name, sizes, labels):
    splits = {split: text_rows(name, split) for split in ("train", "validation", "test")}
    assert tuple(len(texts) for texts, _ in splits.values()) == sizes
    assert all(len(set(marks)) == labels for _, marks in splits.values())
    texts = [text for some, _ in splits.values() for text in some]
    assert len(set(texts)) == len(texts)


def test_emoji_never_lie_in_two_splits():
    folder = dataset_folder("emoji")
    pictures = {split: sorted(folder.glob(f"{split}/*/*.png")) for split in ("train", "validation", "test")}
    assert [len(paths) for paths in pictures.values()] == [3000, 600, 1200]
    assert len({path.parent.name for path in pictures["train"]}) == 8
    codes = {split: {path.stem.rsplit("-", 1)[0] for path in paths} for split, paths in pictures.items()}
    assert [len(some) for some in codes.values()] == [600, 120, 240]
    assert len(set().union(*codes.values())) == 960
    assert Counter(path.stem.rsplit("-", 1)[1] for path in pictures["test"]) == dict.fromkeys(
        ("noto", "twemoji", "fluent", "emojione", "openmoji"), 240
    )


@pytest.mark.parametrize(
    "name, sizes, step, least, most",
    [("mnist", (7000, 1000, 2000), 4, 0.83, 0.95), ("fashion-mnist", (10_000, 2000, 10_000), 5, 0.76, 0.88)],
)
def test_grey_pictures_and_what_their_pixels_say(name, sizes, step, least, most):
    from PIL import Image

    folder = dataset_folder(name)
    pictures = {split: sorted(folder.glob(f"{split}/*/*.png")) for split in ("train", "validation", "test")}
    assert tuple(len(paths) for paths in pictures.values()) == sizes
    assert all(len({path.parent.name for path in paths}) == 10 for paths in pictures.values())
    rows = {
        split: (
            torch.tensor(np.stack([np.asarray(Image.open(path), np.float32).ravel() / 255 for path in paths])),
            [path.parent.name for path in paths],
        )
        for split, paths in pictures.items()
    }
    assert rows["test"][0].shape[1] == 28 * 28
    assert len({row.numpy().tobytes() for found, _ in rows.values() for row in found}) == sum(sizes)
    accuracy = probe(rows["train"][0][::step], rows["train"][1][::step], *rows["test"])
    assert least < accuracy < most


@pytest.mark.parametrize("name, least", [("wordnet", 2000), ("quiz", 500), ("chatterbot", 400)])
def test_instructions(name, least):
    folder = dataset_folder(name)
    seen: list[str] = []
    for split in ("train", "validation", "test"):
        talks = [json.loads(line)["messages"] for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        assert all([turn["role"] for turn in talk] == ["user", "assistant"] for talk in talks)
        assert all(turn["content"].strip() for talk in talks for turn in talk)
        assert split != "train" or len(talks) >= least
        seen += [talk[0]["content"].lower() for talk in talks]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("name, least, most", [("tweets", 0.76, 0.90), ("foods", 0.66, 0.82), ("spam", 0.92, 0.995)])
def test_frozen_minilm_reads_the_labels(name, least, most):
    train, test = text_rows(name, "train"), text_rows(name, "test")
    accuracy = probe(embed(train[0][:1500]), train[1][:1500], embed(test[0][:600]), test[1][:600])
    assert least < accuracy < most


def test_frozen_vit_reads_emoji_groups():
    from PIL import Image
    from transformers import AutoImageProcessor, AutoModel

    folder = model_folder("vit-s14")
    processor, model = AutoImageProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()

    def features(paths: list[Path]) -> torch.Tensor:
        rows = []
        for start in range(0, len(paths), 50):
            pictures = [Image.open(path).convert("RGB") for path in paths[start : start + 50]]
            pixels = processor(pictures, size={"height": 112, "width": 112}, return_tensors="pt")
            with torch.no_grad():
                states = model(**pixels).last_hidden_state
            rows.append(torch.cat([states[:, 0], states[:, 1:].mean(1)], 1))
        return torch.cat(rows)

    paths = {split: sorted(dataset_folder("emoji").glob(f"{split}/*/*.png")) for split in ("train", "test")}
    chosen = {"train": paths["train"][::2], "test": paths["test"][::2]}
    labels = {split: [path.parent.name for path in some] for split, some in chosen.items()}
    accuracy = probe(features(chosen["train"]), labels["train"], features(chosen["test"]), labels["test"])
    assert 0.5 < accuracy < 0.72


def test_every_folder_says_its_licence():
    for name, entry in DATASETS.items():
        text = (dataset_folder(name) / "LICENCE.txt").read_text()
        assert entry.licence in text and entry.attribution in text and entry.sources[0].sha256 in text
