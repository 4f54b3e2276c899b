"""One stream from each server to its next replica: `Chain` and `copies` (decision 23).

`outflow` decides what a server sends, `inflow` takes it in, `cover` knows which pushes are on
enough nodes, and `replicator` joins them to the serve loop.
"""
