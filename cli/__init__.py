"""The ``mlxarch`` command: parse arguments, call the library, print results."""
