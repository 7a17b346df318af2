"""Held-out metrics of any checkpoint."""
