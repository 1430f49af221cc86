"""Classes by the heads of adapters, and vectors, in mixed batches."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import smidgen
from serving.helpers import CHAT, IMAGE, TEXT, classifier, copied
from smidgen.bases.transformers import load_language_model, load_tokenizer
from smidgen.errors import ConfigError, DataError
from smidgen.serving.library import Library
from smidgen.serving.requests import ClassifyRequest, EmbedRequest
from smidgen.tasks.classifying import Classifier

TEXTS = ["the film was good", "the road was bad and the book was dull and cold", "a day", "the meal was warm ."]


def test_classes_of_a_mixed_batch_are_each_adapters_own(moods: Path) -> None:
    with Library(moods) as library:
        requests = [ClassifyRequest(name, text) for text in TEXTS for name in ("two", "other", "three")]
        found = library.classify_all(requests)
        for name in ("two", "other", "three"):
            single = Classifier(moods / name)(TEXTS)
            ours = [one for one, request in zip(found, requests, strict=True) if request.model == name]
            for one, other in zip(ours, single, strict=True):
                assert one.answer == other.answer and one.logits == pytest.approx(other.logits, abs=1e-5)
                assert one.adapters[0].name == name and one.prompt_tokens > 2
        assert library.counters().steps < len(requests)
        two, three = (library._host_of(library._entry(name)).residents for name in ("two", "three"))
        assert two is not three  # heads of other sizes, and yet one base in memory
        shared = [model.model.base_model.embeddings.word_embeddings.weight.data_ptr() for model in (two, three)]  # type: ignore[union-attr,operator]
        assert shared[0] == shared[1]


def test_a_pair_of_texts_and_what_has_no_head(moods: Path, chats: Path, tmp_path: Path) -> None:
    copied(moods / "two", tmp_path / "two")
    copied(moods / "other", tmp_path / "other")
    copied(chats / "svfit", tmp_path / "talks")
    with Library(tmp_path) as library:
        pair = library.classify(ClassifyRequest("two", (TEXTS[0], TEXTS[1]))).result(60)
        expected = Classifier(tmp_path / "two")([(TEXTS[0], TEXTS[1])])[0]
        assert pair.logits == pytest.approx(expected.logits, abs=1e-5)
        with pytest.raises(ConfigError, match="2 adapters that each bring a head"):
            library.classify(ClassifyRequest({"two": 1.0, "other": 1.0}, TEXTS[0]))
        with pytest.raises(ConfigError, match="generate or embed, not to classify"):
            library.classify(ClassifyRequest("talks", TEXTS[0]))
        with pytest.raises(ConfigError, match="cannot classify"):
            library.classify(ClassifyRequest(TEXT, TEXTS[0]))
        with pytest.raises(DataError, match="A text is asked for"):
            library.classify(ClassifyRequest("two", (TEXTS[0], 3)))  # type: ignore[arg-type]


def test_vectors_of_encoders_and_of_a_language_model(moods: Path, chats: Path, tmp_path: Path) -> None:
    copied(moods / "two", tmp_path / "two")
    copied(chats / "svfit", tmp_path / "talks")
    with Library(tmp_path) as library:
        names = ["two", TEXT, "talks", CHAT]
        found = library.embed_all([EmbedRequest(name, text) for text in TEXTS for name in names])
        single = [library.embed(EmbedRequest(name, text)).result(60) for text in TEXTS for name in names]
        for one, other in zip(found, single, strict=True):
            assert one.vector == pytest.approx(other.vector, abs=1e-5)
            assert sum(value**2 for value in one.vector) == pytest.approx(1, abs=1e-5)
        assert len({one.vector[:3] for one in found}) == len(found)  # nobody's vector is another's
        with pytest.raises(DataError, match="no tokens"):
            library.embed(EmbedRequest(CHAT, ""))
    model = load_language_model(CHAT, "no", None).model.eval()
    smidgen.load(model, chats / "svfit")
    given = load_tokenizer(CHAT)(TEXTS[1], return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():
        states = model.model(**given).last_hidden_state[0].mean(0)
    assert found[6].vector == pytest.approx((states / states.norm()).tolist(), abs=1e-5)


def test_images_are_sorted(tmp_path: Path) -> None:
    for seed in range(2):
        classifier(tmp_path / "library" / f"c{seed}", ("red", "green"), seed, IMAGE)
    pixels = np.random.default_rng(0).integers(0, 255, (2, 40, 50, 3), dtype=np.uint8)
    files = [tmp_path / f"{at}.png" for at in range(2)]
    for file, values in zip(files, pixels, strict=True):
        Image.fromarray(values).save(file)
    with Library(tmp_path / "library") as library:
        found = library.classify_all([ClassifyRequest(f"c{seed}", file) for seed in range(2) for file in files])
        opened = library.classify(ClassifyRequest("c0", Image.open(files[0]))).result(60)
        assert opened.logits == found[0].logits
        expected = [one for seed in range(2) for one in Classifier(tmp_path / "library" / f"c{seed}")(files)]
        for one, other in zip(found, expected, strict=True):
            assert one.logits == pytest.approx(other.logits, abs=1e-5)
        with pytest.raises(ConfigError, match="ask it to classify, not to embed"):
            library.embed(EmbedRequest("c0", "red"))
