"""What each network is, as data. Nothing in this package imports torch."""
