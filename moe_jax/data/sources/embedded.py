"""The source `embedded`: the text that ships with the package, or chosen domains of it."""

from collections.abc import Iterator

from moe_jax.data import corpora
from moe_jax.data.documents import Document
from moe_jax.data.sources.contract import Source
from moe_jax.errors import UserError


def domains(argument: str) -> tuple[str, ...]:
    """Returns the domains that `drama,verse` names, all of them for "".

    Raises UserError for an unknown or a repeated one.
    """
    if not argument:
        return corpora.DOMAINS
    names = tuple(name.strip() for name in argument.split(","))
    unknown = [name for name in names if name not in corpora.DOMAINS]
    repeated = len(set(names)) < len(names)
    if unknown or repeated:
        mistake = (
            f"has no domain {unknown[0]!r}" if unknown else f"names a domain twice: {argument}"
        )
        raise UserError(
            f"source embedded {mistake}; choose each at most once from {', '.join(corpora.DOMAINS)}"
        )
    return names


def read(argument: str) -> Iterator[Document]:
    """Yields the documents of the domains that `argument` names, in that order."""
    for domain in domains(argument):
        for text, name in corpora.documents(domain):
            yield Document(text, name)


SOURCE = Source(
    argument_syntax="[:DOMAIN,...]", needs_argument=False, packed_by_run=True, read=read
)
