"""What a stranger found wrong with adapters of whole pipelines, each as a test: silence about a part is the fault."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import Tensor, nn

import smidgen
from smidgen import testing
from smidgen.adapters.checkpoint.formats import FORMATS, Source
from smidgen.adapters.export import export, place_of
from smidgen.adapters.tuner.carried import tuner_layers
from smidgen.errors import SmidgenError

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    from tests.training.tiny import sd_folder

    return sd_folder(tmp_path_factory.mktemp("pipe"))


@pytest.fixture
def make(folder):
    return lambda: diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


@torch.no_grad()
def drawn(unet: nn.Module) -> Tensor:
    from smidgen.adapters.example_inputs import _of_diffusers

    given, _ = next(_of_diffusers(unet, unet.config))
    return unet(**given).sample


@torch.no_grad()
def encoded(pipe) -> Tensor:
    return pipe.text_encoder(torch.tensor([[5, 6, 7, 8]])).last_hidden_state


def two_parts(make, tmp_path):
    pipe = make()
    for part in (pipe.unet, pipe.text_encoder):
        smidgen.adapt(part, "svfit", r=4)
        testing.perturb(part, seed=3, size=0.3)
    return pipe, smidgen.save(pipe, tmp_path / "both")


def test_all_parts_of_a_pipeline_are_combined_and_resized(make, tmp_path, caplog):
    pipe, saved = two_parts(make, tmp_path)
    (tmp_path / "old" / "vae").mkdir(parents=True)
    for found in (
        smidgen.combine([saved, saved], [0.5, 0.5], out=tmp_path / "mean"),
        smidgen.resize(saved, rank=8, out=tmp_path / "larger").folder,
    ):
        again = smidgen.load(make(), found)
        testing.close(drawn(again.unet), drawn(pipe.unet), "the denoiser")
        testing.close(encoded(again), encoded(pipe), "the text encoder")
    alone = smidgen.save(pipe.unet, tmp_path / "alone")
    with pytest.raises(SmidgenError, match="different parts of a pipeline: one has none of the text_encoder"):
        smidgen.combine([saved, alone], out=tmp_path / "no")
    smidgen.combine([alone, alone], out=tmp_path / "mean")  # over one of two parts: the other goes
    assert [path.name for path in sorted((tmp_path / "mean").rglob("*.json"))] == ["adapter_config.json"]
    bank = smidgen.Bank(pipe.unet, pipe.unet.peft_config["default"])
    caplog.clear()
    bank.put("ann", saved)
    assert "also holds adapters of a pipeline's text_encoder" in caplog.text
    with pytest.raises(SmidgenError, match="A bank is of a module, such as the UNet"):
        smidgen.Bank(pipe, pipe.unet.peft_config["default"])


def test_ranks_that_differ_by_layer_are_read_right_of_kohyas_keys(make, tmp_path):
    pipe = make()
    smidgen.adapt(pipe, "svfit", r=4, rank_pattern={"attn1.to_q": 8, "attn2.to_v": 2})
    testing.perturb(pipe.unet, seed=3, size=0.5)
    assert {rank for layer in tuner_layers(pipe.unet, "default").values() for rank in layer.r.values()} == {2, 4, 8}
    for to in ("kohya", "diffusers"):
        written = export(pipe, tmp_path / to, to)
        other = make()
        other.load_lora_weights(str(tmp_path / to), weight_name=next(iter(written.files)))
        testing.close(drawn(other.unet), drawn(pipe.unet), to)


def test_parts_that_diffusers_does_not_read_are_not_written_for_it(make, tmp_path):
    pipe = make()
    smidgen.adapt(pipe.vae, "lora", r=2, target_modules=["decoder.conv_out"])
    with pytest.raises(SmidgenError, match="reads unet and text_encoder alone"):
        export(pipe, tmp_path / "a", "diffusers")
    pipe = smidgen.adapt(make(), "lora", r=2)
    two = {"unet": pipe.unet, "transformer_2": pipe.unet, "text_encoder": pipe.text_encoder}
    for known, said in (
        (None, "has no load_lora_weights"),
        (["unet", "transformer_2"], "from keys of the transformer"),
    ):
        stand = type("Pipe", (), {"components": {**two, "unet": pipe.unet}, "_lora_loadable_modules": known})
        reason = FORMATS["diffusers"].refusal(place(pipe, "transformer_2"), source(stand()))
        assert said in str(reason)
    assert not (tmp_path / "a").exists()


def place(pipe, component):
    name, layer = next(iter(tuner_layers(pipe.unet, "default").items()))
    return place_of(component, name, layer)


def source(pipe):
    return Source(components=tuple(pipe.components), model=pipe)


def test_a_merged_neighbour_does_not_go_along(make, tmp_path):
    pipe = make()
    smidgen.adapt(pipe, "lora", "a", r=2)
    smidgen.adapt(pipe, "svfit", "b", r=4)
    testing.perturb(pipe.unet, seed=3, size=0.5, adapter_name="a")
    testing.perturb(pipe.unet, seed=4, size=0.5, adapter_name="b")
    smidgen.set_active(pipe, "a")
    alone = drawn(pipe.unet)
    smidgen.set_active(pipe, "b")
    for layer in pipe.unet.modules():
        if hasattr(layer, "merged_adapters"):
            layer.merge(adapter_names=["b"])
    both = drawn(pipe.unet)
    export(pipe, tmp_path / "whole", "merged", "a")
    testing.close(drawn(diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "whole").unet), alone, "a alone")
    testing.close(drawn(pipe.unet), both, "and the model itself is as it was")


def test_an_adapter_where_the_pipeline_does_not_look_is_off(make, tmp_path):
    """Its own part's output moves, and no picture: SDXL leaves the last layer of its first text encoder out."""
    from tests.training.tiny import sdxl_folder

    larger = sdxl_folder(tmp_path / "sdxl")
    sdxl = partial(diffusers.StableDiffusionXLPipeline.from_pretrained, larger)
    for make_one, component, target, on in (
        (sdxl, "text_encoder", "encoder.layers.1.mlp.fc1", False), (sdxl, "text_encoder", "encoder.layers.0.mlp.fc1", True),
        (sdxl, "text_encoder_2", "encoder.layers.1.mlp.fc1", True), (make, "text_encoder", "encoder.layers.1.mlp.fc1", True),
        (make, "vae", "encoder.conv_in", False), (make, "vae", "decoder.conv_in", True),
    ):  # fmt: skip
        pipe = make_one()
        part = getattr(pipe, component)
        target = next(name for name, _ in part.named_modules() if name.endswith(target))
        smidgen.adapt(part, "lora", r=2, target_modules=[target])
        testing.perturb(part, seed=3, size=0.5)
        saved = smidgen.save(pipe, tmp_path / "adapter" / str(target) / str(on))
        for model in (pipe, make_one()):
            report = smidgen.verify(model, saved)
            assert report.verdict == ("ON" if on else "OFF"), (component, target, str(report))


def test_a_pipeline_that_carries_an_adapter_is_not_saved_under_names_that_nobody_finds(make, tmp_path):
    pipe = smidgen.adapt(make(), "lora", r=2)
    for part in (pipe, pipe.unet):
        with pytest.raises(SmidgenError, match=r"carries the adapter 'default': smidgen\.save writes"):
            part.save_pretrained(tmp_path / "whole")
    assert not (tmp_path / "whole").exists()
    smidgen.merge(pipe).save_pretrained(tmp_path / "whole")
    testing.close(
        drawn(make().unet), drawn(diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "whole" / "unet")), "merged"
    )


class Padded(nn.Module):
    """Asks its convolution for its stride, as MobileNets do to pad for it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        (high, _), (step, _) = self.conv.kernel_size, self.conv.stride
        return self.conv(nn.functional.pad(x, (0, max(high - step, 0)) * 2))


def test_a_model_may_ask_an_adapted_layer_how_it_is_made():
    net = Padded()
    x = torch.randn(2, 3, 9, 9)
    before = net(x)
    smidgen.adapt(net, "lora", r=2, target_modules=["conv"])
    testing.same(net(x), before, "at its start")
    assert (net.conv.dilation, net.conv.groups, net.conv.in_channels) == ((1, 1), 1, 3)


class Listed(nn.Module):
    """Takes a tensor for each row, as Z-Image does, or for each level of a pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, given: list[Tensor], by: Tensor | None = None) -> Tensor:
        if by is None:
            return self.proj(sum(level.mean(1) for level in given))
        return self.proj(torch.cat(given)).unflatten(0, (len(given), -1)) * by[:, None, None]


def two(net: nn.Module, **options) -> smidgen.Bank:
    for name, seed in (("ann", 1), ("bob", 2)):
        smidgen.adapt(net, "lora", name, r=2, **options)
        testing.perturb(net, seed=seed, size=0.5, adapter_name=name)
    bank = smidgen.Bank(net, net.peft_config["ann"])
    for name in ("ann", "bob"):
        bank.put(name, net, name)
    return bank


def alone(net: nn.Module, name: str | None, call) -> Tensor:
    with smidgen.disabled(net) if name is None else nullcontext():
        smidgen.set_active(net, name or "ann")
        return call()


@torch.no_grad()
def test_rows_that_come_in_lists():
    net = Listed()
    bank = two(net, target_modules=["proj"])
    rows, by = list(torch.randn(3, 4, 8)), torch.tensor([1.0, 2.0, 3.0])
    with bank.rows(["bob", None, "ann"]):
        found = net(rows, by)
    for at, name in enumerate(("bob", None, "ann")):
        testing.close(found[at], alone(net, name, lambda at=at: net(rows, by)[at]), f"row {at}")
    with bank.rows(["ann", "bob"]), pytest.raises(SmidgenError, match="a list of tensors, of which it is not known"):
        net(list(torch.randn(3, 4, 5, 8)))
    levels = list(torch.randn(3, 2, 5, 8))
    with bank.rows(["ann", "bob"]):
        found = net(levels)
    for at, name in enumerate(("ann", "bob")):
        testing.close(found[at], alone(net, name, lambda at=at: net(levels)[at]), f"a pyramid, row {at}")


@torch.no_grad()
@pytest.mark.parametrize("lengths", [(12, 12), (12, 20)])
def test_people_on_z_image(lengths):
    from benchmarks.tiny_models import build

    net = build("Z-Image")
    bank, width, generator = two(net), net.config.cap_feat_dim, torch.Generator().manual_seed(0)
    noise = [torch.randn(net.config.in_channels, 1, 8, 8, generator=generator) for _ in range(2)]
    words = [torch.randn(length, width, generator=generator) for length in lengths]
    none = [torch.randn(lengths[0], width, generator=generator)] * 2
    plain = (noise, torch.full((2,), 0.3), words), ["ann", "bob"]
    guided = (noise * 2, torch.full((4,), 0.3), words + none), ["ann", "bob"] * 2
    for given, names in (plain, guided):
        with bank.rows(names[:2]):
            found = net(*given)[0]
        for at, name in enumerate(names):
            one = tuple(value[at : at + 1] for value in given)
            testing.close(found[at], alone(net, name, lambda one=one: net(*one)[0][0]), f"{name} at {at}")


class Styled(nn.Module):
    """Looks a number of each row up in a table of one."""

    def __init__(self) -> None:
        super().__init__()
        self.proj, self.style = nn.Linear(8, 8), nn.Embedding(1, 8)

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        return self.proj(x + self.style(style))


def test_rows_are_found_where_a_number_can_have_no_other_value():
    net = Styled()
    bank = two(net, target_modules=["proj"])
    x, style = torch.randn(2, 8), torch.zeros(2, dtype=torch.long)
    with bank.rows(["ann", "bob"]), torch.no_grad():
        found = net(x, style)
    for place, name in enumerate(("ann", "bob")):
        smidgen.set_active(net, name)
        testing.close(found[place], net(x, style)[place].detach(), name)
