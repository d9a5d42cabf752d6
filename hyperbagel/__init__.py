"""Hyper-Bagel: fast unified multimodal models (understand, draw, edit) in the open."""

__version__ = "0.1.0"
