"""The id of a search, under which its journal is stored."""

from topwork.spec.digest import digest_of, training_content
from topwork.spec.search import TransferSearch


def search_id(search: TransferSearch) -> str:
    """Return the id of a search: `<name>-<8 hex digits>`, by all that decides which trials it runs and how they rank.

    The number of trials, parallelism, budget, gates and formats are not part of it: a search with more trials
    continues, and a changed gate evaluates only the best model again.

    Example:
        >>> search_id(search)
        'cats-vs-dogs-1c9d03ba'
    """
    spec = search.spec
    content = {
        "template": training_content(spec.template),
        "metrics": sorted(spec.template.evaluate.metrics),
        **spec.model_dump(
            mode="json", by_alias=True, exclude_defaults=True, include={"space", "metric", "sampler", "pruner", "seed"}
        ),
    }
    return f"{search.metadata.name}-{digest_of(content)[:8]}"
