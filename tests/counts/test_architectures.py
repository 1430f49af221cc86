"""Named architectures: the published sizes, the papers' targets, no storage, no imports before they are needed."""

import ast
from pathlib import Path

import pytest

import smidgen
from smidgen.bases import architectures, counting
from smidgen.bases.architectures import ARCHITECTURES, architecture, build_architecture

TARGETS = {
    "sd15": 128,
    "sdxl": 560,
    "roberta-base": 24,
    "roberta-large": 48,
    "vit-base": 24,
    "vit-large": 48,
    "llama2-7b": 64,
    "llama3-8b": 7 * 32,
    "deberta-v3-base": 6 * 12,
    "gemma-2b": 7 * 18,
    "gemma-7b": 7 * 28,
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_size_targets_and_no_storage(name):
    model = build_architecture(name)
    tensors = [*model.parameters(), *model.buffers()]
    assert all(t.is_meta for t in tensors)
    assert sum(p.numel() for p in model.parameters()) == architecture(name).parameters
    assert smidgen.count(name, "svfit", r=1) == TARGETS[name]  # one number a matrix


def test_an_unknown_name_gets_the_nearest():
    with pytest.raises(smidgen.ConfigError, match=r"'robberta_base'.*Did you mean 'roberta-base'.*Known: sd15, sdxl"):
        smidgen.count("robberta_base", "svfit")


@pytest.mark.parametrize("name", ["sdxl", "vit-base"])
def test_a_missing_library_names_the_extra(name, monkeypatch):
    def missing(module):
        raise ImportError(module)

    monkeypatch.setattr(architectures.importlib, "import_module", missing)
    with pytest.raises(smidgen.MissingExtraError, match=r"needs (diffusers|transformers): pip install 'smidgen\[diff"):
        smidgen.count(name, "svfit")


def test_default_targets_follow_the_library_s_names():
    shape = architecture("vit-base")
    named = [{"query", "value"}, {"q_proj", "v_proj"}]
    assert shape.targets_in(build_architecture("vit-base")) in named
    with pytest.raises(smidgen.TargetError, match="name target_modules"):
        shape.targets_in(build_architecture("deberta-v3-base"))


@pytest.mark.parametrize("module", [counting, architectures])
def test_importing_needs_neither_transformers_nor_diffusers(module):
    top = ast.parse(Path(module.__file__).read_text()).body
    named = [a.name for node in top if isinstance(node, ast.Import) for a in node.names]
    named += [node.module for node in top if isinstance(node, ast.ImportFrom)]
    assert named and not {name.partition(".")[0] for name in named} & {"transformers", "diffusers"}
