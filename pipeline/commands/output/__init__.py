"""What commands print: figures, tables and messages, with text from others escaped."""
