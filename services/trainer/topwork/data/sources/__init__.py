"""Image sources: class directories, archives, tables and TensorFlow Datasets."""

from topwork.data.sources.class_selection import ClassSelection, SelectedClasses
from topwork.data.sources.source import Source, SourceEntry, SourceImage, SpaceEstimate
from topwork.errors import SpecError
from topwork.spec.dataset import Dataset, DatasetSource
from topwork.workspace import Workspace

__all__ = ["Source", "SourceEntry", "SourceImage", "SpaceEstimate", "open_dataset_source", "open_source"]


def open_dataset_source(settings: Dataset, workspace: Workspace) -> Source:
    """Create the source of `spec.dataset`, with the classes, splits and groups that it selects; see `open_source`."""
    selection = ClassSelection(settings.classes)
    source = open_source(
        settings.source,
        workspace,
        has_split_directories=settings.has_split_directories,
        group_column=settings.group_column,
        selection=selection,
    )
    return source if settings.classes is None else SelectedClasses(source, selection)


def open_source(
    source: DatasetSource,
    workspace: Workspace,
    *,
    has_split_directories: bool = False,
    group_column: str | None = None,
    selection: ClassSelection | None = None,
) -> Source:
    """Create the source that a spec selects.

    Example:
        ```python
        source = open_source(job.spec.dataset.source, workspace)
        for image in source.images("train"):
            print(image.name, image.label)
        ```

    Args:
        source: `spec.dataset.source`.
        workspace: Storage, which also reads S3 sources, and scratch space for downloads.
        has_split_directories: Whether the directories of a folder or archive are splits, which contain the classes.
        group_column: Column of a table with the groups of images.
        selection: Classes that will be selected from all of those that the source returns, so that it need not read
            the images of others; None for all.

    Returns:
        The source.

    Raises:
        SpecError: If the spec selects no source.
    """
    # Imported on demand, because TFDS imports TensorFlow.
    if source.folder:
        from topwork.data.sources.folder import ImageFolder

        return ImageFolder(source.folder, workspace, has_split_directories=has_split_directories)
    if source.archive:
        from topwork.data.sources.archive import ImageArchive

        return ImageArchive(source.archive, workspace, has_split_directories=has_split_directories, selection=selection)
    if source.table:
        from topwork.data.sources.table import ImageTable

        return ImageTable(source.table, workspace, group_column, selection)
    if source.tfds:
        from topwork.data.sources.tfds import TfdsSource

        return TfdsSource(source.tfds, workspace)
    raise SpecError("spec.dataset.source is empty. Set one of tfds, folder, archive or table.")
