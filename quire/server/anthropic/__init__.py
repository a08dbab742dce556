"""Anthropic's Messages over one model."""
