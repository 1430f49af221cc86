"""One decoding step of a batch of 64 people: what their adapters cost on top of the base, through the bank and through
peft's ``adapter_names``, the same method and rank, as processor seconds of interleaved rounds in one run.

python -m benchmarks.bank        (about 3 minutes, one thread)
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers

import smidgen
from benchmarks._harness import write_result
from smidgen import testing

PEOPLE, CONTEXT, RANK = 64, 32, 8
TARGETS = ["q_proj", "v_proj"]


def model() -> Any:
    """A Llama of 8 layers of width 512."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2000, hidden_size=512, intermediate_size=1376, num_hidden_layers=8, num_attention_heads=8,
        num_key_value_heads=4,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def step(run: Any, cache: Any) -> Callable[..., torch.Tensor]:
    """One new token for everybody after a context that stays as it is."""
    token = torch.arange(PEOPLE)[:, None] + 5

    def decode(**options: Any) -> torch.Tensor:
        out = run(input_ids=token, past_key_values=cache, use_cache=True, **options).logits
        cache.crop(-1)
        return out  # type: ignore[no-any-return]

    return decode


def ways(method: str) -> dict[str, Callable[[], torch.Tensor]]:
    """The same 64 adapters through the bank and by name; "lora" by name is peft's own."""
    base = model()
    ids = torch.randint(5, 2000, (PEOPLE, CONTEXT), generator=torch.Generator().manual_seed(1))
    cache = base(ids, use_cache=True).past_key_values
    names = [f"p{i}" for i in range(PEOPLE)]
    served = smidgen.adapt(model(), method, r=RANK, target_modules=TARGETS)
    bank = smidgen.Bank(served, served.peft_config["default"], names)
    config: Any = smidgen.config(method, r=RANK, target_modules=TARGETS)
    if method == "lora":
        config = peft.LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS, init_lora_weights=False)
    named = peft.get_peft_model(model(), config, names[0])
    for name in names[1:]:
        named.add_adapter(name, config)
    named.eval()
    bank.start()
    for i in range(PEOPLE):
        for slot in bank.slots.values():
            for p in slot.parameters():
                p.data[i] += 0.1 * torch.randn(p[i].shape, generator=torch.Generator().manual_seed(i))
        if method != "lora":
            testing.perturb(named, i, adapter_name=names[i])
    decode, decode_bank, decode_named = step(base, cache), step(served, cache), step(named, cache)

    def by_bank() -> torch.Tensor:
        with bank.rows(names):
            return decode_bank()

    return {"base": decode, "bank": by_bank, "adapter_names": lambda: decode_named(adapter_names=names)}


@torch.no_grad()
def measure(method: str, rounds: int) -> dict[str, float]:
    """Milliseconds over the base's, of each way, and their ratio: medians of interleaved rounds."""
    runs = ways(method)
    outputs = {way: run() for way, run in runs.items()}
    assert all(not torch.equal(outputs["base"], outputs[way]) for way in ("bank", "adapter_names")), "an adapter is off"
    times: dict[str, list[float]] = {way: [] for way in runs}
    for _ in range(rounds):
        for way, run in runs.items():
            start = time.process_time()
            run()
            times[way].append(time.process_time() - start)
    base = statistics.median(times["base"])
    over = {
        way: statistics.median(one - b for one, b in zip(times[way], times["base"], strict=True))
        for way in ("bank", "adapter_names")
    }
    return {
        f"{method}_base_ms": 1e3 * base,
        f"{method}_bank_over_base_ms": 1e3 * over["bank"],
        f"{method}_adapter_names_over_base_ms": 1e3 * over["adapter_names"],
        f"{method}_ratio_of_overheads": over["adapter_names"] / over["bank"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="peft")
    figures: dict[str, float] = {}
    for method in ("svfit", "lora", "loldu", "tlora"):
        figures |= {key: round(value, 3) for key, value in measure(method, rounds).items()}
        print(*(f"{key} {value}" for key, value in figures.items() if key.startswith(method)), sep="\n", flush=True)
    write_result("bank", figures, "make bench NAME=bank")


if __name__ == "__main__":
    main()
