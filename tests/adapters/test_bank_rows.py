"""The law "bank rows": row i of a batch is adapter i alone, however a model or a caller folds the rows; what cannot be
known is refused in words."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import smidgen
from smidgen import testing
from smidgen.adapters.tuner.carried import adapted_layers
from smidgen.adapters.tuner.injection import remove
from smidgen.errors import SmidgenError
from tests.training import tiny

NAMES = ["a", None, "b"]
MEMBERS = ["lora", "svfit", "loldu", "oft", "tlora(2,2)", "tlora_star"]
every_member = pytest.mark.parametrize("method", MEMBERS)


def banked(model: nn.Module, method: str, targets: Any, size: float = 0.5) -> tuple[nn.Module, smidgen.Bank]:
    """A model that carries adapters a and b, and a bank of the same two."""
    model = model.eval()
    for seed, name in enumerate("ab"):
        smidgen.adapt(model, smidgen.config(method, target_modules=targets), name)
        testing.perturb(model, seed, adapter_name=name, size=size)
    bank = smidgen.Bank(model, model.peft_config["a"])
    for name in "ab":
        bank.put(name, model, name)
    return model, bank


def alone(model: nn.Module, name: str | None, run: Callable[[], Any]) -> Any:
    if name is not None:
        smidgen.set_active(model, name)
    with smidgen.disabled(model) if name is None else nullcontext(), torch.no_grad():
        return run()


def check_rows(
    model: nn.Module, bank: smidgen.Bank, run: Callable[[Any], Tensor], inputs: Any, names: Sequence[str | None] = NAMES,
    copies: bool = False,
) -> None:  # fmt: skip
    """``run(inputs)`` of all rows at once is that of each row alone, and adapters make a difference."""
    wanted = [alone(model, name, lambda i=i: run(_row(inputs, i))) for i, name in enumerate(names)]
    plain = alone(model, None, lambda: run(inputs))
    for parameter in bank.parameters():
        parameter.requires_grad_(False)  # or a block keeps nothing
    with bank.rows(names, copies=copies), torch.no_grad():
        run(inputs)
        found = run(inputs)
    per = len(found) // len(names)
    for i, name in enumerate(names):
        testing.close(found[i * per : (i + 1) * per], wanted[i], f"row {i}, adapter {name!r}", factor=20)
    assert not torch.equal(found, plain), "the adapters changed nothing"


def _row(inputs: Any, i: int) -> Any:
    if isinstance(inputs, dict):
        return {key: _row(value, i) for key, value in inputs.items()}
    return inputs[i : i + 1] if isinstance(inputs, Tensor) else inputs


def ids(length: int = 6) -> Tensor:
    return torch.randint(3, 97, (3, length), generator=torch.Generator().manual_seed(5))


SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
VIDEO = {"image_size": 32, "patch_size": 8, "num_frames": 4, **SMALL}


def made(model: str, config: str, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return getattr(tf, model)(getattr(tf, config)(**options))


def llama() -> nn.Module:
    return made("LlamaForCausalLM", "LlamaConfig", vocab_size=97, num_key_value_heads=2, pad_token_id=0, **SMALL)


def t5() -> nn.Module:
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0}
    return made("T5ForConditionalGeneration", "T5Config", vocab_size=97, **sizes, **ends)


# ---- text: generation --------------------------------------------------------------------------------------------------

WAYS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "sequences": {"num_beams": 4, "num_return_sequences": 2},
}


def written(model: nn.Module, **options: Any) -> Callable[[Any], Tensor]:
    """Token scores along the way, for every sequence that is returned, and the tokens."""

    def run(inputs: Any) -> Tensor:
        given = inputs if isinstance(inputs, dict) else {"input_ids": inputs}
        return model.generate(
            **given, max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=None, **options
        ).double()

    return run


@every_member
@pytest.mark.parametrize("way", list(WAYS))
def test_generation(method: str, way: str) -> None:
    model, bank = banked(llama(), method, ["q_proj", "v_proj", "down_proj"], size=2.0)
    check_rows(model, bank, written(model, **WAYS[way]), ids())


@every_member
@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_generation_of_an_encoder_and_decoder(method: str, way: str) -> None:
    model, bank = banked(t5(), method, ["q", "v", "wo"], size=2.0)
    check_rows(model, bank, written(model, **WAYS[way]), ids())


def music() -> nn.Module:
    text = {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "model_type": "t5"}
    audio = {"num_filters": 4, "hidden_size": 16, "codebook_size": 64, "codebook_dim": 16, "upsampling_ratios": [4, 2]}
    audio |= {
        "sampling_rate": 2400,
        "target_bandwidths": [1.5, 3.0, 6.0],
        "use_causal_conv": False,
        "model_type": "encodec",
    }
    decoder = {"vocab_size": 64, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    decoder |= {"num_codebooks": 2, "pad_token_id": 64, "bos_token_id": 64}
    model = made(
        "MusicgenForConditionalGeneration", "MusicgenConfig", text_encoder=text, audio_encoder=audio, decoder=decoder
    )
    for name in ("decoder_start_token_id", "bos_token_id", "pad_token_id"):
        setattr(model.generation_config, name, 64)
    return model


def test_generation_that_stacks_copies_of_its_rows_for_guidance() -> None:
    model, bank = banked(music(), "lora", r"decoder\..*(q_proj|v_proj|fc1)", size=2.0)

    def first(rows: Sequence[str | None], scale: float, **options: Any) -> Tensor:
        with bank.rows(rows, **options), torch.no_grad():
            given = {"input_ids": ids()[:2], "attention_mask": torch.ones(2, 6, dtype=torch.long)}
            told = {"max_new_tokens": 3, "do_sample": False, "output_scores": True, "return_dict_in_generate": True}
            return (
                model.generate(**given, **told, guidance_scale=scale)
                .scores[0]
                .nan_to_num(neginf=-9)
                .unflatten(0, (2, -1))
            )  # type: ignore[no-any-return]

    for scale, options in ((1.0, {}), (3.0, {"copies": True})):
        both = first(["a", "b"], scale, **options)
        for row, name in enumerate("ab"):
            testing.close(both[row], first([name, name], scale)[row], f"guidance {scale}, row {row}", factor=20)
        testing.differs(both[1], first(["a", "a"], scale)[1], "the adapters")
    with pytest.raises(SmidgenError, match=r"do not show which.*copies=True"):
        first(["a", "b"], 3.0)  # the mask, [1, 1, 0, 0], looks like each row twice


def test_generation_that_drops_rows_which_are_done() -> None:
    sizes = {
        "d_model": 32,
        "encoder_layers": 1,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
    }
    sizes |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_target_positions": 64, "num_mel_bins": 80}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
    model = made("WhisperForConditionalGeneration", "WhisperConfig", vocab_size=120, **sizes, **ends)
    own = model.generation_config
    own.no_timestamps_token_id, own.max_initial_timestamp_index, own.return_timestamps = 90, 5, True
    own.is_multilingual, own.suppress_tokens, own.begin_suppress_tokens, own.forced_decoder_ids = (
        False,
        None,
        None,
        None,
    )
    model, bank = banked(model, "lora", r"model\.decoder.*(q_proj|v_proj|fc1)", size=2.0)
    mask = torch.ones(2, 5000, dtype=torch.long)
    mask[1, 300:] = 0  # the second clip is done after the first window of thirty seconds
    sound = torch.randn(2, 80, 5000, generator=torch.Generator().manual_seed(4))

    def heard(rows: Sequence[str | None]) -> list[list[Any]]:
        told = {"return_timestamps": True, "max_new_tokens": 12, "return_segments": True, "num_beams": 2}
        with bank.rows(rows), torch.no_grad():
            found = model.generate(sound, attention_mask=mask, condition_on_prev_tokens=False, **told)
        return [[part["tokens"].tolist() for part in clip] for clip in found["segments"]]

    assert len(heard(["a", "a"])) == 2
    with pytest.raises(SmidgenError, match="2 rows set and `generate` runs on 1"):  # of two beams each: as many as rows
        heard(["a", "b"])


def test_several_sampled_sequences_of_one_prompt() -> None:
    model, bank = banked(llama(), "lora", ["q_proj", "v_proj"], size=3.0)
    with bank.rows(NAMES), torch.no_grad():
        torch.manual_seed(1)
        scores = model.generate(
            ids(), do_sample=True, num_return_sequences=2, max_new_tokens=1, pad_token_id=0, top_k=0,
            return_dict_in_generate=True, output_logits=True,
        ).logits[0]  # fmt: skip
    for i, name in enumerate(NAMES):
        wanted = alone(model, name, lambda i=i: model(ids()[i : i + 1]).logits[:, -1])
        testing.close(scores[2 * i : 2 * i + 2], wanted.expand(2, -1), f"prompt {i}", factor=20)


@every_member
def test_left_padding(method: str) -> None:
    model, bank = banked(llama(), method, ["q_proj", "v_proj"])
    tokens, mask = ids(), torch.ones(3, 6, dtype=torch.long)
    mask[0, :3] = mask[2, :1] = 0
    tokens = tokens * mask
    check_rows(model, bank, lambda x: model(**x).logits, {"input_ids": tokens, "attention_mask": mask})
    check_rows(model, bank, written(model), {"input_ids": tokens, "attention_mask": mask})


# ---- models that fold their rows ---------------------------------------------------------------------------------------


def opt() -> nn.Module:
    sizes = {"hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    widths = {"word_embed_proj_dim": 32, "max_position_embeddings": 64}
    return made("OPTForCausalLM", "OPTConfig", vocab_size=97, **sizes, **widths)


def swin() -> nn.Module:
    sizes = {
        "image_size": 32,
        "patch_size": 4,
        "embed_dim": 16,
        "depths": [2, 2],
        "num_heads": [2, 4],
        "window_size": 4,
    }
    return made("SwinForImageClassification", "SwinConfig", num_labels=5, **sizes)


def mobilevit() -> nn.Module:
    necks = [8, 16, 16, 16, 24, 32, 40]
    sizes = {"image_size": 32, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": necks, "num_attention_heads": 2}
    return made("MobileViTForImageClassification", "MobileViTConfig", initializer_range=0.3, num_labels=5, **sizes)


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x.transpose(0, 1)).relu()).transpose(0, 1)


class TimeMajor(nn.Module):
    """Folds time before the rows: stacked copies in the first axis."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.transpose(0, 1).flatten(0, 1)).unflatten(0, (x.shape[1], x.shape[0])).transpose(0, 1)


def pictures() -> Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))


def frames(length: int = 6) -> Tensor:
    return torch.randn(3, length, 16, generator=torch.Generator().manual_seed(3))


FOLDING: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[], Tensor]]] = {
    "opt": (opt, ["fc1", "fc2", "q_proj"], ids),
    "opt, as many tokens as rows": (opt, ["fc1", "fc2"], lambda: ids(3)),
    "swin": (swin, r".*\.(q_proj|query|v_proj|value)", pictures),
    "mobilevit": (mobilevit, ["query", "value"], pictures),
    "sequence first": (SequenceFirst, ["a", "b"], frames),
    "sequence first, square": (SequenceFirst, ["a", "b"], lambda: frames(3)),
    "time major": (TimeMajor, ["a"], frames),
    "time major, square": (TimeMajor, ["a"], lambda: frames(3)),
    "llama": (llama, ["q_proj", "v_proj"], ids),
}


@every_member
@pytest.mark.parametrize("case", list(FOLDING))
def test_models_that_fold_rows(method: str, case: str) -> None:
    make, targets, inputs = FOLDING[case]
    model, bank = banked(make(), method, targets)
    check_rows(model, bank, lambda x: getattr(out := model(x), "logits", out), inputs())


OTHERS: dict[str, tuple[str, dict[str, Any], Any]] = {
    "MixtralForCausalLM": (
        "MixtralConfig",
        {"num_local_experts": 4, "num_key_value_heads": 2, **SMALL},
        ["q_proj", "o_proj"],
    ),
    "AlbertModel": ("AlbertConfig", {"embedding_size": 16, **SMALL}, ["query", "value"]),
    "MambaForCausalLM": ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}, ["in_proj"]),
    "GPT2LMHeadModel": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4}, ["c_attn", "c_proj"]),
    "TimesformerForVideoClassification": ("TimesformerConfig", VIDEO, ["qkv", "dense"]),
    "ViTForImageClassification": ("ViTConfig", {"image_size": 32, "patch_size": 8, **SMALL}, "all-linear"),
}


@pytest.mark.parametrize("name", list(OTHERS))
@pytest.mark.parametrize("method", ["lora", "oft"])
def test_models_of_other_makes(method: str, name: str) -> None:
    config, options, targets = OTHERS[name]
    texts = "Vi" not in name
    model = made(name, config, **options, **({"vocab_size": 97} if texts else {}))
    model, bank = banked(model, method, targets)
    inputs = ids() if texts else pictures()[:, None].repeat(1, 4, 1, 1, 1) if "Video" in name else pictures()
    check_rows(model, bank, lambda x: out.logits if hasattr(out := model(x), "logits") else out[0], inputs)


class Experts(nn.Module):
    """A router sends each token to one of four experts, as Mixtral's did."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts = nn.Linear(16, 4), nn.ModuleList(nn.Linear(16, 16) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        chosen, out = self.router(tokens).argmax(-1), torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            (at,) = torch.where(chosen == number)
            out[at] = expert(tokens[at])
        return out.view_as(x)


def test_tokens_routed_to_experts_are_refused_unless_all_rows_go_one_way() -> None:
    model, bank = banked(Experts(), "lora", r".*experts\.\d")
    for length in (1, 2, 6):  # by chance an expert gets as many tokens as there are rows
        for seed in range(5):
            x = torch.randn(3, length, 16, generator=torch.Generator().manual_seed(seed))
            with (
                bank.rows(NAMES),
                pytest.raises(SmidgenError, match="picked by its content, as a router"),
                torch.no_grad(),
            ):
                model(x)
    with bank.rows(["a"] * 3):
        testing.close(model(x), alone(model, "a", lambda: model(x)), "all rows one adapter")
    model, bank = banked(Experts(), "lora", ["router"])
    check_rows(model, bank, model.router, frames())


class Crossing(nn.Module):
    """Every row sees every other before the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x.flip(0))


def test_what_follows_no_rule_is_refused() -> None:
    model, bank = banked(Crossing(), "lora", ["a"])
    with bank.rows(NAMES), pytest.raises(SmidgenError, match=r"'a' belong to which of the 3 rows .*is not known"):
        model(frames())


# ---- packed tokens -----------------------------------------------------------------------------------------------------


@every_member
def test_packed_tokens_with_rows_per_token(method: str) -> None:
    model, bank = banked(llama(), method, ["q_proj", "v_proj", "down_proj"])
    lengths, names = [4, 3, 5], NAMES
    parts = [ids(length)[i : i + 1] for i, length in enumerate(lengths)]
    tokens = torch.cat(parts, 1)
    where = torch.cat([torch.arange(length) for length in lengths])[None]
    block = torch.block_diag(*[torch.ones(length, length).tril() for length in lengths]).bool()
    mask = torch.zeros(1, 1, 12, 12).masked_fill(~block, torch.finfo(torch.float32).min)
    per_token = [name for name, length in zip(names, lengths, strict=True) for _ in range(length)]
    with bank.rows(per_token), torch.no_grad():
        found = model(tokens, attention_mask=mask, position_ids=where).logits[0].split(lengths)
    for part, name, own in zip(parts, names, found, strict=True):
        testing.close(own, alone(model, name, lambda p=part: model(p).logits[0]), f"tokens of {name!r}", factor=20)


@every_member
def test_packed_tokens_in_a_model_that_flattens_them(method: str) -> None:
    torch.manual_seed(0)
    model, bank = banked(nn.Sequential(nn.Flatten(0, 1), nn.Linear(16, 16)), method, ["1"])
    x, names = frames(4)[:1], ["b", None, "a", "a"]
    with bank.rows(names), torch.no_grad():
        found = model(x)
    for i, name in enumerate(names):
        testing.close(found[i], alone(model, name, lambda: model(x))[i], f"token {i}")


# ---- banks, blocks and threads -----------------------------------------------------------------------------------------


@every_member
def test_two_banks_on_one_model(method: str) -> None:
    model, first = banked(llama(), method, ["q_proj", "v_proj"])
    second = smidgen.Bank(model, model.peft_config["a"])
    second.put("mine", model, "b")
    wanted = {name: alone(model, name, lambda: model(ids()).logits) for name in ("a", "b", None)}
    smidgen.set_active(model, ["a", "b"])
    with torch.no_grad():
        both = model(ids()).logits
        with second.rows(["mine", None, "mine"]):
            found = model(ids()).logits
        with first.rows([None, "b", "a"]), second.rows(["mine", None, "mine"]):
            together = model(ids()).logits
        with first.rows(["b", "a", None]):
            again = model(ids()).logits
    for i, name in enumerate(["b", None, "b"]):
        testing.close(found[i], wanted[name][i], f"the second bank, row {i}", factor=20)
    for i, expected in enumerate([wanted["b"], wanted["b"], both]):
        testing.close(together[i], expected[i], f"banks add, row {i}", factor=20)
    for i, name in enumerate(["b", "a", None]):
        testing.close(again[i], wanted[name][i], f"the first bank, row {i}", factor=20)


def test_a_model_beside_knows_nothing_of_the_rows() -> None:
    model, bank = banked(Denoiser(), "lora", ["to_q", "to_k"])
    other, others = banked(SequenceFirst(), "lora", ["a"])
    x, text = frames()[:, 0], frames()[:, 1, :8]
    wanted = other(frames(5)[:2])
    with bank.rows(NAMES), torch.no_grad():
        testing.same(other(frames(5)[:2]), wanted.detach(), "a model of 2 rows in a block of 3")
        with others.rows(["a", "b"]):
            for i, name in enumerate(("a", "b")):
                own = other(frames(5)[:2])[i]
                testing.close(own, alone(other, name, lambda: other(frames(5)[:2]))[i], f"the other's row {i}")
            found = model(x, text)
    for i, name in enumerate(NAMES):
        testing.close(found[i], alone(model, name, lambda: model(x, text))[i], f"row {i}")


def test_two_threads_with_rows_of_their_own() -> None:
    model, bank = banked(llama(), "svfit", ["q_proj", "v_proj"])
    wanted = {name: alone(model, name, lambda: model(ids()).logits) for name in ("a", "b", None)}
    wrong: list[str] = []

    def serve(names: list[str | None]) -> None:
        with torch.no_grad():
            for call in range(600):
                with bank.rows(names):
                    found = model(ids()).logits
                for i, name in enumerate(names):
                    if not torch.allclose(found[i], wanted[name][i], atol=1e-4):
                        wrong.append(f"call {call}, row {i}, {name!r}")

    threads = [threading.Thread(target=serve, args=(names,)) for names in (["a", None, "b"], ["b", "a", None])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[:5]


@every_member
def test_beside_a_merged_adapter(method: str) -> None:
    model, bank = banked(llama(), method, ["q_proj", "v_proj"])
    wanted = {name: alone(model, name, lambda: model(ids()).logits) for name in ("a", "b", None)}
    smidgen.set_active(model, "a")
    for layer in adapted_layers(model).values():
        layer.merge(adapter_names=["a"])
    with bank.rows(NAMES), torch.no_grad():
        found = model(ids()).logits
    for i, name in enumerate(NAMES):
        testing.close(found[i], wanted[name][i], f"row {i}", factor=20)


@every_member
def test_several_adapters_a_row_with_weights(method: str) -> None:
    model, bank = banked(llama(), method, ["q_proj", "v_proj"])

    def wanted(**strength: float) -> Tensor:
        smidgen.set_active(model, list(strength))
        smidgen.set_strength(model, strength)
        with torch.no_grad():
            return model(ids()).logits

    expected = [wanted(a=1.0, b=1.0), wanted(b=0.5), wanted(a=-0.5, b=2.0)]
    with bank.rows([("a", "b"), "b", ("b", "a")], weights=[1.0, 0.5, (2.0, -0.5)]), torch.no_grad():
        found = model(ids()).logits
    for i, own in enumerate(expected):
        testing.close(found[i], own[i], f"row {i}", factor=20)
    with bank.rows([("a", "b")] * 3, weights=[(-0.5, 2.0)] * 3), torch.no_grad():
        testing.close(model(ids()).logits, expected[2], "all rows one mixture", factor=20)


@every_member
def test_a_strength_goes_into_the_bank(method: str) -> None:
    model, bank = banked(llama(), method, ["q_proj", "v_proj"])
    smidgen.set_strength(model, {"a": 0.25})
    bank.put("a", model, "a")
    check_rows(model, bank, lambda x: model(x).logits, ids())
    bank.evict("a")
    smidgen.set_strength(model, {"a": 1.0})
    bank.put("c", model, "a")  # the free place keeps no strength
    wanted = alone(model, "a", lambda: model(ids()).logits)
    with bank.rows(["c", None, "b"]), torch.no_grad():
        testing.close(model(ids()).logits[0], wanted[0], "in the place of an evicted one", factor=20)


# ---- calls with more rows than names -----------------------------------------------------------------------------------


def guided(x: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """As diffusers' pipelines stack guidance: the latents twice, the empty prompt's text before the prompts'."""
    return torch.cat([x, x]), torch.cat([torch.zeros_like(text), text])


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.to_q, self.to_k = nn.Linear(16, 16), nn.Linear(8, 16)

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        return self.to_q(x) + self.to_k(text).tanh()


def rows_of(copies: int, repeats: int, n: int = 3) -> list[int]:
    return [i for _ in range(copies) for i in range(n) for _ in range(repeats)]


@every_member
@pytest.mark.parametrize(("copies", "repeats"), [(1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (2, 3)])
def test_guidance_and_pictures_per_prompt(method: str, copies: int, repeats: int) -> None:
    model, bank = banked(Denoiser(), method, ["to_q", "to_k"])
    g = torch.Generator().manual_seed(8)
    x, text = torch.randn(3 * repeats, 16, generator=g), torch.randn(3, 8, generator=g).repeat_interleave(repeats, 0)
    many_x = x.repeat(copies, 1)
    many_text = torch.cat([*[torch.full_like(text, 0.1 * k) for k in range(copies - 1)], text])
    with bank.rows(NAMES), torch.no_grad():
        found = model(many_x, many_text)
    for place, i in enumerate(rows_of(copies, repeats)):
        wanted = alone(model, NAMES[i], lambda p=place: model(many_x[p], many_text[p]))
        testing.close(found[place], wanted, f"place {place}, row {i}")


class Tagger(nn.Module):
    """Sorts its rows by length, as everybody does before packing them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.proj, self.lstm = nn.Embedding(97, 16), nn.Linear(16, 16), nn.LSTM(16, 16, batch_first=True)

    def forward(self, tokens: Tensor, lengths: Any) -> Tensor:
        lengths, order = torch.as_tensor(lengths).sort(descending=True)
        packed = pack_padded_sequence(self.proj(self.embed(tokens[order])), lengths, batch_first=True)
        found, _ = pad_packed_sequence(self.lstm(packed)[0], batch_first=True, total_length=tokens.shape[1])
        return found[order.argsort()]


@pytest.mark.parametrize("form", [torch.tensor, list])
@pytest.mark.parametrize("lengths", [[6, 5, 3], [3, 5, 6], [6, 6, 6]])
def test_a_model_that_sorts_its_rows_is_refused_whatever_their_order(
    lengths: list[int], form: Callable[..., Any]
) -> None:
    model, bank = banked(Tagger(), "lora", ["proj"])
    if form is list and lengths == [6, 6, 6]:  # which nothing tells from a list that says nothing, until it differs
        with bank.rows(NAMES), torch.no_grad():
            model(ids(), lengths)
        lengths = [6, 5, 6]
    with bank.rows(NAMES), pytest.raises(SmidgenError, match="is not known"):
        model(ids(), form(lengths))


def test_a_rule_is_not_carried_over_to_a_model_that_was_set_otherwise() -> None:
    class Turned(nn.Module):
        turned = False

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.proj, self.turned = nn.Linear(16, 16), False

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x.flip(0)).flip(0) if self.turned else self.proj(x)

    model, bank = banked(Turned(), "lora", ["proj"])
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    check_rows(model, bank, model, x)
    model.turned = True
    with bank.rows(NAMES), pytest.raises(SmidgenError, match="is not known"):
        model(x)


class Frames(nn.Module):
    """Folds frames into the rows, or rows into the frames."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(16, 16)

    def forward(self, x: Tensor, frames_first: bool = False) -> Tensor:
        x = x.transpose(0, 1) if frames_first else x
        y = self.proj(x.reshape(-1, 16)).reshape(x.shape)
        return y.transpose(0, 1) if frames_first else y


@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_a_rule_is_not_carried_over_to_a_call_with_another_flag(order: tuple[bool, bool]) -> None:
    model, bank = banked(Frames(), "lora", ["proj"])
    x = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(3))
    check_rows(model, bank, lambda x: model(x, frames_first=order[0]), x)
    with bank.rows(NAMES), pytest.raises(SmidgenError, match="is not known"):
        model(x, frames_first=order[1])


def test_rows_that_the_call_does_not_show_are_asked_for() -> None:
    model, bank = banked(Denoiser(), "lora", ["to_q", "to_k"])
    g = torch.Generator().manual_seed(8)
    with bank.rows(NAMES), pytest.raises(SmidgenError, match=r"do not show which.*copies=True"):
        model(torch.randn(6, 16, generator=g), torch.randn(6, 8, generator=g))
    x, text = guided(torch.randn(2, 16, generator=g), torch.linspace(1, 2, 8).expand(2, 8))
    with bank.rows(["a", "b"]), pytest.raises(SmidgenError, match=r"show both.*copies=True"):
        model(x, text)  # two people with one prompt look like two pictures of each of two prompts
    same = x[:1].expand(4, 16)  # and one noise: the repeated prompts alone would show the wrong thing
    with bank.rows(["a", "b"]), pytest.raises(SmidgenError, match=r"do not show which.*copies=True"):
        model(same, text)
    with bank.rows(["a", "b"]), pytest.raises(SmidgenError, match=r"do not show which.*copies=True"):
        model(x, text[:1].expand(4, 8))  # one prompt for both, and two pictures of each from the same two noises
    with bank.rows(["a", "b"], copies=True), torch.no_grad():
        found = model(x, text)
    for place, name in enumerate("abab"):
        testing.close(found[place], alone(model, name, lambda p=place: model(x[p], text[p])), f"place {place}")
    with (
        bank.rows(NAMES, copies=True),
        pytest.raises(SmidgenError, match="3 rows set, which do not divide a batch of 4"),
    ):
        model(x, text)
    mask = torch.tensor([1.0, 1.0, 0.0, 0.0])[:, None].expand(4, 8)  # as of two prompts and two empty ones
    with bank.rows(["a", "b"]), pytest.raises(SmidgenError, match="do not show which"):
        model(torch.randn(4, 16, generator=g), mask)


# ---- training through rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["opt", "sequence first", "time major"])
@pytest.mark.parametrize("method", ["lora", "oft", "svfit"])
def test_gradients_reach_the_right_adapter(method: str, case: str) -> None:
    make, targets, inputs = FOLDING[case]
    model, bank = banked(make(), method, targets)
    x = inputs()
    with bank.rows(["a", None, None]):
        out = model(x)
        getattr(out, "logits", out)[0].square().sum().backward()
    for slot in bank.slots.values():
        for key, p in slot.trained().items():
            assert bool(p.grad[0].any()) and not bool(p.grad[1].any()), f"gradient of {key} reached another adapter"
    with bank.rows(["b", None, None]):
        out = model(x)
        found = getattr(out, "logits", out)[1].square().sum()
    assert not any(
        bool(g.any()) for g in torch.autograd.grad(found, bank.parameters(), allow_unused=True) if g is not None
    )


def test_training_mode_keeps_batch_statistics() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 4))
    model, bank = banked(net, "lora", ["0", "3"])
    model.train()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    with bank.rows(["a", "b", None]):
        model(torch.randn(3, 16, generator=torch.Generator().manual_seed(1)))
    torch.manual_seed(4)
    assert torch.equal(torch.get_rng_state(), state) and model[1].num_batches_tracked == 1 and model.training


def test_a_compiled_model() -> None:
    model, bank = banked(SequenceFirst(), "svfit", ["a", "b"])
    wanted = {name: alone(model, name, lambda: model(frames())) for name in ("a", "b", None)}
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(frames())
        for names in (NAMES, ["b", "a", None]):
            with bank.rows(names):
                found = compiled(frames())
            for i, name in enumerate(names):
                testing.close(found[i], wanted[name][i], f"row {i}, {name!r}")
        smidgen.set_active(model, "b")
        testing.close(compiled(frames()), wanted["b"], "outside of the block")


# ---- diffusers' own pipelines ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Any:
    diffusers = pytest.importorskip("diffusers")
    folder = tiny.sd_folder(tmp_path_factory.mktemp("sd"))
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("method", ["lora", "tlora_star"])
@pytest.mark.parametrize("guidance", [1.0, 5.0])
@pytest.mark.parametrize("pictures_each", [1, 2])
def test_a_whole_pipeline(pipeline: Any, method: str, guidance: float, pictures_each: int) -> None:
    for name in list(getattr(pipeline.unet, "peft_config", {})):
        remove(pipeline.unet, name)
    model, bank = banked(pipeline.unet, method, ["to_q", "to_k", "to_v", "to_out.0"])
    prompts = ["a red house", "two dogs", "the sea at night"]

    def drawn(prompts: list[str], seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipeline(
            prompts, num_inference_steps=2, guidance_scale=guidance, num_images_per_prompt=pictures_each,
            generator=generators, output_type="latent",
        ).images  # fmt: skip

    seeds = list(range(3 * pictures_each))
    with bank.rows(NAMES):
        found = drawn(prompts, seeds).split(pictures_each)
    for i, name in enumerate(NAMES):
        own = seeds[i * pictures_each : (i + 1) * pictures_each]
        wanted = alone(model, name, lambda i=i, own=own: drawn(prompts[i : i + 1], own))
        testing.close(found[i], wanted, f"picture {i}, adapter {name!r}", factor=50)
        if name is not None:
            testing.differs(
                wanted, alone(model, None, lambda i=i, own=own: drawn(prompts[i : i + 1], own)), "an adapter"
            )
