"""One module per subcommand of `segcompass`, each with `main(argv=None)`; segcompass/cli.py has their table.

A module says which options its command has and calls what does the work. That is imported after the options are
parsed, where it needs torch, so that `--help` is quick.
"""
