"""What an answer is made of: reasoning, text and calls of tools, read from the text that a model writes."""
