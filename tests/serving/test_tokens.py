"""Tokens: how they are drawn, spelt, and how rows of keys and values come and go."""

import copy
import random

import numpy
import pytest
import torch

from smidgen.serving.key_values import RoomyCache
from smidgen.serving.sampling import Choice, choose, nucleus
from smidgen.serving.spelling import Speller


class Bytes:
    """A tokenizer whose tokens are bytes of UTF-8; 0 is special."""

    def decode(self, ids: list[int], **_: object) -> str:
        return bytes(one for one in ids if one).decode(errors="replace")


@pytest.mark.parametrize("text", ["plain words", "naïve 日本語 ☃️ 👩‍👩‍👧 end", "half �"])
def test_pieces_are_whole_characters_and_all_of_them(text: str) -> None:
    speller = Speller(Bytes())
    pieces = [speller.add(byte) for byte in text.encode()]
    assert "".join([*pieces, speller.end()]) == text
    for piece in pieces:
        assert "�" not in piece or "�" in text
    cut = Speller(Bytes())
    assert "".join(cut.add(byte) for byte in text.encode()[:-1]) + cut.end() == text.encode()[:-1].decode(
        errors="replace"
    )


@pytest.mark.parametrize("stops", [("###",), ("\nUser:", "\nUs"), ("b", "abc"), ("日本",)])
def test_nothing_of_a_stop_text_is_given(stops: tuple[str, ...]) -> None:
    random.seed(0)
    for _ in range(200):
        text = "".join(random.choice(["#", "\nU", "ser:", "ab", "c", "日", "本", " ", "Us"]) for _ in range(12))
        speller, given = Speller(Bytes(), stops), ""
        for byte in text.encode():
            given += speller.add(byte)
            if speller.stopped:
                break
        given += speller.end()
        found = [text.index(stop) for stop in stops if stop in text]
        ends = {text[:at] for at in found}
        assert given in ends if found else given == text, (text, stops)
        assert speller.stopped == bool(found)


def test_tokens_are_drawn_by_their_shares_and_by_the_seed_alone() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.2, 0.2, 0.1]])).expand(4000, 4)
    choices = [Choice(1.0, 1.0, numpy.random.default_rng(seed)) for seed in range(4000)]
    found = torch.tensor(choose(logits, choices)).bincount(minlength=4) / 4000
    assert torch.allclose(found, torch.tensor([0.5, 0.2, 0.2, 0.1]), atol=0.03)
    one = [Choice(1.0, 1.0, numpy.random.default_rng(7))]
    again = [Choice(0.0, 1.0, numpy.random.default_rng(0)), Choice(1.0, 1.0, numpy.random.default_rng(7))]
    assert choose(logits[:1], one)[0] == choose(logits[:2], again)[1]
    assert choose(logits[:1], [Choice(0.0, 1.0, numpy.random.default_rng(0))]) == [0]
    few = [Choice(1.0, 0.6, numpy.random.default_rng(seed)) for seed in range(300)]
    assert set(choose(logits[:300], few)) == {0, 1}
    assert nucleus(torch.tensor([[0.25, 0.75]]), torch.tensor([[0.0]])).tolist() == [[0.0, 0.75]]


def test_what_is_drawn_is_not_at_the_mercy_of_rounding() -> None:
    """A batch of another size rounds logits otherwise. Of a vocabulary with a long tail, a place among summed shares would be
    another one in one of eighty draws."""
    logits = torch.randn(400, 50_000, generator=torch.Generator().manual_seed(0)) * 3
    near = logits + 1e-5 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    choices = [[Choice(1.0, 1.0, numpy.random.default_rng(row)) for row in range(400)] for _ in range(2)]
    assert choose(logits, choices[0]) == choose(near, choices[1])
    cold = [Choice(temperature, 1.0, numpy.random.default_rng(0)) for temperature in (1e-9, 1e-300)]
    assert choose(logits[:2], cold) == logits[:2].argmax(-1).tolist()


def test_rows_of_keys_and_values_join_leave_and_move() -> None:
    """Against lists of each row's own columns, through many random changes."""
    chance, generator = random.Random(0), torch.Generator().manual_seed(0)

    def states(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, 2, columns, 3, generator=generator)

    def read(cache: RoomyCache, lengths: list[int]) -> list[torch.Tensor]:
        """Prompts, filled up on the left."""
        keys = states(len(lengths), max(lengths))
        cache.update(keys, -keys, 0)
        return [key[:, max(lengths) - length :] for key, length in zip(keys, lengths, strict=True)]

    cache = RoomyCache()
    rows = read(cache, [3, 5])
    for _ in range(300):
        what = chance.choice(["join", "leave", "token", "token", "token"])
        if what == "join" and len(rows) < 9:
            other = RoomyCache()
            rows += read(other, [chance.randrange(1, 90) for _ in range(chance.randrange(1, 4))])
            cache.join(other, range(other.layers[0].rows))  # type: ignore[attr-defined]
        elif what == "leave" and len(rows) > 1:
            at = chance.randrange(len(rows))
            cache.leave(at)
            rows[at] = rows[-1]
            rows.pop()
            cache.trim(max(row.shape[1] for row in rows))
        elif what == "token":
            key = states(len(rows), 1)
            keys, values = cache.update(key, -key, 0)
            rows = [torch.cat([row, one], dim=1) for row, one in zip(rows, key, strict=True)]
            assert keys.shape[2] == max(row.shape[1] for row in rows) == cache.get_seq_length()
        keys, values = copy.deepcopy(cache).layers[0].keys, cache.layers[0].values
        assert len(keys) == len(rows)
        for place, row in enumerate(rows):
            assert torch.equal(keys[place, :, -row.shape[1] :], row)
            assert torch.equal(values[place, :, -row.shape[1] :], -row)
