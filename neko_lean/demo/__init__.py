"""The demo: a small model learns a small world by heart, then runs the same code as the three commands."""

from neko_lean.demo.run import demo

__all__ = ["demo"]
