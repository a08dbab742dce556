"""Carries out plans on one device: state by slot, batches, memory. Knows no requests and no text."""
