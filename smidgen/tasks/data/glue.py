"""The columns and metrics of the GLUE tasks, by the names their files have (Wang et al. 2018, table 1)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GlueTask:
    """Which columns hold the text and its pair, what is measured, and whether the label is a number."""

    text: str
    pair: str | None
    metric: str
    regression: bool = False


GLUE = {
    "cola": GlueTask("sentence", None, "matthews"),
    "sst2": GlueTask("sentence", None, "accuracy"),
    "mrpc": GlueTask("sentence1", "sentence2", "f1"),
    "stsb": GlueTask("sentence1", "sentence2", "pearson", regression=True),
    "qqp": GlueTask("question1", "question2", "f1"),
    "mnli": GlueTask("premise", "hypothesis", "accuracy"),
    "qnli": GlueTask("question", "sentence", "accuracy"),
    "rte": GlueTask("sentence1", "sentence2", "accuracy"),
    "wnli": GlueTask("sentence1", "sentence2", "accuracy"),
}
