"""Each image of a batch is what its adapter draws alone, with its own guidance, steps and seed, whoever is beside it."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import smidgen
from serving.helpers import image_adapters
from smidgen.adapters.tuner.injection import remove
from smidgen.bases.families import load_base
from smidgen.errors import ConfigError
from smidgen.serving.image_batching import Call, alike, merged, split
from smidgen.serving.library import Library
from smidgen.serving.requests import CancelledRequestError, ImageRequest, ImageResult, Progress

PROMPTS = ("a portrait of a person", "a person with red hair, smiling")
FEW, MANY = ("svfit", "lora"), ("svfit", "lora", "loldu", "tlora", "oft", "seeded")
BASES = [(name, FEW) for name in ("embedded", "embedded-flow")]
BASES += [pytest.param((name, MANY), marks=pytest.mark.slow) for name in ("embedded", "embedded-flow")]  # type: ignore[misc]


@pytest.fixture(scope="module", params=BASES, ids=lambda param: f"{param[0]}-{len(param[1])}")
def drawn(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A library of adapters of a base that draws, the base beside it, and the latents that the library made."""
    name, methods = request.param
    folder, base = tmp_path_factory.mktemp(name), load_base(name)
    image_adapters(folder, base, methods)
    with Library(folder, bases=[name]) as library:
        inner = library._host(name, "draw", ()).batches["draw"]._base  # type: ignore[attr-defined]
        latents: list[torch.Tensor] = []
        decode = inner.decode
        inner.decode = lambda given: latents.extend(given) or decode(given)
        yield SimpleNamespace(name=name, methods=methods, folder=folder, base=base, library=library, latents=latents)


def alone(drawn: Any, asked: ImageRequest) -> torch.Tensor:
    """Latents by the base's own pipeline with one adapter in the denoiser, or none."""
    base = drawn.base
    if asked.model != drawn.name:
        smidgen.load(base.pipe, drawn.folder / asked.model)
    prompts, negative = base.encode_prompts([asked.prompt]), base.encode_prompts([asked.negative_prompt])
    options = base.sampling.chosen(asked.steps, asked.guidance)
    found = base.draw_latents(prompts, [asked.seed], negative=negative, **options)[0]
    if asked.model != drawn.name:
        remove(base.model, "default")
    return found  # type: ignore[no-any-return]


def same(one: Any, other: Any) -> bool:
    """Whether images differ by rounding alone: one level of 255."""
    return max(abs(a - b) for a, b in zip(one.tobytes(), other.tobytes(), strict=True)) <= 1


def test_all_methods_and_the_base_in_one_batch_draw_what_each_draws_alone(drawn: Any) -> None:
    models = [*drawn.methods, drawn.name]
    requests = [
        ImageRequest(
            model, PROMPTS[at % 2], "a cat" * (at == 3), seed=at, steps=2 + at % 3, guidance=(3.0, 1.0, 5.0)[at % 3]
        )
        for at, model in enumerate(models)
    ]
    before = drawn.library.counters().steps
    drawn.latents.clear()
    found = drawn.library.draw_all(requests)
    assert drawn.library.counters().steps - before <= 10  # two calls a step at most, and of all images together
    by_image = {id(result): result for result in found}
    assert len(by_image) == len(models) == len(drawn.latents)
    for request, result in zip(requests, found, strict=True):
        expected = alone(drawn, request)
        near = min(float((one - expected).abs().max()) for one in drawn.latents)
        assert near < 1e-4 * max(1.0, float(expected.abs().max())), request.model
        assert isinstance(result, ImageResult) and (result.steps, result.guidance) == (request.steps, request.guidance)
        assert [served.name for served in result.adapters] == [request.model] * (request.model != drawn.name)
        (image,) = drawn.base.decode(expected[None])
        assert same(image, result.image)
    plain = alone(drawn, ImageRequest(drawn.name, PROMPTS[0], seed=0, steps=2, guidance=3.0))
    moved = alone(drawn, requests[0])
    assert float((plain - moved).abs().max()) > 0.01


def test_an_image_joins_one_that_is_half_done_and_one_is_cancelled(drawn: Any) -> None:
    whole = ImageRequest("svfit", PROMPTS[0], seed=1, steps=6)
    expected = drawn.library.draw(whole).result(120)
    first = drawn.library.draw(whole)
    for event in first:
        if event == Progress(2, 6):
            break
    second = drawn.library.draw(ImageRequest("lora", PROMPTS[1], seed=2, steps=2))
    third = drawn.library.draw(ImageRequest("lora", PROMPTS[1], seed=2, steps=50))
    third.cancel()
    with pytest.raises(CancelledRequestError):
        third.result(120)
    assert second.result(120).seed == 2
    assert same(first.result(120).image, expected.image)
    assert [event for event in first.events() if isinstance(event, Progress)] == [Progress(at, 6) for at in range(1, 7)]


def test_what_cannot_be_drawn_is_refused(drawn: Any) -> None:
    with pytest.raises(ConfigError, match="multiples of"):
        drawn.library.draw(ImageRequest("svfit", PROMPTS[0], size=(64, 65))).result(60)
    with pytest.raises(ConfigError, match="inference_steps"):
        drawn.library.draw(ImageRequest("svfit", PROMPTS[0], steps=0))
    with pytest.raises(ConfigError, match="guidance"):
        drawn.library.draw(ImageRequest("svfit", PROMPTS[0], guidance=float("nan")))


def test_calls_are_one_where_what_is_beside_their_rows_is_the_same() -> None:
    def call(rows: int, time: float, ids: torch.Tensor, **more: Any) -> Call:
        return Call(
            (torch.full((rows, 4, 2), time), torch.tensor(time)), {"ids": ids, "some": {"x": torch.ones(1, 3)}, **more}
        )

    ids, listed = torch.arange(15).reshape(5, 3), {"caps": [torch.zeros(2)]}
    one, two = call(1, 5.0, ids, **listed), call(1, 7.0, ids, caps=[torch.zeros(9)])
    assert one.form == two.form and alike([one, two])
    args, kwargs = merged([one, two])
    assert args[0].shape == (2, 4, 2) and args[1].tolist() == [5.0, 7.0] and kwargs["some"]["x"].shape == (2, 3)
    assert torch.equal(kwargs["ids"], ids) and [len(cap) for cap in kwargs["caps"]] == [2, 9]
    assert not alike([one, call(1, 7.0, ids + 1, **listed)])
    assert one.form != call(1, 5.0, ids, caps=None).form
    both = merged([call(2, 5.0, ids), call(1, 7.0, ids)])[0]
    assert both[1].tolist() == [5.0, 5.0, 7.0]
    parts = split((torch.arange(3), [1, 2, 3]), [2, 1])
    assert parts[0][1] == [1, 2] and parts[1][0].tolist() == [2]
