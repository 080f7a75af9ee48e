"""Modules that run: what a layer of the network becomes."""
