"""Exact exports on the real packaged bases and the embedded one, in fp32, through the readers themselves."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

import smidgen
from smidgen.adapters.checkpoint.formats import FORMATS, read_lora
from smidgen.adapters.export import export
from smidgen.adapters.tuner.injection import remove
from smidgen.bases.families import load_base
from smidgen.bases.packaged import MODELS
from smidgen.bases.packaged.fetch import cache_root
from smidgen.bases.packaged.folders import finished_folder
from smidgen.errors import FetchError, MissingExtraError
from tests.adapters.exported import FACTORED, TOLERANCE, WEIGHT, as_ours, changes, moved, off, same, same_changes

pytestmark = pytest.mark.usefixtures("users_cache")
TOKENS = torch.arange(200, 232).reshape(2, 16)
REAL: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {  # targets, an input
    "minilm": (("query", "value", "output.dense"), {"input_ids": TOKENS}),
    "vit-s14": (
        ("query", "value", "q_proj", "v_proj", "fc1"),
        {"pixel_values": torch.linspace(-2, 2, 3 * 56 * 56).reshape(1, 3, 56, 56)},
    ),
    "smollm2": (("q_proj", "v_proj", "down_proj"), {"input_ids": TOKENS}),
}
EVERY = FACTORED | {m: smidgen.config(m) for m in ("oft", "tlora", "tlora_star")}


def folder(name: str, fetch: bool) -> Path:
    """Where the weights of a packaged base are; the test is skipped where they cannot be had."""
    entry = MODELS[name]
    if not fetch and not (cache_root() / entry.kind.replace(" ", "-") / f"{name}-{entry.revision}").is_dir():
        pytest.skip(f"{name} is not in the cache; `make test-slow` fetches it ({entry.sources[0]}).")
    try:
        return finished_folder(entry)
    except (FetchError, MissingExtraError) as error:
        pytest.skip(f"{name} cannot be had here: {error}")


def load(name: str, where: Path) -> nn.Module:
    from transformers import AutoModel, AutoModelForCausalLM

    return (AutoModelForCausalLM if name == "smollm2" else AutoModel).from_pretrained(where, dtype=torch.float32).eval()


def answer(model: nn.Module, name: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**REAL[name][1])[0]


def strong(model: nn.Module, say: Callable[[], torch.Tensor], plain: torch.Tensor) -> torch.Tensor:
    """Gives an adapter numbers that change the answer by half of it or more, so that fp32's own noise, 1e-6 of an answer, is small
    beside what the adapter does; returns the answer."""
    for seed in range(16):
        moved(model, by=0.05 * 1.5**seed, seed=seed)
        wanted = say()
        if (wanted - plain).norm() > 0.5 * plain.norm():
            break
    return wanted


class Real:
    """A base with the adapter of one method after another, and what it says with each."""

    def __init__(self, name: str, where: Path) -> None:
        self.name, self.where = name, where
        self.model = load(name, where)
        self.plain = answer(self.model, name)

    def adapted(self, method: str) -> tuple[nn.Module, torch.Tensor]:
        """The model with a strong adapter, and its answer."""
        if "default" in smidgen.names(self.model):
            remove(self.model, "default")
        there = {name.rpartition(".")[2] for name, _ in self.model.named_modules()}
        targets = {t for t in REAL[self.name][0] if t.rpartition(".")[2] in there}  # transformers renamed some
        smidgen.adapt(self.model, replace(EVERY[method], target_modules=targets))
        return self.model, strong(self.model, lambda: answer(self.model, self.name), self.plain)

    def fresh(self) -> nn.Module:
        return load(self.name, self.where)

    def off(self, theirs: nn.Module, wanted: torch.Tensor) -> float:
        return off(answer(theirs, self.name), wanted, self.plain)


def through_peft(real: Real, model: nn.Module, wanted: torch.Tensor, out: Path, to: str = "peft") -> float:
    found = export(model, out, to)
    theirs = peft.PeftModel.from_pretrained(real.fresh(), out).eval()
    layers = {n: m for n, m in theirs.named_modules() if isinstance(m, peft.tuners.tuners_utils.BaseTunerLayer)}
    assert len(layers) == found.layers == len(changes(model))
    if to == "peft":
        same_changes(model, layers)
    return real.off(theirs, wanted)


def through_lycoris(real: Real, model: nn.Module, wanted: torch.Tensor, out: Path, to: str) -> float:
    lycoris = pytest.importorskip("lycoris", reason="lycoris-lora is not installed: pip install 'smidgen[dev]'")
    found = export(model, out / "x.safetensors", to)
    if to == "full-diff":
        there = FORMATS["full-diff"].read(out / "x.safetensors")
        for layer, change in changes(model).items():
            assert (there["lycoris_" + layer.replace(".", "_")] - change).norm() <= WEIGHT * change.norm()
    theirs = real.fresh()
    with torch.no_grad():
        network, _ = lycoris.create_lycoris_from_weights(1.0, str(out / "x.safetensors"), theirs)
        network.apply_to()
    assert len(network.loras) == found.layers
    theirs.network = network
    return real.off(theirs, wanted)


def merged(real: Real, model: nn.Module, wanted: torch.Tensor, out: Path) -> float:
    export(model, out, "merged")
    theirs = load(real.name, out)
    before, after = dict(real.fresh().named_parameters()), dict(theirs.named_parameters())
    for layer, change in changes(model).items():
        whole = (after[f"{layer}.weight"].double() - before[f"{layer}.weight"].double() - change).norm()
        assert whole <= WEIGHT * before[f"{layer}.weight"].norm().clamp(min=float(change.norm()))  # rounding of the sum
    return real.off(theirs, wanted)


Way = Callable[[Real, nn.Module, torch.Tensor, Path], float]
WAYS: dict[str, Way] = {
    "peft": through_peft,
    "peft-oft": lambda *a: through_peft(*a, to="peft-oft"),
    "kohya": lambda *a: through_lycoris(*a, to="kohya"),
    "full-diff": lambda *a: through_lycoris(*a, to="full-diff"),
    "merged": merged,
}


def ways(method: str) -> list[str]:
    """The formats that hold a method exactly."""
    return [
        *(["peft", "kohya"] if method in FACTORED else []),
        *(["peft-oft"] if method == "oft" else []),
        "full-diff",
        "merged",
    ]


def held(name: str, methods: dict[str, list[str]], out: Path, fetch: bool, most: float = TOLERANCE) -> None:
    real, errors = Real(name, folder(name, fetch)), {}
    for method, formats in methods.items():
        model, wanted = real.adapted(method)
        for to in formats:
            errors[f"{method} -> {to}"] = WAYS[to](real, model, wanted, out / f"{method}-{to}")
    print(name, json.dumps({route: f"{error:.1e}" for route, error in errors.items()}))
    assert not {route: error for route, error in errors.items() if not error <= most}


@pytest.mark.parametrize("name", ["minilm", "vit-s14"])
def test_a_real_base_through_peft_and_lycoris(name, tmp_path):
    held(name, {"svfit": ["peft", "kohya"], "oft": ["peft-oft"]}, tmp_path, fetch=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minilm", "vit-s14"])
def test_every_exact_route_of_a_real_base(name, tmp_path):
    held(name, {method: ways(method) for method in EVERY}, tmp_path, fetch=True)


@pytest.mark.slow
def test_exact_routes_of_a_real_language_model(tmp_path):
    every = {method: ["peft"] for method in FACTORED} | {
        "svfit": ["peft", "kohya"],
        "oft": ["peft-oft"],
        "tlora": ["full-diff", "merged"],
    }
    held("smollm2", every, tmp_path, fetch=True, most=1e-5)  # fp32's own: in fp64 oft's file is exact (docs/export.md)


@pytest.mark.parametrize(
    "method", [m if m in ("svfit", "loldu") else pytest.param(m, marks=pytest.mark.slow) for m in FACTORED]
)
def test_a_factored_method_of_the_embedded_base_through_diffusers(method, tmp_path):
    base = load_base("embedded")
    latents = torch.randn(2, *base.latent_shape(base.resolution), generator=torch.Generator().manual_seed(1))
    times, words = base.schedule.timesteps(torch.tensor([0.3, 0.7])), base.encode_prompts(["a person", "a cat"])

    def said(of: Any) -> torch.Tensor:
        with torch.no_grad():
            return of.predict(of.model, latents, times, words)

    plain = said(base)
    smidgen.adapt(base.pipe, replace(FACTORED[method], target_modules=set(base.targets)))
    wanted = strong(base.model, lambda: said(base), plain)
    found = export(base.pipe, tmp_path, "diffusers")
    fresh = load_base("embedded")
    fresh.pipe.load_lora_weights(tmp_path)
    theirs = {n: m for n, m in fresh.model.named_modules() if len(getattr(m, "lora_A", ()))}
    assert len(theirs) == found.layers == len(changes(base.model))
    same_changes(base.model, theirs)
    print("embedded", method, f"{off(said(fresh), wanted, plain):.1e}")
    assert off(said(fresh), wanted, plain) <= TOLERANCE
    if method == "svfit":  # and back into an adapter of ours
        loras = {name.removeprefix("unet."): one for name, one in read_lora(tmp_path).items()}
        same(changes(as_ours(load_base("embedded").model, loras)), changes(base.model))
