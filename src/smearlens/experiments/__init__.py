"""Studies: each a frozen configuration and a function that runs it to a report."""
