"""Results in the schema of PEFT's own ``method_comparison``: one JSON for each training, so tables can lie side by side.

The key names are those of ``log_results`` in method_comparison/MetaMathQA/utils.py. What they call accelerator memory
is, on a CPU, the process's resident memory: its peak in all three places. What has no place there is under ``smidgen``.
"""

import platform
import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from smidgen.lab.compare.cells import Record
from smidgen.lab.compare.table import Results, Row

PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def all_results(results: Results) -> dict[str, dict[str, Any]]:
    """File name -> contents, one for each finished training."""
    rows = {row.method.name: row for row in results.rows if row.format in results.first}
    found = {}
    for record in results.records:
        values = one_result(results, rows[record["method"]], record)
        found[values["run_info"]["experiment_name"].replace("/", "--") + ".json"] = values
    return found


def one_result(results: Results, row: Row, record: Record) -> dict[str, Any]:
    """One training as PEFT's harness would have logged it."""
    slug = re.sub(r"[^A-Za-z0-9.]+", "-", row.method.name).strip("-")
    name = f"{slug}/{results.experiment.name}-seed{record['seed']}"
    memory = row.peak_memory or 0
    return {
        "run_info": {
            "created_at": record["created_at"],
            "total_time": record["total_seconds"],
            "experiment_name": name,
            "peft_branch": "main",
            "peft_worktree_is_dirty": False,
            "train_config": _train_config(results, record),
            "peft_config": record["peft_config"],
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": memory,
            "accelerator_memory_max": memory,
            "accelerator_memory_reserved_99th": memory,
            "train_time": record["train_seconds"],
            "file_size": record["formats"][row.format]["bytes"]["file"],
            "num_trainable_params": record["numbers"]["adapter"] + record["numbers"]["head"],
            "num_total_params": record["numbers"]["total"],
            "status": "success",
            "metrics": _metrics(results, row, record),
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {str(results.experiment.config().data.path): {"sha": None, "created_at": None}},
            "package_info": package_info(),
            "system_info": system_info(),
            "pytorch_info": _pytorch(),
        },
        "smidgen": {
            "method": row.method.name,
            "trained_numbers": record["numbers"],
            "formats": {
                name: {part: found[part] for part in ("bytes", "validation", "test")}
                for name, found in record["formats"].items()
            },
            "head_bytes": record["head_bytes"],
            "step_ratio": row.step_ratio,
            "peak_memory": row.peak_memory,
            "forgetting": record["forgetting"],
        },
    }


def package_info() -> dict[str, str | None]:
    """``<package>-version`` and ``<package>-commit-hash`` of what the harness of PEFT lists; None where not installed."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[f"{name}-version"] = version(name)
        except PackageNotFoundError:
            found[f"{name}-version"] = None
        found[f"{name}-commit-hash"] = None
    return found


def system_info() -> dict[str, str]:
    """The machine, in PEFT's keys."""
    names = ("system", "release", "version", "machine", "processor")
    return {name: getattr(platform, name)() for name in names} | {"accelerator": "N/A"}


def _pytorch() -> str:
    import torch

    return str(torch.__config__.show())


def _train_config(results: Results, record: Record) -> dict[str, Any]:
    """PEFT's training settings, and the whole of ours beside them."""
    config = results.experiment.config(record["seed"])
    train, data = config.train, config.data
    dtypes = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}
    return {
        "model_id": config.model,
        "dtype": dtypes[train.mixed_precision],
        "max_seq_length": getattr(data, "max_length", 0),
        "batch_size": data.train_batch_size,
        "batch_size_eval": data.eval_batch_size,
        "max_steps": train.max_train_steps,
        "eval_steps": train.eval_steps,
        "compile": False,
        "use_gc": config.gradient_checkpointing,
        "query_template": "",
        "seed": record["seed"],
        "grad_norm_clip": train.max_grad_norm,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": record["rate"], "weight_decay": config.adapter.weight_decay},
        "lr_scheduler": train.lr_scheduler,
        "use_amp": train.mixed_precision != "no",
        "autocast_adapter_dtype": True,
        "generation_kwargs": {},
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


def _metrics(results: Results, row: Row, record: Record) -> list[dict[str, Any]]:
    """The one evaluation there is: the test at the end, which is where PEFT's tools look."""
    found, samples = record["formats"][row.format], record["steps"] * results.experiment.config().data.train_batch_size
    last = {
        "step": record["steps"],
        f"valid {results.metric}": found["validation"][results.metric],
        f"test {results.metric}": found["test"][results.metric],
        "test loss": row.loss,
        "train loss": record["train_loss"],
        "train samples": samples,
        "train total tokens": record["train_tokens"],
    }
    if record["forgetting"] is not None:
        last["forgetting"] = record["forgetting"]["change"]
    return [last]
