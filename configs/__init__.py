"""Shipped configurations, read as package data."""
