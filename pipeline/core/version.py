"""The version of this package. Apart from `pipeline/__init__.py`, which imports from every room below it."""

VERSION = "0.1.0"
