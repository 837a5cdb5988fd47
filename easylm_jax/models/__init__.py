"""Models on arrays: they know no text, no loss, no optimiser and no configuration library."""
