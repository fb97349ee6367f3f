"""The demo: a small model memorizes a small synthetic data set, then all commands run on it."""

from neko_lean.demo.run import demo

__all__ = ["demo"]
