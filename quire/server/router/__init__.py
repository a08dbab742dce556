"""A server in front of others: forwards each request to the replica that is expected to begin first."""
