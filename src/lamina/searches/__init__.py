"""Searches in a supernet: strategies propose configurations, a score judges them, a study keeps what came out."""
