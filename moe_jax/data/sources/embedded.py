"""The source `embedded`: the text that ships with the package, or chosen domains of it."""

from collections.abc import Iterator

from moe_jax.data import corpora
from moe_jax.data.documents import Document
from moe_jax.errors import UserError


def domains(argument: str) -> tuple[str, ...]:
    """Returns the domains that `drama,verse` names, all of them for "".

    UserError for an unknown or a repeated one.
    """
    names = tuple(name.strip() for name in argument.split(",")) if argument else corpora.DOMAINS
    unknown = [name for name in names if name not in corpora.DOMAINS]
    if unknown or len(set(names)) < len(names):
        what = f"has no domain {unknown[0]!r}" if unknown else f"names a domain twice: {argument}"
        raise UserError(
            f"source embedded {what}; choose each at most once from {', '.join(corpora.DOMAINS)}"
        )
    return names


def read(argument: str, label: str) -> Iterator[Document]:
    """Yields the documents of the domains that `argument` names; `label` renames their domain."""
    for domain in domains(argument):
        for text, name in corpora.documents(domain):
            yield Document(text, label or name)
