"""The verbs: one module a subcommand, its whole story, callable from Python."""
