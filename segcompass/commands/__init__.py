"""One module per subcommand of `segcompass`, each with `main(argv=None)`; segcompass/cli.py has their table."""
