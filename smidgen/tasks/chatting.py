"""Talk to a language model with an adapter of ``smidgen train instruction``: turn by turn, as it was trained to read them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from smidgen.bases.origin import adapted_tokenizer, load_adapted, read_origin
from smidgen.errors import ConfigError, DataError
from smidgen.training.ranges import check_value

HELP = "Say something; /reset forgets what was said, /exit or Ctrl-D ends, Ctrl-C stops an answer."


class Chat:
    """A conversation with an adapter's folder and the base that it names.

    Args:
        adapter: a folder that ``smidgen train instruction`` wrote.
        base: another place of its base (None: as the folder says).
        system: what the conversation begins with, where the chat template has a place for it.
        max_new_tokens: the longest answer.
        temperature: 0 says the likeliest; above that, answers are drawn.
        top_p: drawn from the likeliest tokens that have this share together.
        seed: fixes what is drawn.

    Raises:
        SmidgenError: it is none, or its base cannot be found, or is another one.

    Example:
        >>> chat = Chat("words")  # doctest: +SKIP
        >>> chat.say("What is a dog?")  # doctest: +SKIP
        'a domesticated canine'
    """

    def __init__(
        self,
        adapter: str | Path,
        base: str | None = None,
        system: str | None = None,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> None:
        for name, value in {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}.items():
            check_value(name, value)
        origin = read_origin(adapter)
        if origin.task != "instruction":
            verb = "generate" if origin.head is None else "classify"
            raise ConfigError(f"{adapter} does not answer, it is for {origin.task}: use smidgen {verb}.")
        self.tokenizer = adapted_tokenizer(origin, base)
        self.model = load_adapted(origin, base).model
        if system is not None and not self.tokenizer.chat_template:
            raise ConfigError(
                "This base has no chat template, so it has no place for a system prompt; leave --system out."
            )
        self.system = system
        self.options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            self.options |= {"temperature": temperature, "top_p": top_p}
        else:  # the base's own ways to draw would be warned about
            self.options |= {"temperature": None, "top_p": None, "top_k": None}
        self.generator_seed = seed
        self.reset()

    def reset(self) -> None:
        """Forget what was said; the system prompt stays."""
        self.messages: list[dict[str, str]] = (
            [] if self.system is None else [{"role": "system", "content": self.system}]
        )

    def say(self, text: str, write: Callable[[str], Any] = lambda _: None) -> str:
        """The answer to ``text``, which ``write`` gets piece by piece as it is made. Both are kept for the next turn; of an
        answer that was stopped nothing is.

        Raises:
            DataError: nothing was said, the template has no such turn, or the conversation is longer than the model reads.
        """
        from transformers import TextStreamer

        if not text.strip():
            raise DataError("Nothing was said.")
        asked = [*self.messages, {"role": "user", "content": text}]
        inputs = self._encoded(asked).to(self.model.device)
        length = inputs["input_ids"].shape[1]
        most = getattr(self.model.config, "max_position_embeddings", None)
        if most is not None and length >= most:
            raise DataError(
                f"The conversation is {length:,} tokens long, and the model reads {most:,}: /reset, or say less."
            )

        class Writing(TextStreamer):
            def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
                write(text)

        room = self.options["max_new_tokens"] if most is None else min(self.options["max_new_tokens"], most - length)
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(self.generator_seed + len(self.messages))
            said = self.model.generate(
                **inputs,
                **{**self.options, "max_new_tokens": room},
                eos_token_id=self._ends(),
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=Writing(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            )
        answer = str(self.tokenizer.decode(said[0, length:], skip_special_tokens=True)).strip()
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return answer

    def _encoded(self, messages: list[dict[str, str]]) -> Any:
        """The conversation as tokens up to where the answer begins; without a template, what was said last as it stands."""
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            return self.tokenizer(messages[-1]["content"], return_tensors="pt", return_token_type_ids=False)
        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        except TemplateError as error:
            raise DataError(f"The chat template refuses this conversation: {error}.") from error

    def _ends(self) -> list[int]:
        """Tokens that end an answer: the base's, and the tokenizer's."""
        own = self.model.generation_config.eos_token_id
        found = [*(own if isinstance(own, list) else [own]), self.tokenizer.eos_token_id]
        return sorted({token for token in found if token is not None})


def talk(chat: Chat, lines: Iterable[str] | None = None, write: Callable[[str], Any] | None = None) -> None:
    """The conversation of a terminal: what is typed, or ``lines``, answered as it is made, until they end.

    /reset forgets what was said, /exit ends; Ctrl-C stops an answer, or ends where there is none. What cannot be answered is
    said and not kept.
    """
    write = write or _write
    alone = lines is None and sys.stdin.isatty()
    if alone:
        write(f"{HELP}\n")
    for line in _typed() if alone else lines if lines is not None else sys.stdin:
        text = line.strip()
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            chat.reset()
        elif text:
            try:
                chat.say(text, write)
            except DataError as error:
                if not alone:
                    raise
                write(str(error))
            except KeyboardInterrupt:
                if not alone:
                    raise
            write("\n")


def _typed() -> Iterator[str]:
    """Lines as they are typed, until Ctrl-D or Ctrl-C."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (editing and history)
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            _write("\n")
            return


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()
