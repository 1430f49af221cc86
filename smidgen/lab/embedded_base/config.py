"""Settings of the recipe: one frozen record, two presets."""

from dataclasses import dataclass, replace
from types import ModuleType

from smidgen.bases.embedded.worlds import load_world
from smidgen.errors import ConfigError, did_you_mean


@dataclass(frozen=True)
class Budget:
    """How long a training lasts: a number of steps, or wall-clock minutes when `minutes` is set.

    Progress (0 to 1) drives the learning rate, so that a run always ends annealed, however busy the machine was. Runs
    counted in steps repeat to the bit; runs counted in minutes do not.
    """

    steps: int = 0
    minutes: float | None = None
    batch: int = 32
    lr: float = 1e-3

    def progress(self, step: int, seconds: float) -> float:
        """Share of the budget that is spent."""
        done = step / self.steps if self.minutes is None else seconds / (60 * self.minutes)
        return min(1.0, done)


@dataclass(frozen=True)
class Config:
    """The whole recipe. Widths are channel counts; the latent grid is 8x8."""

    seed: int = 0
    world: str = "embedded"  # or "wide"
    train_pictures: int = 40_000
    test_pictures: int = 2_000
    judge: Budget = Budget(steps=2000, batch=64, lr=2e-3)
    wide_reader: Budget = Budget(steps=7000, batch=64, lr=3e-3)
    wide_likeness: Budget = Budget(steps=1500, batch=64, lr=2e-3)
    encoders: Budget = Budget(steps=1800, batch=64, lr=2e-3)
    encoder_pictures: int = 30_000  # of the wide world, where they are drawn anew
    wide_encoder: Budget = Budget(steps=7000, batch=64, lr=3e-3)
    autoencoder: Budget = Budget(minutes=25, batch=16, lr=2e-3)
    wide_autoencoder: Budget = Budget(minutes=80, batch=16, lr=1e-3)
    decoder: Budget = Budget(minutes=25, batch=16, lr=1e-3)
    diffusion: Budget = Budget(minutes=60, batch=32, lr=1.5e-3)
    flow: Budget = Budget(minutes=50, batch=48, lr=3e-3)
    wide_flow: Budget = Budget(minutes=95, batch=48, lr=2e-3)
    autoencoder_widths: tuple[int, ...] = (16, 32, 64, 128)
    latent_channels: int = 16
    unet_widths: tuple[int, ...] = (64, 128)
    text_width: int = 96
    flow_width: int = 192
    flow_blocks: tuple[int, int] = (2, 6)  # double and single ones
    workers: int = 2

    @property
    def autoencoder_budget(self) -> Budget:
        """That of stage `autoencoder` in the world that is drawn."""
        return self.wide_autoencoder if self.world == "wide" else self.autoencoder

    @property
    def flow_budget(self) -> Budget:
        """That of stage `flow` in the world that is drawn."""
        return self.wide_flow if self.world == "wide" else self.flow

    def drawn(self) -> ModuleType:
        """The module of the world that is drawn."""
        return load_world(self.world)


PRESETS = {
    "full": Config(),
    "debug": Config(
        train_pictures=96,
        test_pictures=32,
        judge=Budget(steps=6, batch=16),
        wide_reader=Budget(steps=4, batch=16),
        wide_likeness=Budget(steps=4, batch=16),
        encoders=Budget(steps=6, batch=16),
        encoder_pictures=64,
        wide_encoder=Budget(steps=4, batch=16),
        autoencoder=Budget(steps=6, batch=4),
        wide_autoencoder=Budget(steps=4, batch=4),
        decoder=Budget(steps=4, batch=4),
        diffusion=Budget(steps=6, batch=8),
        flow=Budget(steps=4, batch=8),
        wide_flow=Budget(steps=4, batch=8),
        autoencoder_widths=(8, 8, 16, 16),
        unet_widths=(16, 32),
        text_width=16,
        flow_width=64,
        flow_blocks=(1, 1),
        workers=1,
    ),
}


def preset(name: str, **changes) -> Config:
    """A preset by name, with fields replaced."""
    if name not in PRESETS:
        raise ConfigError(f"No preset {name!r}.{did_you_mean(name, PRESETS)} Known: {', '.join(PRESETS)}.")
    return replace(PRESETS[name], **changes)
