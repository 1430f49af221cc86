"""What an experiment is: a recipe with its settings, methods, seeds, a learning-rate search and budgets, in one YAML file."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from smidgen.errors import ConfigError, did_you_mean
from smidgen.lab.compare.recipes import recipe_config
from smidgen.training.settings import load_yaml

PROBE, FULL = "linear probe", "full fine-tuning"
SHIPPED = Path(__file__).parent / "experiments"


@dataclass(frozen=True)
class Method:
    """One method. ``kind`` is a method of smidgen, ``peft.<Name>Config``, or one of the two controls.

    ``options`` are the config's own. ``rates`` is the grid of learning rates; the linear probe, which is not trained by steps,
    has none.
    """

    name: str
    kind: str
    rates: tuple[float, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None  # None: the experiment's

    def __post_init__(self) -> None:
        if self.kind == PROBE:
            if self.rates:
                raise ConfigError(
                    f"Method {self.name!r} is a {PROBE}, a regression without a learning rate; leave out rates."
                )
            return
        if not self.rates or any(not 0 < rate < math.inf for rate in self.rates):
            raise ConfigError(f"Method {self.name!r} needs learning rates above 0, got {list(self.rates)}.")
        if list(self.rates) != sorted(set(self.rates)):
            raise ConfigError(f"The rates of method {self.name!r} must ascend, got {list(self.rates)}.")

    @property
    def family(self) -> Literal["ours", "peft", "control"]:
        if self.kind in (PROBE, FULL):
            return "control"
        return "peft" if self.kind.startswith("peft.") else "ours"


@dataclass(frozen=True)
class Round:
    """A round of the search: every rate that is left is trained for ``steps``, and the best ``keep`` go on."""

    steps: int
    keep: int

    def __post_init__(self) -> None:
        if self.steps < 1 or self.keep < 1:
            raise ConfigError(f"A round of the search needs at least 1 step and keeps at least 1 rate, got {self}.")


@dataclass(frozen=True)
class Search:
    """The search for a learning rate by successive halving, the same for every method, on a ``seed`` of its own, by the loss on
    validation.

    Where the best rate lies at an edge of its grid, the grid grows there by its own factor until it lies inside, at most
    ``extensions`` times.
    """

    seed: int = 100
    rounds: tuple[Round, ...] = (Round(150, 2), Round(600, 1))
    extensions: int = 8

    def __post_init__(self) -> None:
        if not self.rounds or self.rounds[-1].keep != 1 or self.extensions < 0:
            raise ConfigError(
                "search needs rounds, the last of which keeps 1 rate, and no negative number of extensions."
            )


@dataclass(frozen=True)
class Evaluation:
    """How many examples the scores are taken on, drawn once and the same for every cell (None: all)."""

    validation_examples: int | None = None
    test_examples: int | None = None


@dataclass(frozen=True)
class Forgetting:
    """Unrelated data whose loss is measured with the adapter on and off."""

    data: str  # packaged name, file or folder, as the recipe reads it
    examples: int = 200  # the loss is taken on these
    probe_examples: int = 400  # classification: what the logistic probe on the frozen base's features learns from


@dataclass(frozen=True)
class Claim:
    """The papers' claim as non-inferiority: each of ``methods`` is at most ``margin`` worse than ``baseline``, with ``times`` fewer
    numbers, in the first of the formats. The linear probe must fail it, else the experiment cannot tell."""

    methods: tuple[str, ...]
    baseline: str
    times: float = 16.0
    margin: float = 0.01


@dataclass(frozen=True)
class Experiment:
    """Task x model x methods x formats x budgets x seeds. ``settings`` is the recipe's own config."""

    name: str
    recipe: Literal["text-classification", "image-classification", "instruction"]
    settings: dict[str, Any]
    methods: tuple[Method, ...]
    target_modules: tuple[str, ...] | str
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    search: Search = field(default_factory=Search)
    evaluation: Evaluation = field(default_factory=Evaluation)
    formats: tuple[Literal["float32", "float16", "int8", "int4"], ...] = (
        "float16",
        "int4",
    )  # every adapter is stored in each
    forgetting: Forgetting | None = None
    budgets: tuple[int, ...] = (1_000, 2_000, 5_000, 10_000, 20_000, 50_000)  # bytes
    claim: Claim | None = None
    cost_steps: int = 5  # steps of each measurement of memory and step time; 0: neither is measured
    title: str = ""

    def __post_init__(self) -> None:
        if not self.methods or not self.seeds or not self.formats:
            raise ConfigError("An experiment needs at least one method, one seed and one format.")
        _check_unique("seed", self.seeds)
        _check_unique("method", [method.name for method in self.methods])
        searched = [method for method in self.methods if method.kind != PROBE]
        if len({len(method.rates) for method in searched}) > 1:
            odd = ", ".join(f"{m.name}: {len(m.rates)}" for m in searched)
            raise ConfigError(f"Every method must get the same number of learning rates ({odd}).")
        if self.search.seed in self.seeds:
            raise ConfigError(
                f"The search needs a seed of its own; {self.search.seed} is one of the run's {self.seeds}."
            )
        for name in (*self.claim.methods, self.claim.baseline) if self.claim else ():
            self.method(name)
        self.config()  # the recipe checks its settings

    def method(self, name: str) -> Method:
        """The method called ``name``; ConfigError with the nearest names otherwise."""
        for method in self.methods:
            if method.name == name:
                return method
        known = [method.name for method in self.methods]
        raise ConfigError(f"There is no method {name!r}.{did_you_mean(name, known)} Known: {', '.join(known)}.")

    def only(self, names: Sequence[str] | None) -> "Experiment":
        """The same experiment with fewer methods."""
        if not names:
            return self
        kept = tuple(self.method(name) for name in names)
        claimed = {*self.claim.methods, self.claim.baseline} if self.claim else set()
        return replace(self, methods=kept, claim=self.claim if claimed <= set(names) else None)

    def targets(self, method: Method) -> list[str] | str:
        chosen = self.target_modules if method.target_modules is None else method.target_modules
        return chosen if isinstance(chosen, str) else list(chosen)

    def config(self, seed: int = 0, steps: int | None = None) -> Any:
        """The recipe's config of one training."""
        return recipe_config(self.recipe, self.settings, seed, steps)


def load_experiment(name: str | Path) -> Experiment:
    """Read an experiment by the name of one that ships with the package, or from a YAML file."""
    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        path = SHIPPED / f"{name}.yaml"
        if not path.is_file():
            known = sorted(file.stem for file in SHIPPED.glob("*.yaml"))
            raise ConfigError(
                f"There is no experiment {str(name)!r}.{did_you_mean(str(name), known)} Known: {', '.join(known)}; or "
                "give a .yaml file."
            )
    return load_yaml(Experiment, path)


def _check_unique(what: str, names: Sequence[Any]) -> None:
    twice = [name for number, name in enumerate(names) if name in names[:number]]
    if twice:
        raise ConfigError(f"The {what} {twice[0]!r} is there twice.")
