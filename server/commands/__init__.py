"""The subcommands of ``weft``: each module adds its arguments and runs. Import no torch."""
