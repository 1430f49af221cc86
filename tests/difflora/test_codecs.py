"""Codecs: what they keep, what they lose, what they store; statistics come from the rows they were given alone."""

import json

import pytest
import torch
from damage import rewrite

from smidgen.difflora.weightspace.canonical import canonical_rows
from smidgen.difflora.weightspace.codecs import load_codec
from smidgen.difflora.weightspace.conv_autoencoder import ConvAutoencoder
from smidgen.difflora.weightspace.layout import Layout
from smidgen.difflora.weightspace.learned import preserve_weights, reconstruction_loss
from smidgen.difflora.weightspace.normalise import MODES, Statistics
from smidgen.difflora.weightspace.pca import PCA
from smidgen.difflora.weightspace.rows import TensorRows
from smidgen.difflora.weightspace.token_autoencoder import TokenAutoencoder, Tokens
from smidgen.errors import BaseLockError, ConfigError, DataError

from .helpers import layout, numbers

LORA, SPECTRAL = layout(r=1), layout("svfit", r=8)


def people(own: Layout, count: int = 48, seed: int = 0) -> torch.Tensor:
    """Rows on a three-dimensional sheet."""
    mix, centre = numbers(3, own.size, seed=99), 2 * numbers(own.size, seed=98)
    return numbers(count, 3, seed=seed) @ mix * 0.3 + centre


# ---- normalisation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_statistics_in_blocks_are_those_of_all_rows(mode):
    rows = people(LORA)
    blocks, whole = Statistics(LORA.size), Statistics(LORA.size)
    whole.add(rows)
    for block in rows.split(7):
        blocks.add(block)
    one, other = blocks.normaliser(LORA, mode), whole.normaliser(LORA, mode)
    torch.testing.assert_close(one.shift, other.shift)
    torch.testing.assert_close(one.width, other.width)
    torch.testing.assert_close(one.inverse(one(rows)), rows, atol=1e-5, rtol=1e-5)
    normal = one(rows)
    for entry in LORA.entries:
        part = normal[:, entry.columns]
        if mode in ("tensor", "centred"):
            assert float(part.mean()) == pytest.approx(0, abs=1e-5)
            assert float(part.std(correction=0)) == pytest.approx(1, abs=1e-4)
        if mode in ("centred", "element"):
            assert float(part.mean(0).abs().max()) < 1e-5
    if mode == "element":
        torch.testing.assert_close(normal.std(0, correction=0), torch.ones(LORA.size))
    if mode == "x10":
        torch.testing.assert_close(normal, 10 * rows)


def test_unknown_modes_and_no_rows_are_refused():
    with pytest.raises(ConfigError, match="Did you mean 'tensor'"):
        Statistics(3).normaliser(LORA, "tensors")
    with pytest.raises(DataError, match="no training rows"):
        Statistics(3).normaliser(LORA)
    with pytest.raises(DataError, match="at least two"):
        PCA(LORA).fit(TensorRows(people(LORA, 1)))
    with pytest.raises(DataError, match="not been fitted"):
        PCA(LORA).encode(people(LORA))


# ---- PCA ------------------------------------------------------------------------------------------------------------


def test_pca_is_that_of_the_covariance_and_white_on_its_rows():
    rows = people(SPECTRAL) + 0.01 * numbers(48, SPECTRAL.size, seed=5)
    codec = PCA(SPECTRAL, components=5, block=11).fit(TensorRows(rows))
    normal = codec.prepare(rows).double()
    centred = normal - normal.mean(0)
    _, values, vectors = torch.linalg.svd(centred, full_matrices=False)
    assert codec.explained == pytest.approx((values[:5] ** 2 / (values**2).sum()).tolist(), rel=1e-4)
    overlap = (vectors[:5] @ codec.basis.double().T).abs()
    torch.testing.assert_close(overlap, torch.eye(5, dtype=torch.float64), atol=1e-3, rtol=0)
    latents = codec.encode(rows)
    torch.testing.assert_close(latents.T @ latents / len(rows), torch.eye(5), atol=1e-3, rtol=0)
    assert codec.error(rows) < 0.01 < PCA(SPECTRAL, components=1).fit(TensorRows(rows)).error(rows)


def test_pca_of_all_components_loses_nothing_and_never_has_more_than_the_rows_span():
    rows = people(SPECTRAL, 10)
    codec = PCA(SPECTRAL, components=64).fit(TensorRows(rows))
    assert codec.latent_shape == (3,)
    torch.testing.assert_close(codec.decode(codec.encode(rows)), rows, atol=1e-4, rtol=1e-4)


# ---- the learned codecs -----------------------------------------------------------------------------------------------


def test_the_weight_preserve_loss_is_the_formula():
    w, v = numbers(2, 10, seed=1), numbers(2, 10, seed=2)
    wanted = []
    for one, found in zip(w.tolist(), v.tolist(), strict=True):
        errors = [(x - y) ** 2 for x, y in zip(one, found, strict=True)]
        large = sorted(map(abs, one))[8]  # of ten numbers the two at or above the quantile 0.8
        mask = [abs(x) >= large for x in one]
        kept = sum(e for e, m in zip(errors, mask, strict=True) if m) / sum(mask)
        wanted.append(sum(errors) / 10 + 0.5 * kept)
    assert float(reconstruction_loss(w, v, 0.5, q=0.8)) == pytest.approx(sum(wanted) / 2, rel=1e-5)
    assert preserve_weights(w, 0.8).sum(1).tolist() == [2, 2]
    powered = preserve_weights(w, None, p=2.0)
    torch.testing.assert_close(powered, w.square() / w.square().mean(1, keepdim=True))
    assert float(reconstruction_loss(w, v, 0.0)) == pytest.approx(float((w - v).square().mean()), rel=1e-6)


def test_every_number_is_in_one_token_that_knows_its_place():
    own = layout(r=2)
    tokens = Tokens(own, token=7)
    inside = tokens.places[tokens.places < own.size]
    assert sorted(inside.tolist()) == list(range(own.size))
    assert tokens.counts == [2, 1, 2, 6]  # to_k, to_q; one parent; a, b; at most 2 x 3 pieces
    assert len({tuple(label) for label in tokens.labels.T.tolist()}) == len(tokens.places)
    flat = torch.cat([torch.arange(own.size), torch.tensor([-1])])[tokens.places].flatten()
    assert torch.equal(flat[tokens.where], torch.arange(own.size))
    column = own.entries[1].columns.start + 1  # b is [10, 2]: its second number belongs to the second direction
    first = own.entries[1].columns.start
    assert (tokens.where[column] // 7) != (tokens.where[first] // 7)


LEARNED = {
    "conv": (ConvAutoencoder, {"channels": (8, 16)}),
    "token": (TokenAutoencoder, {"token": 16, "latent": 3, "width": 32, "depth": 1}),
}


@pytest.mark.parametrize("kind", LEARNED)
def test_a_learned_codec_learns_and_comes_back_from_its_file(kind, tmp_path):
    cls, options = LEARNED[kind]
    rows, others = people(LORA), people(LORA, seed=1)
    fit = {"steps": 80, "latent_noise": 0.02, "batch": 12, "learning_rate": 6e-3}
    untrained = cls(LORA, fit=fit | {"steps": 1}, **options).fit(TensorRows(rows), progress=False)
    codec = cls(LORA, fit=fit, **options).fit(TensorRows(rows), progress=False)
    assert codec.error(others) < 0.9 < untrained.error(others)
    latents = codec.encode(others)
    assert latents.shape == (48, *codec.latent_shape)
    assert float(codec.encode(rows).std()) == pytest.approx(1, abs=0.05)
    codec.save(tmp_path)
    again = load_codec(tmp_path, LORA)
    assert torch.equal(again.encode(others), latents)
    assert torch.equal(again.decode(latents), codec.decode(latents))
    latents.requires_grad_(True)
    again.decode(latents).square().mean().backward()
    assert float(latents.grad.norm()) > 0, "decoding is differentiable"


def test_a_killed_fit_goes_on_to_the_same_bits(tmp_path):
    rows = TensorRows(people(LORA, 8))
    options = {"channels": (4,), "fit": {"steps": 6, "batch": 4}}
    straight = ConvAutoencoder(LORA, **options).fit(rows, progress=False)

    class Killed(Exception):
        pass

    class Dies(TensorRows):
        taken = 0

        def take(self, indices):
            if len(indices) > 1:  # a training batch
                Dies.taken += 1
                if Dies.taken == 5:
                    raise Killed
            return super().take(indices)

    import smidgen.difflora.weightspace.learned as learned

    loop = learned.LoopConfig
    learned.LoopConfig = lambda **changes: loop(**(changes | {"checkpointing_steps": 2}))
    try:
        with pytest.raises(Killed):
            ConvAutoencoder(LORA, **options).fit(Dies(rows.values), tmp_path, progress=False)
        resumed = ConvAutoencoder(LORA, **options).fit(rows, tmp_path, progress=False)
    finally:
        learned.LoopConfig = loop
    assert torch.equal(resumed.encode(rows.values), straight.encode(rows.values))


def test_settings_without_meaning_are_refused():
    for make in (
        lambda: PCA(LORA, components=0),
        lambda: ConvAutoencoder(LORA, channels=()),
        lambda: ConvAutoencoder(LORA, channels=(4, 4, 4, 4)),
        lambda: TokenAutoencoder(LORA, width=10, heads=4),
        lambda: TokenAutoencoder(LORA, fit={"stepps": 3}),
    ):
        with pytest.raises(ConfigError):
            make()


# ---- what a codec keeps --------------------------------------------------------------------------------------------


def test_a_codec_sees_products_and_not_factors():
    """Mixing a LoRA's factors changes no latent; only the adapter's canonical form comes back."""
    own = layout(r=2)
    rows = numbers(12, own.size)
    codec = PCA(own).fit(TensorRows(rows))
    tensors = own.unpack(rows)
    mix = torch.tensor([[2.0, 1.0], [0.5, -1.0]])
    for target in tensors.values():
        target["residual_b"] = target["residual_b"] @ mix
        target["residual_a"] = mix.inverse() @ target["residual_a"]
    torch.testing.assert_close(codec.encode(own.pack(tensors)), codec.encode(rows), atol=2e-3, rtol=1e-3)
    wanted = canonical_rows(rows, own, codec.reference)
    torch.testing.assert_close(codec.decode(codec.encode(rows)), wanted, atol=1e-3, rtol=1e-3)


def test_a_codec_file_is_checked(tmp_path):
    codec = PCA(LORA, components=2).fit(TensorRows(people(LORA)))
    codec.save(tmp_path)
    with pytest.raises(BaseLockError, match="another base"):
        load_codec(tmp_path, layout(seed=1, r=1))
    with pytest.raises(DataError, match="mixed ranks"):
        load_codec(tmp_path, layout(r=2))
    with pytest.raises(DataError, match=r"have shape \(3,\), this codec's have \(2,\)"):
        load_codec(tmp_path).decode(torch.zeros(1, 3))
    content = (tmp_path / "codec.safetensors").read_bytes()
    rewrite(tmp_path / "codec.safetensors", content[:-8])
    with pytest.raises(DataError, match="not the file"):
        load_codec(tmp_path)
    rewrite(tmp_path / "codec.safetensors", content)
    described = json.loads((tmp_path / "codec.json").read_text())
    (tmp_path / "codec.json").write_text(json.dumps(described | {"codec": "pcaa"}))
    with pytest.raises(DataError, match="Did you mean 'pca'"):
        load_codec(tmp_path)
    with pytest.raises(DataError, match="holds no codec"):
        load_codec(tmp_path / "nowhere")
