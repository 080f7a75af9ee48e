"""Supernets: every form of every layer in one network, trained at once and searched by what configurations cost and score."""
