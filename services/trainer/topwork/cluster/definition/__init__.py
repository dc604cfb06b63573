"""The CustomResourceDefinitions of TransferJobs and TransferSearches, generated from the models of the spec."""

from topwork.cluster.definition.custom_resource import (
    CUSTOM_RESOURCES,
    TRANSFER_JOB,
    TRANSFER_SEARCH,
    definition,
    definition_text,
)

__all__ = ["CUSTOM_RESOURCES", "TRANSFER_JOB", "TRANSFER_SEARCH", "definition", "definition_text"]
