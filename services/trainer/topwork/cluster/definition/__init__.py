"""The CustomResourceDefinition of TransferJobs, generated from the models of the spec."""

from topwork.cluster.definition.custom_resource import definition, definition_text

__all__ = ["definition", "definition_text"]
