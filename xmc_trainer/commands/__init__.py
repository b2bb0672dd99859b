"""What `xmc-trainer` offers, a module a command."""
