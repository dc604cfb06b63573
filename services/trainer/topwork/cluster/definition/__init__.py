"""The CustomResourceDefinition of TransferJobs, generated from the models of the spec."""
