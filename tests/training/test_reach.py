"""The loss reaches every trained layer, or the run says which not in its first steps; and no false alarm."""

import logging

import peft
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import smidgen
from smidgen.adapters.methods import Rates
from smidgen.errors import TrainingError
from smidgen.training import reach
from smidgen.training.fitting import fit
from smidgen.training.loop import LoopConfig, train
from smidgen.training.randomness import stream

WIDTH = 8
LOOP = LoopConfig(max_train_steps=14, lr_warmup_steps=2, checkpointing_steps=100)


class Rows:
    """Random rows to be mapped on themselves times three; ``flag`` goes to the model with each batch."""

    def __init__(self, flags=()):
        self.flags = flags

    def batch(self, index):
        x = torch.randn(4, WIDTH, generator=stream(0, "x", index))
        return {"x": x, "flag": self.flags[index % len(self.flags)] if self.flags else None}

    def loss(self, model, batch):
        found = model(batch["x"]) if batch["flag"] is None else model(batch["x"], batch["flag"])
        return (found - 3 * batch["x"]).square().mean()

    def preview(self, model, step, folder):
        pass


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.pooler = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x


class ByWeight(Net):
    def forward(self, x):
        return super().forward(F.linear(x, self.pooler.weight, self.pooler.bias))


class Thrown(Net):
    def forward(self, x):
        self.pooler(x)
        return super().forward(x)


class Untracked(Net):
    def forward(self, x):
        with torch.no_grad():
            y = self.pooler(x)
        return super().forward(x) + y


class LastButOne(Net):
    """As a text encoder whose next to last hidden state is used."""

    def forward(self, x):
        states = [x]
        for block in self.blocks:
            states.append(states[-1] + block(states[-1]))
        return self.pooler(states[-2])


class Silenced(Net):
    def forward(self, x):
        return super().forward(x) + 0 * self.pooler(x)


class Switched(Net):
    """The flag of a batch chooses what is called: experts, dropped layers, a tower of its own."""

    def forward(self, x, flag):
        for number, block in enumerate(self.blocks):
            x = x + block(x) if number in flag else x
        return x + self.pooler(x)


class Tower(Net):
    """What has a forward pass of its own is run for some batches only."""

    def __init__(self):
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def forward(self, x, flag):
        x = self.pooler(super().forward(x))
        return x + self.tower(x) if flag else x


class Gated(Net):
    """Starts with a head of zeros, as a fresh control net does."""

    def __init__(self):
        super().__init__()
        nn.init.zeros_(self.pooler.weight)

    def forward(self, x):
        return self.pooler(super().forward(x))


def run(model, folder, task=None, config=None, loop=LOOP, **options):
    """Train an adapter on every linear layer of ``model``."""
    names = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    heads = options.get("heads", ())
    config = config or smidgen.config("lora", r=2, target_modules=[name for name in names if name not in heads])
    rates = Rates(0.01, 0.01, 0.01)
    return fit("lora", model, task or Rows(), config, rates, loop, folder, progress=False, **options)


def no_hooks(model):
    return not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "make, layer, why",
    [
        (Net, "pooler", "not called"),
        (ByWeight, "pooler", "not called"),
        (Thrown, "pooler", "does not depend on the output"),
        (Untracked, "pooler", "not called, or only without gradients"),
        (LastButOne, "blocks.2", "does not depend on the output"),
    ],
)
@pytest.mark.parametrize("own", [True, False])
def test_the_first_step_names_what_no_step_would_train(make, layer, why, own, tmp_path):
    model = make()
    config = None if own else peft.LoraConfig(r=2, target_modules=["0", "1", "2", "pooler"])
    with pytest.raises(TrainingError, match=rf"1 of 4 trained layers.*{why}.*: '{layer}'\).*target modules") as error:
        run(model, tmp_path, config=config)
    assert "blocks.0" not in str(error.value)
    assert no_hooks(model) and not list(tmp_path.iterdir())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_transformer_with_a_pooler_that_the_task_does_not_use(tmp_path):
    tf = pytest.importorskip("transformers")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    model = tf.BertModel(tf.BertConfig(vocab_size=20, **sizes))

    class Words(Rows):
        def loss(self, model, batch):
            ids = (batch["x"].abs() * 5).long().clamp(max=19)
            return model(ids).last_hidden_state.square().mean()

    config = smidgen.config("lora", r=2, target_modules="all-linear")
    with pytest.raises(TrainingError, match=r"1 of 13 trained layers.*'pooler.dense'"):
        run(model, tmp_path, Words(), config)


def test_a_loss_that_depends_on_nothing_trained(tmp_path):
    model = Net()
    config = smidgen.config("lora", r=2, target_modules=["pooler"])
    with pytest.raises(TrainingError, match=r"1 of 1 trained layers.*not called.*'pooler'.*Choose other"):
        run(model, tmp_path, config=config)
    plain = Net().requires_grad_(False)
    plain.pooler.requires_grad_(True)
    with pytest.raises(TrainingError, match="depends on nothing that is trained"):
        train(Rows(), plain, [{"params": plain.pooler.parameters(), "lr": 0.1}], LOOP, tmp_path, progress=False)


def test_a_head_that_nothing_calls(tmp_path):
    with pytest.raises(TrainingError, match=r"1 of 4 trained layers.*'pooler'"):
        run(Net(), tmp_path, heads=["pooler"])


def test_zeros_are_given_ten_steps(tmp_path):
    model = Silenced()
    with pytest.raises(TrainingError, match=r"1 of 4 .*no gradient in the first 10 steps: 'pooler'"):
        run(model, tmp_path)
    assert no_hooks(model)
    run(Silenced(), tmp_path, loop=LoopConfig(max_train_steps=9))  # too short a run to be told


# ---- no false alarm --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["svfit", "loldu", "lora", "oft", "tlora", "seeded", "rotation+low_rank"])
def test_every_start_of_an_adapter(method, tmp_path, caplog):
    config = smidgen.config(method, target_modules=["0", "1", "2"])
    model = Gated()
    with caplog.at_level(logging.WARNING):
        run(model, tmp_path, config=config, heads=["pooler"])
    assert not caplog.records and no_hooks(model)


@pytest.mark.parametrize("kind", ["LoraConfig", "AdaLoraConfig", "VeraConfig", "IA3Config", "OFTConfig", "LoHaConfig"])
def test_peft_methods(kind, tmp_path):
    options = {"feedforward_modules": []} if kind == "IA3Config" else {}
    options |= {"total_step": 14} if kind == "AdaLoraConfig" else {}
    options |= {"oft_block_size": 4} if kind == "OFTConfig" else {}
    made = getattr(peft, kind)(target_modules=["0", "1", "2"], **options)
    run(Gated(), tmp_path, config=made, heads=["pooler"])


@pytest.mark.parametrize(
    "flags, warned",
    [
        ([{0, 1}, {2}], False),  # an expert without a token in the first step
        ([{0, 1}], True),  # and in ten
        ([set(), {0}, {1}, {2}], False),  # every layer dropped in the first step
    ],
)
def test_layers_that_a_batch_need_not_reach(flags, warned, tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        run(Switched(), tmp_path, Rows(flags))
    assert ("1 of 4 trained layers got no gradient" in caplog.text and "'blocks.2'" in caplog.text) == warned
    assert bool(caplog.records) == warned


def test_accumulated_batches_count_together(tmp_path):
    loop = LoopConfig(max_train_steps=1, gradient_accumulation_steps=2)
    run(Tower(), tmp_path, Rows([True, False]), loop=loop)


def test_a_tower_whose_inputs_come_later(tmp_path):
    run(Tower(), tmp_path / "later", Rows([False] * 3 + [True]))
    with pytest.raises(TrainingError, match=r"first 10 steps: 'tower.0'"):
        run(Tower(), tmp_path / "never", Rows([False]))


def test_what_another_process_calls_is_called(tmp_path, monkeypatch):
    model = smidgen.adapt(Net(), "lora", r=2, target_modules=["0", "1", "2", "pooler"])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = reach.Reach(None, model, trained)
    model(torch.ones(2, WIDTH)).sum().backward()
    monkeypatch.setattr(reach, "gathered", lambda accelerator, values: [values, [1.0] * len(values)])
    with pytest.raises(TrainingError, match=r"called, but the loss does not depend on the output: 'pooler'"):
        found.check()


def test_a_bank_is_watched_too(tmp_path):
    model = smidgen.adapt(Net(), "lora", r=2, target_modules=["0", "1", "2", "pooler"])
    model.requires_grad_(False)
    bank = smidgen.Bank(model, smidgen.config("lora", r=2, target_modules=["0", "1", "2", "pooler"]), ["a", "b"])
    bank.start(["a", "b"])
    parameters = [parameter.requires_grad_(True) for parameter in bank.parameters()]
    groups = [{"params": parameters, "lr": 0.01}]
    with bank.rows(["a", "a", "b", "b"]), pytest.raises(TrainingError, match=r"1 of 4 trained layers.*'pooler'"):
        train(Rows(), model, groups, LOOP, tmp_path, progress=False)
