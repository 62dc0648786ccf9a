"""The version, in one place; read by setup without importing torch."""

__version__ = "0.1.0"
