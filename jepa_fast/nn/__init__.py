"""Modules over ops; nothing here knows what a JEPA is."""
