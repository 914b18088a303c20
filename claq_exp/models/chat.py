"""Conversations as text, by the chat template that comes with a tokenizer."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from claq_exp.errors import ConfigError, SourceError, telling_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

    from claq_exp.sources.fields import Conversation, Writer

# What templates print as today's, else tokens would change every day; Llama's own for no date.
TODAY = datetime(2024, 7, 26)
DATES = "".join(f" | replace('%{part}', '{TODAY:%{part}}')" for part in "aAbBdHIjmMpSyY")
PINNED = f"{{% macro strftime_now(format) %}}{{{{ format{DATES} }}}}{{% endmacro +%}}"


def chat_writer(tokenizer: Tokenizer, where: str) -> Writer:
    """Return what writes a conversation as the text that the model was trained on.

    Special tokens are in the text, that of its beginning too where the template has it.  Raises
    ConfigError that names the config group `where` for a tokenizer without a template.
    """
    if not tokenizer.chat_template:
        raise ConfigError(
            f"{where}.chat=true: the model's tokenizer has no chat template; give a text field, or "
            "a model that was trained on conversations"
        )

    template = PINNED + tokenizer.get_chat_template()

    def write(messages: Conversation) -> str:
        try:
            text = tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
        except Exception as error:  # a template is foreign code
            raise SourceError(
                f"{where}: the chat template refuses a conversation of roles "
                f"{', '.join(str(message['role']) for message in messages)}: {telling_line(error)}"
            ) from error
        return str(text)

    return write
