"""``python -m lq`` is the command ``lq``."""

from lq.cli import main

if __name__ == "__main__":
    main()
