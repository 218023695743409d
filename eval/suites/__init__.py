"""Evaluation suites, one YAML file each; read as package data."""
