"""Damage of every kind to every kind of byte of a store, and what comes of it."""
