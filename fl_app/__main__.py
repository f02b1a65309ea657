"""``python -m fl_app``."""

from fl_app.cli import main

# Processes that a sweep starts may import the main module of the one that started them.
if __name__ == "__main__":
    main()
