"""The plan: its counts against closed forms, the CPU and published sizes, and its sums."""

import json
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import smidgen
from smidgen.bases.architectures import build_architecture
from smidgen.cli.dispatch import main
from smidgen.errors import ConfigError
from smidgen.lab.planning import bases, dry_run, plan, telling
from smidgen.lab.planning.plan import Assumptions, Counted, make_plan
from smidgen.training.cost import CARDS, Cost, cost

LORA = smidgen.config("lora", r=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
COUNTED = Counted(
    adapter=5_806_080, plain=Cost(7_000, 8_000, 7 * 10**9), checkpointed=Cost(7_000, 13_000, 5 * 10**9), vae_flops=50,
    text_flops=10, image_flops=20, frozen_bytes=2 * 10**9, unet_bytes=5 * 10**9, network=10**6, network_flops=10**7,
)  # fmt: skip


def tiny_unet(device: str = "meta"):
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        return UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
            norm_num_groups=4, cross_attention_dim=32, attention_head_dim=(2, 4), use_linear_projection=True,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2), addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        )  # fmt: skip


# ---- the dry run -----------------------------------------------------------------------------------------------------


def test_a_product_costs_what_the_closed_form_says():
    n, rows, columns = 6, 10, 14
    with torch.device("meta"):
        x, weight = torch.empty(n, columns), torch.empty(rows, columns, requires_grad=True)
    found = cost(lambda: torch.nn.functional.linear(x, weight).sum())
    product = 2 * n * rows * columns
    assert (found.forward, found.training) == (product, product)  # x asks for no gradient
    assert found.bytes >= 4 * n * rows + 4
    with torch.no_grad():
        many = cost(lambda: torch.relu(torch.relu(torch.relu(torch.relu(x)))).sum(), backward=False)
    assert many.bytes == 2 * 4 * n * columns  # the one read and the one written; what is done with is gone


def test_a_unet_on_meta_costs_what_it_costs_on_the_cpu():
    found = {}
    for device in ("meta", "cpu"):
        unet = tiny_unet(device).requires_grad_(False)
        with torch.device(device):
            sample, texts = torch.zeros(1, 4, 8, 8), torch.zeros(1, dry_run.TOKENS, 32)
            known = {"text_embeds": torch.zeros(1, 16), "time_ids": torch.zeros(1, 6)}
            time = torch.zeros(1, dtype=torch.long)
        sample.requires_grad_(True)
        with sdpa_kernel(SDPBackend.MATH):
            found[device] = cost(
                lambda unet=unet, s=sample, t=time, e=texts, k=known: unet(s, t, e, added_cond_kwargs=k)[0].sum()
            )
    assert (found["meta"].forward, found["meta"].training) == (found["cpu"].forward, found["cpu"].training)
    assert found["meta"].forward > 0 < found["meta"].training
    adapted = dry_run.group_step("sdxl", tiny_unet(), LORA, 8, False, torch.bfloat16)
    shift = dry_run.group_step("sdxl", tiny_unet(), replace_rank(8), 8, False, torch.bfloat16)
    assert (
        adapted.forward - found["cpu"].forward == shift.forward - adapted.forward
    )  # LoRA costs in proportion to its rank


def replace_rank(rank):
    return smidgen.config("lora", r=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"])


def test_checkpointing_costs_operations_and_saves_bytes_and_the_model_is_left_as_it_was():
    unet = tiny_unet()
    names = {name for name, _ in unet.named_parameters()}
    plain = dry_run.group_step("sdxl", unet, LORA, 8, False, torch.bfloat16)
    less = dry_run.group_step("sdxl", unet, LORA, 8, True, torch.bfloat16)
    assert less.forward == plain.forward
    assert plain.training < less.training <= plain.training + plain.forward
    assert less.bytes < plain.bytes
    assert {name for name, _ in unet.named_parameters()} == names
    assert dry_run.group_step("sdxl", unet, LORA, 8, False, torch.bfloat16) == plain


def test_the_parts_have_their_published_sizes():
    assert bases.vae_encoder(bases.BASES["sd15"]).numbers == 83_653_863
    assert bases.text_encoders(bases.BASES["sd15"]).numbers == 123_060_480
    assert bases.text_encoders(bases.BASES["sdxl"]).numbers == 123_060_480 + 694_659_840
    assert bases.picture_encoder().numbers == 303_966_208
    assert bases.BASES["sdxl"].caption_bytes == 2 * (77 * 2048 + 1280)
    assert bases.BASES["sdxl"].picture_bytes == 2 * 4 * 4 * 128 * 128


# ---- the plan --------------------------------------------------------------------------------------------------------


@pytest.fixture
def counted(monkeypatch):
    monkeypatch.setattr(plan, "count", lambda base, rank, latents: COUNTED)


def test_rows_of_sdxl_are_those_of_the_fact_sheet(counted):
    assert dry_run.numbers(build_architecture("sdxl"), LORA) == 5_806_080 == COUNTED.adapter
    made = make_plan("sdxl", Assumptions(people=3100))
    assert round(made.disk["zoo: the same rows in bf16"] / 1e9) == 36
    assert made.disk["zoo: rows in fp32, as built"] == 4 * 3100 * 5_806_080


def test_costs_grow_with_what_they_depend_on(counted):
    small, large = (make_plan("sdxl", Assumptions(people=n)) for n in (1000, 2000))
    for stage in ("zoo: training", "text encoders, likewise"):
        assert large.flops[stage] == 2 * small.flops[stage] > 0
    assert small.flops["end to end"] == large.flops["end to end"]  # its steps are chosen
    assert small.flops["zoo: training"] == 1000 * 800 * (7_000 + 13_000)
    assert large.memory["PCA: Gram matrix"] == 8 * 2000**2
    assert plan.passes(Assumptions(people=1000), 5_806_080) == -(-1000 // 46) + 2


def test_hours_are_operations_over_peak_and_share(counted):
    made = make_plan("sdxl", Assumptions(utilisation=0.5))
    for card in CARDS:
        wanted = made.flops["end to end"] / (card.peak * 0.5 * 3600)
        assert made.hours[card.name]["end to end"] == pytest.approx(wanted)
        assert made.hours[card.name][plan.VAE] == pytest.approx(made.flops[plan.VAE] / (card.single * 0.5 * 3600))


def test_a_group_fits_its_card_and_one_more_does_not(counted, monkeypatch):
    made = make_plan("sdxl", Assumptions())
    for card in CARDS:
        group = made.fits[card.name]["zoo: adapters in a group"]
        used = [
            2e9 + COUNTED.unet_bytes + COUNTED.frozen_bytes + n * (16 * COUNTED.adapter + 5e9)
            for n in (group, group + 1)
        ]
        assert used[0] <= 0.92 * card.memory < used[1]
    tight = replace(COUNTED, checkpointed=Cost(1, 1, 10**12))
    monkeypatch.setattr(plan, "count", lambda *_: tight)
    assert set(make_plan("sdxl", Assumptions()).fits["RTX 4090 24 GB"].values()) == {0}


def test_the_command_prints_tables_with_every_assumption_or_json(counted, capsys):
    main(["zoo", "plan", "--base", "sd15", "--people", "65000", "--rank", "2"])
    text = capsys.readouterr().out
    assert text.startswith("### SD 1.5, 512 pixels, 65,000 people") and "| end to end  " in text
    for phrase in telling.assumptions(make_plan("sd15", Assumptions(people=65000, rank=2))):
        assert phrase in text
    main(["zoo", "plan", "--people", "10", "--json"])
    known = json.loads(capsys.readouterr().out)
    assert known["base"] == "sdxl" and known["assumptions"]["people"] == 10
    assert known["counted"]["checkpointed"]["bytes"] == 5 * 10**9 and known["hours"].keys() == known["fits"].keys()


def test_refusals():
    with pytest.raises(ConfigError, match=r"no plan for the base 'sdx'.*Did you mean 'sdxl'"):
        make_plan("sdx", Assumptions())
    with pytest.raises(ConfigError, match="people must be at least 1"):
        Assumptions(people=0)
    with pytest.raises(ConfigError, match="utilisation"):
        Assumptions(utilisation=1.5)
