"""LoRA files of others become one zoo: peft folders, diffusers and kohya files, and what is refused."""

import json
from pathlib import Path

import peft
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_kohya
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

import smidgen
from smidgen.bases.families import load_base
from smidgen.difflora.weightspace.layout import write_adapter
from smidgen.difflora.zoo.importing import import_zoo
from smidgen.difflora.zoo.names import Names, find, read_lora
from smidgen.difflora.zoo.store import Zoo
from smidgen.errors import AdapterFileError, ConfigError, DataError

TARGETS = ("to_q", "to_v")


def lora(base: Path, seed: int, r: int = 2, targets=TARGETS, **options):
    """A UNet with a peft LoRA whose numbers are random."""
    unet = load_base(base).model
    config = peft.LoraConfig(r=r, lora_alpha=options.pop("alpha", 2 * r), target_modules=list(targets), **options)
    unet.add_adapter(config)
    random = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=random)
    return unet, config


def answer(unet) -> torch.Tensor:
    random = torch.Generator().manual_seed(5)
    x, words = torch.randn(2, 4, 8, 8, generator=random), torch.randn(2, 16, 16, generator=random)
    with torch.no_grad():
        return unet(x, torch.tensor([3, 700]), encoder_hidden_states=words, return_dict=False)[0]


def as_peft(unet, config, folder: Path) -> None:
    folder.mkdir(parents=True)
    state = {f"base_model.model.{k}": v.contiguous() for k, v in get_peft_model_state_dict(unet).items()}
    save_file(state, folder / "adapter_model.safetensors")
    config.save_pretrained(str(folder))


def as_diffusers(unet, folder: Path) -> None:
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    metadata = {"unet": {"lora_alpha": unet.peft_config["default"].lora_alpha, "r": unet.peft_config["default"].r}}
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=state, unet_lora_adapter_metadata=metadata["unet"]
    )


def as_kohya(unet, path: Path) -> None:
    state = convert_state_dict_to_kohya(
        {f"base_model.model.{k}": v for k, v in get_peft_model_state_dict(unet).items()}
    )
    alpha = torch.tensor(float(unet.peft_config["default"].lora_alpha))
    found = {}
    for key, value in state.items():
        name, _, side = key.removeprefix("base_model_model_").partition(".")
        if side != "alpha":
            found[f"lora_unet_{name}.{side}"] = value.contiguous()
            found[f"lora_unet_{name}.alpha"] = alpha.clone()
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(found, path)


@pytest.fixture
def three(base, tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """One adapter in each format, and what the base answers with it."""
    root, answers = tmp_path / "loras", {}
    for seed, name in enumerate(("ann/last", "bob", "cleo")):
        unet, config = lora(base, seed)
        answers[name] = answer(unet)
        if seed == 0:
            as_peft(unet, config, root / name)
        elif seed == 1:
            as_diffusers(unet, root / name)
        else:
            as_kohya(unet, root / f"{name}.safetensors")
    return root, answers


def test_three_formats_become_one_zoo_whose_adapters_answer_as_before(base, three, tmp_path):
    root, answers = three
    out = tmp_path / "zoo"
    found = import_zoo(root, out, str(base), held_out_share=0.0)
    assert found.kept == 3 and found.by_split == {"train": 3}
    zoo = Zoo(out)
    assert zoo.rows().ids == list(answers)
    for name, wanted in answers.items():
        write_adapter(zoo.layout, zoo.row(name), load_base(base).model, tmp_path / "one" / name)
        unet = smidgen.load(load_base(base).model, tmp_path / "one" / name)
        torch.testing.assert_close(answer(unet), wanted, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(wanted, answer(load_base(base).model), atol=1e-3)
    before = zoo.digest()
    import_zoo(root, out, str(base), held_out_share=0.0)
    assert Zoo(out).digest() == before


def test_mixed_ranks_and_targets(base, three, tmp_path):
    root, answers = three
    unet, config = lora(base, 7, r=3)
    as_peft(unet, config, root / "dan")
    unet, config = lora(base, 8, targets=("to_q",))
    as_peft(unet, config, root / "eve")
    with pytest.raises(DataError, match=r"2 of 5 adapters.*'dan' has rank 3 at .*most have rank 2.*--rank"):
        import_zoo(root, tmp_path / "zoo", str(base))
    assert not (tmp_path / "zoo" / "zoo.json").exists()
    found = import_zoo(root, tmp_path / "zoo", str(base), rank=2, held_out_share=0.0)
    assert found.kept == 5
    reasons = {line.id: line.reason for line in Zoo(tmp_path / "zoo").records()}
    assert "re-factored to rank 2" in reasons["dan"] and "% of its delta lost" in reasons["dan"]
    assert not any(reasons[name] for name in (*answers, "eve"))
    names = Names(load_base(base))
    own = read_lora(root / "dan", names)
    row = Zoo(tmp_path / "zoo").layout.unpack(Zoo(tmp_path / "zoo").row("dan"))
    lost = total = 0.0
    for target, one in own.items():
        wanted = one.scale * one.b @ one.a
        lost += float((row[target]["residual_b"] @ row[target]["residual_a"] - wanted).square().sum())
        total += float(wanted.square().sum())
    assert f"{(lost / total) ** 0.5:.2%}" in reasons["dan"]
    with pytest.raises(ConfigError, match="rank"):
        import_zoo(root, tmp_path / "zoo", str(base), rank=0)


def test_all_checkpoints_of_a_person_fall_on_one_side(base, tmp_path):
    unet, config = lora(base, 0)
    for person in ("ann", "bob", "cleo", "dan"):
        for step in (1, 2):
            as_peft(unet, config, tmp_path / "loras" / person / str(step))
    import_zoo(tmp_path / "loras", tmp_path / "zoo", str(base), held_out_share=0.5)
    sides: dict[str, set] = {}
    for line in Zoo(tmp_path / "zoo").records():
        sides.setdefault(line.id.split("/")[0], set()).add(line.split)
    assert all(len(side) == 1 for side in sides.values())
    assert {side for own in sides.values() for side in own} == {"train", "test"}


def test_what_is_refused(base, three, tmp_path):
    root, _ = three
    names = Names(load_base(base))
    plain = load_file(root / "cleo.safetensors")
    first = next(key for key in plain if key.endswith("lora_down.weight"))

    def refuse(match: str, changes: dict | None = None, drop: str = "") -> None:
        path = tmp_path / "odd.safetensors"
        save_file({k: v for k, v in (plain | (changes or {})).items() if k != drop}, path)
        with pytest.raises(AdapterFileError, match=match):
            read_lora(path, names)

    def pair(name: str) -> dict:
        return {f"{name}.{side}.weight": torch.zeros(2, 2) for side in ("lora_down", "lora_up")}

    refuse("which the base does not have", pair("lora_unet_down_blocks_9_to_q"))
    refuse("no part of a plain LoRA. It is DoRA", {first.replace("lora_down.weight", "dora_scale"): torch.zeros(2)})
    refuse("It is LoHa", {"lora_unet_x.hada_w1_a": torch.zeros(2)})
    refuse(r"has only \['alpha', 'b'\]", drop=first)
    refuse("the base's layer is", {first: torch.zeros(2, 99)})
    refuse("NaN", {first: torch.full_like(plain[first], float("nan"))})
    refuse("also changes the text encoder", pair("lora_te_text_model_x"))
    save_file(plain | pair("lora_te_text_model_x"), tmp_path / "te.safetensors")
    assert len(read_lora(tmp_path / "te.safetensors", names, ignore_text_encoder=True)) == len(plain) // 3
    (tmp_path / "cut.safetensors").write_bytes((root / "cleo.safetensors").read_bytes()[:-10])
    with pytest.raises(AdapterFileError, match="truncated"):
        read_lora(tmp_path / "cut.safetensors", names)
    config = json.loads((root / "ann/last/adapter_config.json").read_text())
    for change, match in (
        ({"use_dora": True}, "use_dora"),
        ({"peft_type": "LOHA"}, "'LOHA'"),
        ({"bias": "all"}, "biases"),
    ):
        (root / "ann/last/adapter_config.json").write_text(json.dumps(config | change))
        with pytest.raises(AdapterFileError, match=match):
            read_lora(root / "ann/last", names)
    save_file({"lora_unet_x.diff": torch.zeros(2, 2)}, tmp_path / "odd.safetensors")
    with pytest.raises(
        AdapterFileError, match=r"whole differences and no LoRA: `smidgen extract BASE \S+ --out ADAPTER`"
    ):
        read_lora(tmp_path / "odd.safetensors", names)
    (tmp_path / "whole" / "ann").mkdir(parents=True)
    (tmp_path / "whole" / "ann" / "model_index.json").write_text("{}")
    with pytest.raises(
        DataError, match=r"ann is a whole pipeline, no LoRA: `smidgen extract BASE \S+ann --out ADAPTER`"
    ):
        find(tmp_path / "whole")
    (tmp_path / "pickles").mkdir()
    (tmp_path / "pickles" / "x.bin").write_bytes(b"")
    with pytest.raises(DataError, match="pickle"):
        find(tmp_path / "pickles")


def test_scales_of_peft_and_names_of_older_files(base, tmp_path):
    names = Names(load_base(base))
    target = next(name for name in names.modules if name.endswith("attn1.to_q"))
    unet, config = lora(base, 0, r=4, alpha=6, use_rslora=True, alpha_pattern={target.replace(".", r"\."): 10})
    as_peft(unet, config, tmp_path / "rs")
    found = read_lora(tmp_path / "rs", names)
    assert found[target].scale == 5.0 and {f.scale for t, f in found.items() if t != target} == {3.0}
    b, a = found[target][:2]
    old = {
        f"unet.{target.removesuffix('.to_q')}.processor.to_q_lora.down.weight": a.contiguous(),
        f"unet.{target.removesuffix('.to_q')}.processor.to_q_lora.up.weight": b.contiguous(),
    }
    save_file(old, tmp_path / "pytorch_lora_weights.safetensors")
    again = read_lora(tmp_path / "pytorch_lora_weights.safetensors", names)
    assert list(again) == [target] and again[target].scale == 1.0 and torch.equal(again[target].b, b)


def test_names_of_sdxl_files(tmp_path):
    from tests.training.tiny import sdxl_folder

    names = Names(load_base(sdxl_folder(tmp_path)))
    where = Path("x")
    inner = "transformer_blocks_0_attn1_to_q"
    assert (
        names.target(f"input_blocks_3_1_{inner}", where) == "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    )
    assert names.target(f"middle_block_1_{inner}", where) == "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    assert (
        names.target(f"output_blocks_1_1_{inner}", where) == "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q"
    )
