"""Chat templates: jinja, in the sandbox and with the names that transformers gives them."""

import datetime
import json
from collections.abc import Sequence
from typing import Any

from moe_jax.errors import UserError


class Template:
    """A compiled template. `name` is for messages."""

    def __init__(self, template: Any, name: str):
        self._template, self.name = template, name

    def __call__(self, messages: Sequence[dict[str, Any]], where: str, *, ask: bool) -> str:
        """Returns the messages as text; `ask`: with what stands before an answer.

        The tokens that begin and end a text are "", for rows of training have their boundary there.
        UserError for what the template refuses or cannot do.
        """
        import jinja2

        try:
            return self._template.render(
                messages=list(messages), add_generation_prompt=ask, bos_token="", eos_token=""
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError) as error:
            raise UserError(f"{where}: the chat template {self.name} says: {error}") from None


def compiled(text: str, name: str) -> Template:
    """Returns the template in a text. UserError for what is no template."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=False, **options)

    def now(form: str) -> str:
        return datetime.datetime.now().strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    names: dict[str, Any] = {"raise_exception": refuse, "strftime_now": now}
    environment.globals.update(names)
    try:
        return Template(environment.from_string(text), name)
    except jinja2.TemplateError as error:
        raise UserError(f"the chat template {name} is none: {error}") from None
