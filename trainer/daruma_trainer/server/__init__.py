"""A server: one process with one shard. Imports numpy and pyzmq, never torch."""
