"""The program `millrace`, also as `python -m cluster`: says in one sentence where the installation is broken."""

import sys


def main() -> None:
    try:
        from cluster.cli import main as run
    except ImportError as error:
        sys.exit(f"error: the installation is broken ({error}); run `make clean` and install again")
    run()


if __name__ == "__main__":
    main()
