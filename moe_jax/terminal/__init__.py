"""What a person reads on a terminal: tables, the live line, what a command is doing."""
