"""All metadata is in pyproject.toml. The C++ extension (csrc) will be declared here."""

from setuptools import setup

setup()
