"""A network's whole way in one call: the front of its speed and its score, and one network from it."""
