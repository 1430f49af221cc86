"""Tune a language model to instructions with an adapter of kilobytes. Read from top to bottom; finetune.py tells the
common course.

    report = instruction(InstructionConfig(data=InstructionData("wordnet"), out=Path("words")))
"""

from smidgen.bases.origin import TEMPLATE
from smidgen.bases.transformers import load_language_model, load_tokenizer, locate_data
from smidgen.tasks.data.chat import encode_conversations, read_template
from smidgen.tasks.data.conversations import read_conversations
from smidgen.tasks.finetune.course import Prepared, finetune
from smidgen.tasks.finetune.measuring import check_length
from smidgen.tasks.finetune.report import FinetuneReport
from smidgen.tasks.finetune.settings import Adapter
from smidgen.tasks.instruction.settings import InstructionConfig, InstructionData
from smidgen.tasks.instruction.task import InstructionTask, content_digest, selects_logits
from smidgen.training.alone import runs_alone
from smidgen.training.loop import LoopConfig

PRESETS = {
    "default": InstructionConfig(train=LoopConfig(max_train_steps=300, lr_warmup_steps=15, eval_steps=50)),
    "debug": InstructionConfig(
        data=InstructionData("debug-chat", max_length=48, train_batch_size=8, eval_batch_size=8),
        adapter=Adapter(rank=4),
        train=LoopConfig(max_train_steps=4, lr_warmup_steps=1, checkpointing_steps=2, eval_steps=2, load_best=False),
        model="debug-chat",
    ),
    "thorough": InstructionConfig(
        train=LoopConfig(max_train_steps=2000, lr_warmup_steps=100, eval_steps=200, early_stopping_patience=4),
    ),
}


@runs_alone
def instruction(config: InstructionConfig, progress: bool = True) -> FinetuneReport | None:
    """Train, save, prove and score one adapter in ``config.out``. Raises SmidgenError for every refusal."""
    return finetune("instruction", config, prepare(config), progress)


def prepare(config: InstructionConfig) -> Prepared:
    """Read, check and tokenise the conversations; load the language model.

    Raises DataError and ConfigError for everything that would spoil the run, before anything is written.
    """
    data = config.data
    tokenizer = load_tokenizer(config.model)
    given = {}
    if data.chat_template is not None:
        tokenizer.chat_template = read_template(data.chat_template)
        given[TEMPLATE] = tokenizer.chat_template
    found = read_conversations(locate_data(data.path), data.held_out_share, data.max_train_examples)
    base = load_language_model(config.model, config.train.mixed_precision, config.dropout)
    check_length(data.max_length, tokenizer, base.model.config)
    spoken, warnings = encode_conversations(tokenizer, found.splits, data.max_length)
    task = InstructionTask(
        spoken,
        tokenizer.pad_token_id,
        batch_size=data.train_batch_size,
        eval_batch_size=data.eval_batch_size,
        seed=config.train.seed,
        selects=selects_logits(base.model),
        group_by_length=data.group_by_length,
    )
    return Prepared(
        model=base.model,
        task=task,
        heads=base.heads,
        family=base.kind,
        fresh=lambda: load_language_model(config.model, config.train.mixed_precision, config.dropout).model,
        counts={
            split: {
                "conversations": len({one.source for one in some}),
                "examples": len(some),
                "target tokens": sum(one.targets for one in some),
            }
            for split, some in spoken.items()
        },
        warnings=(*found.warnings, *warnings),
        data_digest=content_digest(spoken),
        files=given,
    )
