"""What runs a network where it is served: a value that prepares it once and then runs it."""
