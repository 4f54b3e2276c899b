"""Daruma for workers and servers; `daruma.join()` is where a program begins."""
