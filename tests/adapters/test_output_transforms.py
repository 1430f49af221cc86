"""Output transforms against peft's DoRA and IA3, and what they cost: how often a layer calls its base."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch import Tensor, nn

import smidgen
from smidgen import testing
from smidgen.adapters.methods import learning_rates, parse_method
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.errors import ConfigError

LAYERS = {
    "linear": (lambda: nn.Linear(12, 10), (4, 3, 12)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3, stride=2, padding=1), (3, 6, 7, 7)),
}


class Net(nn.Module):
    """A layer and a head that is not adapted."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def net(kind: str) -> tuple[nn.Module, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        make, shape = LAYERS[kind]
        return Net(make()), torch.randn(shape)


def near(found: Tensor, wanted: Tensor, what: str, allowed: float = 1e-5) -> None:
    error = float((found - wanted).detach().norm() / wanted.detach().norm().clamp(min=1e-30))
    assert error <= allowed, f"{what}: off by {error:.1e}"


# ---- DoRA ------------------------------------------------------------------------------------------------------------


def doras(kind: str) -> tuple[nn.Module, nn.Module, dict[str, Tensor], dict[str, Tensor], Tensor]:
    """(ours, peft's, parameters by name of ours, of peft's, input) with the same factors, alpha 4 over r 2."""
    base, x = net(kind)
    theirs = peft.get_peft_model(
        copy.deepcopy(base), peft.LoraConfig(r=2, lora_alpha=4, use_dora=True, target_modules=["layer"])
    )
    ours = smidgen.adapt(base, "dora", r=2, alpha=4, target_modules=["layer"])
    own = adapted_layers(ours)["layer"].slot("default").trained()
    layer = theirs.base_model.model.layer
    its = {
        "residual_a": layer.lora_A["default"].weight,
        "residual_b": layer.lora_B["default"].weight,
        "output_e": layer.lora_magnitude_vector["default"].weight,
    }
    with torch.no_grad():
        noise = torch.Generator().manual_seed(1)
        for name in ("residual_a", "residual_b", "output_e"):
            move = 0.3 * torch.randn(its[name].shape, generator=noise)
            if name == "output_e":
                its[name] += move
                own[name].copy_(move.flatten())
            else:
                its[name].copy_(move)
                own[name].copy_(move.reshape(own[name].shape))
    return ours, theirs, own, its, x


@pytest.mark.parametrize("kind", LAYERS)
def test_dora_is_pefts(kind: str) -> None:
    ours, theirs, own, its, x = doras(kind)
    x = x.requires_grad_()
    found, wanted = ours(x), theirs(x)
    near(found, wanted, "output")
    weights = torch.linspace(-1, 1, found.numel()).reshape(found.shape)
    inputs = [torch.autograd.grad((y * weights).sum(), [x, *p.values()]) for y, p in ((found, own), (wanted, its))]
    for name, mine, theirs_ in zip(["x", *own], *inputs, strict=True):
        near(mine.flatten(), theirs_.flatten(), f"gradient of {name}")
    layer = theirs.base_model.model.layer
    layer.merge()
    smidgen.merge(ours)
    near(ours.layer.weight, layer.get_base_layer().weight, "merged weight")


@pytest.mark.parametrize("kind", LAYERS)
def test_dora_trains_as_pefts(kind: str) -> None:
    ours, theirs, own, its, x = doras(kind)
    start = {name: value.detach().clone() for name, value in its.items()}
    norms = {name: start[name].flatten() - own[name].detach().flatten() for name in ("output_e",)}
    target = torch.linspace(-1, 1, ours(x).numel()).reshape(ours(x).shape)
    both = [(ours, torch.optim.AdamW(own.values(), 1e-2, weight_decay=0)), (theirs, torch.optim.AdamW(its.values(), 1e-2, weight_decay=0))]  # fmt: skip
    for step in range(5):
        losses = []
        for model, optimizer in both:
            loss = (model(x) - target).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        near(losses[0], losses[1], f"loss of step {step}")
    for name in own:
        near(own[name].flatten() + norms.get(name, 0), its[name].flatten(), f"{name} after training")
        testing.differs(its[name], start[name], name)
    near(ours(x), theirs(x), "output after training")


def test_a_row_of_zeros_stays_one() -> None:
    model, x = net("linear")
    with torch.no_grad():
        model.layer.weight[3] = 0
    wanted = model(x)
    smidgen.adapt(model, "dora", r=2, detach=False, target_modules=["layer"])
    testing.same(model(x), wanted, "start")
    model(x).square().sum().backward()
    layer = adapted_layers(model)["layer"]
    assert all(bool(torch.isfinite(p.grad).all()) for p in layer.slot("default").trained().values())


# ---- IA3 -------------------------------------------------------------------------------------------------------------


def llama() -> tuple[nn.Module, Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        return LlamaForCausalLM(config).eval(), torch.arange(12).reshape(2, 6)


def test_ia3_is_pefts_on_keys_values_and_the_feed_forward_input() -> None:
    base, x = llama()
    theirs = peft.get_peft_model(
        copy.deepcopy(base),
        peft.IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
    )
    ours = smidgen.adapt(base, "ia3", target_modules=["k_proj", "v_proj"])
    smidgen.adapt(ours, "diagonal", adapter_name="feed_forward", target_modules=["down_proj"])
    smidgen.set_active(ours, ["default", "feed_forward"])
    pairs = {}
    noise = torch.Generator().manual_seed(1)
    for name, module in theirs.base_model.model.named_modules():
        if hasattr(module, "ia3_l"):
            layer = adapted_layers(ours)[name]
            (own,) = layer.slot("feed_forward" if "down" in name else "default").trained().values()
            own.requires_grad_()
            its = module.ia3_l["default"]
            with torch.no_grad():
                own.copy_(0.3 * torch.randn(own.shape, generator=noise))
                its.copy_(1 + own.reshape(its.shape))
            pairs[name] = own, its
    assert len(pairs) == 6
    for model, side in ((ours, 0), (theirs, 1)):
        model.logits = model(x).logits
        model.grads = torch.autograd.grad(model.logits.square().sum(), [pair[side] for pair in pairs.values()])
    near(ours.logits, theirs.logits, "logits")
    for name, mine, its in zip(pairs, ours.grads, theirs.grads, strict=True):
        near(mine.flatten(), its.flatten(), f"gradient at {name}")


# ---- calls of the base layer ----------------------------------------------------------------------------------------


def calls(model: nn.Module, run) -> int:  # type: ignore[no-untyped-def]
    count = 0

    def note(*_args: object) -> None:
        nonlocal count
        count += 1

    handle = adapted_layers(model)["layer"].base_layer.register_forward_hook(note)
    run()
    handle.remove()
    return count


def carrying(**adapters: smidgen.SmidgenConfig) -> tuple[nn.Module, Tensor]:
    model, x = net("linear")
    for name, config in adapters.items():
        smidgen.adapt(model, testing.targeted(config), adapter_name=name)
    return testing.perturb(model), x


def test_one_call_of_the_base_but_where_a_transform_stands_between() -> None:
    kinds = {name: smidgen.config(name, **({"r": 2} if name != "ia3" else {})) for name in ("dora", "ia3", "lora")}
    model, x = carrying(**kinds, turn=smidgen.config("rotation+low_rank+scale", r=2, block_size=4))

    def run(names: list[str], strength: float = 1.0):  # type: ignore[no-untyped-def]
        smidgen.set_active(model, names)
        smidgen.set_strength(model, dict.fromkeys(names, strength))
        return lambda: model(x)

    assert calls(model, run(["dora"])) == 1
    assert calls(model, run(["dora", "ia3", "lora"], 0.5)) == 1
    assert calls(model, run(["turn"])) == 1
    assert calls(model, run(["turn"], 0.5)) == 2  # S acts on W T x, the layer is called on half of the turn
    assert calls(model, run(["turn", "dora", "ia3", "lora"])) == 2  # once for the turn, once for those that see x
    assert calls(model, run(["turn", "dora", "ia3", "lora"], 0.5)) == 3

    def by_rows() -> None:
        layer = adapted_layers(model)["layer"]
        layer(x, adapter_names=["turn", "dora", "__base__", "ia3"])

    run(["turn", "dora", "ia3"])
    assert calls(model, by_rows) == 1  # rows are apart


@pytest.mark.parametrize(("method", "options"), [("dora", {}), ("rotation+low_rank+scale", {"block_size": 4})])
def test_rows_of_a_bank_call_the_base_once(method: str, options: dict[str, int]) -> None:
    model, x = carrying(one=smidgen.config(method, r=2, **options), two=smidgen.config(method, r=2, **options))
    bank = smidgen.Bank(model, model.peft_config["one"], ["one", "two"])
    for name in ("one", "two"):
        bank.put(name, model, name)
    with bank.rows(["two", None, "one", "two"]):
        model(x)  # how rows lie in this layer's input is found once
        assert calls(model, lambda: model(x)) == 1


def test_rows_of_two_adapters_add_what_each_does() -> None:
    config = smidgen.config("rotation+low_rank+scale", r=2, block_size=4)
    model, x = carrying(one=config, two=config)
    bank = smidgen.Bank(model, model.peft_config["one"], ["one", "two"])
    for seed, name in enumerate(("one", "two")):
        testing.perturb(model, seed, adapter_name=name)
        bank.put(name, model, name)
    layer = adapted_layers(model)["layer"]
    with torch.no_grad():
        base = layer.base_layer(x)
        effects = {name: layer.shifted(x, [name]) - base for name in ("one", "two")}
        with bank.rows([("one", "two"), "two", None, ("two", "one")], weights=[(1.0, 0.5), 1.0, 1.0, (2.0, 1.0)]):
            found = model(x)
    one, two = effects["one"], effects["two"]
    wanted = base + torch.stack([one[0] + 0.5 * two[0], two[1], 0 * one[2], 2 * two[3] + one[3]])
    testing.close(found, torch.tanh(wanted), "rows of one, two and no adapters")


# ---- names -----------------------------------------------------------------------------------------------------------


def test_methods_are_spelled_by_their_members() -> None:
    assert parse_method("low_rank+magnitude")[0].members == {"residual": "low_rank", "output": "magnitude"}
    assert parse_method("rotation + spectral + scale")[0].members == {
        "transform": "rotation", "residual": "spectral", "output": "scale",
    }  # fmt: skip
    assert smidgen.config("low_rank+magnitude", r=4) == smidgen.config(residual="low_rank", output="magnitude", r=4)
    assert smidgen.config("dora").method == "dora"
    assert smidgen.config("dora", output=None).method is None
    for wrong, said in {
        "scale+low_rank": "Unknown transform 'scale'",
        "low_rank+magnitud": "Unknown transform 'low_rank'",
        "tensor_ring+scale": "either side",
        "scale+magnitude": "Unknown residual 'scale'",
        "rotation+low_rank+spectral+scale": "in this order",
    }.items():
        with pytest.raises(ConfigError, match=said.replace("+", r"\+")):
            parse_method(wrong)
    with pytest.raises(ConfigError, match="detach=True has no meaning"):
        smidgen.config("lora", detach=True)


def test_rates() -> None:
    lora, ia3 = learning_rates("lora", "encoder"), learning_rates("ia3", "encoder")
    assert learning_rates("dora", "encoder").of("output") == lora.residual
    both = learning_rates("low_rank+scale", "encoder")
    assert (both.residual, both.output) == (lora.residual, ia3.residual)
    assert both.chosen(2 * lora.residual, None).output == 2 * ia3.residual
    assert learning_rates("oft_out", "encoder") == learning_rates("oft", "encoder")
    model, _ = carrying(one=smidgen.config("rotation+low_rank+scale", r=2, block_size=4))
    groups = {g["name"]: g["lr"] for g in smidgen.parameter_groups(model, 0.1, output_lr=0.5)}
    assert groups == {"residual": 0.1, "transform": 0.03, "output": 0.5}
