"""Training a decomposed network: which factors rest, and everything around the steps."""
