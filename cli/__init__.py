"""The ``mlxarch`` command: parse, call, print."""
