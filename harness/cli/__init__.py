"""The command line. `harness.cli.app` holds the commands; nothing here loads torch before a command needs it."""
