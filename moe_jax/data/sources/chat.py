"""The source `chat`: files of conversations, of which the answers alone are learned.

`chat:GLOB[#TEMPLATE]`: JSON lines, each {"messages": [{"role": ..., "content": ...}, ...]}, or a
pair such as {"prompt": ..., "response": ...}. TEMPLATE is a file with a template of jinja, as
tokenizers of transformers have them: `chat_template.jinja`, or a `tokenizer_config.json` that has
one. Without it conversations are written in ChatML.

A conversation is one document. An answer is what the template adds for a message of the assistant,
behind what it writes to ask for one, its end included. Answers are encoded by themselves, as they
are when the model has read the prompt and writes.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from moe_jax.data.chat_template import Template, compiled
from moe_jax.data.documents import Conversation
from moe_jax.data.sources.characters import open_text, plain, readable
from moe_jax.data.sources.contract import Source
from moe_jax.data.sources.files import matches, stem
from moe_jax.errors import UserError

PAIRS = (("prompt", "response"), ("prompt", "completion"), ("instruction", "output"))
CHATML = (
    "{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def read(argument: str) -> Iterator[Conversation]:
    """Yields each conversation as one document."""
    pattern, _, place = argument.partition("#")
    template = compiled(_text_of_template(place) if place else CHATML, place or "ChatML")
    for path in matches("chat", pattern):
        domain = stem(path)
        with readable(path), open_text(path) as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield document(messages_of(line, where), template, domain, where)


def document(
    messages: list[dict[str, Any]], template: Template, domain: str, where: str
) -> Conversation:
    """Returns a conversation as the template writes it, cut around its answers.

    UserError where the template writes earlier messages in another way when later ones follow:
    then nobody can say what an answer is.
    """
    text = template(messages, where, ask=False)
    cuts: list[int] = []
    learned = [False]
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        # The answer is what the second text has more than the first one.
        before = template(messages[:i], where, ask=True)
        after = template(messages[: i + 1], where, ask=False)
        if not (after.startswith(before) and text.startswith(after)):
            raise UserError(
                f"{where}: the chat template {template.name} does not write message {i + 1} behind "
                "those before it, so the answer has no place in the text: take a template that "
                "leaves earlier messages as they are"
            )
        cuts += [len(before), len(after)]
        learned += [True, False]
    if not cuts:
        raise UserError(f"{where} has no message of the assistant: there is nothing to learn")
    if cuts[-1] == len(text):
        # Nothing follows the last answer.
        cuts.pop()
        learned.pop()
    return Conversation(plain(text, where), domain, tuple(cuts), tuple(learned))


def messages_of(line: str, where: str) -> list[dict[str, Any]]:
    """Returns the messages of a line. UserError where it has none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}") from None
    record = record if isinstance(record, dict) else {}
    # A pair is a conversation of two messages.
    for asked, answered in PAIRS:
        if isinstance(record.get(asked), str) and isinstance(record.get(answered), str):
            return [
                {"role": "user", "content": record[asked]},
                {"role": "assistant", "content": record[answered]},
            ]
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(map(_is_message, messages)):
        raise UserError(
            f'{where} has no list "messages" of {{"role": ..., "content": ...}} (it has: '
            f"{', '.join(record) or 'no object'})"
        )
    return messages


def _is_message(message: Any) -> bool:
    """Returns whether a value is an object with a role and a text."""
    if not isinstance(message, dict):
        return False
    return isinstance(message.get("role"), str) and isinstance(message.get("content"), str)


def _text_of_template(place: str) -> str:
    """Returns the template in a file. UserError where there is none."""
    path = Path(place).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"the chat template {path} cannot be read: {error}") from None
    # A file of a template alone; else a tokenizer_config.json, which has it among others.
    if path.suffix != ".json":
        return text
    try:
        template = json.loads(text).get("chat_template")
    except (ValueError, AttributeError):
        template = None
    if not isinstance(template, str):
        raise UserError(f'{path} has no text "chat_template": name a file that has one')
    return template


SOURCE = Source(
    argument_syntax=":GLOB[#TEMPLATE]",
    needs_argument=True,
    packed_by_run=False,
    read=read,
    extra_modules=("jinja2",),
)
