"""Where images come from: folders, archives, tables and TensorFlow Datasets."""

from topwork.data.sources.source import Item, Room, Source
from topwork.errors import SpecError
from topwork.spec.dataset import DatasetSource
from topwork.workspace import Workspace

__all__ = ["Item", "Room", "Source", "open_source"]


def open_source(source: DatasetSource, workspace: Workspace) -> Source:
    """Open the one source that a spec names.

    Args:
        source: `spec.dataset.source`.
        workspace: Storage, through which S3 sources are read too, and scratch for downloads.

    Returns:
        The source.

    Raises:
        SpecError: If the spec names none.
    """
    if source.folder:
        from topwork.data.sources.folder import Folder

        return Folder(source.folder, workspace)
    if source.archive:
        from topwork.data.sources.archive import Archive

        return Archive(source.archive, workspace)
    if source.table:
        from topwork.data.sources.table import Table

        return Table(source.table, workspace)
    if source.tfds:
        from topwork.data.sources.tfds import TfdsSource

        return TfdsSource(source.tfds, workspace)
    raise SpecError("spec.dataset.source names no source: give one of tfds, folder, archive and table.")
