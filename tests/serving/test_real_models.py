"""SmolLM2 and MiniLM with adapters of six methods in one batch, against each alone."""

from pathlib import Path

import pytest
import torch

import smidgen
from serving.helpers import METHODS, config
from smidgen import testing
from smidgen.adapters.tuner.injection import remove
from smidgen.bases.transformers import load_language_model, load_tokenizer
from smidgen.serving.library import Library
from smidgen.serving.requests import EmbedRequest, TextRequest

pytestmark = pytest.mark.slow
QUESTIONS = (
    "What is a dog?",
    "Write one sentence about the sea, and one about the mountains behind it.",
    "Name three colours.",
    "Explain in a few words why the sky looks blue on a clear day and red in the evening.",
)


def chats(folder: Path) -> None:
    """One adapter a method: a little away from SmolLM2, so that what they say is still English and yet their own."""
    base = load_language_model("smollm2", "no", None)
    for seed, method in enumerate(METHODS):
        smidgen.adapt(base.model, config(method, ["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        testing.perturb(base.model, seed)
        smidgen.save(base.model, folder / method)
        remove(base.model, "default")


def test_smollm2_says_in_a_mixed_batch_what_each_adapter_says_alone(users_cache: None, tmp_path: Path) -> None:
    chats(tmp_path)
    models = [*METHODS, "smollm2"]
    turns = [({"role": "user", "content": QUESTIONS[at % 4]},) for at in range(len(models))]
    greedy = [TextRequest(model, said, 24) for model, said in zip(models, turns, strict=True)]
    drawn = [
        TextRequest(m, s, 24, temperature=0.8, top_p=0.9, seed=n)
        for n, (m, s) in enumerate(zip(models, turns, strict=True))
    ]
    with Library(tmp_path, bases=["smollm2"]) as library:
        handles = [library.generate(request) for request in (*greedy, *drawn)]
        together = [handle.result() for handle in handles]
        for handle, result in zip(handles, together, strict=True):
            assert "".join(event.text for event in list(handle)[:-1]) == result.text  # type: ignore[union-attr]
        for request, result in zip(drawn, together[len(greedy) :], strict=True):
            assert library.generate(request).result().token_ids == result.token_ids, request.model
    tokenizer, base = load_tokenizer("smollm2"), load_language_model("smollm2", "no", None).model.eval()
    for request, result in zip(greedy, together, strict=False):
        if request.model != "smollm2":
            smidgen.load(base, tmp_path / str(request.model))
        given = tokenizer.apply_chat_template(
            list(request.prompt), add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            said = base.generate(**given, max_new_tokens=24, do_sample=False)[0, given["input_ids"].shape[1] :]
        assert tuple(said.tolist()) == result.token_ids, request.model
        assert tokenizer.decode(said, skip_special_tokens=True) == result.text
        if request.model != "smollm2":
            remove(base, "default")


def test_minilm_embeds_as_sentence_transformers_do(users_cache: None, tmp_path: Path) -> None:
    with Library(tmp_path, bases=["minilm"]) as library:
        texts = ["A dog runs.", "A puppy is running through the garden.", "Interest rates rose."]
        dog, puppy, rates = (
            torch.tensor(one.vector) for one in library.embed_all([EmbedRequest("minilm", t) for t in texts])
        )
    assert len(dog) == 384 and float(dog @ puppy) > 0.6 > 0.2 > float(dog @ rates)
