"""``python -m fl_app``."""

from fl_app.cli import main

main()
