"""The command line, by its script or as `python -m forwardfill`, where no script of that name is on the PATH."""

import sys


def main() -> None:
    """Run it. It takes seconds to import on a slow machine, and who stops it then is told as little as at any other time."""
    try:
        from forwardfill.cli import app  # noqa: PLC0415 - what is imported at the top is not in the `try`
    except KeyboardInterrupt:
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
