"""What the documentation is made with: sources to cells, cells to outputs, outputs to Markdown."""
