"""The baseline of the text-to-image tasks."""

PEFT_LORA = "peft's LoRA"
