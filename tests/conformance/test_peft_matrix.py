"""peft's own matrix of tests for custom models, run on our tuner, on the oldest and the newest peft we support.

Its test files come from its source distribution and stay in a temporary folder; only the table of cases is ours
(``ours.py``).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from smidgen.adapters.tuner.peft_bridge import TESTED_PEFT

ROOT = Path(__file__).parents[2]
# What peft grants methods of its own: merging a convolution may round by 1e-3, as it may for LoRA; methods that multiply
# train at a smaller rate, since inputs up to 89 make three steps at 0.5 diverge.
LENIENCE = [
    ("(config_cls, (IA3Config, LoraConfig", "(config_cls, (SmidgenConfig, IA3Config, LoraConfig"),
    ("(VBLoRAConfig, RandLoraConfig, UniLoraConfig,", "(SmidgenConfig, VBLoRAConfig, RandLoraConfig, UniLoraConfig,"),
]
IMPORT = "from ours import SmidgenConfig\n"
CLASSES = ("TestPeftCustomModel", "TestMultipleActiveAdapters")
INSERT = """
from ours import MULTIPLE_ACTIVE, TEST_CASES as OURS, OurConfig, SmidgenConfig
TEST_CASES[:] = OURS
ALL_PEFT_CONFIG_CLASSES[:] = [OurConfig]
MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = MULTIPLE_ACTIVE


"""


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if done.returncode:
        pytest.skip(f"pip cannot fetch peft here: {done.stderr.strip()[-300:]}")


def prepare(version: str, folder: Path) -> None:
    """peft itself under ``site``, its tests with our cases under ``tests``."""
    pip("download", "--no-deps", "--no-binary", "peft", "--dest", str(folder), f"peft=={version}")
    pip("install", "--no-deps", "--target", str(folder / "site"), f"peft=={version}")
    with tarfile.open(folder / f"peft-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    tests = folder / "tests"
    tests.mkdir()
    (tests / "__init__.py").touch()
    for name in ("test_custom_models.py", "testing_common.py", "testing_utils.py"):
        shutil.copy(folder / f"peft-{version}" / "tests" / name, tests / name)
    shutil.copy(Path(__file__).with_name("ours.py"), folder / "ours.py")
    file = tests / "test_custom_models.py"
    head, mark, rest = file.read_text().partition("class MLP(nn.Module):")
    assert mark, f"peft {version} has no MLP in its test_custom_models.py any more"
    file.write_text(head + INSERT + mark + rest)
    for file in tests.glob("test*.py"):
        text = file.read_text()
        for old, new in LENIENCE:
            text = text.replace(old, new)
        file.write_text(text)
    common = tests / "testing_common.py"
    common.write_text(common.read_text().replace("import pytest\n", f"import pytest\n{IMPORT}", 1))


@pytest.mark.slow
@pytest.mark.parametrize("version", [TESTED_PEFT[0], TESTED_PEFT[-1]])
def test_peft_custom_models(version: str, tmp_path: Path, record_property) -> None:  # type: ignore[no-untyped-def]
    prepare(version, tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    paths = os.pathsep.join(map(str, (tmp_path / "site", tmp_path, ROOT)))
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    which = subprocess.run(
        [sys.executable, "-c", "import peft; print(peft.__version__)"], env=environment, capture_output=True, text=True
    )
    assert which.stdout.strip() == version
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=short", "-rf"]
        + [f"tests/test_custom_models.py::{name}" for name in CLASSES]
        + ["-k", "OurConfig"],  # the other tests of these classes are about one method of peft's own
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=7200,
    )  # fmt: skip
    counts = {kind: int(n) for n, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout[-2000:])}
    record_property("counts", counts)
    print(f"peft {version}: {counts}")
    assert counts.get("passed", 0) > 1000, done.stdout[-3000:] + done.stderr[-2000:]
    assert not counts.get("failed") and not counts.get("error"), done.stdout[-6000:]
