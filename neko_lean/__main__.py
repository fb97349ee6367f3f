"""`python -m neko_lean` is `neko-lean`."""

from neko_lean.cli import main

main()
