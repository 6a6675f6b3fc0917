"""Subcommands of ``mlxarch``, one file each, grouped by purpose."""
