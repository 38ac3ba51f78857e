"""The commands: flags in, an exit status out."""
