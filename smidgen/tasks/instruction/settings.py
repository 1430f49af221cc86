"""The settings of an instruction tuning."""

from dataclasses import dataclass, field
from pathlib import Path

from smidgen.tasks.finetune.settings import FinetuneConfig


@dataclass(frozen=True)
class InstructionData:
    """Conversations: messages, a question and its answer in columns, or a prompt and its completion."""

    path: str | None = None  # packaged name, file (jsonl, json, csv, parquet) or folder
    chat_template: Path | None = None  # a Jinja file; None: the tokenizer's own
    max_length: int = 512  # tokens
    held_out_share: float = 0.1  # cut from train for each of validation and test that has no file
    max_train_examples: int | None = None  # None: all
    group_by_length: bool = False  # batches of examples of like length: less padding, in another order
    train_batch_size: int = 8
    eval_batch_size: int = 16


@dataclass(frozen=True)
class InstructionConfig(FinetuneConfig):
    """One instruction tuning."""

    data: InstructionData = field(default_factory=InstructionData)
    model: str = "smollm2"
