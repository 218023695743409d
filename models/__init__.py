"""The bundled models, read as package data."""
