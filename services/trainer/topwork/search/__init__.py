"""The engine of a TransferSearch: which trial runs next, and what the trials so far have shown. Does not train."""
