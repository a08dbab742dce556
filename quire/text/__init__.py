"""Tokenizers, chat templates and detokenization. Nothing in this package imports torch."""
