"""``python -m xdit_launcher``: the same as ``xdit-launch``."""

from xdit_launcher.cli import main

if __name__ == "__main__":
    main()
