"""``python -m mlxarch`` is the ``mlxarch`` command."""

from mlxarch.cli.main import main

if __name__ == "__main__":
    main()
